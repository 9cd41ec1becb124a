//! Removes what has expired, and notes what may be noted later, in steps so small that no request has to wait. Replicas do not
//! block one another: each skips the rows that another has locked.

use std::time::Duration;

use crate::store::operation::Operation;
use crate::store::postgres::{Database, reason};

/// No position of a stream is taken up that is older: its week, and a day.
const ERASED_KEPT: Duration = Duration::from_secs(8 * 24 * 3600);

const INTERVAL: Duration = Duration::from_secs(60);

/// Rows in one statement: a few milliseconds, and a few locks.
const STEP_ROWS: i64 = 1000;

/// Removes idempotency keys until the process ends.
pub(crate) async fn expired_idempotency_keys(database: Database) {
    repeat(Operation::DeleteExpiredKeys, || remove_keys(&database)).await;
}

/// Removes what replicas no longer need to know of deleted users, until the process ends.
pub(crate) async fn old_deletions(database: Database, kept: Duration) {
    repeat(Operation::DeleteOldDeletions, || remove_deletions(&database, kept)).await;
}

/// Sets the names and addresses of deleted users free again, until the process ends.
pub(crate) async fn reserved_names(database: Database) {
    repeat(Operation::DeleteReservedNames, || remove_reservations(&database)).await;
}

/// Removes what streams no longer need to know of erased messages, until the process ends.
pub(crate) async fn erased_conversations(database: Database) {
    repeat(Operation::DeleteErasedConversations, || remove_erased_conversations(&database)).await;
}

/// Removes what replicas no longer need to know of ended sessions, until the process ends.
pub(crate) async fn old_endings(database: Database, kept: Duration) {
    repeat(Operation::DeleteEndedSessions, || remove_endings(&database, kept)).await;
}

/// Ends sessions that were not used for longer than a refresh token lives, until the process ends.
pub(crate) async fn unused_sessions(database: Database, lifetime: Duration) {
    repeat(Operation::DeleteUnusedSessions, || remove_sessions(&database, lifetime)).await;
}

/// Notes in new conversations the hour of their message, until the process ends.
pub(crate) async fn active_hours(database: Database) {
    repeat(Operation::NoteActiveHours, || note_hours(&database)).await;
}

/// Removes the counts of new conversations of past hours, until the process ends.
pub(crate) async fn old_counts(database: Database) {
    repeat(Operation::DeleteOldCounts, || remove_counts(&database)).await;
}

async fn repeat<F>(operation: Operation, step: impl Fn() -> F)
where
    F: Future<Output = Result<u64, sqlx::Error>>,
{
    loop {
        match step().await {
            // There may be more: continue after a short pause.
            Ok(done) if done >= STEP_ROWS as u64 => tokio::time::sleep(Duration::from_millis(100)).await,
            Ok(_) => tokio::time::sleep(INTERVAL).await,
            // The health task has already logged that Postgres is unavailable.
            Err(error) => {
                tracing::debug!(
                    error = reason(&error),
                    operation = operation.name().operation,
                    "a step failed"
                );
                tokio::time::sleep(Duration::from_secs(5)).await;
            }
        }
    }
}

async fn remove_keys(database: &Database) -> Result<u64, sqlx::Error> {
    let query = sqlx::query!(
        "DELETE FROM idempotency_keys WHERE (sender_id, key) IN (
             SELECT sender_id, key FROM idempotency_keys
             WHERE created_at < now() - interval '24 hours'
             ORDER BY created_at LIMIT $1
             FOR UPDATE SKIP LOCKED
         )",
        STEP_ROWS,
    );
    let mut connection = database.acquire().await?;
    let removed = database.run(Operation::DeleteExpiredKeys, query.execute(&mut *connection)).await?;
    Ok(removed.rows_affected())
}

async fn remove_deletions(database: &Database, kept: Duration) -> Result<u64, sqlx::Error> {
    let query = sqlx::query!(
        "DELETE FROM deleted_users WHERE user_id IN (
             SELECT user_id FROM deleted_users
             WHERE deleted_at < clock_timestamp() - make_interval(secs => $1)
             ORDER BY xact LIMIT $2
         ) AND deleted_at < clock_timestamp() - make_interval(secs => $1)",
        kept.as_secs_f64(),
        STEP_ROWS,
    );
    let mut connection = database.acquire().await?;
    let removed = database.run(Operation::DeleteOldDeletions, query.execute(&mut *connection)).await?;
    Ok(removed.rows_affected())
}

async fn remove_reservations(database: &Database) -> Result<u64, sqlx::Error> {
    let query = sqlx::query!(
        "DELETE FROM reserved_names WHERE hash IN (
             SELECT hash FROM reserved_names
             WHERE reserved_until < clock_timestamp()
             ORDER BY reserved_until LIMIT $1
             FOR UPDATE SKIP LOCKED
         )",
        STEP_ROWS,
    );
    let mut connection = database.acquire().await?;
    let removed = database.run(Operation::DeleteReservedNames, query.execute(&mut *connection)).await?;
    Ok(removed.rows_affected())
}

async fn remove_erased_conversations(database: &Database) -> Result<u64, sqlx::Error> {
    let query = sqlx::query!(
        "DELETE FROM erased_conversations WHERE (conversation_id, user_id) IN (
             SELECT conversation_id, user_id FROM erased_conversations
             WHERE erased_at < clock_timestamp() - make_interval(secs => $1) AND xact IS NOT NULL
             ORDER BY erased_at LIMIT $2
             FOR UPDATE SKIP LOCKED
         )",
        ERASED_KEPT.as_secs_f64(),
        STEP_ROWS,
    );
    let mut connection = database.acquire().await?;
    let removed = database.run(Operation::DeleteErasedConversations, query.execute(&mut *connection)).await?;
    Ok(removed.rows_affected())
}

async fn remove_endings(database: &Database, kept: Duration) -> Result<u64, sqlx::Error> {
    let query = sqlx::query!(
        "DELETE FROM ended_sessions WHERE session_id IN (
             SELECT session_id FROM ended_sessions
             WHERE ended_at < clock_timestamp() - make_interval(secs => $1)
             ORDER BY xact LIMIT $2
         ) AND ended_at < clock_timestamp() - make_interval(secs => $1)",
        kept.as_secs_f64(),
        STEP_ROWS,
    );
    let mut connection = database.acquire().await?;
    let removed = database.run(Operation::DeleteEndedSessions, query.execute(&mut *connection)).await?;
    Ok(removed.rows_affected())
}

/// Not those of the hour before: a statement that began in it may still wait.
async fn remove_counts(database: &Database) -> Result<u64, sqlx::Error> {
    let query = sqlx::query!(
        "DELETE FROM new_conversations WHERE user_id IN (
             SELECT user_id FROM new_conversations
             WHERE hour < floor(extract(epoch FROM clock_timestamp()) / 3600)::bigint - 1
             ORDER BY hour LIMIT $1
             FOR UPDATE SKIP LOCKED
         )",
        STEP_ROWS,
    );
    let mut connection = database.acquire().await?;
    let removed = database.run(Operation::DeleteOldCounts, query.execute(&mut *connection)).await?;
    Ok(removed.rows_affected())
}

/// Access tokens may live longer than that.
async fn remove_sessions(database: &Database, lifetime: Duration) -> Result<u64, sqlx::Error> {
    let query = sqlx::query!(
        "WITH gone AS (
             DELETE FROM sessions WHERE id IN (
                 SELECT id FROM sessions
                 WHERE last_used_at < clock_timestamp() - make_interval(secs => $1)
                 ORDER BY last_used_at LIMIT $2
                 FOR UPDATE SKIP LOCKED
             ) RETURNING id
         )
         INSERT INTO ended_sessions (session_id) SELECT id FROM gone",
        lifetime.as_secs_f64(),
        STEP_ROWS,
    );
    let mut connection = database.acquire().await?;
    let removed = database.run(Operation::DeleteUnusedSessions, query.execute(&mut *connection)).await?;
    Ok(removed.rows_affected())
}

async fn note_hours(database: &Database) -> Result<u64, sqlx::Error> {
    let query = sqlx::query!(
        "UPDATE conversations SET active_hour = hour_of(last_at) WHERE id IN (
             SELECT id FROM conversations WHERE active_hour = -1 LIMIT $1 FOR UPDATE SKIP LOCKED
         )",
        STEP_ROWS,
    );
    let mut connection = database.acquire().await?;
    let noted = database.run(Operation::NoteActiveHours, query.execute(&mut *connection)).await?;
    Ok(noted.rows_affected())
}
