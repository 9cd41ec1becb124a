//! Every variable does what its row says, seen from outside: in answers, in Postgres and in Redis.

use std::net::TcpStream;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use rustix::process::Signal;
use serde_json::{Value, json};
use tests::{Postgres, PostgresOptions, Redis, RedisOptions, Scratch};

use super::support::{
    Answer, Database, LIMIT, Service, Start, User, avoid_the_minutes_edge, closed_port, eventually, within,
};

fn private_redis() -> Result<(Scratch, Redis)> {
    let scratch = Scratch::new("redis")?;
    let redis = Redis::start(&scratch.path().join("redis"), RedisOptions::default())?;
    Ok((scratch, redis))
}

#[test]
fn secret_key_signs_tokens_and_its_default_is_public() -> Result<()> {
    let database = Database::create()?;
    let start = Start::on(&database);
    let default = start.ready()?;
    let ana = default.user("ana")?;
    let same = start.clone().env("SECRET_KEY", "please-change").ready()?;
    same.me(&ana.token)?.expect(200)?;
    let other = start.env("SECRET_KEY", "another key of at least thirty-two bytes").ready()?;
    other.me(&ana.token)?.expect(401)?;
    Ok(())
}

#[test]
fn secret_key_previous_keeps_users_logged_in_over_a_rotation() -> Result<()> {
    const OLD: &str = "the old key of at least thirty-two bytes";
    const NEW: &str = "the new key of at least thirty-two bytes";
    let database = Database::create()?;
    let start = Start::on(&database);
    let before = start.clone().env("SECRET_KEY", OLD).ready()?;
    let ana = before.user("ana")?;
    let rotated = start.clone().env("SECRET_KEY", NEW).env("SECRET_KEY_PREVIOUS", OLD).ready()?;
    rotated.me(&ana.token)?.expect(200)?;
    // What is signed from now on is signed with the new key.
    let renewed = rotated.log_in("ana")?;
    before.me(&renewed)?.expect(401)?;
    let after = start.env("SECRET_KEY", NEW).ready()?;
    after.me(&renewed)?.expect(200)?;
    after.me(&ana.token)?.expect(401)?;
    Ok(())
}

#[test]
fn access_token_exp_minutes_is_what_a_login_says_and_the_token_holds() -> Result<()> {
    let database = Database::create()?;
    for (minutes, seconds) in [(None, 3600), (Some("7"), 420)] {
        let start = Start::on(&database);
        let start =
            minutes.iter().fold(start, |start, minutes| start.env("ACCESS_TOKEN_EXP_MINUTES", minutes));
        let service = start.ready()?;
        if minutes.is_none() {
            service.user("ana")?;
        }
        let body = json!({"username": "ana", "password": super::support::PASSWORD});
        let token = Answer::of(service.post("/login", &body))?.expect(200)?.json()?;
        assert_eq!(token["expires_in"], seconds);
        let claims = claims(token["access_token"].as_str().context("a token")?)?;
        let life = claims["exp"].as_u64().zip(claims["iat"].as_u64()).map(|(exp, iat)| exp - iat);
        assert_eq!(life, Some(seconds), "{claims}");
    }
    Ok(())
}

/// The middle part of a token, which is base64url without padding.
fn claims(token: &str) -> Result<Value> {
    const ALPHABET: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    let middle = token.split('.').nth(1).context("a token has three parts")?;
    let (mut bytes, mut buffer, mut bits) = (Vec::new(), 0_u32, 0);
    for letter in middle.bytes() {
        let value = ALPHABET.iter().position(|known| *known == letter).context("base64url")?;
        buffer = (buffer << 6) | u32::try_from(value)?;
        bits += 6;
        if bits >= 8 {
            bits -= 8;
            bytes.push((buffer >> bits) as u8);
            buffer &= (1 << bits) - 1;
        }
    }
    Ok(serde_json::from_slice(&bytes)?)
}

/// Who is logged in to which database, as Postgres sees it.
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
        .env("REDIS_URL", &super::support::shared_redis())
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

/// How many connections the service comes to while all its statements wait.
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
    // Far over the variable's value, and under its default.
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
    let service = start.env("REQUEST_TIMEOUT_MS", "400").ready()?;
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
    refused.process.logs(&["WARN", "Redis is away"])?;
    Ok(())
}

#[test]
fn host_is_the_address_of_both_ports() -> Result<()> {
    let database = Database::create()?;
    let service = Start::on(&database).env("HOST", "127.0.0.2").ready()?;
    for address in [service.public, service.operations] {
        ensure!(address.ip().to_string() == "127.0.0.2", "{address}");
        ensure!(TcpStream::connect(("127.0.0.1", address.port())).is_err(), "it listens elsewhere too");
    }
    let everywhere = Start::on(&database).unset("HOST").ready()?;
    for address in [everywhere.public, everywhere.operations] {
        ensure!(address.ip().is_unspecified(), "{address}");
        TcpStream::connect(("127.0.0.3", address.port())).context("it does not listen everywhere")?;
    }
    Ok(())
}

#[test]
fn port_serves_the_api_and_ops_port_the_operations() -> Result<()> {
    let database = Database::create()?;
    let [public, operations] = [closed_port()?, closed_port()?];
    let start =
        Start::on(&database).env("PORT", &public.to_string()).env("OPS_PORT", &operations.to_string());
    let service = start.ready()?;
    ensure!(service.public.port() == public && service.operations.port() == operations);
    for path in ["/docs/", "/openapi.json", "/healthz"] {
        Answer::of(service.get(path))?.expect(200)?;
    }
    for path in ["/metrics", "/livez", "/healthz"] {
        service.operations(path)?.expect(200)?;
    }
    Answer::of(service.get("/metrics"))?.expect(404)?;
    service.operations("/openapi.json")?.expect(404)?;
    Ok(())
}

#[derive(Clone, Copy)]
enum Limited {
    Login,
    Send,
    Register,
}

/// Tries until 429, at most `most` times; returns how many were let through.
fn let_through(service: &Service, what: Limited, users: &(User, User), most: usize) -> Result<usize> {
    // A limit counts what is invalid too, and nobody waits for a password's hash.
    let invalid = json!({});
    for tries in 0..most {
        let answer = match what {
            Limited::Login => Answer::of(service.post("/login", &invalid))?,
            Limited::Register => Answer::of(service.post("/register", &invalid))?,
            Limited::Send => service.send(&users.0, &users.1, "hello")?,
        };
        if answer.status == 429 {
            let wait: u64 = answer.header("retry-after").parse().context("Retry-After")?;
            ensure!((1..=60).contains(&wait), "{answer:?}");
            return Ok(tries);
        }
        ensure!([201, 422].contains(&answer.status), "{answer:?}");
    }
    Ok(most)
}

/// The variable's effect: by default, with another number, and switched off; and that two replicas count together.
fn limits(variable: &str, what: Limited, default: usize) -> Result<()> {
    let database = Database::create()?;
    let unlimited = Start::on(&database);
    let users = unlimited.ready()?.two_users()?;
    let cases = [(None, default), (Some("3"), 3), (Some("0"), default + 10)];
    for (value, expected) in cases {
        let (_scratch, redis) = private_redis()?;
        let start = unlimited.clone().env("REDIS_URL", &redis.url(0));
        let start = value.map_or(start.clone().unset(variable), |value| start.env(variable, value));
        let (service, replica) = (start.ready()?, start.ready()?);
        avoid_the_minutes_edge();
        let found = let_through(&service, what, &users, default + 10)?;
        ensure!(found == expected, "{variable}={value:?}: {found} instead of {expected} let through");
        let more = let_through(&replica, what, &users, 1)?;
        ensure!(more == usize::from(value == Some("0")), "{variable}={value:?}: each replica counts alone");
    }
    Ok(())
}

#[test]
fn login_rate_limit_per_minute_counts_an_address_over_all_replicas() -> Result<()> {
    limits("LOGIN_RATE_LIMIT_PER_MINUTE", Limited::Login, 5)
}

#[test]
fn send_rate_limit_per_minute_counts_a_user_over_all_replicas() -> Result<()> {
    limits("SEND_RATE_LIMIT_PER_MINUTE", Limited::Send, 30)
}

#[test]
fn register_rate_limit_per_minute_counts_an_address_over_all_replicas() -> Result<()> {
    limits("REGISTER_RATE_LIMIT_PER_MINUTE", Limited::Register, 30)
}

#[test]
fn the_forwarded_address_counts_only_behind_one_of_trusted_proxies() -> Result<()> {
    let database = Database::create()?;
    let cases = [(None, 429), (Some("10.0.0.0/8"), 429), (Some("10.0.0.0/8,127.0.0.0/8"), 422)];
    for (proxies, second) in cases {
        let (_scratch, redis) = private_redis()?;
        let start =
            Start::on(&database).env("REDIS_URL", &redis.url(0)).env("LOGIN_RATE_LIMIT_PER_MINUTE", "1");
        let service =
            proxies.iter().fold(start, |start, proxies| start.env("TRUSTED_PROXIES", proxies)).ready()?;
        let log_in =
            |client: &str| Answer::of(service.post("/login", &json!({})).header("x-forwarded-for", client));
        avoid_the_minutes_edge();
        log_in("198.51.100.1")?.expect(422)?;
        log_in("198.51.100.2")?.expect(second)?;
        log_in("198.51.100.1")?.expect(429)?;
        // What the client itself wrote stands left of what the proxy added.
        log_in("203.0.113.9, 198.51.100.1")?.expect(429)?;
    }
    Ok(())
}

/// The key of the one conversation's list, once a read was allowed to fill it.
fn filled_list(service: &Service, redis: &Redis, reader: &User, peer: &User) -> Result<String> {
    eventually("a list in Redis", || {
        service.contents(reader, peer, 1).ok()?;
        redis.cli(&["KEYS", "chat:recent:*:list"]).ok().filter(|key| !key.is_empty())
    })
}

#[test]
fn cache_window_is_the_length_of_a_conversations_list() -> Result<()> {
    let database = Database::create()?;
    for (window, expected) in [(None, 50), (Some("3"), 3)] {
        let (_scratch, redis) = private_redis()?;
        let start = Start::on(&database).env("REDIS_URL", &redis.url(0));
        let service = window.iter().fold(start, |start, window| start.env("CACHE_WINDOW", window)).ready()?;
        if window.is_none() {
            let (ana, ben) = service.two_users()?;
            for number in 0..55 {
                service.send(&ana, &ben, &number.to_string())?.expect(201)?;
            }
        }
        let ana = User { token: service.log_in("ana")?, ..service_user(&service, "ana", "ben")? };
        let ben = User { token: service.log_in("ben")?, ..service_user(&service, "ben", "ana")? };
        let list = filled_list(&service, &redis, &ana, &ben)?;
        // One more message, and it is still no longer.
        service.send(&ana, &ben, "one more")?.expect(201)?;
        let length = redis.cli(&["LLEN", &list])?;
        ensure!(length == expected.to_string(), "{length} instead of {expected}");
    }
    Ok(())
}

/// Somebody registered before, with the id that `other` finds; the token is `other`'s.
fn service_user(service: &Service, name: &str, other: &str) -> Result<User> {
    let token = service.log_in(other)?;
    let found =
        Answer::of(service.get(&format!("/users/{name}")).bearer_auth(&token))?.expect(200)?.json()?;
    let id = found["id"].as_str().context("an id")?.to_owned();
    Ok(User { id, token })
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
        let service =
            seconds.iter().fold(start, |start, seconds| start.env("CACHE_TTL_SECONDS", seconds)).ready()?;
        let names = if seconds.is_none() { ["ana", "ben"] } else { ["eve", "kim"] };
        let (one, other) = (service.user(names[0])?, service.user(names[1])?);
        service.send(&one, &other, "hello")?.expect(201)?;
        let list = filled_list(&service, &redis, &one, &other)?;
        let life: i64 = redis.cli(&["PTTL", &list])?.parse()?;
        ensure!((least..=most).contains(&life), "{seconds:?}: {life} ms");
    }
    Ok(())
}

#[test]
fn max_body_bytes_is_the_largest_body() -> Result<()> {
    let database = Database::create()?;
    for (limit, bytes) in [(None, 65_536), (Some("2000"), 2_000)] {
        let start =
            limit.iter().fold(Start::on(&database), |start, limit| start.env("MAX_BODY_BYTES", limit));
        let service = start.ready()?;
        let padded = |length: usize| {
            let body = format!("{{{}}}", " ".repeat(length - 2));
            Answer::of(service.post("/register", &json!({})).body(body))
        };
        padded(bytes)?.expect(422)?;
        let refused = padded(bytes + 1)?.expect(413)?;
        ensure!(refused.body.contains(&bytes.to_string()), "{}", refused.body);
    }
    Ok(())
}

#[test]
fn migrate_on_start_false_waits_live_and_unready_for_the_migration() -> Result<()> {
    let database = Database::create()?;
    let start = Start::on(&database);
    let service = start.clone().env("MIGRATE_ON_START", "false").listen()?;
    service.becomes("unavailable")?;
    let health = service.operations("/healthz")?.expect(503)?.json()?;
    ensure!(health["checks"]["postgres"] == "ok" && health["checks"]["schema"] == "behind", "{health}");
    service.operations("/livez")?.expect(200)?;
    Answer::of(service.post("/login", &json!({"username": "ana", "password": "12345678"})))?
        .is_unavailable()?;
    ensure!(database.value("SELECT count(*) FROM pg_tables WHERE schemaname = 'public'")? == "0");
    ensure!(start.args(&["migrate"]).run()?.code == 0);
    service.becomes("ok")?;
    let (ana, ben) = service.two_users()?;
    service.send(&ana, &ben, "hello")?.expect(201)?;
    Ok(())
}

#[test]
fn migrate_on_start_is_true_when_it_is_not_set() -> Result<()> {
    let database = Database::create()?;
    let _service = Start::on(&database).ready()?;
    ensure!(database.value("SELECT count(*) FROM _sqlx_migrations WHERE success")? != "0");
    Ok(())
}

#[test]
fn shutdown_grace_seconds_is_what_a_stopping_process_says_it_has() -> Result<()> {
    let database = Database::create()?;
    for (grace, said) in [(None, "grace_seconds=20"), (Some("3"), "grace_seconds=3")] {
        let start =
            grace.iter().fold(Start::on(&database), |s, grace| s.env("SHUTDOWN_GRACE_SECONDS", grace));
        let mut service = start.ready()?;
        service.process.signal(Signal::TERM)?;
        ensure!(service.process.exit(LIMIT)? == 0);
        ensure!(service.process.lines_with(&["stopping", said]).len() == 1, "{}", service.process.said());
    }
    Ok(())
}

#[test]
fn log_format_json_makes_every_line_an_object_and_text_none() -> Result<()> {
    let database = Database::create()?;
    let service = Start::on(&database).env("LOG_FORMAT", "json").ready()?;
    let request = service.get("/me").header("x-request-id", "a-request-of-mine");
    Answer::of(request)?.expect(401)?;
    let said = service.stop()?;
    let mut requests = Vec::new();
    for line in said.lines() {
        let event: Value = serde_json::from_str(line).with_context(|| line.to_owned())?;
        ensure!(event["timestamp"].is_string() && event["level"].is_string(), "{event}");
        if event["message"] == "request" {
            requests.push(event);
        }
    }
    let mine = requests.iter().find(|event| event["route"] == "/me").context("the request's line")?;
    ensure!(mine.to_string().contains("\"request_id\":\"a-request-of-mine\""), "{mine}");
    ensure!(mine["method"] == "GET" && mine["status"] == 401 && mine["duration_ms"].is_number(), "{mine}");

    let text = Start::on(&database).ready()?.stop()?;
    for line in text.lines() {
        ensure!(serde_json::from_str::<Value>(line).is_err() && !line.contains('\u{1b}'), "{line}");
    }
    Ok(())
}

#[test]
fn rust_log_filters_by_level_and_by_target() -> Result<()> {
    let database = Database::create()?;
    let [public, operations] = [closed_port()?, closed_port()?].map(|port| port.to_string());
    let start = Start::on(&database);
    let default = start.ready()?;
    default.me("nonsense")?.expect(401)?;
    let said = default.stop()?;
    ensure!(said.contains(" INFO ") && !said.contains("DEBUG"), "{said}");
    let debug = start.clone().env("RUST_LOG", "debug").ready()?.stop()?;
    ensure!(debug.contains("DEBUG"), "{debug}");
    // Nothing tells the ports now, so they are chosen.
    let quiet = start.env("PORT", &public).env("OPS_PORT", &operations);
    for (filter, expected) in [("warn", "WARN"), ("off,chat_service=warn", "WARN"), ("off", "")] {
        let mut process = quiet.clone().env("RUST_LOG", filter).spawn()?;
        let port: u16 = operations.parse()?;
        eventually("the port", || TcpStream::connect(("127.0.0.1", port)).ok())?;
        process.signal(Signal::TERM)?;
        ensure!(process.exit(LIMIT)? == 0);
        let said = process.said();
        ensure!(said.lines().all(|line| !expected.is_empty() && line.contains(expected)), "{filter}: {said}");
        ensure!(said.is_empty() == expected.is_empty(), "{filter}: {said}");
    }
    Ok(())
}

#[test]
fn a_dotenv_file_is_read_and_the_environment_wins() -> Result<()> {
    let database = Database::create()?;
    let file = format!(
        "# a comment\nDATABASE_URL={}\nexport ACCESS_TOKEN_EXP_MINUTES=11\nLOG_FORMAT='json'\n",
        database.url()
    );
    let start = Start::on(&database).unset("DATABASE_URL").file(".env", &file);
    let service = start.ready()?;
    service.user("ana")?;
    let body = json!({"username": "ana", "password": super::support::PASSWORD});
    let log_in = |service: &Service| Answer::of(service.post("/login", &body))?.expect(200)?.json();
    assert_eq!(log_in(&service)?["expires_in"], 660);
    ensure!(service.stop()?.starts_with('{'), "the log is not JSON");
    let service = start.env("ACCESS_TOKEN_EXP_MINUTES", "5").env("LOG_FORMAT", "text").ready()?;
    assert_eq!(log_in(&service)?["expires_in"], 300);
    ensure!(!service.stop()?.starts_with('{'), "the file won");
    Ok(())
}

#[test]
fn an_empty_value_counts_as_unset() -> Result<()> {
    let database = Database::create()?;
    let start =
        Start::on(&database).env("TRUSTED_PROXIES", "").env("APP_ENV", "").env("SECRET_KEY_PREVIOUS", "");
    start.env("LOG_FORMAT", "").ready()?;
    Ok(())
}
