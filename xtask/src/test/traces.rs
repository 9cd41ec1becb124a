//! The tests of `tests/it/process/traces.rs`, which need a real OpenTelemetry Collector.

use std::path::PathBuf;
use std::process::Command;

use common::go_tools::{self, COLLECTOR};
use common::servers::Servers;
use common::steps::Tally;

use super::{count, test_command};

/// Names the collector for the tests.
const PROGRAM: &str = "TEST_COLLECTOR";

/// Runs these tests, which the other run leaves out.
pub(super) fn check(tally: &mut Tally, servers: &Servers) {
    let Some(program) = program(tally) else { return };
    let Ok(mut command) = test_command(servers) else { return };
    command.args(["--test", "it", "--", "--ignored", "process::traces"]).env(PROGRAM, program);
    count::run(tally, "traces", "cargo xtask test -- --test it -- --ignored NAME runs one alone", command);
}

/// For a run of single tests, which may be some of these.
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
    if !go_tools::can_use("traces") {
        return None;
    }
    tally.check("build the collector", "", |progress| COLLECTOR.build(progress))
}
