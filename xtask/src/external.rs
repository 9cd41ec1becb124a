//! The commands that are crates of their own, because of their dependencies. They are built on first use.

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

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    /// Crates with their versions and features, as cargo compiles them for these packages.
    fn crates(packages: &[&str]) -> BTreeSet<String> {
        let mut tree = workspace::cargo(&["tree", "--locked", "--edges", "normal,build", "--prefix", "none"]);
        let output =
            tree.args(["--format", "{p} {f}", "--no-dedupe"]).args(packages).output().expect("cargo");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let text = String::from_utf8(output.stdout).expect("UTF-8");
        text.lines().filter(|line| !line.contains("(/")).map(|line| line.trim().to_owned()).collect()
    }

    #[test]
    fn the_front_door_is_thin_and_shares_every_crate_with_the_rest() {
        let (ours, all) = (crates(&["--package", "xtask"]), crates(&["--workspace"]));
        assert!(ours.len() < 60, "{} crates: what needs more is a crate of its own", ours.len());
        let apart: Vec<_> = ours.difference(&all).collect();
        assert!(apart.is_empty(), "compiled twice for their features, see xtask/Cargo.toml: {apart:?}");
    }
}
