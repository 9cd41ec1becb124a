//! What the checks run on: a cluster, a namespace, a release, and conversations.

use std::collections::BTreeMap;
use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use common::args::E2e as Args;
use common::chart::HELM;
use common::conversation::{self as load, Pair, Report};
use common::steps::{Progress, step};
use common::{image, kind, workspace};
use harness::servers::daemon;

use crate::kubernetes::Kubernetes;
use crate::readme;

/// The README uses `chat`, which somebody may use.
pub(super) const NAMESPACE: &str = "chat-e2e";
pub(super) const RELEASE: &str = "chat";
pub(super) const DEPLOYMENT: &str = "chat-chat-service";
pub(super) const POSTGRES: &str = "chat-chat-service-postgres";
pub(super) const REDIS: &str = "chat-chat-service-redis";
pub(super) const SERVER: &str = "app.kubernetes.io/instance=chat,app.kubernetes.io/component=server";
/// The same program under two names: to Kubernetes, two images.
pub(super) const IMAGES: [&str; 2] = ["e2e-1", "e2e-2"];

const VALUES: &str = "xtask/e2e/src/values.yaml";
const WATCH_EVERY: Duration = Duration::from_secs(2);
const PAIRS: usize = 3;
const PAUSE: Duration = Duration::from_millis(10);
pub(super) const ROLLOUT_LIMIT: Duration = Duration::from_secs(180);

pub(super) struct Stage {
    pub(super) kubernetes: Kubernetes,
    pub(super) address: SocketAddr,
    pub(super) pairs: Vec<Pair>,
    /// The image that is installed now.
    pub(super) tag: &'static str,
    pub(super) helm: PathBuf,
    kubeconfig: PathBuf,
}

/// The image under both names.
fn put_image(progress: &Progress, same: bool) -> Result<()> {
    let name = |tag: &str| format!("docker.io/library/chat-service:{tag}");
    let archive = harness::places::target_dir()?.join(format!("image/chat-service-{}.tar", IMAGES[0]));
    if !same || !archive.exists() {
        image::build(&image::Options::tagged(IMAGES[0]), progress)?;
    }
    kind::load(progress, &archive)?;
    kind::tag(&name(IMAGES[0]), &name(IMAGES[1]))
}

impl Stage {
    /// Starts the cluster if needed, and empties the namespace.
    pub(super) fn set(args: &Args) -> Result<Self> {
        let node_image = args.node_image.clone();
        let options = kind::Options { node_image, metrics_server: true, ..kind::Options::default() };
        let kubeconfig = kind::up(&options)?;
        let helm = step("build helm", |progress| HELM.build(progress))?;
        step("image", |progress| put_image(progress, args.same_image))?;
        let stage = Self {
            kubernetes: Kubernetes::connect(&kubeconfig, NAMESPACE)?,
            address: SocketAddr::from(([127, 0, 0, 1], kind::NODE_PORT)),
            pairs: Vec::new(),
            tag: IMAGES[0],
            helm,
            kubeconfig,
        };
        step("namespace", |progress| {
            stage.delete_namespace(progress)?;
            stage.shell(
                progress,
                &format!(
                    "kubectl create namespace {NAMESPACE}\n\
                     kubectl label namespace {NAMESPACE} pod-security.kubernetes.io/enforce=restricted \
                     pod-security.kubernetes.io/warn=restricted"
                ),
            )
        })?;
        Ok(stage)
    }

    /// Removes everything but the cluster.
    pub(super) fn strike(&self, progress: &Progress) -> Result<()> {
        self.kubernetes.cordon(false)?;
        self.delete_namespace(progress)
    }

    fn delete_namespace(&self, progress: &Progress) -> Result<()> {
        let delete = "kubectl delete namespace --ignore-not-found --timeout=120s";
        self.shell(progress, &format!("{delete} {NAMESPACE}")).map(drop)
    }

    /// A script with kubectl and helm at hand, in the clone's top.
    pub(super) fn shell(&self, progress: &Progress, script: &str) -> Result<String> {
        progress.run(self.script(script)?)
    }

    fn script(&self, script: &str) -> Result<Command> {
        let tools = kind::tools()?;
        let path = std::env::var("PATH").unwrap_or_default();
        let mut command = Command::new("bash");
        command.args(["-euo", "pipefail", "-c", script]).current_dir(workspace::root());
        command.env("KUBECONFIG", &self.kubeconfig).env("PATH", format!("{}:{path}", tools.display()));
        Ok(command)
    }

    /// A block of the chart's README, in our namespace. `helm upgrade` there gets the values that we installed with.
    pub(super) fn follow_readme(&self, progress: &Progress, section: &str, block: usize) -> Result<()> {
        let blocks = readme::blocks(section)?;
        let script = blocks.get(block).with_context(|| format!("{section} has no shell block {block}"))?;
        ensure!(
            script.contains("--namespace chat"),
            "block {block} of {section} names no namespace:\n{script}"
        );
        let script = script.replace("--namespace chat", &format!("--namespace {NAMESPACE}"));
        // Files that it writes are not the clone's.
        let dir = harness::Scratch::new("readme")?;
        let chart = workspace::root().join("helm");
        let script = format!("cd '{}'\n{}", dir.path().display(), script)
            .replace("helm/chat-service", &chart.join("chat-service").to_string_lossy());
        self.shell(progress, &script).map_err(|error| self.kubernetes.explained(error)).map(drop)
    }

    /// The README's blocks from one to another in one script, since later ones use what earlier ones wrote.
    pub(super) fn follow_readme_section(&self, progress: &Progress, section: &str) -> Result<()> {
        let all = readme::blocks(section)?.concat();
        ensure!(!all.is_empty(), "the README has no section {section}");
        let dir = harness::Scratch::new("readme")?;
        let chart = workspace::root().join("helm/chat-service");
        let script = all
            .replace("--namespace chat", &format!("--namespace {NAMESPACE}"))
            .replace("helm/chat-service", &chart.to_string_lossy());
        let script = format!("cd '{}'\n{script}", dir.path().display());
        self.shell(progress, &script).map_err(|error| self.kubernetes.explained(error)).map(drop)
    }

    /// `helm`, watched: when it fails, what was not ready shortly before is part of the error, since `--atomic` has taken
    /// it away by then.
    pub(super) fn helm(&self, progress: &Progress, args: &[&str]) -> Result<String> {
        let mut command = Command::new(&self.helm);
        command.args(args).args(["--namespace", NAMESPACE]).current_dir(workspace::root());
        command.env("KUBECONFIG", &self.kubeconfig);
        let (end, ended) = mpsc::channel::<()>();
        let watch = move || {
            let mut seen = BTreeMap::new();
            while ended.recv_timeout(WATCH_EVERY) == Err(RecvTimeoutError::Timeout) {
                seen.extend(self.kubernetes.unready().unwrap_or_default());
            }
            seen.into_values().collect::<String>()
        };
        thread::scope(|scope| {
            let watcher = scope.spawn(watch);
            let outcome = progress.run(command);
            drop(end);
            let seen = watcher.join().expect("the watcher does not panic");
            outcome.map_err(|error| anyhow::anyhow!("{error:#}\n{seen}"))
        })
    }

    /// Installs or upgrades to the values file, the image and what else is set.
    pub(super) fn apply(
        &self,
        progress: &Progress,
        verb: &str,
        tag: &str,
        sets: &[&str],
        timeout: &str,
    ) -> Result<String> {
        let tag = format!("image.tag={tag}");
        let mut args = vec![verb, RELEASE, "helm/chat-service", "--values", VALUES, "--set", &tag];
        for set in sets {
            args.extend(["--set", set]);
        }
        args.extend(["--wait", "--wait-for-jobs", "--atomic", "--timeout", timeout]);
        self.helm(progress, &args)
    }

    /// An upgrade that has to work.
    pub(super) fn upgrade(&self, progress: &Progress, tag: &str, sets: &[&str]) -> Result<String> {
        self.apply(progress, "upgrade", tag, sets, "4m")
    }

    /// What is left of an installation whose hooks have not run.
    pub(super) fn install_without_hooks(&self, progress: &Progress) -> Result<()> {
        let tag = format!("image.tag={}", self.tag);
        let args = ["install", RELEASE, "helm/chat-service", "--values", VALUES, "--set", &tag, "--no-hooks"];
        self.helm(progress, &args).map(drop)
    }

    /// The command of pipelines, which installs what is not there.
    pub(super) fn upgrade_or_install(&self, progress: &Progress) -> Result<()> {
        let tag = format!("image.tag={}", self.tag);
        let args = ["upgrade", "--install", RELEASE, "helm/chat-service", "--values", VALUES, "--set", &tag];
        let waiting = ["--wait", "--wait-for-jobs", "--timeout", "5m"];
        self.helm(progress, &[args.as_slice(), &waiting].concat()).map(drop)
    }

    /// An upgrade that is not waited for, and may leave what does not work.
    pub(super) fn change(&self, progress: &Progress, sets: &[&str]) -> Result<String> {
        let tag = format!("image.tag={}", self.tag);
        let mut args = vec!["upgrade", RELEASE, "helm/chat-service", "--values", VALUES, "--set", &tag];
        for set in sets {
            args.extend(["--set", set]);
        }
        self.helm(progress, &args)
    }

    pub(super) fn kubeconfig(&self) -> &Path {
        &self.kubeconfig
    }

    /// The release as it was installed, whatever a failed check has left.
    pub(super) fn repair(&self, progress: &Progress) -> Result<()> {
        self.kubernetes.cordon(false)?;
        let Ok(status) = self.helm(progress, &["status", RELEASE]) else {
            // Nothing is installed yet.
            return Ok(());
        };
        if status.contains("STATUS: pending") {
            self.helm(progress, &["rollback", RELEASE, "--wait", "--timeout", "3m"])?;
        }
        self.upgrade(progress, self.tag, &[])?;
        self.await_all()
    }

    /// Waits until all parts are ready.
    pub(super) fn await_all(&self) -> Result<()> {
        self.kubernetes.set_rolled_out(POSTGRES, ROLLOUT_LIMIT)?;
        self.kubernetes.set_rolled_out(REDIS, ROLLOUT_LIMIT)?;
        self.kubernetes.rolled_out(DEPLOYMENT, ROLLOUT_LIMIT)
    }

    /// Runs conversations while `work` is done: no request may fail, and no acknowledged message may be lost.
    pub(super) fn under_load<T>(
        &mut self,
        progress: &Progress,
        work: impl FnOnce(&Self) -> Result<T>,
    ) -> Result<T> {
        let (value, report) = self.loaded(PAUSE, work)?;
        progress.note(&report.verdict()?);
        self.verify(progress)?;
        Ok(value)
    }

    /// As [`Self::under_load`], with this pause between two requests, and returns the report unchecked.
    pub(super) fn loaded<T>(
        &mut self,
        pause: Duration,
        work: impl FnOnce(&Self) -> Result<T>,
    ) -> Result<(T, Report)> {
        self.users()?;
        let mut pairs = std::mem::take(&mut self.pairs);
        let outcome = load::during(&mut pairs, self.address, pause, || work(self));
        self.pairs = pairs;
        outcome
    }

    /// Every message that was ever acknowledged is there, in its place.
    pub(super) fn verify(&mut self, progress: &Progress) -> Result<()> {
        let mut messages = 0;
        for pair in &mut self.pairs {
            messages += pair.verify(self.address)?;
        }
        progress.note(&format!("{messages} messages, gapless and as acknowledged"));
        Ok(())
    }

    /// Registers the users of the conversations, once.
    pub(super) fn users(&mut self) -> Result<()> {
        self.await_answer(Duration::from_secs(30))?;
        for number in self.pairs.len()..PAIRS {
            let name = format!("e2e-{:08x}-{number}", fastrand::u32(..));
            self.pairs.push(Pair::new(self.address, &name)?);
        }
        Ok(())
    }

    /// Until the NodePort answers 200 to `/healthz`.
    pub(super) fn await_answer(&self, limit: Duration) -> Result<()> {
        let answered = daemon::poll(limit, || Ok(self.is_healthy().then_some(())))?;
        if answered.is_none() {
            let error = anyhow::anyhow!("no 200 from {} within {} s", self.address, limit.as_secs());
            return Err(self.kubernetes.explained(error));
        }
        Ok(())
    }

    fn is_healthy(&self) -> bool {
        let answer = harness::http::get(self.address, "/healthz", Duration::from_secs(5));
        answer.is_ok_and(|answer| answer.status == 200)
    }

    /// The release's Secret, of which nothing may change by itself.
    pub(super) fn secret(&self) -> Result<BTreeMap<String, Vec<u8>>> {
        self.kubernetes.secret(DEPLOYMENT)
    }

    /// How often any replica's container was started again; the pods are named.
    pub(super) fn no_restarts(&self) -> Result<()> {
        for pod in self.kubernetes.pods(SERVER)? {
            let restarts = crate::kubernetes::restarts(&pod);
            if restarts > 0 {
                let name = pod.metadata.name.unwrap_or_default();
                return Err(self.kubernetes.explained(anyhow::anyhow!("{name} restarted {restarts} times")));
            }
        }
        Ok(())
    }

    /// Fails unless the error gives the reason.
    pub(super) fn says_why(outcome: Result<String>, reasons: &[&str]) -> Result<String> {
        let Err(error) = outcome else { bail!("it succeeded") };
        let text = format!("{error:#}");
        for reason in reasons {
            ensure!(text.contains(reason), "the message does not speak of {reason:?}:\n{text}");
        }
        Ok(text)
    }

    pub(super) fn scratch_file(name: &str, text: &str) -> Result<PathBuf> {
        let path = harness::places::target_dir()?.join("xtask").join(name);
        fs::write(&path, text).with_context(|| format!("write {}", path.display()))?;
        Ok(path)
    }
}
