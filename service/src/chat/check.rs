//! Compares windows with Postgres from time to time, while they are read, so that they also show a message whose writer died
//! before it could append it, and no message that was removed by a process that died.
//!
//! Readers do not wait for it. What they ask for gathers while the statement before runs, and a little longer: one statement
//! compares many conversations at a small part of the price of one for each.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use super::message::Pair;
use super::permission::{Permission, Windows};
use super::recent::Recent;
use crate::store::operation::Operation;
use crate::store::postgres::{Database, reason};

/// For how long requests gather.
const GATHER: Duration = Duration::from_millis(50);

/// Runs until the process ends.
pub(crate) async fn windows(recent: Arc<Recent>, permission: Arc<Permission>, database: Database) {
    loop {
        recent.due().await;
        tokio::time::sleep(GATHER).await;
        if let Err(error) = check(&recent, &permission, &database, recent.take_due()).await {
            // The health task logs that Postgres is unavailable.
            tracing::debug!(error = reason(&error), "windows were not compared with Postgres");
        }
    }
}

async fn check(
    recent: &Recent,
    permission: &Permission,
    database: &Database,
    mut newest: HashMap<Pair, i64>,
) -> Result<(), sqlx::Error> {
    // Those of another epoch are gone, and so is what was to be compared.
    let Windows::Usable(live, epoch) = permission.windows() else { return Ok(()) };
    for Change { pair, shown, removed } in changed(database, &newest, recent.window()).await? {
        if newest.get(&pair).is_some_and(|newest| *newest < shown) {
            newest.remove(&pair);
        }
        if recent.settle_under(&live, &epoch, pair, shown, removed).await.is_err() {
            return Ok(());
        }
    }
    let whole: Vec<Pair> = newest.into_keys().collect();
    recent.extend(&live, &epoch, &whole).await.ok();
    Ok(())
}

/// What a list may not have yet.
struct Change {
    pair: Pair,
    /// The seq of the last message, or 0.
    shown: i64,
    /// All messages up to this seq were removed.
    removed: i64,
}

/// The conversations that have newer messages, or lack such as a list of this size may have.
async fn changed(
    database: &Database,
    newest: &HashMap<Pair, i64>,
    window: usize,
) -> Result<Vec<Change>, sqlx::Error> {
    let low: Vec<_> = newest.keys().map(|pair| pair.low()).collect();
    let high: Vec<_> = newest.keys().map(|pair| pair.high()).collect();
    let seqs: Vec<_> = newest.values().copied().collect();
    let query = sqlx::query!(
        r#"SELECT c.low_user, c.high_user, c.first_seq - 1 AS "removed!",
                CASE WHEN c.first_seq <= c.last_seq THEN c.last_seq ELSE 0 END AS "shown!"
         FROM unnest($1::uuid[], $2::uuid[], $3::bigint[]) AS window_of (low, high, newest)
         JOIN conversations c ON c.low_user = window_of.low AND c.high_user = window_of.high
         WHERE (c.last_seq > window_of.newest AND c.first_seq <= c.last_seq)
            OR (c.first_seq > 1 AND c.first_seq > window_of.newest - $4)"#,
        &low,
        &high,
        &seqs,
        window as i64,
    );
    let mut connection = database.acquire().await?;
    let rows = database.run(Operation::CheckWindows, query.fetch_all(&mut *connection)).await?;
    let change = |pair, shown, removed| Change { pair, shown, removed };
    Ok(rows
        .into_iter()
        .map(|row| change(Pair::new(row.low_user, row.high_user), row.shown, row.removed))
        .collect())
}
