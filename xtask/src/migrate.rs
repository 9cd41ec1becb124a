//! `cargo xtask migrate`: the schema of the database at hand, and what a new migration has to keep to.

mod history;
mod rules;
mod upgrade;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use ::tests::{Postgres, PostgresOptions, Redis, RedisOptions, Scratch, install, places};
use anyhow::{Context, Result, bail, ensure};

use crate::dry_run::{self, DryRun};
use crate::steps::{Tally, step};
use crate::{dev, signals, workspace};

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
    /// What it is about, in lower case with underscores
    name: String,
}

const DIR: &str = "service/migrations";

/// A script of `service/migrations`.
#[derive(Clone, Debug)]
struct Script {
    version: u32,
    /// From the clone's top.
    file: String,
    sql: String,
}

pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    signals::listen()?;
    args.dry_run.apply();
    match &args.command {
        MigrateCommand::New(args) => create(&workspace::root().join(DIR), &args.name)?,
        MigrateCommand::Run => service(&["migrate"])?,
        MigrateCommand::Status => service(&["migrate", "--status"])?,
        MigrateCommand::Check => return check_alone(),
    }
    Ok(ExitCode::SUCCESS)
}

/// Builds the service and lets it work on the database at hand.
fn service(args: &[&str]) -> Result<()> {
    step("build", |progress| progress.run(workspace::offline_cargo(&["build", "-p", "chat-service"])))?;
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

/// Writes the next script, with what its author has to know.
fn create(dir: &Path, name: &str) -> Result<()> {
    let is_plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
    let begins_well = name.starts_with(|c: char| c.is_ascii_lowercase());
    ensure!(
        begins_well && name.chars().all(is_plain),
        "{name:?} is no name for a migration: lower case letters, digits and underscores, such as message_reactions"
    );
    let next = scripts(dir)?.last().map_or(1, |script| script.version + 1);
    let file = dir.join(format!("{next:04}_{name}.sql"));
    let shown = workspace::shown(&file);
    if dry_run::is_on() {
        println!("# would create {shown}");
        return Ok(());
    }
    fs::write(&file, HEAD).with_context(|| format!("create {shown}"))?;
    println!(
        "{shown}\n  next: write it, `cargo xtask prepare` when queries use it, `cargo xtask migrate check`"
    );
    Ok(())
}

const HEAD: &str = "\
-- What this is for, and why it is stored like this.
--
-- It runs while the release before serves: add, and remove only what that release no longer uses. Once released it
-- is never edited. A statement that locks a table in use needs a comment above it: `-- reason: ...`. An index on a
-- table with rows: a file of its own that begins with `-- no-transaction`, and CREATE INDEX CONCURRENTLY.
";

/// The scripts in their order.
fn scripts(dir: &Path) -> Result<Vec<Script>> {
    let mut files: Vec<PathBuf> = fs::read_dir(dir)
        .with_context(|| format!("read {}", dir.display()))?
        .map(|entry| Ok(entry?.path()))
        .collect::<Result<_>>()?;
    files.sort();
    files.retain(|file| file.extension().is_some_and(|extension| extension == "sql"));
    files.into_iter().map(|file| script(&file)).collect()
}

fn script(file: &Path) -> Result<Script> {
    let name = file.file_name().unwrap_or_default().to_string_lossy();
    let version = name.split_once('_').filter(|(digits, _)| digits.len() == 4);
    let version = version.and_then(|(digits, _)| digits.parse().ok());
    let version = version.with_context(|| format!("{name} is not named like 0001_name.sql"))?;
    let sql = fs::read_to_string(file).with_context(|| format!("read {name}"))?;
    Ok(Script { version, file: workspace::shown(file), sql })
}

/// With servers of its own.
fn check_alone() -> Result<ExitCode> {
    let mut tally = Tally::default();
    let scratch = Scratch::new("migrate")?;
    let servers = tally.check("Postgres and Redis", "", |progress| {
        install::ensure_programs(|line| progress.note(line))?;
        let postgres = Postgres::start(&scratch.path().join("postgres"), PostgresOptions::fast())?;
        Ok((postgres, Redis::start(&scratch.path().join("redis"), RedisOptions::default())?))
    });
    let built = tally.check("build", "", |progress| {
        progress.run(workspace::offline_cargo(&["build", "-p", "chat-service"]))
    });
    if let (Some((postgres, redis)), Some(_)) = (&servers, built) {
        check(&mut tally, postgres, redis);
    }
    Ok(tally.close())
}

/// Three checks, each with its fix. The service has been built.
pub(crate) fn check(tally: &mut Tally, postgres: &Postgres, redis: &Redis) {
    let dir = workspace::root().join(DIR);
    let fix = "a migration is never edited once others have it: undo, and `cargo xtask migrate new NAME`";
    let scripts = tally.check("migrations: history", fix, |progress| {
        let scripts = scripts(&dir)?;
        history::check(&dir, &scripts, progress)?;
        Ok(scripts)
    });
    let Some(scripts) = scripts else { return };
    let fix = "as the linter says; drop or rename only what no release in use names; or `-- reason: ...` right above it";
    tally.check("migrations: locks", fix, |_| {
        let broken: Vec<String> = scripts
            .iter()
            .flat_map(|script| {
                rules::broken(&script.sql).into_iter().map(|fault| format!("    {}, {fault}", script.file))
            })
            .collect();
        if !broken.is_empty() {
            bail!("{}", broken.join("\n"));
        }
        Ok(())
    });
    let fix = "let the migration add only; what the old binary uses goes a release later";
    tally
        .check("migrations: under load", fix, |progress| upgrade::check(&scripts, postgres, redis, progress));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_next_migration_follows_the_last_and_passes_its_own_rules() {
        let scratch = Scratch::new("migrations").expect("a directory");
        let dir = scratch.path();
        create(dir, "first").expect("a file");
        create(dir, "second_2").expect("a file");
        let found = scripts(dir).expect("scripts");
        let names: Vec<_> =
            found.iter().map(|script| script.file.rsplit('/').next().expect("a name")).collect();
        assert_eq!(names, ["0001_first.sql", "0002_second_2.sql"]);
        assert!(rules::broken(&found[1].sql).is_empty());
        // What it says of reasons is none.
        assert_eq!(rules::broken(&format!("{}DROP TABLE users;", found[1].sql)).len(), 1);
        for name in ["Second", "2nd", "a-b", "", "../x"] {
            let error = create(dir, name).expect_err("a bad name").to_string();
            assert!(error.contains("message_reactions"), "{error}");
        }
        fs::write(dir.join("5_x.sql"), "").expect("written");
        assert!(scripts(dir).expect_err("a bad name").to_string().contains("0001_name.sql"));
    }

    #[test]
    fn the_projects_own_migrations_keep_to_the_rules() {
        for script in scripts(&workspace::root().join(DIR)).expect("scripts") {
            assert_eq!(rules::broken(&script.sql), [""; 0], "{}", script.file);
        }
    }
}
