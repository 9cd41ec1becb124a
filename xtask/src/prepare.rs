//! `cargo xtask prepare` and its check: the committed data that sqlx needs to compile without a database.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::SystemTime;

use anyhow::{Context, Result, bail};
use common::migrations::{DIR, scripts};
use common::steps::{Progress, step};
use common::{signals, workspace};
use harness::{Postgres, PostgresOptions, Scratch, install, places};

/// The roots of the crates with query macros. Touching them makes cargo compile them again, and the macros ask Postgres.
const ROOTS: [&str; 3] = ["service/src/lib.rs", "service/src/main.rs", "tests/it/main.rs"];

pub(crate) fn run() -> Result<ExitCode> {
    signals::listen()?;
    let scratch = Scratch::new("prepare")?;
    let postgres = step("Postgres", |progress| {
        install::ensure_programs(|line| progress.note(line))?;
        Postgres::start(&scratch.path().join("postgres"), PostgresOptions::fast())
    })?;
    step("migrations", |_| migrate(&postgres, DATABASE))?;
    step("check each query", |progress| {
        progress.run(asking_cargo(&postgres, &["check", "--workspace", "--all-targets"])?)
    })?;
    let fresh = read(&fresh_dir()?)?;
    let committed = committed_dir();
    let before = read(&committed)?;
    if fresh.is_empty() {
        bail!("no query was found: {} is left as it is", workspace::shown(&committed));
    }
    fs::create_dir_all(&committed)?;
    for gone in before.keys().filter(|name| !fresh.contains_key(*name)) {
        fs::remove_file(committed.join(gone))?;
    }
    for (name, text) in &fresh {
        if before.get(name) != Some(text) {
            fs::write(committed.join(name), text)?;
        }
    }
    println!(
        "\n{} queries in {}{}",
        fresh.len(),
        workspace::shown(&committed),
        if fresh == before { ", nothing new" } else { "" }
    );
    Ok(ExitCode::SUCCESS)
}

/// The database that the macros use.
pub(crate) const DATABASE: &str = "sqlx_macros";

/// Creates the database with the service's tables. The service's own `migrate` cannot: building it needs the checked SQL.
pub(crate) fn migrate(postgres: &Postgres, database: &str) -> Result<()> {
    postgres.create_database(database)?;
    for script in scripts(&workspace::root().join(DIR))? {
        postgres.query(database, &script.sql).context(script.file)?;
    }
    Ok(())
}

/// A cargo command whose query macros ask Postgres, and write down its answers.
pub(crate) fn asking_cargo(postgres: &Postgres, args: &[&str]) -> Result<Command> {
    let fresh = fresh_dir()?;
    if fresh.exists() {
        fs::remove_dir_all(&fresh)?;
    }
    fs::create_dir_all(&fresh)?;
    for root in ROOTS.map(|root| workspace::root().join(root)).iter().filter(|root| root.exists()) {
        fs::File::open(root)?.set_modified(SystemTime::now())?;
    }
    let mut command = workspace::cargo(args);
    command
        .env("DATABASE_URL", postgres.url(DATABASE))
        .env("SQLX_OFFLINE", "false")
        .env("SQLX_OFFLINE_DIR", fresh);
    Ok(command)
}

/// Fails when the committed data is not what [`asking_cargo`] has just written.
pub(crate) fn compare(progress: &Progress) -> Result<()> {
    let (fresh, committed) = (read(&fresh_dir()?)?, read(&committed_dir())?);
    progress.say(&format!("{} queries", fresh.len()));
    let missing = fresh.keys().filter(|name| !committed.contains_key(*name));
    let stale = committed.iter().filter(|(name, text)| fresh.get(*name) != Some(text)).map(|(name, _)| name);
    let differing: Vec<String> = missing.chain(stale).map(|name| format!("    .sqlx/{name}")).collect();
    if !differing.is_empty() {
        bail!("{}\n  {} of .sqlx is not what Postgres answers now", differing.join("\n"), differing.len());
    }
    Ok(())
}

fn fresh_dir() -> Result<PathBuf> {
    Ok(places::target_dir()?.join("sqlx-fresh"))
}

fn committed_dir() -> PathBuf {
    workspace::root().join(".sqlx")
}

/// The query files of a directory, by name; none when it is not there.
fn read(dir: &Path) -> Result<BTreeMap<String, String>> {
    if !dir.exists() {
        return Ok(BTreeMap::new());
    }
    let files = fs::read_dir(dir)?.map(|entry| {
        let entry = entry?;
        Ok((entry.file_name().to_string_lossy().into_owned(), fs::read_to_string(entry.path())?))
    });
    files.filter(|file| file.as_ref().map_or(true, |(name, _)| name.starts_with("query-"))).collect()
}
