//! A running `chat-service canary`.

use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result};
use harness::PASSWORD;
use harness::http::Client;
use harness::servers::daemon::{self, Daemon};
use harness::servers::ports;

const START_LIMIT: Duration = Duration::from_secs(20);

/// Dropping it ends it.
pub(crate) struct Canary {
    _daemon: Daemon,
    /// With `/metrics`.
    pub(crate) operations: SocketAddr,
}

impl Canary {
    /// Talks through this port of a service, as often as it can.
    pub(crate) fn start(binary: &Path, log: &Path, service: SocketAddr) -> Result<Self> {
        let operations = SocketAddr::from(([127, 0, 0, 1], ports::free()?));
        let mut command = daemon::dies_with_us(binary, "KILL");
        command.arg("canary").arg(format!("--url=http://{service}")).arg("--interval=1");
        command.arg(format!("--listen={operations}")).env("CANARY_PASSWORD", PASSWORD);
        let mut daemon = Daemon::start(command, log).context("start the canary")?;
        let is_alive = || Client::new(operations).ask("GET", "/livez", None, "").is_ok();
        daemon.await_ready(START_LIMIT, is_alive).context("the canary")?;
        Ok(Self { _daemon: daemon, operations })
    }
}
