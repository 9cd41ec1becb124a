//! `cargo xtask doctor`: which tools this machine has, which commands need them, and how to install them.

use std::path::Path;
use std::process::{Command, ExitCode};
use std::time::Duration;

use anyhow::Result;
use common::{go_tools, kind, workspace};
use harness::servers::{daemon, ports, programs};
use harness::{install, places};

#[derive(clap::Args)]
#[command(after_help = "Examples:
  cargo xtask doctor             exit code 1 when `dev` and `test` cannot work here
  cargo xtask doctor --all       exit code 1 when anything is missing, clusters included")]
pub(crate) struct Args {
    /// Also fail for what only some commands need
    #[arg(long)]
    all: bool,
}

/// `Always`: `cargo xtask dev` and `test` need it. `Sometimes`: some other command does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Need {
    Always,
    Sometimes,
}

struct Finding {
    name: &'static str,
    need: Need,
    purpose: &'static str,
    /// What is there, or how to get it.
    outcome: Result<String, String>,
}

/// A debug build with its tests takes about 6 GB, the release build and the cluster's programs as much again.
const DISK_MIN_GIB: u64 = 6;
const DISK_WANTED_GIB: u64 = 15;

pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    let mut findings = vec![toolchain(), git(), postgres(), redis(), disk()?];
    findings.extend(tools());
    findings.extend(ports_in_use());
    let mut missing = 0;
    for Finding { name, need, purpose, outcome } in &findings {
        let counts = args.all || *need == Need::Always;
        match outcome {
            Ok(fact) => println!("ok    {name:<18} {fact}"),
            Err(fix) => {
                let word = if counts { "FAIL" } else { "-" };
                missing += u32::from(counts);
                println!("{word:<5} {name:<18} for {purpose}\n{:24} fix: {fix}", "");
            }
        }
    }
    let summary = match missing {
        0 if args.all => "everything is there".to_owned(),
        0 => "cargo xtask dev and cargo xtask test can work here".to_owned(),
        count => format!("{count} missing"),
    };
    println!("\n{summary}");
    Ok(ExitCode::from(u8::from(missing > 0)))
}

fn toolchain() -> Finding {
    let mut ask = workspace::cargo(&["clippy", "--version"]);
    ask.env_remove("RUSTC_WORKSPACE_WRAPPER");
    let outcome = daemon::run_ok(ask, Duration::from_secs(60))
        .map(|version| format!("{version}, as rust-toolchain.toml wants it"))
        .map_err(|_| {
            "rustup toolchain install, in this clone: rust-toolchain.toml names the rest".to_owned()
        });
    Finding { name: "Rust", need: Need::Always, purpose: "everything", outcome }
}

fn git() -> Finding {
    let outcome = version("git", &["--version"]).ok_or("install git".to_owned());
    Finding { name: "git", need: Need::Sometimes, purpose: "image (the revision), release, migrate", outcome }
}

fn postgres() -> Finding {
    let found = programs::postgres_bin_dirs().into_iter().next();
    let outcome = match found.and_then(|dir| Some((programs::postgres_major(&dir)?, dir))) {
        Some((major, dir)) => Ok(format!("Postgres {major} in {}", dir.display())),
        None if install::can_install() => Ok("not installed: the first run gets it with apt-get".to_owned()),
        None => Err(format!("\n{}", install::ADVICE)),
    };
    Finding { name: "Postgres", need: Need::Always, purpose: "dev, test, prepare, migrate, bench", outcome }
}

fn redis() -> Finding {
    let outcome = match programs::redis_server() {
        Some(server) => Ok(server.display().to_string()),
        None if install::can_install() => Ok("not installed: the first run gets it with apt-get".to_owned()),
        None => Err(format!("\n{}", install::ADVICE)),
    };
    Finding { name: "Redis", need: Need::Always, purpose: "test; dev runs degraded without it", outcome }
}

fn disk() -> Result<Finding> {
    let free_gib = free_gib(&places::target_dir()?);
    let outcome = match free_gib {
        Some(gib) if gib < DISK_MIN_GIB => {
            Err(format!("{gib} GiB are free, {DISK_MIN_GIB} needed: cargo clean, or set CARGO_TARGET_DIR"))
        }
        Some(gib) if gib < DISK_WANTED_GIB => Ok(format!("{gib} GiB free: enough, but not for e2e")),
        Some(gib) => Ok(format!("{gib} GiB free")),
        None => Ok("its free space is unknown".to_owned()),
    };
    Ok(Finding { name: "disk", need: Need::Always, purpose: "building and the tests' servers", outcome })
}

fn free_gib(dir: &Path) -> Option<u64> {
    let mut df = Command::new("df");
    df.arg("-Pk").arg(dir);
    let said = daemon::run_ok(df, Duration::from_secs(10)).ok()?;
    let kib: u64 = said.lines().nth(1)?.split_whitespace().nth(3)?.parse().ok()?;
    Some(kib / 1024 / 1024)
}

/// Tools of some commands only.
fn tools() -> Vec<Finding> {
    let finding = |name, purpose, outcome| Finding { name, need: Need::Sometimes, purpose, outcome };
    let program = |name: &'static str, ask: &[&str], purpose, fix: &str| {
        finding(name, purpose, version(name, ask).ok_or_else(|| fix.to_owned()))
    };
    let go = go_tools::go().map(|go| go.display().to_string()).map_err(|error| error.to_string());
    let docker = if kind::engine_answers() {
        Ok("its engine answers".to_owned())
    } else {
        Err("https://docs.docker.com/engine/install; on Debian and Ubuntu root gets it from `cargo xtask kind up`".to_owned())
    };
    let engines = ["docker", "podman", "buildah"];
    let works = |name: &&str| programs::in_path(name).is_some() && (*name != "docker" || docker.is_ok());
    let engine = engines.into_iter().find(works);
    let engine = match engine {
        Some(name) => Ok(name.to_owned()),
        None if install::can_install() => Ok("none: the first run gets buildah with apt-get".to_owned()),
        None => Err("install docker, podman or buildah".to_owned()),
    };
    let browser = match install::browser() {
        Some(browser) => Ok(browser.chromium.display().to_string()),
        None if install::can_install() => Ok("not installed: the first run gets it with apt-get".to_owned()),
        None => Err("install chromium and chromedriver".to_owned()),
    };
    vec![
        finding("browser", "test (the chat page)", browser),
        finding("Go", "test (the chart's linters, a generated client), kind, e2e", go),
        finding("image engine", "image, e2e, release", engine),
        finding("Docker", "kind", docker),
        program(
            "kind",
            &["version"],
            "kind, tilt up",
            "https://kind.sigs.k8s.io/docs/user/quick-start; the first run builds it with Go",
        ),
        program(
            "kubectl",
            &["version", "--client"],
            "kind, tilt up",
            "https://kubernetes.io/docs/tasks/tools; `cargo xtask kind up --node-image build` builds its own",
        ),
        program(
            "helm",
            &["version", "--short"],
            "kind, tilt up",
            "https://helm.sh/docs/intro/install; `cargo xtask test` builds its own",
        ),
        program("tilt", &["version"], "tilt up", "https://docs.tilt.dev/install.html"),
        finding(
            "cargo-deny",
            "test (licences and sources of the crates)",
            version("cargo-deny", &["--version"])
                .ok_or("cargo install --locked cargo-deny; CI builds it by itself".to_owned()),
        ),
    ]
}

/// The first line of a program's version.
fn version(program: &str, args: &[&str]) -> Option<String> {
    let mut ask = Command::new(programs::in_path(program)?);
    ask.args(args);
    let said = daemon::run_ok(ask, Duration::from_secs(20)).ok()?;
    Some(said.lines().next().unwrap_or("it runs").to_owned())
}

fn ports_in_use() -> Vec<Finding> {
    let finding = |(port, name, purpose, fix): (u16, &'static str, &'static str, &str)| {
        let outcome = if ports::is_free_everywhere(port) {
            Ok("free".to_owned())
        } else {
            Err(format!("taken, perhaps by a run of ours: {fix}"))
        };
        Finding { name, need: Need::Sometimes, purpose, outcome }
    };
    let other = "dev takes another one by itself, or set PORT and OPS_PORT";
    let node = "end what listens there: `ss -ltnp` names it";
    vec![
        finding((8000, "port 8000", "dev: the API's usual port", other)),
        finding((9000, "port 9000", "dev: the operations' usual port", other)),
        finding((kind::NODE_PORT, "port 30080", "kind, e2e", node)),
    ]
}
