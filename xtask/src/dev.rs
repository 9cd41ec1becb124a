//! `cargo xtask dev`: from a bare clone to a running service with Postgres and Redis, and nothing left running after.

mod backends;
mod container;
mod embedded;
mod guide;
mod observe;
mod service;
mod settings;

use std::fs::{self, File, TryLockError};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use tests::{places, servers};

use crate::steps::step;
use crate::{signals, workspace};
use backends::Backends;
use observe::Observers;
use service::Service;
use settings::Settings;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Empty the private Postgres and Redis first
    #[arg(long)]
    reset: bool,
    /// Run Prometheus with the alerts, a collector for traces, and Grafana where it can be had
    #[arg(long)]
    observe: bool,
    /// Build with optimisations
    #[arg(long)]
    release: bool,
}

pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    signals::listen()?;
    match serve(args) {
        // What the interrupted step has to say is the interruption's doing.
        Err(_) if signals::asked_to_end() => {
            println!("  interrupted");
            Ok(ExitCode::from(130))
        }
        outcome => outcome,
    }
}

fn serve(args: &Args) -> Result<ExitCode> {
    let dir = places::target_dir()?.join("dev");
    fs::create_dir_all(&dir).with_context(|| format!("create {}", dir.display()))?;
    let _lock = lock(&dir)?;
    if args.reset {
        step("empty the data", |_| reset(&dir))?;
    }
    let settings = Settings::read(&workspace::root().join(".env"))?;
    let backends = backends::start(&dir, &settings)?;
    let binary = build(args.release)?;
    let mut service = Service::new(binary, &dir, &settings, &backends)?;
    step("migrations", |progress| service.migrate(progress))?;
    let observe = || Observers::start(&dir, &service.addresses(), &settings);
    let observers = args.observe.then(observe).transpose()?;
    if let Some(observers) = &observers {
        service.tell(observers.variables(&settings));
    }
    // Without a progress line: the service's own log says what it does.
    service.start()?;
    print!("{}", guide::text(&service.addresses(), &backends, observers.as_ref()));
    if let Some(status) = service.wait_for_its_end_or_a_signal()? {
        println!("\n  the service ended by itself ({status})");
        stop(backends, observers)?;
        // As shells do it, a signal counts from 128.
        let code = status.code().or_else(|| status.signal().map(|signal| 128 + signal));
        return Ok(ExitCode::from(code.and_then(|code| u8::try_from(code).ok()).unwrap_or(1)));
    }
    // Asked to end, a step would refuse to begin: plain lines.
    println!("\n  stopping the service");
    service.stop()?;
    stop(backends, observers)?;
    Ok(ExitCode::SUCCESS)
}

/// Redis before Postgres: the other way round nobody would lose anything, but logs would complain.
fn stop(backends: Backends, observers: Option<Observers>) -> Result<()> {
    println!("  stopping what it needed");
    observers.map_or(Ok(()), Observers::stop)?;
    backends.redis.stop()?;
    backends.postgres.stop()
}

/// Held until the end: two Postgres servers on one data directory would destroy it.
fn lock(dir: &Path) -> Result<File> {
    let path = dir.join("lock");
    let file = File::create(&path).with_context(|| format!("create {}", path.display()))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => {
            bail!("cargo xtask dev is already running in this clone; end that one first")
        }
        Err(TryLockError::Error(error)) => Err(error).with_context(|| format!("lock {}", path.display())),
    }
}

fn reset(dir: &Path) -> Result<()> {
    servers::clear(&dir.join(backends::POSTGRES_DIR))?;
    servers::clear(&dir.join(backends::REDIS_DIR))?;
    container::reset()
}

fn build(release: bool) -> Result<PathBuf> {
    let (profile, flag) = if release { ("release", Some("--release")) } else { ("debug", None) };
    step("build", |progress| {
        let mut build = workspace::offline_cargo(&["build", "-p", "chat-service"]);
        build.args(flag);
        progress.run(build)
    })?;
    Ok(places::target_dir()?.join(profile).join("chat-service"))
}
