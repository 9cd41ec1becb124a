//! The variables of Postgres, Redis and the cache.

use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use tests::{Postgres, PostgresOptions, Redis, Scratch};

use crate::process::support::{
    Database, Service, Start, User, closed_port, eventually, private_redis, shared_redis, within,
};

/// The service's users and databases, as Postgres sees them.
fn sessions(postgres: &Postgres) -> Result<Vec<(String, String)>> {
    let rows = postgres.query(
        "postgres",
        "SELECT DISTINCT usename, datname FROM pg_stat_activity WHERE application_name = 'chat-service'",
    )?;
    let text = |row: &[Option<String>], at: usize| row.get(at).cloned().flatten().unwrap_or_default();
    Ok(rows.iter().map(|row| (text(row, 0), text(row, 1))).collect())
}

#[test]
fn the_parts_of_the_database_url_are_used_and_database_url_wins_over_them() -> Result<()> {
    let scratch = Scratch::new("parts")?;
    let postgres = Postgres::start(&scratch.path().join("postgres"), PostgresOptions::fast())?;
    postgres.query("postgres", "CREATE ROLE zoe LOGIN PASSWORD 'swordfish'")?;
    postgres.query("postgres", "CREATE DATABASE elsewhere OWNER zoe")?;
    let port = postgres.port().to_string();
    let parts = Start::bare()
        .env("REDIS_URL", &shared_redis())
        .env("DB_HOST", "127.0.0.1")
        .env("DB_PORT", &port)
        .env("DB_USER", "zoe")
        .env("DB_PASSWORD", "swordfish")
        .env("DB_NAME", "elsewhere");
    let service = parts.ready()?;
    assert_eq!(sessions(&postgres)?, [("zoe".to_owned(), "elsewhere".to_owned())]);
    service.stop()?;

    // Each part counts.
    for (variable, value, fix) in [
        ("DB_HOST", "host.invalid", "host.invalid"),
        ("DB_PORT", &*closed_port()?.to_string(), "start Postgres"),
        ("DB_USER", "nobody", "correct DB_USER and DB_PASSWORD"),
        ("DB_PASSWORD", "wrong", "correct DB_USER and DB_PASSWORD"),
        ("DB_NAME", "nowhere", "create the database"),
    ] {
        let report = parts.clone().env(variable, value).args(&["doctor"]).run()?;
        ensure!(report.code == 1 && report.stdout.contains(fix), "{variable}: {}", report.said());
    }

    let database = Database::on(&postgres)?;
    let url =
        parts.env("DB_PASSWORD", "wrong").env("DB_NAME", "nowhere").env("DATABASE_URL", &database.url());
    let _service = url.ready()?;
    assert_eq!(sessions(&postgres)?, [("postgres".to_owned(), "chat".to_owned())]);
    Ok(())
}

/// The pool grows to `expected` connections, and no further, while all statements wait.
fn connections_under_pressure(start: &Start, database: &Database, expected: usize) -> Result<()> {
    let service = start.clone().env("REQUEST_TIMEOUT_MS", "30000").ready()?;
    let ana = service.user("ana")?;
    let count = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()
                 AND application_name = 'chat-service'";
    let held = database.hold("LOCK TABLE users IN ACCESS EXCLUSIVE MODE")?;
    thread::scope(|scope| -> Result<()> {
        for _ in 0..expected + 10 {
            scope.spawn(|| service.me(&ana.token));
        }
        eventually("the pool to be full", || {
            database.value(count).ok().filter(|count| count == &expected.to_string())
        })?;
        for _ in 0..20 {
            thread::sleep(Duration::from_millis(20));
            let count: usize = database.value(count)?.parse()?;
            ensure!(count <= expected, "{count} connections");
        }
        held.release();
        Ok(())
    })
}

#[test]
fn db_pool_max_bounds_the_connections() -> Result<()> {
    let database = Database::create()?;
    connections_under_pressure(&Start::on(&database).env("DB_POOL_MAX", "4"), &database, 4)
}

#[test]
fn db_pool_max_is_twenty_when_it_is_not_set() -> Result<()> {
    let database = Database::create()?;
    connections_under_pressure(&Start::on(&database), &database, 20)
}

#[test]
fn db_statement_timeout_ms_ends_a_statement_that_waits() -> Result<()> {
    let database = Database::create()?;
    let start = Start::on(&database).env("REQUEST_TIMEOUT_MS", "50000");
    let service = start.env("DB_STATEMENT_TIMEOUT_MS", "300").ready()?;
    let (ana, ben) = service.two_users()?;
    service.send(&ana, &ben, "first")?.expect(201)?;
    let held = database.hold_conversations()?;
    // Far above the variable's value, and below its default.
    let limit = Duration::from_millis(4500);
    within(limit, "the refusal", || service.send(&ana, &ben, "too late"))?.is_unavailable()?;
    held.release();
    service.send(&ana, &ben, "second")?.expect(201)?;
    assert_eq!(service.contents(&ben, &ana, 5)?, ["second", "first"]);
    let held = database.hold("LOCK TABLE users IN ACCESS EXCLUSIVE MODE")?;
    within(limit, "the refusal", || service.me(&ana.token))?.is_unavailable()?;
    held.release();
    Ok(())
}

#[test]
fn request_timeout_ms_answers_503_before_a_statement_ends() -> Result<()> {
    let database = Database::create()?;
    let start = Start::on(&database).env("DB_STATEMENT_TIMEOUT_MS", "50000");
    let service = start.env("REQUEST_TIMEOUT_MS", "2500").ready()?;
    let (ana, ben) = service.two_users()?;
    service.send(&ana, &ben, "first")?.expect(201)?;
    let _held = database.hold_conversations()?;
    let answer = within(Duration::from_secs(8), "the refusal", || service.send(&ana, &ben, "too late"))?;
    answer.is_unavailable()?;
    ensure!(answer.body.contains("took too long"), "{}", answer.body);
    Ok(())
}

#[test]
fn redis_url_names_the_server_and_the_database() -> Result<()> {
    let database = Database::create()?;
    let (_scratch, redis) = private_redis()?;
    let service = Start::on(&database).env("REDIS_URL", &redis.url(7)).ready()?;
    let (ana, ben) = service.two_users()?;
    service.send(&ana, &ben, "hello")?.expect(201)?;
    service.contents(&ana, &ben, 1)?;
    ensure!(redis.cli(&["-n", "7", "KEYS", "chat:recent:*"])?.contains(":list"));
    ensure!(redis.cli(&["-n", "0", "DBSIZE"])? == "0");
    Ok(())
}

#[test]
fn redis_url_carries_a_user_and_a_password() -> Result<()> {
    let database = Database::create()?;
    let (_scratch, redis) = private_redis()?;
    redis.cli(&["ACL", "SETUSER", "chat", "on", ">open,sesame", "~*", "+@all"])?;
    redis.cli(&["ACL", "SETUSER", "default", "off"])?;
    let port = redis.port();
    let start = Start::on(&database);
    start.clone().env("REDIS_URL", &format!("redis://chat:open,sesame@127.0.0.1:{port}/0")).ready()?;
    let refused = start.env("REDIS_URL", &format!("redis://chat:wrong@127.0.0.1:{port}/0")).listen()?;
    refused.becomes("degraded")?;
    refused.process.logs(&["WARN", "Redis is unavailable"])?;
    Ok(())
}

/// The key of the only conversation's list, once a read has filled it.
fn filled_list(service: &Service, redis: &Redis, reader: &User, peer: &User) -> Result<String> {
    eventually("a list in Redis", || {
        service.contents(reader, peer, 1).ok()?;
        redis.cli(&["KEYS", "chat:recent:*:list"]).ok().filter(|key| !key.is_empty())
    })
}

#[test]
fn cache_window_is_the_length_of_a_conversations_list() -> Result<()> {
    let database = Database::create()?;
    let mut users = None;
    for (window, expected) in [(None, 50), (Some("3"), 3)] {
        let (_scratch, redis) = private_redis()?;
        let start = Start::on(&database).env("REDIS_URL", &redis.url(0));
        let service = start.env_if("CACHE_WINDOW", window).ready()?;
        if users.is_none() {
            let (ana, ben) = service.two_users()?;
            for number in 0..55 {
                service.send(&ana, &ben, &number.to_string())?.expect(201)?;
            }
            users = Some((ana, ben));
        }
        let (ana, ben) = users.as_ref().context("two users")?;
        let list = filled_list(&service, &redis, ana, ben)?;
        // One more message does not make it longer.
        service.send(ana, ben, "one more")?.expect(201)?;
        let length = redis.cli(&["LLEN", &list])?;
        ensure!(length == expected.to_string(), "{length} instead of {expected}");
    }
    Ok(())
}

#[test]
fn cache_window_zero_keeps_nothing_and_serves_from_postgres() -> Result<()> {
    let database = Database::create()?;
    let (_scratch, redis) = private_redis()?;
    let service = Start::on(&database).env("REDIS_URL", &redis.url(0)).env("CACHE_WINDOW", "0").ready()?;
    let (ana, ben) = service.two_users()?;
    for content in ["first", "second"] {
        service.send(&ana, &ben, content)?.expect(201)?;
        service.contents(&ana, &ben, 5)?;
    }
    ensure!(service.contents(&ben, &ana, 5)? == ["second", "first"]);
    let keys = redis.cli(&["KEYS", "chat:recent:*:list"])?;
    ensure!(keys.is_empty(), "{keys}");
    Ok(())
}

#[test]
fn cache_ttl_seconds_is_the_life_of_an_unused_list() -> Result<()> {
    let database = Database::create()?;
    for (seconds, least, most) in [(None, 5_000, 30_000), (Some("900"), 600_000, 900_000)] {
        let (_scratch, redis) = private_redis()?;
        let start = Start::on(&database).env("REDIS_URL", &redis.url(0));
        let service = start.env_if("CACHE_TTL_SECONDS", seconds).ready()?;
        let names = if seconds.is_none() { ["ana", "ben"] } else { ["eve", "kim"] };
        let (one, other) = (service.user(names[0])?, service.user(names[1])?);
        service.send(&one, &other, "hello")?.expect(201)?;
        let list = filled_list(&service, &redis, &one, &other)?;
        let life: i64 = redis.cli(&["PTTL", &list])?.parse()?;
        ensure!((least..=most).contains(&life), "{seconds:?}: {life} ms");
    }
    Ok(())
}
