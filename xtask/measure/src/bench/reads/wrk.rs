//! wrk, a load generator that others know, as a check of our own.

use std::fmt::Write as _;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use harness::install;
use harness::servers::{daemon, programs};

use crate::bench::reference::Figures;

/// Reads the requests of a file, a path and a token a line, and sends one at random each time.
const SCRIPT: &str = r#"
local requests = {}
function init(args)
  math.randomseed(os.time())
  for line in io.lines(args[1]) do
    local path, token = line:match("(%S+) (%S+)")
    table.insert(requests, wrk.format("GET", path, {authorization = "Bearer " .. token}))
  end
end
function request()
  return requests[math.random(#requests)]
end
"#;

/// Beyond the duration, for the start and the end.
const MARGIN: Duration = Duration::from_secs(60);

/// The program, installed if that needs no password; none elsewhere.
pub(super) fn find() -> Option<PathBuf> {
    if programs::in_path("wrk").is_none() && install::can_install() {
        println!("installing wrk with apt-get");
        if let Err(error) = install::install(&["wrk"]) {
            println!("{error:#}");
        }
    }
    programs::in_path("wrk")
}

/// One thread and 64 connections, as our own generator has.
pub(super) fn run<'a>(
    program: &Path,
    dir: &Path,
    address: SocketAddr,
    connections: usize,
    duration: Duration,
    reads: impl Iterator<Item = (String, &'a str)>,
) -> Result<Figures> {
    let (script, list) = (dir.join("wrk.lua"), dir.join("wrk.requests"));
    std::fs::write(&script, SCRIPT)?;
    let mut lines = String::new();
    for (path, token) in reads {
        writeln!(lines, "{path} {token}")?;
    }
    std::fs::write(&list, lines)?;
    let mut wrk = Command::new(program);
    wrk.args(["--threads", "1", "--latency", "--connections", &connections.to_string()]);
    wrk.arg("--duration").arg(format!("{}s", duration.as_secs())).arg("--script").arg(&script);
    wrk.arg(format!("http://{address}/")).arg(&list);
    let text = daemon::run_ok(wrk, duration + MARGIN)?;
    if text.contains("Non-2xx") || text.contains("Socket errors") {
        bail!("wrk saw errors:\n{text}");
    }
    let after = |label: &str| {
        let line = text.lines().find_map(|line| line.trim().strip_prefix(label));
        line.map(str::trim).with_context(|| format!("wrk printed no {label}"))
    };
    let total = text.lines().find_map(|line| line.trim().split_once(" requests in "));
    Ok(Figures {
        answers: total.context("wrk printed no total")?.0.parse()?,
        rate: after("Requests/sec:")?.parse()?,
        p50: ms(after("50%")?)?,
        p99: ms(after("99%")?)?,
    })
}

/// `1.5ms`, `250.00us` or `1.02s` in ms.
fn ms(text: &str) -> Result<f64> {
    let unit = text.find(|c: char| c.is_ascii_alphabetic()).context("wrk printed no unit")?;
    let (number, unit) = text.split_at(unit);
    let factor = match unit {
        "us" => 1e-3,
        "ms" => 1.0,
        "s" => 1e3,
        _ => bail!("wrk printed the unit {unit}"),
    };
    Ok(number.parse::<f64>()? * factor)
}
