//! A Prometheus on a loopback port.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::process::Signal;

use super::daemon::{Daemon, dies_with_us};

const READY_LIMIT: Duration = Duration::from_secs(60);

/// Dropping it ends it.
#[derive(Debug)]
pub struct Prometheus {
    daemon: Daemon,
    port: u16,
}

impl Prometheus {
    /// Starts the program with this configuration, whose paths are absolute; its data and its log are in `dir`.
    pub fn start(program: &Path, dir: &Path, config: &str, port: u16) -> Result<Self> {
        fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))?;
        let file = dir.join("prometheus.yml");
        fs::write(&file, config).with_context(|| format!("write {}", file.display()))?;
        let mut command = dies_with_us(program, "KILL");
        command.arg(format!("--config.file={}", file.display()));
        command.arg(format!("--storage.tsdb.path={}", dir.join("data").display()));
        command.arg(format!("--web.listen-address=127.0.0.1:{port}"));
        let daemon = Daemon::start(command, &dir.join("prometheus.log"))?;
        let mut prometheus = Self { daemon, port };
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        let ready = || TcpStream::connect_timeout(&address, Duration::from_secs(1)).is_ok();
        prometheus.daemon.await_ready(READY_LIMIT, ready).context("Prometheus")?;
        Ok(prometheus)
    }

    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    pub fn stop(&mut self) -> Result<()> {
        self.daemon.end(&[(Signal::TERM, Duration::from_secs(20)), (Signal::KILL, Duration::from_secs(10))])
    }
}
