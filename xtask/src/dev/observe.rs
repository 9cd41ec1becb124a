//! `--observe`: a Prometheus with the rules, a collector for traces, and Grafana where it is installed or an engine can
//! run it. Their configuration is in `deploy/observability`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::process::{Pid, Signal, kill_process};
use tests::install;
use tests::servers::collector::{Collector, Spans};
use tests::servers::prometheus::Prometheus;
use tests::servers::{daemon, ports, programs};

use super::container::{Container, Engine};
use super::service::Addresses;
use crate::go_tools;
use crate::steps::{Progress, step};
use crate::test::observability::COLLECTOR;
use crate::workspace;

const CONFIG: &str = "deploy/observability";

/// Tried first, so that bookmarks stay good.
const PROMETHEUS_PORT: u16 = 9090;
const COLLECTOR_PORT: u16 = 4318;
const GRAFANA_PORT: u16 = 3000;

const GRAFANA_END_LIMIT: Duration = Duration::from_secs(20);

/// What watches the service. Dropping it ends all of it.
pub(crate) struct Observers {
    collector: Option<Collector>,
    prometheus: Prometheus,
    grafana: Option<Grafana>,
    /// For the reader: what runs where, and what does not.
    lines: Vec<String>,
}

enum Grafana {
    Installed(Child),
    Container(Container),
}

impl Observers {
    pub(crate) fn start(dir: &Path, service: &Addresses) -> Result<Self> {
        let dir = dir.join("observe");
        let prometheus = step("Prometheus", |progress| start_prometheus(progress, &dir, service))?;
        let mut lines = vec![format!("Prometheus {}", prometheus.url())];
        let collector = match go_tools::go() {
            Ok(_) => Some(step("collector", |progress| start_collector(progress, &dir))?),
            Err(error) => {
                lines.push(format!("no traces  {error:#}"));
                None
            }
        };
        if let Some(collector) = &collector {
            let (file, url) = (workspace::shown(collector.file()), collector.endpoint());
            lines.push(format!("traces     {file}, one export a line, received at {url}"));
        }
        let grafana = step("Grafana", |progress| start_grafana(progress, &dir, &prometheus.url()))?;
        lines.push(match &grafana {
            Some((_, url)) => format!("Grafana    {url}"),
            None => "no Grafana: neither installed, nor is there a container engine".to_owned(),
        });
        Ok(Self { collector, prometheus, grafana: grafana.map(|(grafana, _)| grafana), lines })
    }

    /// What the service has to be told: where traces go, and to make one of every request.
    pub(crate) fn variables(&self) -> Vec<(&'static str, String)> {
        let Some(collector) = &self.collector else { return Vec::new() };
        vec![
            ("OTEL_EXPORTER_OTLP_ENDPOINT", collector.endpoint()),
            ("OTEL_TRACES_SAMPLER", "parentbased_always_on".to_owned()),
            ("OTEL_BSP_SCHEDULE_DELAY", "500".to_owned()),
        ]
    }

    pub(crate) fn text(&self) -> String {
        self.lines.iter().map(|line| format!("  {line}\n")).collect()
    }

    pub(crate) fn stop(mut self) -> Result<()> {
        match self.grafana.take() {
            Some(Grafana::Container(container)) => container.stop()?,
            // Dropped, it ends.
            other => drop(other),
        }
        self.prometheus.stop()?;
        self.collector.as_mut().map_or(Ok(()), Collector::stop)
    }
}

impl Drop for Grafana {
    fn drop(&mut self) {
        let Self::Installed(child) = self else { return };
        let _ = kill_process(Pid::from_child(child), Signal::TERM);
        if !matches!(daemon::poll(GRAFANA_END_LIMIT, || Ok(child.try_wait()?)), Ok(Some(_))) {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn port(wanted: u16) -> Result<u16> {
    if ports::is_free(wanted) { Ok(wanted) } else { ports::free() }
}

fn start_prometheus(progress: &Progress, dir: &Path, service: &Addresses) -> Result<Prometheus> {
    install::ensure_prometheus(|line| progress.note(line))?;
    let program = programs::in_path("prometheus").context("prometheus is not in PATH")?;
    let file = workspace::root().join(CONFIG).join("prometheus.yml");
    let config = fs::read_to_string(&file).with_context(|| format!("read {}", file.display()))?;
    let target = format!("{}:{}", service.host, service.ops_port);
    let deploy = workspace::root().join("deploy");
    let config = config.replace("127.0.0.1:9000", &target).replace("../", &format!("{}/", deploy.display()));
    Prometheus::start(&program, &dir.join("prometheus"), &config, port(PROMETHEUS_PORT)?)
}

fn start_collector(progress: &Progress, dir: &Path) -> Result<Collector> {
    let program = COLLECTOR.build(progress)?;
    Collector::start(&program, &dir.join("collector"), Some(port(COLLECTOR_PORT)?), Spans::Kept)
}

/// Grafana, with its URL.
fn start_grafana(progress: &Progress, dir: &Path, prometheus: &str) -> Result<Option<(Grafana, String)>> {
    let port = port(GRAFANA_PORT)?;
    let url = format!("http://127.0.0.1:{port}");
    let provisioning = workspace::root().join(CONFIG).join("grafana");
    let dashboards = workspace::root().join("deploy/grafana");
    if let Some(program) = programs::in_path("grafana-server").or_else(|| programs::in_path("grafana")) {
        let child = run_grafana(&program, &dir.join("grafana"), port, |name| match name {
            "PROMETHEUS_URL" => prometheus.to_owned(),
            "DASHBOARDS" => dashboards.display().to_string(),
            _ => provisioning.display().to_string(),
        })?;
        return Ok(Some((Grafana::Installed(child), url)));
    }
    let Some(engine) = Engine::find(progress) else { return Ok(None) };
    let container = engine.grafana(progress, port, prometheus, &provisioning, &dashboards)?;
    Ok(Some((Grafana::Container(container), url)))
}

fn run_grafana(program: &Path, dir: &Path, port: u16, value: impl Fn(&str) -> String) -> Result<Child> {
    fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))?;
    let log = fs::File::create(dir.join("grafana.log"))?;
    let mut command = daemon::dies_with_us(program, "KILL");
    if program.ends_with("grafana") {
        command.arg("server");
    }
    // Where distributions keep what it shows.
    if let Some(home) = [PathBuf::from("/usr/share/grafana")].iter().find(|home| home.is_dir()) {
        command.arg("--homepath").arg(home);
    }
    command.env("GF_PATHS_DATA", dir).env("GF_PATHS_PROVISIONING", value("PROVISIONING"));
    command.env("PROMETHEUS_URL", value("PROMETHEUS_URL")).env("DASHBOARDS", value("DASHBOARDS"));
    command.env("GF_SERVER_HTTP_ADDR", "127.0.0.1").env("GF_SERVER_HTTP_PORT", port.to_string());
    command.env("GF_AUTH_ANONYMOUS_ENABLED", "true").env("GF_AUTH_ANONYMOUS_ORG_ROLE", "Admin");
    command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
    daemon::spawn(command).context("start Grafana")
}
