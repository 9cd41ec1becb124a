//! `cargo xtask kind`: a kind cluster after `deploy/kind.yaml`, with a registry that Tilt pushes to. Where no image can be
//! pulled, its images are built from Debian's packages and Go modules.

mod engine;
mod node_image;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use harness::places;
use harness::servers::{daemon, programs};

use crate::chart::{self, SCHEMA_SOURCES};
use crate::dry_run::{self, DryRun};
use crate::go_tools::GoTool;
use crate::steps::{Progress, step};
use crate::{signals, workspace};
pub use engine::answers as engine_answers;
pub use node_image::kubectl as kubectl_program;

#[derive(clap::Args, Debug)]
#[command(after_help = "Examples:
  cargo xtask kind up && tilt up       the developer's loop
  cargo xtask kind up --metrics-server --prometheus-crds
  cargo xtask kind up --node-image build    where no image can be pulled; as root on Debian or Ubuntu
  cargo xtask kind status
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
    Up(Options),
    /// Delete both, and end the Docker engine that `up` has started
    Down,
    /// Show what runs
    Status,
}

/// How the cluster is made, and its optional parts.
#[derive(clap::Args, Clone, Debug, Default)]
pub struct Options {
    /// Another node image than that of deploy/kind.yaml; `build` makes one, and the images of Postgres and Redis, from Debian's
    /// packages and Go modules
    #[arg(long, value_name = "NAME|build")]
    pub node_image: Option<String>,
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
pub const REGISTRY_HOST: &str = "localhost:5001";
const REGISTRY_CONFIG: &str = "deploy/kind-registry.yaml";

/// The chart's tests apply the same files.
const PROMETHEUS_CRDS: (&str, &[&str]) = SCHEMA_SOURCES[1];
const METRICS_SERVER: &str = "deploy/metrics-server.yaml";
/// The one port of the node that is also a port of the machine.
pub const NODE_PORT: u16 = 30080;

/// Where it is not in PATH. `deploy/kind.yaml` pins the node image of this version.
pub const KIND: GoTool =
    GoTool { name: "kind", module: "deploy/dev", package: "sigs.k8s.io/kind", settings: &[] };
pub const KIND_MODULE: &str = "sigs.k8s.io/kind@v0.33.0";

const NEEDED: [(&str, &str); 3] = [
    ("kubectl", "https://kubernetes.io/docs/tasks/tools"),
    ("helm", "https://helm.sh/docs/intro/install"),
    ("tilt", "https://docs.tilt.dev/install.html"),
];

/// For short questions.
const ANSWER_LIMIT: Duration = Duration::from_secs(60);

pub fn run(args: &Args) -> Result<ExitCode> {
    signals::listen()?;
    args.dry_run.apply();
    match &args.command {
        KindCommand::Up(options) => {
            up(options)?;
            // As with kind: a new cluster becomes the current one.
            step("kubeconfig", |progress| progress.run(own_kubeconfig("export")?))?;
            if !dry_run::is_on() {
                print_usage()?;
            }
        }
        KindCommand::Down => {
            down()?;
            step("kubeconfig", |progress| progress.run(own_kubeconfig("delete")?))?;
        }
        KindCommand::Status => status()?,
    }
    Ok(ExitCode::SUCCESS)
}

fn print_usage() -> Result<()> {
    println!("\n  kubectl's context is {CONTEXT}; NodePort {NODE_PORT} answers on 127.0.0.1");
    if ["kind", "kubectl"].iter().any(|name| programs::in_path(name).is_none()) {
        println!("  export PATH={}:$PATH    # kind, kubectl", tools()?.display());
    }
    match missing(&["helm", "tilt"]).as_slice() {
        [] => println!("  tilt up"),
        missing => println!("  and for `tilt up`, not installed:\n{}", missing.join("\n")),
    }
    Ok(())
}

/// Creates what is missing, and waits until the cluster is ready.
pub fn up(options: &Options) -> Result<PathBuf> {
    let builds = options.node_image.as_deref() == Some("build");
    step("Docker engine", |progress| engine::ensure(progress, builds))?;
    step("programs", |progress| ensure_programs(progress, builds))?;
    let image = step("node image", |progress| match options.node_image.as_deref() {
        Some("build") => node_image::build(progress),
        Some(name) => pull(progress, name.to_owned()),
        None => pull(progress, pinned_image()?),
    })?;
    if !builds {
        step("registry", registry_up)?;
    }
    step("kind up", |progress| create(progress, &image))?;
    if builds {
        step("Postgres, Redis images", node_image::stand_ins)?;
    } else {
        step("registry for the node", connect_registry)?;
    }
    if options.metrics_server {
        step("metrics-server", metrics_server)?;
    }
    if options.prometheus_crds {
        step("Prometheus CRDs", prometheus_crds)?;
    }
    kubeconfig()
}

/// kind and kubectl, built where PATH has none.
fn ensure_programs(progress: &Progress, builds: bool) -> Result<()> {
    if dry_run::is_on() {
        return Ok(());
    }
    if programs::in_path("kind").is_none() {
        KIND.build(progress)?;
    }
    if builds {
        node_image::kubectl(progress)?;
    }
    match missing(&["kubectl"]).as_slice() {
        [kubectl] if !builds => bail!("not installed:\n{kubectl}"),
        _ => Ok(()),
    }
}

fn pinned_image() -> Result<String> {
    let text = fs::read_to_string(workspace::root().join(CONFIG))?;
    let image = text.lines().find_map(|line| line.trim().strip_prefix("image: "));
    Ok(image.with_context(|| format!("{CONFIG} names no image"))?.to_owned())
}

fn pull(progress: &Progress, image: String) -> Result<String> {
    if ask_docker(&["image", "inspect", "--format", "{{.Id}}", &image]).is_err() {
        progress.run(docker(&["pull", &image])).with_context(|| {
            format!(
                "{image} cannot be pulled. As root on Debian or Ubuntu, `cargo xtask kind up --node-image build` \
                 makes a node image from packages and Go modules"
            )
        })?;
    }
    Ok(image)
}

fn create(progress: &Progress, image: &str) -> Result<()> {
    if is_up()? && !comes_back(progress)? {
        progress.note("the cluster of before does not answer: a new one");
        progress.run(kind(&["delete", "cluster", "--name", NAME])?)?;
    }
    if !is_up()? {
        let mut create = kind(&["create", "cluster", "--name", NAME, "--image", image, "--wait", "180s"])?;
        create.arg("--config").arg(workspace::root().join(CONFIG));
        progress.run(create)?;
    }
    progress.run(kind(&["export", "kubeconfig", "--name", NAME])?).map(drop)
}

/// Whether the API server answers. After the end of its engine, a node starts with the next one.
fn comes_back(progress: &Progress) -> Result<bool> {
    progress.say("the cluster of before");
    let answered = daemon::poll(Duration::from_secs(90), || {
        signals::check()?;
        let asked = daemon::run_ok(kind(&["export", "kubeconfig", "--name", NAME])?, ANSWER_LIMIT)
            .and_then(|_| daemon::run_ok(kubectl(&["get", "--raw", "/readyz"])?, ANSWER_LIMIT));
        if asked.is_err() {
            std::thread::sleep(Duration::from_secs(1));
        }
        Ok(asked.ok())
    })?;
    Ok(answered.is_some())
}

/// A registry on the loopback address alone.
fn registry_up(progress: &Progress) -> Result<()> {
    let state = ask_docker(&["inspect", "--format", "{{.State.Running}}", REGISTRY]);
    match state.as_deref().map(str::trim) {
        Ok("true") => Ok(()),
        Ok("false") => progress.run(docker(&["start", REGISTRY])).map(drop),
        _ => {
            let port = format!("{}:5000", REGISTRY_HOST.replace("localhost", "127.0.0.1"));
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
    let dir = format!("/etc/containerd/certs.d/{REGISTRY_HOST}");
    let script = format!("mkdir -p {dir} && echo '[host.\"http://{REGISTRY}:5000\"]' > {dir}/hosts.toml");
    progress.run(docker(&["exec", NODE, "sh", "-c", &script]))?;
    let mut apply = kubectl(&["apply", "--filename"])?;
    apply.arg(workspace::root().join(REGISTRY_CONFIG));
    progress.run(apply).map(drop)
}

fn metrics_server(progress: &Progress) -> Result<()> {
    let mut apply = kubectl(&["apply", "--filename"])?;
    apply.arg(workspace::root().join(METRICS_SERVER));
    progress.run(apply)?;
    let wait = ["wait", "--for=condition=Available", "--timeout=180s", "apiservice/v1beta1.metrics.k8s.io"];
    progress.run(kubectl(&wait)?).map(drop)
}

fn prometheus_crds(progress: &Progress) -> Result<()> {
    let (module, files) = PROMETHEUS_CRDS;
    let folder = chart::module_folder(progress, module)?;
    for file in files {
        // They are too large for the annotation of a client-side apply.
        let mut apply = kubectl(&["apply", "--server-side", "--force-conflicts", "--filename"])?;
        apply.arg(folder.join(file));
        progress.run(apply)?;
    }
    Ok(())
}

/// Deletes the cluster and its registry, and ends the engine if it is ours.
pub fn down() -> Result<()> {
    step("kind down", |progress| {
        if !dry_run::is_on() && !engine_answers() {
            if !engine::is_ours()? {
                progress.note("no Docker engine answers, so nothing of a cluster is there");
                return Ok(());
            }
            // Only an engine can delete the containers of one that was killed.
            engine::start(progress)?;
        }
        ensure_programs(progress, false)?;
        progress.run(kind(&["delete", "cluster", "--name", NAME])?)?;
        // A missing one is no error.
        progress.run(docker(&["rm", "--force", "--volumes", REGISTRY]))?;
        engine::stop(progress)
    })
}

/// Prints what runs, by the programs that know it.
pub fn status() -> Result<()> {
    for command in
        [docker(&["ps"]), kind(&["get", "clusters"])?, kubectl(&["get", "pods", "--all-namespaces"])?]
    {
        println!("$ {}", dry_run::shell_line(&command));
        match daemon::run_ok(command, ANSWER_LIMIT) {
            Ok(said) => println!("{said}"),
            Err(error) => println!("{error:#}"),
        }
    }
    Ok(())
}

pub fn is_up() -> Result<bool> {
    let can_be = || Ok::<_, anyhow::Error>(program("kind")?.exists() && engine_answers());
    if !dry_run::is_on() && !can_be()? {
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

/// As [`load()`], an image of the Docker engine.
pub fn load_from_engine(progress: &Progress, image: &str) -> Result<String> {
    progress.run(kind(&["load", "docker-image", "--name", NAME, image])?)
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
fn own_kubeconfig(verb: &str) -> Result<Command> {
    let object = if verb == "export" { "kubeconfig" } else { "cluster" };
    let mut command = Command::new(program("kind")?);
    command.args([verb, object, "--name", NAME]);
    Ok(command)
}

fn kind(args: &[&str]) -> Result<Command> {
    let mut command = Command::new(program("kind")?);
    command.args(args).env("KUBECONFIG", kubeconfig()?);
    Ok(command)
}

fn kubectl(args: &[&str]) -> Result<Command> {
    let mut command = Command::new(program("kubectl")?);
    command.args(args).env("KUBECONFIG", kubeconfig()?);
    Ok(command)
}

/// The program in PATH, else the built one.
fn program(name: &str) -> Result<PathBuf> {
    if dry_run::is_on() {
        return Ok(PathBuf::from(name));
    }
    programs::in_path(name).map_or_else(|| Ok(tools()?.join(name)), Ok)
}

/// The folder of the built programs.
pub fn tools() -> Result<PathBuf> {
    Ok(places::target_dir()?.join("tools/bin"))
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

/// A line for each missing program, with where to get it.
fn missing(names: &[&str]) -> Vec<String> {
    NEEDED
        .iter()
        .filter(|(name, _)| names.contains(name) && programs::in_path(name).is_none())
        .map(|(name, place)| format!("  {name}: {place}"))
        .collect()
}
