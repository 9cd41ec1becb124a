//! The alerts on what kube-state-metrics says: seen to fire and to resolve on the cluster, by an upgrade in which everything
//! goes wrong at once, while the old pods go on serving.

use std::fs::{self, File};
use std::path::Path;
use std::process::{Child, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use harness::places;
use harness::servers::{daemon, ports};
use serde_json::json;

use crate::stage::{DEPLOYMENT, NAMESPACE, Stage};
use common::go_tools::GoTool;
use common::prometheus::RULES;
use common::prometheus::{History, ON_A_CLUSTER, Prometheus, ScrapeJob};
use common::steps::Progress;
use common::{signals, workspace};

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

/// Kubernetes' own times are not scaled: the third wait of a back-off is 40 s, and the autoscaler looks each 15 s.
const FIRE_LIMIT: Duration = Duration::from_secs(180);
const RESOLVE_LIMIT: Duration = Duration::from_secs(120);
const START_LIMIT: Duration = Duration::from_secs(30);
const POLL: Duration = Duration::from_millis(250);

/// A kube-state-metrics that looks at our namespace; dropping it ends it.
struct Exporter {
    child: Child,
    port: u16,
}

impl Exporter {
    fn start(progress: &Progress, kubeconfig: &Path, dir: &Path) -> Result<Self> {
        let program = KUBE_STATE_METRICS.build(progress)?;
        let (port, own_port) = (ports::free()?, ports::free()?);
        let log = File::create(dir.join("kube-state-metrics.log"))?;
        let mut command = daemon::dies_with_us(&program, "KILL");
        command.arg(format!("--kubeconfig={}", kubeconfig.display()));
        command.arg(format!("--namespaces={NAMESPACE}"));
        command.arg("--resources=deployments,horizontalpodautoscalers,jobs,pods");
        command.args(["--host=127.0.0.1", "--telemetry-host=127.0.0.1"]);
        command.arg(format!("--port={port}")).arg(format!("--telemetry-port={own_port}"));
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let child = daemon::spawn(command).context("start kube-state-metrics")?;
        Ok(Self { child, port })
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

impl Drop for Exporter {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// A Prometheus that is asked again and again.
struct Watch {
    prometheus: Prometheus,
    history: Mutex<History>,
    over: AtomicBool,
}

impl Watch {
    /// Writes down what fires, until it is over.
    fn run(&self) {
        while !self.over.load(Ordering::Relaxed) {
            // What cannot be asked is asked again; an alert that is not seen for that is a failure below.
            if let Ok(active) = self.prometheus.active() {
                self.history().add(&active);
            }
            thread::sleep(POLL);
        }
    }

    fn history(&self) -> MutexGuard<'_, History> {
        self.history.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Until there is an answer for each alert; else the error names those without.
    fn wait<T>(
        &self,
        limit: Duration,
        what: &str,
        ask: impl Fn(&History, &'static str) -> Option<T>,
    ) -> Result<Vec<T>> {
        let deadline = Instant::now() + limit;
        loop {
            signals::check()?;
            let answers = ALERTS.map(|alert| ask(&self.history(), alert));
            let unanswered = ALERTS.iter().zip(&answers).filter(|(_, answer)| answer.is_none());
            let missing: Vec<&str> = unanswered.map(|(alert, _)| *alert).collect();
            if missing.is_empty() {
                return Ok(answers.into_iter().flatten().collect());
            }
            ensure!(Instant::now() < deadline, "{missing:?} {what} within {} s", limit.as_secs());
            thread::sleep(POLL);
        }
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
    let watch = Watch { prometheus, history: Mutex::new(History::new()), over: AtomicBool::new(false) };
    thread::scope(|scope| {
        scope.spawn(|| watch.run());
        let outcome = stage.under_load(progress, |stage| fire_and_resolve(stage, progress, &watch));
        watch.over.store(true, Ordering::Relaxed);
        outcome
    })
}

fn fire_and_resolve(stage: &Stage, progress: &Progress, watch: &Watch) -> Result<()> {
    // Of a sound release none fires.
    thread::sleep(Duration::from_secs(5));
    watch.wait(RESOLVE_LIMIT, "fire before the fault", |history, alert| {
        (!history.fires(alert, NAMESPACE)).then_some(())
    })?;
    let injected = Instant::now();
    set_deadline(stage, progress, 10)?;
    let fired = stage.change(progress, &EVERYTHING_WRONG).and_then(|_| {
        watch.wait(FIRE_LIMIT, "did not fire", |history, alert| {
            Some(history.since(injected, alert, NAMESPACE)?.0)
        })
    });
    let healed = Instant::now();
    set_deadline(stage, progress, 600)?;
    stage.upgrade(progress, stage.tag, &[])?;
    stage.await_all()?;
    let fired = fired.map_err(|error| stage.kubernetes.explained(error))?;
    let resolved = watch.wait(RESOLVE_LIMIT, "did not resolve", |history, alert| {
        history.since(injected, alert, NAMESPACE)?.1
    })?;
    for ((alert, fired), resolved) in ALERTS.iter().zip(fired).zip(resolved) {
        let fires = (fired - injected).as_secs_f32();
        let resolves = resolved.saturating_duration_since(healed).as_secs_f32();
        progress.note(&format!("{alert:<32} fires {fires:>6.1} s  resolves {resolves:>6.1} s"));
    }
    Ok(())
}

/// Without progress for so many seconds a rollout counts as stuck. It is not the chart's to say.
fn set_deadline(stage: &Stage, progress: &Progress, seconds: u32) -> Result<()> {
    let patch = json!({ "spec": { "progressDeadlineSeconds": seconds } });
    let patch = format!("kubectl --namespace {NAMESPACE} patch deployment {DEPLOYMENT} --patch '{patch}'");
    stage.shell(progress, &patch).map(drop)
}
