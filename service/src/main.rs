//! The command line: a subcommand, its configuration, and how it ends.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context as _;
use chat_service::config::{Config, EXIT_CONFIG};
use chat_service::db::{MigrationError, Standing};
use chat_service::telemetry::{BadVariable, Telemetry};
use chat_service::{create_secret, db, doctor, openapi, serve, smoke_test};
use clap::{Parser, Subcommand};
use sqlx::postgres::PgConnectOptions;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// A 1:1 chat back end on Postgres and Redis
///
/// It is configured by environment variables, or a `.env` file in the working directory; README.md lists them.
#[derive(Parser)]
#[command(name = "chat-service", version)]
struct Arguments {
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    /// Serve the API (the default)
    Serve,
    /// Bring the database's schema up to date, and exit
    Migrate(MigrateArgs),
    /// Ask the instance on this machine whether it is ready: exit code 0 or 1
    Healthcheck(HealthcheckArgs),
    /// Print the OpenAPI document
    Openapi,
    /// Check the configuration, Postgres, the schema and Redis; every failure names its fix
    Doctor,
    /// Let two new users talk to each other over the API of a running service: exit code 0 or 1
    SmokeTest(smoke_test::Args),
    /// In a pod: create a Kubernetes Secret with random values, or add the keys that it lacks
    CreateSecret(create_secret::Args),
}

#[derive(clap::Args)]
struct HealthcheckArgs {
    /// How long to wait for an instance that is not ready
    #[arg(long, default_value_t = 0, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(..=86_400))]
    wait: u32,
}

#[derive(clap::Args)]
struct MigrateArgs {
    /// How long to wait for a Postgres that cannot be reached
    #[arg(long, default_value_t = 0, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(..=86_400))]
    wait: u32,
    /// Leave a schema that is newer than this binary as it is, and succeed: for going back to an older release
    #[arg(long)]
    allow_newer: bool,
    /// Change nothing; show each migration as applied, pending, modified or unknown. Exit code 1 for the last two
    #[arg(long, conflicts_with_all = ["wait", "allow_newer"])]
    status: bool,
}

fn main() -> ExitCode {
    let command = Arguments::parse().command.unwrap_or(Command::Serve);
    run(command).unwrap_or_else(|error| {
        eprintln!("chat-service: {error:#}");
        ExitCode::FAILURE
    })
}

fn run(command: Command) -> anyhow::Result<ExitCode> {
    // One provider for TLS and for tokens.
    rustls::crypto::aws_lc_rs::default_provider().install_default().ok();
    match &command {
        Command::Openapi => println!("{}", openapi::json()?),
        Command::SmokeTest(args) => smoke_test::run(args)?,
        Command::CreateSecret(args) => create_secret::run(args)?,
        _ => return run_configured(&command),
    }
    Ok(ExitCode::SUCCESS)
}

/// The subcommands that need the configuration.
fn run_configured(command: &Command) -> anyhow::Result<ExitCode> {
    let config = match Config::from_environment() {
        Ok(config) => config,
        Err(error) => {
            eprintln!("chat-service: {error}");
            return Ok(ExitCode::from(EXIT_CONFIG));
        }
    };
    if let Command::Healthcheck(args) = command {
        return Ok(doctor::healthcheck(&config, Duration::from_secs(args.wait.into())));
    }
    // OpenTelemetry reads its standard variables from the environment alone. What is there already stays, and no
    // other thread runs yet.
    dotenvy::from_path(".env").ok();
    let telemetry = match Telemetry::start(&config) {
        Ok(telemetry) => telemetry,
        Err(error) if error.is::<BadVariable>() => {
            eprintln!("chat-service: {error}");
            return Ok(ExitCode::from(EXIT_CONFIG));
        }
        Err(error) => return Err(error),
    };
    // The first of the workers, when it serves.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let code = runtime.block_on(async {
        match command {
            Command::Migrate(args) => migrate(&config, args).await,
            Command::Doctor => doctor::doctor(&config).await,
            _ => serve::run(config).await,
        }
    });
    // Whatever still runs in the background was not acknowledged to anybody.
    runtime.shutdown_timeout(Duration::from_millis(100));
    telemetry.shutdown();
    code
}

async fn migrate(config: &Config, args: &MigrateArgs) -> anyhow::Result<ExitCode> {
    let options = db::connect_options(config).map_err(anyhow::Error::msg)?;
    if args.status {
        return status(&options).await;
    }
    match db::migrate_patiently(&options, Duration::from_secs(args.wait.into())).await {
        Ok(version) => println!("the schema is at version {version}"),
        Err(MigrationError::DatabaseIsNewer { applied, known }) if args.allow_newer && applied > known => {
            println!(
                "the schema is at version {applied}, newer than this binary, which knows {known}: left as it is"
            )
        }
        Err(error) => return Err(error.into()),
    }
    Ok(ExitCode::SUCCESS)
}

async fn status(options: &PgConnectOptions) -> anyhow::Result<ExitCode> {
    let standings = db::standings(options).await.context("Postgres cannot be asked")?;
    let mut sound = true;
    for (version, description, standing) in standings {
        let (word, fix) = match standing {
            Standing::Applied => ("applied", ""),
            Standing::Pending => ("pending", ""),
            Standing::Modified => {
                ("modified", ": undo the edit; a migration is never changed, add a new one")
            }
            Standing::Unknown => ("unknown", ": applied by a newer release"),
        };
        sound &= matches!(standing, Standing::Applied | Standing::Pending);
        println!("{version:04}  {word:<8}  {description}{fix}");
    }
    Ok(ExitCode::from(u8::from(!sound)))
}
