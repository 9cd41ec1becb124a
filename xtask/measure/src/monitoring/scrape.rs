//! The metrics of the built service, and those of other exporters.

use std::collections::BTreeSet;
use std::fs;
use std::net::SocketAddr;

use anyhow::{Context, Result, ensure};
use common::chart;
use common::go_tools;
use common::steps::Progress;
use common::workspace::in_ci;
use harness::http::Client;
use harness::{Postgres, Redis, Replica, Scratch, places};

use crate::canary::Canary;
use crate::rules;

/// Whose documentation names the metrics of Kubernetes' objects.
const KUBE_STATE_METRICS: &str = "k8s.io/kube-state-metrics/v2@v2.18.0";

/// Metrics that Prometheus itself makes.
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

/// All existing metrics.
pub(super) struct Metrics {
    /// A scrape of a service without traffic, and of a canary.
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

fn scrape(postgres: &Postgres, redis: &Redis) -> Result<String> {
    const DATABASE: &str = "dashboards";
    postgres.query("postgres", &format!("DROP DATABASE IF EXISTS {DATABASE}"))?;
    postgres.create_database(DATABASE)?;
    let scratch = Scratch::new("dashboards")?;
    let urls = [("DATABASE_URL", postgres.url(DATABASE)), ("REDIS_URL", redis.url(0))];
    let replica = Replica::start(&places::service_binary()?, scratch.path().join("service.log"), urls)?;
    replica.await_ready()?;
    let metrics = |operations: SocketAddr| -> Result<String> {
        let answer = Client::new(operations).ask("GET", "/metrics", None, "")?;
        ensure!(answer.status == 200, "/metrics answers {}", answer.status);
        Ok(answer.text())
    };
    let text = metrics(replica.operations)?;
    let canary =
        Canary::start(&places::service_binary()?, &scratch.path().join("canary.log"), replica.public)?;
    Ok(text + &metrics(canary.operations)?)
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
