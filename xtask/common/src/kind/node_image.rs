//! The images of a cluster whose machine cannot pull any: kind's node, Postgres and Redis. See `deploy/kind-node/README.md`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use harness::servers::{daemon, programs};
use harness::{Scratch, install, places};

use super::{KIND_MODULE, NODE, ask_docker, docker, load_from_engine, tools};
use crate::chart::module_folder;
use crate::dry_run;
use crate::go_tools::{self, GoTool};
use crate::steps::Progress;
use crate::workspace;

const SOURCES: &str = "deploy/kind-node";
const IMAGE: &str = "kindest/node:v1.34.4-local";
/// The official images that the chart names.
const POSTGRES: &str = "docker.io/library/postgres:17-bookworm";
const REDIS: &str = "docker.io/library/redis:7.2-bookworm";

/// Kubernetes' own programs in one file: `deploy/kind-node/main.go`.
const KUBERNETES: GoTool = GoTool {
    name: "kubernetes-node",
    module: SOURCES,
    package: ".",
    settings: &[
        "k8s.io/component-base/version.gitMajor=1",
        "k8s.io/component-base/version.gitMinor=34",
        "k8s.io/component-base/version.gitVersion=v1.34.4",
    ],
};

/// The built kubectl, under its own name.
pub fn kubectl(progress: &Progress) -> Result<PathBuf> {
    let (program, link) = (KUBERNETES.build(progress)?, tools()?.join("kubectl"));
    if fs::read_link(&link).is_ok_and(|target| target == program) {
        return Ok(link);
    }
    let _ = fs::remove_file(&link);
    std::os::unix::fs::symlink(program, &link).with_context(|| format!("link {}", link.display()))?;
    Ok(link)
}

/// Builds the node image, unless the engine has it.
pub(super) fn build(progress: &Progress) -> Result<String> {
    if dry_run::is_on() {
        return Ok(IMAGE.to_owned());
    }
    let program = KUBERNETES.build(progress)?;
    let recipe = recipe(SOURCES, KIND_MODULE)?;
    if is_there(IMAGE, &recipe) {
        return Ok(IMAGE.to_owned());
    }
    ensure_installed(progress, "debootstrap", "debootstrap")?;
    let files = module_folder(progress, KIND_MODULE)?.join("images/base/files");
    let mut build = Command::new("sh");
    build.arg(workspace::root().join(SOURCES).join("build.sh")).arg(IMAGE).arg(program).arg(files);
    build.arg(recipe).arg(places::target_dir()?.join("tools/kind-node"));
    progress.run(build).with_context(|| format!("build {IMAGE}"))?;
    Ok(IMAGE.to_owned())
}

/// Puts stand-ins for the official Postgres and Redis images into the node; see `deploy/kind-node/images/README.md`.
pub(super) fn stand_ins(progress: &Progress) -> Result<()> {
    if dry_run::is_on() {
        return Ok(());
    }
    install::ensure_programs(|line| progress.note(line))?;
    ensure_installed(progress, "busybox", "busybox-static")?;
    let bin = programs::postgres_bin_dirs().into_iter().next().context("Postgres is installed")?;
    let redis = programs::redis_server().context("Redis is installed")?;
    for (name, tag, program) in [("postgres", POSTGRES, bin.join("postgres")), ("redis", REDIS, redis)] {
        let recipe = recipe(&format!("{SOURCES}/images"), &version(&program)?)?;
        if !is_there(tag, &recipe) {
            progress.say(&format!("building the stand-in for {tag}"));
            stand_in(progress, name, tag, &bin, &recipe)?;
        }
        let list = ["exec", NODE, "ctr", "--namespace", "k8s.io", "images", "list", "-q"];
        if !ask_docker(&list)?.lines().any(|there| there == tag) {
            load_from_engine(progress, tag)?;
        }
    }
    Ok(())
}

fn stand_in(progress: &Progress, name: &str, tag: &str, bin: &Path, recipe: &str) -> Result<()> {
    let sources = workspace::root().join(SOURCES).join("images");
    let scratch = Scratch::new("stand-in")?;
    let root = scratch.path().join("root");
    let mut assemble = Command::new("sh");
    assemble.arg(sources.join("assemble.sh")).arg(name).arg(&root).arg(bin);
    progress.run(assemble)?;
    let mut build = docker(&["build", "--tag", tag, "--label", &format!("recipe={recipe}"), "--file"]);
    build.arg(sources.join(format!("{name}.Containerfile"))).arg(&root);
    progress.run(build).map(drop)
}

/// Whether the engine has the image, built from the same sources.
fn is_there(image: &str, recipe: &str) -> bool {
    let label = ask_docker(&["image", "inspect", "--format", "{{.Config.Labels.recipe}}", image]);
    label.is_ok_and(|label| label == recipe)
}

/// Changes with the files of a folder, and with `also`.
fn recipe(folder: &str, also: &str) -> Result<String> {
    let is_source = |file: &Path| file.extension().is_none_or(|kind| kind != "md");
    let hash = go_tools::hash_of(&workspace::root().join(folder), is_source)?;
    Ok(format!("{hash}-{:016x}", places::stable_hash(also.as_bytes())))
}

fn version(program: &Path) -> Result<String> {
    let mut ask = Command::new(program);
    ask.arg("--version");
    daemon::run_ok(ask, Duration::from_secs(20))
}

fn ensure_installed(progress: &Progress, program: &str, package: &str) -> Result<()> {
    if programs::in_path(program).is_some() {
        return Ok(());
    }
    if !install::can_install() {
        bail!("{program} is not installed, and this machine is not root's on Debian or Ubuntu: install it");
    }
    progress.note(&format!("installing {package} with apt-get"));
    install::install(&[package])
}
