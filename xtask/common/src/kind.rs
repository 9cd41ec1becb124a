//! `cargo xtask kind`: a kind cluster after `deploy/kind.yaml`, with a registry that Tilt pushes to.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Duration;

use anyhow::{Result, bail};
use harness::places;
use harness::servers::{daemon, programs};

use crate::dry_run::{self, DryRun};
use crate::steps::{Progress, step};
use crate::{signals, workspace};

#[derive(clap::Args, Debug)]
#[command(after_help = "Examples:
  cargo xtask kind up && tilt up       the developer's loop
  cargo xtask kind up --metrics-server --prometheus-crds
  cargo xtask kind up --dry-run        the commands, as a script
  cargo xtask kind down")]
pub struct Args {
    #[command(subcommand)]
    command: KindCommand,
    #[command(flatten)]
    dry_run: DryRun,
}

#[derive(clap::Subcommand, Debug)]
enum KindCommand {
    /// Create the cluster and its registry, or what is missing; prints how to reach them
    Up(Extras),
    /// Delete both
    Down,
}

/// Optional parts of the cluster.
#[derive(clap::Args, Clone, Copy, Debug, Default)]
pub struct Extras {
    /// metrics-server, which the autoscaler and `kubectl top` need
    #[arg(long)]
    pub metrics_server: bool,
    /// The CRDs ServiceMonitor, PodMonitor and PrometheusRule
    #[arg(long)]
    pub prometheus_crds: bool,
}

/// kind prefixes the context: `kind-chat`.
const NAME: &str = "chat";
pub const CONTEXT: &str = "kind-chat";
const NODE: &str = "chat-control-plane";
const CONFIG: &str = "deploy/kind.yaml";

const REGISTRY: &str = "chat-registry";
const REGISTRY_IMAGE: &str = "docker.io/library/registry:3.0.0";
/// Where the machine, and by `deploy/kind-registry.yaml` Tilt, find it. In the node it goes by the same name.
const REGISTRY_PORT: u16 = 5001;
const REGISTRY_CONFIG: &str = "deploy/kind-registry.yaml";

/// kind has no metrics-server, which the autoscaler needs.
const METRICS_SERVER: &str =
    "https://github.com/kubernetes-sigs/metrics-server/releases/download/v0.8.0/components.yaml";
const PROMETHEUS_CRDS: &str = "https://raw.githubusercontent.com/prometheus-operator/prometheus-operator/v0.85.0/example/prometheus-operator-crd";
const PROMETHEUS_KINDS: [&str; 3] = ["podmonitors", "prometheusrules", "servicemonitors"];

const NEEDED: [(&str, &str); 5] = [
    ("docker", "https://docs.docker.com/engine/install; without it: cargo xtask cluster up"),
    ("kind", "go install sigs.k8s.io/kind@v0.33.0, or https://kind.sigs.k8s.io/docs/user/quick-start"),
    ("kubectl", "https://kubernetes.io/docs/tasks/tools"),
    ("helm", "https://helm.sh/docs/intro/install"),
    ("tilt", "https://docs.tilt.dev/install.html"),
];

/// For short questions.
const ANSWER_LIMIT: Duration = Duration::from_secs(60);

pub fn run(args: &Args) -> Result<ExitCode> {
    signals::listen()?;
    args.dry_run.apply();
    match args.command {
        KindCommand::Up(extras) => {
            let missing = missing(&["tilt"]);
            up(extras)?;
            // As with kind: a new cluster becomes the current one.
            step("kubeconfig", |progress| progress.run(own_kubeconfig("export")))?;
            if dry_run::is_on() {
                return Ok(ExitCode::SUCCESS);
            }
            println!(
                "\n  kubectl's context is {CONTEXT}; NodePort {} answers on 127.0.0.1",
                crate::cluster::NODE_PORT
            );
            match missing.as_slice() {
                [] => println!("  tilt up"),
                _ => println!("  and for `tilt up`, not installed:\n{}", missing.join("\n")),
            }
        }
        KindCommand::Down => {
            down()?;
            step("kubeconfig", |progress| progress.run(own_kubeconfig("delete")))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Whether a Docker engine answers in time.
pub fn engine_answers() -> bool {
    let Some(docker) = programs::in_path("docker") else { return false };
    let mut ask = Command::new(docker);
    ask.args(["version", "--format", "{{.Server.Version}}"]);
    daemon::run_ok(ask, Duration::from_secs(20)).is_ok()
}

/// Creates what is missing, and waits until the cluster is ready.
pub fn up(extras: Extras) -> Result<PathBuf> {
    check_programs(&["docker", "kind", "kubectl", "helm"])?;
    if !dry_run::is_on() && !engine_answers() {
        bail!("no Docker engine answers: start it, or use `cargo xtask cluster up`, which needs none");
    }
    step("registry", registry_up)?;
    step("kind up", |progress| {
        if !is_up()? {
            let mut create = kind(&["create", "cluster", "--name", NAME, "--wait", "180s", "--config"])?;
            create.arg(workspace::root().join(CONFIG));
            progress.run(create)?;
        }
        progress.run(kind(&["export", "kubeconfig", "--name", NAME])?).map(drop)
    })?;
    step("registry for the node", connect_registry)?;
    if extras.metrics_server {
        step("metrics-server", metrics_server)?;
    }
    if extras.prometheus_crds {
        step("Prometheus CRDs", prometheus_crds)?;
    }
    kubeconfig()
}

/// A registry on the loopback address alone.
fn registry_up(progress: &Progress) -> Result<()> {
    let state = ask_docker(&["inspect", "--format", "{{.State.Running}}", REGISTRY]);
    match state.as_deref().map(str::trim) {
        Ok("true") => Ok(()),
        Ok("false") => progress.run(docker(&["start", REGISTRY])).map(drop),
        _ => {
            let port = format!("127.0.0.1:{REGISTRY_PORT}:5000");
            let run = [
                "run",
                "--detach",
                "--restart=always",
                "--name",
                REGISTRY,
                "--publish",
                &port,
                REGISTRY_IMAGE,
            ];
            progress.run(docker(&run)).map(drop)
        }
    }
}

/// The node's containerd asks the registry's container for what is called localhost:5001, and Tilt learns of it.
fn connect_registry(progress: &Progress) -> Result<()> {
    let network = ask_docker(&["inspect", "--format", "{{json .NetworkSettings.Networks.kind}}", REGISTRY]);
    if network.as_deref().map_or("null", str::trim) == "null" {
        progress.run(docker(&["network", "connect", "kind", REGISTRY]))?;
    }
    let dir = format!("/etc/containerd/certs.d/localhost:{REGISTRY_PORT}");
    let script = format!("mkdir -p {dir} && echo '[host.\"http://{REGISTRY}:5000\"]' > {dir}/hosts.toml");
    progress.run(docker(&["exec", NODE, "sh", "-c", &script]))?;
    let mut apply = kubectl(&["apply", "--filename"])?;
    apply.arg(workspace::root().join(REGISTRY_CONFIG));
    progress.run(apply).map(drop)
}

fn metrics_server(progress: &Progress) -> Result<()> {
    progress.run(kubectl(&["apply", "--filename", METRICS_SERVER])?)?;
    // The kubelet's certificate is its own; kind makes it so. The whole list, so that twice is the same as once.
    let deployment =
        ["--namespace=kube-system", "patch", "deployment/metrics-server", "--type=json", "--patch"];
    let arguments = r#"[{"op": "replace", "path": "/spec/template/spec/containers/0/args", "value": ["--cert-dir=/tmp", "--secure-port=10250", "--kubelet-preferred-address-types=InternalIP", "--kubelet-use-node-status-port", "--metric-resolution=15s", "--kubelet-insecure-tls"]}]"#;
    progress.run(kubectl(&[&deployment[..], &[arguments]].concat())?).map(drop)
}

fn prometheus_crds(progress: &Progress) -> Result<()> {
    for kind in PROMETHEUS_KINDS {
        let file = format!("{PROMETHEUS_CRDS}/monitoring.coreos.com_{kind}.yaml");
        // They are too large for the annotation of a client-side apply.
        progress.run(kubectl(&["apply", "--server-side", "--force-conflicts", "--filename", &file])?)?;
    }
    Ok(())
}

/// Deletes the cluster and its registry.
pub fn down() -> Result<()> {
    check_programs(&["docker", "kind"])?;
    step("kind down", |progress| {
        progress.run(kind(&["delete", "cluster", "--name", NAME])?)?;
        // A missing one is no error.
        progress.run(docker(&["rm", "--force", "--volumes", REGISTRY])).map(drop)
    })
}

pub fn is_up() -> Result<bool> {
    if programs::in_path("kind").is_none() && !dry_run::is_on() {
        return Ok(false);
    }
    let clusters = dry_run::ask(kind(&["get", "clusters"])?, ANSWER_LIMIT, "")?;
    Ok(clusters.lines().any(|line| line == NAME))
}

/// Puts an image into the cluster's node.
pub fn load(progress: &Progress, archive: &Path) -> Result<()> {
    let mut load = kind(&["load", "image-archive", "--name", NAME])?;
    load.arg(archive);
    progress.run(load).map(drop)
}

/// Gives an image of the cluster's node a second name.
pub fn tag(name: &str, other: &str) -> Result<()> {
    let tag = ["exec", NODE, "ctr", "--namespace", "k8s.io", "images", "tag", "--force", name, other];
    daemon::run_ok(docker(&tag), ANSWER_LIMIT).map(drop)
}

/// A file of its own: tests leave the user's as it is.
fn kubeconfig() -> Result<PathBuf> {
    Ok(places::target_dir()?.join("kind-kubeconfig"))
}

/// kind's command that brings the cluster into the user's kubeconfig, or out of it.
fn own_kubeconfig(verb: &str) -> Command {
    let object = if verb == "export" { "kubeconfig" } else { "cluster" };
    let mut command = Command::new("kind");
    command.args([verb, object, "--name", NAME]);
    command
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

fn docker(args: &[&str]) -> Command {
    let mut command = Command::new("docker");
    command.args(args);
    command
}

/// A dry run prints the commands for a machine without any of it.
fn ask_docker(args: &[&str]) -> Result<String> {
    dry_run::ask(docker(args), ANSWER_LIMIT, "null")
}

fn check_programs(names: &[&str]) -> Result<()> {
    let missing = missing(names);
    if missing.is_empty() || dry_run::is_on() {
        return Ok(());
    }
    bail!("not installed:\n{}", missing.join("\n"));
}

/// A line for each missing program, with where to get it.
fn missing(names: &[&str]) -> Vec<String> {
    NEEDED
        .iter()
        .filter(|(name, _)| names.contains(name) && programs::in_path(name).is_none())
        .map(|(name, place)| format!("  {name}: {place}"))
        .collect()
}
