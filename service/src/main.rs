//! The command line: a subcommand, its configuration, and how it ends.

use std::process::ExitCode;
use std::time::Duration;

use chat_service::cli::{admin, canary, create_secret, doctor, healthcheck, migrate, smoke_test};
use chat_service::config::{Config, EXIT_CONFIG};
use chat_service::http::routes::public_api;
use chat_service::serve;
use chat_service::telemetry::causes::causes;
use chat_service::telemetry::{BadVariable, Output, Telemetry};
use clap::{Parser, Subcommand};

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
    Migrate(migrate::Args),
    /// Ask the instance on this machine whether it is ready: exit code 0 or 1
    Healthcheck(healthcheck::Args),
    /// Print the OpenAPI document
    Openapi,
    /// Check the configuration, Postgres, the schema and Redis; every failure names its fix
    Doctor,
    /// Look after users and conversations; needs Postgres alone
    Admin(admin::Args),
    /// Let two new users exchange messages over the API of a running service: exit code 0 or 1
    SmokeTest(smoke_test::Args),
    /// Let two fixed users exchange messages over the API of a running service all the time, and export what they see
    Canary(canary::Args),
    /// In a pod: create a Kubernetes Secret with random values, or add the keys that it lacks
    CreateSecret(create_secret::Args),
}

fn main() -> ExitCode {
    let command = Arguments::parse().command.unwrap_or(Command::Serve);
    run(command).unwrap_or_else(|error| {
        eprintln!("chat-service: {}", causes(&*error));
        ExitCode::FAILURE
    })
}

fn run(command: Command) -> anyhow::Result<ExitCode> {
    // One provider for TLS and for tokens.
    rustls::crypto::aws_lc_rs::default_provider().install_default().ok();
    match &command {
        Command::Openapi => println!("{}", public_api().document_json()?),
        Command::SmokeTest(args) => smoke_test::run(args)?,
        Command::Canary(args) => canary::run(args)?,
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
        return Ok(healthcheck::run(&config, Duration::from_secs(args.wait.into())));
    }
    let logs = if matches!(command, Command::Admin(_)) { Output::Stderr } else { Output::Stdout };
    let telemetry = match Telemetry::start(&config, logs) {
        Ok(telemetry) => telemetry,
        Err(error) if error.is::<BadVariable>() => {
            eprintln!("chat-service: {error}");
            return Ok(ExitCode::from(EXIT_CONFIG));
        }
        Err(error) => return Err(error),
    };
    // `serve` makes this runtime its first worker.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let code = runtime.block_on(async {
        match command {
            Command::Migrate(args) => migrate::run(&config, args).await,
            Command::Doctor => doctor::run(&config).await,
            Command::Admin(args) => admin::run(&config, args).await,
            _ => serve::run(config).await,
        }
    });
    // No client waits for what still runs in the background.
    runtime.shutdown_timeout(Duration::from_millis(100));
    telemetry.shutdown();
    code
}
