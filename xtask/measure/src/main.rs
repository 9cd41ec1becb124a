//! The commands of `cargo xtask` that measure and check the running service. They need what the front door has not: an
//! HTTP stack, a runtime, and parsers of YAML and SQL.

mod bench;
mod canary;
mod dashboards;
mod drill;
mod migrations;
mod monitoring;
mod rules;
mod soak;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, ValueEnum};
use common::servers::Servers;
use common::steps::Tally;
use common::{args, signals, workspace};

#[derive(Parser)]
#[command(bin_name = "cargo xtask")]
enum Cli {
    Bench(args::Bench),
    Soak(args::Soak),
    Drill(args::Drill),
    Dashboards(args::Dashboards),
    /// For `cargo xtask test` and `cargo xtask migrate check`
    Checks {
        which: Checks,
    },
}

#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
enum Checks {
    All,
    Migrations,
    Monitoring,
}

fn main() -> ExitCode {
    run(Cli::parse()).unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::FAILURE
    })
}

fn run(cli: Cli) -> Result<ExitCode> {
    // Ctrl-C ends a benchmark at once: it has nothing to clean up.
    if !matches!(cli, Cli::Bench(_)) {
        signals::listen()?;
    }
    match cli {
        Cli::Bench(args) => bench::run(&args),
        Cli::Soak(args) => soak::run(&args),
        Cli::Drill(args) => drill::run(&args),
        Cli::Dashboards(args) => dashboards::run(&args),
        Cli::Checks { which } => checks(which),
    }
}

fn checks(which: Checks) -> Result<ExitCode> {
    let mut tally = Tally::default();
    let promtool = if which == Checks::Migrations { None } else { monitoring::check(&mut tally) };
    let servers = tally.check("Postgres and Redis", "", Servers::start);
    let built = tally.check("build", "", |progress| progress.run(workspace::build("chat-service")));
    if let (Some(Servers { postgres, redis, .. }), Some(_)) = (&servers, built) {
        if which != Checks::Migrations {
            monitoring::check_metrics(&mut tally, promtool.as_deref(), postgres, redis);
        }
        if which != Checks::Monitoring {
            migrations::check(&mut tally, postgres, redis);
        }
        if which != Checks::Migrations {
            monitoring::check_observers(&mut tally, postgres, redis);
        }
    }
    Ok(tally.close())
}
