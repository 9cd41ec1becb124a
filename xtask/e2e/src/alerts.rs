//! The alerts on kube-state-metrics: they have to fire and to resolve in an upgrade in which everything goes wrong at once,
//! while the old pods go on serving.

use std::fs;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use common::go_tools::GoTool;
use common::prometheus::{ON_A_CLUSTER, Prometheus, RULES, ScrapeJob, Watch};
use common::steps::Progress;
use common::workspace;
use harness::places;
use harness::servers::daemon::{self, Daemon};
use harness::servers::ports;
use serde_json::json;

use crate::stage::{DEPLOYMENT, NAMESPACE, Stage};

const ALERTS: [&str; 5] = ON_A_CLUSTER.1;

const KUBE_STATE_METRICS: GoTool = GoTool {
    name: "kube-state-metrics",
    module: "deploy/kube-state-metrics",
    package: "k8s.io/kube-state-metrics/v2",
    settings: &[],
};

/// New pods refuse the configuration, the new Job gets a wrong password, and the autoscaler wants all that it may have.
const EVERYTHING_WRONG: [&str; 8] = [
    "config.TRUSTED_PROXIES=everybody",
    "migration.extraEnv[0].name=DB_PASSWORD",
    "migration.extraEnv[0].value=wrong",
    "migration.waitSeconds=0",
    "autoscaling.enabled=true",
    "autoscaling.minReplicas=2",
    "autoscaling.maxReplicas=3",
    "autoscaling.targetCPUUtilizationPercentage=1",
];

/// Kubernetes' own times are not scaled: the third back-off takes 40 s, and the autoscaler syncs every 15 s.
const FIRE_LIMIT: Duration = Duration::from_secs(180);
const RESOLVE_LIMIT: Duration = Duration::from_secs(120);
const START_LIMIT: Duration = Duration::from_secs(30);

/// A kube-state-metrics that looks at our namespace; dropping it ends it.
struct Exporter {
    _daemon: Daemon,
    port: u16,
}

impl Exporter {
    fn start(progress: &Progress, kubeconfig: &Path, dir: &Path) -> Result<Self> {
        let program = KUBE_STATE_METRICS.build(progress)?;
        let (port, own_port) = (ports::free()?, ports::free()?);
        let mut command = daemon::dies_with_us(&program, "KILL");
        command.arg(format!("--kubeconfig={}", kubeconfig.display()));
        command.arg(format!("--namespaces={NAMESPACE}"));
        command.arg("--resources=deployments,horizontalpodautoscalers,jobs,pods");
        command.args(["--host=127.0.0.1", "--telemetry-host=127.0.0.1"]);
        command.arg(format!("--port={port}")).arg(format!("--telemetry-port={own_port}"));
        let daemon = Daemon::start(command, &dir.join("kube-state-metrics.log"));
        Ok(Self { _daemon: daemon.context("start kube-state-metrics")?, port })
    }

    fn scrape_job(&self) -> ScrapeJob {
        // The labels of the objects are the exporter's, and stay.
        ScrapeJob(json!({
            "job_name": "kube-state-metrics",
            "honor_labels": true,
            "static_configs": [{ "targets": [format!("127.0.0.1:{}", self.port)] }],
        }))
    }
}

pub(super) fn all(stage: &mut Stage, progress: &Progress) -> Result<()> {
    let dir = places::target_dir()?.join("e2e-alerts");
    let _ = fs::remove_dir_all(&dir);
    fs::create_dir_all(&dir).with_context(|| format!("create {}", dir.display()))?;
    let exporter = Exporter::start(progress, stage.kubeconfig(), &dir)?;
    let rules = [workspace::root().join(RULES).join("kubernetes.yaml")];
    let prometheus = Prometheus::start(progress, &dir, &rules, vec![exporter.scrape_job()])?;
    prometheus.await_targets(START_LIMIT)?;
    let watch = Watch::new(&prometheus);
    watch.during(progress, || stage.under_load(progress, |stage| fire_and_resolve(stage, progress, &watch)))
}

fn fire_and_resolve(stage: &Stage, progress: &Progress, watch: &Watch<'_>) -> Result<()> {
    // In a healthy release none fires.
    thread::sleep(Duration::from_secs(5));
    watch.wait(RESOLVE_LIMIT, "fire before the fault", &ALERTS, |history, alert| {
        (!history.fires(alert, NAMESPACE)).then_some(())
    })?;
    let injected = Instant::now();
    set_patience(stage, progress, 20, 19)?;
    let fired = stage.change(progress, &EVERYTHING_WRONG).and_then(|_| {
        watch.wait(FIRE_LIMIT, "did not fire", &ALERTS, |history, alert| {
            Some(history.since(injected, alert, NAMESPACE)?.0)
        })
    });
    let healed = Instant::now();
    set_patience(stage, progress, 600, 0)?;
    stage.upgrade(progress, stage.tag, &[])?;
    stage.await_all()?;
    let fired = fired.map_err(|error| stage.kubernetes.explained(error))?;
    let resolved = watch.wait(RESOLVE_LIMIT, "did not resolve", &ALERTS, |history, alert| {
        history.since(injected, alert, NAMESPACE)?.1
    })?;
    for ((alert, fired), resolved) in ALERTS.iter().zip(fired).zip(resolved) {
        let fires = (fired - injected).as_secs_f32();
        let resolves = resolved.saturating_duration_since(healed).as_secs_f32();
        progress.note(&format!("{alert:<32} fires {fires:>6.1} s  resolves {resolves:>6.1} s"));
    }
    Ok(())
}

/// After how many seconds without progress a rollout counts as stuck, and for how many a pod has to be ready until it counts
/// as available; the chart sets neither. The replica that the autoscaler adds may be of the old, working release: without
/// the second it would not be missing for long enough.
fn set_patience(stage: &Stage, progress: &Progress, deadline: u32, ready: u32) -> Result<()> {
    let patch = json!({ "spec": { "progressDeadlineSeconds": deadline, "minReadySeconds": ready } });
    let patch = format!("kubectl --namespace {NAMESPACE} patch deployment {DEPLOYMENT} --patch '{patch}'");
    stage.shell(progress, &patch).map(drop)
}
