//! The Docker engine: one that answers, or one that is installed and started here. `deploy/kind-node/engine.sh` says how.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use harness::servers::{daemon, programs};
use harness::{install, places};
use rustix::process::geteuid;

use crate::steps::Progress;
use crate::{dry_run, workspace};

/// For a daemon that hangs.
const PROBE_LIMIT: Duration = Duration::from_secs(20);
const ADVICE: &str = "install and start Docker: https://docs.docker.com/engine/install. On Debian and Ubuntu, root gets it from this \
                      command";

/// Whether a Docker engine answers in time.
pub fn answers() -> bool {
    let Some(docker) = programs::in_path("docker") else { return false };
    let mut ask = Command::new(docker);
    ask.args(["version", "--format", "{{.Server.Version}}"]);
    daemon::run_ok(ask, PROBE_LIMIT).is_ok()
}

/// Installs and starts an engine if none answers. What `closed` containers send ends at this machine, if the engine is ours.
pub(super) fn ensure(progress: &Progress, closed: bool) -> Result<()> {
    if dry_run::is_on() {
        return Ok(());
    }
    if !answers() {
        if env::var_os("DOCKER_HOST").is_some() {
            bail!("no Docker engine answers at DOCKER_HOST: {ADVICE}");
        }
        if !geteuid().is_root() || !install::can_install() {
            bail!("no Docker engine answers: {ADVICE}");
        }
        start(progress)?;
    }
    if closed && is_ours()? { script(progress, "close") } else { Ok(()) }
}

pub(super) fn start(progress: &Progress) -> Result<()> {
    if programs::in_path("dockerd").is_none() {
        progress.note("no Docker engine is installed: installing docker.io with apt-get");
        install::install(&["docker.io", "iptables", "iproute2", "procps"])?;
    }
    if Path::new("/run/systemd/system").exists() {
        progress.note("starting docker.service");
        let mut start = Command::new("systemctl");
        start.args(["start", "docker.service"]);
        progress.run(start)?;
        return daemon::poll(Duration::from_secs(60), || Ok(answers().then_some(())))?
            .context("docker.service runs, and no engine answers");
    }
    progress.note("starting a Docker engine; `cargo xtask kind down` ends it");
    script(progress, "start")
}

/// Ends the engine that this clone has started, and undoes what it did to the machine. The images stay for the next one.
pub(super) fn stop(progress: &Progress) -> Result<()> {
    if dry_run::is_on() || !is_ours()? { Ok(()) } else { script(progress, "stop") }
}

/// Whether this clone has started an engine; it may have been killed meanwhile.
pub(super) fn is_ours() -> Result<bool> {
    Ok(state()?.exists())
}

fn state() -> Result<PathBuf> {
    Ok(places::target_dir()?.join("kind-engine"))
}

fn script(progress: &Progress, verb: &str) -> Result<()> {
    let mut command = Command::new("sh");
    command.arg(workspace::root().join("deploy/kind-node/engine.sh")).arg(verb).arg(state()?);
    command.arg(places::target_dir()?.join("tools/docker"));
    progress.run(command).map(drop)
}
