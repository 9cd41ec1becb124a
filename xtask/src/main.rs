//! `cargo xtask`: what developers and CI run. One file per command; those of `external` are crates of their own.

mod ci;
mod completions;
mod dev;
mod doctor;
mod external;
mod load;
mod migrate;
mod openapi;
mod prepare;
mod release;
mod seed;
mod test;

use std::process::ExitCode;

use clap::{CommandFactory as _, Parser, Subcommand};
use common::{args, image, kind};

#[derive(Parser)]
#[command(bin_name = "cargo xtask", about, max_term_width = 100, after_help = EXAMPLES)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

const EXAMPLES: &str = "Examples:
  cargo xtask dev                     the service on a private Postgres and Redis, from nothing
  cargo xtask dev --reset             the same with empty data
  cargo xtask dev --observe           the same with Prometheus, a trace collector, and Grafana where available
  PORT=8080 cargo xtask dev           every variable of the service works here, also in .env
  cargo xtask test                    everything that a change has to pass
  cargo xtask test -- messages        only the tests with that in their name
  cargo xtask prepare                 after a change of SQL: update .sqlx
  cargo xtask migrate new NAME        the next migration
  cargo xtask seed                    users and conversations for the running service
  cargo xtask doctor                  what is missing on this machine
Each command's own --help has more. CONTRIBUTING.md shows how they work together.";

#[derive(Subcommand)]
enum Command {
    /// Run the service with Postgres and Redis, until Ctrl-C
    Dev(dev::Args),
    /// Check formatting, lints, documentation, dependencies and SQL, and run the tests on private servers
    Test(test::Args),
    /// Update .sqlx, the data to check SQL without a database
    #[command(after_help = "Examples:
  cargo xtask prepare            then commit .sqlx with the change")]
    Prepare,
    /// Measure the service, as ratios to what the machine can do
    Bench(args::Bench),
    /// Run the history checker: servers, connections and replicas fail, and every answer is checked
    Soak(args::Soak),
    /// Build the container image
    Image(image::Args),
    /// Run a kind cluster, also where no image can be pulled
    Kind(kind::Args),
    /// Run conversations against a running service; no request may fail
    Load(load::Args),
    /// Test the chart on a real cluster under load: install, upgrade, faults, rollback, uninstall
    E2e(args::E2e),
    /// Inject each alert's fault, and check that it fires and resolves on a real Prometheus
    Drill(args::Drill),
    /// Write the Grafana dashboards, or check on a Prometheus that every panel has data
    Dashboards(args::Dashboards),
    /// Apply, create, show and check the schema's migrations
    Migrate(migrate::Args),
    /// Update or check the committed OpenAPI document
    Openapi(openapi::Args),
    /// Fill a running service with users and conversations
    Seed(seed::Args),
    /// List what is missing on this machine, for which command, and how to get it
    Doctor(doctor::Args),
    /// Make a release: version, commit, tag, image, SBOM, packaged chart, checksums
    Release(release::Args),
    /// Print shell completions: see its --help
    Completions(completions::Args),
    /// What .ci/run runs
    #[command(after_help = "Examples:
  CI=true cargo xtask ci         nothing is skipped: missing tools are installed, or are a failure")]
    Ci,
}

fn main() -> ExitCode {
    let ours = std::env::args_os().skip(1);
    let outcome = match Cli::parse().command {
        Command::Dev(args) => dev::run(&args),
        Command::Test(args) => test::run(&args),
        Command::Prepare => prepare::run(),
        Command::Image(args) => image::run(&args),
        Command::Kind(args) => kind::run(&args),
        Command::Load(args) => load::run(&args),
        Command::Bench(_) | Command::Soak(_) | Command::Drill(_) | Command::Dashboards(_) => {
            external::MEASURE.run(ours)
        }
        Command::E2e(_) => external::E2E.run(ours),
        Command::Migrate(args) => migrate::run(&args),
        Command::Openapi(args) => openapi::run(&args),
        Command::Seed(args) => seed::run(&args),
        Command::Doctor(args) => doctor::run(&args),
        Command::Release(args) => release::run(&args),
        Command::Completions(args) => completions::run(&args, Cli::command()),
        Command::Ci => ci::run(),
    };
    outcome.unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::FAILURE
    })
}
