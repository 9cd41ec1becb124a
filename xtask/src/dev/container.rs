//! Postgres and Redis as containers, where their programs are not installed and an engine really answers.

use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use common::steps::Progress;
use common::{signals, workspace};
use harness::places::stable_hash;
use harness::servers::{daemon, ports, programs, redis};

use super::backends::{DATABASE, POSTGRES_PORT, REDIS_PORT};

const POSTGRES_IMAGE: &str = "postgres:17-alpine";
const REDIS_IMAGE: &str = "redis:7-alpine";
const GRAFANA_IMAGE: &str = "grafana/grafana:12.3.0";
/// A client whose engine is unavailable may hang instead of failing.
const PROBE_LIMIT: Duration = Duration::from_secs(10);
const READY_LIMIT: Duration = Duration::from_secs(120);
const END_LIMIT: Duration = Duration::from_secs(60);
/// Inside the container a superuser reaches nothing but this database.
const PASSWORD: &str = "postgres";

/// A container engine that answers.
#[derive(Debug)]
pub(crate) struct Engine {
    program: PathBuf,
}

/// A running container, removed when it is dropped.
#[derive(Debug)]
pub(crate) struct Container {
    program: PathBuf,
    name: String,
    url: String,
}

impl Engine {
    pub(crate) fn find(progress: &Progress) -> Option<Self> {
        let answers = |program: &PathBuf| {
            progress.say(&program.display().to_string());
            let mut info = Command::new(program);
            info.arg("info");
            daemon::run_ok(info, PROBE_LIMIT).is_ok()
        };
        let program = ["docker", "podman"].into_iter().filter_map(programs::in_path).find(answers)?;
        Some(Self { program })
    }

    pub(crate) fn postgres(&self, progress: &Progress) -> Result<Container> {
        let port = ports::prefer(POSTGRES_PORT)?;
        let volume = format!("{}:/var/lib/postgresql/data", name("postgres"));
        let options = [
            "-p",
            &format!("127.0.0.1:{port}:5432"),
            "-v",
            &volume,
            "-e",
            &format!("POSTGRES_PASSWORD={PASSWORD}"),
            "-e",
            &format!("POSTGRES_DB={DATABASE}"),
            POSTGRES_IMAGE,
        ];
        let url = format!("postgres://postgres:{PASSWORD}@127.0.0.1:{port}/{DATABASE}");
        let ready = |container: &Container| container.psql("SELECT 1").is_ok();
        self.start("postgres", &options, url, progress, ready)
    }

    pub(crate) fn redis(&self, progress: &Progress) -> Result<Container> {
        let port = ports::prefer(REDIS_PORT)?;
        let publish = format!("127.0.0.1:{port}:6379");
        let options = ["-p", &publish, REDIS_IMAGE, "redis-server", "--save", ""];
        let url = format!("redis://127.0.0.1:{port}/0");
        self.start("redis", &options, url, progress, |_| redis::answers(port))
    }

    /// Grafana in the host's network, because Prometheus listens on its loopback address alone.
    pub(crate) fn grafana(
        &self,
        progress: &Progress,
        port: u16,
        prometheus: &str,
        provisioning: &Path,
        dashboards: &Path,
    ) -> Result<Container> {
        let provisioning = format!("{}:/provisioning:ro", provisioning.display());
        let dashboards = format!("{}:/dashboards:ro", dashboards.display());
        let variables = [
            "GF_SERVER_HTTP_ADDR=127.0.0.1".to_owned(),
            format!("GF_SERVER_HTTP_PORT={port}"),
            "GF_AUTH_ANONYMOUS_ENABLED=true".to_owned(),
            "GF_AUTH_ANONYMOUS_ORG_ROLE=Admin".to_owned(),
            "GF_PATHS_PROVISIONING=/provisioning".to_owned(),
            "DASHBOARDS=/dashboards".to_owned(),
            format!("PROMETHEUS_URL={prometheus}"),
        ];
        let mut options = vec!["--network", "host", "-v", &provisioning, "-v", &dashboards];
        options.extend(variables.iter().flat_map(|variable| ["-e", variable]));
        options.push(GRAFANA_IMAGE);
        let url = format!("http://127.0.0.1:{port}");
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        let ready = |_: &Container| TcpStream::connect_timeout(&address, Duration::from_secs(1)).is_ok();
        self.start("grafana", &options, url, progress, ready)
    }

    fn start(
        &self,
        what: &str,
        options: &[&str],
        url: String,
        progress: &Progress,
        ready: impl Fn(&Container) -> bool,
    ) -> Result<Container> {
        let name = name(what);
        // A run that was killed leaves its container.
        let _ = remove(&self.program, &name);
        let mut command = Command::new(&self.program);
        command.args(["run", "--detach", "--rm", "--name", &name]).args(options);
        progress.run(command)?;
        let container = Container { program: self.program.clone(), name, url };
        let answered = daemon::poll(READY_LIMIT, || {
            signals::check()?;
            Ok(ready(&container).then_some(()))
        })?;
        if answered.is_none() {
            let mut logs = Command::new(&self.program);
            logs.args(["logs", "--tail", "20", &container.name]);
            let words = daemon::run(logs, PROBE_LIMIT).map(|output| [output.stdout, output.stderr].concat());
            let words = String::from_utf8_lossy(&words.unwrap_or_default()).into_owned();
            bail!("{} is not ready after {} s:\n{words}", container.name, READY_LIMIT.as_secs());
        }
        Ok(container)
    }
}

impl Container {
    /// The rows of a statement, a line each, from the `psql` inside. By TCP, for while the image makes its data directory
    /// a first server answers on the socket alone.
    pub(crate) fn psql(&self, sql: &str) -> Result<String> {
        let mut exec = Command::new(&self.program);
        exec.args(["exec", "--env", &format!("PGPASSWORD={PASSWORD}"), &self.name, "psql"]);
        exec.args(["-h", "127.0.0.1", "-U", "postgres", "-d", DATABASE, "-X", "-q", "-A", "-t", "-c", sql]);
        daemon::run_ok(exec, PROBE_LIMIT)
    }

    pub(crate) fn url(&self) -> &str {
        &self.url
    }

    pub(crate) fn stop(self) -> Result<()> {
        // In order, so that Postgres need not recover; --rm removes it, and so does the drop.
        let mut stop = Command::new(&self.program);
        stop.args(["stop", &self.name]);
        daemon::run_ok(stop, END_LIMIT).map(drop)
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        let _ = remove(&self.program, &self.name);
    }
}

/// Removes this clone's container and volume from every engine that is there.
pub(crate) fn reset() -> Result<()> {
    for program in ["docker", "podman"].into_iter().filter_map(programs::in_path) {
        let mut info = Command::new(&program);
        info.arg("info");
        if daemon::run_ok(info, PROBE_LIMIT).is_err() {
            continue;
        }
        remove(&program, &name("postgres"))?;
        let mut volume = Command::new(&program);
        volume.args(["volume", "rm", "--force", &name("postgres")]);
        daemon::run_ok(volume, END_LIMIT).context("remove the container's data")?;
    }
    Ok(())
}

fn remove(program: &PathBuf, name: &str) -> Result<()> {
    let mut command = Command::new(program);
    command.args(["rm", "--force", name]);
    daemon::run_ok(command, END_LIMIT).map(drop)
}

/// One per clone, for two clones can be worked in at once.
fn name(what: &str) -> String {
    let clone = stable_hash(workspace::root().as_os_str().as_encoded_bytes());
    format!("chat-service-dev-{what}-{:08x}", clone >> 32)
}
