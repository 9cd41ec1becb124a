//! Runs `cargo xtask dev --observe`: the alerts are evaluated, a request's trace is in the file, and Ctrl-C ends
//! everything.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use common::go_tools;
use common::prometheus;
use common::steps::{Progress, Tally};
use common::workspace::{self, in_ci};
use harness::http;
use harness::servers::daemon::{self, Daemon};
use harness::servers::ports;
use harness::{Postgres, Redis, Scratch, install};
use rustix::process::Signal;

use crate::rules;

const DATABASE: &str = "observed";

/// For a build without changes, the servers, and the first scrapes.
const READY_LIMIT: Duration = Duration::from_secs(120);
const SCRAPE_LIMIT: Duration = Duration::from_secs(40);
const EXPORT_LIMIT: Duration = Duration::from_secs(20);
const END_LIMIT: Duration = Duration::from_secs(60);

pub(crate) fn check(tally: &mut Tally, postgres: &Postgres, redis: &Redis) {
    let there = go_tools::go().is_ok() && install::has_prometheus();
    if !in_ci() && !there {
        println!("  {:24}skipped: needs Go and Prometheus", "dev --observe");
        return;
    }
    let fix = "end another `cargo xtask dev` of this clone, and read its output above";
    tally.check("dev --observe", fix, |progress| run(progress, postgres, redis));
}

fn run(progress: &Progress, postgres: &Postgres, redis: &Redis) -> Result<()> {
    postgres.create_database(DATABASE)?;
    let scratch = Scratch::new("observe")?;
    let log = scratch.path().join("output");
    let (port, ops_port) = (ports::free()?, ports::free()?);
    let mut command = Command::new(std::env::current_exe()?.with_file_name("xtask"));
    command.args(["dev", "--observe"]).current_dir(workspace::root());
    command.env("DATABASE_URL", postgres.url(DATABASE)).env("REDIS_URL", redis.url(0));
    command.env("PORT", port.to_string()).env("OPS_PORT", ops_port.to_string()).env("HOST", "127.0.0.1");
    command.env_remove("OTEL_EXPORTER_OTLP_ENDPOINT");
    let mut child = Daemon::start(command, &log).context("start cargo xtask dev")?;
    look(progress, &mut child, &log, port).with_context(|| {
        let said = fs::read_to_string(&log).unwrap_or_default();
        format!("it said:\n{}", daemon::tail(&said, 30))
    })
}

fn look(progress: &Progress, child: &mut Daemon, log: &Path, port: u16) -> Result<()> {
    let said = || fs::read_to_string(log).unwrap_or_default();
    let ready = daemon::poll(READY_LIMIT, || {
        ensure!(child.is_running(), "it ended at once");
        Ok(said().contains("Ctrl-C ends it all").then_some(()))
    })?;
    ensure!(ready.is_some(), "it was not ready within {} s", READY_LIMIT.as_secs());
    let said = said();
    let watch = port_in(&said, "  alerts    http://127.0.0.1:")?;
    let rules = evaluated(watch)?;
    let service = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    ensure!(http::get(service, "/me", http::REQUEST_TIMEOUT)?.status == 401, "/me");
    let file = said.lines().find_map(|line| line.strip_prefix("  traces    ")?.split_once(','));
    let file = workspace::root().join(file.context("no line about traces")?.0);
    let traced = || fs::read_to_string(&file).unwrap_or_default().contains("\"GET /me\"").then_some(());
    daemon::poll(EXPORT_LIMIT, || Ok(traced()))?.context("the request's trace did not come")?;

    child.signal(Signal::INT);
    let status = child.wait(END_LIMIT)?.context("it does not end")?;
    ensure!(status.success(), "it ended with {status}");
    let collector = port_in(&said, "received at http://127.0.0.1:")?;
    for port in [port, watch, collector] {
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        ensure!(TcpStream::connect(address).is_err(), "something still listens on port {port}");
    }
    progress.say(&format!("{rules} rules, a trace"));
    Ok(())
}

/// Waits until the service is scraped, every rule of ours is loaded and the first are evaluated; returns their number.
fn evaluated(port: u16) -> Result<usize> {
    let ours = rules::all()?.len();
    let mut last = String::new();
    let done = daemon::poll(SCRAPE_LIMIT, || {
        let up = prometheus::get(port, "/api/v1/query?query=up")?;
        let is_up = up["data"]["result"][0]["value"][1] == "1";
        let groups = prometheus::get(port, "/api/v1/rules")?;
        let groups = groups["data"]["groups"].as_array().cloned().unwrap_or_default();
        let rules: Vec<_> = groups.iter().filter_map(|group| group["rules"].as_array()).flatten().collect();
        let count = |health: &str| rules.iter().filter(|rule| rule["health"] == health).count();
        let (loaded, good, bad) = (rules.len(), count("ok"), count("err"));
        last = format!("up: {is_up}; of {ours} rules {loaded} are loaded, {good} evaluated, {bad} failed");
        Ok((is_up && loaded == ours && good > 0 && bad == 0).then_some(()))
    })?;
    ensure!(done.is_some(), "{last}");
    Ok(ours)
}

fn port_in(text: &str, before: &str) -> Result<u16> {
    let (_, rest) = text.split_once(before).with_context(|| format!("no {before:?}"))?;
    let digits: String = rest.chars().take_while(char::is_ascii_digit).collect();
    digits.parse().with_context(|| format!("no port behind {before:?}"))
}
