//! A user's conversations, most recently active first.
//!
//! An index on the time of the last message would change with each message. So the indexes have the hour of it, which a trigger
//! notes: a message costs nothing more to send, but for the first one of an hour. The statement looks for the hour in which the
//! page ends, and sorts the conversations of that hour and later ones.
//!
//! A conversation from before that column, and one with a single message, have no hour yet, which is 0, until [`super::sweep`]
//! notes it. The statement sorts all that the user has of these. The sweep's index is on those with `active_hour = 0`; the
//! condition `<= 0` here keeps the planner from it, because it has those of all users.
//!
//! Those of which nothing is left are not among them.

use time::{Date, OffsetDateTime};
use uuid::Uuid;

use super::message::{Message, RenderedMessage};
use super::streams::Streams;
use crate::store::operation::Operation;
use crate::store::postgres::Database;

/// Where a page ends: after this conversation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Cursor {
    pub(crate) last_at: OffsetDateTime,
    pub(crate) conversation: Uuid,
}

impl Cursor {
    /// The first page follows it.
    const BEFORE_ALL: Self = Self { last_at: Date::MAX.midnight().assume_utc(), conversation: Uuid::max() };
}

#[derive(Debug)]
pub(crate) struct Conversation {
    pub(crate) peer: Uuid,
    /// `None` once the peer was deleted.
    pub(crate) peer_username: Option<String>,
    pub(crate) last_message: RenderedMessage,
}

#[derive(Debug)]
pub(crate) struct Conversations {
    pub(crate) conversations: Vec<Conversation>,
    /// Where the next page begins.
    pub(crate) next: Option<Cursor>,
    /// Taken together with the list: a stream from here on has everything that the list lacks.
    pub(crate) position: String,
}

#[derive(thiserror::Error, Debug)]
pub(crate) enum ConversationsError {
    #[error("the user was deleted")]
    UserGone,
    #[error("Postgres only reads, and lacks the user")]
    MayBeMissing,
    #[error("Postgres only reads")]
    OnlyReads,
    #[error("an answer of Postgres cannot be read")]
    Unreadable,
    #[error(transparent)]
    Database(#[from] sqlx::Error),
}

/// A conversation, or none, and what is the same in all rows.
struct Row {
    read_only: bool,
    user_exists: bool,
    epoch: String,
    snapshot: String,
    conversation: Option<Uuid>,
    peer: Option<Uuid>,
    username: Option<String>,
    last_at: Option<OffsetDateTime>,
    id: Option<Uuid>,
    seq: Option<i64>,
    sender: Option<Uuid>,
    content: Option<String>,
    created_at: Option<OffsetDateTime>,
}

/// At most `limit` conversations after the cursor.
pub(crate) async fn list(
    database: &Database,
    user: Uuid,
    session: Uuid,
    after: Option<Cursor>,
    limit: i64,
) -> Result<Conversations, ConversationsError> {
    let Cursor { last_at, conversation } = after.unwrap_or(Cursor::BEFORE_ALL);
    let mut connection = database.acquire().await?;
    let query = sqlx::query_as!(
        Row,
        r#"WITH low AS (
               -- IS NOT TRUE: of a plain comparison the planner expects to remove most rows, and then it sorts all of them
               -- instead of reading the first ones in the order of the index.
               SELECT min(active_hour) AS oldest_hour FROM (
                   SELECT active_hour FROM conversations
                   WHERE low_user = $1 AND active_hour <= hour_of($2)
                     AND (first_seq > last_seq) IS NOT TRUE AND ((last_at, id) >= ($2, $3)) IS NOT TRUE
                   ORDER BY active_hour DESC LIMIT $4
               ) AS newest
           ), high AS (
               SELECT min(active_hour) AS oldest_hour FROM (
                   SELECT active_hour FROM conversations
                   WHERE high_user = $1 AND active_hour <= hour_of($2)
                     AND (first_seq > last_seq) IS NOT TRUE AND ((last_at, id) >= ($2, $3)) IS NOT TRUE
                   ORDER BY active_hour DESC LIMIT $4
               ) AS newest
           ), own AS (
               -- No OR: a plan for any user would read all of the user's conversations, of which it expects few.
               SELECT id, high_user AS peer, last_seq, last_at FROM conversations
               WHERE low_user = $1 AND first_seq <= last_seq AND (last_at, id) < ($2, $3)
                 AND active_hour BETWEEN (SELECT greatest(oldest_hour, 1) FROM low) AND hour_of($2)
               UNION ALL
               SELECT id, high_user AS peer, last_seq, last_at FROM conversations
               WHERE low_user = $1 AND first_seq <= last_seq AND (last_at, id) < ($2, $3)
                 AND active_hour <= 0
               UNION ALL
               SELECT id, low_user AS peer, last_seq, last_at FROM conversations
               WHERE high_user = $1 AND first_seq <= last_seq AND (last_at, id) < ($2, $3)
                 AND active_hour BETWEEN (SELECT greatest(oldest_hour, 1) FROM high) AND hour_of($2)
               UNION ALL
               SELECT id, low_user AS peer, last_seq, last_at FROM conversations
               WHERE high_user = $1 AND first_seq <= last_seq AND (last_at, id) < ($2, $3)
                 AND active_hour <= 0
           ), page AS MATERIALIZED (
               SELECT * FROM own ORDER BY last_at DESC, id DESC LIMIT $4
           )
           SELECT current_setting('transaction_read_only')::boolean AS "read_only!",
                  EXISTS (SELECT FROM users WHERE id = $1)
                      AND NOT EXISTS (SELECT FROM ended_sessions WHERE session_id = $5) AS "user_exists!",
                  position_epoch() AS "epoch!", pg_current_snapshot()::text AS "snapshot!",
                  p.id AS "conversation?", p.peer AS "peer?", u.username AS "username?", p.last_at AS "last_at?",
                  m.id AS "id?", m.seq AS "seq?", m.sender_id AS "sender?", m.content AS "content?",
                  m.created_at AS "created_at?"
           FROM (VALUES (1)) AS one
           LEFT JOIN page p ON true
           LEFT JOIN messages m ON m.conversation_id = p.id AND m.seq = p.last_seq
           LEFT JOIN users u ON u.id = p.peer
           ORDER BY p.last_at DESC, p.id DESC"#,
        user,
        last_at,
        conversation,
        limit + 1,
        session,
    );
    let rows = database.run(Operation::ListConversations, query.fetch_all(&mut *connection)).await?;
    connection.give_back();
    let first = rows.first().ok_or(ConversationsError::Unreadable)?;
    match (first.user_exists, first.read_only) {
        (false, true) => return Err(ConversationsError::MayBeMissing),
        (false, false) => return Err(ConversationsError::UserGone),
        // An old primary may lag behind, and its snapshots are no positions.
        (true, true) => return Err(ConversationsError::OnlyReads),
        (true, false) => {}
    }
    let position =
        Streams::position(user, &first.epoch, &first.snapshot).ok_or(ConversationsError::Unreadable)?;
    let mut listed: Vec<(Cursor, Conversation)> =
        rows.into_iter().filter_map(|row| row.conversation(user)).collect();
    let limit = usize::try_from(limit).unwrap_or_default();
    let has_more = listed.len() > limit;
    listed.truncate(limit);
    let next = listed.last().filter(|_| has_more).map(|(cursor, _)| *cursor);
    let conversations = listed.into_iter().map(|(_, conversation)| conversation).collect();
    Ok(Conversations { conversations, next, position })
}

impl Row {
    fn conversation(self, user: Uuid) -> Option<(Cursor, Conversation)> {
        let (peer, sender_id) = (self.peer?, self.sender?);
        let recipient_id = if sender_id == user { peer } else { user };
        let users = [sender_id, recipient_id];
        let message = Message::new(self.id?, self.seq?, users, self.content?, self.created_at?);
        let cursor = Cursor { last_at: self.last_at?, conversation: self.conversation? };
        let conversation =
            Conversation { peer, peer_username: self.username, last_message: message.render() };
        Some((cursor, conversation))
    }
}
