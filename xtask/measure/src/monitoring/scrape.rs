//! What the built service exports, and which other metrics there are.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::process::{Child, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use harness::servers::{daemon, ports};
use harness::{Postgres, Redis, Scratch, places};

use crate::rules;
use common::chart;
use common::go_tools;
use common::steps::Progress;
use common::workspace::in_ci;

/// Whose documentation names the metrics of Kubernetes' objects.
const KUBE_STATE_METRICS: &str = "k8s.io/kube-state-metrics/v2@v2.18.0";

/// What Prometheus makes itself, of each scrape and of each alert.
const PROMETHEUS_OWN: [&str; 4] = ["up", "scrape_duration_seconds", "scrape_samples_scraped", "ALERTS"];

/// Names that the kubelet and its cAdvisor export; there is no list of them to compare with.
const KUBELET: [&str; 7] = [
    "container_cpu_cfs_periods_total",
    "container_cpu_cfs_throttled_periods_total",
    "container_cpu_usage_seconds_total",
    "container_memory_working_set_bytes",
    "kubelet_volume_stats_available_bytes",
    "kubelet_volume_stats_capacity_bytes",
    "kubelet_volume_stats_used_bytes",
];

const START_LIMIT: Duration = Duration::from_secs(20);

/// All metrics that an expression may name.
pub(super) struct Metrics {
    /// A scrape of a service without traffic.
    pub(super) text: String,
    /// The names of all samples in it.
    pub(super) names: BTreeSet<String>,
    recorded: BTreeSet<String>,
    /// The documentation of kube-state-metrics; nothing where Go is not there to fetch it.
    objects: Option<String>,
}

impl Metrics {
    pub(super) fn find(progress: &Progress, postgres: &Postgres, redis: &Redis) -> Result<Self> {
        let text = scrape(postgres, redis)?;
        let name = |line: &str| line.split(['{', ' ']).next().unwrap_or_default().to_owned();
        let names = text.lines().filter(|line| !line.starts_with('#')).map(name).collect();
        let recorded = rules::all()?.into_iter().filter_map(|rule| rule.record).collect();
        Ok(Self { text, names, recorded, objects: kube_state_metrics(progress)? })
    }

    /// Whether there is one of this name.
    pub(super) fn have(&self, name: &str) -> bool {
        let documented = || self.objects.as_ref().is_none_or(|text| text.contains(&format!("| {name} ")));
        self.names.contains(name)
            || self.recorded.contains(name)
            || PROMETHEUS_OWN.contains(&name)
            || KUBELET.contains(&name)
            || name.starts_with("kube_") && documented()
    }

    /// Whether it is the name of a histogram, which no sample has.
    pub(super) fn is_histogram(&self, name: &str) -> bool {
        self.names.contains(&format!("{name}_bucket"))
    }

    /// A histogram's name for any of its samples' names.
    pub(super) fn family(&self, name: &str) -> String {
        let histogram = |suffix| name.strip_suffix(suffix).filter(|stem| self.is_histogram(stem));
        ["_bucket", "_sum", "_count"].into_iter().find_map(histogram).unwrap_or(name).to_owned()
    }
}

/// Whether a metric is another exporter's, which only a cluster has.
pub(super) fn of_a_cluster(name: &str) -> bool {
    KUBELET.contains(&name) || name.starts_with("kube_")
}

/// A running service; dropping it ends it.
struct Service(Child);

impl Drop for Service {
    fn drop(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

fn scrape(postgres: &Postgres, redis: &Redis) -> Result<String> {
    const DATABASE: &str = "dashboards";
    postgres.query("postgres", &format!("DROP DATABASE IF EXISTS {DATABASE}"))?;
    postgres.create_database(DATABASE)?;
    let scratch = Scratch::new("dashboards")?;
    let log = File::create(scratch.path().join("service.log"))?;
    let ops_port = ports::free()?;
    let mut command = daemon::dies_with_us(&places::service_binary()?, "KILL");
    command.arg("serve").env_clear().current_dir(scratch.path());
    command.envs([
        ("DATABASE_URL", postgres.url(DATABASE)),
        ("REDIS_URL", redis.url(0)),
        ("HOST", "127.0.0.1".to_owned()),
        ("PORT", ports::free()?.to_string()),
        ("OPS_PORT", ops_port.to_string()),
    ]);
    command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
    let _service = Service(daemon::spawn(command).context("start the service")?);
    let url = format!("http://127.0.0.1:{ops_port}");
    let client = reqwest::blocking::Client::builder().timeout(Duration::from_secs(5)).build()?;
    let text = daemon::poll(START_LIMIT, || {
        let get = |path: &str| client.get(format!("{url}{path}")).send()?.error_for_status()?.text();
        Ok(get("/healthz").and_then(|_| get("/metrics")).ok())
    })?;
    text.ok_or_else(|| anyhow!("no metrics within {} s", START_LIMIT.as_secs()))
}

fn kube_state_metrics(progress: &Progress) -> Result<Option<String>> {
    if go_tools::go().is_err() && !in_ci() {
        return Ok(None);
    }
    let folder = chart::module_folder(progress, KUBE_STATE_METRICS)?.join("docs/metrics");
    let mut text = String::new();
    for area in fs::read_dir(&folder).with_context(|| format!("read {}", folder.display()))? {
        for file in fs::read_dir(area?.path())? {
            text += &fs::read_to_string(file?.path())?;
        }
    }
    Ok(Some(text))
}
