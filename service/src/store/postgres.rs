//! Postgres: the connection pool, how a statement is run, and what its errors mean.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use sqlx::postgres::{PgConnectOptions, PgDatabaseError};
use sqlx::{Connection as _, PgConnection};
use tokio::time::Instant;

use super::operation::Operation;
use super::pool::{PoolSize, Pools, Replacement, Session};
use crate::config::Config;
use crate::telemetry::causes::causes;
use crate::telemetry::metrics::Metrics;
use crate::telemetry::trace::{self, ServerAttributes};

/// How long a request may wait for a connection: longer than a reconnect takes, shorter than a client's patience, which
/// is 10 s by default. A request that waits longer is answered with 503. Where `REQUEST_TIMEOUT_MS` is short, it is half of
/// that, so that the request still ends with the reason.
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(3);

/// How much longer than Postgres's own timeout a statement is waited for, in case Postgres cannot answer.
pub const STATEMENT_MARGIN: Duration = Duration::from_secs(1);

/// How long a connection outside the pool may take to open.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Sessions are replaced at most this often while Postgres only reads. A request that meets a new one which only reads, too,
/// would gain nothing from yet another.
const REPLACE_INTERVAL: Duration = Duration::from_secs(1);

/// Why Postgres answers and takes no writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReadOnly {
    /// It follows a primary: its data may be older.
    Standby,
    /// `default_transaction_read_only` is on, for the server, the database or the user.
    Setting,
}

impl ReadOnly {
    pub fn reason(self) -> &'static str {
        match self {
            Self::Standby => "it is a standby",
            Self::Setting => "default_transaction_read_only is on",
        }
    }

    pub fn fix(self) -> &'static str {
        match self {
            Self::Standby => "correct DB_HOST, or DATABASE_URL, to reach the primary, or promote this server",
            Self::Setting => {
                "remove the reason (often a full disk), then ALTER SYSTEM RESET default_transaction_read_only and \
                 SELECT pg_reload_conf(); or ALTER DATABASE, or ALTER USER, where it was set there"
            }
        }
    }
}

/// A fault of the installation fails every request: it is logged no more often than this.
const FAULT_INTERVAL: Duration = Duration::from_secs(60);

/// A setting that the service asks for at the start of each session, and of which Postgres itself knows nothing. A pooler
/// that shares sessions does not pass it on.
pub(super) const OWN_SESSION: &str = "chat_service.own_session";

/// The connection pool. Every statement of a request runs through it, and so is counted, timed and traced.
#[derive(Clone, Debug)]
pub struct Database {
    pools: Arc<Pools>,
    options: PgConnectOptions,
    acquire_limit: Duration,
    replacement: Replacement,
    /// How long a statement may take. Postgres's own timeout does not help when Postgres cannot answer.
    statement_limit: Duration,
    server: ServerAttributes,
    metrics: Arc<Metrics>,
    /// When a fault of the installation was logged last.
    fault_logged: Arc<Mutex<Option<Instant>>>,
}

impl Database {
    pub fn new(config: &Config, options: PgConnectOptions, metrics: Arc<Metrics>) -> Self {
        let replacement = Replacement::new();
        let database = options.get_database().unwrap_or_else(|| options.get_username());
        let server = ServerAttributes::new(options.get_host(), options.get_port(), database);
        let timeout = config.db_statement_timeout_ms.to_string();
        let options = options.options([("statement_timeout", timeout.as_str()), (OWN_SESSION, "on")]);
        let acquire_limit = ACQUIRE_TIMEOUT.min(config.request_timeout() / 2);
        let pools = Arc::new(Pools::new(&options, config.db_pool_max, acquire_limit, &replacement));
        let statement_limit = config.statement_timeout() + STATEMENT_MARGIN;
        Self {
            pools,
            options,
            acquire_limit,
            replacement,
            statement_limit,
            server,
            metrics,
            fault_logged: Arc::default(),
        }
    }

    /// How the pool connects.
    pub fn connect_options(&self) -> &PgConnectOptions {
        &self.options
    }

    pub fn pool_size(&self) -> PoolSize {
        self.pools.size()
    }

    /// Closes connections that were not used for long.
    pub async fn close_idle(&self) {
        self.pools.close_idle().await;
    }

    /// Closes the pool's connections.
    pub async fn close(&self) {
        self.pools.close().await;
    }

    /// A connection, waited for no longer than [`ACQUIRE_TIMEOUT`].
    pub async fn acquire(&self) -> Result<Session, sqlx::Error> {
        self.acquire_within(ACQUIRE_TIMEOUT).await
    }

    /// A connection, waited for no longer than `limit` and [`ACQUIRE_TIMEOUT`].
    pub async fn acquire_within(&self, limit: Duration) -> Result<Session, sqlx::Error> {
        let acquired = tokio::time::timeout(limit.min(self.acquire_limit), self.pools.get()).await;
        let connection = acquired.unwrap_or(Err(sqlx::Error::PoolTimedOut)).inspect_err(|error| {
            if matches!(error, sqlx::Error::PoolTimedOut) {
                self.metrics.pool_timed_out();
            }
        })?;
        Ok(Session::new(connection, self.statement_limit))
    }

    /// Has every session of the pool replaced before it is used again.
    pub fn replace_sessions(&self) {
        self.replacement.replace();
    }

    /// Runs the work of an operation within the limit of a statement, timed and traced.
    pub async fn run<T>(
        &self,
        operation: Operation,
        work: impl Future<Output = Result<T, sqlx::Error>>,
    ) -> Result<T, sqlx::Error> {
        let _timer = self.metrics.operation_started(operation.name());
        let span = trace::operation(operation.name(), &self.server);
        let outcome = tokio::time::timeout(self.statement_limit, work).await;
        let outcome = outcome.unwrap_or_else(|_| Err(sqlx::Error::Io(io::ErrorKind::TimedOut.into())));
        if outcome.as_ref().is_err_and(is_read_only) && self.replacement.elapsed() > REPLACE_INTERVAL {
            self.replacement.replace();
        }
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

/// Whether the session can write, and if not, why.
pub async fn read_only(connection: &mut PgConnection) -> Result<Option<ReadOnly>, sqlx::Error> {
    let (in_recovery, read_only) =
        sqlx::query_as("SELECT pg_is_in_recovery(), current_setting('transaction_read_only')::boolean")
            .fetch_one(connection)
            .await?;
    Ok(why_read_only(in_recovery, read_only))
}

/// The meaning of `pg_is_in_recovery()` and `transaction_read_only`.
pub(super) fn why_read_only(in_recovery: bool, read_only: bool) -> Option<ReadOnly> {
    match (in_recovery, read_only) {
        (true, _) => Some(ReadOnly::Standby),
        (false, true) => Some(ReadOnly::Setting),
        (false, false) => None,
    }
}

/// True when Postgres refused to write: `read_only_sql_transaction`.
pub fn is_read_only(error: &sqlx::Error) -> bool {
    code(error) == Some("25006")
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

/// True when a statement, or the wait for a connection, took too long.
pub(crate) fn is_timeout(error: &sqlx::Error) -> bool {
    match error {
        sqlx::Error::PoolTimedOut => true,
        sqlx::Error::Io(error) => error.kind() == io::ErrorKind::TimedOut,
        // query_canceled
        error => code(error) == Some("57014"),
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
