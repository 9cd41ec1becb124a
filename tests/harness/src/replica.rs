//! A process of the service on ports that stay its own, from one start to the next.

use std::fs::OpenOptions;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::http;
use crate::servers::{daemon, ports};

/// For one question about its health.
const ANSWER_LIMIT: Duration = Duration::from_secs(2);

const READY_LIMIT: Duration = Duration::from_secs(60);

/// More than the service gives itself to end.
const STOP_LIMIT: Duration = Duration::from_secs(20);

/// What every replica signs tokens with.
pub const SECRET_KEY: &str = "a key for tests only, 32 bytes and more";

#[derive(Debug)]
pub struct Replica {
    pub public: SocketAddr,
    pub operations: SocketAddr,
    binary: PathBuf,
    environment: Vec<(String, String)>,
    log: PathBuf,
    child: Mutex<Option<Child>>,
}

impl Replica {
    /// Starts the process without limits of rates, and waits for nothing. `more` holds the URLs, and what else it needs.
    pub fn start(
        binary: &Path,
        log: PathBuf,
        more: impl IntoIterator<Item = (impl Into<String>, String)>,
    ) -> Result<Self> {
        let [public, operations] =
            [ports::free()?, ports::free()?].map(|port| SocketAddr::from((Ipv4Addr::LOCALHOST, port)));
        let own = [
            ("SECRET_KEY", SECRET_KEY.to_owned()),
            ("HOST", public.ip().to_string()),
            ("PORT", public.port().to_string()),
            ("OPS_PORT", operations.port().to_string()),
            ("SHUTDOWN_GRACE_SECONDS", "5".to_owned()),
            ("STREAM_DRAIN_SECONDS", "5".to_owned()),
            ("LOGIN_RATE_LIMIT_PER_MINUTE", "0".to_owned()),
            ("SEND_RATE_LIMIT_PER_MINUTE", "0".to_owned()),
            ("REGISTER_RATE_LIMIT_PER_MINUTE", "0".to_owned()),
            ("NEW_CONVERSATIONS_PER_HOUR", "0".to_owned()),
        ];
        let own = own.map(|(name, value)| (name.to_owned(), value));
        let more = more.into_iter().map(|(name, value)| (name.into(), value));
        let environment = own.into_iter().chain(more).collect();
        let binary = binary.to_owned();
        let replica = Self { public, operations, binary, environment, log, child: Mutex::new(None) };
        replica.launch()?;
        Ok(replica)
    }

    /// Starts the process again, and waits for nothing.
    pub fn launch(&self) -> Result<()> {
        let log = OpenOptions::new().create(true).append(true).open(&self.log)?;
        let mut command = daemon::dies_with_us(&self.binary, "KILL");
        command.arg("serve").env_clear().envs(self.environment.iter().cloned());
        command.current_dir(self.log.parent().context("a directory")?);
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        *self.child() = Some(daemon::spawn(command).context("start the service")?);
        Ok(())
    }

    /// Waits until it is ready, with Postgres and Redis.
    pub fn await_ready(&self) -> Result<()> {
        self.await_health(200, "ok")
    }

    /// Waits until `/healthz` answers this.
    pub fn await_health(&self, status: u16, word: &str) -> Result<()> {
        let is_so = || {
            let Ok(answer) = http::get(self.public, "/healthz", ANSWER_LIMIT) else { return Ok(None) };
            let body = serde_json::from_slice::<Value>(&answer.body).unwrap_or_default();
            Ok((answer.status == status && body["status"] == word).then_some(()))
        };
        let limit = READY_LIMIT.as_secs();
        let words = || format!("/healthz was not {status} {word} within {limit} s:\n{}", self.last_words());
        daemon::poll(READY_LIMIT, is_so)?.with_context(words)
    }

    /// Ends it at once.
    pub fn kill(&self) {
        if let Some(mut child) = self.child().take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// Asks it to end, and waits until it has.
    pub fn stop(&self) -> Result<()> {
        self.signal(Signal::TERM);
        // It stays where it is until it has ended: a fault that has frozen it has to let it go on.
        let ended = daemon::poll(STOP_LIMIT, || {
            let mut child = self.child();
            let has_ended = match &mut *child {
                Some(child) => child.try_wait()?.is_some(),
                None => true,
            };
            Ok(has_ended.then(|| *child = None))
        })?;
        if ended.is_none() {
            self.kill();
        }
        ensure!(ended.is_some(), "a replica did not end after SIGTERM:\n{}", self.last_words());
        Ok(())
    }

    pub fn signal(&self, signal: Signal) {
        if let Some(child) = &*self.child() {
            // It may have ended already; whatever waits for it notices.
            let _ = kill_process(Pid::from_child(child), signal);
        }
    }

    /// Whether the process has ended without being asked to.
    pub fn has_died(&self) -> bool {
        self.child().as_mut().is_some_and(|child| !matches!(child.try_wait(), Ok(None)))
    }

    /// The end of its log.
    pub fn last_words(&self) -> String {
        daemon::tail(&std::fs::read_to_string(&self.log).unwrap_or_default(), 20)
    }

    pub fn pid(&self) -> Option<u32> {
        Some(self.child().as_ref()?.id())
    }

    /// Resident memory, where /proc tells it and the process runs.
    pub fn resident_kib(&self) -> Option<u64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid()?)).ok()?;
        let line = status.lines().find(|line| line.starts_with("VmRSS:"))?;
        line.split_whitespace().nth(1)?.parse().ok()
    }

    fn child(&self) -> MutexGuard<'_, Option<Child>> {
        self.child.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Replica {
    fn drop(&mut self) {
        self.kill();
    }
}
