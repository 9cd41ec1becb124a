//! `cargo xtask test`: everything that a change has to pass, on private servers.

mod browser;
mod chart;
mod commands;
mod count;
mod dev;
mod generated_client;
mod tiltfile;
mod traces;

use std::path::PathBuf;
use std::process::{Command, ExitCode};

use anyhow::Result;
use common::servers::Servers;
use common::steps::Tally;
use common::workspace::{cargo, in_ci, offline_cargo};
use common::{signals, workspace};
use harness::places;
use harness::servers::programs;

use crate::external::MEASURE;
use crate::prepare;

#[derive(clap::Args)]
#[command(after_help = "Examples:
  cargo xtask test                         everything that a change has to pass
  cargo xtask test -- messages             only the tests with that in their name
  cargo xtask test -- --test it limits     only the integration tests of one module
  cargo xtask test --chart                 only the chart
  cargo xtask test --monitoring            only the dashboards, the rules and the runbooks
  cargo xtask test --dev                   only the developer's loop, and these commands")]
pub(crate) struct Args {
    /// Only what concerns the Helm chart
    #[arg(long, conflicts_with = "cargo_test")]
    chart: bool,
    /// Only what concerns the developer's loop: the Tiltfile, kind, the workflows, the commands
    #[arg(long, conflicts_with_all = ["cargo_test", "chart"])]
    dev: bool,
    /// Only what concerns the dashboards, the rules for Prometheus and the runbooks
    #[arg(long, conflicts_with_all = ["cargo_test", "chart"])]
    monitoring: bool,
    /// Arguments for `cargo test`; with any, only the tests run, without the other checks
    #[arg(last = true)]
    cargo_test: Vec<String>,
}

pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    signals::listen()?;
    let mut tally = Tally::default();
    if args.chart {
        chart::check(&mut tally);
    } else if args.dev {
        tiltfile::check(&mut tally);
        dev::check(&mut tally);
        commands::check(&mut tally);
    } else if args.monitoring {
        MEASURE.check(&mut tally, &["checks", "monitoring"]);
    } else if args.cargo_test.is_empty() {
        all(&mut tally)?;
    } else {
        let servers = tally.check("Postgres and Redis", "", Servers::start);
        build_and_test(&mut tally, servers.as_ref(), &args.cargo_test)?;
    }
    Ok(tally.close())
}

/// Every check. The later ones run even when one fails.
pub(crate) fn all(tally: &mut Tally) -> Result<()> {
    tally.check("formatting", "cargo fmt --all", |progress| {
        progress.run(cargo(&["fmt", "--all", "--check"])).map(drop)
    });
    let servers = tally.check("Postgres and Redis", "", Servers::start);
    lint(tally, servers.as_ref());
    tally.check("rustdoc", "the lines above name the place", |progress| {
        // Its readers work on the service, so it includes private items.
        let mut doc = offline_cargo(&["doc", "--workspace", "--no-deps", "--document-private-items"]);
        doc.env("RUSTDOCFLAGS", "-D warnings -A rustdoc::private_intra_doc_links");
        progress.run(doc)
    });
    check_dependencies(tally);
    chart::check(tally);
    tiltfile::check(tally);
    dev::check(tally);
    commands::check(tally);
    build_and_test(tally, servers.as_ref(), &[])
}

/// Clippy compiles the query macros against a live database, which also checks the committed data.
fn lint(tally: &mut Tally, servers: Option<&Servers>) {
    const CLIPPY: [&str; 6] = ["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"];
    let fix = "cargo clippy --workspace --all-targets --fix, or by hand";
    let Some(Servers { postgres, .. }) = servers else {
        tally.check("clippy", fix, |progress| progress.run(offline_cargo(&CLIPPY)));
        return;
    };
    let migrated = tally.check("migrations", "", |_| prepare::migrate(postgres, prepare::DATABASE));
    if migrated.is_none() {
        return;
    }
    let linted =
        tally.check("clippy", fix, |progress| progress.run(prepare::asking_cargo(postgres, &CLIPPY)?));
    // After a compile error, some queries were not checked.
    if linted.is_some() {
        tally.check("offline SQL data", "cargo xtask prepare", prepare::compare);
    }
}

fn build_and_test(tally: &mut Tally, servers: Option<&Servers>, args: &[String]) -> Result<()> {
    if args.is_empty() {
        MEASURE.check(tally, &["checks", "all"]);
    }
    let built = tally.check("build", "", |progress| progress.run(workspace::build("chat-service")));
    if signals::asked_to_end() {
        return Ok(());
    }
    let (Some(servers), Some(_)) = (servers, built) else {
        println!("  the tests cannot run without the servers and the service");
        tally.failed += 1;
        return Ok(());
    };
    let mut command = test_command(servers)?;
    command.args(args);
    traces::prepare(tally, &mut command, args);
    generated_client::prepare(tally, &mut command, args);
    browser::prepare(tally, args);
    count::run(tally, "tests", "cargo xtask test -- NAME runs one alone", command);
    if args.is_empty() {
        traces::check(tally, servers);
        generated_client::check(tally, servers);
        browser::check(tally, servers);
    }
    Ok(())
}

/// `cargo test` with the variables that the tests need.
fn test_command(servers: &Servers) -> Result<Command> {
    let mut command = offline_cargo(&["test", "--workspace", "--no-fail-fast"]);
    command.env("TEST_DATABASE_URL", servers.postgres.url("postgres"));
    command.env("TEST_REDIS_URL", servers.redis.url(0));
    command.env("CHAT_SERVICE_BIN", places::target_dir()?.join("debug/chat-service"));
    // Backtraces would bury the output of the failed tests.
    command.env("RUST_BACKTRACE", "0");
    Ok(command)
}

/// Licences, banned crates and sources. No advisories: they need a network, which some machines lack.
fn check_dependencies(tally: &mut Tally) {
    let Some(cargo_deny) = cargo_deny(tally) else { return };
    tally.check("dependencies", "fix Cargo.toml, or explain the exception in deny.toml", |progress| {
        let mut command = Command::new(cargo_deny);
        command.args(["--log-level", "error", "check", "--hide-inclusion-graph"]);
        command.args(["bans", "licenses", "sources"]).current_dir(workspace::root());
        progress.run(command)
    });
}

/// CI builds it where it is missing, which takes two to four minutes.
fn cargo_deny(tally: &mut Tally) -> Option<PathBuf> {
    const VERSION: &str = "0.20.2";
    if let Some(installed) = programs::in_path("cargo-deny") {
        return Some(installed);
    }
    let root = places::target_dir().ok()?.join("tools");
    let built = root.join("bin/cargo-deny");
    if built.is_file() {
        return Some(built);
    }
    if !in_ci() {
        println!("  {:24}skipped: needs cargo-deny (cargo install --locked cargo-deny)", "dependencies");
        return None;
    }
    tally.check("build cargo-deny", "", |progress| {
        let mut install = cargo(&["install", "--locked", "--version", VERSION, "cargo-deny", "--root"]);
        install.arg(&root).env_remove("CARGO_TARGET_DIR");
        progress.run(install)
    })?;
    Some(built)
}
