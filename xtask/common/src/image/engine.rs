//! docker, podman and buildah: they build the same Dockerfile, and differ in a few flags.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use harness::servers::{daemon, programs};
use harness::{Scratch, install};

use super::binary::Origin;
use super::{Image, Options};
use crate::steps::Progress;
use crate::workspace;

/// For a daemon that hangs.
const PROBE_LIMIT: Duration = Duration::from_secs(20);

#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub enum Engine {
    Docker,
    Podman,
    Buildah,
}

/// What goes into an image.
pub(super) struct Recipe<'a> {
    pub(super) name: &'a str,
    pub(super) options: &'a Options,
    pub(super) origin: &'a Origin,
    /// The folder that replaces the Dockerfile's stage `build`.
    pub(super) stage: Option<&'a PathBuf>,
}

/// The wanted one, or the first that works. If none does, buildah is installed: it needs no daemon.
pub(super) fn find(wanted: Option<Engine>, progress: &Progress) -> Result<Engine> {
    let all = [Engine::Docker, Engine::Podman, Engine::Buildah];
    if let Some(engine) = match wanted {
        Some(engine) => Some(engine).filter(|engine| engine.works()),
        // Without buildx Docker writes the time of the build into the image.
        None => all.into_iter().find(|engine| engine.works() && (*engine != Engine::Docker || has_buildx())),
    } {
        return Ok(engine);
    }
    match wanted {
        Some(Engine::Docker) => {
            bail!("no Docker engine answers: `cargo xtask kind up` says how to get one")
        }
        Some(Engine::Podman) => bail!("podman is not installed: apt-get install podman"),
        Some(Engine::Buildah) | None if install::can_install() => {
            progress.note("no docker, podman or buildah works here: installing buildah with apt-get");
            install::install(&["buildah"])?;
            Ok(Engine::Buildah)
        }
        _ => bail!("neither docker (with buildx) nor podman nor buildah works here: install one of them"),
    }
}

impl Engine {
    pub(super) fn program(self) -> &'static str {
        match self {
            Self::Docker => "docker",
            Self::Podman => "podman",
            Self::Buildah => "buildah",
        }
    }

    fn works(self) -> bool {
        programs::in_path(self.program()).is_some() && (self != Self::Docker || docker_answers(&["version"]))
    }

    /// The program as a command. buildah keeps its images in `dir`, and leaves nothing behind. The others
    /// have their own storage, from which a user can run the image.
    fn command(self, dir: &Path) -> Command {
        let mut command = Command::new(self.program());
        if self == Self::Buildah {
            command.arg("--root").arg(dir.join("storage")).arg("--runroot").arg(dir.join("run"));
            command.args(["--storage-driver", "vfs"]);
        }
        command
    }

    /// Builds the image and writes it to `archive`.
    pub(super) fn make(
        self,
        recipe: &Recipe<'_>,
        dir: &Path,
        archive: &Path,
        progress: &Progress,
    ) -> Result<()> {
        let Recipe { name, options, origin, stage } = recipe;
        let mut dockerfile = workspace::root().join("deploy/Dockerfile");
        let mut build = self.command(dir);
        let plain = self == Self::Docker && !has_buildx();
        build.args(match self {
            Self::Docker if plain => &["build"][..],
            Self::Docker => &["buildx", "build", "--load"],
            // Docker's own format would keep the random name of the container that it was built in.
            Self::Podman | Self::Buildah => &["build", "--format", "oci"],
        });
        let epoch = origin.epoch.to_string();
        match self {
            Self::Docker => build.arg("--build-arg").arg(format!("SOURCE_DATE_EPOCH={epoch}")),
            Self::Podman | Self::Buildah => build.args(["--timestamp", &epoch]),
        };
        // Docker's builder without buildx takes no platform but its own.
        if !plain {
            build.args(["--platform", options.platform.name()]);
        }
        build.args(["--tag", name]);
        let version = workspace::version()?;
        for (argument, value) in
            [("VERSION", &version), ("REVISION", &origin.revision), ("CREATED", &origin.created)]
        {
            build.arg("--build-arg").arg(format!("{argument}={value}"));
        }
        match stage {
            // Only buildx knows named contexts.
            Some(stage) if plain => {
                dockerfile = with_copied_stage(&dockerfile, dir)?;
                build.arg(stage)
            }
            // The context is not used then, and need not be the whole clone.
            Some(stage) => build.arg("--build-context").arg(format!("build={}", stage.display())).arg(stage),
            None => build.arg(workspace::root()),
        };
        build.arg("--file").arg(dockerfile);
        progress.run(build).with_context(|| format!("build the image with {}", self.program()))?;
        let mut save = self.command(dir);
        match self {
            Self::Docker => save.arg("save").arg("--output").arg(archive).arg(name),
            Self::Podman => {
                save.args(["save", "--format", "docker-archive", "--output"]).arg(archive).arg(name)
            }
            Self::Buildah => {
                save.args(["push", name]).arg(format!("docker-archive:{}:{name}", archive.display()))
            }
        };
        progress.run(save).with_context(|| format!("save the image with {}", self.program()))?;
        Ok(())
    }
}

fn docker_answers(args: &[&str]) -> bool {
    let mut probe = Command::new("docker");
    probe.args(args);
    daemon::run_ok(probe, PROBE_LIMIT).is_ok()
}

fn has_buildx() -> bool {
    docker_answers(&["buildx", "version"])
}

/// The Dockerfile with a copy of the context as its stage `build`.
fn with_copied_stage(dockerfile: &Path, dir: &Path) -> Result<PathBuf> {
    let text = fs::read_to_string(dockerfile).with_context(|| format!("read {}", dockerfile.display()))?;
    let (_, last) =
        text.split_once("\nFROM scratch\n").context("the Dockerfile's last stage is from scratch")?;
    let copy = dir.join("Dockerfile");
    fs::write(&copy, format!("FROM scratch AS build\nCOPY . /\nFROM scratch\n{last}"))?;
    Ok(copy)
}

/// The digest of the image's configuration, which its file is named after.
pub(super) fn image_id(archive: &Path) -> Result<String> {
    let mut tar = Command::new("tar");
    tar.arg("-xOf").arg(archive).arg("manifest.json");
    let manifest: serde_json::Value = serde_json::from_str(&daemon::run_ok(tar, PROBE_LIMIT)?)?;
    let config = manifest[0]["Config"].as_str().context("the archive's manifest names no configuration")?;
    let file = Path::new(config).file_stem().context("a file name")?;
    Ok(file.to_string_lossy().into_owned())
}

/// Pushes the image under its tag. As with docker, a registry on this machine needs no TLS.
pub(super) fn push(options: &Options, image: &Image, repository: &str, progress: &Progress) -> Result<()> {
    let engine = find(options.engine, progress)?;
    let remote = format!("{repository}:{}", options.tag);
    let local =
        ["localhost:", "localhost/", "127.0.0.1:", "[::1]:"].iter().any(|host| remote.starts_with(host));
    if engine == Engine::Docker {
        let mut tag = Command::new("docker");
        tag.args(["tag", &image.name, &remote]);
        progress.run(tag)?;
        let mut push = Command::new("docker");
        push.args(["push", &remote]);
        return progress.run(push).map(drop).with_context(|| format!("push {remote}: `docker login` first?"));
    }
    let scratch = Scratch::new("push")?;
    let mut pull = engine.command(scratch.path());
    let archive = format!("docker-archive:{}", image.archive.display());
    pull.args(["pull", &archive]);
    progress.run(pull)?;
    let mut push = engine.command(scratch.path());
    push.arg("push")
        .args(local.then_some("--tls-verify=false"))
        .args([&image.name, &format!("docker://{remote}")]);
    let program = engine.program();
    progress.run(push).map(drop).with_context(|| format!("push {remote}: `{program} login` first?"))
}
