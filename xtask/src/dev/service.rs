//! The service as a child process: its variables, start and end.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::net::ToSocketAddrs;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use common::steps::Progress;
use common::{signals, workspace};
use harness::http;
use harness::servers::{daemon, ports};
use rustix::process::{Pid, Signal, kill_process};

use super::backends::Backends;
use super::settings::Settings;

const READY_LIMIT: Duration = Duration::from_secs(60);
/// On top of the service's own grace period.
const END_MARGIN: Duration = Duration::from_secs(10);
const REQUEST_LIMIT: Duration = Duration::from_secs(2);
const LIMITS: [&str; 4] = [
    "LOGIN_RATE_LIMIT_PER_MINUTE",
    "REGISTER_RATE_LIMIT_PER_MINUTE",
    "SEND_RATE_LIMIT_PER_MINUTE",
    "NEW_CONVERSATIONS_PER_HOUR",
];

pub(crate) struct Service {
    binary: PathBuf,
    /// Those that the user has not set.
    variables: Vec<(&'static str, String)>,
    addresses: Addresses,
    grace: Duration,
    child: Option<Child>,
}

#[derive(Clone, Debug)]
pub(crate) struct Addresses {
    pub(crate) host: String,
    pub(crate) port: u16,
    pub(crate) ops_port: u16,
}

impl Addresses {
    /// Where the API is.
    pub(crate) fn api(&self) -> String {
        let Self { host, port, .. } = self;
        if host.contains(':') { format!("http://[{host}]:{port}") } else { format!("http://{host}:{port}") }
    }
}

impl Service {
    pub(crate) fn new(binary: PathBuf, dir: &Path, settings: &Settings, backends: &Backends) -> Result<Self> {
        let host = match settings.get("HOST") {
            None | Some("0.0.0.0" | "::") => "127.0.0.1",
            Some(host) => host,
        };
        let mut variables = Vec::new();
        variables.extend(backends.postgres.url().map(|url| ("DATABASE_URL", url)));
        variables.extend(backends.redis.url().map(|url| ("REDIS_URL", url)));
        let mut port_of = |name: &'static str, default| -> Result<u16> {
            if let Some(given) = settings.get(name) {
                return given.parse().with_context(|| format!("{name}={given} is not a port"));
            }
            let port = if ports::is_free_everywhere(default) { default } else { ports::free()? };
            if port != default {
                println!("  port {default} is taken, {name} is {port}");
            }
            variables.push((name, port.to_string()));
            Ok(port)
        };
        let addresses = Addresses {
            host: host.to_owned(),
            port: port_of("PORT", 8000)?,
            ops_port: port_of("OPS_PORT", 9000)?,
        };
        if settings.get("SECRET_KEY").is_none() {
            variables.push(("SECRET_KEY", secret_key(&dir.join("secret_key"))?));
        }
        let grace = settings.get("SHUTDOWN_GRACE_SECONDS").and_then(|text| text.parse().ok()).unwrap_or(20);
        Ok(Self { binary, variables, addresses, grace: Duration::from_secs(grace), child: None })
    }

    /// Another replica on the loopback address, on its own ports, without rate limits. It logs warnings only.
    pub(crate) fn without_limits(
        binary: PathBuf,
        mut variables: Vec<(&'static str, String)>,
    ) -> Result<Self> {
        let host = "127.0.0.1".to_owned();
        let addresses = Addresses { host, port: ports::free()?, ops_port: ports::free()? };
        variables.extend([
            ("HOST", addresses.host.clone()),
            ("PORT", addresses.port.to_string()),
            ("OPS_PORT", addresses.ops_port.to_string()),
            ("RUST_LOG", "warn".to_owned()),
        ]);
        variables.extend(LIMITS.map(|limit| (limit, "0".to_owned())));
        Ok(Self { binary, variables, addresses, grace: Duration::from_secs(20), child: None })
    }

    pub(crate) fn binary(&self) -> &Path {
        &self.binary
    }

    /// More variables for its start.
    pub(crate) fn add_variables(&mut self, variables: Vec<(&'static str, String)>) {
        self.variables.extend(variables);
    }

    pub(crate) fn addresses(&self) -> Addresses {
        self.addresses.clone()
    }

    pub(crate) fn migrate(&self, progress: &Progress) -> Result<()> {
        let mut migrate = Command::new(&self.binary);
        self.prepare(&mut migrate).arg("migrate");
        progress.run(migrate).map(drop)
    }

    /// Starts it and waits until it is ready.
    pub(crate) fn start(&mut self) -> Result<()> {
        let mut serve = daemon::dies_with_us(&self.binary, "TERM");
        self.prepare(&mut serve).arg("serve").stdin(Stdio::null());
        let child = self.child.insert(daemon::spawn(serve).context("start the service")?);
        let Addresses { host, port, ops_port } = &self.addresses;
        let ready = daemon::poll(READY_LIMIT, || {
            signals::check()?;
            if let Some(status) = child.try_wait()? {
                bail!("the service ended at once ({status})");
            }
            let ok = |port, path| status_of(host, port, path) == Some(200);
            Ok((ok(*ops_port, "/livez") && ok(*port, "/healthz")).then_some(()))
        })?;
        ready.ok_or_else(|| anyhow!("/healthz was not 200 within {} s", READY_LIMIT.as_secs()))
    }

    /// `Some` when it ended by itself.
    pub(crate) fn wait_for_its_end_or_a_signal(&mut self) -> Result<Option<ExitStatus>> {
        let child = self.child.as_mut().context("the service is not started")?;
        loop {
            if let Some(status) = daemon::poll(Duration::from_millis(100), || Ok(child.try_wait()?))? {
                return Ok(Some(status));
            }
            if signals::asked_to_end() {
                return Ok(None);
            }
        }
    }

    /// Shuts it down gracefully, and kills it after the grace period.
    pub(crate) fn stop(&mut self) -> Result<()> {
        let Some(mut child) = self.child.take() else { return Ok(()) };
        let pid = Pid::from_child(&child);
        if child.try_wait()?.is_none() {
            let _ = kill_process(pid, Signal::TERM);
        }
        let limit = self.grace + END_MARGIN;
        if daemon::poll(limit, || Ok(child.try_wait()?))?.is_none() {
            println!("  the service did not end within {} s and is killed", limit.as_secs());
            child.kill()?;
            child.wait()?;
        }
        Ok(())
    }

    fn prepare<'a>(&self, command: &'a mut Command) -> &'a mut Command {
        // The service reads .env in its working directory.
        command.current_dir(workspace::root()).envs(self.variables.iter().map(|(name, value)| (name, value)))
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        let _ = self.stop();
    }
}

/// Kept in a file, so that tokens stay valid after a restart.
pub(super) fn secret_key(file: &Path) -> Result<String> {
    if let Ok(key) = fs::read_to_string(file) {
        return Ok(key);
    }
    let mut bytes = [0_u8; 32];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    let key: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(true).mode(0o600).open(file)?.write_all(key.as_bytes())?;
    Ok(key)
}

/// The status of a GET, if there is an answer.
fn status_of(host: &str, port: u16, path: &str) -> Option<u16> {
    let address = (host, port).to_socket_addrs().ok()?.next()?;
    Some(http::get(address, path, REQUEST_LIMIT).ok()?.status)
}
