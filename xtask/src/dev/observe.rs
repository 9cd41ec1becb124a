//! `--observe`: a Prometheus with the rules, a collector for traces, and Grafana where it is installed or a container
//! engine is. Their configuration is in `deploy/observability`.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use common::go_tools::COLLECTOR;
use common::prometheus::Prometheus;
use common::steps::{Progress, step};
use common::{go_tools, workspace};
use harness::install;
use harness::servers::collector::{Collector, Spans};
use harness::servers::daemon::{self, Daemon};
use harness::servers::{ports, programs};

use super::container::{Container, Engine};
use super::service::Addresses;
use super::settings::Settings;

const CONFIG: &str = "deploy/observability";
const ENDPOINT: &str = "OTEL_EXPORTER_OTLP_ENDPOINT";

/// Tried first, so that bookmarks stay valid.
const PROMETHEUS_PORT: u16 = 9090;
const COLLECTOR_PORT: u16 = 4318;
const GRAFANA_PORT: u16 = 3000;

const GRAFANA_END_LIMIT: Duration = Duration::from_secs(20);

/// What observes the service. Dropping it ends all of it.
pub(crate) struct Observers {
    collector: Option<Collector>,
    /// Ends when it is dropped, as Grafana does.
    _prometheus: Prometheus,
    grafana: Option<Grafana>,
    /// For the reader: what runs where, and what does not.
    lines: Vec<String>,
}

enum Grafana {
    Installed(Daemon),
    Container(Container),
}

impl Observers {
    pub(crate) fn start(dir: &Path, service: &Addresses, settings: &Settings) -> Result<Self> {
        let dir = dir.join("observe");
        let prometheus =
            step("Prometheus", |progress| start_prometheus(progress, &dir.join("prometheus"), service))?;
        let mut lines = vec![format!("alerts    {} (Prometheus)", prometheus.url())];
        let (collector, traces) = match (settings.get(ENDPOINT), go_tools::go()) {
            (Some(_), _) => (None, format!("as {ENDPOINT} says")),
            (None, Err(_)) => (None, "none: the collector is built where Go is".to_owned()),
            (None, Ok(_)) => {
                let collector = step("collector", |progress| start_collector(progress, &dir))?;
                let file = workspace::shown(collector.file());
                let text = format!("{file}, received at {}", collector.endpoint());
                (Some(collector), text)
            }
        };
        lines.push(format!("traces    {traces}"));
        let grafana = step("Grafana", |progress| start_grafana(progress, &dir, &prometheus.url()))?;
        lines.push(match &grafana {
            Some((_, url)) => format!("Grafana   {url}"),
            None => "Grafana   none: neither is it installed, nor is there a container engine".to_owned(),
        });
        Ok(Self { collector, _prometheus: prometheus, grafana: grafana.map(|(grafana, _)| grafana), lines })
    }

    /// Variables for the service: where traces go, and to trace every request. The user's own settings win.
    pub(crate) fn variables(&self, settings: &Settings) -> Vec<(&'static str, String)> {
        let Some(collector) = &self.collector else { return Vec::new() };
        let ours = [
            (ENDPOINT, collector.endpoint()),
            ("OTEL_TRACES_SAMPLER", "parentbased_always_on".to_owned()),
            ("OTEL_BSP_SCHEDULE_DELAY", "500".to_owned()),
        ];
        ours.into_iter().filter(|(name, _)| settings.get(name).is_none()).collect()
    }

    pub(crate) fn text(&self) -> String {
        self.lines.iter().map(|line| format!("  {line}\n")).collect()
    }

    /// The collector last: it still receives the service's last spans.
    pub(crate) fn stop(mut self) -> Result<()> {
        match self.grafana.take() {
            Some(Grafana::Container(container)) => container.stop()?,
            Some(Grafana::Installed(mut daemon)) => daemon.stop(GRAFANA_END_LIMIT)?,
            None => {}
        }
        self.collector.as_mut().map_or(Ok(()), Collector::stop)
    }
}

fn start_prometheus(progress: &Progress, dir: &Path, service: &Addresses) -> Result<Prometheus> {
    let programs = install::ensure_prometheus(|line| progress.note(line))?;
    fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))?;
    let file = workspace::root().join(CONFIG).join("prometheus.yml");
    let config = fs::read_to_string(&file).with_context(|| format!("read {}", file.display()))?;
    let target = format!("{}:{}", service.host, service.ops_port);
    let deploy = workspace::root().join("deploy");
    let config = config.replace("127.0.0.1:9000", &target).replace("../", &format!("{}/", deploy.display()));
    Prometheus::launch(&programs.server, dir, &config, ports::prefer(PROMETHEUS_PORT)?, &[])
}

fn start_collector(progress: &Progress, dir: &Path) -> Result<Collector> {
    let program = COLLECTOR.build(progress)?;
    Collector::start(&program, &dir.join("collector"), Some(ports::prefer(COLLECTOR_PORT)?), Spans::Kept)
}

/// Grafana, with its URL.
fn start_grafana(progress: &Progress, dir: &Path, prometheus: &str) -> Result<Option<(Grafana, String)>> {
    let port = ports::prefer(GRAFANA_PORT)?;
    let url = format!("http://127.0.0.1:{port}");
    let provisioning = workspace::root().join(CONFIG).join("grafana");
    let dashboards = workspace::root().join("deploy/grafana");
    if let Some(program) = programs::in_path("grafana-server").or_else(|| programs::in_path("grafana")) {
        let daemon = run_grafana(&program, &dir.join("grafana"), port, |name| match name {
            "PROMETHEUS_URL" => prometheus.to_owned(),
            "DASHBOARDS" => dashboards.display().to_string(),
            _ => provisioning.display().to_string(),
        })?;
        return Ok(Some((Grafana::Installed(daemon), url)));
    }
    let Some(engine) = Engine::find(progress) else { return Ok(None) };
    let container = engine.grafana(progress, port, prometheus, &provisioning, &dashboards)?;
    Ok(Some((Grafana::Container(container), url)))
}

fn run_grafana(program: &Path, dir: &Path, port: u16, value: impl Fn(&str) -> String) -> Result<Daemon> {
    fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))?;
    let mut command = daemon::dies_with_us(program, "KILL");
    if program.ends_with("grafana") {
        command.arg("server");
    }
    // Where packages install its pages.
    let home = Path::new("/usr/share/grafana");
    if home.is_dir() {
        command.arg("--homepath").arg(home);
    }
    command.env("GF_PATHS_DATA", dir).env("GF_PATHS_PROVISIONING", value("PROVISIONING"));
    command.env("PROMETHEUS_URL", value("PROMETHEUS_URL")).env("DASHBOARDS", value("DASHBOARDS"));
    command.env("GF_SERVER_HTTP_ADDR", "127.0.0.1").env("GF_SERVER_HTTP_PORT", port.to_string());
    command.env("GF_AUTH_ANONYMOUS_ENABLED", "true").env("GF_AUTH_ANONYMOUS_ORG_ROLE", "Admin");
    Daemon::start(command, &dir.join("grafana.log")).context("start Grafana")
}
