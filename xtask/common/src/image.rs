//! `cargo xtask image`: the container image of `deploy/Dockerfile`, around a static binary that is built here, with docker,
//! podman or buildah. The same commit gives the same binary and the same image.

mod binary;
mod engine;
mod sbom;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail, ensure};
use clap::ValueEnum;
use harness::{Scratch, places};

use crate::dry_run::{self, DryRun};
use crate::steps::{Progress, step};
use crate::{signals, workspace};
use engine::Engine;

/// The largest size of an image, uncompressed. It has about half of that; a debug build may have more.
const SIZE_MAX_MIB: f64 = 40.0;
const MIB: f64 = 1024.0 * 1024.0;

/// The certificate authorities' file, and where other distributions have it.
const AUTHORITIES: [&str; 3] =
    ["/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/cert.pem"];

#[derive(clap::Args, Debug)]
#[command(after_help = "Examples:
  cargo xtask image                            chat-service:VERSION, in target/image
  cargo xtask image --tag try --load kind      for the cluster of `cargo xtask kind up`
  cargo xtask image --sbom --push registry.example.com/team/chat-service
  cargo xtask image --dry-run                  the commands, as a script")]
pub struct Args {
    /// The image's tag; the chart's default is the version
    #[arg(long, default_value = env!("CARGO_PKG_VERSION"))]
    tag: String,
    /// Load it into a cluster
    #[arg(long, value_name = "WHERE")]
    load: Option<Load>,
    /// Push it to this repository, for example registry.example.com/team/chat-service
    #[arg(long, value_name = "REPOSITORY")]
    push: Option<String>,
    /// The platform to build for; another than this machine's needs a cross compiler
    #[arg(long, default_value = Platform::HERE)]
    platform: Platform,
    /// Write an SBOM of the binary, in CycloneDX
    #[arg(long)]
    sbom: bool,
    /// Cargo's profile; `dev` builds quickly, and is slow and large
    #[arg(long, default_value = "release", value_name = "NAME")]
    profile: String,
    /// The program that builds the image; by default the first that works
    #[arg(long, value_name = "PROGRAM")]
    with: Option<Engine>,
    /// The image's whole name instead of chat-service:TAG, for example what Tilt expects
    #[arg(long, value_name = "REF", conflicts_with_all = ["tag", "push"])]
    name: Option<String>,
    /// Use this binary instead of compiling one
    #[arg(long, value_name = "FILE")]
    binary: Option<PathBuf>,
    /// Only compile, and write the binary to this file if it differs
    #[arg(long, value_name = "FILE", conflicts_with_all = ["binary", "name", "push", "load", "sbom"])]
    compile_to: Option<PathBuf>,
    #[command(flatten)]
    dry_run: DryRun,
}

#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
enum Load {
    /// The kind cluster of `cargo xtask kind up`
    Kind,
}

#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub enum Platform {
    #[value(name = "linux/amd64")]
    Amd64,
    #[value(name = "linux/arm64")]
    Arm64,
}

impl Platform {
    /// This machine's.
    const HERE: &str = if cfg!(target_arch = "aarch64") { "linux/arm64" } else { "linux/amd64" };

    fn name(self) -> &'static str {
        match self {
            Self::Amd64 => "linux/amd64",
            Self::Arm64 => "linux/arm64",
        }
    }

    fn is_here(self) -> bool {
        self.name() == Self::HERE
    }
}

/// What to build.
#[derive(Clone, Debug)]
pub struct Options {
    pub tag: String,
    pub platform: Platform,
    pub profile: String,
    pub engine: Option<Engine>,
    /// The whole name, where it is not to be `chat-service:TAG`.
    pub name: Option<String>,
    /// A binary that is there already.
    pub binary: Option<PathBuf>,
}

impl Options {
    /// This machine's release build under a tag.
    pub fn tagged(tag: &str) -> Self {
        let platform = if Platform::Arm64.is_here() { Platform::Arm64 } else { Platform::Amd64 };
        let (tag, profile) = (tag.to_owned(), "release".to_owned());
        Self { tag, platform, profile, engine: None, name: None, binary: None }
    }

    /// The name as every runtime keeps it, with its registry.
    fn full_name(&self) -> String {
        let Some(name) = &self.name else { return format!("docker.io/library/chat-service:{}", self.tag) };
        match name.split_once('/') {
            None => format!("docker.io/library/{name}"),
            Some((first, _)) if first.contains(['.', ':']) || first == "localhost" => name.clone(),
            Some(_) => format!("docker.io/{name}"),
        }
    }
}

/// An image that was built.
#[derive(Clone, Debug)]
pub struct Image {
    /// `docker.io/library/chat-service:TAG`, which is what `chat-service:TAG` means to every runtime.
    pub name: String,
    /// The image in a file, as `docker load` and `ctr images import` take it.
    pub archive: PathBuf,
    /// The digest of its configuration, by which nodes know it.
    pub id: String,
    pub bytes: u64,
}

pub fn run(args: &Args) -> Result<ExitCode> {
    signals::listen()?;
    args.dry_run.apply();
    let options = Options {
        tag: args.tag.clone(),
        platform: args.platform,
        profile: args.profile.clone(),
        engine: args.with,
        name: args.name.clone(),
        binary: args.binary.clone(),
    };
    if let Some(file) = &args.compile_to {
        step("compile", |progress| compile(&options, file, progress))?;
        return Ok(ExitCode::SUCCESS);
    }
    let image = step("image", |progress| build(&options, progress))?;
    if args.sbom {
        let file = step("SBOM", |progress| sbom::write(&options, &image, progress))?;
        if !dry_run::is_on() {
            println!("  {}", workspace::shown(&file));
        }
    }
    if args.load == Some(Load::Kind) {
        step("load into kind", |progress| crate::kind::load(progress, &image.archive))?;
    }
    if let Some(repository) = &args.push {
        step("push", |progress| engine::push(&options, &image, repository, progress))?;
    }
    if dry_run::is_on() {
        return Ok(ExitCode::SUCCESS);
    }
    println!("\n{}  {:.1} MiB  sha256:{}", image.name, image.bytes as f64 / MIB, image.id);
    println!("{}: `docker load -i` takes it, and so do podman and ctr", workspace::shown(&image.archive));
    Ok(ExitCode::SUCCESS)
}

/// The release's image and SBOM, as files of `dir`.
pub fn for_release(version: &str, dir: &Path, progress: &Progress) -> Result<[PathBuf; 2]> {
    let options = Options::tagged(version);
    let image = build(&options, progress)?;
    let sbom = sbom::write(&options, &image, progress)?;
    let mut files = [image.archive, sbom];
    for file in &mut files {
        let name = file.file_name().context("a file name")?;
        let kept = dir.join(name);
        copy(file, &kept)?;
        *file = kept;
    }
    Ok(files)
}

/// Builds the binary and the image around it, and leaves the image in `target/image`.
pub fn build(options: &Options, progress: &Progress) -> Result<Image> {
    let engine = engine::find(options.engine, progress)?;
    let origin = binary::Origin::of_this_clone()?;
    let dir = places::target_dir()?.join("image");
    let name = options.full_name();
    // Tilt uses a new name each time, which must not fill the disk.
    let kept_as = if options.name.is_some() { "named" } else { &options.tag };
    let archive = dir.join(format!("chat-service-{kept_as}.tar"));
    fs::create_dir_all(&dir).with_context(|| format!("create {}", dir.display()))?;
    if archive.exists() && !dry_run::is_on() {
        // buildah adds to an archive instead of replacing it.
        fs::remove_file(&archive).with_context(|| format!("remove {}", archive.display()))?;
    }
    let scratch = Scratch::new("image")?;
    let stage = scratch.path().join("build");
    fs::create_dir(&stage)?;
    // A binary for Linux is built where Linux is; elsewhere the Dockerfile's own stage does it.
    let replaced = cfg!(target_os = "linux");
    if replaced {
        let built = match &options.binary {
            Some(binary) => binary.clone(),
            None => binary::build(options, &origin, progress)?,
        };
        for (from, name) in [(built.as_path(), "chat-service"), (authorities()?, "ca-certificates.crt")] {
            copy(from, &stage.join(name))?;
        }
    } else {
        ensure!(options.profile == "release", "--profile {} needs Linux", options.profile);
    }
    progress.say(&format!("the image, with {}", engine.program()));
    let recipe = engine::Recipe { name: &name, options, origin: &origin, stage: replaced.then_some(&stage) };
    engine.make(&recipe, scratch.path(), &archive, progress)?;
    if dry_run::is_on() {
        return Ok(Image { name, archive, id: String::new(), bytes: 0 });
    }
    let id = engine::image_id(&archive)?;
    let bytes = fs::metadata(&archive)?.len();
    let size = bytes as f64 / MIB;
    if options.profile == "release" && size > SIZE_MAX_MIB {
        bail!(
            "the image has {size:.1} MiB, more than {SIZE_MAX_MIB}: `cargo bloat --release --crates` shows why"
        );
    }
    progress.note(&format!("{name}: {size:.1} MiB, revision {}", origin.revision));
    Ok(Image { name, archive, id, bytes })
}

/// Writes the binary to a file, unless the file has it already: what watches the file has nothing to do then.
fn compile(options: &Options, file: &Path, progress: &Progress) -> Result<()> {
    ensure!(
        cfg!(target_os = "linux"),
        "a binary for Linux is compiled on Linux; `cargo xtask image` works here"
    );
    let built = binary::build(options, &binary::Origin::of_this_clone()?, progress)?;
    if dry_run::is_on() {
        return copy(&built, file);
    }
    let bytes = fs::read(&built).with_context(|| format!("read {}", built.display()))?;
    if fs::read(file).is_ok_and(|before| before == bytes) {
        progress.note("the same binary as before");
        return Ok(());
    }
    let dir = file.parent().context("a file in a folder")?;
    fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))?;
    let unfinished = file.with_extension("part");
    fs::copy(&built, &unfinished).with_context(|| format!("write {}", unfinished.display()))?;
    fs::rename(&unfinished, file).with_context(|| format!("write {}", file.display()))
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    if dry_run::is_on() {
        println!("install -D {} {}", workspace::shown(from), workspace::shown(to));
        return Ok(());
    }
    fs::copy(from, to).with_context(|| format!("copy {}", from.display()))?;
    Ok(())
}

fn authorities() -> Result<&'static Path> {
    let found = AUTHORITIES.into_iter().map(Path::new).find(|file| file.is_file());
    found.context("no file of certificate authorities: install ca-certificates")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_that_runtimes_keep() {
        let full = |name: &str| Options { name: Some(name.to_owned()), ..Options::tagged("1") }.full_name();
        assert_eq!(full("chat-service:tilt-1"), "docker.io/library/chat-service:tilt-1");
        assert_eq!(full("team/chat-service:1"), "docker.io/team/chat-service:1");
        assert_eq!(full("localhost:5001/chat-service:tilt-1"), "localhost:5001/chat-service:tilt-1");
        assert_eq!(full("registry.example.com/chat:1"), "registry.example.com/chat:1");
        assert_eq!(Options::tagged("1").full_name(), "docker.io/library/chat-service:1");
    }

    #[test]
    fn the_dockerfile_builds_with_the_toolchain_of_the_clone() {
        let read =
            |name: &str| fs::read_to_string(workspace::root().join(name)).expect("a file of the clone");
        let toolchain = read("rust-toolchain.toml");
        let channel = toolchain.split('"').nth(1).expect("the channel");
        let from = format!("\nFROM docker.io/library/rust:{channel}-bookworm AS build\n");
        assert!(read("deploy/Dockerfile").contains(&from), "deploy/Dockerfile lacks {from:?}");
    }
}
