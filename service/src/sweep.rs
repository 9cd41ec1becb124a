//! Removes expired idempotency keys, in steps small enough that nobody waits for them.

use std::time::Duration;

use crate::call::Call;
use crate::db::Database;

const INTERVAL: Duration = Duration::from_secs(60);

/// Rows in one statement: a few milliseconds, and a few locks.
const STEP_ROWS: i64 = 1000;

/// Runs until the process ends. Replicas do not disturb one another: each skips the rows that another holds.
pub async fn expired_idempotency_keys(database: Database) {
    loop {
        match remove_step(&database).await {
            // There may be more: go on after a short breath.
            Ok(removed) if removed >= STEP_ROWS as u64 => {
                tokio::time::sleep(Duration::from_millis(100)).await
            }
            Ok(_) => tokio::time::sleep(INTERVAL).await,
            // Whoever watches Postgres has told already that it is away.
            Err(error) => {
                tracing::debug!(%error, "expired idempotency keys were not removed");
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
    let removed = database.run(Call::DeleteExpiredKeys, query.execute(&mut *connection)).await?;
    Ok(removed.rows_affected())
}
