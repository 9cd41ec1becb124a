//! The migration scripts.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use crate::{dry_run, workspace};

/// Their folder, from the clone's top.
pub const DIR: &str = "service/migrations";

/// A script of `service/migrations`.
#[derive(Clone, Debug)]
pub struct Script {
    pub version: u32,
    /// From the clone's top.
    pub file: String,
    pub sql: String,
}

/// The scripts in their order.
pub fn scripts(dir: &Path) -> Result<Vec<Script>> {
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

/// Creates the next script, with the rules for its author.
pub fn create(dir: &Path, name: &str) -> Result<()> {
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
