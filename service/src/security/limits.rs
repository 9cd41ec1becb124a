//! Rate limits: fixed windows of a minute, counted in Redis for all replicas together, and per process while Redis is
//! unavailable. No fault switches them off.

use std::collections::HashMap;
use std::hash::{BuildHasher as _, BuildHasherDefault, DefaultHasher};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use deadpool_redis::redis;
use strum::VariantArray as _;

use crate::config::Config;
use crate::store::operation::Operation;
use crate::store::redis::Redis;
use crate::telemetry::metrics::Metrics;

const WINDOW: Duration = Duration::from_secs(60);

/// The expiry of a counter: two windows, because replicas' clocks may differ a little.
const KEY_TTL: Duration = Duration::from_secs(120);

/// A window's counters are the fields of a few hashes: one cheap command counts, and few keys need an expiry. There are
/// several hashes, so that a cluster shares the work and none takes long to delete.
const SHARDS: u64 = 64;

/// Subjects counted in this process; above that the map starts anew. 100,000 entries take about 10 MB, and no limit per
/// client stops somebody who has that many addresses, or networks of IPv6.
const LOCAL_SUBJECTS_MAX: usize = 100_000;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, strum::IntoStaticStr, strum::VariantArray)]
#[strum(serialize_all = "snake_case")]
pub enum Limit {
    Login,
    Send,
    Register,
}

#[derive(Debug)]
pub struct Limits {
    redis: Arc<Redis>,
    metrics: Arc<Metrics>,
    per_minute: [u32; 3],
    /// The counts of the current window, while Redis is unavailable.
    local: Mutex<Local>,
}

#[derive(Default, Debug)]
struct Local {
    window: u64,
    counts: HashMap<(Limit, String), u32>,
}

/// A request over a limit.
#[derive(thiserror::Error, Debug)]
#[error("over a rate limit")]
pub struct RateLimited {
    /// Until the window ends.
    pub retry_after: Duration,
}

impl Limit {
    /// The names of all limits.
    pub fn names() -> Vec<&'static str> {
        Self::VARIANTS.iter().map(|limit| limit.into()).collect()
    }
}

impl Limits {
    pub fn new(config: &Config, redis: Arc<Redis>, metrics: Arc<Metrics>) -> Self {
        Self {
            redis,
            metrics,
            per_minute: [
                config.login_rate_limit_per_minute,
                config.send_rate_limit_per_minute,
                config.register_rate_limit_per_minute,
            ],
            local: Mutex::default(),
        }
    }

    /// Counts one attempt of `subject`, in one round trip, and refuses it over the limit.
    pub async fn check(&self, limit: Limit, subject: &str) -> Result<(), RateLimited> {
        let allowed = self.per_minute[limit as usize];
        if allowed == 0 {
            return Ok(());
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let window = now.as_secs() / WINDOW.as_secs();
        let used = match self.count_in_redis(limit, subject, window).await {
            Some(used) => used,
            None => self.count_in_process(limit, subject, window),
        };
        if used <= allowed {
            return Ok(());
        }
        self.metrics.rate_limited(limit.into());
        let end = Duration::from_secs((window + 1) * WINDOW.as_secs());
        let left = end.saturating_sub(now);
        Err(RateLimited { retry_after: Duration::from_secs(left.as_secs() + 1) })
    }

    async fn count_in_redis(&self, limit: Limit, subject: &str, window: u64) -> Option<u32> {
        let live = self.redis.live()?;
        let shard = BuildHasherDefault::<DefaultHasher>::default().hash_one(subject) % SHARDS;
        let key = format!("chat:limit:{}:{window}:{shard}", <&str>::from(limit));
        let mut pipeline = redis::Pipeline::with_capacity(2);
        pipeline.cmd("HINCRBY").arg(&key).arg(subject).arg(1);
        // Set each time, which needs no second round trip: nothing counts in this window once it is over, and then the
        // counters expire.
        pipeline.cmd("PEXPIRE").arg(&key).arg(KEY_TTL.as_millis() as u64).ignore();
        let (used,): (u32,) = self.redis.run(&live, Operation::CountAttempt, &pipeline).await.ok()?;
        Some(used)
    }

    fn count_in_process(&self, limit: Limit, subject: &str, window: u64) -> u32 {
        let mut local = self.local.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if local.window != window || local.counts.len() >= LOCAL_SUBJECTS_MAX {
            local.window = window;
            local.counts.clear();
        }
        let count = local.counts.entry((limit, subject.to_owned())).or_default();
        *count = count.saturating_add(1);
        *count
    }
}
