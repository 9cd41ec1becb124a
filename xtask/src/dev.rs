//! `cargo xtask dev`: from a bare clone to a running service with Postgres and Redis, and nothing left running after.

mod backends;
mod container;
mod guide;
mod observe;
mod service;
mod settings;

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail};
use common::steps::{Job, step};
use common::{signals, workspace};
use harness::{install, places, servers};

use backends::Backends;
use observe::Observers;
pub(crate) use service::Service;
use settings::Settings;

#[derive(clap::Args)]
#[command(after_help = "Examples:
  cargo xtask dev                everything that is needed, on data of its own, until Ctrl-C
  cargo xtask dev --reset        the same, from empty data
  RUST_LOG=debug cargo xtask dev --release
  DATABASE_URL=postgres://... cargo xtask dev    on a Postgres of yours")]
pub(crate) struct Args {
    /// Empty the private Postgres and Redis first
    #[arg(long)]
    reset: bool,
    /// Also run Prometheus with the alerts, a trace collector, and Grafana where available
    #[arg(long)]
    observe: bool,
    /// Build with optimisations
    #[arg(long)]
    release: bool,
}

pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    signals::listen()?;
    match serve(args) {
        // The interrupted step's error says nothing more.
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
    let binary = binary(args.release)?;
    println!("  {}", plan(&binary));
    let build = Job::start("build", build(args.release))?;
    let backends = backends::start(&dir, &settings)?;
    step("build", |progress| progress.join(build))?;
    let mut service = Service::new(binary, &dir, &settings, &backends)?;
    write_environment(&dir, &service, &backends)?;
    step("migrations", |progress| service.migrate(progress))?;
    let observe = || Observers::start(&dir, &service.addresses(), &settings);
    let observers = args.observe.then(observe).transpose()?;
    if let Some(observers) = &observers {
        service.add_variables(observers.variables(&settings));
    }
    // No progress line: the service logs to the terminal.
    service.start()?;
    print!("{}", guide::text(&service.addresses(), &backends, observers.as_ref()));
    if let Some(status) = service.wait_for_its_end_or_a_signal()? {
        println!("\n  the service ended by itself ({status})");
        stop(backends, observers)?;
        // As in shells, a signal counts from 128.
        let code = status.code().or_else(|| status.signal().map(|signal| 128 + signal));
        return Ok(ExitCode::from(code.and_then(|code| u8::try_from(code).ok()).unwrap_or(1)));
    }
    // After a signal no step starts any more: plain lines.
    println!("\n  stopping the service");
    service.stop()?;
    stop(backends, observers)?;
    Ok(ExitCode::SUCCESS)
}

/// Redis before Postgres: the other order loses nothing, but fills the logs with errors.
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

/// The addresses of what runs, for commands such as `cargo xtask seed`. Valid only while the lock is held.
const ENVIRONMENT: &str = "environment";

fn write_environment(dir: &Path, service: &Service, backends: &Backends) -> Result<()> {
    let mut lines = format!("API_URL={}\nBINARY={}\n", service.addresses().api(), service.binary().display());
    for (name, url) in [("DATABASE_URL", backends.postgres.url()), ("REDIS_URL", backends.redis.url())] {
        lines += &url.map(|url| format!("{name}={url}\n")).unwrap_or_default();
    }
    let file = dir.join(ENVIRONMENT);
    let mut options = OpenOptions::new();
    // The URLs hold passwords.
    options.write(true).create(true).truncate(true).mode(0o600);
    let mut open = options.open(&file).with_context(|| format!("create {}", file.display()))?;
    Ok(open.write_all(lines.as_bytes())?)
}

/// A value of the `cargo xtask dev` that runs in this clone; `None` when none runs.
pub(crate) fn running(name: &str) -> Result<Option<String>> {
    let dir = places::target_dir()?.join("dev");
    if !dir.exists() || lock(&dir).is_ok() {
        return Ok(None);
    }
    let text = fs::read_to_string(dir.join(ENVIRONMENT)).unwrap_or_default();
    let value = |line: &str| line.strip_prefix(name)?.strip_prefix('=').map(str::to_owned);
    Ok(text.lines().find_map(value))
}

/// Another replica of the service that runs in this clone, for a command that would otherwise wait for its rate limits.
/// `None` when none runs, or it uses a Postgres whose URL is unknown.
pub(crate) fn replica_without_limits() -> Result<Option<Service>> {
    let (Some(binary), Some(database)) = (running("BINARY")?, running("DATABASE_URL")?) else {
        return Ok(None);
    };
    let mut variables = vec![("DATABASE_URL", database)];
    variables.extend(running("REDIS_URL")?.map(|url| ("REDIS_URL", url)));
    let settings = Settings::read(&workspace::root().join(".env"))?;
    if settings.get("SECRET_KEY").is_none() {
        variables.push(("SECRET_KEY", service::secret_key(&places::target_dir()?.join("dev/secret_key"))?));
    }
    let mut replica = Service::without_limits(PathBuf::from(binary), variables)?;
    replica.start()?;
    Ok(Some(replica))
}

/// Gives `work` the URL of the database: none for the user's own, which the service finds in its environment; else that
/// of a running `cargo xtask dev`; else that of the private one, which is started meanwhile.
pub(crate) fn with_database<T>(work: impl FnOnce(Option<String>) -> Result<T>) -> Result<T> {
    let settings = Settings::read(&workspace::root().join(".env"))?;
    let own = ["DATABASE_URL", "DB_HOST", "DB_PORT", "DB_NAME", "DB_USER", "DB_PASSWORD"];
    if own.iter().any(|name| settings.get(name).is_some()) {
        return work(None);
    }
    if let Some(url) = running("DATABASE_URL")? {
        return work(Some(url));
    }
    let dir = places::target_dir()?.join("dev");
    fs::create_dir_all(&dir).with_context(|| format!("create {}", dir.display()))?;
    let _lock = lock(&dir)?;
    let postgres = step("Postgres", |progress| backends::start_postgres(&dir, None, progress))?;
    let outcome = work(postgres.url());
    postgres.stop()?;
    outcome
}

fn reset(dir: &Path) -> Result<()> {
    servers::clear(&dir.join(backends::POSTGRES_DIR))?;
    servers::clear(&dir.join(backends::REDIS_DIR))?;
    container::reset()
}

fn binary(release: bool) -> Result<PathBuf> {
    let profile = if release { "release" } else { "debug" };
    Ok(places::target_dir()?.join(profile).join("chat-service"))
}

fn build(release: bool) -> Command {
    if release {
        // With the features of its own package alone, as in benchmarks and images.
        return workspace::offline_cargo(&["build", "--release", "-p", "chat-service"]);
    }
    workspace::build("chat-service")
}

/// What happens next, and how long it takes.
fn plan(binary: &Path) -> String {
    let servers = match install::missing_packages().as_slice() {
        [] => "Postgres and Redis start".to_owned(),
        missing => format!("{} are installed, and Postgres and Redis start", missing.join(" and ")),
    };
    let time =
        if binary.exists() { "some seconds" } else { "the first time about four minutes on two cores" };
    format!("the service compiles while {servers}: {time}")
}
