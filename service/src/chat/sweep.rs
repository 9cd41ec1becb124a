//! Removes expired idempotency keys, in steps so small that no request has to wait.

use std::time::Duration;

use crate::store::operation::Operation;
use crate::store::postgres::{Database, reason};

const INTERVAL: Duration = Duration::from_secs(60);

/// Rows in one statement: a few milliseconds, and a few locks.
const STEP_ROWS: i64 = 1000;

/// Runs until the process ends. Replicas do not block one another: each skips the rows that another has locked.
pub(crate) async fn expired_idempotency_keys(database: Database) {
    loop {
        match remove_step(&database).await {
            // There may be more: continue after a short pause.
            Ok(removed) if removed >= STEP_ROWS as u64 => {
                tokio::time::sleep(Duration::from_millis(100)).await
            }
            Ok(_) => tokio::time::sleep(INTERVAL).await,
            // The health task has already logged that Postgres is unavailable.
            Err(error) => {
                tracing::debug!(error = reason(&error), "expired idempotency keys were not removed");
                tokio::time::sleep(Duration::from_secs(5)).await;
            }
        }
    }
}

async fn remove_step(database: &Database) -> Result<u64, sqlx::Error> {
    let mut connection = database.acquire().await?;
    let query = sqlx::query!(
        "DELETE FROM idempotency_keys WHERE (sender_id, key) IN (
             SELECT sender_id, key FROM idempotency_keys
             WHERE created_at < now() - interval '24 hours'
             ORDER BY created_at LIMIT $1
             FOR UPDATE SKIP LOCKED
         )",
        STEP_ROWS,
    );
    let removed = database.run(Operation::DeleteExpiredKeys, query.execute(&mut *connection)).await?;
    Ok(removed.rows_affected())
}
