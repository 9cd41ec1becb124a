//! `cargo xtask cluster`: a real Kubernetes node for machines without a container engine, from Go modules and Debian
//! packages. It runs in its own Linux namespaces (see `deploy/cluster/node.go`): the machine's network, mounts and
//! processes stay unchanged, and ending one process ends everything.

mod images;
mod node;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use harness::servers::{daemon, programs};
use harness::{install, places};
use rustix::process::geteuid;

use crate::chart::HELM;
use crate::go_tools::GoTool;
use crate::steps::{Progress, step};
use crate::{signals, workspace};
pub use images::{load, stand_ins, tag};

#[derive(clap::Args, Debug)]
#[command(after_help = "Examples:
  cargo xtask cluster up               as root, on Linux; prints how to reach it
  cargo xtask cluster status
  cargo xtask cluster down")]
pub struct Args {
    #[command(subcommand)]
    command: ClusterCommand,
}

#[derive(clap::Subcommand, Debug)]
enum ClusterCommand {
    /// Start the node, or finish its start; prints how to reach it
    Up,
    /// Stop the node and delete its data; only the built tools remain
    Down,
    /// Show what runs
    Status,
}

/// The address of the API. Not on the usual port, which belongs to real clusters.
const API: &str = "127.0.0.1:16443";
/// The context in the kubeconfig, by which the Tiltfile knows the node.
pub const CONTEXT: &str = "cluster-chat";
/// The one port of the node that is also a port of the machine, in kind's configuration too.
pub const NODE_PORT: u16 = 30080;

const PACKAGES: [(&str, &str); 6] = [
    ("containerd", "containerd"),
    ("runc", "runc"),
    ("containernetworking-plugins", "/usr/lib/cni/bridge"),
    ("buildah", "buildah"),
    ("etcd-server", "etcd"),
    ("iptables", "iptables"),
];

/// Kubernetes' own programs in one file: `deploy/cluster/main.go`.
const NODE: GoTool = GoTool {
    name: "kubernetes-node",
    module: "deploy/kind-node",
    package: ".",
    settings: &[
        "k8s.io/component-base/version.gitMajor=1",
        "k8s.io/component-base/version.gitMinor=34",
        "k8s.io/component-base/version.gitVersion=v1.34.4",
    ],
};

const START_LIMIT: Duration = Duration::from_secs(240);

pub fn run(args: &Args) -> Result<ExitCode> {
    signals::listen()?;
    match args.command {
        ClusterCommand::Up => {
            let kubeconfig = up()?;
            step("stand-in images", stand_ins)?;
            step("build helm", |progress| HELM.build(progress))?;
            println!("\n  export KUBECONFIG={}", kubeconfig.display());
            println!("  export PATH={}:$PATH    # kubectl, helm", tools()?.display());
            println!("  tilt up");
            println!(
                "  NodePort {NODE_PORT} answers on 127.0.0.1; network policies are accepted, but not enforced"
            );
        }
        ClusterCommand::Down => down()?,
        ClusterCommand::Status => status()?,
    }
    Ok(ExitCode::SUCCESS)
}

/// Starts what does not run yet, and waits until the node is ready.
pub fn up() -> Result<PathBuf> {
    step("packages", install_packages)?;
    let program = step("build Kubernetes", |progress| NODE.build(progress))?;
    link_kubectl(&program)?;
    let pause = step("pause image", images::pause)?;
    step("cluster up", |progress| {
        if node::find()?.is_none() {
            node::start(&program)?;
        }
        await_ready(progress, &pause)
    })
}

/// Stops the node and deletes its data.
pub fn down() -> Result<()> {
    step("cluster down", |_| node::down())
}

pub fn is_up() -> Result<bool> {
    Ok(node::find()?.is_some())
}

/// kubectl, built if it is missing.
pub fn kubectl_program(progress: &Progress) -> Result<PathBuf> {
    let program = NODE.build(progress)?;
    link_kubectl(&program)?;
    kubectl()
}

/// The built kubectl, under its own name.
fn kubectl() -> Result<PathBuf> {
    Ok(tools()?.join("kubectl"))
}

/// The folder of the built programs.
pub fn tools() -> Result<PathBuf> {
    Ok(places::target_dir()?.join("tools/bin"))
}

fn kubeconfig() -> Result<PathBuf> {
    Ok(node::dir()?.join("kubeconfig"))
}

fn install_packages(progress: &Progress) -> Result<()> {
    if !geteuid().is_root() {
        bail!("a node takes root. With Docker, `cargo xtask kind up` needs none; else run this with sudo");
    }
    let present = |program: &str| Path::new(program).is_absolute() && Path::new(program).exists();
    let missing: Vec<&str> = PACKAGES
        .iter()
        .filter(|(_, program)| !present(program) && programs::in_path(program).is_none())
        .map(|(package, _)| *package)
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    if !install::can_install() {
        bail!("not there: {}. Install them, by their Debian names", missing.join(", "));
    }
    progress.note(&format!("installing {} with apt-get", missing.join(", ")));
    install::install(&missing)
}

fn link_kubectl(program: &Path) -> Result<()> {
    let link = kubectl()?;
    if fs::read_link(&link).is_ok_and(|target| target == program) {
        return Ok(());
    }
    let _ = fs::remove_file(&link);
    std::os::unix::fs::symlink(program, &link).with_context(|| format!("link {}", link.display()))
}

/// Waits for each part, in the order in which they start.
fn await_ready(progress: &Progress, pause: &Path) -> Result<PathBuf> {
    let deadline = std::time::Instant::now() + START_LIMIT;
    let wait = |what: &str, ask: &mut dyn FnMut() -> Result<bool>| {
        progress.say(what);
        loop {
            signals::check()?;
            if ask()? {
                return Ok(());
            }
            if std::time::Instant::now() >= deadline {
                bail!("{what}: not within {} s. {}", START_LIMIT.as_secs(), node::last_words());
            }
            std::thread::sleep(Duration::from_millis(300));
        }
    };
    wait("certificates", &mut || node::write_kubeconfig(API))?;
    wait("containerd", &mut || Ok(node::containerd(&["version"], None).is_ok()))?;
    images::load_once(progress, pause, images::PAUSE)?;
    wait("API server", &mut || Ok(kubectl_run(&["get", "--raw", "/readyz"]).is_ok()))?;
    let manifests = workspace::root().join("deploy/cluster/config/manifests.yaml");
    let manifests = manifests.to_string_lossy().into_owned();
    wait("storage and metrics", &mut || {
        Ok(kubectl_run(&["apply", "--server-side", "--force-conflicts", "-f", &manifests]).is_ok())
    })?;
    let taints = ["get", "node/chat", "--output=jsonpath={.status.conditions[-1].status}{.spec.taints}"];
    wait("the node", &mut || {
        // Ready, and without the taint of the time before, which goes a moment later.
        Ok(kubectl_run(&taints).is_ok_and(|said| said.starts_with("True") && !said.contains("not-ready")))
    })?;
    // It is created after the API server is ready, and no pod starts without it.
    wait("service account", &mut || Ok(kubectl_run(&["get", "serviceaccount", "default"]).is_ok()))?;
    wait(
        "metrics",
        &mut || Ok(kubectl_run(&["get", "--raw", "/apis/metrics.k8s.io/v1beta1/nodes"]).is_ok()),
    )?;
    kubeconfig()
}

fn kubectl_run(args: &[&str]) -> Result<String> {
    let mut command = Command::new(kubectl()?);
    command.args(args).env("KUBECONFIG", kubeconfig()?);
    daemon::run_ok(command, Duration::from_secs(60))
}

fn status() -> Result<()> {
    let Some(pid) = node::find()? else {
        println!("  no cluster runs: cargo xtask cluster up");
        return Ok(());
    };
    println!("  {:<18}process {pid}, logs in {}", "node", workspace::shown(&node::dir()?.join("data/logs")));
    println!("  {:<18}https://{API}, KUBECONFIG={}", "API", kubeconfig()?.display());
    println!("  {:<18}the Service with {NODE_PORT} is 127.0.0.1:{NODE_PORT}", "NodePort");
    println!(
        "  {:<18}accepted, not enforced: no such plugin can be built from Go modules alone",
        "NetworkPolicy"
    );
    for line in kubectl_run(&["get", "nodes,pods", "--all-namespaces", "--no-headers"])?.lines() {
        println!("  {line}");
    }
    Ok(())
}
