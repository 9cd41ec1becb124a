//! What a stream lacks, read from Postgres for its user alone: after a reconnect, or when it fell behind.

use time::OffsetDateTime;
use uuid::Uuid;

use super::erased::{AFTER_MESSAGES, Erased};
use super::mailbox::Kind;
use super::position::{Position, Snapshot, Within};
use super::start::ReadError;
use crate::chat::message::Message;
use crate::store::operation::Operation;
use crate::store::postgres::Database;

/// Messages in one statement.
const PAGE: i64 = 100;

/// A page of what was missed, in the order of conversation and seq.
#[derive(Debug)]
pub(super) struct Missed {
    /// Each with the position after it.
    pub(super) messages: Vec<(Position, Kind, Vec<u8>)>,
    /// Where the stream stands after them.
    pub(super) position: Position,
    /// False if there is more.
    pub(super) is_all: bool,
    /// Messages were removed that belong here.
    pub(super) has_lost: bool,
}

/// A message, or none, and what the statement saw. What has no id is no message: of the sender's messages those up to this seq were
/// erased.
struct Row {
    snapshot: String,
    has_lost: bool,
    conversation: Option<Uuid>,
    low: Option<Uuid>,
    high: Option<Uuid>,
    id: Option<Uuid>,
    seq: Option<i64>,
    sender: Option<Uuid>,
    content: Option<String>,
    created_at: Option<OffsetDateTime>,
}

/// Reads the next page from a position on.
///
/// What a position lacks in a conversation is the newest part of it: a message is visible only together with all before it.
/// So the statement looks at the conversations that were touched since, and goes back in each until it meets what was seen.
pub(super) async fn read(database: &Database, from: Position) -> Result<Missed, ReadError> {
    let (until, conversation, seq) = match &from.within {
        Some(within) => (Some(within.until.to_string()), within.conversation, within.seq),
        None => (None, Uuid::nil(), 0),
    };
    let mut session = database.acquire().await?;
    let query = sqlx::query_as!(
        Row,
        r#"WITH touched AS MATERIALIZED (
               SELECT id, low_user, high_user, first_seq, removed_xact FROM conversations
               WHERE low_user = $1 AND NOT pg_visible_in_snapshot(last_xact, $2::text::pg_snapshot)
               UNION ALL
               SELECT id, low_user, high_user, first_seq, removed_xact FROM conversations
               WHERE high_user = $1 AND NOT pg_visible_in_snapshot(last_xact, $2::text::pg_snapshot)
           )
           SELECT pg_current_snapshot()::text AS "snapshot!",
                  EXISTS (SELECT FROM touched
                          WHERE id >= $4 AND NOT pg_visible_in_snapshot(removed_xact, $2::text::pg_snapshot)
                            AND first_seq - 1 > CASE WHEN id = $4 THEN $5::bigint ELSE 0 END) AS "has_lost!",
                  m.conversation_id AS "conversation?",
                  m.low_user AS "low?", m.high_user AS "high?", m.id AS "id?", m.seq AS "seq?",
                  m.sender_id AS "sender?", m.content AS "content?", m.created_at AS "created_at?"
           FROM (VALUES (1)) AS one
           LEFT JOIN (
               SELECT * FROM (
               (SELECT t.low_user, t.high_user, n.*
               FROM touched t
               CROSS JOIN LATERAL (
                   SELECT coalesce((SELECT seq FROM messages
                                    WHERE conversation_id = t.id
                                      AND (xact IS NULL OR pg_visible_in_snapshot(xact, $2::text::pg_snapshot))
                                    ORDER BY seq DESC LIMIT 1), 0) AS seen
               ) s
               CROSS JOIN LATERAL (
                   SELECT conversation_id, seq, id, sender_id, content, created_at FROM messages
                   WHERE conversation_id = t.id AND seq > greatest(s.seen, CASE WHEN t.id = $4::uuid THEN $5::bigint ELSE 0 END)
                     AND ($3::text IS NULL OR pg_visible_in_snapshot(xact, $3::text::pg_snapshot))
                   ORDER BY seq LIMIT $6
               ) n
               WHERE t.id >= $4
               ORDER BY n.conversation_id, n.seq LIMIT $6)
               UNION ALL
               (SELECT least(user_id, peer_id), greatest(user_id, peer_id), conversation_id, seq, NULL, user_id, NULL, erased_at
               FROM erased_conversations
               WHERE peer_id = $1 AND seq IS NOT NULL AND NOT pg_visible_in_snapshot(xact, $2::text::pg_snapshot)
                 AND ($3::text IS NULL OR pg_visible_in_snapshot(xact, $3::text::pg_snapshot))
                 AND (conversation_id > $4 OR conversation_id = $4 AND $5 < $7)
               ORDER BY conversation_id LIMIT $6)
               ) n
               ORDER BY conversation_id, id IS NULL, seq LIMIT $6
           ) m ON true"#,
        from.user,
        from.seen.to_string(),
        until,
        conversation,
        seq,
        PAGE + 1,
        AFTER_MESSAGES,
    );
    let rows = database.run(Operation::ReadMissedMessages, query.fetch_all(&mut *session)).await?;
    session.give_back();
    missed(rows, from).ok_or(ReadError::Unreadable)
}

fn missed(mut rows: Vec<Row>, from: Position) -> Option<Missed> {
    let until = match &from.within {
        Some(within) => within.until.clone(),
        None => rows.first()?.snapshot.parse::<Snapshot>().ok()?,
    };
    let has_lost = rows.first().is_some_and(|row| row.has_lost);
    let is_all = rows.len() as i64 <= PAGE;
    rows.truncate(PAGE as usize);
    let messages: Vec<(Position, Kind, Vec<u8>)> =
        rows.into_iter().filter_map(|row| row.message(&from, &until)).collect();
    let position = match messages.last() {
        Some((position, ..)) if !is_all => position.clone(),
        _ => Position { seen: until, within: None, ..from },
    };
    // What was committed after `until` is still to come.
    let is_all = is_all && from.within.is_none();
    Some(Missed { messages, position, is_all, has_lost })
}

impl Row {
    fn message(self, from: &Position, until: &Snapshot) -> Option<(Position, Kind, Vec<u8>)> {
        let (conversation, seq, sender_id) = (self.conversation?, self.seq?, self.sender?);
        let (low, high) = (self.low?, self.high?);
        let recipient_id = if sender_id == low { high } else { low };
        let (kind, seq, json) = match (self.id, self.content) {
            (Some(id), Some(content)) => {
                let message = Message::new(id, seq, [sender_id, recipient_id], content, self.created_at?);
                (Kind::Message, seq, message.render().json)
            }
            _ => (Kind::Erased, AFTER_MESSAGES, Erased { peer_id: sender_id, seq }.render()),
        };
        let within = Some(Within { until: until.clone(), conversation, seq });
        Some((Position { within, ..from.clone() }, kind, json))
    }
}
