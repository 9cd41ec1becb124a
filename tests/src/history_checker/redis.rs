//! The Redis of the system under test, as `REDIS_MODE` names it: one server, a master with two replicas and three
//! sentinels, or a cluster of three masters with a replica each.

use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};

use super::schedule::RedisFault;
use super::system::has_clocks;
use crate::servers::ports;
use crate::{Redis, RedisOptions};

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum RedisMode {
    #[default]
    Single,
    Sentinel,
    Cluster,
}

/// The service's default for `REDIS_SENTINEL_MASTER`.
const MASTER: &str = "mymaster";

/// Without an answer for this long a node counts as down, and a replica of it is promoted.
const DOWN_AFTER: Duration = Duration::from_millis(1000);

/// Sentinels wait eight seconds before they demote an old master that came back, and discover replicas every ten.
const WHOLE_LIMIT: Duration = Duration::from_secs(90);
const PROMOTED_LIMIT: Duration = Duration::from_secs(20);
const POLL: Duration = Duration::from_millis(200);

#[derive(Debug)]
pub(super) struct Deployment {
    mode: RedisMode,
    nodes: Vec<Redis>,
    /// The nodes of each shard: one is its master, the others follow it. Failovers change who is who.
    shards: Vec<Vec<usize>>,
    sentinels: Vec<Redis>,
    /// Another Redis, which knows nothing of the first, for the two sides of a split network.
    pub(super) other: Option<Redis>,
}

/// What a node says about itself.
#[derive(Debug, PartialEq, Eq)]
enum Role {
    Master,
    /// `linked` once it has all that its master has.
    Follows {
        port: u16,
        linked: bool,
    },
}

impl RedisMode {
    /// The value of `REDIS_MODE`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Single => "single",
            Self::Sentinel => "sentinel",
            Self::Cluster => "cluster",
        }
    }
}

impl Deployment {
    pub(super) fn start(mode: RedisMode, dir: &Path) -> Result<Self> {
        let mut deployment =
            Self { mode, nodes: Vec::new(), shards: Vec::new(), sentinels: Vec::new(), other: None };
        match mode {
            RedisMode::Single => {
                let own_clock = has_clocks();
                deployment.add_node(dir, RedisOptions { own_clock, ..RedisOptions::default() })?;
                deployment.shards = vec![vec![0]];
                deployment.other = Some(Redis::start(&dir.join("other"), RedisOptions::default())?);
            }
            RedisMode::Sentinel => deployment.start_with_sentinels(dir)?,
            RedisMode::Cluster => deployment.start_cluster(dir)?,
        }
        deployment.await_whole()?;
        Ok(deployment)
    }

    fn start_with_sentinels(&mut self, dir: &Path) -> Result<()> {
        self.add_node(dir, RedisOptions::default())?;
        let port = self.nodes[0].port();
        let replica = RedisOptions::default().config(&format!("replicaof 127.0.0.1 {port}"));
        self.add_node(dir, replica.clone())?;
        self.add_node(dir, replica)?;
        self.shards = vec![vec![0, 1, 2]];
        let options = RedisOptions { sentinel: true, ..RedisOptions::default() }
            .config(&format!("sentinel monitor {MASTER} 127.0.0.1 {port} 2"))
            .config(&format!("sentinel down-after-milliseconds {MASTER} {}", DOWN_AFTER.as_millis()))
            // After twice this long a failover may follow another, or be tried again.
            .config(&format!("sentinel failover-timeout {MASTER} 3000"));
        for number in 0..3 {
            let dir = dir.join(format!("sentinel-{number}"));
            self.sentinels.push(Redis::start(&dir, options.clone())?);
        }
        Ok(())
    }

    fn start_cluster(&mut self, dir: &Path) -> Result<()> {
        for _ in 0..6 {
            let options = RedisOptions::default()
                .config("cluster-enabled yes")
                // The usual port of the bus may be a client's while a node is down; see `ports`.
                .config(&format!("cluster-port {}", ports::free()?))
                .config(&format!("cluster-node-timeout {}", DOWN_AFTER.as_millis()))
                .config("cluster-allow-replica-migration no")
                .config("repl-diskless-sync-delay 0");
            self.add_node(dir, options)?;
        }
        let addresses: Vec<String> =
            self.nodes.iter().map(|node| format!("127.0.0.1:{}", node.port())).collect();
        let create = ["--cluster", "create"].into_iter().chain(addresses.iter().map(String::as_str));
        let create: Vec<&str> = create.chain(["--cluster-replicas", "1", "--cluster-yes"]).collect();
        self.nodes[0].cli(&create)?;
        // Who follows whom is the tool's choice.
        for (number, node) in self.nodes.iter().enumerate() {
            if let Role::Follows { port, .. } = role(node)? {
                self.shards.push(vec![self.node_at(port)?, number]);
            }
        }
        ensure!(self.shards.len() == 3, "the cluster has the shards {:?}", self.shards);
        Ok(())
    }

    fn add_node(&mut self, dir: &Path, options: RedisOptions) -> Result<()> {
        let dir = dir.join(format!("node-{}", self.nodes.len()));
        self.nodes.push(Redis::start(&dir, options)?);
        Ok(())
    }

    fn node_at(&self, port: u16) -> Result<usize> {
        self.nodes.iter().position(|node| node.port() == port).with_context(|| format!("no node on {port}"))
    }

    /// The port of the one server, where clients reach it through proxies.
    pub(super) fn port(&self) -> u16 {
        self.nodes[0].port()
    }

    /// What a replica of the service connects to, except in single mode.
    pub(super) fn urls(&self) -> String {
        let asked = if self.mode == RedisMode::Sentinel { &self.sentinels } else { &self.nodes };
        asked.iter().map(|node| node.url(0)).collect::<Vec<_>>().join(", ")
    }

    /// Injects the fault, with `wait` between its steps, and waits until all of Redis is whole again.
    pub(super) fn apply(&mut self, fault: RedisFault, shard: usize, wait: impl Fn(Duration)) -> Result<()> {
        let shard = shard % self.shards.len();
        let master = self.master(shard)?;
        match fault {
            RedisFault::Flush => _ = self.nodes[master].cli(&["FLUSHALL"])?,
            RedisFault::DropClients => _ = self.nodes[master].cli(&["CLIENT", "KILL", "TYPE", "normal"])?,
            RedisFault::Pause(time) => {
                self.nodes[master].pause();
                wait(time);
                self.nodes[master].resume();
            }
            RedisFault::Kill { lag, down } => {
                self.hold_back(shard, master, lag, &wait)?;
                self.nodes[master].kill()?;
                wait(down);
                self.nodes[master].restart()?;
            }
            RedisFault::Rollback { age } => {
                self.nodes[master].cli(&["SAVE"])?;
                wait(age);
                self.nodes[master].kill()?;
                self.nodes[master].restart()?;
            }
            RedisFault::Clock { seconds, time } => {
                self.nodes[master].set_clock(seconds)?;
                wait(time);
                self.nodes[master].set_clock(0)?;
            }
            RedisFault::HandOver { lag } => {
                self.hold_back(shard, master, lag, &wait)?;
                self.promote(shard, None)?;
            }
            RedisFault::ThereAndBack { stay } => {
                self.promote(shard, None)?;
                let between = self.master(shard)?;
                if self.mode == RedisMode::Sentinel {
                    // Sentinels would take eight seconds. Clients keep their connections, unlike with sentinels.
                    let port = self.nodes[between].port().to_string();
                    self.nodes[master].cli(&["REPLICAOF", "127.0.0.1", &port])?;
                }
                wait(stay);
                self.promote(shard, Some(master))?;
            }
        }
        self.await_whole()
    }

    /// From now on the replicas of this master miss what it writes, for this long and until [`Deployment::await_whole`].
    ///
    /// A paused replica would find it all in its socket. A wrong password ends its connection for good.
    fn hold_back(&self, shard: usize, master: usize, lag: Duration, wait: &impl Fn(Duration)) -> Result<()> {
        if lag.is_zero() {
            return Ok(());
        }
        for node in self.shards[shard].iter().filter(|node| **node != master) {
            self.nodes[*node].cli(&["CONFIG", "SET", "masterauth", "wrong"])?;
            self.nodes[*node].cli(&["CLIENT", "KILL", "TYPE", "master"])?;
        }
        wait(lag);
        Ok(())
    }

    /// Asks for a failover while the master is alive, and waits for it: to this node, or to any.
    fn promote(&self, shard: usize, wanted: Option<usize>) -> Result<()> {
        let before = self.master(shard)?;
        let deadline = Instant::now() + PROMOTED_LIMIT;
        let preferred = wanted.map(|node| &self.nodes[node]);
        if let (Some(node), RedisMode::Sentinel) = (preferred, self.mode) {
            node.cli(&["CONFIG", "SET", "replica-priority", "1"])?;
        }
        while self.master(shard).unwrap_or(before) == before {
            if Instant::now() >= deadline {
                bail!("no other master after {} s: {}", PROMOTED_LIMIT.as_secs(), self.state());
            }
            // It is refused while the last failover goes on, or no replica is fit.
            match self.mode {
                RedisMode::Single => bail!("a single Redis has no other master"),
                RedisMode::Sentinel => _ = self.sentinels[0].cli(&["SENTINEL", "FAILOVER", MASTER])?,
                RedisMode::Cluster => {
                    let replica = self.shards[shard].iter().find(|node| **node != before);
                    let replica = &self.nodes[*replica.context("a replica")?];
                    replica.cli(&["CLUSTER", "FAILOVER"])?;
                }
            }
            thread::sleep(POLL);
        }
        if let Some(node) = preferred {
            node.cli(&["CONFIG", "SET", "replica-priority", "100"])?;
        }
        Ok(())
    }

    /// The node that clients are to use for this shard.
    fn master(&self, shard: usize) -> Result<usize> {
        let nodes = &self.shards[shard];
        match self.mode {
            RedisMode::Single => Ok(nodes[0]),
            RedisMode::Sentinel => self.named_by(&self.sentinels[0]),
            RedisMode::Cluster => {
                let masters =
                    nodes.iter().filter(|node| role(&self.nodes[**node]).ok() == Some(Role::Master));
                let masters: Vec<usize> = masters.copied().collect();
                ensure!(masters.len() == 1, "shard {shard} has {} masters", masters.len());
                Ok(masters[0])
            }
        }
    }

    fn named_by(&self, sentinel: &Redis) -> Result<usize> {
        let answer = sentinel.cli(&["SENTINEL", "GET-MASTER-ADDR-BY-NAME", MASTER])?;
        let port = answer.lines().nth(1).context("a sentinel names no master")?;
        self.node_at(port.parse()?)
    }

    /// Waits until every node runs and has its role, and nobody thinks otherwise.
    pub(super) fn await_whole(&self) -> Result<()> {
        if self.mode == RedisMode::Single {
            return Ok(());
        }
        let deadline = Instant::now() + WHOLE_LIMIT;
        while !self.is_whole() {
            if Instant::now() >= deadline {
                bail!("Redis is not whole after {} s: {}", WHOLE_LIMIT.as_secs(), self.state());
            }
            thread::sleep(POLL);
        }
        Ok(())
    }

    fn is_whole(&self) -> bool {
        for node in &self.nodes {
            // Ends what `hold_back` began; a node that is down is noticed below.
            let _ = node.cli(&["CONFIG", "SET", "masterauth", ""]);
        }
        let shards = (0..self.shards.len()).all(|shard| {
            self.master(shard).is_ok_and(|master| {
                let port = self.nodes[master].port();
                self.shards[shard].iter().all(|node| {
                    let expected =
                        if *node == master { Role::Master } else { Role::Follows { port, linked: true } };
                    role(&self.nodes[*node]).is_ok_and(|role| role == expected)
                })
            })
        });
        shards
            && self.sentinels.iter().all(|sentinel| self.is_content(sentinel))
            && (self.mode != RedisMode::Cluster || self.nodes.iter().all(knows_no_failure))
    }

    /// Whether this sentinel agrees with the first one, and sees everybody.
    fn is_content(&self, sentinel: &Redis) -> bool {
        let ask = |what: &str| sentinel.cli(&["SENTINEL", what, MASTER]).unwrap_or_default();
        let (master, replicas, others) = (ask("MASTER"), ask("REPLICAS"), ask("SENTINELS"));
        // Another flag, such as `s_down`, would be in the same line.
        let count = |answer: &str, flags: &str| {
            let lines: Vec<&str> = answer.lines().collect();
            lines.windows(2).filter(|pair| *pair == ["flags", flags]).count()
        };
        count(&master, "master") == 1
            && count(&replicas, "slave") == self.nodes.len() - 1
            && count(&others, "sentinel") == self.sentinels.len() - 1
            && self.named_by(sentinel).ok() == self.named_by(&self.sentinels[0]).ok()
    }

    /// For the error of a wait.
    fn state(&self) -> String {
        let nodes = self.nodes.iter().map(|node| format!("{} {:?}", node.port(), role(node)));
        let named = self.sentinels.iter().map(|sentinel| format!("{:?}", self.named_by(sentinel)));
        nodes.chain(named).collect::<Vec<_>>().join(", ")
    }
}

fn role(node: &Redis) -> Result<Role> {
    let info = node.cli(&["INFO", "replication"])?;
    let field = |name: &str| {
        let line = info.lines().find_map(|line| line.trim().strip_prefix(name)?.strip_prefix(':'));
        line.with_context(|| format!("no {name}: {info}"))
    };
    if field("role")? == "master" {
        return Ok(Role::Master);
    }
    Ok(Role::Follows { port: field("master_port")?.parse()?, linked: field("master_link_status")? == "up" })
}

fn knows_no_failure(node: &Redis) -> bool {
    let info = node.cli(&["CLUSTER", "INFO"]).unwrap_or_default();
    let nodes = node.cli(&["CLUSTER", "NODES"]).unwrap_or_default();
    info.contains("cluster_state:ok") && !nodes.contains("fail")
}
