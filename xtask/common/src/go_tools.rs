//! Programs built from the Go modules of this clone. `go.sum` pins the versions, and each program is built once.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use harness::places;
use harness::servers::{daemon, programs};

use crate::steps::Progress;
use crate::workspace;

/// A program of one of these modules.
#[derive(Debug)]
pub struct GoTool {
    /// What the program is called in `target/tools/bin`.
    pub name: &'static str,
    /// The folder of its go.mod, from the clone's top.
    pub module: &'static str,
    /// What to build: `.`, or an import path that the module requires.
    pub package: &'static str,
    /// `-X` settings of the linker, each `PATH.NAME=VALUE`.
    pub settings: &'static [&'static str],
}

/// The trace collector of `dev --observe`, the tests and the benchmarks.
pub const COLLECTOR: GoTool =
    GoTool { name: "collector", module: "deploy/observability/collector", package: ".", settings: &[] };

impl GoTool {
    /// The built program; builds it when its module, its settings or Go changed.
    pub fn build(&self, progress: &Progress) -> Result<PathBuf> {
        let tools = places::target_dir()?.join("tools");
        let binary = tools.join("bin").join(self.name);
        let stamp = tools.join(format!("{}.stamp", self.name));
        let recipe = self.recipe()?;
        if binary.is_file() && fs::read_to_string(&stamp).is_ok_and(|built| built == recipe) {
            return Ok(binary);
        }
        let go = go()?;
        progress.say(&format!("building {}", self.name));
        fs::create_dir_all(tools.join("bin")).with_context(|| format!("create {}", tools.display()))?;
        // A killed build must not count as finished.
        let _ = fs::remove_file(&stamp);
        let mut build = Command::new(go);
        // All tools share these flags, and with them the compiled packages.
        build.args(["build", "-trimpath", "-buildvcs=false", "-ldflags", &self.linker_flags(), "-o"]);
        build.arg(&binary).arg(self.package).current_dir(workspace::root().join(self.module));
        build.env("CGO_ENABLED", "0").env_remove("GOFLAGS").env("GOWORK", "off");
        progress.run(build).with_context(|| format!("build {} from {}", self.name, self.module))?;
        fs::write(&stamp, recipe).with_context(|| format!("write {}", stamp.display()))?;
        Ok(binary)
    }

    fn linker_flags(&self) -> String {
        self.settings.iter().fold("-s -w".to_owned(), |flags, setting| format!("{flags} -X {setting}"))
    }

    /// A short text that changes with the sources.
    fn recipe(&self) -> Result<String> {
        let is_source = |file: &Path| {
            file.extension().is_some_and(|kind| ["go", "mod", "sum"].iter().any(|ours| kind == *ours))
        };
        let hash = hash_of(&workspace::root().join(self.module), is_source)?;
        Ok(format!("{} {hash} {}\n", self.package, self.linker_flags()))
    }
}

/// Changes with the names and the contents of a folder's files.
pub(crate) fn hash_of(folder: &Path, wanted: impl Fn(&Path) -> bool) -> Result<String> {
    let mut files = Vec::new();
    collect(folder, &mut files)?;
    files.retain(|file| wanted(file));
    files.sort();
    let mut bytes = Vec::new();
    for file in &files {
        bytes.extend_from_slice(file.as_os_str().as_encoded_bytes());
        bytes.extend(fs::read(file).with_context(|| format!("read {}", file.display()))?);
    }
    Ok(format!("{:016x}", places::stable_hash(&bytes)))
}

fn collect(dir: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(dir).with_context(|| format!("read {}", dir.display()))? {
        let path = entry?.path();
        if path.is_dir() { collect(&path, files)? } else { files.push(path) }
    }
    Ok(())
}

/// Go 1.21 or newer, which fetches the release that a module asks for by itself.
pub fn go() -> Result<PathBuf> {
    const ADVICE: &str = "install Go 1.21 or newer: https://go.dev/dl, or your system's package `golang`";
    let usual = Path::new("/usr/local/go/bin/go");
    let found = programs::in_path("go").or_else(|| usual.is_file().then(|| usual.to_owned()));
    let Some(go) = found else { bail!("Go is not installed; {ADVICE}") };
    let mut ask = Command::new(&go);
    ask.args(["env", "GOVERSION"]);
    let version = daemon::run_ok(ask, Duration::from_secs(20))?;
    let minor = version.strip_prefix("go1.").and_then(|rest| rest.split('.').next()?.parse::<u32>().ok());
    if minor.is_none_or(|minor| minor < 21) {
        bail!("{} is {version}, too old; {ADVICE}", go.display());
    }
    Ok(go)
}

/// Whether Go is installed; prints when the check is skipped. In CI the check fails instead.
pub fn can_use(check: &str) -> bool {
    match go() {
        Err(error) if !workspace::in_ci() => {
            println!("  {check:24}skipped: {error:#}");
            false
        }
        _ => true,
    }
}
