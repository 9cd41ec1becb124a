//! The rate limits, and `TRUSTED_PROXIES`.

use anyhow::{Context as _, Result, ensure};
use serde_json::json;
use tests::User;

use crate::process::support::{Database, Response, Service, Start, private_redis, start_in_one_minute};

#[derive(Clone, Copy)]
enum Limited {
    Login,
    Send,
    Register,
}

/// Sends requests until 429, at most `most`; returns how many were allowed.
fn allowed(service: &Service, what: Limited, users: &(User, User), most: usize) -> Result<usize> {
    // Invalid requests count too, and need no password hash.
    let invalid = json!({});
    for tries in 0..most {
        let answer = match what {
            Limited::Login => Response::of(service.post("/login", &invalid))?,
            Limited::Register => Response::of(service.post("/register", &invalid))?,
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

/// Checks the variable: unset, set, and switched off with 0; and that two replicas count together.
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
        start_in_one_minute();
        let found = allowed(&service, what, &users, default + 10)?;
        ensure!(found == expected, "{variable}={value:?}: {found} instead of {expected} allowed");
        let more = allowed(&replica, what, &users, 1)?;
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
        let service = start.env_if("TRUSTED_PROXIES", proxies).ready()?;
        let log_in =
            |client: &str| Response::of(service.post("/login", &json!({})).header("x-forwarded-for", client));
        start_in_one_minute();
        log_in("198.51.100.1")?.expect(422)?;
        log_in("198.51.100.2")?.expect(second)?;
        log_in("198.51.100.1")?.expect(429)?;
        // What the client itself wrote is to the left of what the proxy added.
        log_in("203.0.113.9, 198.51.100.1")?.expect(429)?;
    }
    Ok(())
}

#[test]
fn a_proxy_that_forwards_no_address_is_warned_of_once() -> Result<()> {
    let database = Database::create()?;
    let service = Start::on(&database)
        .env("TRUSTED_PROXIES", "127.0.0.1, 10.0.0.1")
        .env("LOGIN_RATE_LIMIT_PER_MINUTE", "1000")
        .ready()?;
    let log_in =
        |client: &str| Response::of(service.post("/login", &json!({})).header("x-forwarded-for", client));
    // Nothing to warn of: a chain of proxies, a port, a header that an untrusted client wrote.
    for good in ["203.0.113.1, 10.0.0.1", "203.0.113.1:51234", "nonsense, 203.0.113.1"] {
        log_in(good)?.expect(422)?;
    }
    ensure!(
        service.process.lines_with(&["WARN", "X-Forwarded-For"]).is_empty(),
        "{}",
        service.process.said()
    );
    let long = format!("a\tb\\{}", "x".repeat(5000));
    for bad in [&format!("{long}, 10.0.0.1"), "unknown", &long] {
        log_in(bad)?.expect(422)?;
    }
    service.process.logs(&["WARN", "X-Forwarded-For"])?;
    let lines = service.process.lines_with(&["X-Forwarded-For"]);
    ensure!(lines.len() == 1, "{lines:?}");
    for word in ["10.0.0.1", r"a\tb\\xxx", "share"] {
        ensure!(lines[0].contains(word), "{word}: {lines:?}");
    }
    ensure!(lines[0].len() < 600, "{} bytes", lines[0].len());
    Ok(())
}
