//! The system under test: a durable Postgres, a Redis, two replicas of the service, and a proxy between each replica and
//! each server. Only a Redis of several nodes has no proxies, because its nodes tell clients their addresses.

use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result};
use tokio::runtime::Runtime;

use super::redis::{Deployment, RedisMode};
use super::schedule::{REPLICAS, Server, USERS};
use crate::User;
use crate::http::Client;
use crate::proxy::{Link, Proxy};
use crate::servers::{self, programs};
use crate::{Postgres, PostgresOptions, Redis, Replica, Scratch};

const DATABASE: &str = "history";

#[derive(Debug)]
pub(super) struct System {
    pub(super) users: Vec<User>,
    pub(super) replicas: Vec<Replica>,
    /// One pair per replica.
    proxies: Vec<Proxies>,
    pub(super) redis: Mutex<Deployment>,
    /// `None` once it is dropped, which comes before its directory is removed.
    pub(super) postgres: Mutex<Option<Postgres>>,
    scratch: Scratch,
    /// Runs the proxies.
    _runtime: Runtime,
}

/// The proxies between a replica and the servers.
#[derive(Debug)]
struct Proxies {
    to_postgres: Proxy,
    to_redis: Option<Proxy>,
}

/// Whether the clocks of servers can be set.
pub(super) fn has_clocks() -> bool {
    programs::libfaketime().is_some()
}

/// Locks the mutex, even when a thread panicked while it held it.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl System {
    pub(super) fn start(mode: RedisMode, binary: &Path, environment: &[(String, String)]) -> Result<Self> {
        let scratch = Scratch::new("history")?;
        let options = PostgresOptions::durable().max_connections(60).own_clock(has_clocks());
        let postgres = Postgres::start(&scratch.path().join("postgres"), options)?;
        postgres.create_database(DATABASE)?;
        let redis = Deployment::start(mode, &scratch.path().join("redis"))?;
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let (mut replicas, mut proxies) = (Vec::new(), Vec::new());
        for number in 0..REPLICAS {
            let to_postgres = Proxy::start(runtime.handle(), postgres.port())?;
            let to_redis = (mode == RedisMode::Single)
                .then(|| Proxy::start(runtime.handle(), redis.port()))
                .transpose()?;
            let redis_url = match &to_redis {
                Some(proxy) => format!("redis://127.0.0.1:{}/0", proxy.port()),
                None => redis.urls(),
            };
            let log = scratch.path().join(format!("replica-{number}.log"));
            let database = postgres
                .url(DATABASE)
                .replace(&format!(":{}/", postgres.port()), &format!(":{}/", to_postgres.port()));
            let own = [
                ("DATABASE_URL", database),
                ("REDIS_MODE", mode.name().to_owned()),
                ("REDIS_URL", redis_url),
                ("DB_POOL_MAX", "10".to_owned()),
                ("RUST_LOG", "warn".to_owned()),
            ]
            .map(|(name, value)| (name.to_owned(), value));
            replicas.push(Replica::start(binary, log, own.into_iter().chain(environment.iter().cloned()))?);
            proxies.push(Proxies { to_postgres, to_redis });
        }
        let mut system = Self {
            users: Vec::new(),
            replicas,
            proxies,
            redis: Mutex::new(redis),
            postgres: Mutex::new(Some(postgres)),
            scratch,
            _runtime: runtime,
        };
        system.await_ready()?;
        for number in 0..USERS {
            let user = User::register(system.replicas[0].public, &format!("user{number}"))?;
            system.users.push(user);
        }
        Ok(system)
    }

    /// Waits until every replica is ready and reaches Postgres and Redis.
    pub(super) fn await_ready(&self) -> Result<()> {
        self.replicas.iter().try_for_each(Replica::await_ready)
    }

    pub(super) fn set_link(&self, server: Server, replica: usize, link: Link) {
        let proxies = &self.proxies[replica];
        match server {
            Server::Postgres => proxies.to_postgres.set(link),
            Server::Redis => proxies.to_redis.iter().for_each(|proxy| proxy.set(link)),
        }
    }

    /// Connects this replica to the other Redis, or back.
    pub(super) fn split(&self, replica: usize, apart: bool) {
        let redis = lock(&self.redis);
        let port = redis.other.as_ref().filter(|_| apart).map_or(redis.port(), Redis::port);
        self.proxies[replica].to_redis.iter().for_each(|proxy| proxy.lead_to(port));
    }

    /// Lets every proxy pass everything again.
    pub(super) fn open_links(&self) {
        for replica in 0..self.proxies.len() {
            self.set_link(Server::Postgres, replica, Link::Open);
            self.set_link(Server::Redis, replica, Link::Open);
        }
    }

    /// Every message that Postgres holds between these two users, by `seq`: id, seq, sender, content, time.
    pub(super) fn stored(&self, one: &User, other: &User) -> Result<Vec<Vec<Option<String>>>> {
        let (low, high) = if one.id < other.id { (one, other) } else { (other, one) };
        let postgres = lock(&self.postgres);
        let postgres = postgres.as_ref().context("Postgres was dropped")?;
        postgres.query(
            DATABASE,
            &format!(
                "SELECT m.id, m.seq, m.sender_id, m.content,
                        to_char(m.created_at AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US')
                 FROM messages m JOIN conversations c ON c.id = m.conversation_id
                 WHERE c.low_user = '{}' AND c.high_user = '{}' ORDER BY m.seq",
                low.id, high.id
            ),
        )
    }
}

impl Drop for System {
    fn drop(&mut self) {
        for replica in &self.replicas {
            replica.kill();
        }
        drop(lock(&self.postgres).take());
        // A durable instance leaves its files, which may be outside the scratch directory.
        let _ = servers::clear(&self.scratch.path().join("postgres"));
    }
}

/// How many reads the windows answered since the process started, if its metrics can be read.
pub(super) fn window_hits(replica: &Replica) -> Option<u64> {
    let mut client = Client::new(replica.operations);
    let answer = client.request("GET", "/metrics", &[], "", Duration::from_millis(300)).ok()?;
    let text = String::from_utf8(answer.body).ok()?;
    let line =
        text.lines().find(|line| line.starts_with("chat_cache_lookups_total") && line.contains("\"hit\""))?;
    line.rsplit_once(' ')?.1.parse().ok()
}
