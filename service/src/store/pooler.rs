//! What a pooler between the service and Postgres changes. One that gives a client another session of Postgres for each
//! transaction must keep prepared statements, drops what the client asks for at its start, and must not be left with
//! settings or locks of a session: they would become another client's.

use std::time::Duration;

use sqlx::postgres::PgConnectOptions;
use sqlx::{Connection as _, PgConnection};

use super::postgres::{self, Database};

/// How long the check may take: a pooler may have no session to spare.
const CHECK_TIMEOUT: Duration = Duration::from_secs(2);

const PREPARED_STATEMENTS: &str = "Postgres is behind a pooler that does not keep prepared statements: use PgBouncer 1.21 or \
     newer with max_prepared_statements above 0, or pool_mode = session";
const STARTUP_PARAMETERS: &str = "Postgres is behind a pooler that refuses the startup parameter with DB_STATEMENT_TIMEOUT_MS: \
     set ignore_startup_parameters = options in pgbouncer.ini, and the role's statement_timeout in Postgres";
const NO_TRANSACTIONS: &str = "Postgres is behind a pooler without transactions: set pool_mode = transaction in pgbouncer.ini, \
     or session";

/// Whether the session is this client's for as long as the connection is open, so that it may change settings.
pub(crate) async fn is_own_session(connection: &mut PgConnection) -> Result<bool, sqlx::Error> {
    let query = sqlx::query_scalar("SELECT current_setting($1, true) IS NOT DISTINCT FROM 'on'")
        .bind(postgres::OWN_SESSION);
    query.fetch_one(connection).await
}

/// When Postgres gives up on a statement of the service (zero for never), and whose setting that is.
#[derive(Debug)]
pub(crate) struct StatementTimeout {
    pub(crate) limit: Duration,
    pub(crate) role: String,
    pub(crate) database: String,
}

pub(crate) async fn statement_timeout(database: &Database) -> Result<StatementTimeout, sqlx::Error> {
    let mut connection = database.acquire().await?;
    let query = "SELECT setting::bigint, quote_ident(current_user), quote_ident(current_database())
         FROM pg_settings WHERE name = 'statement_timeout'";
    let (milliseconds, role, database): (i64, String, String) =
        sqlx::query_as(query).fetch_one(&mut *connection).await?;
    Ok(StatementTimeout { limit: Duration::from_millis(milliseconds.unsigned_abs()), role, database })
}

/// Why the service cannot work through the pooler, as an error tells.
pub(crate) fn fault(error: &sqlx::Error) -> Option<&'static str> {
    let message = error.as_database_error()?.message();
    if postgres::is_foreign_statement(error) {
        Some(PREPARED_STATEMENTS)
    } else if message.contains("startup parameter") {
        Some(STARTUP_PARAMETERS)
    } else if message.contains("not allowed in statement pooling mode") {
        Some(NO_TRANSACTIONS)
    } else {
        None
    }
}

/// The fault, or else the error's own words.
pub(crate) fn reason(error: &sqlx::Error) -> String {
    fault(error).map_or_else(|| postgres::reason(error), str::to_owned)
}

/// Tries what the service needs of a pooler, before one that mixes up statements answers a request with the rows of
/// another: two clients take turns with a prepared statement of the same name. Says nothing of Postgres itself.
pub(crate) async fn check(database: &Database) -> Result<(), &'static str> {
    let outcome = tokio::time::timeout(CHECK_TIMEOUT, take_turns(database.connect_options())).await;
    match outcome {
        Ok(Err(error)) => fault(&error).map_or(Ok(()), Err),
        Ok(Ok(())) | Err(_) => Ok(()),
    }
}

async fn take_turns(options: &PgConnectOptions) -> Result<(), sqlx::Error> {
    let mut clients = [postgres::connect(options).await?, postgres::connect(options).await?];
    for _ in 0..2 {
        for client in &mut clients {
            let mut transaction = client.begin().await?;
            session(&mut transaction).await?;
            transaction.commit().await?;
        }
    }
    for client in clients {
        client.close().await?;
    }
    Ok(())
}

/// True when another client got the same session of Postgres while this one was open: a lock would become that client's.
/// A busy pooler may hide that.
pub(crate) async fn shares_sessions(connection: &mut PgConnection, options: &PgConnectOptions) -> bool {
    let compared = async {
        let before = session(connection).await?;
        let mut other = postgres::connect(options).await?;
        let others = session(&mut other).await?;
        other.close().await?;
        Ok::<_, sqlx::Error>(others == before || session(connection).await? != before)
    };
    match compared.await {
        Ok(shared) => shared,
        Err(error) => fault(&error).is_some(),
    }
}

/// The process of Postgres that serves this transaction.
async fn session(connection: &mut PgConnection) -> Result<i32, sqlx::Error> {
    sqlx::query_scalar("SELECT pg_backend_pid()").fetch_one(connection).await
}
