//! The static binary. Two builds of a commit are equal: the binary has no path of this machine, and no time but the
//! commit's.

use std::env;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, bail};
use harness::servers::programs;
use harness::{install, places};

use super::{Options, Platform};
use crate::steps::Progress;
use crate::{git, workspace};

/// Where `deploy/Dockerfile` has the sources and cargo's own folder: a binary built elsewhere names the same.
const SOURCES: &str = "/src";
const CARGO_HOME: &str = "/usr/local/cargo";

/// The commit that is built.
#[derive(Clone, Debug)]
pub(super) struct Origin {
    /// The commit's hash, with `-dirty` where files were changed since.
    pub revision: String,
    /// When it was committed, in seconds since 1970.
    pub epoch: u64,
    /// The same in RFC 3339.
    pub created: String,
}

impl Origin {
    /// Sources without their history, as from an archive, have neither name nor time.
    pub(super) fn of_this_clone() -> Result<Self> {
        let describe = git::ask(&["describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]);
        let Some(revision) = describe else {
            let created = "1970-01-01T00:00:00Z".to_owned();
            return Ok(Self { revision: "unknown".to_owned(), epoch: 0, created });
        };
        let log = |format: &str| git::ask(&["log", "-1", "--date=format-local:%Y-%m-%dT%H:%M:%SZ", format]);
        let epoch =
            log("--format=%ct").and_then(|seconds| seconds.parse().ok()).context("git log has no time")?;
        Ok(Self { revision, epoch, created: log("--format=%cd").context("git log has no date")? })
    }
}

/// Rust's name of the platform.
pub(super) fn target(platform: Platform) -> &'static str {
    match platform {
        Platform::Amd64 => "x86_64-unknown-linux-gnu",
        Platform::Arm64 => "aarch64-unknown-linux-gnu",
    }
}

/// Builds the service without a shared library and returns the binary.
pub(super) fn build(options: &Options, origin: &Origin, progress: &Progress) -> Result<PathBuf> {
    let target = target(options.platform);
    let target_dir = places::target_dir()?;
    let package = ["--package", "chat-service", "--profile", &options.profile, "--target", target];
    let mut build = workspace::offline_cargo(&["build", "--locked"]);
    build.args(package).env("CHAT_SERVICE_REVISION", &origin.revision);
    let cargo_home = match env::var_os("CARGO_HOME") {
        Some(home) => PathBuf::from(home),
        None => PathBuf::from(env::var_os("HOME").context("HOME is not set")?).join(".cargo"),
    };
    let renamed = [
        format!("{}={SOURCES}", workspace::root().display()),
        format!("{}={SOURCES}/target", target_dir.display()),
        format!("{}={CARGO_HOME}", cargo_home.display()),
    ];
    // The last one that fits counts.
    let mut flags = vec!["-Ctarget-feature=+crt-static".to_owned()];
    flags.extend(renamed.iter().map(|renamed| format!("--remap-path-prefix={renamed}")));
    build.env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"));
    // C has `__FILE__` in it, too.
    let c_flags: Vec<_> = renamed.iter().map(|renamed| format!("'-ffile-prefix-map={renamed}'")).collect();
    build.env(format!("CFLAGS_{}", target.replace('-', "_")), c_flags.join(" "));
    build.env("CC_SHELL_ESCAPED_FLAGS", "1");
    // And `__TIME__`: the same for every commit, because what is compiled already is not compiled again for it.
    build.env("SOURCE_DATE_EPOCH", "0");
    if !options.platform.is_here() {
        cross(options.platform, &mut build, progress)?;
    }
    progress.run(build).context("build the static binary")?;
    let profile = if options.profile == "dev" { "debug" } else { &options.profile };
    Ok(target_dir.join(target).join(profile).join("chat-service"))
}

/// Another processor needs its own standard library, C compiler and C library.
fn cross(platform: Platform, build: &mut Command, progress: &Progress) -> Result<()> {
    let target = target(platform);
    let (prefix, package) = match platform {
        Platform::Amd64 => ("x86_64-linux-gnu", "gcc-x86-64-linux-gnu"),
        Platform::Arm64 => ("aarch64-linux-gnu", "gcc-aarch64-linux-gnu"),
    };
    let compiler = format!("{prefix}-gcc");
    if programs::in_path(&compiler).is_none() {
        if !install::can_install() {
            bail!("{compiler} is missing: install {package} and its C library");
        }
        progress.note(&format!("installing {package} with apt-get"));
        let library = format!("libc6-dev-{}-cross", platform.name().trim_start_matches("linux/"));
        install::install(&[package, &library])?;
    }
    let rustup = programs::in_path("rustup").context("another processor's standard library needs rustup")?;
    let mut add = Command::new(rustup);
    add.args(["target", "add", target]).current_dir(workspace::root());
    progress.run(add)?;
    let variable = target.replace('-', "_");
    build.env(format!("CC_{variable}"), &compiler);
    build.env(format!("CARGO_TARGET_{}_LINKER", variable.to_uppercase()), compiler);
    Ok(())
}
