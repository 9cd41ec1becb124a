//! What the history is recorded on: a durable Postgres, a Redis, two replicas of the service, and a line from
//! each replica to each server.

use std::fs::OpenOptions;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tokio::runtime::Runtime;

use super::http::Client;
use super::plan::{REPLICAS, Server, USERS};
use super::proxy::{Line, Proxy};
use crate::servers::{self, daemon, ports};
use crate::{Postgres, PostgresOptions, Redis, RedisOptions, Scratch};

const DATABASE: &str = "history";
const PASSWORD: &str = "correct horse battery";
const READY_LIMIT: Duration = Duration::from_secs(60);

#[derive(Debug)]
pub(super) struct Rig {
    pub(super) users: Vec<User>,
    pub(super) replicas: Vec<Replica>,
    pub(super) redis: Mutex<Redis>,
    /// Gone before its directory is.
    pub(super) postgres: Mutex<Option<Postgres>>,
    scratch: Scratch,
    /// Carries the lines.
    _runtime: Runtime,
}

#[derive(Clone, Debug)]
pub(super) struct User {
    pub(super) id: String,
    pub(super) token: String,
}

/// A process of the service on ports that stay its own, with its lines.
#[derive(Debug)]
pub(super) struct Replica {
    pub(super) public: SocketAddr,
    operations: SocketAddr,
    to_postgres: Proxy,
    to_redis: Proxy,
    binary: PathBuf,
    environment: Vec<(String, String)>,
    log: PathBuf,
    child: Mutex<Option<Child>>,
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
        let mut replicas = Vec::new();
        for number in 0..REPLICAS {
            let to_postgres = Proxy::start(runtime.handle(), postgres.port())?;
            let to_redis = Proxy::start(runtime.handle(), redis.port())?;
            let log = scratch.path().join(format!("replica-{number}.log"));
            let database = postgres
                .url(DATABASE)
                .replace(&format!(":{}/", postgres.port()), &format!(":{}/", to_postgres.port()));
            replicas.push(Replica::start(binary, environment, log, database, to_postgres, to_redis)?);
        }
        let mut rig = Self {
            users: Vec::new(),
            replicas,
            redis: Mutex::new(redis),
            postgres: Mutex::new(Some(postgres)),
            scratch,
            _runtime: runtime,
        };
        rig.await_ready()?;
        for number in 0..USERS {
            let user = rig.replicas[0].register(number)?;
            rig.users.push(user);
        }
        Ok(rig)
    }

    /// Waits until every replica is ready, with Postgres and Redis.
    pub(super) fn await_ready(&self) -> Result<()> {
        for (number, replica) in self.replicas.iter().enumerate() {
            let ready = daemon::poll(READY_LIMIT, || Ok(replica.is_ready().then_some(())))?;
            ensure!(
                ready.is_some(),
                "replica {number} is not ready after {} s:\n{}",
                READY_LIMIT.as_secs(),
                replica.last_words()
            );
        }
        Ok(())
    }

    pub(super) fn line(&self, server: Server, replica: usize) -> &Proxy {
        let replica = &self.replicas[replica];
        match server {
            Server::Postgres => &replica.to_postgres,
            Server::Redis => &replica.to_redis,
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

impl Replica {
    fn start(
        binary: &Path,
        more: &[(String, String)],
        log: PathBuf,
        database: String,
        to_postgres: Proxy,
        to_redis: Proxy,
    ) -> Result<Self> {
        let (port, ops_port) = (ports::free()?, ports::free()?);
        let own = [
            ("DATABASE_URL", database),
            ("REDIS_URL", format!("redis://127.0.0.1:{}/0", to_redis.port())),
            ("SECRET_KEY", "a key for histories only, 32 bytes and more".to_owned()),
            ("HOST", "127.0.0.1".to_owned()),
            ("PORT", port.to_string()),
            ("OPS_PORT", ops_port.to_string()),
            ("DB_POOL_MAX", "10".to_owned()),
            ("SHUTDOWN_GRACE_SECONDS", "5".to_owned()),
            ("RUST_LOG", "warn".to_owned()),
        ];
        let limits = ["LOGIN", "SEND", "REGISTER"]
            .map(|limit| (format!("{limit}_RATE_LIMIT_PER_MINUTE"), "0".to_owned()));
        let own = own.map(|(name, value)| (name.to_owned(), value));
        let replica = Self {
            public: SocketAddr::from(([127, 0, 0, 1], port)),
            operations: SocketAddr::from(([127, 0, 0, 1], ops_port)),
            to_postgres,
            to_redis,
            binary: binary.to_owned(),
            environment: own.into_iter().chain(limits).chain(more.iter().cloned()).collect(),
            log,
            child: Mutex::new(None),
        };
        replica.launch()?;
        Ok(replica)
    }

    /// Starts the process and waits for nothing.
    pub(super) fn launch(&self) -> Result<()> {
        let log = OpenOptions::new().create(true).append(true).open(&self.log)?;
        let mut command: Command = daemon::dies_with_us(&self.binary, "KILL");
        command.arg("serve").env_clear().envs(self.environment.iter().cloned());
        command.current_dir(self.log.parent().context("a directory")?);
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        *lock(&self.child) = Some(daemon::spawn(command).context("start the service")?);
        Ok(())
    }

    /// Ends it at once.
    pub(super) fn kill(&self) {
        if let Some(mut child) = lock(&self.child).take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// Asks it to end, and waits until it has.
    pub(super) fn stop(&self) -> Result<()> {
        self.signal(Signal::TERM);
        let Some(mut child) = lock(&self.child).take() else { return Ok(()) };
        let ended = daemon::poll(Duration::from_secs(20), || Ok(child.try_wait()?))?;
        if ended.is_none() {
            let _ = child.kill();
            let _ = child.wait();
        }
        ensure!(ended.is_some(), "a replica did not end after SIGTERM:\n{}", self.last_words());
        Ok(())
    }

    pub(super) fn signal(&self, signal: Signal) {
        if let Some(child) = &*lock(&self.child) {
            // It may have ended by itself, which whoever waits for it finds out.
            let _ = kill_process(Pid::from_child(child), signal);
        }
    }

    /// Whether the process has ended without being asked to.
    pub(super) fn has_died(&self) -> bool {
        lock(&self.child).as_mut().is_some_and(|child| !matches!(child.try_wait(), Ok(None)))
    }

    pub(super) fn last_words(&self) -> String {
        daemon::tail(&std::fs::read_to_string(&self.log).unwrap_or_default(), 20)
    }

    /// Resident memory, where /proc tells it and the process runs.
    pub(super) fn resident_kib(&self) -> Option<u64> {
        let pid = lock(&self.child).as_ref()?.id();
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        let line = status.lines().find(|line| line.starts_with("VmRSS:"))?;
        line.split_whitespace().nth(1)?.parse().ok()
    }

    /// How often a window answered since the process started, if it tells.
    pub(super) fn window_hits(&self) -> Option<u64> {
        let mut client = Client::new(self.operations);
        let answer = client.request("GET", "/metrics", &[], "", Duration::from_millis(300)).ok()?;
        let text = String::from_utf8(answer.body).ok()?;
        let line = text
            .lines()
            .find(|line| line.starts_with("chat_cache_lookups_total") && line.contains("\"hit\""))?;
        line.rsplit_once(' ')?.1.parse().ok()
    }

    fn is_ready(&self) -> bool {
        let answer = Client::new(self.public).request("GET", "/healthz", &[], "", Duration::from_secs(2));
        answer.is_ok_and(|answer| {
            let body = serde_json::from_slice::<Value>(&answer.body).unwrap_or_default();
            answer.status == 200 && body["status"] == "ok"
        })
    }

    fn register(&self, number: usize) -> Result<User> {
        let body = format!(
            r#"{{"username":"user{number}","email":"user{number}@example.com","password":"{PASSWORD}"}}"#
        );
        let mut client = Client::new(self.public);
        let mut post = |path: &str, field: &str| -> Result<String> {
            let answer = client.request("POST", path, &[], &body, Duration::from_secs(20));
            let answer = answer.map_err(|lost| anyhow::anyhow!("{path}: {}", lost.reason()))?;
            let value: Value = serde_json::from_slice(&answer.body)?;
            let text = value[field].as_str();
            Ok(text.with_context(|| format!("{path} answered {}: {value}", answer.status))?.to_owned())
        };
        Ok(User { id: post("/register", "id")?, token: post("/login", "access_token")? })
    }
}

/// Every line as it should be.
pub(super) fn mend(rig: &Rig) {
    for replica in &rig.replicas {
        replica.to_postgres.set(Line::Open);
        replica.to_redis.set(Line::Open);
    }
}
