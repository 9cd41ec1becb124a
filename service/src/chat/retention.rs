//! Retention: removes messages that are older than `MESSAGE_RETENTION_DAYS`.
//!
//! A *sweep* goes through the conversations by their id, and removes the old messages of each from its beginning on. It takes
//! steps of [`STEP_ROWS`] rows and pauses after each. One replica at a time has the turn, for [`TURN`] after its last step,
//! in the one row of `message_retention`. That also says how far the sweep has come, so another replica goes on from there.
//!
//! *What stays.* The conversation's row and its `last_seq`, so that seq goes on. `first_seq` says where history begins now.
//! It changes in the statement that removes the messages, so a page sees both or neither.
//!
//! *Writers do not wait.* What is old is found without a lock. The statement that removes it takes the locks of
//! conversations that are free, and leaves the others for the next step. It holds them for some milliseconds. A step that
//! loses a deadlock, as with another change of old messages, is repeated.
//!
//! *Windows follow* as after a send: [`Recent::drop_removed`] runs after the commit. Where it fails, or the process dies before,
//! `check.rs` finds the window while it is read.
//!
//! *A message outlives its idempotency key*, or a repetition would store it again: nothing is removed that is as old as a key.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use time::OffsetDateTime;
use uuid::Uuid;

use super::message::Pair;
use super::recent::Recent;
use crate::store::operation::Operation;
use crate::store::postgres::{Database, is_conflict, reason};
use crate::telemetry::metrics::Metrics;

/// What one step looks at, at most: messages to remove, and conversations that have none.
const STEP_ROWS: i64 = 250;

/// After a step. It makes 3.6 million rows an hour at most.
const PAUSE: Duration = Duration::from_millis(250);

/// From the end of a sweep to the next one. A sweep looks at every conversation.
const REST: Duration = Duration::from_secs(3600);

/// For how long a replica keeps the turn without a step. If it takes longer, two may remove messages for a while, which does
/// no harm.
const TURN: Duration = Duration::from_secs(15);

/// How often a replica asks for the turn.
const ASK: Duration = Duration::from_secs(5);

/// Removes messages of this age until the process ends.
pub(crate) async fn old_messages(
    database: Database,
    recent: Arc<Recent>,
    metrics: Arc<Metrics>,
    age: Duration,
) {
    let replica = Uuid::new_v4();
    let mut removed = 0;
    loop {
        let pause = match turn(&database, &recent, &metrics, replica, age).await {
            Ok(None) => ASK,
            Ok(Some(step)) => {
                removed += step.removed;
                if step.next.is_none() && removed > 0 {
                    tracing::info!(removed, "old messages were removed");
                    removed = 0;
                }
                PAUSE
            }
            Err(error) if is_conflict(&error) => PAUSE,
            // The health task has already logged that Postgres is unavailable.
            Err(error) => {
                tracing::debug!(error = reason(&error), "old messages were not removed");
                ASK
            }
        };
        tokio::time::sleep(pause).await;
    }
}

/// A step, if this replica has the turn.
async fn turn(
    database: &Database,
    recent: &Recent,
    metrics: &Metrics,
    replica: Uuid,
    age: Duration,
) -> Result<Option<Step>, sqlx::Error> {
    let progress = take(database, replica, age).await?;
    metrics.retention_progress(progress.ratio(), progress.completed.unwrap_or_default());
    let Some(older_than) = progress.older_than else { return Ok(None) };
    let step = step(database, Some(recent), older_than, progress.reached).await?;
    metrics.messages_removed(step.removed);
    advance(database, replica, step.next).await?;
    Ok(Some(step))
}

/// As of the row that all replicas share.
struct Progress {
    reached: Uuid,
    is_resting: bool,
    /// Seconds since 1970.
    completed: Option<f64>,
    /// What is to be removed, if the replica has the turn.
    older_than: Option<OffsetDateTime>,
}

impl Progress {
    /// The part of the conversations that is done: their ids are random.
    fn ratio(&self) -> f64 {
        if self.is_resting { 1.0 } else { self.reached.as_u128() as f64 / u128::MAX as f64 }
    }
}

/// Takes or keeps the turn, unless another replica has it or no sweep is due.
async fn take(database: &Database, replica: Uuid, age: Duration) -> Result<Progress, sqlx::Error> {
    let mut connection = database.acquire().await?;
    let query = sqlx::query_as!(
        Progress,
        r#"WITH mine AS (
               UPDATE message_retention
               SET holder = $1, held_until = clock_timestamp() + make_interval(secs => $2)
               WHERE (holder = $1 OR held_until <= clock_timestamp()) AND next_at <= clock_timestamp()
               RETURNING clock_timestamp() - make_interval(secs => $3) AS older_than
           )
           SELECT reached, next_at > clock_timestamp() AS "is_resting!",
                  extract(epoch FROM completed_at)::float8 AS completed, older_than AS "older_than?"
           FROM message_retention LEFT JOIN mine ON true"#,
        replica,
        TURN.as_secs_f64(),
        age.as_secs_f64(),
    );
    database.run(Operation::TakeRetentionTurn, query.fetch_one(&mut *connection)).await
}

/// Notes where the sweep goes on, or that it is through.
async fn advance(database: &Database, replica: Uuid, next: Option<Uuid>) -> Result<(), sqlx::Error> {
    let mut connection = database.acquire().await?;
    let query = sqlx::query!(
        "UPDATE message_retention
         SET reached = coalesce($2::uuid, '00000000-0000-0000-0000-000000000000'),
             completed_at = CASE WHEN $2::uuid IS NULL THEN clock_timestamp() ELSE completed_at END,
             next_at = CASE WHEN $2::uuid IS NULL THEN clock_timestamp() + make_interval(secs => $3) ELSE next_at END
         WHERE holder = $1",
        replica,
        next,
        REST.as_secs_f64(),
    );
    database.run(Operation::TakeRetentionTurn, query.execute(&mut *connection)).await.map(drop)
}

/// What a step did.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Step {
    /// Messages.
    pub(crate) removed: u64,
    /// The conversation to go on from; `None` when there are no more.
    pub(crate) next: Option<Uuid>,
}

/// Removes some of the messages that are older, of this conversation and those behind it. The first step begins with the nil id.
/// Without `recent` it is `check.rs` that finds the windows.
pub(crate) async fn step(
    database: &Database,
    recent: Option<&Recent>,
    older_than: OffsetDateTime,
    from: Uuid,
) -> Result<Step, sqlx::Error> {
    let Found { old, next } = find(database, older_than, from).await?;
    if old.is_empty() {
        return Ok(Step { removed: 0, next });
    }
    let rows = remove(database, &old).await?;
    let removed = rows.first().map_or(0, |row| row.removed.unsigned_abs());
    let windows: Vec<(Pair, i64)> =
        rows.iter().map(|row| (Pair::new(row.low_user, row.high_user), row.next_seq - 1)).collect();
    if let Some(recent) = recent
        && let Err(error) = recent.drop_removed(&windows).await
    {
        tracing::debug!(
            error = error.to_string(),
            "windows may have removed messages until they are compared"
        );
    }
    let is_left = |id: &&Uuid| rows.iter().all(|row| row.id != **id);
    let left = old.keys().find(is_left).copied();
    Ok(Step { removed, next: left.or(next) })
}

struct Found {
    /// Conversations with old messages, and the seq behind those.
    old: BTreeMap<Uuid, i64>,
    next: Option<Uuid>,
}

/// Looks for old messages from this conversation on. In a conversation they follow one another: times ascend with seq.
async fn find(database: &Database, older_than: OffsetDateTime, from: Uuid) -> Result<Found, sqlx::Error> {
    let mut connection = database.acquire().await?;
    // Each message is found by itself, so that one that is not old ends the search.
    let query = sqlx::query!(
        r#"WITH bound AS MATERIALIZED (
               SELECT least($2, (SELECT min(created_at) FROM idempotency_keys)) AS older_than
           )
           SELECT c.id, m.seq AS "seq?"
           FROM (SELECT id, first_seq FROM conversations WHERE id >= $1 ORDER BY id LIMIT $3) c
           LEFT JOIN LATERAL (
               WITH RECURSIVE reached AS (
                   (SELECT seq, created_at FROM messages
                    WHERE conversation_id = c.id AND seq >= c.first_seq ORDER BY seq LIMIT 1)
                   UNION ALL
                   (SELECT n.seq, n.created_at FROM reached r
                    JOIN messages n ON n.conversation_id = c.id AND n.seq = r.seq + 1
                    WHERE r.created_at < (SELECT older_than FROM bound))
               )
               SELECT seq FROM reached WHERE created_at < (SELECT older_than FROM bound) LIMIT $3
           ) m ON true
           ORDER BY c.id LIMIT $3"#,
        from,
        older_than,
        STEP_ROWS,
    );
    let rows = database.run(Operation::FindOldMessages, query.fetch_all(&mut *connection)).await?;
    let is_all = (rows.len() as i64) < STEP_ROWS;
    let next = rows.last().filter(|_| !is_all).map(|row| row.id);
    let mut old = BTreeMap::new();
    for row in rows {
        if let Some(seq) = row.seq {
            let behind: &mut i64 = old.entry(row.id).or_default();
            *behind = (*behind).max(seq + 1);
        }
    }
    Ok(Found { old, next })
}

/// A conversation whose messages were removed, and how many were in all.
struct Removed {
    id: Uuid,
    low_user: Uuid,
    high_user: Uuid,
    next_seq: i64,
    removed: i64,
}

async fn remove(database: &Database, old: &BTreeMap<Uuid, i64>) -> Result<Vec<Removed>, sqlx::Error> {
    let (ids, seqs): (Vec<Uuid>, Vec<i64>) = old.iter().map(|(id, seq)| (*id, *seq)).unzip();
    let mut connection = database.acquire().await?;
    let query = sqlx::query_file_as!(Removed, "src/chat/retention.sql", &ids, &seqs);
    database.run(Operation::DeleteOldMessages, query.fetch_all(&mut *connection)).await
}
