//! `REDIS_MODE`: a real cluster, and real sentinels with a failover.

use anyhow::{Result, ensure};
use serde_json::json;
use tests::{Redis, RedisOptions, Scratch};

use super::support::{Database, Response, Service, Start, eventually, start_in_one_minute};

struct Cluster {
    nodes: Vec<Redis>,
    _scratch: Scratch,
}

fn cluster() -> Result<Cluster> {
    let scratch = Scratch::new("cluster")?;
    let options = RedisOptions::default().config("cluster-enabled yes").config("cluster-node-timeout 2000");
    let nodes = (0..3)
        .map(|node| Redis::start(&scratch.path().join(format!("node-{node}")), options.clone()))
        .collect::<Result<Vec<_>>>()?;
    let addresses: Vec<String> = nodes.iter().map(|node| format!("127.0.0.1:{}", node.port())).collect();
    let addresses = addresses.iter().map(String::as_str);
    let create: Vec<&str> =
        ["--cluster", "create"].into_iter().chain(addresses).chain(["--cluster-yes"]).collect();
    nodes[0].cli(&create)?;
    let cluster = Cluster { nodes, _scratch: scratch };
    cluster.is_whole()?;
    Ok(cluster)
}

impl Cluster {
    /// Waits until every node reports that all slots are served.
    fn is_whole(&self) -> Result<()> {
        let whole =
            |node: &Redis| node.cli(&["CLUSTER", "INFO"]).is_ok_and(|info| info.contains("cluster_state:ok"));
        eventually("the cluster", || self.nodes.iter().all(whole).then_some(()))
    }

    fn urls(&self) -> String {
        let urls: Vec<String> = self.nodes.iter().map(|node| node.url(0)).collect();
        urls.join(", ")
    }
}

/// Sends messages in several conversations, and reads each from its window.
fn windows_are_used(service: &Service, round: &str) -> Result<()> {
    let ana = service.user(&format!("ana.{round}"))?;
    for number in 0..6 {
        let peer = service.user(&format!("peer.{round}.{number}"))?;
        service.send(&ana, &peer, "first")?.expect(201)?;
        ensure!(service.hit(&peer, &ana, 5)?.contents()? == ["first"]);
        service.send(&peer, &ana, "second")?.expect(201)?;
        ensure!(service.contents(&ana, &peer, 5)? == ["second", "first"]);
    }
    Ok(())
}

#[test]
fn redis_mode_cluster_spreads_conversations_over_the_nodes() -> Result<()> {
    let database = Database::create()?;
    let mut cluster = cluster()?;
    let start = Start::on(&database).env("REDIS_MODE", "cluster").env("REDIS_URL", &cluster.urls());
    let service = start.ready()?;
    windows_are_used(&service, "before")?;
    let used = cluster
        .nodes
        .iter()
        .filter(|node| node.cli(&["KEYS", "chat:recent:*:list"]).is_ok_and(|keys| !keys.is_empty()));
    ensure!(used.count() >= 2, "all conversations are on one node");
    let doctor = start.clone().args(&["doctor"]).run()?;
    ensure!(doctor.stdout.lines().any(|line| line.starts_with("ok") && line.contains("redis")), "{doctor:?}");

    let limited = start.env("REGISTER_RATE_LIMIT_PER_MINUTE", "2").ready()?;
    start_in_one_minute();
    let tries = (0..3).map(|_| Ok(Response::of(limited.post("/register", &json!({})))?.status));
    ensure!(tries.collect::<Result<Vec<_>>>()? == [422, 422, 429]);
    drop(limited);

    // Without a third of the slots Redis counts as unavailable, and the service needs no restart.
    cluster.nodes[1].kill()?;
    let (kim, leo) = (service.user("kim")?, service.user("leo")?);
    for number in 0..10 {
        service.send(&kim, &leo, &number.to_string())?.expect(201)?;
        ensure!(service.contents(&leo, &kim, 1)? == [number.to_string()]);
    }
    service.becomes("degraded")?;
    cluster.nodes[1].restart()?;
    service.becomes("ok")?;
    windows_are_used(&service, "after")
}

/// A master, a replica, and one sentinel, which decides alone.
struct Watched {
    master: Redis,
    replica: Redis,
    sentinel: Redis,
    _scratch: Scratch,
}

fn watched(name: &str) -> Result<Watched> {
    let scratch = Scratch::new("sentinel")?;
    let dir = |name: &str| scratch.path().join(name);
    let master = Redis::start(&dir("master"), RedisOptions::default())?;
    let replicaof = format!("replicaof 127.0.0.1 {}", master.port());
    let replica = Redis::start(&dir("replica"), RedisOptions::default().config(&replicaof))?;
    let options = RedisOptions { sentinel: true, ..RedisOptions::default() }
        .config(&format!("sentinel monitor {name} 127.0.0.1 {} 1", master.port()))
        .config(&format!("sentinel down-after-milliseconds {name} 1500"))
        .config(&format!("sentinel failover-timeout {name} 10000"));
    let sentinel = Redis::start(&dir("watch"), options)?;
    eventually("the sentinel to know the replica", || {
        let replicas = sentinel.cli(&["SENTINEL", "REPLICAS", name]).ok()?;
        replicas.contains(&replica.port().to_string()).then_some(())
    })?;
    eventually("the replica to follow", || {
        replica.cli(&["INFO", "replication"]).ok().filter(|info| info.contains("master_link_status:up"))
    })?;
    Ok(Watched { master, replica, sentinel, _scratch: scratch })
}

#[test]
fn redis_mode_sentinel_follows_the_master_over_a_failover() -> Result<()> {
    let database = Database::create()?;
    let Watched { mut master, replica, sentinel, _scratch } = watched("mymaster")?;
    let start = Start::on(&database).env("REDIS_MODE", "sentinel").env("REDIS_URL", &sentinel.url(0));
    let service = start.ready()?;
    windows_are_used(&service, "before")?;
    ensure!(master.cli(&["KEYS", "chat:recent:*:list"])?.contains("list"), "the master has nothing");
    let (kim, leo) = (service.user("kim")?, service.user("leo")?);
    service.send(&kim, &leo, "before")?.expect(201)?;
    master.kill()?;
    service.send(&kim, &leo, "during")?.expect(201)?;
    ensure!(service.contents(&leo, &kim, 5)? == ["during", "before"]);
    eventually("the replica to be promoted", || {
        replica.cli(&["ROLE"]).ok().filter(|role| role.starts_with("master"))
    })?;
    service.becomes("ok")?;
    ensure!(service.contents(&leo, &kim, 5)? == ["during", "before"]);
    replica.cli(&["FLUSHALL"])?;
    windows_are_used(&service, "after")?;
    ensure!(replica.cli(&["KEYS", "chat:recent:*:list"])?.contains("list"), "the new master has nothing");
    Ok(())
}

#[test]
fn redis_sentinel_master_is_the_name_of_the_master() -> Result<()> {
    let database = Database::create()?;
    let Watched { master, replica: _replica, sentinel, _scratch } = watched("chat")?;
    let start = Start::on(&database).env("REDIS_MODE", "sentinel").env("REDIS_URL", &sentinel.url(0));
    let service = start.clone().env("REDIS_SENTINEL_MASTER", "chat").ready()?;
    windows_are_used(&service, "named")?;
    ensure!(master.cli(&["KEYS", "chat:recent:*:list"])?.contains("list"), "the master has nothing");
    service.stop()?;
    let unknown = start.listen()?;
    unknown.becomes("degraded")?;
    unknown.process.logs(&["WARN", "Redis is unavailable"])?;
    Ok(())
}
