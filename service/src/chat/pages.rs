//! Pages of messages from Postgres: one statement each, on one snapshot.

use std::time::Duration;

use time::OffsetDateTime;
use tokio::time::Instant;
use uuid::Uuid;

use super::message::{Message, Pair};
use super::recent::Newest;
use crate::store::operation::Operation;
use crate::store::postgres::Database;

/// Which messages a reader asks for.
#[derive(Clone, Copy, Debug)]
pub struct PageRequest {
    pub reader: Uuid,
    pub session: Uuid,
    pub peer: Uuid,
    pub limit: i64,
    pub position: Position,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Position {
    /// After the newest `n`.
    Offset(i64),
    /// Below a seq.
    Before(i64),
    /// Directly above a seq.
    After(i64),
}

/// What Postgres answered.
#[derive(Debug, Default)]
pub(super) struct Loaded {
    /// Postgres took no writes: it may be an old primary, which lags behind.
    pub(super) read_only: bool,
    /// And the session has not ended.
    pub(super) reader_exists: bool,
    /// Or there is a conversation with somebody who was deleted.
    pub(super) peer_exists: bool,
    pub(super) last_seq: i64,
    /// Newest first, and where history begins.
    pub(super) newest: Newest,
}

/// A message, or none, and what is the same in all rows.
struct Row {
    read_only: bool,
    reader_exists: bool,
    peer_exists: bool,
    last_seq: i64,
    removed: i64,
    id: Option<Uuid>,
    seq: Option<i64>,
    sender_id: Option<Uuid>,
    content: Option<String>,
    created_at: Option<OffsetDateTime>,
}

/// Whether Postgres takes writes, whether both users exist or have existed, where the conversation begins and ends, and the page.
/// Whatever its position, the page is one range of the primary key, read in order up to its limit.
pub(super) async fn load(
    database: &Database,
    request: &PageRequest,
    pair: Pair,
    limit: Duration,
) -> Result<Loaded, sqlx::Error> {
    let deadline = Instant::now() + limit;
    let mut session = database.acquire_within(limit).await?;
    let &PageRequest { reader, session: token_session, peer, limit, position } = request;
    let rows = match position {
        Position::After(seq) => {
            let query = sqlx::query_as!(
                Row,
                r#"SELECT current_setting('transaction_read_only')::boolean AS "read_only!",
                          EXISTS (SELECT FROM users WHERE id = $1)
                              AND NOT EXISTS (SELECT FROM ended_sessions WHERE session_id = $7) AS "reader_exists!",
                          c.id IS NOT NULL OR EXISTS (SELECT FROM users WHERE id = $2) AS "peer_exists!",
                          coalesce(c.last_seq, 0) AS "last_seq!", coalesce(c.first_seq, 1) - 1 AS "removed!",
                          m.id AS "id?", m.seq AS "seq?", m.sender_id AS "sender_id?", m.content AS "content?",
                          m.created_at AS "created_at?"
                   FROM (VALUES (1)) AS one
                   LEFT JOIN conversations c ON c.low_user = $3 AND c.high_user = $4
                   LEFT JOIN LATERAL (
                       SELECT id, seq, sender_id, content, created_at FROM messages
                       WHERE conversation_id = c.id AND seq > $5
                       ORDER BY seq LIMIT $6
                   ) m ON true"#,
                reader,
                peer,
                pair.low(),
                pair.high(),
                seq,
                limit,
                token_session,
            );
            let rows = database.run(Operation::ReadMessages, query.fetch_all(&mut *session));
            tokio::time::timeout_at(deadline, rows).await
        }
        Position::Offset(_) | Position::Before(_) => {
            // The page begins at the first of these that the conversation has: `top`, or `offset` below the last seq. No seq
            // comes near the largest number, so half an offset is beyond all of them, too.
            let (top, offset) = match position {
                Position::Before(seq) => (seq - 1, 0),
                Position::Offset(offset) => (i64::MAX, offset.min(i64::MAX / 2)),
                Position::After(_) => (0, 0),
            };
            let query = sqlx::query_as!(
                Row,
                r#"SELECT current_setting('transaction_read_only')::boolean AS "read_only!",
                          EXISTS (SELECT FROM users WHERE id = $1)
                              AND NOT EXISTS (SELECT FROM ended_sessions WHERE session_id = $8) AS "reader_exists!",
                          c.id IS NOT NULL OR EXISTS (SELECT FROM users WHERE id = $2) AS "peer_exists!",
                          coalesce(c.last_seq, 0) AS "last_seq!", coalesce(c.first_seq, 1) - 1 AS "removed!",
                          m.id AS "id?", m.seq AS "seq?", m.sender_id AS "sender_id?", m.content AS "content?",
                          m.created_at AS "created_at?"
                   FROM (VALUES (1)) AS one
                   LEFT JOIN conversations c ON c.low_user = $3 AND c.high_user = $4
                   LEFT JOIN LATERAL (
                       SELECT id, seq, sender_id, content, created_at FROM messages
                       WHERE conversation_id = c.id AND seq <= least($5, c.last_seq - $6)
                       ORDER BY seq DESC LIMIT $7
                   ) m ON true"#,
                reader,
                peer,
                pair.low(),
                pair.high(),
                top,
                offset,
                limit,
                token_session,
            );
            let rows = database.run(Operation::ReadMessages, query.fetch_all(&mut *session));
            tokio::time::timeout_at(deadline, rows).await
        }
    };
    let rows = rows.unwrap_or(Err(sqlx::Error::PoolTimedOut))?;
    // What follows needs no connection.
    session.give_back();
    Ok(Loaded::of(rows, reader, peer))
}

impl Loaded {
    fn of(rows: Vec<Row>, reader: Uuid, peer: Uuid) -> Self {
        let mut loaded = Self::default();
        let mut messages = Vec::with_capacity(rows.len());
        for row in rows {
            loaded.read_only = row.read_only;
            loaded.reader_exists = row.reader_exists;
            loaded.peer_exists = row.peer_exists;
            loaded.last_seq = row.last_seq;
            loaded.newest.removed = row.removed;
            let (Some(id), Some(seq), Some(sender_id), Some(content), Some(created_at)) =
                (row.id, row.seq, row.sender_id, row.content, row.created_at)
            else {
                continue;
            };
            let recipient_id = if sender_id == reader { peer } else { reader };
            let message = Message::new(id, seq, [sender_id, recipient_id], content, created_at);
            messages.push(message.render());
        }
        messages.sort_unstable_by_key(|message| std::cmp::Reverse(message.seq));
        loaded.newest.messages = messages;
        loaded
    }
}
