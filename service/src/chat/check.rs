//! Compares windows with Postgres from time to time, while they are read, so that they also show a message whose writer died
//! before it could append it.
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
    for (pair, last_seq) in behind(database, &newest).await? {
        newest.remove(&pair);
        if recent.settle_under(&live, &epoch, pair, last_seq).await.is_err() {
            return Ok(());
        }
    }
    let whole: Vec<Pair> = newest.into_keys().collect();
    recent.extend(&live, &epoch, &whole).await.ok();
    Ok(())
}

/// The conversations that have newer messages, each with its last seq.
async fn behind(database: &Database, newest: &HashMap<Pair, i64>) -> Result<Vec<(Pair, i64)>, sqlx::Error> {
    let low: Vec<_> = newest.keys().map(|pair| pair.low()).collect();
    let high: Vec<_> = newest.keys().map(|pair| pair.high()).collect();
    let seqs: Vec<_> = newest.values().copied().collect();
    let query = sqlx::query!(
        "SELECT c.low_user, c.high_user, c.last_seq
         FROM unnest($1::uuid[], $2::uuid[], $3::bigint[]) AS window_of (low, high, newest)
         JOIN conversations c ON c.low_user = window_of.low AND c.high_user = window_of.high
         WHERE c.last_seq > window_of.newest",
        &low,
        &high,
        &seqs,
    );
    let mut connection = database.acquire().await?;
    let rows = database.run(Operation::CheckWindows, query.fetch_all(&mut *connection)).await?;
    Ok(rows.into_iter().map(|row| (Pair::new(row.low_user, row.high_user), row.last_seq)).collect())
}
