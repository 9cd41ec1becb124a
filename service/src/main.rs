//! The command line: a subcommand, its configuration, and how it ends.

use std::process::ExitCode;
use std::time::Duration;

use chat_service::config::{Config, EXIT_CONFIG};
use chat_service::telemetry::Telemetry;
use chat_service::{db, doctor, openapi, serve};
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

#[derive(Subcommand, Clone, Copy)]
enum Command {
    /// Serve the API (the default)
    Serve,
    /// Bring the database's schema up to date, and exit
    Migrate,
    /// Ask the instance on this machine whether it is ready: exit code 0 or 1
    Healthcheck,
    /// Print the OpenAPI document
    Openapi,
    /// Check the configuration, Postgres, the schema and Redis; every failure names its fix
    Doctor,
}

fn main() -> ExitCode {
    let command = Arguments::parse().command.unwrap_or(Command::Serve);
    run(command).unwrap_or_else(|error| {
        eprintln!("chat-service: {error:#}");
        ExitCode::FAILURE
    })
}

fn run(command: Command) -> anyhow::Result<ExitCode> {
    if matches!(command, Command::Openapi) {
        println!("{}", openapi::json()?);
        return Ok(ExitCode::SUCCESS);
    }
    let config = match Config::from_environment() {
        Ok(config) => config,
        Err(error) => {
            eprintln!("chat-service: {error}");
            return Ok(ExitCode::from(EXIT_CONFIG));
        }
    };
    if matches!(command, Command::Healthcheck) {
        return Ok(doctor::healthcheck(&config));
    }
    // OpenTelemetry reads its standard variables from the environment alone. What is there already stays, and no
    // other thread runs yet.
    dotenvy::from_path(".env").ok();
    // One provider for TLS and for tokens.
    rustls::crypto::aws_lc_rs::default_provider().install_default().ok();
    let telemetry = Telemetry::start(&config)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let code = runtime.block_on(async {
        match command {
            Command::Migrate => migrate(&config).await,
            Command::Doctor => doctor::doctor(&config).await,
            _ => serve::run(config).await,
        }
    });
    // Whatever still runs in the background was not acknowledged to anybody.
    runtime.shutdown_timeout(Duration::from_millis(100));
    telemetry.shutdown();
    code
}

async fn migrate(config: &Config) -> anyhow::Result<ExitCode> {
    let options = db::connect_options(config).map_err(anyhow::Error::msg)?;
    let version = db::migrate(&options).await?;
    println!("the schema is at version {version}");
    Ok(ExitCode::SUCCESS)
}
