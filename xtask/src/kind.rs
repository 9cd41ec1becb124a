//! `cargo xtask kind`: the cluster for machines with Docker, as `deploy/kind.yaml` describes it.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Duration;

use anyhow::{Result, bail};
use tests::places;
use tests::servers::{daemon, programs};

use crate::steps::{Progress, step};
use crate::{dry_run, signals, workspace};

#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: KindCommand,
}

#[derive(clap::Subcommand)]
enum KindCommand {
    /// Create the cluster, unless it is there; says how to reach it
    Up,
    /// Delete it
    Down,
}

/// kind puts its own name before it: its context is `kind-chat`.
const NAME: &str = "chat";

/// The autoscaler's eyes, which kind comes without.
const METRICS_SERVER: &str =
    "https://github.com/kubernetes-sigs/metrics-server/releases/download/v0.8.0/components.yaml";

const NEEDED: [(&str, &str); 4] = [
    ("docker", "https://docs.docker.com/engine/install"),
    ("kind", "go install sigs.k8s.io/kind@v0.33.0, or https://kind.sigs.k8s.io/docs/user/quick-start"),
    ("kubectl", "https://kubernetes.io/docs/tasks/tools"),
    ("helm", "https://helm.sh/docs/intro/install"),
];

pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    signals::listen()?;
    match args.command {
        KindCommand::Up => {
            let kubeconfig = up()?;
            println!("\n  export KUBECONFIG={}", kubeconfig.display());
            println!("  NodePort {} answers on 127.0.0.1", crate::cluster::NODE_PORT);
        }
        KindCommand::Down => down()?,
    }
    Ok(ExitCode::SUCCESS)
}

/// Whether a Docker engine answers; one that hangs is none.
pub(crate) fn engine_answers() -> bool {
    let Some(docker) = programs::in_path("docker") else { return false };
    let mut ask = Command::new(docker);
    ask.args(["version", "--format", "{{.Server.Version}}"]);
    daemon::run_ok(ask, Duration::from_secs(20)).is_ok()
}

/// The cluster, ready. One that is there is left alone.
pub(crate) fn up() -> Result<PathBuf> {
    check_programs(&["docker", "kind", "kubectl", "helm"])?;
    if !engine_answers() {
        bail!("no Docker engine answers: start it, or use `cargo xtask cluster up`, which needs none");
    }
    step("kind up", |progress| {
        if !is_up()? {
            let mut create = kind(&["create", "cluster", "--name", NAME, "--wait", "180s", "--config"])?;
            create.arg(workspace::root().join("deploy/kind.yaml"));
            progress.run(create)?;
            progress.run(kubectl(&["apply", "--filename", METRICS_SERVER])?)?;
            // The kubelet's certificate is its own; kind makes it so.
            let patch = ["--namespace=kube-system", "patch", "deployment/metrics-server", "--type=json"];
            let insecure = r#"[{"op": "add", "path": "/spec/template/spec/containers/0/args/-", "value": "--kubelet-insecure-tls"}]"#;
            progress.run(kubectl(&[&patch[..], &["--patch", insecure]].concat())?)?;
        }
        progress.run(kind(&["export", "kubeconfig", "--name", NAME])?).map(drop)
    })?;
    kubeconfig()
}

/// Deletes the cluster.
pub(crate) fn down() -> Result<()> {
    check_programs(&["docker", "kind"])?;
    step("kind down", |progress| progress.run(kind(&["delete", "cluster", "--name", NAME])?)).map(drop)
}

pub(crate) fn is_up() -> Result<bool> {
    if programs::in_path("kind").is_none() {
        return Ok(false);
    }
    let clusters = dry_run::ask(kind(&["get", "clusters"])?, Duration::from_secs(60), "")?;
    Ok(clusters.lines().any(|line| line == NAME))
}

/// Puts an image into the cluster's node.
pub(crate) fn load(progress: &Progress, archive: &Path) -> Result<()> {
    let mut load = kind(&["load", "image-archive", "--name", NAME])?;
    load.arg(archive);
    progress.run(load).map(drop)
}

/// Gives an image of the cluster's node a second name.
pub(crate) fn tag(name: &str, other: &str) -> Result<()> {
    let mut tag = Command::new("docker");
    tag.args(["exec", &format!("{NAME}-control-plane"), "ctr", "--namespace", "k8s.io"]);
    tag.args(["images", "tag", "--force", name, other]);
    daemon::run_ok(tag, Duration::from_secs(60)).map(drop)
}

/// A file of its own: the user's stays as it is.
fn kubeconfig() -> Result<PathBuf> {
    Ok(places::target_dir()?.join("kind-kubeconfig"))
}

fn kind(args: &[&str]) -> Result<Command> {
    let mut command = Command::new("kind");
    command.args(args).env("KUBECONFIG", kubeconfig()?);
    Ok(command)
}

fn kubectl(args: &[&str]) -> Result<Command> {
    let mut command = Command::new("kubectl");
    command.args(args).env("KUBECONFIG", kubeconfig()?);
    Ok(command)
}

fn check_programs(names: &[&str]) -> Result<()> {
    let missing: Vec<String> = NEEDED
        .iter()
        .filter(|(name, _)| names.contains(name) && programs::in_path(name).is_none())
        .map(|(name, place)| format!("  {name}: {place}"))
        .collect();
    if !missing.is_empty() {
        bail!("not installed:\n{}", missing.join("\n"));
    }
    Ok(())
}
