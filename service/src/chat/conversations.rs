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
    let query = sqlx::query_file_as!(
        Row,
        "src/chat/conversations.sql",
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
