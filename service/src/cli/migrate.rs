//! `chat-service migrate`: applies the migrations, or shows their status.

use std::process::ExitCode;
use std::time::Duration;

use sqlx::postgres::PgConnectOptions;

use crate::config::Config;
use crate::store::migrations::{self, MigrationError, MigrationStatus};
use crate::store::postgres;

#[derive(clap::Args, Debug)]
pub struct Args {
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

/// Applies the migrations, or shows their status.
pub async fn run(config: &Config, args: &Args) -> anyhow::Result<ExitCode> {
    let options = config.connect_options()?;
    if args.status {
        return show_status(&options).await;
    }
    match migrations::migrate_with_retry(&options, Duration::from_secs(args.wait.into())).await {
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

async fn show_status(options: &PgConnectOptions) -> anyhow::Result<ExitCode> {
    let statuses = migrations::statuses(options)
        .await
        .map_err(|error| anyhow::anyhow!("Postgres cannot be asked: {}", postgres::reason(&error)))?;
    let mut sound = true;
    for (version, description, status) in statuses {
        let (word, fix) = match status {
            MigrationStatus::Applied => ("applied", ""),
            MigrationStatus::Pending => ("pending", ""),
            MigrationStatus::Modified => {
                ("modified", ": undo the edit; a migration is never changed, add a new one")
            }
            MigrationStatus::Unknown => ("unknown", ": applied by a newer release"),
        };
        sound &= matches!(status, MigrationStatus::Applied | MigrationStatus::Pending);
        println!("{version:04}  {word:<8}  {description}{fix}");
    }
    Ok(ExitCode::from(u8::from(!sound)))
}
