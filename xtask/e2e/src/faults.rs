//! Faults that happen to a release, and how it has to behave.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use common::steps::Progress;
use harness::http::Client;
use harness::servers::daemon;

use crate::kubernetes::is_ready;
use crate::stage::{DEPLOYMENT, NAMESPACE, POSTGRES, REDIS, ROLLOUT_LIMIT, SERVER, Stage};

/// Readiness fails, nothing restarts, and the release recovers with every message.
pub(super) fn postgres_killed(stage: &mut Stage, progress: &Progress) -> Result<()> {
    stage.users()?;
    let pods = stage.names_of_pods()?;
    // At the pod, since a Service has no address that leads to one that is not ready.
    let forward = stage.kubernetes.forward(SERVER, 9000)?;
    // No new one before we have checked the effect.
    stage.kubernetes.cordon(true)?;
    let started = Instant::now();
    stage.kubernetes.delete_pod(&format!("{POSTGRES}-0"), true)?;
    let fell = stage.kubernetes.replicas(DEPLOYMENT, Duration::from_secs(60), |ready| ready == 0);
    let fell_after = started.elapsed();
    let answers = [status(forward.address, "/healthz"), status(forward.address, "/livez")];
    stage.kubernetes.cordon(false)?;
    fell?;
    ensure!(answers == [Some(503), Some(200)], "/healthz and /livez answer {answers:?}");
    stage.await_all()?;
    stage.await_answer(Duration::from_secs(60))?;
    let back_after = started.elapsed();
    ensure!(stage.names_of_pods()? == pods, "the service's pods are not the same");
    stage.no_restarts()?;
    progress.note(&format!(
        "unready after {:.0} s, ready again after {:.0} s, no restart",
        fell_after.as_secs_f32(),
        back_after.as_secs_f32()
    ));
    stage.verify(progress)
}

/// No request fails; some are delayed.
pub(super) fn redis_killed(stage: &mut Stage, progress: &Progress) -> Result<()> {
    stage.under_load(progress, |stage| {
        stage.kubernetes.cordon(true)?;
        let killed = stage.kubernetes.delete_pod(&format!("{REDIS}-0"), true);
        // Long enough for the readiness probes to speak, had they anything to say.
        std::thread::sleep(Duration::from_secs(10));
        let ready = stage.kubernetes.pods(SERVER)?.iter().filter(|pod| is_ready(pod)).count();
        stage.kubernetes.cordon(false)?;
        killed?;
        ensure!(ready == 2, "{ready} of 2 replicas are ready without Redis");
        stage.kubernetes.set_rolled_out(REDIS, ROLLOUT_LIMIT)
    })?;
    stage.no_restarts()
}

/// With two replicas a drain waits for the successor of the first before it takes the second.
pub(super) fn drain_two(stage: &mut Stage, progress: &Progress) -> Result<()> {
    stage.under_load(progress, |stage| {
        stage.kubernetes.cordon(true)?;
        let drained = take_one(stage);
        stage.kubernetes.cordon(false)?;
        drained?;
        stage.kubernetes.rolled_out(DEPLOYMENT, ROLLOUT_LIMIT)?;
        stage.await_old_pods_gone()
    })?;
    progress.note("the budget let one go, and held the other until its successor was ready");
    Ok(())
}

fn take_one(stage: &Stage) -> Result<()> {
    let pods = stage.names_of_pods()?;
    ensure!(pods.len() == 2, "{} replicas instead of 2", pods.len());
    ensure!(stage.kubernetes.evict(&pods[0])?, "the budget keeps the first of two replicas");
    // The first is on its way out; its successor finds no node.
    stage.kubernetes.replicas(DEPLOYMENT, Duration::from_secs(60), |ready| ready == 1)?;
    ensure!(!stage.kubernetes.evict(&pods[1])?, "the budget lets both replicas go at once");
    Ok(())
}

/// With one replica nothing may block the drain. The service is unavailable until a node takes it again.
pub(super) fn drain_one(stage: &mut Stage, progress: &Progress) -> Result<()> {
    stage.users()?;
    stage.upgrade(progress, stage.tag, &["replicaCount=1"])?;
    stage.await_old_pods_gone()?;
    let pods = stage.names_of_pods()?;
    stage.kubernetes.cordon(true)?;
    let evicted = stage.kubernetes.evict(pods.first().context("one replica")?);
    let gone = stage.await_old_pods_gone();
    stage.kubernetes.cordon(false)?;
    ensure!(evicted?, "a budget keeps the only replica, so that a drain never ends");
    gone?;
    stage.await_all()?;
    stage.await_answer(Duration::from_secs(30))?;
    stage.verify(progress)?;
    stage.upgrade(progress, stage.tag, &[])?;
    stage.await_all()
}

/// `--atomic` brings the old release back, no request fails, and the error names the image.
pub(super) fn broken_image(stage: &mut Stage, progress: &Progress) -> Result<()> {
    let why = ["no-such-image", "ImagePull"];
    fails_and_is_undone(stage, progress, "no-such-image", &[], &why)
}

/// The same of a value that only the service itself can refuse; and one that the chart refuses changes nothing at all.
pub(super) fn bad_value(stage: &mut Stage, progress: &Progress) -> Result<()> {
    let refused = stage.apply(progress, "upgrade", stage.tag, &["replicaCuont=3"], "1m");
    Stage::says_why(refused, &["replicaCuont"])?;
    let tag = stage.tag;
    let value = ["config.TRUSTED_PROXIES=everybody"];
    fails_and_is_undone(stage, progress, tag, &value, &["TRUSTED_PROXIES", "everybody"])
}

fn fails_and_is_undone(
    stage: &mut Stage,
    progress: &Progress,
    tag: &str,
    sets: &[&str],
    why: &[&str],
) -> Result<()> {
    let pods = stage.names_of_pods()?;
    let said = stage.under_load(progress, |stage| {
        let outcome = stage.apply(progress, "upgrade", tag, sets, "30s");
        Stage::says_why(outcome, why)
    })?;
    ensure!(said.contains("atomic"), "helm does not speak of --atomic:\n{said}");
    stage.kubernetes.rolled_out(DEPLOYMENT, ROLLOUT_LIMIT)?;
    stage.await_old_pods_gone()?;
    ensure!(stage.names_of_pods()? == pods, "the old pods were not kept");
    let status = stage.helm(progress, &["status", "chat"])?;
    ensure!(status.contains("STATUS: deployed"), "the release in {NAMESPACE} is not deployed:\n{status}");
    let reason = said.lines().find(|line| why.iter().all(|word| line.contains(word)));
    if let Some(reason) = reason {
        progress.note(reason.trim());
    }
    Ok(())
}

fn status(address: SocketAddr, path: &str) -> Option<u16> {
    let mut client = Client::new(address);
    daemon::poll(Duration::from_secs(10), || Ok(client.ask("GET", path, None, "").ok()))
        .ok()?
        .map(|answer| answer.status)
}
