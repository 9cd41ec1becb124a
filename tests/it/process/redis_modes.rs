//! `REDIS_MODE`: a real cluster, and real sentinels with a failover.

use anyhow::{Context as _, Result, ensure};
use serde_json::json;
use tests::{Redis, RedisOptions, Scratch};

use super::support::{
    Database, Response, STRONG_KEY, Service, Start, closed_port, eventually, has_none_of, start_in_one_minute,
};
use super::tls::{Certificate, certificate, switch_tls_on, tls_settings};

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

/// A master and a sentinel, each with its own password and TLS, if any.
struct Sides {
    master: Redis,
    master_password: Option<&'static str>,
    /// Where the service connects to the sentinel.
    sentinel: String,
    _sentinel: Redis,
    certificate: Certificate,
    _scratch: Scratch,
}

const SENTINELS_PASSWORD: &str = "password-of-sentinels";
const MASTERS_PASSWORD: &str = "password-of-master";

impl Sides {
    fn start(passwords: [Option<&'static str>; 2], tls: [bool; 2]) -> Result<Self> {
        let [sentinel_password, master_password] = passwords;
        let [sentinel_tls, master_tls] = tls;
        let scratch = Scratch::new("sides")?;
        let certificate = certificate(&scratch)?;
        let master = Redis::start(&scratch.path().join("master"), RedisOptions::default())?;
        let tls_port = switch_tls_on(&master, &certificate)?;
        let monitored = if master_tls { tls_port } else { master.port().to_string() };
        let mut options = RedisOptions { sentinel: true, ..RedisOptions::default() }
            .config(&format!("sentinel monitor mymaster 127.0.0.1 {monitored} 1"));
        let mut port = None;
        for (name, value) in tls_settings(&master, &certificate)? {
            options = options.config(&format!("{name} {value}"));
            port = Some(value);
        }
        if master_tls {
            options = options.config("tls-replication yes");
        }
        if let Some(password) = sentinel_password {
            options = options.config(&format!("requirepass {password}"));
        }
        if let Some(password) = master_password {
            options = options.config(&format!("sentinel auth-pass mymaster {password}"));
            master.cli(&["CONFIG", "SET", "requirepass", password])?;
        }
        let watch = Redis::start(&scratch.path().join("watch"), options)?;
        let port = if sentinel_tls { port.context("a port")? } else { watch.port().to_string() };
        eventually("the sentinel to reach the master", || {
            let mut question = vec!["SENTINEL", "MASTER", "mymaster"];
            if let Some(password) = sentinel_password {
                question.splice(0..0, ["-a", password]);
            }
            let answer = watch.cli(&question).ok()?;
            answer.lines().any(|line| line == "master").then_some(())
        })?;
        let sentinel = format!("127.0.0.1:{port}");
        Ok(Self { master, master_password, sentinel, _sentinel: watch, certificate, _scratch: scratch })
    }

    /// The service with this scheme and these credentials of the sentinels, and this `REDIS_MASTER_URL`.
    fn service(&self, database: &Database, sentinels: &str, master: Option<&str>) -> Start {
        Start::on(database)
            .env("SECRET_KEY", STRONG_KEY)
            .env("SSL_CERT_FILE", &self.certificate.file.display().to_string())
            .env("REDIS_MODE", "sentinel")
            .env("REDIS_URL", &sentinels.replace('@', &format!("@{}", self.sentinel)))
            .env_if("REDIS_MASTER_URL", master)
    }

    /// The service is ready and uses this database of the master.
    fn serves(&self, start: &Start, database: &str) -> Result<()> {
        let service = start.ready()?;
        let name = format!("{}", self.master.port());
        windows_are_used(&service, &name)?;
        let mut question = vec!["-n", database, "KEYS", "chat:recent:*:list"];
        if let Some(password) = self.master_password {
            question.splice(0..0, ["-a", password]);
        }
        let keys = self.master.cli(&question)?;
        ensure!(keys.contains("list"), "the master has nothing in {database}: {keys}");
        let report = start.clone().args(&["doctor"]).run()?;
        ensure!(report.code == 0, "{report:?}");
        let log = service.stop()?;
        has_none_of(&(log + &report.said()), [SENTINELS_PASSWORD, MASTERS_PASSWORD])
    }
}

#[test]
fn sentinels_and_their_master_may_have_different_credentials() -> Result<()> {
    let database = Database::create()?;
    let (sentinels, master) = (Some(SENTINELS_PASSWORD), Some(MASTERS_PASSWORD));
    let master_url = format!("redis://:{MASTERS_PASSWORD}@mymaster/3");
    let cases = [
        ([None, master], "redis://@/0".to_owned(), Some(master_url.as_str()), "3"),
        ([sentinels, None], format!("redis://:{SENTINELS_PASSWORD}@"), Some("redis://mymaster"), "0"),
        ([sentinels, master], format!("redis://:{SENTINELS_PASSWORD}@/0"), Some(&*master_url), "3"),
        // Nothing else is said: the same for both.
        ([master, master], format!("redis://:{MASTERS_PASSWORD}@/2"), None, "2"),
    ];
    for (passwords, url, master_url, index) in cases {
        let sides = Sides::start(passwords, [false, false])?;
        let start = sides.service(&database, &url, master_url);
        sides.serves(&start, index).with_context(|| format!("{passwords:?}"))?;
    }
    Ok(())
}

#[test]
fn sentinels_and_their_master_may_use_tls_on_one_side_only() -> Result<()> {
    let database = Database::create()?;
    let cases = [
        ([false, true], "redis://@/0", Some("rediss://mymaster/0")),
        ([true, false], "rediss://@/0", Some("redis://mymaster/0")),
        ([true, true], "rediss://@/0", None),
    ];
    for (tls, url, master_url) in cases {
        let sides = Sides::start([None, None], tls)?;
        let start = sides.service(&database, url, master_url);
        sides.serves(&start, "0").with_context(|| format!("{tls:?}"))?;
    }
    Ok(())
}

#[test]
fn doctor_and_the_log_name_the_side_that_refuses() -> Result<()> {
    let database = Database::create()?;
    let sides = Sides::start([Some(SENTINELS_PASSWORD), Some(MASTERS_PASSWORD)], [false, false])?;
    let right = format!("redis://:{SENTINELS_PASSWORD}@/0");
    let wrong = format!("redis://:not-{SENTINELS_PASSWORD}@/0");
    let rights = format!("redis://:{MASTERS_PASSWORD}@mymaster/0");
    let wrongs = format!("redis://:not-{MASTERS_PASSWORD}@mymaster/0");
    let sentinel = format!("sentinel {}", sides.sentinel);
    let master = format!("master mymaster at 127.0.0.1:{}", sides.master.port());
    let elsewhere = closed_port()?;
    let nowhere = format!("redis://127.0.0.1:{elsewhere}");
    let cases = [
        (wrong.as_str(), rights.as_str(), [&*sentinel, "wrong user or password", "REDIS_URL"]),
        ("redis://@/0", &rights, [&sentinel, "needs a password", "REDIS_URL"]),
        (&right, &wrongs, [&master, "wrong user or password", "REDIS_MASTER_URL"]),
        (&right, "redis://mymaster/0", [&master, "needs a password", "REDIS_MASTER_URL"]),
        (&nowhere, &rights, ["sentinel 127.0.0.1", &elsewhere.to_string(), "refused"]),
    ];
    for (sentinels, master_url, words) in cases {
        let start = sides.service(&database, sentinels, Some(master_url));
        let report = start.clone().args(&["doctor"]).run()?;
        let line = report.stdout.lines().find(|line| line.starts_with("FAIL") && line.contains("redis"));
        let service = start.listen()?;
        service.becomes("degraded")?;
        let warning = service.process.logs(&["WARN", "Redis is unavailable"])?.remove(0);
        let fix = words[2];
        for said in [line.with_context(|| format!("{report:?}"))?, &warning] {
            for word in words.into_iter().filter(|word| *word != fix || said.starts_with("FAIL")) {
                ensure!(said.contains(word), "no {word:?}: {said}");
            }
        }
        has_none_of(&(service.stop()? + &report.said()), [SENTINELS_PASSWORD, MASTERS_PASSWORD])?;
    }
    // A name that the sentinels do not know is neither side's refusal of credentials.
    let start = sides.service(&database, &right, Some(&rights.replace("mymaster", "other")));
    let report = start.env("REDIS_SENTINEL_MASTER", "other").args(&["doctor"]).run()?;
    let line = report.stdout.lines().find(|line| line.starts_with("FAIL") && line.contains("redis"));
    ensure!(line.is_some_and(|line| line.contains("knows no master other")), "{report:?}");
    Ok(())
}
