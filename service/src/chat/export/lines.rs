//! What an export has beside messages, in pages: one short statement each, a range of a key.

use serde::Serialize;
use time::OffsetDateTime;
use uuid::Uuid;

use crate::store::operation::Operation;
use crate::store::postgres::Database;
use crate::timestamp;

/// Rows of one statement: a few milliseconds.
pub(super) const PAGE_ROWS: i64 = 200;

#[derive(Serialize)]
pub(super) struct User {
    pub(super) id: Uuid,
    username: String,
    email: String,
    #[serde(serialize_with = "timestamp::serialize")]
    created_at: OffsetDateTime,
}

#[derive(Serialize)]
pub(super) struct Session {
    pub(super) id: Uuid,
    #[serde(serialize_with = "timestamp::serialize")]
    created_at: OffsetDateTime,
    #[serde(serialize_with = "timestamp::serialize")]
    last_used_at: OffsetDateTime,
    client_address: Option<String>,
    user_agent: Option<String>,
}

#[derive(Serialize)]
pub(super) struct Block {
    pub(super) id: Uuid,
    username: String,
    #[serde(serialize_with = "timestamp::serialize")]
    created_at: OffsetDateTime,
}

#[derive(Serialize)]
pub(super) struct Conversation {
    pub(super) peer_id: Uuid,
    /// `null` once the peer was deleted.
    peer_username: Option<String>,
    last_seq: i64,
}

pub(super) async fn user(database: &Database, user: Uuid) -> Result<Option<User>, sqlx::Error> {
    let mut connection = database.acquire().await?;
    let query =
        sqlx::query_as!(User, "SELECT id, username, email, created_at FROM users WHERE id = $1", user);
    database.run(Operation::ReadExport, query.fetch_optional(&mut *connection)).await
}

pub(super) async fn sessions(
    database: &Database,
    user: Uuid,
    after: Uuid,
) -> Result<Vec<Session>, sqlx::Error> {
    let mut connection = database.acquire().await?;
    let query = sqlx::query_as!(
        Session,
        "SELECT id, created_at, last_used_at, client_address, user_agent FROM sessions
         WHERE user_id = $1 AND id > $2 ORDER BY id LIMIT $3",
        user,
        after,
        PAGE_ROWS,
    );
    database.run(Operation::ReadExport, query.fetch_all(&mut *connection)).await
}

pub(super) async fn blocks(database: &Database, user: Uuid, after: Uuid) -> Result<Vec<Block>, sqlx::Error> {
    let mut connection = database.acquire().await?;
    let query = sqlx::query_as!(
        Block,
        "SELECT b.blocked AS id, u.username, b.created_at FROM blocks b JOIN users u ON u.id = b.blocked
         WHERE b.blocker = $1 AND b.blocked > $2 ORDER BY b.blocked LIMIT $3",
        user,
        after,
        PAGE_ROWS,
    );
    database.run(Operation::ReadExport, query.fetch_all(&mut *connection)).await
}

/// Reads all of the user's conversations behind the peer, which are narrow rows, as the list of conversations does.
pub(super) async fn conversations(
    database: &Database,
    user: Uuid,
    after: Uuid,
) -> Result<Vec<Conversation>, sqlx::Error> {
    let mut connection = database.acquire().await?;
    let query = sqlx::query_as!(
        Conversation,
        r#"WITH page AS MATERIALIZED (
               SELECT high_user AS peer, last_seq FROM conversations WHERE low_user = $1 AND high_user > $2
               UNION ALL
               SELECT low_user AS peer, last_seq FROM conversations WHERE high_user = $1 AND low_user > $2
               ORDER BY peer LIMIT $3
           )
           SELECT p.peer AS "peer_id!", u.username AS "peer_username?", p.last_seq AS "last_seq!"
           FROM page p LEFT JOIN users u ON u.id = p.peer
           ORDER BY p.peer"#,
        user,
        after,
        PAGE_ROWS,
    );
    database.run(Operation::ReadExport, query.fetch_all(&mut *connection)).await
}
