//! Where Postgres stands now.

use std::sync::Arc;

use uuid::Uuid;

use super::position::{Position, Snapshot};
use crate::store::operation::Operation;
use crate::store::postgres::{Database, reason};

/// What a statement saw, and on which server.
#[derive(Clone, Debug)]
pub(super) struct Seen {
    pub(super) epoch: u64,
    pub(super) snapshot: Arc<Snapshot>,
}

/// Why Postgres did not say what a stream needs.
#[derive(thiserror::Error, Debug)]
pub(super) enum ReadError {
    #[error("Postgres only reads")]
    OnlyReads,
    #[error("an answer of Postgres cannot be read")]
    Unreadable,
    #[error("{}", reason(.0))]
    Database(#[from] sqlx::Error),
}

/// What a stream needs to begin.
pub(super) struct Start {
    /// And the session has not ended.
    pub(super) user_exists: bool,
    /// Messages were removed that the position lacks.
    pub(super) has_lost: bool,
    pub(super) seen: Seen,
}

struct Row {
    read_only: bool,
    user_exists: bool,
    has_lost: bool,
    epoch: String,
    snapshot: String,
}

pub(super) async fn current(database: &Database) -> Result<Seen, ReadError> {
    Ok(of_session(database, Uuid::nil(), Uuid::nil(), None).await?.seen)
}

pub(super) async fn of_session(
    database: &Database,
    user: Uuid,
    session: Uuid,
    position: Option<&Position>,
) -> Result<Start, ReadError> {
    let seen = position.map(|position| position.seen.to_string());
    let within = position.and_then(|position| position.within.as_ref());
    let (conversation, seq) = within.map_or((Uuid::nil(), 0), |within| (within.conversation, within.seq));
    let mut connection = database.acquire().await?;
    let query = sqlx::query_as!(
        Row,
        r#"SELECT current_setting('transaction_read_only')::boolean AS "read_only!",
                  EXISTS (SELECT FROM users WHERE id = $1)
                      AND NOT EXISTS (SELECT FROM ended_sessions WHERE session_id = $2) AS "user_exists!",
                  CASE WHEN $3::text IS NULL THEN false ELSE EXISTS (
                      SELECT FROM conversations
                      WHERE (low_user = $1 OR high_user = $1) AND id >= $4
                        AND NOT pg_visible_in_snapshot(removed_xact, $3::text::pg_snapshot)
                        AND first_seq - 1 > CASE WHEN id = $4 THEN $5::bigint ELSE 0 END
                  ) END AS "has_lost!",
                  position_epoch() AS "epoch!",
                  pg_current_snapshot()::text AS "snapshot!""#,
        user,
        session,
        seen,
        conversation,
        seq,
    );
    let row = database.run(Operation::ReadPosition, query.fetch_one(&mut *connection)).await?;
    connection.give_back();
    if row.read_only {
        return Err(ReadError::OnlyReads);
    }
    let seen = self::seen(&row.epoch, &row.snapshot).ok_or(ReadError::Unreadable)?;
    Ok(Start { user_exists: row.user_exists, has_lost: row.has_lost, seen })
}

/// From the texts of `position_epoch()` and `pg_current_snapshot()`.
pub(super) fn seen(epoch: &str, snapshot: &str) -> Option<Seen> {
    Some(Seen { epoch: number(epoch)?, snapshot: Arc::new(snapshot.parse().ok()?) })
}

/// A number for the server and its timeline: `SYSTEM_IDENTIFIER.TIMELINE`, the second in hexadecimal digits.
fn number(epoch: &str) -> Option<u64> {
    let (server, timeline) = epoch.split_once('.')?;
    let server = server.parse::<i64>().ok()?.cast_unsigned();
    let timeline = u64::from(u32::from_str_radix(timeline, 16).ok()?);
    // Identifiers begin with the time of `initdb`: the timeline goes where they differ least.
    Some(server ^ timeline.rotate_left(40))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_epoch_is_a_server_and_a_timeline() {
        let [one, failed_over, other] = ["7445.00000001", "7445.00000002", "7446.00000001"].map(number);
        assert!(one.is_some() && one != failed_over && one != other && failed_over != other);
        assert_eq!(number("7445"), None);
        assert_eq!(number("x.1"), None);
    }
}
