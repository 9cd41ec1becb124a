//! The commands that are crates of their own, since they need more than most do: built when one is asked for.

use std::ffi::OsStr;
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context, Result, ensure};
use common::steps::Tally;
use common::workspace;
use harness::places;

/// A binary of this workspace, by its name.
#[derive(Clone, Copy, Debug)]
pub(crate) struct External(&'static str);

/// Has an HTTP stack, a runtime, and parsers of YAML and SQL.
pub(crate) const MEASURE: External = External("xtask-measure");
/// Has a client of Kubernetes.
pub(crate) const E2E: External = External("xtask-e2e");

impl External {
    /// Replaces this process by the command that these arguments name.
    pub(crate) fn run(self, args: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Result<ExitCode> {
        let error = Command::new(self.build()?).args(args).exec();
        Err(error).with_context(|| format!("start {}", self.0))
    }

    /// Runs a command whose checks count among ours.
    pub(crate) fn check(self, tally: &mut Tally, args: &[impl AsRef<OsStr>]) {
        let ran = self.build().and_then(|program| {
            let mut command = Command::new(program);
            command.args(args).current_dir(workspace::root());
            tally.include(command)
        });
        if let Err(error) = ran {
            tally.failed += 1;
            println!("  {}: {error:#}", self.0);
        }
    }

    /// Cargo's own lines go to stderr, and only while there is something to wait for.
    fn build(self) -> Result<PathBuf> {
        let program = places::target_dir()?.join("debug").join(self.0);
        let mut build = workspace::build(self.0);
        if program.exists() {
            build.arg("--quiet");
        }
        let status = build.stdin(Stdio::null()).status().context("start cargo")?;
        ensure!(status.success(), "cargo could not build {}", self.0);
        Ok(program)
    }
}
