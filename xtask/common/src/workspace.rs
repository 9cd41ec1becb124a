//! Paths of the clone, and cargo as a command.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use harness::places;

/// The clone's top, above the package that cargo runs.
pub fn root() -> PathBuf {
    let package =
        env::var_os("CARGO_MANIFEST_DIR").map_or_else(|| env!("CARGO_MANIFEST_DIR").into(), PathBuf::from);
    let top = package.ancestors().find(|dir| dir.join("rust-toolchain.toml").is_file());
    top.unwrap_or(&package).to_owned()
}

/// The version in Cargo.toml, as it is now: this program may have been built before it was changed.
pub fn version() -> Result<String> {
    let manifest = fs::read_to_string(root().join("Cargo.toml")).context("read Cargo.toml")?;
    let mut lines = manifest.lines().skip_while(|line| line.trim() != "[workspace.package]");
    let version = lines.find_map(|line| line.strip_prefix("version = \"")?.strip_suffix('"'));
    Ok(version.context("Cargo.toml names no version of the workspace")?.to_owned())
}

/// A cargo command in the clone's top.
pub fn cargo(args: &[&str]) -> Command {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.args(args).current_dir(root());
    command
}

/// Cargo without a database: SQL is checked against the committed data, whatever `.env` names.
pub fn offline_cargo(args: &[&str]) -> Command {
    let mut command = cargo(args);
    command.env("SQLX_OFFLINE", "true");
    command
}

/// Builds a binary with the features of the whole workspace. With the same selection each time, cargo compiles no
/// dependency twice.
pub fn build(binary: &str) -> Command {
    offline_cargo(&["build", "--workspace", "--bin", binary])
}

/// The file for the output of a step.
pub fn log_file(step: &str) -> Result<PathBuf> {
    let dir = places::target_dir()?.join("xtask");
    fs::create_dir_all(&dir).with_context(|| format!("create {}", dir.display()))?;
    let name: String = step.chars().map(|c| if c.is_alphanumeric() { c } else { '-' }).collect();
    Ok(dir.join(format!("{name}.log")))
}

/// A path as a reader at the clone's top would type it.
pub fn shown(path: &Path) -> String {
    path.strip_prefix(root()).unwrap_or(path).display().to_string()
}

/// In CI missing tools are installed, and nothing is skipped.
pub fn in_ci() -> bool {
    env::var("CI").is_ok_and(|value| !["", "0", "false"].contains(&value.as_str()))
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_version_is_the_one_that_cargo_reads() {
        assert_eq!(super::version().expect("a version"), env!("CARGO_PKG_VERSION"));
    }
}
