//! What platform teams do with the release, and expect of it.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use common::chart;
use common::steps::Progress;
use harness::User;
use harness::http::Client;
use harness::servers::daemon;
use kube::ResourceExt;
use serde_json::json;

use crate::kubernetes::{is_ready, no_warnings};
use crate::stage::{DEPLOYMENT, IMAGES, NAMESPACE, RELEASE, ROLLOUT_LIMIT, SERVER, Stage};

const SUCCESSES: &str = "chat_canary_rounds_total{outcome=\"success\"}";

/// Every combination of values, rendered and accepted by the real API server, definitions of other vendors included.
pub(super) fn values_files(stage: &mut Stage, progress: &Progress) -> Result<()> {
    for (module, files) in chart::SCHEMA_SOURCES {
        for file in files.iter().filter(|file| file.ends_with(".yaml")) {
            let path = chart::module_folder(progress, module)?.join(file);
            let apply = "kubectl apply --server-side --force-conflicts --filename";
            stage.shell(progress, &format!("{apply} '{}'", path.display()))?;
        }
    }
    let files = chart::values_files()?;
    for (name, values) in &files {
        // The test's pod is not made before its service account, and `helm test` reports enough of it.
        let mut args = vec!["template", "dry", "helm/chat-service", "--skip-tests"];
        let paths: Vec<_> = values.iter().map(|path| path.to_string_lossy()).collect();
        args.extend(paths.iter().flat_map(|path| ["--values", &**path]));
        let rendered = stage.helm(progress, &args)?;
        let file = Stage::scratch_file(&format!("e2e-{name}.yaml"), &rendered)?;
        let apply = format!("kubectl apply --dry-run=server --namespace {NAMESPACE} --filename");
        let said = stage
            .shell(progress, &format!("{apply} '{}'", file.display()))
            .with_context(|| format!("values {name}"))?;
        no_warnings(&said).with_context(|| format!("values {name}"))?;
    }
    progress.note(&format!("{} combinations of values", files.len()));
    Ok(())
}

pub(super) fn install(stage: &mut Stage, progress: &Progress) -> Result<()> {
    let said = stage.apply(progress, "install", stage.tag, &[], "5m")?;
    no_warnings(&said)?;
    for part in ["STATUS: deployed", "NOTES:", "helm test chat"] {
        ensure!(said.contains(part), "helm does not print {part:?}:\n{said}");
    }
    stage.await_all()?;
    stage.no_restarts()?;
    stage.users()
}

pub(super) fn helm_test(stage: &mut Stage, progress: &Progress) -> Result<()> {
    let said = stage.helm(progress, &["test", RELEASE, "--timeout", "2m"])?;
    ensure!(said.contains("Phase:          Succeeded"), "no test ran:\n{said}");
    Ok(())
}

/// A conversation of two users, one through the Service, one through a port-forward.
pub(super) fn conversation(stage: &mut Stage, progress: &Progress) -> Result<()> {
    let forward = stage.kubernetes.forward(SERVER, 8000)?;
    let mut users = Vec::new();
    for (name, address) in [("anna", stage.address), ("ben", forward.address)] {
        users.push((Client::new(address), User::register(address, name)?));
    }
    let lines = ["Hello, Ben", "Hello, Anna 👋", "مرحبا"];
    for (number, line) in lines.iter().enumerate() {
        let recipient = users[(number + 1) % 2].1.id.clone();
        let (client, user) = &mut users[number % 2];
        let body = json!({"recipient_id": recipient, "content": line}).to_string();
        let message = client.expect(201, "POST", "/send", Some(&user.token), &body)?;
        ensure!(message["seq"] == number + 1, "seq {} after {number}", message["seq"]);
    }
    for reader in 0..2 {
        let peer = users[1 - reader].1.id.clone();
        let (client, user) = &mut users[reader];
        let page = client.expect(200, "GET", &format!("/messages?peer_id={peer}"), Some(&user.token), "")?;
        let contents: Vec<_> =
            page.as_array().context("a page")?.iter().rev().map(|m| &m["content"]).collect();
        ensure!(contents == lines, "{contents:?} instead of {lines:?}");
    }
    // The operations port is behind no Service that clients reach.
    let metrics = Client::new(stage.address).ask("GET", "/metrics", None, "")?;
    ensure!(metrics.status == 404, "/metrics answers {} on the public port", metrics.status);
    progress.note("through the Service and through a port-forward, the same conversation");
    Ok(())
}

/// It talks through the Service, under a password that the upgrade generates.
pub(super) fn canary(stage: &mut Stage, progress: &Progress) -> Result<()> {
    stage.upgrade(progress, stage.tag, &["canary.enabled=true"])?;
    stage.kubernetes.rolled_out("chat-chat-service-canary", ROLLOUT_LIMIT)?;
    let labels = "app.kubernetes.io/instance=chat,app.kubernetes.io/component=canary";
    let forward = stage.kubernetes.forward(labels, 9000)?;
    let mut client = Client::new(forward.address);
    // A log-in that fails is repeated after a minute.
    let succeeded = daemon::poll(Duration::from_secs(150), || {
        let Ok(answer) = client.ask("GET", "/metrics", None, "") else { return Ok(None) };
        let text = answer.text();
        let has_success = |line: &str| line.starts_with(SUCCESSES) && line != format!("{SUCCESSES} 0");
        Ok(text.lines().any(has_success).then_some(text))
    })?;
    let metrics = succeeded.context("no round of the canary succeeds")?;
    ensure!(metrics.contains("chat_canary_lost_total 0\n"), "the canary lost messages:\n{metrics}");
    stage.upgrade(progress, stage.tag, &[])?;
    stage.await_all()
}

pub(super) fn rollout_restart(stage: &mut Stage, progress: &Progress) -> Result<()> {
    stage.under_load(progress, |stage| {
        let restart = format!("kubectl --namespace {NAMESPACE} rollout restart deployment/{DEPLOYMENT}");
        stage.shell(progress, &restart)?;
        stage.kubernetes.rolled_out(DEPLOYMENT, ROLLOUT_LIMIT)?;
        stage.await_old_pods_gone()
    })
}

pub(super) fn upgrade(stage: &mut Stage, progress: &Progress) -> Result<()> {
    stage.under_load(progress, |stage| {
        stage.upgrade(progress, IMAGES[1], &[])?;
        stage.await_old_pods_gone()
    })?;
    stage.tag = IMAGES[1];
    for pod in stage.kubernetes.pods(SERVER)? {
        let image = pod.spec.as_ref().and_then(|spec| spec.containers.first()?.image.clone());
        ensure!(
            image.is_some_and(|image| image.ends_with(IMAGES[1])),
            "{} has another image",
            pod.name_any()
        );
    }
    Ok(())
}

pub(super) fn pod_deleted(stage: &mut Stage, progress: &Progress) -> Result<()> {
    stage.under_load(progress, |stage| {
        let pod = stage.kubernetes.pods(SERVER)?.into_iter().find(is_ready).context("a ready pod")?;
        stage.kubernetes.delete_pod(&pod.name_any(), false)?;
        stage.kubernetes.rolled_out(DEPLOYMENT, ROLLOUT_LIMIT)?;
        stage.await_old_pods_gone()
    })
}

pub(super) fn upgrade_twice(stage: &mut Stage, progress: &Progress) -> Result<()> {
    let before = stage.secret()?;
    let pods = stage.names_of_pods()?;
    for _ in 0..2 {
        stage.upgrade(progress, stage.tag, &[])?;
    }
    ensure!(stage.secret()? == before, "an upgrade changed the Secret");
    // Nothing changed, so nothing may have been started again.
    ensure!(stage.names_of_pods()? == pods, "an upgrade that changes nothing has made new pods");
    // A changed value does; and the Secret is still the same.
    stage.upgrade(progress, stage.tag, &["config.CACHE_WINDOW=40"])?;
    ensure!(stage.secret()? == before, "an upgrade changed the Secret");
    ensure!(stage.names_of_pods()? != pods, "a changed value has made no new pods");
    stage.upgrade(progress, stage.tag, &[])?;
    stage.verify(progress)
}

pub(super) fn rollback(stage: &mut Stage, progress: &Progress) -> Result<()> {
    let before = stage.secret()?;
    let other = IMAGES.into_iter().find(|tag| *tag != stage.tag).context("two images")?;
    stage.upgrade(progress, other, &[])?;
    stage.under_load(progress, |stage| {
        stage.helm(progress, &["rollback", RELEASE, "--wait", "--wait-for-jobs", "--timeout", "4m"])?;
        stage.await_old_pods_gone()
    })?;
    ensure!(stage.secret()? == before, "the rollback changed the Secret");
    for pod in stage.kubernetes.pods(SERVER)? {
        let image = pod.spec.as_ref().and_then(|spec| spec.containers.first()?.image.clone());
        ensure!(
            image.is_some_and(|image| image.ends_with(stage.tag)),
            "{} was not rolled back",
            pod.name_any()
        );
    }
    Ok(())
}

/// Upgrades to the autoscaler, and returns the least replicas that the Deployment was to have meanwhile.
fn switched_on(stage: &Stage, progress: &Progress, scaling: &[&str]) -> Result<i32> {
    let ended = AtomicBool::new(false);
    thread::scope(|scope| {
        let watcher = scope.spawn(|| -> Result<i32> {
            let mut least = i32::MAX;
            while !ended.load(Ordering::Relaxed) {
                least = least.min(stage.kubernetes.wanted_replicas(DEPLOYMENT)?);
                thread::sleep(Duration::from_millis(100));
            }
            Ok(least)
        });
        let upgraded = stage.upgrade(progress, stage.tag, scaling);
        ended.store(true, Ordering::Relaxed);
        upgraded?;
        watcher.join().expect("the watcher does not panic")
    })
}

/// The autoscaler adds a replica while conversations run without a pause, and no `seq` is skipped.
pub(super) fn autoscaling(stage: &mut Stage, progress: &Progress) -> Result<()> {
    let metrics = stage.kubernetes.get("/apis/metrics.k8s.io/v1beta1/nodes");
    ensure!(metrics.is_ok(), "no metrics-server: install it, or the autoscaler sees nothing");
    let scaling = [
        "autoscaling.enabled=true",
        "autoscaling.maxReplicas=3",
        "autoscaling.targetCPUUtilizationPercentage=60",
    ];
    let least = switched_on(stage, progress, &scaling)?;
    ensure!(least >= 2, "switching the autoscaler on left {least} of 2 replicas");
    let ((), report) = stage.loaded(Duration::ZERO, |stage| {
        stage.kubernetes.replicas(DEPLOYMENT, Duration::from_secs(240), |ready| ready >= 3)
    })?;
    // On a saturated machine requests may fail, but no message may be lost.
    let (requests, failed) = (report.requests, report.failures.len());
    ensure!(failed * 1000 <= requests, "{:#}", report.verdict().err().context("failures")?);
    progress.note(&format!("{requests} requests at full load, {failed} without an answer"));
    stage.verify(progress)?;
    stage.upgrade(progress, stage.tag, &[])?;
    stage.await_all()
}

impl Stage {
    /// The running replicas, by name.
    pub(super) fn names_of_pods(&self) -> Result<Vec<String>> {
        let mut names: Vec<_> = self.kubernetes.pods(SERVER)?.iter().map(ResourceExt::name_any).collect();
        names.sort();
        Ok(names)
    }

    /// Kubernetes counts pods as gone while they still end, and requests may reach them until then.
    pub(super) fn await_old_pods_gone(&self) -> Result<()> {
        self.kubernetes.none_ending(SERVER, Duration::from_secs(90))
    }
}
