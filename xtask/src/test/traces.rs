//! What the service exports, as a real OpenTelemetry Collector has it: `tests/it/process/traces.rs`.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Result, bail};

use super::{Servers, count, test_command};
use common::go_tools::{self, COLLECTOR};
use common::steps::{Progress, Tally};
use common::workspace::in_ci;

/// Tells the tests where the collector is.
const PROGRAM: &str = "TEST_COLLECTOR";

/// Runs the tests that need a collector, which the others leave out.
pub(super) fn check(tally: &mut Tally, servers: &Servers) {
    let Some(program) = program(tally) else { return };
    let mut count = 0;
    let fix = "cargo xtask test -- --test it -- --ignored NAME runs one alone";
    let ran = tally.check("traces", fix, |progress| run(progress, servers, &program, &mut count));
    if ran.is_some() {
        // The check counted itself as one.
        tally.passed += count - 1;
    }
}

/// For a run of single tests that may be among these.
pub(super) fn prepare(tally: &mut Tally, command: &mut Command, args: &[String]) {
    let may_be = |arg: &String| arg == "--ignored" || arg == "--include-ignored";
    if args.iter().any(may_be)
        && let Some(program) = program(tally)
    {
        command.env(PROGRAM, program);
    }
}

/// The built collector.
fn program(tally: &mut Tally) -> Option<PathBuf> {
    if !in_ci()
        && let Err(error) = go_tools::go()
    {
        println!("  {:24}skipped: {error:#}", "traces");
        return None;
    }
    tally.check("build the collector", "", |progress| COLLECTOR.build(progress))
}

fn run(progress: &Progress, servers: &Servers, program: &Path, count: &mut u64) -> Result<String> {
    let mut command = test_command(servers)?;
    command.args(["--test", "it", "--", "--ignored", "process::traces"]).env(PROGRAM, program);
    let said = progress.run(command)?;
    *count = said.lines().filter_map(count::result).map(|(passed, _)| passed).sum();
    if *count == 0 {
        bail!("no test ran");
    }
    progress.say(&format!("{count} tests"));
    Ok(said)
}
