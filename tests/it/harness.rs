//! The harness itself: its servers start, fail, restart and leave nothing behind.

use std::fs;
use std::net::TcpStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use tests::servers::{self, daemon};
use tests::{Postgres, PostgresOptions, Redis, RedisOptions, Scratch};

fn one(rows: Vec<Vec<Option<String>>>) -> Option<String> {
    rows.into_iter().next()?.into_iter().next()?
}

#[test]
fn postgres_restarts_on_its_port_with_all_committed_data() -> Result<()> {
    let scratch = Scratch::new("postgres")?;
    let dir = scratch.path().join("postgres");
    let mut postgres = Postgres::start(&dir, PostgresOptions::fast().setting("work_mem", "3MB"))?;
    let port = postgres.port();
    postgres.create_database("my \"odd' name")?;
    postgres.create_database("my \"odd' name")?;
    let query = |postgres: &Postgres, sql: &str| postgres.query("my \"odd' name", sql).map(one);
    assert_eq!(query(&postgres, "SHOW work_mem")?.as_deref(), Some("3MB"));
    assert_eq!(query(&postgres, "SHOW server_encoding")?.as_deref(), Some("UTF8"));
    assert_eq!(query(&postgres, "SELECT lower('ÅÉ')")?.as_deref(), Some("åé"));
    query(&postgres, "CREATE TABLE t (v text); INSERT INTO t VALUES ('first'), (NULL)")?;
    let rows = postgres.query("my \"odd' name", "SELECT v FROM t")?;
    assert_eq!(rows, [[Some("first".to_owned())], [None]]);
    let refused = query(&postgres, "SELECT 1 FROM nowhere").expect_err("no such table");
    assert!(refused.to_string().contains("nowhere") && refused.to_string().contains("42P01"), "{refused}");

    postgres.kill()?;
    assert!(TcpStream::connect(("127.0.0.1", port)).is_err(), "it still listens");
    postgres.restart()?;
    assert_eq!(postgres.port(), port);
    assert_eq!(query(&postgres, "SELECT count(*) FROM t")?.as_deref(), Some("2"));
    postgres.restart()?;
    assert_eq!(query(&postgres, "SELECT count(*) FROM t")?.as_deref(), Some("2"));
    drop(postgres);
    assert!(!dir.exists(), "a fast instance leaves its files");
    Ok(())
}

#[test]
fn a_paused_server_does_not_answer_until_it_is_resumed() -> Result<()> {
    let scratch = Scratch::new("pause")?;
    let mut postgres = Postgres::start(&scratch.path().join("postgres"), PostgresOptions::fast())?;
    let mut redis = Redis::start(&scratch.path().join("redis"), RedisOptions::default())?;
    postgres.pause();
    redis.pause();
    thread::scope(|scope| -> Result<()> {
        let rows = scope.spawn(|| postgres.query("postgres", "SELECT 1"));
        let pong = scope.spawn(|| redis.cli(&["PING"]));
        thread::sleep(Duration::from_millis(300));
        assert!(!rows.is_finished() && !pong.is_finished(), "a frozen server answered");
        // The waiting threads borrow the handles, so the processes are resumed by their ids.
        for pid in [postgres.pid(), redis.pid()].into_iter().flatten() {
            ensure!(Command::new("kill").args(["-CONT", &pid.to_string()]).status()?.success());
        }
        assert_eq!(rows.join().expect("no panic")?.len(), 1);
        assert_eq!(pong.join().expect("no panic")?, "PONG");
        Ok(())
    })?;
    postgres.resume();
    redis.resume();
    assert_eq!(postgres.query("postgres", "SELECT 1")?.len(), 1);
    Ok(())
}

#[test]
fn durable_data_survives_the_instance_and_a_start_ends_the_server_of_a_killed_run() -> Result<()> {
    let scratch = Scratch::new("durable")?;
    let dir = scratch.path().join("postgres");
    let first = Postgres::start(&dir, PostgresOptions::durable())?;
    first.query("postgres", "CREATE TABLE kept ()")?;
    let abandoned = first.pid().expect("it runs");
    // Like a killed run: nothing stops the server.
    std::mem::forget(first);
    let second = Postgres::start(&dir, PostgresOptions::durable())?;
    assert!(!is_alive(abandoned), "two servers on one directory");
    second.query("postgres", "SELECT * FROM kept")?;
    drop(second);
    let third = Postgres::start(&dir, PostgresOptions::durable())?;
    third.query("postgres", "SELECT * FROM kept")?;
    drop(third);
    servers::clear(&dir)?;
    assert!(!dir.exists());
    Ok(())
}

#[test]
fn redis_restarts_empty_on_its_port() -> Result<()> {
    let scratch = Scratch::new("redis")?;
    let dir = scratch.path().join("redis");
    let mut redis = Redis::start(&dir, RedisOptions::default().config("maxmemory 64mb"))?;
    let port = redis.port();
    assert_eq!(redis.cli(&["-n", "4095", "SET", "key", "value"])?, "OK");
    assert_eq!(redis.cli(&["CONFIG", "GET", "maxmemory"])?, "maxmemory\n67108864");
    redis.kill()?;
    assert!(redis.cli(&["PING"]).is_err(), "it still answers");
    redis.restart()?;
    assert_eq!(redis.port(), port);
    assert_eq!(redis.cli(&["-n", "4095", "EXISTS", "key"])?, "0");
    let abandoned = redis.pid().expect("it runs");
    std::mem::forget(redis);
    let next = Redis::start(&dir, RedisOptions::default())?;
    assert!(!is_alive(abandoned), "two servers on one directory");
    drop(next);
    assert!(!dir.exists(), "a cache leaves its files");
    Ok(())
}

#[test]
fn a_sentinel_knows_its_master() -> Result<()> {
    let scratch = Scratch::new("sentinel")?;
    let master = Redis::start(&scratch.path().join("master"), RedisOptions::default())?;
    let watch = format!("sentinel monitor mymaster 127.0.0.1 {} 1", master.port());
    let options = RedisOptions { sentinel: true, ..RedisOptions::default() }.config(&watch);
    let mut sentinel = Redis::start(&scratch.path().join("sentinel"), options)?;
    let address = format!("127.0.0.1\n{}", master.port());
    assert_eq!(sentinel.cli(&["SENTINEL", "GET-MASTER-ADDR-BY-NAME", "mymaster"])?, address);
    sentinel.restart()?;
    assert_eq!(sentinel.cli(&["SENTINEL", "GET-MASTER-ADDR-BY-NAME", "mymaster"])?, address);
    Ok(())
}

#[test]
fn a_server_that_cannot_start_names_the_cause() -> Result<()> {
    let scratch = Scratch::new("refused")?;
    let options = PostgresOptions::fast().setting("shared_buffers", "lots");
    let error = Postgres::start(&scratch.path().join("postgres"), options).expect_err("a bad setting");
    assert!(format!("{error:#}").contains("shared_buffers"), "{error:#}");
    let options = RedisOptions::default().config("no-such-setting yes");
    let error = Redis::start(&scratch.path().join("redis"), options).expect_err("a bad setting");
    assert!(format!("{error:#}").contains("no-such-setting"), "{error:#}");
    Ok(())
}

/// Only Linux sends a child a signal when its parent has died.
#[test]
#[cfg(target_os = "linux")]
fn a_server_dies_with_a_parent_that_is_killed() -> Result<()> {
    const CHILD: &str = "HARNESS_TEST_PARENT_DIR";
    if let Ok(dir) = std::env::var(CHILD) {
        let postgres = Postgres::start(&Path::new(&dir).join("postgres"), PostgresOptions::fast())?;
        let redis = Redis::start(&Path::new(&dir).join("redis"), RedisOptions::default())?;
        let pids = [postgres.pid(), redis.pid()].map(|pid| pid.unwrap_or_default().to_string());
        fs::write(Path::new(&dir).join("pids.new"), pids.join(" "))?;
        fs::rename(Path::new(&dir).join("pids.new"), Path::new(&dir).join("pids"))?;
        thread::sleep(Duration::from_secs(120));
        return Ok(());
    }
    let scratch = Scratch::new("orphans")?;
    let mut parent = Command::new(std::env::current_exe()?)
        .args(["--exact", "harness::a_server_dies_with_a_parent_that_is_killed"])
        .env(CHILD, scratch.path())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?;
    let pids =
        daemon::poll(Duration::from_secs(90), || Ok(fs::read_to_string(scratch.path().join("pids")).ok()));
    parent.kill()?;
    parent.wait()?;
    let pids: Vec<u32> =
        pids?.expect("both servers start").split(' ').map(|pid| pid.parse().expect("a pid")).collect();
    let killed = Instant::now();
    while pids.iter().any(|pid| is_alive(*pid)) {
        ensure!(killed.elapsed() < Duration::from_secs(20), "servers outlive their parent: {pids:?}");
        thread::sleep(Duration::from_millis(20));
    }
    for server in ["postgres", "redis"] {
        servers::clear(&scratch.path().join(server))?;
    }
    Ok(())
}

fn is_alive(pid: u32) -> bool {
    i32::try_from(pid).is_ok_and(daemon::is_alive)
}
