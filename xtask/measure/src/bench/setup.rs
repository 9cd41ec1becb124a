//! What is measured: a durable Postgres, a Redis, one or two replicas of the release build, and users who have
//! logged in.

use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Result, bail};
use harness::replica::SECRET_KEY;
use harness::{Postgres, PostgresOptions, Redis, RedisOptions, Replica, User, http};
use jsonwebtoken::{EncodingKey, Header, encode};
use load::Script;
use serde_json::json;

pub(crate) const DATABASE: &str = "bench";

/// Never reached, so that the limiter does all its work and refuses nothing.
const NO_LIMIT: &str = "1000000000";

const START_LIMIT: Duration = Duration::from_secs(20);

pub(crate) struct Setup {
    pub(crate) postgres: Postgres,
    pub(crate) redis: Redis,
    pub(crate) replicas: Vec<Replica>,
    pub(crate) users: Vec<User>,
}

impl Setup {
    /// Starts everything below `dir`, with one replica and `users` users.
    pub(crate) fn start(dir: &Path, binary: &Path, users: usize) -> Result<Self> {
        let postgres =
            Postgres::start(&dir.join("postgres"), PostgresOptions::durable().max_connections(200))?;
        postgres.query("postgres", &format!("DROP DATABASE IF EXISTS {DATABASE}"))?;
        postgres.create_database(DATABASE)?;
        let redis = Redis::start(&dir.join("redis"), RedisOptions::default())?;
        let mut setup = Self { postgres, redis, replicas: Vec::new(), users: Vec::new() };
        setup.add_replica(dir, binary)?;
        for number in 0..users {
            setup.users.push(User::register(setup.address(0), &format!("user{number}"))?);
        }
        Ok(setup)
    }

    pub(crate) fn add_replica(&mut self, dir: &Path, binary: &Path) -> Result<()> {
        let replica = self.start_replica(dir, binary)?;
        self.replicas.push(replica);
        Ok(())
    }

    /// One more process of the service, on ports of its own.
    pub(crate) fn start_replica(&self, dir: &Path, binary: &Path) -> Result<Replica> {
        self.start_replica_with(dir, binary, &[])
    }

    /// As `start_replica`, with more variables.
    pub(crate) fn start_replica_with(
        &self,
        dir: &Path,
        binary: &Path,
        variables: &[(&str, String)],
    ) -> Result<Replica> {
        let urls = [("DATABASE_URL", self.postgres.url(DATABASE)), ("REDIS_URL", self.redis.url(0))];
        let limits = ["LOGIN", "SEND", "REGISTER"]
            .map(|limit| (format!("{limit}_RATE_LIMIT_PER_MINUTE"), NO_LIMIT.to_owned()));
        // Switched on, as above: each user writes to few others.
        let strangers = [("NEW_CONVERSATIONS_PER_HOUR".to_owned(), "1000".to_owned())];
        let variables = urls.iter().chain(variables).map(|(name, value)| ((*name).to_owned(), value.clone()));
        let log = dir.join(format!("service-{:08x}.log", fastrand::u32(..)));
        let replica = Replica::start(binary, log, limits.into_iter().chain(strangers).chain(variables))?;
        let deadline = Instant::now() + START_LIMIT;
        // Oftener than the harness asks: this wait is measured.
        while !http::get(replica.public, "/healthz", START_LIMIT).is_ok_and(|answer| answer.status == 200) {
            if Instant::now() > deadline {
                bail!("the service did not become ready:\n{}", replica.last_words());
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(replica)
    }

    /// The address of the replica that this connection uses.
    pub(crate) fn address(&self, connection: usize) -> SocketAddr {
        self.replicas[connection % self.replicas.len()].public
    }

    /// Scripts that send a short message, connection `i` from user `2i` to user `2i + 1`, or all in one
    /// conversation.
    pub(crate) fn send_scripts(&self, connections: usize, one_conversation: bool) -> Vec<Script> {
        (0..connections)
            .map(|connection| {
                let (sender, recipient) = self.pair(if one_conversation { 0 } else { connection });
                let body = format!(r#"{{"recipient_id":"{}","content":"{CONTENT}"}}"#, recipient.id);
                Script::post(self.address(connection), "/send", Some(&sender.token), &[body])
            })
            .collect()
    }

    /// Scripts that read the newest page of a conversation each.
    pub(crate) fn read_scripts(&self, connections: usize, query: &str) -> Vec<Script> {
        (0..connections)
            .map(|connection| {
                let (reader, peer) = self.pair(connection);
                let path = format!("/messages?peer_id={}{query}", peer.id);
                Script::get(self.address(connection), &path, &reader.token)
            })
            .collect()
    }

    pub(crate) fn pair(&self, number: usize) -> (&User, &User) {
        let pairs = self.users.len() / 2;
        let first = number % pairs * 2;
        (&self.users[first], &self.users[first + 1])
    }
}

/// Users by the ten thousand. The service hashes a password for each, so SQL makes them, and their tokens are signed here.
pub(crate) fn create_users(setup: &Setup, count: usize) -> Result<Vec<User>> {
    setup.postgres.query(
        DATABASE,
        &format!(
            "INSERT INTO users (id, username, username_key, email, email_key, password_hash)
             SELECT {id}, 'many' || n, 'many' || n, n || '@many.example', n || '@many.example', 'none'
             FROM generate_series(0, {count} - 1) AS n ON CONFLICT DO NOTHING",
            id = user_sql("n"),
        ),
    )?;
    let key = EncodingKey::from_secret(SECRET_KEY.as_bytes());
    let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
    let user = |n: usize| {
        let id = format!("{USERS_PREFIX}{n:012x}");
        let claims = json!({"sub": id, "iat": now, "exp": now + TOKEN_LIFETIME.as_secs()});
        Ok(User { id, name: format!("many{n}"), token: encode(&Header::default(), &claims, &key)? })
    };
    (0..count).map(user).collect()
}

/// The SQL for the id of the user `n` of them.
pub(crate) fn user_sql(n: &str) -> String {
    format!("('{USERS_PREFIX}' || lpad(to_hex({n}), 12, '0'))::uuid")
}

/// As version 7 has them: ordered by the time of registration.
const USERS_PREFIX: &str = "01920000-0000-7000-8000-";

const TOKEN_LIFETIME: Duration = Duration::from_secs(24 * 3600);

/// A message like most: a sentence.
pub(crate) const CONTENT: &str = "Shall we meet at the station at seven, or is that too late for you?";
