//! What the history is recorded on: a durable Postgres, a Redis, two replicas of the service, and a line from
//! each replica to each server.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use tokio::runtime::Runtime;

use super::plan::{REPLICAS, Server, USERS};
use super::proxy::{Line, Proxy};
use crate::User;
use crate::http::Client;
use crate::servers;
use crate::{Postgres, PostgresOptions, Redis, RedisOptions, Replica, Scratch};

const DATABASE: &str = "history";

#[derive(Debug)]
pub(super) struct Rig {
    pub(super) users: Vec<User>,
    pub(super) replicas: Vec<Replica>,
    /// Of each replica.
    lines: Vec<Lines>,
    pub(super) redis: Mutex<Redis>,
    /// Gone before its directory is.
    pub(super) postgres: Mutex<Option<Postgres>>,
    scratch: Scratch,
    /// Carries the lines.
    _runtime: Runtime,
}

/// A replica's lines to the servers.
#[derive(Debug)]
struct Lines {
    to_postgres: Proxy,
    to_redis: Proxy,
}

/// A guard, whatever happened to those who held it before.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Rig {
    pub(super) fn start(binary: &Path, environment: &[(String, String)]) -> Result<Self> {
        let scratch = Scratch::new("history")?;
        let options = PostgresOptions::durable().max_connections(60);
        let postgres = Postgres::start(&scratch.path().join("postgres"), options)?;
        postgres.create_database(DATABASE)?;
        let redis = Redis::start(&scratch.path().join("redis"), RedisOptions::default())?;
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let (mut replicas, mut lines) = (Vec::new(), Vec::new());
        for number in 0..REPLICAS {
            let to_postgres = Proxy::start(runtime.handle(), postgres.port())?;
            let to_redis = Proxy::start(runtime.handle(), redis.port())?;
            let log = scratch.path().join(format!("replica-{number}.log"));
            let database = postgres
                .url(DATABASE)
                .replace(&format!(":{}/", postgres.port()), &format!(":{}/", to_postgres.port()));
            let own = [
                ("DATABASE_URL", database),
                ("REDIS_URL", format!("redis://127.0.0.1:{}/0", to_redis.port())),
                ("DB_POOL_MAX", "10".to_owned()),
                ("RUST_LOG", "warn".to_owned()),
            ]
            .map(|(name, value)| (name.to_owned(), value));
            replicas.push(Replica::start(binary, log, own.into_iter().chain(environment.iter().cloned()))?);
            lines.push(Lines { to_postgres, to_redis });
        }
        let mut rig = Self {
            users: Vec::new(),
            replicas,
            lines,
            redis: Mutex::new(redis),
            postgres: Mutex::new(Some(postgres)),
            scratch,
            _runtime: runtime,
        };
        rig.await_ready()?;
        for number in 0..USERS {
            let user = User::register(rig.replicas[0].public, &format!("user{number}"))?;
            rig.users.push(user);
        }
        Ok(rig)
    }

    /// Waits until every replica is ready, with Postgres and Redis.
    pub(super) fn await_ready(&self) -> Result<()> {
        self.replicas.iter().try_for_each(Replica::await_ready)
    }

    pub(super) fn line(&self, server: Server, replica: usize) -> &Proxy {
        let lines = &self.lines[replica];
        match server {
            Server::Postgres => &lines.to_postgres,
            Server::Redis => &lines.to_redis,
        }
    }

    /// Every message that Postgres holds between these two users, by `seq`: id, seq, sender, content, time.
    pub(super) fn stored(&self, one: &User, other: &User) -> Result<Vec<Vec<Option<String>>>> {
        let (low, high) = if one.id < other.id { (one, other) } else { (other, one) };
        let postgres = lock(&self.postgres);
        let postgres = postgres.as_ref().context("Postgres is gone")?;
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

    /// Sends Redis a command around the lines; for those that answer with a status.
    pub(super) fn tell_redis(&self, command: &str) -> Result<()> {
        let port = lock(&self.redis).port();
        let mut stream = TcpStream::connect(("127.0.0.1", port))?;
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        stream.write_all(format!("{command}\r\n").as_bytes())?;
        let mut answer = [0; 1];
        stream.read_exact(&mut answer)?;
        ensure!(answer != *b"-", "Redis refused {command}");
        Ok(())
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        for replica in &self.replicas {
            replica.kill();
        }
        drop(lock(&self.postgres).take());
        // A durable instance leaves its files, which may lie elsewhere than in the scratch directory.
        let _ = servers::clear(&self.scratch.path().join("postgres"));
    }
}

/// How often a window answered since the process started, if it tells.
pub(super) fn window_hits(replica: &Replica) -> Option<u64> {
    let mut client = Client::new(replica.operations);
    let answer = client.request("GET", "/metrics", &[], "", Duration::from_millis(300)).ok()?;
    let text = String::from_utf8(answer.body).ok()?;
    let line =
        text.lines().find(|line| line.starts_with("chat_cache_lookups_total") && line.contains("\"hit\""))?;
    line.rsplit_once(' ')?.1.parse().ok()
}

/// Every line as it should be.
pub(super) fn mend(rig: &Rig) {
    for lines in &rig.lines {
        lines.to_postgres.set(Line::Open);
        lines.to_redis.set(Line::Open);
    }
}
