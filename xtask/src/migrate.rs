//! `cargo xtask migrate`: the schema of the database at hand, and the next migration.

use std::process::{Command, ExitCode};

use anyhow::{Context, Result, ensure};
use common::dry_run::{self, DryRun};
use common::migrations::{self, DIR};
use common::steps::step;
use common::{signals, workspace};
use harness::places;

use crate::dev;
use crate::external::MEASURE;

#[derive(clap::Args)]
#[command(after_help = "Examples:
  cargo xtask migrate new message_reactions   the next file, to be filled in
  cargo xtask migrate check                   may it be released?
  cargo xtask migrate status                  what the database has of it
  cargo xtask migrate run                     apply what is pending
  DATABASE_URL=postgres://... cargo xtask migrate status")]
pub(crate) struct Args {
    #[command(subcommand)]
    command: MigrateCommand,
    #[command(flatten)]
    dry_run: DryRun,
}

#[derive(clap::Subcommand)]
enum MigrateCommand {
    /// Apply what is pending, to the database of DATABASE_URL, DB_* or .env, else to the one of `cargo xtask dev`
    Run,
    /// Create the next file in service/migrations
    New(NewArgs),
    /// Show what is applied, pending or modified in that database
    Status,
    /// Forward only, nothing modified, no heavy lock without a reason, old and new binary both work
    Check,
}

#[derive(clap::Args)]
struct NewArgs {
    /// Its topic, in lower case with underscores
    name: String,
}

pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    signals::listen()?;
    args.dry_run.apply();
    match &args.command {
        MigrateCommand::New(args) => migrations::create(&workspace::root().join(DIR), &args.name)?,
        MigrateCommand::Run => service(&["migrate"])?,
        MigrateCommand::Status => service(&["migrate", "--status"])?,
        MigrateCommand::Check => return MEASURE.run(["checks", "migrations"]),
    }
    Ok(ExitCode::SUCCESS)
}

/// Builds the service and runs one of its commands on the database at hand.
fn service(args: &[&str]) -> Result<()> {
    step("build", |progress| progress.run(workspace::build("chat-service")))?;
    let mut command = Command::new(places::target_dir()?.join("debug/chat-service"));
    // It reads .env in its working directory.
    command.args(args).current_dir(workspace::root());
    if dry_run::is_on() {
        println!("{}", dry_run::shell_line(&command));
        return Ok(());
    }
    dev::with_database(|url| {
        command.envs(url.map(|url| ("DATABASE_URL", url)));
        let status = command.status().context("start the service")?;
        ensure!(status.success(), "chat-service {} failed, see above", args.join(" "));
        Ok(())
    })
}
