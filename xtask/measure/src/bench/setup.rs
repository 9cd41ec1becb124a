//! What is measured: a durable Postgres, a Redis, one or two replicas of the release build, and users who have
//! logged in.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use harness::replica::{User, register, resident_kib};
use harness::servers::{daemon, ports};
use harness::{Postgres, PostgresOptions, Redis, RedisOptions};
use load::Script;

pub(crate) const DATABASE: &str = "bench";

/// Never reached, so that the limiter does all its work and refuses nothing.
const NO_LIMIT: &str = "1000000000";

const START_LIMIT: Duration = Duration::from_secs(20);

pub(crate) struct Rig {
    pub(crate) postgres: Postgres,
    pub(crate) redis: Redis,
    pub(crate) replicas: Vec<Replica>,
    pub(crate) users: Vec<User>,
}

/// A process of the service; dropping it ends it.
pub(crate) struct Replica {
    child: Child,
    pub(crate) public: SocketAddr,
    pub(crate) operations: SocketAddr,
    /// From exec to the first 200 on `/healthz`.
    pub(crate) startup: Duration,
}

impl Rig {
    /// Starts everything below `dir`, with one replica and `users` users.
    pub(crate) fn start(dir: &Path, binary: &Path, users: usize) -> Result<Self> {
        let postgres =
            Postgres::start(&dir.join("postgres"), PostgresOptions::durable().max_connections(200))?;
        postgres.query("postgres", &format!("DROP DATABASE IF EXISTS {DATABASE}"))?;
        postgres.create_database(DATABASE)?;
        let redis = Redis::start(&dir.join("redis"), RedisOptions::default())?;
        let mut rig = Self { postgres, redis, replicas: Vec::new(), users: Vec::new() };
        rig.add_replica(dir, binary)?;
        for number in 0..users {
            rig.users.push(register(rig.address(0), number)?);
        }
        Ok(rig)
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
        let (port, ops_port) = (ports::free()?, ports::free()?);
        let log = File::create(dir.join(format!("service-{port}.log")))?;
        let mut command = daemon::dies_with_us(binary, "KILL");
        command
            .arg("serve")
            .env_clear()
            .envs([
                ("DATABASE_URL", self.postgres.url(DATABASE)),
                ("REDIS_URL", self.redis.url(0)),
                ("SECRET_KEY", "a key for measurements only, 32 bytes and more".to_owned()),
                ("HOST", "127.0.0.1".to_owned()),
                ("PORT", port.to_string()),
                ("OPS_PORT", ops_port.to_string()),
            ])
            .envs(
                ["LOGIN", "SEND", "REGISTER"]
                    .map(|limit| (format!("{limit}_RATE_LIMIT_PER_MINUTE"), NO_LIMIT)),
            )
            .envs(variables.iter().map(|(name, value)| (name, value)))
            .current_dir(dir)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        let started = Instant::now();
        let child = daemon::spawn(command).context("start the service")?;
        let [public, operations] = [port, ops_port].map(|port| SocketAddr::from(([127, 0, 0, 1], port)));
        let mut replica = Replica { child, public, operations, startup: Duration::ZERO };
        loop {
            if request(public, "GET", "/healthz", None, "").is_ok_and(|(status, _)| status == 200) {
                replica.startup = started.elapsed();
                return Ok(replica);
            }
            if started.elapsed() > START_LIMIT {
                bail!("the service did not become ready; see its log in {}", dir.display());
            }
            std::thread::sleep(Duration::from_millis(1));
        }
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

/// A message like most: a sentence.
pub(crate) const CONTENT: &str = "Shall we meet at the station at seven, or is that too late for you?";

impl Replica {
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Resident memory in KiB.
    pub(crate) fn resident_kib(&self) -> Result<u64> {
        resident_kib(self.pid()).context("resident memory is read from /proc, which is only on Linux")
    }
}

impl Drop for Replica {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// One request on a connection of its own.
pub(crate) fn request(
    address: SocketAddr,
    method: &str,
    path: &str,
    token: Option<&str>,
    body: &str,
) -> Result<(u16, String)> {
    let limit = Duration::from_secs(10);
    let mut stream = TcpStream::connect_timeout(&address, limit)?;
    stream.set_read_timeout(Some(limit))?;
    let authorization = token.map(|token| format!("authorization: Bearer {token}\r\n")).unwrap_or_default();
    write!(
        stream,
        "{method} {path} HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n{authorization}\
         content-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").context("no answer")?;
    let status = head.get(9..12).context("no status")?.parse()?;
    Ok((status, body.to_owned()))
}

/// A program that is run to its end, with what it printed.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("run {command:?}"))?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    if !output.status.success() {
        bail!("{command:?} failed: {text}{}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(text)
}
