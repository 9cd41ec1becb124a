//! The migrations of the schema: applying them, and their status in a database.

use std::cmp::Ordering;
use std::fmt;
use std::sync::LazyLock;
use std::time::Duration;

use sqlx::migrate::{Migrate as _, MigrateError, Migrator};
use sqlx::postgres::PgConnectOptions;
use sqlx::{AssertSqlSafe, Connection as _, PgConnection};
use tokio::time::Instant;

use super::access::{self, Lacking, NotUtf8};
use super::email_keys;
use super::operation::Operation;
use super::pooler;
use super::position_server;
use super::postgres::{self, Database, ReadOnly, why_read_only};

/// The migrations that this binary was built with.
static MIGRATIONS: LazyLock<Migrator> = LazyLock::new(|| {
    let mut migrations = sqlx::migrate!("./migrations");
    // `migrate` takes the lock itself.
    migrations.set_locking(false);
    migrations
});

/// How long a migration may take, with the wait for other replicas'. It has no statement timeout: a migration that is
/// cut off half-way would only start again.
const MIGRATE_TIMEOUT: Duration = Duration::from_secs(600);

/// How long a migration may wait for the lock of a table. Everyone who uses the table waits behind it, so it gives up
/// before their requests do, lets them pass, and starts again.
const LOCK_TIMEOUT_MS: u32 = 2000;
const LOCK_RETRY: Duration = Duration::from_secs(1);

/// How sqlx makes the number of its lock from the database's name.
const LOCK_OF_SQLX: i64 = 0x3d32_ad9e;
const CRC_32: crc::Crc<u32> = crc::Crc::<u32>::new(&crc::CRC_32_ISO_HDLC);
const LOCK_POLL: Duration = Duration::from_millis(100);

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
    /// It is current, but the role lacks that many privileges, or tables: requests fail.
    Forbidden { version: i64, lacking: usize },
    /// The database cannot hold every text.
    NotUtf8 { version: i64 },
}

impl Schema {
    /// The newest applied migration, 0 where there is none, or the role may not see it.
    pub fn version(self) -> i64 {
        match self {
            Self::Behind { version }
            | Self::Current { version }
            | Self::Forbidden { version, .. }
            | Self::NotUtf8 { version } => version,
        }
    }
}

/// What an operator has to change so that the service can work with the database.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    NotUtf8(NotUtf8),
    Lacking(Lacking),
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotUtf8(fault) => fault.fmt(f),
            Self::Lacking(lacking) => lacking.fmt(f),
        }
    }
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
    #[error("Postgres only reads, {}, so nothing can be migrated: {}", .0.reason(), .0.fix())]
    ReadOnly(ReadOnly),
    #[error("{0}")]
    NotUtf8(NotUtf8),
    /// Whether anything is to be migrated is unknown.
    #[error("{0}")]
    Lacking(Lacking),
    #[error(
        "migrations are pending, and Postgres is behind a pooler in transaction mode, where their lock does not hold: run \
         `chat-service migrate` with a DATABASE_URL that leads straight to Postgres"
    )]
    Pooled,
    #[error("{}", pooler::reason(.0))]
    UnfitPooler(sqlx::Error),
    // Without `#[source]`: the cause is in the text, and would be said again.
    #[error("Postgres cannot be reached: {}", postgres::reason(.0))]
    Unreachable(sqlx::Error),
    #[error("the migration failed: {}", failure(.0))]
    Failed(MigrateError),
}

impl MigrationError {
    /// True when a repetition may succeed.
    pub fn is_temporary(&self) -> bool {
        match self {
            Self::Unreachable(_) | Self::ReadOnly(_) | Self::TimedOut => true,
            // There may be nothing to migrate. The service waits for the grants, unready.
            Self::Lacking(_) => true,
            Self::Failed(MigrateError::Execute(error) | MigrateError::ExecuteMigration(error, _)) => {
                postgres::is_temporary(error)
            }
            _ => false,
        }
    }
}

/// Why a migration failed, and what to do where that is known.
fn failure(error: &MigrateError) -> String {
    let (error, place) = match error {
        MigrateError::Execute(error) => (error, String::new()),
        MigrateError::ExecuteMigration(error, version) => (error, format!("migration {version}: ")),
        error => return error.to_string(),
    };
    let fix = if postgres::is_forbidden(error) {
        ": migrate with the role that owns the schema, or `GRANT CREATE ON SCHEMA ... TO ...` in a new database; with \
         MIGRATE_ON_START=false the service itself needs no such role"
    } else {
        ""
    };
    format!("{place}{}{fix}", postgres::reason(error))
}

/// The version of the newest migration that this binary knows.
pub fn known_version() -> i64 {
    MIGRATIONS.iter().map(|migration| migration.version).max().unwrap_or(0)
}

/// Why a schema of this version is not this binary's, and what to do; `None` if it is.
pub(crate) fn version_fault(version: i64) -> Option<String> {
    let known = known_version();
    match version.cmp(&known) {
        Ordering::Greater => Some(format!(
            "version {version}, newer than this binary, which knows {known}: run the newer release"
        )),
        Ordering::Less => {
            Some(format!("version {version}, this binary needs {known}: run `chat-service migrate`"))
        }
        Ordering::Equal => None,
    }
}

/// Brings the schema up to date on a dedicated connection. Any number of processes may do so at once: an advisory lock
/// admits one at a time, and the others then find nothing to do. A schema that is current is only read: its role needs
/// no more than to serve, and no other process's migration is waited for.
pub async fn migrate(options: &PgConnectOptions) -> Result<i64, MigrationError> {
    let work = async {
        let mut connection = postgres::connect(options).await.map_err(unreachable)?;
        // A lock or a setting of the session would become another client's.
        let pooled = pooler::shares_sessions(&mut connection, options).await;
        let read_only = postgres::read_only(&mut connection).await.map_err(unreachable)?;
        if let Some(why) = read_only {
            return Err(MigrationError::ReadOnly(why));
        }
        let not_utf8 = access::encoding(&mut connection).await.map_err(failed)?;
        if let Some(fault) = not_utf8 {
            return Err(MigrationError::NotUtf8(fault));
        }
        let current = is_current(&mut connection).await?;
        if pooled {
            return if current { Ok(known_version()) } else { Err(MigrationError::Pooled) };
        }
        lift_timeouts(&mut connection).await.map_err(failed)?;
        if !current {
            run(&mut connection).await?;
        }
        if let Err(error) = email_keys::fold(&mut connection).await {
            return Err(refused(&mut connection, error).await);
        }
        if let Err(error) = position_server::adopt(&mut connection).await {
            return Err(refused(&mut connection, error).await);
        }
        connection.close().await.ok();
        Ok(known_version())
    };
    tokio::time::timeout(MIGRATE_TIMEOUT, work).await.unwrap_or(Err(MigrationError::TimedOut))
}

/// Whether every migration of this binary was applied as it is, and no other.
async fn is_current(connection: &mut PgConnection) -> Result<bool, MigrationError> {
    let query = "SELECT version, checksum FROM _sqlx_migrations WHERE success";
    let applied: Vec<(i64, Vec<u8>)> = match sqlx::query_as(query).fetch_all(&mut *connection).await {
        Ok(applied) => applied,
        Err(error) if postgres::is_forbidden(&error) => {
            return Err(refused(connection, error).await);
        }
        // What is wrong, the migration itself will say.
        Err(error) if postgres::is_undefined_table(&error) => return Ok(false),
        Err(error) => return Err(failed(error)),
    };
    let newest = applied.iter().map(|(version, _)| *version).max().unwrap_or(0);
    for (version, checksum) in &applied {
        match MIGRATIONS.iter().find(|migration| migration.version == *version) {
            None => {
                return Err(MigrationError::DatabaseIsNewer { applied: newest, known: known_version() });
            }
            Some(migration) if *migration.checksum != **checksum => {
                return Err(MigrationError::Edited(*version));
            }
            Some(_) => {}
        }
    }
    Ok(applied.len() == MIGRATIONS.iter().count())
}

/// Timeouts that the role or the database has are meant for requests. Which there are depends on Postgres' version. Where
/// none is set, nothing is changed.
async fn lift_timeouts(connection: &mut PgConnection) -> Result<(), sqlx::Error> {
    let query = sqlx::query(
        "SELECT set_config(name, '0', false) FROM pg_settings WHERE name IN ('statement_timeout', 'lock_timeout',
         'idle_in_transaction_session_timeout', 'idle_session_timeout', 'transaction_timeout') AND setting <> '0'",
    );
    query.execute(connection).await.map(drop)
}

/// Applies what is pending. Only the wait for a table is limited.
async fn run(connection: &mut PgConnection) -> Result<(), MigrationError> {
    lock(connection).await.map_err(failed)?;
    let mut reported = false;
    for (version, outside_transaction) in
        MIGRATIONS.iter().map(|migration| (migration.version, migration.no_tx))
    {
        // One outside a transaction may not be cut off: what it has done until then would stay.
        let limit = if outside_transaction { 0 } else { LOCK_TIMEOUT_MS };
        let limit = format!("SET lock_timeout = {limit}");
        sqlx::raw_sql(AssertSqlSafe(limit)).execute(&mut *connection).await.map_err(failed)?;
        if outside_transaction {
            drop_invalid_indexes(connection).await.map_err(failed)?;
        }
        loop {
            match MIGRATIONS.run_direct(Some(version), &mut *connection, false).await {
                Ok(()) => break,
                Err(MigrateError::Execute(error) | MigrateError::ExecuteMigration(error, _))
                    if postgres::is_lock_timeout(&error) =>
                {
                    if !reported {
                        tracing::warn!("a migration waits for a table that is in use: trying again");
                        reported = true;
                    }
                    tokio::time::sleep(LOCK_RETRY).await;
                }
                Err(error) => return Err(explain(connection, error).await),
            }
        }
    }
    sqlx::raw_sql("SET lock_timeout = 0").execute(connection).await.map(drop).map_err(failed)
}

/// Takes the lock that sqlx would take, so that older releases respect it, but does not wait for it in a statement: who builds
/// an index beside the requests waits for every statement that has begun before.
async fn lock(connection: &mut PgConnection) -> Result<(), sqlx::Error> {
    let database: String =
        sqlx::query_scalar("SELECT current_database()::text").fetch_one(&mut *connection).await?;
    let key = LOCK_OF_SQLX * i64::from(CRC_32.checksum(database.as_bytes()));
    loop {
        let query = sqlx::query_scalar("SELECT pg_try_advisory_lock($1)").bind(key);
        if query.fetch_one(&mut *connection).await? {
            return Ok(());
        }
        tokio::time::sleep(LOCK_POLL).await;
    }
}

/// What is left of an index that was built beside the requests, where the migration that built it was cut off: nobody uses
/// it, and it has the name that the next attempt needs.
async fn drop_invalid_indexes(connection: &mut PgConnection) -> Result<(), sqlx::Error> {
    let invalid: Vec<String> = sqlx::query_scalar(
        "SELECT i.indexrelid::regclass::text FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid
         WHERE NOT i.indisvalid AND c.relnamespace = (SELECT relnamespace FROM pg_class WHERE oid = to_regclass('messages'))",
    )
    .fetch_all(&mut *connection)
    .await?;
    for index in invalid {
        tracing::warn!(index, "an index that was not finished is built again");
        let drop = format!("DROP INDEX CONCURRENTLY {index}");
        sqlx::raw_sql(AssertSqlSafe(drop)).execute(&mut *connection).await?;
    }
    Ok(())
}

/// What the role lacks, if the schema is there, or else the error.
async fn refused(connection: &mut PgConnection, error: sqlx::Error) -> MigrationError {
    if !postgres::is_forbidden(&error) {
        return explain(connection, MigrateError::Execute(error)).await;
    }
    match access::lacking(connection).await {
        Ok(Some(lacking)) if !lacking.is_nothing() => MigrationError::Lacking(lacking),
        _ => failed(error),
    }
}

fn failed(error: sqlx::Error) -> MigrationError {
    MigrationError::Failed(MigrateError::Execute(error))
}

/// As [`migrate`], but tries again for as long as `wait` while Postgres cannot be reached.
pub async fn migrate_with_retry(options: &PgConnectOptions, wait: Duration) -> Result<i64, MigrationError> {
    let deadline = Instant::now() + wait;
    let mut reported = false;
    loop {
        match migrate(options).await {
            Err(error) if may_succeed_later(&error) && Instant::now() < deadline => {
                if !reported {
                    let left = (deadline - Instant::now()).as_secs();
                    eprintln!("{error}; trying again for {left} s");
                    reported = true;
                }
                tokio::time::sleep(CONNECT_RETRY).await;
            }
            outcome => return outcome,
        }
    }
}

/// What readiness depends on.
#[derive(Debug)]
pub struct Answer {
    pub schema: Schema,
    pub fault: Option<Fault>,
    /// Why Postgres takes no writes.
    pub read_only: Option<ReadOnly>,
}

/// Asks Postgres for all that readiness depends on: the schema's version, the encoding, what the role may do, and whether
/// it takes writes. One statement, unless something is wrong.
pub async fn schema(database: &Database) -> Result<Answer, sqlx::Error> {
    let mut connection = database.acquire().await?;
    let (tables, privileges) = access::needed();
    let query = sqlx::query_as(AssertSqlSafe(access::probe())).bind(tables).bind(privileges);
    let answer: Result<(Option<i64>, String, i64, bool, bool), _> =
        database.run(Operation::CheckSchema, query.fetch_one(&mut *connection)).await;
    let (version, read_only) = match answer {
        Ok((version, encoding, lacking, in_recovery, read_only)) => {
            let (version, read_only) = (version.unwrap_or(0), why_read_only(in_recovery, read_only));
            if encoding == access::ENCODING && lacking == 0 {
                return Ok(Answer { schema: state_of(version), fault: None, read_only });
            }
            (version, read_only)
        }
        Err(error) if postgres::is_undefined_table(&error) || postgres::is_forbidden(&error) => {
            (0, postgres::read_only(&mut connection).await?)
        }
        Err(error) => return Err(error),
    };
    let (schema, fault) = examine(&mut connection, version).await?;
    Ok(Answer { schema, fault, read_only })
}

/// Finds out what is wrong, or which migrations are missing.
async fn examine(
    connection: &mut PgConnection,
    version: i64,
) -> Result<(Schema, Option<Fault>), sqlx::Error> {
    if let Some(fault) = access::encoding(connection).await? {
        return Ok((Schema::NotUtf8 { version }, Some(Fault::NotUtf8(fault))));
    }
    Ok(match access::lacking(connection).await? {
        Some(lacking) if lacking.is_nothing() => (state_of(version), None),
        // Not migrated yet, where search_path leads; or some tables are still to come.
        Some(lacking) if !lacking.is_on_path || (1..known_version()).contains(&version) => {
            (Schema::Behind { version }, Some(Fault::Lacking(lacking)))
        }
        Some(lacking) => {
            (Schema::Forbidden { version, lacking: lacking.count() }, Some(Fault::Lacking(lacking)))
        }
        None => (Schema::Behind { version }, None),
    })
}

fn state_of(version: i64) -> Schema {
    if version < known_version() { Schema::Behind { version } } else { Schema::Current { version } }
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

/// A repetition may succeed: Postgres was not up, or did not take writes yet.
fn may_succeed_later(error: &MigrationError) -> bool {
    match error {
        MigrationError::Unreachable(error) => postgres::may_connect_later(error),
        MigrationError::ReadOnly(_) => true,
        _ => false,
    }
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
        // Since it was asked.
        MigrateError::Execute(error) if postgres::is_read_only(&error) => {
            MigrationError::ReadOnly(ReadOnly::Setting)
        }
        MigrateError::Execute(error) if pooler::fault(&error).is_some() => MigrationError::UnfitPooler(error),
        error => MigrationError::Failed(error),
    }
}
