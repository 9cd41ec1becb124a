//! Without Redis everything still works: slower, told once, and mended by itself.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use serde_json::json;
use tests::{Redis, RedisOptions, Scratch};

use super::support::{
    Answer, Database, Service, Start, User, avoid_the_minutes_edge, closed_port, eventually, within,
};

/// What no request of a degraded service comes near, on however busy a machine.
const PATIENCE: Duration = Duration::from_secs(20);

struct Conversation {
    ana: User,
    ben: User,
    /// Newest first, as a read shows it.
    said: Vec<String>,
}

impl Conversation {
    fn start(service: &Service) -> Result<Self> {
        let (ana, ben) = service.two_users()?;
        Ok(Self { ana, ben, said: Vec::new() })
    }

    /// Sends a message, and checks that every kind of read shows it at once.
    fn goes_on(&mut self, service: &Service) -> Result<()> {
        let content = format!("message {}", self.said.len() + 1);
        let sent =
            within(PATIENCE, "a send", || service.send(&self.ana, &self.ben, &content))?.expect(201)?;
        self.said.insert(0, content);
        ensure!(sent.json()?["seq"] == self.said.len());
        let read = within(PATIENCE, "a read", || service.contents(&self.ben, &self.ana, 5))?;
        ensure!(read == self.said[..self.said.len().min(5)], "{read:?} instead of {:?}", self.said);
        Ok(())
    }
}

fn start(database: &Database, redis: &Redis) -> Start {
    Start::on(database).env("REDIS_URL", &redis.url(0))
}

fn private_redis() -> Result<(Scratch, Redis)> {
    let scratch = Scratch::new("redis")?;
    let redis = Redis::start(&scratch.path().join("redis"), RedisOptions::default())?;
    Ok((scratch, redis))
}

/// The warning of the state change, and no other.
fn warned(service: &Service, times: usize) -> Result<()> {
    let lines = service.process.lines_with(&["WARN", "Redis"]);
    ensure!(lines.len() == times, "{} instead of {times} warnings: {lines:#?}", lines.len());
    let errors = service.process.lines_with(&["ERROR"]);
    ensure!(errors.is_empty(), "{errors:#?}");
    Ok(())
}

/// Takes Redis away and gives it back, twice, in the middle of a conversation.
fn comes_and_goes(
    mut leave: impl FnMut(&mut Redis) -> Result<()>,
    back: impl Fn(&mut Redis) -> Result<()>,
) -> Result<()> {
    let database = Database::create()?;
    let (_scratch, mut redis) = private_redis()?;
    let service = start(&database, &redis).ready()?;
    let mut conversation = Conversation::start(&service)?;
    for round in 1..=2 {
        conversation.goes_on(&service)?;
        leave(&mut redis)?;
        for _ in 0..5 {
            conversation.goes_on(&service)?;
        }
        service.becomes("degraded")?;
        ensure!(service.health()?.0 == 200);
        let health = service.operations("/healthz")?.json()?;
        ensure!(health["checks"]["redis"] == "away" && health["checks"]["postgres"] == "ok", "{health}");
        ensure!(service.metric("chat_dependency_up{dependency=\"redis\"}")? == 0.0);
        for _ in 0..10 {
            conversation.goes_on(&service)?;
        }
        warned(&service, round)?;
        back(&mut redis)?;
        service.becomes("ok")?;
        for _ in 0..5 {
            conversation.goes_on(&service)?;
        }
        warned(&service, round)?;
        // Once at the start, and once each time that it came back.
        let answers = service.process.lines_with(&["INFO", "Redis answers"]);
        ensure!(answers.len() == round + 1, "{answers:#?}");
    }
    ensure!(database.contents()?.len() == conversation.said.len());
    database.has_no_gaps()
}

#[test]
fn a_killed_redis_is_done_without_until_it_is_started_again() -> Result<()> {
    comes_and_goes(Redis::kill, Redis::restart)
}

#[test]
fn a_frozen_redis_is_done_without_until_it_goes_on() -> Result<()> {
    comes_and_goes(
        |redis| {
            redis.pause();
            Ok(())
        },
        |redis| {
            redis.resume();
            Ok(())
        },
    )
}

#[test]
fn a_redis_that_takes_no_writes_counts_as_away() -> Result<()> {
    comes_and_goes(
        |redis| redis.cli(&["CONFIG", "SET", "maxmemory", "1"]).map(drop),
        |redis| redis.cli(&["CONFIG", "SET", "maxmemory", "0"]).map(drop),
    )
}

#[test]
fn a_redis_that_is_away_at_the_start_is_used_when_it_comes() -> Result<()> {
    let database = Database::create()?;
    let (_scratch, mut redis) = private_redis()?;
    redis.stop()?;
    let service = start(&database, &redis).listen()?;
    service.becomes("degraded")?;
    let mut conversation = Conversation::start(&service)?;
    for _ in 0..10 {
        conversation.goes_on(&service)?;
    }
    warned(&service, 1)?;
    redis.restart()?;
    service.becomes("ok")?;
    conversation.goes_on(&service)?;
    warned(&service, 1)?;
    // It is used again: before long a read is answered from the window.
    eventually("a read from the window", || {
        service.contents(&conversation.ana, &conversation.ben, 1).ok()?;
        service.metric("chat_cache_lookups_total{outcome=\"hit\"}").ok().filter(|hits| *hits > 0.0)
    })?;
    conversation.goes_on(&service)
}

#[test]
fn a_redis_that_forgets_everything_is_filled_again() -> Result<()> {
    let database = Database::create()?;
    let (_scratch, redis) = private_redis()?;
    let service = start(&database, &redis).ready()?;
    let mut conversation = Conversation::start(&service)?;
    for forget in [&["FLUSHALL"][..], &["SCRIPT", "FLUSH"]] {
        for _ in 0..5 {
            conversation.goes_on(&service)?;
            redis.cli(forget)?;
        }
        conversation.goes_on(&service)?;
        service.becomes("ok")?;
    }
    Ok(())
}

#[test]
fn limits_still_limit_without_redis() -> Result<()> {
    let database = Database::create()?;
    let url = format!("redis://127.0.0.1:{}", closed_port()?);
    let start = Start::on(&database).env("REDIS_URL", &url);
    let unlimited = start.listen()?;
    let (ana, ben) = unlimited.two_users()?;
    let service = start
        .env("LOGIN_RATE_LIMIT_PER_MINUTE", "2")
        .env("REGISTER_RATE_LIMIT_PER_MINUTE", "3")
        .env("SEND_RATE_LIMIT_PER_MINUTE", "4")
        .listen()?;
    service.becomes("degraded")?;
    avoid_the_minutes_edge();
    for (path, allowed) in [("/login", 2), ("/register", 3)] {
        for _ in 0..allowed {
            Answer::of(service.post(path, &json!({})))?.expect(422)?;
        }
        let refused = Answer::of(service.post(path, &json!({})))?.expect(429)?;
        ensure!(!refused.header("retry-after").is_empty(), "{refused:?}");
    }
    for _ in 0..4 {
        service.send(&ana, &ben, "hello")?.expect(201)?;
    }
    service.send(&ana, &ben, "too much")?.expect(429)?;
    service.send(&ben, &ana, "my own count")?.expect(201)?;
    Ok(())
}

#[test]
fn limits_still_limit_when_redis_is_lost_on_the_way() -> Result<()> {
    let database = Database::create()?;
    let (_scratch, mut redis) = private_redis()?;
    let service = start(&database, &redis).env("REGISTER_RATE_LIMIT_PER_MINUTE", "3").ready()?;
    redis.kill()?;
    avoid_the_minutes_edge();
    let statuses = (0..4).map(|_| Ok(Answer::of(service.post("/register", &json!({})))?.status));
    ensure!(statuses.collect::<Result<Vec<_>>>()? == [422, 422, 422, 429]);
    Ok(())
}

#[test]
fn what_a_replica_without_redis_acknowledges_every_replica_shows() -> Result<()> {
    let database = Database::create()?;
    let (_scratch, redis) = private_redis()?;
    let with = start(&database, &redis).ready()?;
    let closed = format!("redis://127.0.0.1:{}", closed_port()?);
    let mut conversation = Conversation::start(&with)?;
    // The window is in use before the other replica comes.
    conversation.goes_on(&with)?;
    eventually("a read from the window", || {
        with.contents(&conversation.ana, &conversation.ben, 1).ok()?;
        with.metric("chat_cache_lookups_total{outcome=\"hit\"}").ok().filter(|hits| *hits > 0.0)
    })?;
    let without = Start::on(&database).env("REDIS_URL", &closed).listen()?;
    let Conversation { ana, ben, said } = &mut conversation;
    let mut taken = Vec::new();
    eventually("sends that are fast again", || {
        let content = format!("message {}", said.len() + 1);
        // A reader keeps the window of the one replica filled.
        let before = with.contents(ana, ben, 5).ok()?;
        assert_eq!(before, said[..said.len().min(5)], "before {content}");
        let started = Instant::now();
        let sent = without.send(ana, ben, &content).ok()?;
        taken.push(started.elapsed());
        assert_eq!(sent.status, 201, "{sent:?}");
        said.insert(0, content);
        for replica in [&with, &without] {
            let after = replica.contents(ben, ana, 5).expect("a page");
            assert_eq!(after, said[..said.len().min(5)], "acknowledged, and not shown");
        }
        taken.ends_with_fast(5).then_some(())
    })?;
    ensure!(taken.iter().all(|taken| *taken < PATIENCE), "{taken:?}");
    // Both write, in turns, and both see it all.
    for turn in 0..10 {
        conversation.goes_on(if turn % 2 == 0 { &with } else { &without })?;
        for replica in [&with, &without] {
            let newest = replica.contents(&conversation.ana, &conversation.ben, 1)?;
            ensure!(newest == conversation.said[..1], "{newest:?} instead of {:?}", conversation.said[0]);
        }
    }
    database.has_no_gaps()
}

trait Fast {
    fn ends_with_fast(&self, count: usize) -> bool;
}

impl Fast for Vec<Duration> {
    /// Under half of what waiting for a lease takes.
    fn ends_with_fast(&self, count: usize) -> bool {
        let last = self.iter().rev().take(count);
        self.len() >= count && last.into_iter().all(|taken| *taken < Duration::from_millis(450))
    }
}
