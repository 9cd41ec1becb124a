//! Waits until every statement that may not have seen a change has ended.
//!
//! A statement that stores messages reads under its snapshot whether the sender may send. One that began before a block, a
//! logout or a deletion was committed may store its messages after it. Nothing of that may happen after the change was
//! acknowledged. Senders could lock what they read, but then every message would pay for it. Here the rare side pays: it
//! commits, then waits for the statements in flight, as `CREATE INDEX CONCURRENTLY` does.
//!
//! Every such statement locks the table `messages` until its transaction ends, and takes this lock before its snapshot. So
//! one that is not in `pg_locks` after the commit has a later snapshot, which sees the change.

use std::time::Duration;

use tokio::time::Instant;

use super::operation::Operation;
use super::postgres::Database;

/// Between two looks: a statement of a batch takes a few milliseconds.
const PAUSE: Duration = Duration::from_millis(3);

/// Waits for the transactions that write messages now. The caller's change is committed. It fails when one of them outlasts
/// `limit`.
pub(crate) async fn writers_before_now_have_ended(
    database: &Database,
    limit: Duration,
) -> Result<(), sqlx::Error> {
    let deadline = Instant::now() + limit;
    let mut writers = running(database, None).await?;
    while !writers.is_empty() {
        if Instant::now() >= deadline {
            return Err(sqlx::Error::PoolTimedOut);
        }
        tokio::time::sleep(PAUSE).await;
        writers = running(database, Some(&writers)).await?;
    }
    Ok(())
}

/// The transactions that write messages now, of those that did before.
async fn running(database: &Database, before: Option<&[String]>) -> Result<Vec<String>, sqlx::Error> {
    let mut session = database.acquire().await?;
    let query = sqlx::query_scalar!(
        r#"SELECT virtualtransaction || '.' || pid AS "writer!" FROM pg_locks
           WHERE locktype = 'relation' AND relation = 'messages'::regclass AND granted
             AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
             AND mode = 'RowExclusiveLock' AND pid <> pg_backend_pid()
             AND ($1::text[] IS NULL OR virtualtransaction || '.' || pid = ANY ($1))"#,
        before,
    );
    let running = database.run(Operation::AwaitWriters, query.fetch_all(&mut *session)).await?;
    session.give_back();
    Ok(running)
}
