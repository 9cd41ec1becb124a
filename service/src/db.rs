//! Postgres: how to reach it, the pool, the migrations and the schema's version.

use std::str::FromStr as _;
use std::sync::Arc;
use std::time::Duration;

use secrecy::ExposeSecret as _;
use sqlx::migrate::{Migrate as _, MigrateError, Migrator};
use sqlx::pool::PoolConnection;
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};
use sqlx::{Connection as _, PgConnection, PgPool, Postgres};
use tokio::time::Instant;

use crate::call::Call;
use crate::config::Config;
use crate::metrics::Metrics;
use crate::trace::{self, Place};

/// The migrations that this binary was built with.
static MIGRATIONS: Migrator = sqlx::migrate!("./migrations");

/// How long a request may wait for a connection. Under it lies the time of a reconnect, above it a client's
/// patience: a request has 10 s by default, and the answer to waiting longer is 503.
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(3);

/// How long a migration may take, waiting for other replicas' included. No statement time-out applies to it:
/// a migration that is cut off half-way would only start again.
const MIGRATE_TIMEOUT: Duration = Duration::from_secs(600);

/// How long a connection outside the pool may take to open.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Between two attempts to reach a Postgres that is waited for.
const WAIT_RETRY: Duration = Duration::from_secs(1);

/// The pool's name in the metrics.
pub const POOL_NAME: &str = "chat";

/// The pool, and what is told of its use.
#[derive(Clone, Debug)]
pub struct Database {
    pool: PgPool,
    place: Place,
    metrics: Arc<Metrics>,
}

/// How the schema stands against what this binary needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Schema {
    /// Migrations are missing: the service waits for them, unready.
    Behind { version: i64 },
    /// Everything that this binary needs is there. A newer schema is fine for a process that already runs: a
    /// migration only adds until the last old process is gone.
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
    #[error("Postgres cannot be reached: {0}")]
    Unreachable(#[source] sqlx::Error),
    #[error("the migration failed: {0}")]
    Failed(#[source] MigrateError),
}

/// The options that DATABASE_URL, or else DB_*, describe. The error names the fault without the password.
pub fn connect_options(config: &Config) -> Result<PgConnectOptions, String> {
    let options = match &config.database_url {
        Some(url) => {
            let url = url.expose_secret();
            if !url.starts_with("postgres://") && !url.starts_with("postgresql://") {
                return Err("it does not begin with postgres://".to_owned());
            }
            PgConnectOptions::from_str(url).map_err(|error| error.to_string())?
        }
        None => PgConnectOptions::new_without_pgpass()
            .host(&config.db_host)
            .port(config.db_port)
            .username(&config.db_user)
            .password(config.db_password.expose_secret())
            .database(&config.db_name),
    };
    Ok(options.application_name("chat-service"))
}

/// A pool that connects when it is first needed, so that the process starts, and stays alive, without Postgres.
pub fn pool(config: &Config, options: PgConnectOptions) -> PgPool {
    let timeout = config.db_statement_timeout_ms.to_string();
    PgPoolOptions::new()
        .max_connections(config.db_pool_max)
        .acquire_timeout(ACQUIRE_TIMEOUT)
        .idle_timeout(Duration::from_secs(600))
        .connect_lazy_with(options.options([("statement_timeout", timeout)]))
}

impl Database {
    pub fn new(pool: PgPool, metrics: Arc<Metrics>) -> Self {
        let options = pool.connect_options();
        let database = options.get_database().unwrap_or_else(|| options.get_username());
        let place = Place::new(options.get_host(), options.get_port(), database);
        Self { pool, place, metrics }
    }

    pub fn pool(&self) -> &PgPool {
        &self.pool
    }

    /// A connection, waited for no longer than [`ACQUIRE_TIMEOUT`].
    pub async fn acquire(&self) -> Result<PoolConnection<Postgres>, sqlx::Error> {
        self.pool.acquire().await.inspect_err(|error| {
            if matches!(error, sqlx::Error::PoolTimedOut) {
                self.metrics.pool_timed_out();
            }
        })
    }

    /// Does the work of a call, timed and traced.
    pub async fn run<T>(
        &self,
        call: Call,
        work: impl Future<Output = Result<T, sqlx::Error>>,
    ) -> Result<T, sqlx::Error> {
        let _timer = self.metrics.call_started(call);
        let span = trace::call(call, &self.place);
        let outcome = work.await;
        if let (Some(span), Err(error)) = (&span, &outcome) {
            match error {
                sqlx::Error::Database(error) => span.call_failed(error.code().as_deref(), "database"),
                sqlx::Error::Io(_) => span.call_failed(None, "io"),
                _ => span.call_failed(None, "_OTHER"),
            }
        }
        outcome
    }
}

/// The version of the newest migration that this binary knows.
pub fn known_version() -> i64 {
    MIGRATIONS.iter().map(|migration| migration.version).max().unwrap_or(0)
}

/// Brings the schema up to date on a connection of its own. Any number of processes may do so at once: an
/// advisory lock lets one through at a time, and the rest find nothing to do.
pub async fn migrate(options: &PgConnectOptions) -> Result<i64, MigrationError> {
    let work = async {
        let mut connection = connect(options).await.map_err(MigrationError::Unreachable)?;
        let outcome = MIGRATIONS.run_direct(None, &mut connection, false).await;
        if let Err(error) = outcome {
            return Err(explain(&mut connection, error).await);
        }
        connection.close().await.ok();
        Ok(known_version())
    };
    tokio::time::timeout(MIGRATE_TIMEOUT, work).await.unwrap_or(Err(MigrationError::TimedOut))
}

/// As [`migrate`], and while Postgres is away, or starts, tries again for so long. A wrong password is no reason to
/// wait.
pub async fn migrate_patiently(options: &PgConnectOptions, wait: Duration) -> Result<i64, MigrationError> {
    let deadline = Instant::now() + wait;
    let mut told = false;
    loop {
        match migrate(options).await {
            Err(MigrationError::Unreachable(error)) if may_come(&error) && Instant::now() < deadline => {
                if !told {
                    let left = (deadline - Instant::now()).as_secs();
                    eprintln!("Postgres cannot be reached: {error}; trying again for {left} s");
                    told = true;
                }
                tokio::time::sleep(WAIT_RETRY).await;
            }
            outcome => return outcome,
        }
    }
}

/// True unless Postgres answered, and its answer will be the same the next time.
fn may_come(error: &sqlx::Error) -> bool {
    match error {
        // Starting, stopping, or full.
        sqlx::Error::Database(error) => matches!(error.code().as_deref(), Some("57P01" | "57P03" | "53300")),
        sqlx::Error::Configuration(_) => false,
        _ => true,
    }
}

/// Opens one connection, outside any pool, within a limit.
pub async fn connect(options: &PgConnectOptions) -> Result<PgConnection, sqlx::Error> {
    tokio::time::timeout(CONNECT_TIMEOUT, PgConnection::connect_with(options))
        .await
        .unwrap_or(Err(sqlx::Error::PoolTimedOut))
}

/// Asks Postgres for the schema's version; this is what readiness stands on.
pub async fn schema(database: &Database) -> Result<Schema, sqlx::Error> {
    let mut connection = database.acquire().await?;
    let query = sqlx::query_scalar("SELECT max(version) FROM _sqlx_migrations WHERE success");
    let version: Result<Option<i64>, _> =
        database.run(Call::CheckSchema, query.fetch_one(&mut *connection)).await;
    let version = match version {
        Ok(version) => version.unwrap_or(0),
        Err(sqlx::Error::Database(error)) if error.code().as_deref() == Some("42P01") => 0, // undefined_table
        Err(error) => return Err(error),
    };
    Ok(if version < known_version() { Schema::Behind { version } } else { Schema::Current { version } })
}

/// How one migration stands in a database.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    Applied,
    Pending,
    /// Its script is not the one that was applied.
    Modified,
    /// Applied by a newer release: this binary does not know it.
    Unknown,
}

/// Every migration that this binary or the database knows: its version, what it is called, how it stands.
pub async fn standings(options: &PgConnectOptions) -> Result<Vec<(i64, String, Standing)>, sqlx::Error> {
    let mut connection = connect(options).await?;
    let rows: Result<Vec<(i64, String, Vec<u8>)>, _> = sqlx::query_as(
        "SELECT version, description, checksum FROM _sqlx_migrations WHERE success ORDER BY version",
    )
    .fetch_all(&mut connection)
    .await;
    let applied = match rows {
        Ok(rows) => rows,
        Err(sqlx::Error::Database(error)) if error.code().as_deref() == Some("42P01") => Vec::new(), // undefined_table
        Err(error) => return Err(error),
    };
    connection.close().await.ok();
    let known = MIGRATIONS.iter().map(|migration| {
        let row = applied.iter().find(|(version, ..)| *version == migration.version);
        let standing = match row {
            None => Standing::Pending,
            Some((.., checksum)) if *checksum == *migration.checksum => Standing::Applied,
            Some(_) => Standing::Modified,
        };
        (migration.version, migration.description.to_string(), standing)
    });
    let is_unknown = |version: i64| MIGRATIONS.iter().all(|migration| migration.version != version);
    let unknown = applied.iter().filter(|(version, ..)| is_unknown(*version));
    let unknown = unknown.map(|(version, description, _)| (*version, description.clone(), Standing::Unknown));
    Ok(known.chain(unknown).collect())
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
        error => MigrationError::Failed(error),
    }
}
