//! The procedures of the chart's README, exactly as written there.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use common::steps::Progress;
use harness::http::Client;

use crate::stage::{DEPLOYMENT, NAMESPACE, RELEASE, Stage};

/// The blocks of `## Rotate`, in their order.
const SIGNING_KEY: usize = 0;
const FORGET_OLD_KEY: usize = 1;
const POSTGRES_PASSWORD: usize = 2;
const REDIS_PASSWORD: usize = 3;

/// Tokens of the old key stay valid on every replica until that key is removed.
pub(super) fn rotate_signing_key(stage: &mut Stage, progress: &Progress) -> Result<()> {
    stage.users()?;
    let before = stage.secret()?;
    let old = stage.pairs[0].token().to_owned();
    stage.under_load(progress, |stage| {
        stage.follow_readme(progress, "Rotate", SIGNING_KEY)?;
        stage.await_old_pods_gone()
    })?;
    let during = stage.secret()?;
    ensure!(during["secret-key"] != before["secret-key"], "the key is the same");
    ensure!(during["secret-key-previous"] == before["secret-key"], "the old key is not the previous one");
    ensure!(me(stage, &old)? == 200, "a token of the old key is refused before its time");
    // Those of the new key, for the time after.
    let address = stage.address;
    stage.pairs.iter_mut().try_for_each(|pair| pair.log_in(address))?;
    stage.under_load(progress, |stage| {
        stage.follow_readme(progress, "Rotate", FORGET_OLD_KEY)?;
        stage.rolled_out()
    })?;
    ensure!(me(stage, &old)? == 401, "a token of the forgotten key is accepted");
    let after = stage.secret()?;
    ensure!(!after.contains_key("secret-key-previous"), "the old key is still there");
    ensure!(after["postgres-password"] == before["postgres-password"], "another secret changed");
    // An upgrade keeps what was rotated.
    stage.upgrade(progress, stage.tag, &[])?;
    ensure!(stage.secret()? == after, "an upgrade undid the rotation");
    Ok(())
}

pub(super) fn rotate_postgres_password(stage: &mut Stage, progress: &Progress) -> Result<()> {
    rotate_password(stage, progress, POSTGRES_PASSWORD, "postgres-password")
}

pub(super) fn rotate_redis_password(stage: &mut Stage, progress: &Progress) -> Result<()> {
    rotate_password(stage, progress, REDIS_PASSWORD, "redis-password")?;
    let healthz = Client::new(stage.address).ask("GET", "/healthz", None, "")?;
    let said = healthz.text();
    ensure!(!said.contains("degraded"), "the service has no Redis any more: {said}");
    Ok(())
}

fn rotate_password(stage: &mut Stage, progress: &Progress, block: usize, key: &str) -> Result<()> {
    let before = stage.secret()?;
    stage.under_load(progress, |stage| {
        stage.follow_readme(progress, "Rotate", block)?;
        stage.rolled_out()
    })?;
    ensure!(stage.secret()?[key] != before[key], "{key} is the same");
    stage.await_all()
}

/// The next upgrade creates a Secret, and the procedure gives its password to the Postgres that is there.
pub(super) fn lost_secret(stage: &mut Stage, progress: &Progress) -> Result<()> {
    stage.users()?;
    let before = stage.secret()?;
    stage.shell(progress, &format!("kubectl --namespace {NAMESPACE} delete secret {DEPLOYMENT}"))?;
    stage.follow_readme(progress, "Restore a lost Secret", 0)?;
    stage.await_all()?;
    let after = stage.secret()?;
    for key in ["secret-key", "postgres-password", "redis-password"] {
        ensure!(after.contains_key(key) && after.get(key) != before.get(key), "{key} was not created");
    }
    stage.await_answer(Duration::from_secs(30))?;
    let address = stage.address;
    stage.pairs.iter_mut().try_for_each(|pair| pair.log_in(address))?;
    stage.verify(progress)
}

/// An installation that ends without its Secret, as one does that fails half-way or that an umbrella chart switches on later,
/// is completed by the next upgrade.
pub(super) fn half_an_installation(stage: &mut Stage, progress: &Progress) -> Result<()> {
    if stage.helm(progress, &["status", RELEASE]).is_ok() {
        stage.follow_readme(progress, "Uninstall", 0)?;
        stage.follow_readme(progress, "Uninstall", 1)?;
        leaves(stage, progress, &[])?;
    }
    // The users are gone with the volume.
    stage.pairs.clear();
    stage.install_without_hooks(progress)?;
    ensure!(stage.secret().is_err(), "there is a Secret already");
    stage.upgrade_or_install(progress)?;
    stage.await_all()?;
    let keys = stage.secret()?;
    ensure!(keys.keys().eq(["postgres-password", "redis-password", "secret-key"]), "not all keys");
    stage.under_load(progress, |_| Ok(()))?;
    stage.follow_readme(progress, "Uninstall", 0)?;
    stage.follow_readme(progress, "Uninstall", 1)?;
    leaves(stage, progress, &[])
}

/// A dump, data loss, and a restore of everything.
pub(super) fn backup_and_restore(stage: &mut Stage, progress: &Progress) -> Result<()> {
    // Something to lose, also when this check runs alone.
    stage.under_load(progress, |_| Ok(()))?;
    stage.follow_readme_section(progress, "Back up and restore")?;
    stage.await_all()?;
    stage.await_answer(Duration::from_secs(30))?;
    stage.verify(progress)?;
    stage.under_load(progress, |_| Ok(()))
}

/// What stays is what the README says: the Secret and the volume. A new installation takes them up.
pub(super) fn uninstall(stage: &mut Stage, progress: &Progress) -> Result<()> {
    let before = stage.secret()?;
    stage.follow_readme(progress, "Uninstall", 0)?;
    let kept = ["persistentvolumeclaim/data-chat-chat-service-postgres-0", "secret/chat-chat-service"];
    leaves(stage, progress, &kept)?;
    stage.apply(progress, "install", stage.tag, &[], "5m")?;
    stage.await_all()?;
    ensure!(stage.secret()? == before, "the second installation changed the Secret");
    stage.await_answer(Duration::from_secs(30))?;
    stage.verify(progress)?;
    progress.note("a second installation has all the messages");
    stage.follow_readme(progress, "Uninstall", 0)?;
    stage.follow_readme(progress, "Uninstall", 1)?;
    leaves(stage, progress, &[])
}

/// Pods that end take their time, and what belongs to others goes a moment after them.
fn leaves(stage: &Stage, progress: &Progress, expected: &[&str]) -> Result<()> {
    let mut left = BTreeSet::new();
    for _ in 0..20 {
        left = remaining(stage, progress)?;
        if left.iter().eq(expected) {
            return Ok(());
        }
        std::thread::sleep(Duration::from_secs(2));
    }
    bail!("what is left is {left:?} instead of {expected:?}")
}

/// All objects of the namespace but those that every namespace has, and events, which pass.
fn remaining(stage: &Stage, progress: &Progress) -> Result<BTreeSet<String>> {
    let script = format!(
        "kinds=$(kubectl api-resources --namespaced --verbs=list --output=name | grep --invert-match -e '^events' \
         -e metrics.k8s.io | paste --serial --delimiters=,)\n\
         kubectl get \"$kinds\" --namespace {NAMESPACE} --ignore-not-found --output=name"
    );
    let all = stage.shell(progress, &script)?;
    let everywhere = ["configmap/kube-root-ca.crt", "serviceaccount/default"];
    // Warnings are in between: some kinds are deprecated.
    let names = all.lines().filter(|line| line.contains('/') && !line.contains(' '));
    Ok(names.filter(|name| !everywhere.contains(name)).map(str::to_owned).collect())
}

/// Asked often enough to have met every replica.
fn me(stage: &Stage, token: &str) -> Result<u16> {
    let mut statuses = BTreeSet::new();
    for _ in 0..12 {
        statuses.insert(Client::new(stage.address).ask("GET", "/me", Some(token), "")?.status);
    }
    ensure!(statuses.len() == 1, "the replicas do not agree: {statuses:?}");
    statuses.into_iter().next().context("an answer")
}

impl Stage {
    fn rolled_out(&self) -> Result<()> {
        self.kubernetes.rolled_out(DEPLOYMENT, crate::stage::ROLLOUT_LIMIT)?;
        self.await_old_pods_gone()
    }
}
