//! Postgres: the connection pool, how a statement is run, and what its errors mean.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use sqlx::pool::PoolConnection;
use sqlx::postgres::{PgConnectOptions, PgDatabaseError, PgPoolOptions};
use sqlx::{Connection as _, PgConnection, PgPool, Postgres};

use super::operation::Operation;
use crate::config::Config;
use crate::telemetry::causes::causes;
use crate::telemetry::metrics::Metrics;
use crate::telemetry::trace::{self, ServerAttributes};

/// How long a request may wait for a connection: longer than a reconnect takes, shorter than a client's patience, which
/// is 10 s by default. A request that waits longer is answered with 503.
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(3);

/// How long a connection outside the pool may take to open.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// A fault of the installation fails every request: it is logged no more often than this.
const FAULT_INTERVAL: Duration = Duration::from_secs(60);

/// The connection pool. Every statement of a request runs through it, and so is counted, timed and traced.
#[derive(Clone, Debug)]
pub struct Database {
    pool: PgPool,
    server: ServerAttributes,
    metrics: Arc<Metrics>,
    /// When a fault of the installation was logged last.
    fault_logged: Arc<Mutex<Option<Instant>>>,
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
        let server = ServerAttributes::new(options.get_host(), options.get_port(), database);
        Self { pool, server, metrics, fault_logged: Arc::default() }
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
        // The health task logs what it finds itself.
        if let Err(error) = &outcome
            && operation != Operation::CheckSchema
            && let Some(fix) = installation_fix(error)
        {
            self.log_fault(error, fix);
        }
        outcome
    }

    fn log_fault(&self, error: &sqlx::Error, fix: &'static str) {
        let mut logged = self.fault_logged.lock().unwrap_or_else(PoisonError::into_inner);
        if logged.is_none_or(|logged| logged.elapsed() >= FAULT_INTERVAL) {
            *logged = Some(Instant::now());
            tracing::error!(
                error = reason(error),
                fix,
                "Postgres refuses what the service needs: requests get 503"
            );
        }
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
    const UNAVAILABLE_CODES: [&str; 8] = [
        "25006", // read_only_sql_transaction: a standby answers
        "25P03", "25P04", // idle_in_transaction_session_timeout, transaction_timeout
        "28000", "28P01", // invalid_authorization_specification, invalid_password
        "3D000", // invalid_catalog_name: the database does not exist yet
        "42P01", // undefined_table: nor does the schema
        "55P03", // lock_not_available
    ];
    match error {
        sqlx::Error::Io(_)
        | sqlx::Error::Tls(_)
        | sqlx::Error::Protocol(_)
        // The connection's: a password or a certificate that cannot be used.
        | sqlx::Error::Configuration(_)
        | sqlx::Error::PoolTimedOut
        | sqlx::Error::PoolClosed
        | sqlx::Error::WorkerCrashed => true,
        error => {
            installation_fix(error).is_some()
                || code(error).is_some_and(|code| {
                    UNAVAILABLE_CLASSES.iter().any(|class| code.starts_with(class))
                        || UNAVAILABLE_CODES.contains(&code)
                })
        }
    }
}

/// The fix for a fault of the installation, which fails requests until an operator has removed it. Statements are checked
/// against the schema when they are compiled, so what is missing was dropped, or was never there.
pub fn installation_fix(error: &sqlx::Error) -> Option<&'static str> {
    match code(error)? {
        // insufficient_privilege
        "42501" => Some("run `chat-service doctor`: it prints the grants that the role lacks"),
        // untranslatable_character
        "22P05" => Some("move to a database with the encoding UTF8: `chat-service doctor` says how"),
        // invalid_schema_name, undefined_column
        "3F000" | "42703" => Some("run `chat-service migrate`, and see that search_path leads to the tables"),
        // feature_not_supported, undefined_function, undefined_object, no unique index for ON CONFLICT
        "0A000" | "42883" | "42704" | "42P10" => {
            Some("undo what was changed by hand in the schema, and restart; use Postgres 13 or newer")
        }
        _ => None,
    }
}

/// True when one text of the statement cannot be stored in this database, while others can.
pub fn is_untranslatable(error: &sqlx::Error) -> bool {
    code(error) == Some("22P05")
}

/// True when a repetition may succeed without anyone's help.
pub fn is_temporary(error: &sqlx::Error) -> bool {
    /// SQLSTATE classes: connection exception, transaction rollback, insufficient resources, operator intervention.
    const TEMPORARY_CLASSES: [&str; 4] = ["08", "40", "53", "57"];
    match error {
        sqlx::Error::Io(_) | sqlx::Error::PoolTimedOut | sqlx::Error::Protocol(_) => true,
        error => code(error).is_some_and(|code| {
            TEMPORARY_CLASSES.iter().any(|class| code.starts_with(class))
                || is_lock_timeout(error)
                || matches!(code, "25P03" | "25P04")
        }),
    }
}

/// True when a lock was not free in time.
pub fn is_lock_timeout(error: &sqlx::Error) -> bool {
    code(error) == Some("55P03")
}

/// True when this role may not do it.
pub fn is_forbidden(error: &sqlx::Error) -> bool {
    code(error) == Some("42501")
}

/// What went wrong, said once and without what helps only Postgres' developers: sqlx repeats a cause in each error around
/// it, and adds the line of Postgres' own source.
pub fn reason(error: &sqlx::Error) -> String {
    match error {
        sqlx::Error::Database(database) => {
            let code = code(error).unwrap_or("no SQLSTATE");
            format!("{} (SQLSTATE {code})", database.message())
        }
        sqlx::Error::Io(error) => causes(error),
        sqlx::Error::Tls(error) => format!("TLS: {}", causes(&**error)),
        sqlx::Error::PoolTimedOut => "no connection in time".to_owned(),
        // sqlx quotes the character.
        error if is_unfit_password(error) => {
            "the user or the password has a character that none may have, such as a line break".to_owned()
        }
        error => causes(error),
    }
}

fn is_unfit_password(error: &sqlx::Error) -> bool {
    matches!(error, sqlx::Error::Configuration(error) if error.to_string().contains("saslprep"))
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
    match error {
        sqlx::Error::Configuration(_) if is_unfit_password(error) => {
            return "correct DB_USER and DB_PASSWORD, or DATABASE_URL";
        }
        sqlx::Error::Configuration(_) | sqlx::Error::Tls(_) => {
            return "correct sslmode and the certificates of DATABASE_URL, or the server's TLS";
        }
        _ => {}
    }
    match code(error) {
        Some("28P01" | "28000") => "correct DB_USER and DB_PASSWORD, or DATABASE_URL",
        Some("42501") => "as the database's owner run `GRANT CONNECT ON DATABASE ... TO ...`",
        Some("3D000") => "create the database (`createdb`), or correct DB_NAME",
        Some("53300") => "raise max_connections of Postgres, or lower DB_POOL_MAX",
        _ => "start Postgres, or correct DB_HOST and DB_PORT, or DATABASE_URL",
    }
}

/// The SQLSTATE of an error that Postgres reported.
fn code(error: &sqlx::Error) -> Option<&str> {
    error.as_database_error()?.try_downcast_ref::<PgDatabaseError>().map(PgDatabaseError::code)
}
