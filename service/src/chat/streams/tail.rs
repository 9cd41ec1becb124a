//! The one reader of new messages in a replica: it finds what was committed since it looked last, for all streams at once.

use std::sync::Arc;
use std::time::Duration;

use time::OffsetDateTime;
use tokio::time::Instant;
use uuid::Uuid;

use super::erased::{AFTER_MESSAGES, Erased};
use super::mailbox::{Delivery, Kind};
use super::position::Snapshot;
use super::registry::{Found, Read, Streams};
use super::start::{self, ReadError};
use crate::chat::message::Message;
use crate::failpoints::{self, Failpoint};
use crate::store::health::Health;
use crate::store::operation::Operation;
use crate::store::postgres::Database;

/// How often Postgres is asked although nothing was announced: announcements of other replicas may get lost with Redis.
const COMPARE_INTERVAL: Duration = Duration::from_secs(5);

/// The same while Redis is unavailable, and nothing of other replicas is announced.
const COMPARE_INTERVAL_ALONE: Duration = Duration::from_secs(1);

/// After a failure.
const RETRY: Duration = Duration::from_millis(500);

/// Messages of one step. When there are more, each stream reads its own from Postgres, and the others not at all.
const STEP_MAX: i64 = 4096;

/// An older message that was not announced has been missed.
const ANNOUNCED_WITHIN: Duration = Duration::from_millis(500);

/// A message since the last step, and what is the same in all rows. Without a message only that. What has no id is no message: of
/// the sender's messages those up to this seq were erased.
struct Row {
    snapshot: String,
    now: OffsetDateTime,
    xact: Option<String>,
    conversation: Option<Uuid>,
    low: Option<Uuid>,
    high: Option<Uuid>,
    id: Option<Uuid>,
    seq: Option<i64>,
    sender: Option<Uuid>,
    content: Option<String>,
    created_at: Option<OffsetDateTime>,
}

/// Runs until the process ends.
pub(crate) async fn follow(streams: Arc<Streams>, database: Database, health: Arc<Health>) {
    let mut compared = Instant::now();
    loop {
        let interval = match streams.wake_ups.is_listening() {
            true => COMPARE_INTERVAL,
            false => COMPARE_INTERVAL_ALONE,
        };
        let is_announced = tokio::select! {
            () = streams.announced.notified() => true,
            () = streams.wake_ups.reconnected() => false,
            () = tokio::time::sleep_until(compared + interval) => false,
        };
        if !is_announced {
            compared = Instant::now();
            if failpoints::is_on(Failpoint::IgnoreGapCheck) && streams.seen().is_some() {
                continue;
            }
        }
        // Before the migrations there is nothing to ask, and the log need not say so.
        while !health.has_tables() {
            tokio::time::sleep(RETRY).await;
        }
        let announced_since = streams.take_first_announcement();
        if let Err(error) = step(&streams, &database, is_announced, announced_since).await {
            // The health task logs that Postgres is unavailable.
            tracing::debug!(error = error.to_string(), "new messages were not read");
            tokio::time::sleep(RETRY).await;
            streams.announced.notify_one();
        }
    }
}

/// A message is counted as missed where a comparison finds it that was committed well before `announced_since`, the time of the
/// first announcement that no earlier step has looked at. Whatever came after it may have been announced while Postgres was slow.
async fn step(
    streams: &Streams,
    database: &Database,
    is_announced: bool,
    announced_since: Instant,
) -> Result<(), ReadError> {
    // After a failure, and from time to time, the server may be another one.
    let seen = streams.seen();
    let (Some(seen), true) = (&seen, streams.has_any() && is_announced) else {
        let now = start::current(database).await?;
        let is_same = seen.as_ref().is_some_and(|seen| seen.epoch == now.epoch);
        if !is_same {
            streams.begin(now);
            return Ok(());
        }
        if let (Some(seen), true) = (&seen, streams.has_any()) {
            let found = read(database, &seen.snapshot).await?;
            let missed = streams.distribute(found, announced_since.checked_sub(ANNOUNCED_WITHIN));
            streams.count_gaps(missed);
        } else {
            streams.skip_to(now);
        }
        return Ok(());
    };
    streams.distribute(read(database, &seen.snapshot).await?, None);
    Ok(())
}

/// Everything that was committed since.
async fn read(database: &Database, seen: &Snapshot) -> Result<Found, ReadError> {
    let running: Vec<String> = seen.running.iter().map(u64::to_string).collect();
    let mut session = database.acquire().await?;
    // The limits keep the plan that reads the index in order, whatever the planner believes of the numbers.
    let query = sqlx::query_as!(
        Row,
        r#"SELECT pg_current_snapshot()::text AS "snapshot!", clock_timestamp() AS "now!",
                  m.xact::text AS "xact?", m.conversation_id AS "conversation?", c.low_user AS "low?", c.high_user AS "high?",
                  m.id AS "id?", m.seq AS "seq?", m.sender_id AS "sender?", m.content AS "content?",
                  m.created_at AS "created_at?"
           FROM (VALUES (1)) AS one
           LEFT JOIN (
               (SELECT conversation_id, seq, id, sender_id, content, created_at, xact FROM messages
                WHERE xact >= $1::text::xid8 AND xact < pg_snapshot_xmax(pg_current_snapshot())
                ORDER BY xact LIMIT $3)
               UNION ALL
               (SELECT conversation_id, seq, id, sender_id, content, created_at, xact FROM messages
                WHERE xact = ANY ($2::text[]::xid8[]) ORDER BY xact LIMIT $3)
               UNION ALL
               (SELECT conversation_id, seq, NULL, user_id, NULL, erased_at, xact FROM erased_conversations
                WHERE xact >= $1::text::xid8 AND xact < pg_snapshot_xmax(pg_current_snapshot()) AND seq IS NOT NULL
                ORDER BY xact LIMIT $3)
               UNION ALL
               (SELECT conversation_id, seq, NULL, user_id, NULL, erased_at, xact FROM erased_conversations
                WHERE xact = ANY ($2::text[]::xid8[]) AND seq IS NOT NULL ORDER BY xact LIMIT $3)
           ) m ON true
           LEFT JOIN LATERAL (
               SELECT low_user, high_user FROM conversations WHERE id = m.conversation_id LIMIT 1
           ) c ON true"#,
        seen.next.to_string(),
        &running,
        STEP_MAX + 1,
    );
    let asked = Instant::now();
    let rows = database.run(Operation::ReadNewMessages, query.fetch_all(&mut *session)).await?;
    session.give_back();
    // Postgres has read its clock about half way.
    let read_at = asked + asked.elapsed() / 2;
    let until = rows.first().and_then(|row| row.snapshot.parse().ok()).ok_or(ReadError::Unreadable)?;
    let until = Arc::new(until);
    if rows.len() as i64 > STEP_MAX {
        return Ok(Found { until, messages: None });
    }
    let mut messages: Vec<Read> = rows.into_iter().filter_map(|row| row.read(&until, read_at)).collect();
    messages.sort_unstable_by_key(|read| (read.message.conversation, read.message.seq));
    Ok(Found { until, messages: Some(messages) })
}

impl Row {
    fn read(self, until: &Arc<Snapshot>, read_at: Instant) -> Option<Read> {
        let (conversation, seq, sender_id) = (self.conversation?, self.seq?, self.sender?);
        let (low, high, created_at) = (self.low?, self.high?, self.created_at?);
        let recipient_id = if sender_id == low { high } else { low };
        let (kind, order, users, json) = match (self.id, self.content) {
            (Some(id), Some(content)) => {
                let message = Message::new(id, seq, [sender_id, recipient_id], content, created_at);
                (Kind::Message, seq, [Some(low), Some(high)], message.render().json)
            }
            _ => {
                let json = Erased { peer_id: sender_id, seq }.render();
                (Kind::Erased, AFTER_MESSAGES, [Some(recipient_id), None], json)
            }
        };
        let age = Duration::try_from(self.now - created_at).unwrap_or_default();
        let message = Delivery {
            kind,
            conversation,
            seq: order,
            json,
            xact: self.xact?.parse().ok()?,
            until: Arc::clone(until),
            committed: read_at.checked_sub(age).unwrap_or(read_at),
        };
        Some(Read { users, message: Arc::new(message) })
    }
}
