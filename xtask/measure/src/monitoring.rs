//! What SREs look at, as far as it can be checked without a fault: the dashboards, the alerts with their runbooks and unit
//! tests, the metrics that they name, and `dev --observe`, which shows all of them.

mod alerts;
mod dashboards;
mod lint;
mod metrics;
mod observe;
mod scrape;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Result;
use common::steps::{Progress, Tally};
use common::workspace::in_ci;
use harness::servers::programs;
use harness::{Postgres, Redis, install, places};
use serde_json::{Value, json};

use scrape::Metrics;

/// What needs no running service. Returns promtool, for the rest.
pub(crate) fn check(tally: &mut Tally) -> Option<PathBuf> {
    let promtool = if in_ci() || programs::promtool().is_some() || install::can_install() {
        let found = |progress: &Progress| install::ensure_prometheus(|line| progress.note(line));
        tally.check("Prometheus", "", found).map(|programs| programs.promtool)
    } else {
        println!("  {:24}skipped: what needs promtool (Debian: apt-get install prometheus)", "Prometheus");
        None
    };
    dashboards::check(tally, promtool.as_deref());
    alerts::check(tally, promtool.as_deref());
    promtool
}

/// Compares with the metrics of the built service.
pub(crate) fn check_metrics(tally: &mut Tally, promtool: Option<&Path>, postgres: &Postgres, redis: &Redis) {
    let find = |progress: &Progress| Metrics::find(progress, postgres, redis);
    if let Some(there) = tally.check("metrics: scrape", "", find) {
        dashboards::check_metrics(tally, &there);
        alerts::check_metrics(tally, promtool, &there);
    }
}

pub(crate) use observe::check as check_observers;

/// Reads every query with Prometheus's own parser, as a recording rule of that name.
fn parse_queries(progress: &Progress, promtool: &Path, queries: &[(String, String)]) -> Result<()> {
    let rule = |(name, expr): &(String, String)| json!({ "record": name, "expr": expr });
    let rules: Vec<Value> = queries.iter().map(rule).collect();
    let file = places::target_dir()?.join("xtask/queries.yaml");
    // JSON is YAML.
    fs::write(&file, json!({ "groups": [{ "name": "queries", "rules": rules }] }).to_string())?;
    let mut command = Command::new(promtool);
    command.args(["check", "rules", "--lint=none"]).arg(&file);
    progress.run(command).map(drop)
}
