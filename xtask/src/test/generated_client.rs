//! The test of `tests/it/process/generated_client.rs`, which needs Go and a generator of clients.

use std::process::Command;

use anyhow::Result;
use common::go_tools::{self, GoTool};
use common::servers::Servers;
use common::steps::Tally;

use super::{count, test_command};

/// Pinned beside the program that uses its client.
const GENERATOR: GoTool = GoTool {
    name: "oapi-codegen",
    module: "deploy/examples/go",
    package: "github.com/oapi-codegen/oapi-codegen/v2/cmd/oapi-codegen",
    settings: &[],
};

/// Runs this test, which the other run leaves out.
pub(super) fn check(tally: &mut Tally, servers: &Servers) {
    let Ok(mut command) = test_command(servers) else { return };
    command.args(["--test", "it", "--", "--ignored", "process::generated_client"]);
    if name_programs(tally, &mut command).is_some() {
        let alone = "cargo xtask test -- --test it -- --ignored generated_client";
        count::run(tally, "generated client", alone, command);
    }
}

/// For a run of single tests, of which it may be one.
pub(super) fn prepare(tally: &mut Tally, command: &mut Command, args: &[String]) {
    let names = |word: &str| args.iter().any(|arg| arg.contains(word));
    if names("ignored") && names("client") {
        name_programs(tally, command);
    }
}

/// Builds the generator, and names it and Go for the test.
fn name_programs(tally: &mut Tally, command: &mut Command) -> Option<()> {
    if !go_tools::can_use("generated client") {
        return None;
    }
    let [go, generator] = tally.check("build the generator", "", |progress| -> Result<_> {
        Ok([go_tools::go()?, GENERATOR.build(progress)?])
    })?;
    command.env("TEST_GO", go).env("TEST_CLIENT_GENERATOR", generator);
    Some(())
}
