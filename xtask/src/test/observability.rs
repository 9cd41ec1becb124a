//! What a real Prometheus and a real OpenTelemetry Collector make of the service.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Result, ensure};
use tests::servers::programs;
use tests::install;

use crate::go_tools::{self, GoTool};
use crate::steps::Tally;
use crate::workspace::in_ci;

pub(crate) const COLLECTOR: GoTool = GoTool {
    name: "collector",
    module: "deploy/observability/collector",
    package: ".",
    settings: &[],
};

/// Runs the tests that need more than Postgres and Redis. `cargo` makes the command that runs a test.
pub(crate) fn check(tally: &mut Tally, cargo: impl Fn() -> Command) {
    let run = |module: &str, program: (&str, &PathBuf)| {
        let mut command = cargo();
        command.args(["--test", "it", "--", "--ignored", module]).env(program.0, program.1);
        command
    };
    if let Some(promtool) = promtool(tally) {
        tally.check("promtool check metrics", "promtool's lines above name the metric", |progress| {
            let said = progress.run(run("process::metrics", ("TEST_PROMTOOL", &promtool)))?;
            ensure!(said.contains("1 passed"), "no test ran:\n{said}");
            Ok(())
        });
    }
    if let Some(collector) = collector(tally) {
        tally.check("traces in a collector", "cargo xtask test runs them", |progress| {
            let said = progress.run(run("process::traces", ("TEST_COLLECTOR", &collector)))?;
            ensure!(said.contains("4 passed"), "not every test ran:\n{said}");
            Ok(())
        });
    }
}

/// Debian's, installed like Postgres and Redis where that needs no question.
fn promtool(tally: &mut Tally) -> Option<PathBuf> {
    if !in_ci() && install::prometheus().is_none() && !install::can_install() {
        println!("  {:24}skipped: needs promtool, of Prometheus", "promtool check metrics");
        return None;
    }
    tally.check("promtool", "", |progress| {
        install::ensure_prometheus(|line| progress.note(line))?;
        programs::in_path("promtool").ok_or_else(|| anyhow::anyhow!("promtool is not installed"))
    })
}

fn collector(tally: &mut Tally) -> Option<PathBuf> {
    if !in_ci() && let Err(error) = go_tools::go() {
        println!("  {:24}skipped: {error:#}", "traces in a collector");
        return None;
    }
    tally.check("build the collector", "", |progress| -> Result<PathBuf> { COLLECTOR.build(progress) })
}
