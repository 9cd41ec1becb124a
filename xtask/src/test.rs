//! `cargo xtask test`: everything that a change has to pass, on servers that it starts by itself.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Result, bail};
use scrape::Metrics;
use serde_json::{Value, json};
use tests::servers::{daemon, programs};
use tests::{Postgres, PostgresOptions, Redis, RedisOptions, Scratch, install, places};

use crate::steps::{Progress, Tally};
use crate::workspace::{cargo, in_ci, offline_cargo};
use crate::{migrate, prepare, signals, workspace};

pub(crate) mod chart;
mod commands;
mod dashboards;
mod dev;
mod metrics;
mod observe;
mod rules;
mod scrape;
mod tiltfile;
pub(crate) mod traces;

#[derive(clap::Args)]
#[command(after_help = "Examples:
  cargo xtask test                         everything that a change has to pass
  cargo xtask test -- messages             only the tests with that in their name
  cargo xtask test -- --test it limits     only the integration tests of one module
  cargo xtask test --chart                 only the chart
  cargo xtask test --monitoring            only the dashboards, the rules and the runbooks
  cargo xtask test --dev                   only the developer's loop, and these commands")]
pub(crate) struct Args {
    /// Only what concerns the Helm chart
    #[arg(long, conflicts_with = "cargo_test")]
    chart: bool,
    /// Only what concerns the developer's loop: the Tiltfile, kind, the workflows, the commands
    #[arg(long, conflicts_with_all = ["cargo_test", "chart"])]
    dev: bool,
    /// Only what concerns the dashboards, the rules for Prometheus and the runbooks
    #[arg(long, conflicts_with_all = ["cargo_test", "chart"])]
    monitoring: bool,
    /// Arguments for `cargo test`; with any, only the tests run, without the other checks
    #[arg(last = true)]
    cargo_test: Vec<String>,
}

/// Private ones, gone at the end.
struct Servers {
    postgres: Postgres,
    redis: Redis,
    // Dropped last: the servers' directories are in it.
    _scratch: Scratch,
}

pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    signals::listen()?;
    let mut tally = Tally::default();
    if args.chart {
        chart::check(&mut tally);
    } else if args.dev {
        tiltfile::check(&mut tally);
        dev::check(&mut tally);
        commands::check(&mut tally);
    } else if args.monitoring {
        monitoring(&mut tally);
    } else if args.cargo_test.is_empty() {
        all(&mut tally)?;
    } else {
        let servers = tally.check("Postgres and Redis", "", start_servers);
        build_and_test(&mut tally, servers.as_ref(), None, &args.cargo_test)?;
    }
    Ok(tally.close())
}

/// What SREs look at.
fn monitoring(tally: &mut Tally) {
    let promtool = check_monitoring(tally);
    let servers = tally.check("Postgres and Redis", "", start_servers);
    if let (Some(servers), Some(_)) = (servers, build(tally)) {
        check_metrics(tally, promtool.as_deref(), &servers);
        observe::check(tally, &servers);
    }
}

/// What of that needs no running service. Returns promtool, for the rest.
fn check_monitoring(tally: &mut Tally) -> Option<PathBuf> {
    let promtool = if in_ci() || programs::promtool().is_some() || install::can_install() {
        let found = |progress: &Progress| install::ensure_prometheus(|line| progress.note(line));
        tally.check("Prometheus", "", found).map(|programs| programs.promtool)
    } else {
        println!("  {:24}skipped: what needs promtool (Debian: apt-get install prometheus)", "Prometheus");
        None
    };
    dashboards::check(tally, promtool.as_deref());
    rules::check(tally, promtool.as_deref());
    promtool
}

/// Which metrics there are is asked of the built service.
fn check_metrics(tally: &mut Tally, promtool: Option<&Path>, servers: &Servers) {
    let find = |progress: &Progress| Metrics::find(progress, &servers.postgres, &servers.redis);
    if let Some(there) = tally.check("metrics: scrape", "", find) {
        dashboards::check_metrics(tally, &there);
        rules::check_metrics(tally, promtool, &there);
    }
}

/// Reads every query with Prometheus's own parser, which takes it for a recording rule of that name.
fn parse_queries(progress: &Progress, promtool: &Path, queries: &[(String, String)]) -> Result<()> {
    let rule = |(name, expr): &(String, String)| json!({ "record": name, "expr": expr });
    let rules: Vec<Value> = queries.iter().map(rule).collect();
    let file = places::target_dir()?.join("xtask/queries.yaml");
    // JSON is YAML.
    fs::write(&file, json!({ "groups": [{ "name": "queries", "rules": rules }] }).to_string())?;
    let mut judge = Command::new(promtool);
    judge.args(["check", "rules", "--lint=none"]).arg(&file);
    progress.run(judge).map(drop)
}

/// Every check. A failed one does not keep the later ones from running.
pub(crate) fn all(tally: &mut Tally) -> Result<()> {
    tally.check("formatting", "cargo fmt --all", |progress| {
        progress.run(cargo(&["fmt", "--all", "--check"])).map(drop)
    });
    let servers = tally.check("Postgres and Redis", "", start_servers);
    lint(tally, servers.as_ref());
    tally.check("rustdoc", "the lines above name the place", |progress| {
        // Its readers work on the service: what is private is documented for them, too.
        let mut doc = offline_cargo(&["doc", "--workspace", "--no-deps", "--document-private-items"]);
        doc.env("RUSTDOCFLAGS", "-D warnings -A rustdoc::private_intra_doc_links");
        progress.run(doc)
    });
    check_dependencies(tally);
    chart::check(tally);
    tiltfile::check(tally);
    dev::check(tally);
    commands::check(tally);
    let promtool = check_monitoring(tally);
    build_and_test(tally, servers.as_ref(), promtool.as_deref(), &[])
}

fn start_servers(progress: &Progress) -> Result<Servers> {
    install::ensure_programs(|line| progress.note(line))?;
    let scratch = Scratch::new("servers")?;
    let postgres = Postgres::start(&scratch.path().join("postgres"), PostgresOptions::fast())?;
    let redis = Redis::start(&scratch.path().join("redis"), RedisOptions::default())?;
    Ok(Servers { postgres, redis, _scratch: scratch })
}

/// Clippy compiles the query macros against a live database, which checks the committed answers on the way.
fn lint(tally: &mut Tally, servers: Option<&Servers>) {
    const CLIPPY: [&str; 6] = ["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"];
    let fix = "cargo clippy --workspace --all-targets --fix, or by hand";
    let Some(Servers { postgres, .. }) = servers else {
        tally.check("clippy", fix, |progress| progress.run(offline_cargo(&CLIPPY)));
        return;
    };
    let migrated = tally.check("migrations", "", |_| prepare::migrate(postgres, prepare::DATABASE));
    if migrated.is_none() {
        return;
    }
    let linted =
        tally.check("clippy", fix, |progress| progress.run(prepare::asking_cargo(postgres, &CLIPPY)?));
    // After a compile error, not all queries have been asked.
    if linted.is_some() {
        tally.check("offline SQL data", "cargo xtask prepare", prepare::compare);
    }
}

fn build(tally: &mut Tally) -> Option<String> {
    tally.check("build", "", |progress| progress.run(offline_cargo(&["build", "-p", "chat-service"])))
}

fn build_and_test(
    tally: &mut Tally,
    servers: Option<&Servers>,
    promtool: Option<&Path>,
    args: &[String],
) -> Result<()> {
    let built = build(tally);
    if signals::asked_to_end() {
        return Ok(());
    }
    let (Some(servers), Some(_)) = (servers, built) else {
        println!("  the tests cannot run without the servers and the service");
        tally.failed += 1;
        return Ok(());
    };
    if args.is_empty() {
        check_metrics(tally, promtool, servers);
        migrate::check(tally, &servers.postgres, &servers.redis);
    }
    let mut command = test_command(servers)?;
    command.args(args);
    traces::prepare(tally, &mut command, args);
    count_tests(tally, command);
    if args.is_empty() {
        traces::check(tally, servers);
        observe::check(tally, servers);
    }
    Ok(())
}

/// `cargo test` with what the tests have to be told.
fn test_command(servers: &Servers) -> Result<Command> {
    let mut command = offline_cargo(&["test", "--workspace", "--no-fail-fast"]);
    command.env("TEST_DATABASE_URL", servers.postgres.url("postgres"));
    command.env("TEST_REDIS_URL", servers.redis.url(0));
    command.env("CHAT_SERVICE_BIN", places::target_dir()?.join("debug/chat-service"));
    // The failures' own output is what a reader needs; a backtrace of each buries it.
    command.env("RUST_BACKTRACE", "0");
    Ok(command)
}

/// A test run counts as its tests, and as one failure more when it fails for another reason, such as a build.
fn count_tests(tally: &mut Tally, command: Command) {
    let mut counts = (0, 0);
    let mut failures = Failures::default();
    let ran = tally.check("tests", "cargo xtask test -- NAME runs one alone", |progress| {
        let outcome = progress.run_counted(command, |line| {
            failures.see(line);
            if let Some((passed, failed)) = test_result(line) {
                counts.0 += passed;
                counts.1 += failed;
            }
        });
        match outcome {
            Ok(_) if counts.0 == 0 => bail!("no test ran"),
            Err(_) if !failures.lines.is_empty() => bail!(failures.text()),
            outcome => outcome,
        }
    });
    // The check counted itself as one.
    match ran {
        Some(_) => tally.passed -= 1,
        None if counts.1 > 0 => tally.failed -= 1,
        None => {}
    }
    tally.passed += counts.0;
    tally.failed += counts.1;
}

/// What libtest says of the failed tests, out of all that the run says.
#[derive(Default)]
struct Failures {
    lines: Vec<String>,
    open: bool,
}

impl Failures {
    /// The most that is shown; the step's log has all of it.
    const LINES_MAX: usize = 400;

    fn see(&mut self, line: &str) {
        self.open = line == "failures:" || (self.open && !line.starts_with("test result: "));
        if self.open && self.lines.len() < Self::LINES_MAX {
            self.lines.push(line.to_owned());
        }
    }

    fn text(&self) -> String {
        daemon::tail(&self.lines.join("\n"), Self::LINES_MAX)
    }
}

/// The counts of libtest's `test result: ok. 7 passed; 0 failed; ...`.
fn test_result(line: &str) -> Option<(u64, u64)> {
    let (_, counts) = line.strip_prefix("test result: ")?.split_once(". ")?;
    let mut numbers = counts.split("; ").map(|count| count.split(' ').next()?.parse::<u64>().ok());
    Some((numbers.next()??, numbers.next()??))
}

/// Licences, banned crates and sources. Advisories are left out: they need a network that not every machine has.
fn check_dependencies(tally: &mut Tally) {
    let Some(cargo_deny) = cargo_deny(tally) else { return };
    tally.check("dependencies", "mend Cargo.toml, or argue the exception in deny.toml", |progress| {
        let mut command = Command::new(cargo_deny);
        command.args(["--log-level", "error", "check", "--hide-inclusion-graph"]);
        command.args(["bans", "licenses", "sources"]).current_dir(workspace::root());
        progress.run(command)
    });
}

/// CI builds it where there is none: two to four minutes, less than it would cost to keep a check of our own right.
fn cargo_deny(tally: &mut Tally) -> Option<PathBuf> {
    const VERSION: &str = "0.20.2";
    if let Some(installed) = programs::in_path("cargo-deny") {
        return Some(installed);
    }
    let root = places::target_dir().ok()?.join("tools");
    let built = root.join("bin/cargo-deny");
    if built.is_file() {
        return Some(built);
    }
    if !in_ci() {
        println!("  {:24}skipped: needs cargo-deny (cargo install --locked cargo-deny)", "dependencies");
        return None;
    }
    tally.check("build cargo-deny", "", |progress| {
        let mut install = cargo(&["install", "--locked", "--version", VERSION, "cargo-deny", "--root"]);
        install.arg(&root).env_remove("CARGO_TARGET_DIR");
        progress.run(install)
    })?;
    Some(built)
}
