//! Postgres: the connection pool, how a statement is run, and what its errors mean.

use std::sync::Arc;
use std::time::Duration;

use sqlx::pool::PoolConnection;
use sqlx::postgres::{PgConnectOptions, PgDatabaseError, PgPoolOptions};
use sqlx::{Connection as _, PgConnection, PgPool, Postgres};

use super::operation::Operation;
use crate::config::Config;
use crate::telemetry::metrics::Metrics;
use crate::telemetry::trace::{self, ServerAttributes};

/// How long a request may wait for a connection: longer than a reconnect takes, shorter than a client's patience, which
/// is 10 s by default. A request that waits longer is answered with 503.
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(3);

/// How long a connection outside the pool may take to open.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// A setting that the service asks for at the start of each session, and of which Postgres itself knows nothing. A pooler
/// that shares sessions does not pass it on.
pub(super) const OWN_SESSION: &str = "chat_service.own_session";

/// The connection pool. Every statement of a request runs through it, and so is counted, timed and traced.
#[derive(Clone, Debug)]
pub struct Database {
    pool: PgPool,
    server: ServerAttributes,
    metrics: Arc<Metrics>,
}

/// A pool that connects when it is first needed, so that the process starts, and stays alive, without Postgres.
pub fn pool(config: &Config, options: PgConnectOptions) -> PgPool {
    let timeout = config.db_statement_timeout_ms.to_string();
    PgPoolOptions::new()
        .max_connections(config.db_pool_max)
        .acquire_timeout(ACQUIRE_TIMEOUT)
        .idle_timeout(Duration::from_secs(600))
        .connect_lazy_with(options.options([("statement_timeout", timeout.as_str()), (OWN_SESSION, "on")]))
}

impl Database {
    pub fn new(pool: PgPool, metrics: Arc<Metrics>) -> Self {
        let options = pool.connect_options();
        let database = options.get_database().unwrap_or_else(|| options.get_username());
        let server = ServerAttributes::new(options.get_host(), options.get_port(), database);
        Self { pool, server, metrics }
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

    /// Runs the work of an operation, timed and traced.
    pub async fn run<T>(
        &self,
        operation: Operation,
        work: impl Future<Output = Result<T, sqlx::Error>>,
    ) -> Result<T, sqlx::Error> {
        let _timer = self.metrics.operation_started(operation.name());
        let span = trace::operation(operation.name(), &self.server);
        let outcome = work.await;
        if let (Some(span), Err(error)) = (&span, &outcome) {
            match error {
                sqlx::Error::Database(error) => span.operation_failed(error.code().as_deref(), "database"),
                sqlx::Error::Io(_) => span.operation_failed(None, "io"),
                _ => span.operation_failed(None, "_OTHER"),
            }
        }
        outcome
    }
}

/// Opens one connection, outside any pool, within a limit.
pub async fn connect(options: &PgConnectOptions) -> Result<PgConnection, sqlx::Error> {
    tokio::time::timeout(CONNECT_TIMEOUT, PgConnection::connect_with(options))
        .await
        .unwrap_or(Err(sqlx::Error::PoolTimedOut))
}

/// True when Postgres cannot serve now: nothing is known to be wrong with the request.
pub fn is_unavailable(error: &sqlx::Error) -> bool {
    /// SQLSTATE classes: connection exception, insufficient resources, operator intervention, system error.
    const UNAVAILABLE_CLASSES: [&str; 4] = ["08", "53", "57", "58"];
    const UNAVAILABLE_CODES: [&str; 7] = [
        "25006", // read_only_sql_transaction: a standby answers
        "28000", "28P01", // invalid_authorization_specification, invalid_password
        "3D000", // invalid_catalog_name: the database does not exist yet
        "42703", "42P01", // undefined_column, undefined_table: nor does the schema
        "55P03", // lock_not_available
    ];
    match error {
        sqlx::Error::Io(_)
        | sqlx::Error::Tls(_)
        | sqlx::Error::Protocol(_)
        | sqlx::Error::PoolTimedOut
        | sqlx::Error::PoolClosed
        | sqlx::Error::WorkerCrashed => true,
        error => code(error).is_some_and(|code| {
            UNAVAILABLE_CLASSES.iter().any(|class| code.starts_with(class))
                || UNAVAILABLE_CODES.contains(&code)
                || is_foreign_statement(error)
        }),
    }
}

/// True when Postgres refused the connection only for now: it starts, stops, or has none to spare. A server that cannot
/// be reached at all may come, too; one that refuses the credentials will refuse them again.
pub fn may_connect_later(error: &sqlx::Error) -> bool {
    match error {
        // admin_shutdown, cannot_connect_now, too_many_connections
        sqlx::Error::Database(_) => matches!(code(error), Some("57P01" | "57P03" | "53300")),
        sqlx::Error::Configuration(_) => false,
        _ => true,
    }
}

/// True when a prepared statement is missing, or another has its name: a pooler has changed the session.
pub fn is_foreign_statement(error: &sqlx::Error) -> bool {
    // invalid_sql_statement_name, duplicate_prepared_statement
    matches!(code(error), Some("26000" | "42P05"))
}

/// True when a repetition may succeed: the statement lost a deadlock or a serialization conflict.
pub fn is_conflict(error: &sqlx::Error) -> bool {
    code(error).is_some_and(|code| code.starts_with("40"))
}

/// True when the schema is not there yet.
pub fn is_undefined_table(error: &sqlx::Error) -> bool {
    code(error) == Some("42P01")
}

/// The name of the constraint that the statement violated.
pub fn violated_constraint(error: &sqlx::Error) -> Option<&str> {
    error.as_database_error()?.constraint()
}

/// The fix for a connection that Postgres refuses, or that cannot be opened.
pub fn connect_fix(error: &sqlx::Error) -> &'static str {
    match code(error) {
        Some("28P01" | "28000") => "correct DB_USER and DB_PASSWORD, or DATABASE_URL",
        Some("3D000") => "create the database (`createdb`), or correct DB_NAME",
        Some("53300") => "raise max_connections of Postgres, or lower DB_POOL_MAX",
        _ => "start Postgres, or correct DB_HOST and DB_PORT, or DATABASE_URL",
    }
}

/// The SQLSTATE of an error that Postgres reported.
fn code(error: &sqlx::Error) -> Option<&str> {
    error.as_database_error()?.try_downcast_ref::<PgDatabaseError>().map(PgDatabaseError::code)
}
