//! A private Postgres with its own data directory, loopback port and password.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use rustix::process::Signal;

use super::daemon::{self, Daemon, dies_with_us};
use super::home::{self, Home};
use super::sql::{self, Login, Row};
use super::{clock, ports, programs};

/// A crash recovery of a busy data directory takes seconds; a wait of this length means that something is wrong.
const READY_LIMIT: Duration = Duration::from_secs(60);
const INITDB_LIMIT: Duration = Duration::from_secs(120);
/// How many ports are tried: another process may take the one we found before the server binds it.
const PORT_TRIES: usize = 5;
const USER: &str = "postgres";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Durability {
    /// Commits reach the disk, and the data outlives the instance: for development and for benchmarks.
    Durable,
    /// No fsync, and dropping the instance removes its directory: for tests.
    Fast,
}

#[derive(Clone, Debug)]
pub struct PostgresOptions {
    /// This port or failure; `None` takes any free one.
    pub port: Option<u16>,
    pub durability: Durability,
    pub max_connections: u16,
    /// Additional settings, as for `postgres -c name=value`.
    pub settings: Vec<(String, String)>,
    /// Its clock can be set; needs `libfaketime`.
    pub own_clock: bool,
}

impl PostgresOptions {
    pub fn fast() -> Self {
        Self {
            port: None,
            durability: Durability::Fast,
            max_connections: 300,
            settings: Vec::new(),
            own_clock: false,
        }
    }

    pub fn durable() -> Self {
        Self { durability: Durability::Durable, max_connections: 100, ..Self::fast() }
    }

    #[must_use]
    pub fn port(self, port: u16) -> Self {
        Self { port: Some(port), ..self }
    }

    #[must_use]
    pub fn max_connections(self, max_connections: u16) -> Self {
        Self { max_connections, ..self }
    }

    #[must_use]
    pub fn own_clock(self, own_clock: bool) -> Self {
        Self { own_clock, ..self }
    }

    #[must_use]
    pub fn setting(mut self, name: &str, value: &str) -> Self {
        self.settings.push((name.to_owned(), value.to_owned()));
        self
    }
}

#[derive(Debug)]
pub struct Postgres {
    dir: PathBuf,
    home: Home,
    bin_dir: PathBuf,
    options: PostgresOptions,
    password: String,
    port: u16,
    /// `None` while it is stopped or killed.
    daemon: Option<Daemon>,
}

impl Postgres {
    /// Starts an instance in `dir`, which is created and initialised if it does not exist.
    pub fn start(dir: &Path, options: PostgresOptions) -> Result<Self> {
        let home = Home::prepare(dir)?;
        stop_earlier(home.path())?;
        let bin_dir = matching_bin_dir(&home)?;
        let password = password(&home)?;
        let mut postgres =
            Self { dir: dir.to_owned(), home, bin_dir, port: 0, password, daemon: None, options };
        if !postgres.data().join("PG_VERSION").exists() {
            postgres.initialise()?;
        }
        for attempt in 1.. {
            postgres.port = postgres.options.port.map_or_else(ports::free, Ok)?;
            match postgres.launch() {
                Err(error)
                    if postgres.options.port.is_none()
                        && attempt < PORT_TRIES
                        && format!("{error:#}").contains("Address already in use") => {}
                outcome => return outcome.map(|()| postgres),
            }
        }
        unreachable!("the loop above returns")
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    pub fn password(&self) -> &str {
        &self.password
    }

    pub fn url(&self, database: &str) -> String {
        format!("postgres://{USER}:{}@127.0.0.1:{}/{database}", self.password, self.port)
    }

    /// Where its files are: in another directory, if the user that it runs as cannot reach the wanted one.
    pub fn home(&self) -> &Path {
        self.home.path()
    }

    pub fn log(&self) -> PathBuf {
        self.home.path().join("postgres.log")
    }

    /// Where the other programs of this version are, such as `pgbench`.
    pub fn bin_dir(&self) -> &Path {
        &self.bin_dir
    }

    /// The postmaster's process id, while it runs.
    pub fn pid(&self) -> Option<u32> {
        self.daemon.as_ref().map(Daemon::id)
    }

    /// Runs one or several statements as superuser and returns their rows.
    pub fn query(&self, database: &str, sql: &str) -> Result<Vec<Row>> {
        let login =
            Login { host: "127.0.0.1", port: self.port, user: USER, password: &self.password, database };
        sql::query(login, sql)
    }

    /// Creates the database unless it exists.
    pub fn create_database(&self, name: &str) -> Result<()> {
        let literal = name.replace('\'', "''");
        let known =
            self.query("postgres", &format!("SELECT 1 FROM pg_database WHERE datname = '{literal}'"))?;
        if known.is_empty() {
            self.query("postgres", &format!("CREATE DATABASE \"{}\"", name.replace('"', "\"\"")))?;
        }
        Ok(())
    }

    /// Shuts down cleanly: sessions are ended, and all data is written.
    pub fn stop(&mut self) -> Result<()> {
        let Some(mut daemon) = self.daemon.take() else { return Ok(()) };
        let steps = [(Signal::INT, 30), (Signal::QUIT, 10), (Signal::KILL, 10)];
        daemon.end(&steps.map(|(signal, seconds)| (signal, Duration::from_secs(seconds))))
    }

    /// Kills all its processes at once, like a power failure: the next start has to recover.
    pub fn kill(&mut self) -> Result<()> {
        self.daemon.take().map_or(Ok(()), |mut daemon| daemon.kill_all())
    }

    /// Stops it if it runs, and starts it again with the same data on the same port.
    pub fn restart(&mut self) -> Result<()> {
        self.stop()?;
        self.launch()
    }

    /// Restarts it as a standby that follows no primary: it answers reads until `SELECT pg_promote()`.
    pub fn restart_as_standby(&mut self) -> Result<()> {
        self.stop()?;
        self.home.write("data/standby.signal", "")?;
        self.launch()
    }

    /// A standby of its own in `dir`, with the data as they are now. It follows no primary, so it stays as it is.
    pub fn stale_standby(&mut self, dir: &Path) -> Result<Self> {
        self.stop()?;
        let home = Home::prepare(dir)?;
        let mut copy = Command::new("cp");
        copy.arg("-a").arg(self.home.path().join(".")).arg(home.path());
        daemon::run_ok(copy, INITDB_LIMIT).context("copy a Postgres data directory")?;
        home.write("data/standby.signal", "")?;
        self.launch()?;
        Self::start(dir, PostgresOptions { port: None, ..self.options.clone() })
    }

    /// Freezes all of it: connections stay open and nothing answers.
    pub fn pause(&mut self) {
        if let Some(daemon) = &mut self.daemon {
            daemon.pause();
        }
    }

    pub fn resume(&mut self) {
        if let Some(daemon) = &mut self.daemon {
            daemon.resume();
        }
    }

    /// Sets its clock ahead of the machine's by this many seconds, or behind it, if it has an own one.
    pub fn set_clock(&self, seconds: i64) -> Result<()> {
        clock::set(&self.home, seconds)
    }

    fn data(&self) -> PathBuf {
        self.home.path().join("data")
    }

    fn initialise(&self) -> Result<()> {
        // Renamed when it is complete: an interrupted initdb must not look like a database.
        let unfinished = self.home.path().join("data.unfinished");
        if unfinished.exists() {
            fs::remove_dir_all(&unfinished)?;
        }
        let mut initdb = Command::new(self.bin_dir.join("initdb"));
        initdb.arg("-D").arg(&unfinished).arg("--pwfile").arg(self.home.path().join("password"));
        initdb.args(["-U", USER, "--auth=password", "--encoding=UTF8", "--no-sync"]);
        // The C library's own UTF-8 locale needs no installed languages; elsewhere it may not exist.
        initdb.arg(if cfg!(target_os = "linux") { "--locale=C.UTF-8" } else { "--no-locale" });
        self.home.inhabit(&mut initdb);
        daemon::run_ok(initdb, INITDB_LIMIT).context("make a Postgres data directory")?;
        fs::rename(&unfinished, self.data())?;
        Ok(())
    }

    fn launch(&mut self) -> Result<()> {
        // INT is the fast shutdown, which leaves clean data when our death triggers it.
        let mut command = dies_with_us(&self.bin_dir.join("postgres"), "INT");
        command.arg("-D").arg(self.data());
        for (name, value) in self.settings() {
            command.arg("-c").arg(format!("{name}={value}"));
        }
        self.home.inhabit(&mut command);
        if self.options.own_clock {
            clock::equip(&mut command, &self.home)?;
        }
        let log = self.log();
        // The log of one start: an error must not quote an earlier one.
        let _ = fs::remove_file(&log);
        let mut daemon = Daemon::start(command, &log)?;
        let pid_file = self.data().join("postmaster.pid");
        let pid = daemon.id().to_string();
        let ready = || {
            let text = fs::read_to_string(&pid_file).unwrap_or_default();
            let mut lines = text.lines();
            // The first line is the process id, the eighth its state. The file may be of an earlier run.
            let is_ready = |state: &str| ["ready", "standby"].contains(&state.trim());
            lines.next() == Some(&pid) && lines.nth(6).is_some_and(is_ready)
        };
        daemon
            .await_ready(READY_LIMIT, ready)
            .with_context(|| format!("start Postgres on port {}", self.port))?;
        self.daemon = Some(daemon);
        Ok(())
    }

    fn settings(&self) -> Vec<(String, String)> {
        let port = self.port.to_string();
        let max_connections = self.options.max_connections.to_string();
        let mut settings = vec![
            ("port", port.as_str()),
            ("listen_addresses", "127.0.0.1"),
            ("unix_socket_directories", ""),
            ("max_connections", &max_connections),
            ("logging_collector", "off"),
            ("timezone", "UTC"),
            ("log_timezone", "UTC"),
        ];
        if self.options.durability == Durability::Fast {
            // Not synchronous_commit: without it a killed server loses acknowledged messages, which tests check for.
            settings.extend([("fsync", "off"), ("full_page_writes", "off")]);
        }
        let own = settings.into_iter().map(|(name, value)| (name.to_owned(), value.to_owned()));
        own.chain(self.options.settings.iter().cloned()).collect()
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        if self.options.durability == Durability::Durable {
            let _ = self.stop();
            return;
        }
        if let Some(mut daemon) = self.daemon.take() {
            // The immediate shutdown writes nothing, but frees its shared memory, which a kill would leave.
            let seconds = Duration::from_secs;
            let _ = daemon.end(&[(Signal::QUIT, seconds(10)), (Signal::KILL, seconds(10))]);
        }
        let _ = home::remove(&self.dir);
    }
}

/// Ends the server that a killed run left in this home.
pub(super) fn stop_earlier(home: &Path) -> Result<()> {
    let data = home.join("data");
    let pid_file = fs::read_to_string(data.join("postmaster.pid")).unwrap_or_default();
    let Some(pid) = pid_file.lines().next().and_then(|line| line.trim().parse().ok()) else { return Ok(()) };
    // Its command line has the data directory, unlike that of another process with a reused id.
    daemon::stop_leftover(pid, &data.display().to_string(), Signal::INT)
}

/// The programs of the version that made the data; any version for new data.
fn matching_bin_dir(home: &Home) -> Result<PathBuf> {
    let dirs = programs::postgres_bin_dirs();
    let first =
        dirs.first().cloned().ok_or_else(|| anyhow!("the programs postgres and initdb are not installed"))?;
    let Ok(made_by) = fs::read_to_string(home.path().join("data/PG_VERSION")) else { return Ok(first) };
    let made_by: u32 = made_by.trim().parse().context("read PG_VERSION")?;
    dirs.into_iter().find(|dir| programs::postgres_major(dir) == Some(made_by)).ok_or_else(|| {
        anyhow!(
            "the data was made by Postgres {made_by}, which is not installed any more; --reset starts over"
        )
    })
}

/// Generated once per instance. Without a password, every user of the machine could connect as superuser and have the server
/// run programs as its own user.
fn password(home: &Home) -> Result<String> {
    let file = home.path().join("password");
    if let Ok(password) = fs::read_to_string(&file) {
        return Ok(password);
    }
    if home.path().join("data").exists() {
        bail!("{} is missing; --reset starts over", file.display());
    }
    let mut bytes = [0_u8; 12];
    fs::File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    let password: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    home.write("password", &password)?;
    Ok(password)
}
