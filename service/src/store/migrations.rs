//! The migrations of the schema: applying them, and their status in a database.

use std::time::Duration;

use sqlx::migrate::{Migrate as _, MigrateError, Migrator};
use sqlx::postgres::PgConnectOptions;
use sqlx::{Connection as _, PgConnection};
use tokio::time::Instant;

use super::operation::Operation;
use super::pooler;
use super::postgres::{self, Database};

/// The migrations that this binary was built with.
static MIGRATIONS: Migrator = sqlx::migrate!("./migrations");

/// How long a migration may take, with the wait for other replicas'. It has no statement timeout: a migration that is
/// cut off half-way would only start again.
const MIGRATE_TIMEOUT: Duration = Duration::from_secs(600);

/// Between two attempts to reach a Postgres that is not up yet.
const CONNECT_RETRY: Duration = Duration::from_secs(1);

/// The schema's state against what this binary needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Schema {
    /// Migrations are missing: the service waits for them, unready.
    Behind { version: i64 },
    /// The schema has everything that this binary needs. A newer one has, too: a migration only adds until the last old
    /// process has ended.
    Current { version: i64 },
}

#[derive(thiserror::Error, Debug)]
pub enum MigrationError {
    #[error(
        "the database's schema is at version {applied}, newer than this binary, which knows {known}: run the \
         newer release, or restore the backup made before its migration"
    )]
    DatabaseIsNewer { applied: i64, known: i64 },
    #[error("migration {0} was changed after it was applied: a migration is never edited, add a new one")]
    Edited(i64),
    #[error("no migration within {} s: another process may hold the lock", MIGRATE_TIMEOUT.as_secs())]
    TimedOut,
    #[error(
        "migrations are pending, and Postgres is behind a pooler in transaction mode, where their lock does not hold: run \
         `chat-service migrate` with a DATABASE_URL that leads straight to Postgres"
    )]
    Pooled,
    #[error("{}", pooler::reason(.0))]
    UnfitPooler(sqlx::Error),
    #[error("Postgres cannot be reached: {0}")]
    Unreachable(#[source] sqlx::Error),
    #[error("the migration failed: {0}")]
    Failed(#[source] MigrateError),
}

/// The version of the newest migration that this binary knows.
pub fn known_version() -> i64 {
    MIGRATIONS.iter().map(|migration| migration.version).max().unwrap_or(0)
}

/// Brings the schema up to date on a dedicated connection. Any number of processes may do so at once: an advisory lock
/// admits one at a time, and the others then find nothing to do.
pub async fn migrate(options: &PgConnectOptions) -> Result<i64, MigrationError> {
    let work = async {
        let mut connection = postgres::connect(options).await.map_err(unreachable)?;
        // A lock of the session would become another client's.
        if pooler::shares_sessions(&mut connection, options).await {
            return nothing_pending(&mut connection, MigrationError::Pooled).await;
        }
        let outcome = MIGRATIONS.run_direct(None, &mut connection, false).await;
        if let Err(error) = outcome {
            return Err(explain(&mut connection, error).await);
        }
        connection.close().await.ok();
        Ok(known_version())
    };
    tokio::time::timeout(MIGRATE_TIMEOUT, work).await.unwrap_or(Err(MigrationError::TimedOut))
}

/// As [`migrate`], but tries again for as long as `wait` while Postgres cannot be reached.
pub async fn migrate_with_retry(options: &PgConnectOptions, wait: Duration) -> Result<i64, MigrationError> {
    let deadline = Instant::now() + wait;
    let mut reported = false;
    loop {
        match migrate(options).await {
            Err(MigrationError::Unreachable(error))
                if postgres::may_connect_later(&error) && Instant::now() < deadline =>
            {
                if !reported {
                    let left = (deadline - Instant::now()).as_secs();
                    eprintln!("Postgres cannot be reached: {error}; trying again for {left} s");
                    reported = true;
                }
                tokio::time::sleep(CONNECT_RETRY).await;
            }
            outcome => return outcome,
        }
    }
}

/// Asks Postgres for the schema's version, on which readiness depends.
pub async fn schema(database: &Database) -> Result<Schema, sqlx::Error> {
    let mut connection = database.acquire().await?;
    let query = sqlx::query_scalar("SELECT max(version) FROM _sqlx_migrations WHERE success");
    let version: Result<Option<i64>, _> =
        database.run(Operation::CheckSchema, query.fetch_one(&mut *connection)).await;
    let version = match version {
        Ok(version) => version.unwrap_or(0),
        Err(error) if postgres::is_undefined_table(&error) => 0,
        Err(error) => return Err(error),
    };
    Ok(if version < known_version() { Schema::Behind { version } } else { Schema::Current { version } })
}

/// The status of one migration in a database.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MigrationStatus {
    Applied,
    Pending,
    /// Its script is not the one that was applied.
    Modified,
    /// Applied by a newer release: this binary does not know it.
    Unknown,
}

/// Every migration that this binary or the database knows: version, description and status.
pub async fn statuses(
    options: &PgConnectOptions,
) -> Result<Vec<(i64, String, MigrationStatus)>, sqlx::Error> {
    let mut connection = postgres::connect(options).await?;
    let rows: Result<Vec<(i64, String, Vec<u8>)>, _> = sqlx::query_as(
        "SELECT version, description, checksum FROM _sqlx_migrations WHERE success ORDER BY version",
    )
    .fetch_all(&mut connection)
    .await;
    let applied = match rows {
        Ok(rows) => rows,
        Err(error) if postgres::is_undefined_table(&error) => Vec::new(),
        Err(error) => return Err(error),
    };
    connection.close().await.ok();
    let known = MIGRATIONS.iter().map(|migration| {
        let row = applied.iter().find(|(version, ..)| *version == migration.version);
        let status = match row {
            None => MigrationStatus::Pending,
            Some((.., checksum)) if *checksum == *migration.checksum => MigrationStatus::Applied,
            Some(_) => MigrationStatus::Modified,
        };
        (migration.version, migration.description.to_string(), status)
    });
    let is_unknown = |version: i64| MIGRATIONS.iter().all(|migration| migration.version != version);
    let unknown = applied.iter().filter(|(version, ..)| is_unknown(*version));
    let unknown =
        unknown.map(|(version, description, _)| (*version, description.clone(), MigrationStatus::Unknown));
    Ok(known.chain(unknown).collect())
}

/// Where nothing may be migrated, it only matters whether something is pending.
async fn nothing_pending(
    connection: &mut PgConnection,
    refusal: MigrationError,
) -> Result<i64, MigrationError> {
    let applied = match connection.list_applied_migrations("_sqlx_migrations").await {
        Ok(applied) => applied,
        Err(MigrateError::Execute(error)) if postgres::is_undefined_table(&error) => Vec::new(),
        Err(error) => return Err(explain(connection, error).await),
    };
    let newest = applied.iter().map(|migration| migration.version).max().unwrap_or(0);
    if newest > known_version() {
        return Err(MigrationError::DatabaseIsNewer { applied: newest, known: known_version() });
    }
    for migration in MIGRATIONS.iter() {
        match applied.iter().find(|applied| applied.version == migration.version) {
            None => return Err(refusal),
            Some(applied) if applied.checksum != migration.checksum => {
                return Err(MigrationError::Edited(migration.version));
            }
            Some(_) => {}
        }
    }
    Ok(known_version())
}

fn unreachable(error: sqlx::Error) -> MigrationError {
    match pooler::fault(&error) {
        Some(_) => MigrationError::UnfitPooler(error),
        None => MigrationError::Unreachable(error),
    }
}

async fn explain(connection: &mut PgConnection, error: MigrateError) -> MigrationError {
    match error {
        MigrateError::VersionMissing(_) => {
            let applied = connection.list_applied_migrations("_sqlx_migrations").await.unwrap_or_default();
            let applied = applied.iter().map(|migration| migration.version).max().unwrap_or(0);
            MigrationError::DatabaseIsNewer { applied, known: known_version() }
        }
        MigrateError::VersionMismatch(version) => MigrationError::Edited(version),
        MigrateError::Execute(error @ (sqlx::Error::Io(_) | sqlx::Error::PoolTimedOut)) => {
            MigrationError::Unreachable(error)
        }
        MigrateError::Execute(error) if pooler::fault(&error).is_some() => MigrationError::UnfitPooler(error),
        error => MigrationError::Failed(error),
    }
}
