//! SQL by `psql`, which every installation has beside its server: no client of our own, no crate, no runtime.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::{daemon, programs};

/// Migrations on test data take a fraction of it.
const LIMIT: Duration = Duration::from_secs(60);
/// Between columns, and for NULL. No text of ours has control characters: the service refuses them.
const COLUMN: char = '\x1f';
const NULL: &str = "\x1d";

/// One row as text; NULL is `None`.
pub type Row = Vec<Option<String>>;

#[derive(Clone, Copy, Debug)]
pub struct Login<'a> {
    pub host: &'a str,
    pub port: u16,
    pub user: &'a str,
    pub password: &'a str,
    pub database: &'a str,
}

/// Sends one or several statements at once, which are one transaction then, and returns their rows.
pub fn query(login: Login<'_>, sql: &str) -> Result<Vec<Row>> {
    let beside_server = programs::postgres_bin_dirs().into_iter().map(|dir| dir.join("psql"));
    let psql = beside_server.into_iter().find(|file| file.is_file()).or_else(|| programs::in_path("psql"));
    let mut command = Command::new(psql.context("psql is missing: install Postgres's client programs")?);
    // Without the user's settings, and with messages in English.
    command.env_clear().env("PGHOST", login.host).env("PGPORT", login.port.to_string());
    command.env("PGUSER", login.user).env("PGPASSWORD", login.password).env("PGDATABASE", login.database);
    command.env("PGCLIENTENCODING", "UTF8").env("PGSSLMODE", "disable").env("PGGSSENCMODE", "disable");
    command.args(["--no-psqlrc", "--quiet", "--tuples-only", "--no-align", "--record-separator-zero"]);
    command.arg(format!("--field-separator={COLUMN}")).arg(format!("--pset=null={NULL}"));
    // With the SQLSTATE.
    command.args(["--set=VERBOSITY=verbose", "--command", sql]);
    let output = daemon::run(command, LIMIT)?;
    if !output.status.success() {
        bail!("Postgres: {}", String::from_utf8_lossy(&output.stderr).trim_end());
    }
    let text = String::from_utf8_lossy(&output.stdout);
    let value = |value: &str| (value != NULL).then(|| value.to_owned());
    // The zero ends a row.
    Ok(text.split_terminator('\0').map(|row| row.split(COLUMN).map(value).collect()).collect())
}
