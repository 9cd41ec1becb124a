//! A private PgBouncer on a loopback port of its own.

use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};

use super::daemon::{Daemon, dies_with_us};
use super::home::{self, Home};
use super::ports;

const READY_LIMIT: Duration = Duration::from_secs(30);

/// Dropping it ends it and removes its files.
#[derive(Debug)]
pub struct PgBouncer {
    dir: PathBuf,
    daemon: Daemon,
    port: u16,
    log: PathBuf,
}

impl PgBouncer {
    /// Starts the program with this `pgbouncer.ini` and these lines of its `auth_file`. Only where it listens, and where its
    /// files are, is replaced.
    pub fn start(program: &Path, dir: &Path, ini: &str, users: &str) -> Result<Self> {
        let home = Home::prepare(dir)?;
        let port = ports::free()?;
        let users = home.write("userlist.txt", users)?;
        let own = [
            ("listen_addr", "127.0.0.1".to_owned()),
            ("listen_port", port.to_string()),
            ("auth_file", users.display().to_string()),
        ];
        let line = |line: &str| {
            let key = line.split('=').next().unwrap_or_default().trim().to_owned();
            let own = own.iter().find(|(name, _)| *name == key);
            own.map_or_else(|| line.to_owned(), |(name, value)| format!("{name} = {value}"))
        };
        // No Unix socket: its directory may not exist.
        let ini: Vec<String> = ini.lines().map(line).chain(["unix_socket_dir =".to_owned()]).collect();
        let ini = home.write("pgbouncer.ini", &(ini.join("\n") + "\n"))?;
        let mut command = dies_with_us(program, "KILL");
        command.arg(ini);
        home.inhabit(&mut command);
        let log = home.path().join("pgbouncer.log");
        let mut daemon = Daemon::start(command, &log)?;
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        let ready = || TcpStream::connect_timeout(&address, Duration::from_secs(1)).is_ok();
        daemon.await_ready(READY_LIMIT, ready).with_context(|| format!("start PgBouncer on port {port}"))?;
        Ok(Self { dir: dir.to_owned(), daemon, port, log })
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    pub fn log(&self) -> &Path {
        &self.log
    }
}

impl Drop for PgBouncer {
    fn drop(&mut self) {
        let _ = self.daemon.kill_all();
        let _ = home::remove(&self.dir);
    }
}
