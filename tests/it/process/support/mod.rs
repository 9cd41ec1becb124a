//! Starts the built binary in a clean environment, sends it requests, and looks into its database.
//!
//! Every wait has a limit, and the limits are generous: they tell a hang from a slow machine, not fast from slow.

mod database;
mod process;
mod service;

use std::sync::atomic::{AtomicU16, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use tests::servers::daemon;
pub(super) use tests::{PASSWORD, User};
use tests::{Redis, RedisOptions, Scratch};

use crate::support::wait_for_a_minute;

pub(super) use self::database::{Database, Held};
pub(super) use self::process::Start;
pub(super) use self::service::{Response, Service};

/// A wait that takes longer means that something hangs.
pub(super) const LIMIT: Duration = Duration::from_secs(60);

/// Long enough for production, and of no value to anyone.
pub(super) const STRONG_KEY: &str = "a-test-key-of-more-than-thirty-two-bytes";

/// Asks until there is an answer. `what` is what the caller waits for.
pub(super) fn eventually<T>(what: &str, mut ask: impl FnMut() -> Option<T>) -> Result<T> {
    daemon::poll(LIMIT, || Ok(ask()))?.with_context(|| format!("waited {} s for {what}", LIMIT.as_secs()))
}

/// Waits, if need be, so that the next requests fall into one minute of the rate limits.
pub(super) fn start_in_one_minute() {
    thread::sleep(wait_for_a_minute());
}

/// Fails if any of the secrets is in the text.
pub(super) fn has_none_of<'a>(text: &str, secrets: impl IntoIterator<Item = &'a str>) -> Result<()> {
    for secret in secrets {
        let line = text.lines().find(|line| line.contains(secret));
        ensure!(line.is_none(), "{secret} is disclosed: {line:?}");
    }
    Ok(())
}

/// A Redis for one test, and the directory that it needs.
pub(super) fn private_redis() -> Result<(Scratch, Redis)> {
    let scratch = Scratch::new("redis")?;
    let redis = Redis::start(&scratch.path().join("redis"), RedisOptions::default())?;
    Ok((scratch, redis))
}

/// The URL of a database on the server of `TEST_REDIS_URL`, from the upper half of those that it has.
pub(super) fn shared_redis() -> String {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let url = std::env::var("TEST_REDIS_URL").expect("TEST_REDIS_URL: run by `cargo xtask test`");
    let server = url.splitn(4, '/').take(3).collect::<Vec<_>>().join("/");
    let start = std::process::id().wrapping_mul(97) as u16;
    let number = start.wrapping_add(NEXT.fetch_add(1, Ordering::Relaxed)) % 2048;
    format!("{server}/{}", 2048 + number)
}

/// A port that refuses connections.
pub(super) fn closed_port() -> Result<u16> {
    tests::servers::ports::free()
}

/// Fails unless `work` ends within the limit, which is shorter than the timeout that it must not run into.
pub(super) fn within<T>(limit: Duration, what: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let started = Instant::now();
    let outcome = work()?;
    let taken = started.elapsed();
    ensure!(taken < limit, "{what} took {taken:?}, more than {limit:?}");
    Ok(outcome)
}
