//! Removes what has expired, in steps so small that no request has to wait. Replicas do not block one another: each skips the
//! rows that another has locked.

use std::time::Duration;

use crate::store::operation::Operation;
use crate::store::postgres::{Database, reason};

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

async fn repeat<F>(operation: Operation, step: impl Fn() -> F)
where
    F: Future<Output = Result<u64, sqlx::Error>>,
{
    loop {
        match step().await {
            // There may be more: continue after a short pause.
            Ok(removed) if removed >= STEP_ROWS as u64 => {
                tokio::time::sleep(Duration::from_millis(100)).await
            }
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
         )",
        kept.as_secs_f64(),
        STEP_ROWS,
    );
    let mut connection = database.acquire().await?;
    let removed = database.run(Operation::DeleteOldDeletions, query.execute(&mut *connection)).await?;
    Ok(removed.rows_affected())
}
