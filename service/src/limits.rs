//! Rate limits: fixed windows of a minute, counted in Redis for all replicas together, and in this process
//! while Redis is away. They are never switched off by a fault.

use std::collections::HashMap;
use std::hash::{BuildHasher as _, BuildHasherDefault, DefaultHasher};
use std::net::IpAddr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use deadpool_redis::redis;
use ipnet::IpNet;
use salvo::extract::{Extractible, Metadata};
use salvo::http::StatusCode;
use salvo::http::header::RETRY_AFTER;
use salvo::{Depot, Request};
use salvo_oapi::{Components, EndpointArgRegister, Operation};

use crate::auth::Caller;
use crate::call::Call;
use crate::config::Config;
use crate::error::{self, Error};
use crate::input::app;
use crate::metrics::Metrics;
use crate::redis::Redis;

const WINDOW: Duration = Duration::from_secs(60);

/// How long a counter stays: two windows, because a replica's clock may be a little behind another's.
const KEY_TTL: Duration = Duration::from_secs(120);

/// A window's counters are the fields of a few hashes: one cheap command counts, and few keys need an expiry.
/// Several, so that a cluster shares the work, and none takes long to free.
const SHARDS: u64 = 64;

/// Subjects counted in process, over which the map starts anew: 100,000 entries are about 10 MB, and whoever
/// can bring that many addresses is not held by a limit per address.
const LOCAL_SUBJECTS_MAX: usize = 100_000;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
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
    trusted_proxies: Vec<IpNet>,
    /// What this replica counted while Redis was away; one window's worth.
    local: Mutex<Local>,
}

#[derive(Default, Debug)]
struct Local {
    window: u64,
    counts: HashMap<(Limit, String), u32>,
}

impl Limit {
    pub const ALL: [Self; 3] = [Self::Login, Self::Send, Self::Register];

    pub fn name(self) -> &'static str {
        match self {
            Self::Login => "login",
            Self::Send => "send",
            Self::Register => "register",
        }
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
            trusted_proxies: config.trusted_proxies.clone(),
            local: Mutex::default(),
        }
    }

    /// Counts one attempt of `subject`, in one round trip, and refuses it over the limit.
    pub async fn check(&self, limit: Limit, subject: &str) -> Result<(), Error> {
        let allowed = self.per_minute[limit as usize];
        if allowed == 0 {
            return Ok(());
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let window = now.as_secs() / WINDOW.as_secs();
        let used = match self.count_in_redis(limit, subject, window).await {
            Some(used) => used,
            None => self.count_here(limit, subject, window),
        };
        if used <= allowed {
            return Ok(());
        }
        self.metrics.rate_limited(limit);
        let end = Duration::from_secs((window + 1) * WINDOW.as_secs());
        let left = end.saturating_sub(now);
        Err(Error::RateLimited { retry_after: Duration::from_secs(left.as_secs() + 1) })
    }

    /// Counts one attempt of the client's address.
    pub async fn check_client(&self, limit: Limit, req: &Request) -> Result<(), Error> {
        let subject = self.client_address(req).map(|address| address.to_string()).unwrap_or_default();
        self.check(limit, &subject).await
    }

    /// The address a request comes from: the connection's, or, behind trusted proxies, the last one in
    /// `X-Forwarded-For` that is not a proxy of ours. Anything left of it could be made up by the client.
    pub fn client_address(&self, req: &Request) -> Option<IpAddr> {
        let peer = req.remote_addr().ip()?.to_canonical();
        let forwarded = req.headers().get_all("x-forwarded-for");
        let hops: Vec<&str> = forwarded
            .iter()
            .filter_map(|value| value.to_str().ok())
            .flat_map(|value| value.split(','))
            .collect();
        Some(self.last_untrusted(peer, &hops))
    }

    fn last_untrusted(&self, peer: IpAddr, hops: &[&str]) -> IpAddr {
        let trusted = |address: &IpAddr| self.trusted_proxies.iter().any(|network| network.contains(address));
        let mut client = peer;
        for hop in hops.iter().rev() {
            if !trusted(&client) {
                break;
            }
            // A proxy of ours wrote this hop; if it is no address the proxy itself is the best that is known.
            let Ok(address) = hop.trim().parse::<IpAddr>() else { break };
            client = address.to_canonical();
        }
        client
    }

    async fn count_in_redis(&self, limit: Limit, subject: &str, window: u64) -> Option<u32> {
        let live = self.redis.live()?;
        let shard = BuildHasherDefault::<DefaultHasher>::default().hash_one(subject) % SHARDS;
        let key = format!("chat:limit:{}:{window}:{shard}", limit.name());
        let mut pipeline = redis::Pipeline::with_capacity(2);
        pipeline.cmd("HINCRBY").arg(&key).arg(subject).arg(1);
        // Every time: nobody counts in this window once it is over, and then the counters go away.
        pipeline.cmd("PEXPIRE").arg(&key).arg(KEY_TTL.as_millis() as u64).ignore();
        let (used,): (u32,) = self.redis.run(&live, Call::CountAttempt, &pipeline).await.ok()?;
        Some(used)
    }

    fn count_here(&self, limit: Limit, subject: &str, window: u64) -> u32 {
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

/// Declares an argument of an endpoint that counts the request against a limit, before its body is read.
macro_rules! permit {
    ($name:ident, $limit:expr, $description:literal) => {
        #[doc = $description]
        #[derive(Debug)]
        pub struct $name;

        impl<'ex> Extractible<'ex> for $name {
            fn metadata() -> &'static Metadata {
                static METADATA: Metadata = Metadata::new(stringify!($name));
                &METADATA
            }

            #[expect(refining_impl_trait, reason = "the concrete error is the more useful promise")]
            async fn extract(req: &'ex mut Request, depot: &'ex mut Depot) -> Result<Self, Error> {
                let limits = &app(depot)?.limits;
                match Caller::of(depot) {
                    Some(caller) => limits.check($limit, &caller.id.simple().to_string()).await?,
                    None => limits.check_client($limit, req).await?,
                }
                Ok(Self)
            }
        }

        impl EndpointArgRegister for $name {
            fn register(components: &mut Components, operation: &mut Operation, _arg: &str) {
                let status = StatusCode::TOO_MANY_REQUESTS;
                error::document(components, operation, status, $description, &[RETRY_AFTER]);
            }
        }
    };
}

permit!(LoginPermit, Limit::Login, "Over LOGIN_RATE_LIMIT_PER_MINUTE for this client address");
permit!(RegisterPermit, Limit::Register, "Over REGISTER_RATE_LIMIT_PER_MINUTE for this client address");
// Taken after the `Caller`, whose messages it counts.
permit!(SendPermit, Limit::Send, "Over SEND_RATE_LIMIT_PER_MINUTE for this user");
