//! The images of the node, which has no registry, and how they get into it.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use harness::servers::programs;
use harness::{install, places};

use super::node;
use crate::go_tools::GoTool;
use crate::steps::Progress;
use crate::workspace;

pub(super) const PAUSE: &str = "localhost/pause:1";
/// The official images that the chart names.
const POSTGRES: &str = "docker.io/library/postgres:17-bookworm";
const REDIS: &str = "docker.io/library/redis:7.2-bookworm";

const PAUSE_PROGRAM: GoTool =
    GoTool { name: "pause", module: "deploy/kind-node", package: "./pause", settings: &[] };

pub(super) fn pause(progress: &Progress) -> Result<PathBuf> {
    let program = PAUSE_PROGRAM.build(progress)?;
    let archive = archive("pause")?;
    if is_newer(&archive, &[&program])? {
        return Ok(archive);
    }
    let root = scratch("pause")?;
    fs::copy(&program, root.join("pause")).context("copy the pause program")?;
    pack(progress, "pause", PAUSE, &root, &archive)?;
    Ok(archive)
}

/// Puts stand-ins for the official Postgres and Redis images into the node; see `deploy/kind-node/images/README.md`.
pub fn stand_ins(progress: &Progress) -> Result<()> {
    install::ensure_programs(|line| progress.note(line))?;
    if programs::in_path("busybox").is_none() {
        install::install(&["busybox-static"])?;
    }
    let bin = programs::postgres_bin_dirs().into_iter().next().context("Postgres is installed")?;
    let redis = programs::redis_server().context("Redis is installed")?;
    for (name, tag, program) in [("postgres", POSTGRES, &bin.join("postgres")), ("redis", REDIS, &redis)] {
        let archive = archive(name)?;
        if !is_newer(&archive, &[program])? {
            progress.say(&format!("building the stand-in for {tag}"));
            let root = scratch(name)?;
            let mut assemble = Command::new("sh");
            assemble.arg(sources().join("assemble.sh")).arg(name).arg(&root).arg(&bin);
            progress.run(assemble)?;
            pack(progress, name, tag, &root, &archive)?;
        }
        load_once(progress, &archive, tag)?;
    }
    Ok(())
}

/// Loads an archive whose image goes by `name`.
pub fn load(progress: &Progress, archive: &Path) -> Result<()> {
    progress.say("into the node");
    let file = File::open(archive).with_context(|| format!("open {}", archive.display()))?;
    node::containerd(&["images", "import", "-"], Some(file))?;
    Ok(())
}

/// Gives an image of the node a second name.
pub fn tag(name: &str, other: &str) -> Result<()> {
    node::containerd(&["images", "tag", "--force", name, other], None).map(drop)
}

/// As [`load()`], unless the node has an image of that name.
pub(super) fn load_once(progress: &Progress, archive: &Path, name: &str) -> Result<()> {
    if node::containerd(&["images", "list", "-q"], None)?.lines().any(|there| there == name) {
        return Ok(());
    }
    load(progress, archive)
}

/// Beside the tools: like these, archives depend on the clone and the packages alone.
fn archive(name: &str) -> Result<PathBuf> {
    let dir = places::target_dir()?.join("tools/images");
    fs::create_dir_all(&dir).with_context(|| format!("create {}", dir.display()))?;
    Ok(dir.join(format!("{name}.tar")))
}

fn sources() -> PathBuf {
    workspace::root().join("deploy/kind-node/images")
}

/// An empty folder for an image's root.
fn scratch(name: &str) -> Result<PathBuf> {
    let dir = archive(name)?.with_extension("root");
    let _ = fs::remove_dir_all(&dir);
    fs::create_dir_all(&dir).with_context(|| format!("create {}", dir.display()))?;
    Ok(dir)
}

/// Whether the archive is younger than the programs in it and than the image's sources.
fn is_newer(archive: &Path, programs: &[&Path]) -> Result<bool> {
    let Ok(made) = fs::metadata(archive).and_then(|data| data.modified()) else { return Ok(false) };
    let sources: Vec<PathBuf> = fs::read_dir(sources())?.flatten().map(|entry| entry.path()).collect();
    for path in sources.iter().map(PathBuf::as_path).chain(programs.iter().copied()) {
        let data = fs::metadata(path).with_context(|| format!("look at {}", path.display()))?;
        // Packages keep their build time, so the time of installation counts as well.
        let changed = data.modified()?.max(data.created().unwrap_or(data.modified()?));
        if changed > made {
            return Ok(false);
        }
    }
    Ok(true)
}

/// An image of the folder, as an archive; the folder is used up.
fn pack(progress: &Progress, name: &str, tag: &str, root: &Path, archive: &Path) -> Result<()> {
    // Not in the machine's own image storage.
    let storage = archive.with_extension("storage");
    let buildah = |args: &[&str]| {
        let mut command = Command::new("buildah");
        command.arg("--root").arg(storage.join("root")).arg("--runroot").arg(storage.join("run"));
        command.args(["--storage-driver", "vfs"]).args(args);
        command
    };
    let mut build = buildah(&["build", "--tag", tag, "--file"]);
    build.arg(sources().join(format!("{name}.Containerfile"))).arg(root);
    progress.run(build)?;
    let unfinished = archive.with_extension("part");
    let _ = fs::remove_file(&unfinished);
    progress.run(buildah(&["push", tag, &format!("docker-archive:{}:{tag}", unfinished.display())]))?;
    fs::rename(&unfinished, archive).with_context(|| format!("write {}", archive.display()))?;
    let _ = fs::remove_dir_all(&storage);
    let _ = fs::remove_dir_all(root);
    Ok(())
}
