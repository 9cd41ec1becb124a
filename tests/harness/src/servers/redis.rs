//! A private Redis or Valkey on a loopback port of its own.

use std::fs;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use rustix::process::Signal;

use super::daemon::{self, Daemon, dies_with_us};
use super::home::{self, Home};
use super::{clock, ports, programs};

const READY_LIMIT: Duration = Duration::from_secs(30);
const CLI_LIMIT: Duration = Duration::from_secs(30);
const PORT_TRIES: usize = 5;

#[derive(Clone, Debug, Default)]
pub struct RedisOptions {
    /// This port or failure; `None` takes any free one.
    pub port: Option<u16>,
    /// Additional lines of the configuration file, such as `cluster-enabled yes`; they override the harness's own.
    pub config: Vec<String>,
    /// Run as a sentinel: the lines above name the master that it watches.
    pub sentinel: bool,
    /// Its clock can be set; needs `libfaketime`.
    pub own_clock: bool,
}

impl RedisOptions {
    #[must_use]
    pub fn port(self, port: u16) -> Self {
        Self { port: Some(port), ..self }
    }

    #[must_use]
    pub fn config(mut self, line: &str) -> Self {
        self.config.push(line.to_owned());
        self
    }
}

#[derive(Debug)]
pub struct Redis {
    dir: PathBuf,
    home: Home,
    server: PathBuf,
    options: RedisOptions,
    port: u16,
    /// `None` while it is stopped or killed.
    daemon: Option<Daemon>,
}

impl Redis {
    /// Starts an instance whose files are in `dir`. They are removed when it is dropped: it is a cache.
    pub fn start(dir: &Path, options: RedisOptions) -> Result<Self> {
        let server = programs::redis_server().ok_or_else(|| anyhow!("redis-server is not installed"))?;
        let home = Home::prepare(dir)?;
        stop_earlier(home.path())?;
        let mut redis = Self { dir: dir.to_owned(), home, server, options, port: 0, daemon: None };
        for attempt in 1.. {
            redis.port = redis.options.port.map_or_else(ports::free, Ok)?;
            redis.home.write("redis.conf", &redis.configuration())?;
            match redis.launch() {
                Err(error)
                    if redis.options.port.is_none()
                        && attempt < PORT_TRIES
                        && format!("{error:#}").contains("Address already in use") => {}
                outcome => return outcome.map(|()| redis),
            }
        }
        unreachable!("the loop above returns")
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    pub fn url(&self, database: u16) -> String {
        format!("redis://127.0.0.1:{}/{database}", self.port)
    }

    pub fn log(&self) -> PathBuf {
        self.home.path().join("redis.log")
    }

    pub fn pid(&self) -> Option<u32> {
        self.daemon.as_ref().map(Daemon::id)
    }

    /// Runs `redis-cli` against it, for example with `["-n", "3", "GET", "key"]`.
    pub fn cli(&self, args: &[&str]) -> Result<String> {
        let cli = programs::redis_cli().ok_or_else(|| anyhow!("redis-cli is not installed"))?;
        let mut command = Command::new(cli);
        command.args(["-h", "127.0.0.1", "-p", &self.port.to_string()]).args(args);
        daemon::run_ok(command, CLI_LIMIT)
    }

    pub fn stop(&mut self) -> Result<()> {
        let Some(mut daemon) = self.daemon.take() else { return Ok(()) };
        daemon.end(&[(Signal::TERM, Duration::from_secs(10)), (Signal::KILL, Duration::from_secs(10))])
    }

    /// Kills it: connections are reset, and its data is lost.
    pub fn kill(&mut self) -> Result<()> {
        self.daemon.take().map_or(Ok(()), |mut daemon| daemon.kill_all())
    }

    /// Stops it if it runs, and starts it again on the same port.
    pub fn restart(&mut self) -> Result<()> {
        self.stop()?;
        self.launch()
    }

    /// Freezes it: connections stay open and nothing answers.
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

    /// A file instead of arguments: a sentinel rewrites its own, and a restart must find what it wrote.
    fn configuration(&self) -> String {
        let home = self.home.path().display();
        let own = format!(
            // One database per test that runs at the same time.
            "bind 127.0.0.1\nport {}\ndir \"{home}\"\npidfile \"{home}/redis.pid\"\ndatabases 4096\nsave \"\"\n",
            self.port
        );
        self.options.config.iter().fold(own, |text, line| text + line + "\n")
    }

    fn launch(&mut self) -> Result<()> {
        let mut command = dies_with_us(&self.server, "KILL");
        command.arg(self.home.path().join("redis.conf"));
        if self.options.sentinel {
            command.arg("--sentinel");
        }
        self.home.inhabit(&mut command);
        if self.options.own_clock {
            clock::equip(&mut command, &self.home)?;
        }
        let log = self.log();
        let _ = fs::remove_file(&log);
        let mut daemon = Daemon::start(command, &log)?;
        let tls_only = self.options.config.iter().any(|line| line.trim() == "port 0");
        daemon
            .await_ready(READY_LIMIT, || if tls_only { says_ready(&log) } else { answers(self.port) })
            .with_context(|| format!("start Redis on port {}", self.port))?;
        self.daemon = Some(daemon);
        Ok(())
    }
}

impl Drop for Redis {
    fn drop(&mut self) {
        let _ = self.kill();
        let _ = home::remove(&self.dir);
    }
}

fn says_ready(log: &Path) -> bool {
    fs::read_to_string(log).is_ok_and(|text| text.contains("Ready to accept connections"))
}

/// Whether a Redis on this loopback port is ready. While it loads data it answers something else than PONG; if it needs a
/// password, its refusal counts as an answer.
pub fn answers(port: u16) -> bool {
    let limit = Duration::from_millis(500);
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let ask = || -> std::io::Result<[u8; 5]> {
        let mut stream = TcpStream::connect_timeout(&address, limit)?;
        stream.set_read_timeout(Some(limit))?;
        stream.write_all(b"PING\r\n")?;
        let mut reply = [0; 5];
        stream.read_exact(&mut reply)?;
        Ok(reply)
    };
    ask().is_ok_and(|reply| reply == *b"+PONG" || reply == *b"-NOAU")
}

/// Ends the server that a killed run left in this home.
pub(super) fn stop_earlier(home: &Path) -> Result<()> {
    let pid = fs::read_to_string(home.join("redis.pid")).unwrap_or_default();
    let conf = fs::read_to_string(home.join("redis.conf")).unwrap_or_default();
    let port = conf.lines().find_map(|line| line.strip_prefix("port "));
    let (Ok(pid), Some(port)) = (pid.trim().parse(), port) else { return Ok(()) };
    // It rewrites its command line to its program, address and port.
    daemon::stop_leftover(pid, &format!("-server 127.0.0.1:{port}"), Signal::TERM)
}
