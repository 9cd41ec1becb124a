//! Removes what has expired, and notes what may be noted later, in steps so small that no request has to wait. Replicas do not
//! block one another: each skips the rows that another has locked.

use std::time::Duration;

use sqlx::Postgres;
use sqlx::postgres::PgArguments;
use sqlx::query::Query;

use super::permission::Permission;
use crate::config::Config;
use crate::store::operation::Operation;
use crate::store::postgres::{Database, reason};

/// No position of a stream is taken up that is older: its week, and a day.
const ERASED_KEPT: Duration = Duration::from_secs(8 * 24 * 3600);

/// After a round in which nothing was left to do, there was more than a step, or a step failed.
const INTERVAL: Duration = Duration::from_secs(60);
const PAUSE: Duration = Duration::from_millis(100);
const RETRY: Duration = Duration::from_secs(5);

/// Rows in one statement: a few milliseconds, and a few locks.
const STEP_ROWS: i64 = 1000;

/// A statement that changes [`STEP_ROWS`] at most.
type Step = Query<'static, Postgres, PgArguments>;

/// Makes one step of each kind after the other, round by round, until the process ends: a start needs no connection for each.
pub(crate) async fn sweep(config: Config, database: Database) {
    loop {
        let (mut is_through, mut has_failed) = (true, false);
        for (operation, step) in steps(&config) {
            match run(&database, operation, step).await {
                Ok(rows) => is_through &= rows < STEP_ROWS as u64,
                // The health task has already logged that Postgres is unavailable.
                Err(error) => {
                    let operation = operation.name().operation;
                    tracing::debug!(error = reason(&error), operation, "a step failed");
                    has_failed = true;
                }
            }
        }
        tokio::time::sleep(match (has_failed, is_through) {
            (true, _) => RETRY,
            (false, true) => INTERVAL,
            (false, false) => PAUSE,
        })
        .await;
    }
}

fn steps(config: &Config) -> [(Operation, Step); 8] {
    [
        (Operation::DeleteExpiredKeys, expired_keys()),
        (Operation::DeleteOldDeletions, old_deletions(Permission::deletions_kept(config))),
        (Operation::DeleteReservedNames, reserved_names()),
        (Operation::DeleteErasedConversations, erased_conversations()),
        (Operation::DeleteEndedSessions, old_endings(Permission::endings_kept(config))),
        (Operation::DeleteOldCounts, old_counts()),
        (Operation::DeleteUnusedSessions, unused_sessions(config.refresh_token_lifetime())),
        (Operation::NoteActiveHours, active_hours()),
    ]
}

async fn run(database: &Database, operation: Operation, step: Step) -> Result<u64, sqlx::Error> {
    let mut connection = database.acquire().await?;
    let changed = database.run(operation, step.execute(&mut *connection)).await?;
    connection.give_back();
    Ok(changed.rows_affected())
}

/// Idempotency keys that are a day old.
fn expired_keys() -> Step {
    sqlx::query!(
        "DELETE FROM idempotency_keys WHERE (sender_id, key) IN (
             SELECT sender_id, key FROM idempotency_keys
             WHERE created_at < now() - interval '24 hours'
             ORDER BY created_at LIMIT $1
             FOR UPDATE SKIP LOCKED
         )",
        STEP_ROWS,
    )
}

/// What replicas no longer need to know of deleted users.
fn old_deletions(kept: Duration) -> Step {
    sqlx::query!(
        "DELETE FROM deleted_users WHERE user_id IN (
             SELECT user_id FROM deleted_users
             WHERE deleted_at < clock_timestamp() - make_interval(secs => $1)
             ORDER BY xact LIMIT $2
         ) AND deleted_at < clock_timestamp() - make_interval(secs => $1)",
        kept.as_secs_f64(),
        STEP_ROWS,
    )
}

/// Sets the names and addresses of deleted users free again.
fn reserved_names() -> Step {
    sqlx::query!(
        "DELETE FROM reserved_names WHERE hash IN (
             SELECT hash FROM reserved_names
             WHERE reserved_until < clock_timestamp()
             ORDER BY reserved_until LIMIT $1
             FOR UPDATE SKIP LOCKED
         )",
        STEP_ROWS,
    )
}

/// What streams no longer need to know of erased messages.
fn erased_conversations() -> Step {
    sqlx::query!(
        "DELETE FROM erased_conversations WHERE (conversation_id, user_id) IN (
             SELECT conversation_id, user_id FROM erased_conversations
             WHERE erased_at < clock_timestamp() - make_interval(secs => $1) AND xact IS NOT NULL
             ORDER BY erased_at LIMIT $2
             FOR UPDATE SKIP LOCKED
         )",
        ERASED_KEPT.as_secs_f64(),
        STEP_ROWS,
    )
}

/// What replicas no longer need to know of ended sessions.
fn old_endings(kept: Duration) -> Step {
    sqlx::query!(
        "DELETE FROM ended_sessions WHERE session_id IN (
             SELECT session_id FROM ended_sessions
             WHERE ended_at < clock_timestamp() - make_interval(secs => $1)
             ORDER BY xact LIMIT $2
         ) AND ended_at < clock_timestamp() - make_interval(secs => $1)",
        kept.as_secs_f64(),
        STEP_ROWS,
    )
}

/// The counts of new conversations of past hours. Not those of the hour before: a statement that began in it may still wait.
fn old_counts() -> Step {
    sqlx::query!(
        "DELETE FROM new_conversations WHERE user_id IN (
             SELECT user_id FROM new_conversations
             WHERE hour < floor(extract(epoch FROM clock_timestamp()) / 3600)::bigint - 1
             ORDER BY hour LIMIT $1
             FOR UPDATE SKIP LOCKED
         )",
        STEP_ROWS,
    )
}

/// Ends sessions that were not used for longer than a refresh token lives. Access tokens may live longer than that.
fn unused_sessions(lifetime: Duration) -> Step {
    sqlx::query!(
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
    )
}

/// Notes in new conversations the hour of their message.
fn active_hours() -> Step {
    sqlx::query!(
        "UPDATE conversations SET active_hour = hour_of(last_at) WHERE id IN (
             SELECT id FROM conversations WHERE active_hour = 0 LIMIT $1 FOR UPDATE SKIP LOCKED
         )",
        STEP_ROWS,
    )
}
