//! Removes in the background what is left of deleted users: their idempotency keys, and the content of their messages where they
//! asked for it.
//!
//! One replica works at a user, in steps of a few rows, each of them one statement: it erases, and notes how far it has come. It
//! holds the user's row for a while; another replica takes over when it is gone. Messages are locked in the order of conversation
//! and seq, as everywhere.
//!
//! # Why no read shows what was erased
//!
//! The user is noted in `deleted_users` again when a replica takes the work up, [`HELD_MAX`] at most before it ends or is taken up
//! again. A permission that was asked for after that knows the user, and its replica uses no window of the user's conversations
//! for an hour: `recent.rs`. Permissions from before end within [`SETTLING`]. So from the first step on no window of these
//! conversations is used, read or filled, until all of those from before have expired. They are deleted nevertheless, so that Redis
//! does not keep the text for longer than Postgres.
//!
//! Nor is any message stored after it was its turn: before the first step, the statements that may not have seen the deletion
//! have ended.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::{Instant, sleep};
use uuid::Uuid;

use super::message::Pair;
use super::permission::SETTLING;
use super::recent::Recent;
use super::streams::Streams;
use crate::config::Config;
use crate::store::barrier;
use crate::store::operation::Operation;
use crate::store::postgres::{Database, is_conflict, reason};
use crate::telemetry::metrics::Metrics;

/// How often a replica looks for work, and tries again after a failure.
const INTERVAL: Duration = Duration::from_secs(5);

/// Messages or keys in one statement: a few milliseconds, and a few locks.
const STEP_ROWS: i64 = 250;

/// After a full step. Other statements are hardly slower, and vacuum keeps up.
const PAUSE: Duration = Duration::from_millis(50);

/// For how long a replica holds a user after its last step: longer than the waits before the first one.
const HELD: Duration = Duration::from_secs(10);

/// A replica works for this long before it takes the user up anew: far below the hour for which replicas know a deleted user.
const HELD_MAX: Duration = Duration::from_secs(600);

pub(crate) struct Erasures {
    database: Database,
    recent: Arc<Recent>,
    streams: Arc<Streams>,
    metrics: Arc<Metrics>,
    /// For how long a statement in flight is waited for.
    writers_limit: Duration,
    /// This process, as the holder of its work.
    holder: Uuid,
    begun: Notify,
}

/// A user whose data this replica removes.
#[derive(Debug)]
struct Taken {
    user_id: Uuid,
    erase_messages: bool,
    is_listed: bool,
    is_resumed: bool,
}

/// What a step did in one conversation.
struct Step {
    peer_id: Uuid,
    /// The highest seq that was erased in it.
    last: Option<i64>,
    is_done: bool,
    read: i64,
    erased: i64,
}

impl Erasures {
    pub(crate) fn new(
        config: &Config,
        database: Database,
        recent: Arc<Recent>,
        streams: Arc<Streams>,
        metrics: Arc<Metrics>,
    ) -> Arc<Self> {
        let (writers_limit, holder) = (config.statement_timeout(), Uuid::new_v4());
        Arc::new(Self { database, recent, streams, metrics, writers_limit, holder, begun: Notify::new() })
    }

    /// Says that there is work.
    pub(crate) fn begin(&self) {
        self.begun.notify_one();
    }

    /// Works until the process ends.
    pub(crate) async fn work(self: Arc<Self>) {
        loop {
            if let Err(error) = self.work_off().await {
                // The health task logs that Postgres is unavailable.
                tracing::debug!(error = reason(&error), "an erasure is interrupted");
            }
            tokio::select! {
                () = self.begun.notified() => {}
                () = sleep(INTERVAL) => {}
            }
        }
    }

    /// Until nothing is left that no other replica works at.
    async fn work_off(&self) -> Result<(), sqlx::Error> {
        while self.count_pending().await? > 0 {
            let Some(taken) = self.take().await? else { break };
            self.remove(&taken).await?;
        }
        Ok(())
    }

    async fn count_pending(&self) -> Result<i64, sqlx::Error> {
        let mut connection = self.database.acquire().await?;
        let query = sqlx::query_scalar!(r#"SELECT count(*) AS "pending!" FROM erasures"#);
        let pending = self.database.run(Operation::FindErasure, query.fetch_one(&mut *connection)).await?;
        self.metrics.erasures_pending(pending);
        Ok(pending)
    }

    /// Takes a user whom no other replica holds, and has all replicas know of the deletion anew.
    async fn take(&self) -> Result<Option<Taken>, sqlx::Error> {
        let mut connection = self.database.acquire().await?;
        let query = sqlx::query_as!(
            Taken,
            r#"WITH next AS (
                   SELECT user_id, holder FROM erasures WHERE held_until < clock_timestamp() OR holder = $1
                   ORDER BY held_until, user_id LIMIT 1 FOR UPDATE SKIP LOCKED
               ), taken AS (
                   UPDATE erasures e SET holder = $1, held_until = clock_timestamp() + make_interval(secs => $2)
                   FROM next WHERE e.user_id = next.user_id
                   RETURNING e.user_id, e.erase_messages, e.is_listed, next.holder IS NOT NULL AS is_resumed
               ), noted AS (
                   INSERT INTO deleted_users (user_id) SELECT user_id FROM taken
               )
               SELECT user_id, erase_messages, is_listed, is_resumed AS "is_resumed!" FROM taken"#,
            self.holder,
            HELD.as_secs_f64(),
        );
        self.database.run(Operation::FindErasure, query.fetch_optional(&mut *connection)).await
    }

    async fn remove(&self, taken: &Taken) -> Result<(), sqlx::Error> {
        let &Taken { user_id: user, erase_messages, is_resumed, .. } = taken;
        tracing::info!(%user, erase_messages, is_resumed, "removing what is left of a deleted user");
        let until = Instant::now() + HELD_MAX;
        sleep(SETTLING).await;
        barrier::writers_before_now_have_ended(&self.database, self.writers_limit).await?;
        while self.remove_keys(user).await? >= STEP_ROWS as u64 {
            sleep(PAUSE).await;
        }
        if erase_messages && !taken.is_listed {
            self.list(user).await?;
        }
        let mut erased = 0;
        while let Some(step) = self.step(user).await? {
            erased += step.erased;
            self.metrics.messages_erased(step.erased.unsigned_abs());
            if step.is_done && step.last.is_some() {
                self.recent.forget(Pair::new(user, step.peer_id)).await;
                self.streams.announce(vec![step.peer_id]);
            }
            if Instant::now() >= until {
                return Ok(());
            }
            sleep(PAUSE.mul_f64(step.read as f64 / STEP_ROWS as f64)).await;
        }
        if self.finish(user).await? {
            tracing::info!(%user, erased_messages = erased, "nothing is left to remove of a deleted user");
        }
        Ok(())
    }

    async fn remove_keys(&self, user: Uuid) -> Result<u64, sqlx::Error> {
        let query = sqlx::query!(
            "DELETE FROM idempotency_keys WHERE sender_id = $1 AND key IN (
                 SELECT key FROM idempotency_keys WHERE sender_id = $1 ORDER BY key LIMIT $2 FOR UPDATE SKIP LOCKED
             )",
            user,
            STEP_ROWS,
        );
        let mut connection = self.database.acquire().await?;
        let removed = self.database.run(Operation::DeleteKeysOfUser, query.execute(&mut *connection)).await?;
        Ok(removed.rows_affected())
    }

    /// Notes in which conversations there is something to do: there will be no others.
    async fn list(&self, user: Uuid) -> Result<(), sqlx::Error> {
        let query = sqlx::query!(
            "WITH held AS (
                 UPDATE erasures SET is_listed = true, held_until = clock_timestamp() + make_interval(secs => $3)
                 WHERE user_id = $1 AND holder = $2 AND NOT is_listed
                 RETURNING user_id
             )
             INSERT INTO erased_conversations (conversation_id, user_id, peer_id)
             SELECT c.id, held.user_id, c.peer
             FROM held CROSS JOIN (
                 SELECT id, high_user AS peer FROM conversations WHERE low_user = $1
                 UNION ALL
                 SELECT id, low_user AS peer FROM conversations WHERE high_user = $1
             ) c
             ON CONFLICT DO NOTHING",
            user,
            self.holder,
            HELD.as_secs_f64(),
        );
        let mut connection = self.database.acquire().await?;
        self.database.run(Operation::ListErasure, query.execute(&mut *connection)).await.map(drop)
    }

    /// Erases the user's messages among the next ones of a conversation. `None` if no conversation is left, or another replica
    /// has taken over.
    async fn step(&self, user: Uuid) -> Result<Option<Step>, sqlx::Error> {
        loop {
            let mut connection = self.database.acquire().await?;
            let query = sqlx::query_file_as!(
                Step,
                "src/chat/erasure.sql",
                user,
                self.holder,
                HELD.as_secs_f64(),
                STEP_ROWS
            );
            match self.database.run(Operation::EraseMessages, query.fetch_optional(&mut *connection)).await {
                Err(error) if is_conflict(&error) => sleep(PAUSE).await,
                outcome => return outcome,
            }
        }
    }

    /// False if something is left to do, or another replica has taken over.
    async fn finish(&self, user: Uuid) -> Result<bool, sqlx::Error> {
        let query = sqlx::query_scalar!(
            r#"WITH gone AS (
                   DELETE FROM erasures
                   WHERE user_id = $1 AND holder = $2 AND (is_listed OR NOT erase_messages)
                     AND NOT EXISTS (SELECT FROM erased_conversations WHERE user_id = $1 AND xact IS NULL)
                   RETURNING user_id
               ), not_announced AS (
                   -- Nothing was erased there, or the peer is gone, too.
                   DELETE FROM erased_conversations c USING gone
                   WHERE c.user_id = gone.user_id
                     AND (c.seq IS NULL OR NOT EXISTS (SELECT FROM users u WHERE u.id = c.peer_id))
               )
               SELECT count(*) = 1 AS "is_finished!" FROM gone"#,
            user,
            self.holder,
        );
        let mut connection = self.database.acquire().await?;
        self.database.run(Operation::FinishErasure, query.fetch_one(&mut *connection)).await
    }
}

impl std::fmt::Debug for Erasures {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Erasures").field("holder", &self.holder).finish_non_exhaustive()
    }
}
