//! A process of the service on ports that stay its own, from one start to the next.

use std::fs::OpenOptions;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use crate::http::Client;
use crate::servers::{daemon, ports};

pub const PASSWORD: &str = "correct horse battery";

const READY_LIMIT: Duration = Duration::from_secs(60);

/// More than the service gives itself to end.
const STOP_LIMIT: Duration = Duration::from_secs(20);

/// More than the service gives a request.
const PATIENCE: Duration = Duration::from_secs(20);

#[derive(Debug)]
pub struct Replica {
    pub public: SocketAddr,
    pub operations: SocketAddr,
    binary: PathBuf,
    environment: Vec<(String, String)>,
    log: PathBuf,
    child: Mutex<Option<Child>>,
}

/// Somebody who has logged in.
#[derive(Clone, Debug)]
pub struct User {
    pub id: String,
    pub name: String,
    pub token: String,
}

impl Replica {
    /// Starts the process without limits of rates, and waits for nothing. `more` holds the URLs, and what else it needs.
    pub fn start(
        binary: &Path,
        log: PathBuf,
        more: impl IntoIterator<Item = (String, String)>,
    ) -> Result<Self> {
        let [public, operations] =
            [ports::free()?, ports::free()?].map(|port| SocketAddr::from((Ipv4Addr::LOCALHOST, port)));
        let own = [
            ("SECRET_KEY", "a key for tests only, 32 bytes and more".to_owned()),
            ("HOST", public.ip().to_string()),
            ("PORT", public.port().to_string()),
            ("OPS_PORT", operations.port().to_string()),
            ("SHUTDOWN_GRACE_SECONDS", "5".to_owned()),
            ("LOGIN_RATE_LIMIT_PER_MINUTE", "0".to_owned()),
            ("SEND_RATE_LIMIT_PER_MINUTE", "0".to_owned()),
            ("REGISTER_RATE_LIMIT_PER_MINUTE", "0".to_owned()),
        ];
        let environment = own.map(|(name, value)| (name.to_owned(), value)).into_iter().chain(more).collect();
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
        let ready = daemon::poll(READY_LIMIT, || Ok(self.is_ready().then_some(())))?;
        let limit = READY_LIMIT.as_secs();
        ensure!(ready.is_some(), "a replica is not ready after {limit} s:\n{}", self.last_words());
        Ok(())
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
        let Some(mut child) = self.child().take() else { return Ok(()) };
        let ended = daemon::poll(STOP_LIMIT, || Ok(child.try_wait()?))?;
        if ended.is_none() {
            let _ = child.kill();
            let _ = child.wait();
        }
        ensure!(ended.is_some(), "a replica did not end after SIGTERM:\n{}", self.last_words());
        Ok(())
    }

    pub fn signal(&self, signal: Signal) {
        if let Some(child) = &*self.child() {
            // It may have ended by itself, which whoever waits for it finds out.
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

    /// Resident memory, where /proc tells it and the process runs.
    pub fn resident_kib(&self) -> Option<u64> {
        resident_kib(self.child().as_ref()?.id())
    }

    fn is_ready(&self) -> bool {
        let answer = Client::new(self.public).request("GET", "/healthz", &[], "", Duration::from_secs(2));
        answer.is_ok_and(|answer| {
            let body = serde_json::from_slice::<Value>(&answer.body).unwrap_or_default();
            answer.status == 200 && body["status"] == "ok"
        })
    }

    fn child(&self) -> MutexGuard<'_, Option<Child>> {
        self.child.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A new user of the service at this address, logged in.
pub fn register(service: SocketAddr, number: usize) -> Result<User> {
    let name = format!("user{number}");
    let body = json!({"username": name, "email": format!("{name}@example.com"), "password": PASSWORD});
    let body = body.to_string();
    let mut client = Client::new(service);
    let mut post = |path: &str, field: &str| -> Result<String> {
        let answer = client.request("POST", path, &[], &body, PATIENCE);
        let answer = answer.map_err(|lost| anyhow::anyhow!("{path}: {}", lost.reason()))?;
        let value: Value = serde_json::from_slice(&answer.body)?;
        let text = value[field].as_str();
        Ok(text.with_context(|| format!("{path} answered {}: {value}", answer.status))?.to_owned())
    };
    Ok(User { id: post("/register", "id")?, token: post("/login", "access_token")?, name })
}

/// Resident memory of a process, where /proc tells it.
pub fn resident_kib(pid: u32) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find(|line| line.starts_with("VmRSS:"))?;
    line.split_whitespace().nth(1)?.parse().ok()
}
