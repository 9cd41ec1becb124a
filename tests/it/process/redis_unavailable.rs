//! Without Redis everything still works, if slower; one warning is logged, and the service recovers by itself.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use serde_json::json;
use tests::Redis;

use super::support::{
    Database, Response, Service, Start, User, closed_port, eventually, private_redis, start_in_one_minute,
    within,
};

/// No request of a degraded service takes this long, even on a busy machine.
const PATIENCE: Duration = Duration::from_secs(20);

/// A request that waits for Redis has time left for the answer that needs no Redis.
#[test]
fn a_frozen_redis_leaves_time_for_the_answer_when_requests_are_short() -> Result<()> {
    let database = Database::create()?;
    let (_scratch, mut redis) = private_redis()?;
    let start = start(&database, &redis).env("LOGIN_RATE_LIMIT_PER_MINUTE", "1000");
    let setup = start.ready()?;
    let mut conversation = Conversation::start(&setup)?;
    conversation.goes_on(&setup)?;
    setup.stop()?;
    let service = start.env("REQUEST_TIMEOUT_MS", "400").ready()?;
    redis.pause();
    service.log_in("ana")?;
    // Only the wait until the windows are suspended does not fit into such a request.
    let (ana, ben) = (&conversation.ana, &conversation.ben);
    let page = eventually("a page", || service.read(ben, ana, 5).ok()?.expect(200).ok())?;
    ensure!(page.contents()? == conversation.sent, "{page:?}");
    service.send(ana, ben, "without Redis")?.expect(201)?;
    redis.resume();
    Ok(())
}

struct Conversation {
    ana: User,
    ben: User,
    /// Newest first, as in a page.
    sent: Vec<String>,
}

impl Conversation {
    fn start(service: &Service) -> Result<Self> {
        let (ana, ben) = service.two_users()?;
        Ok(Self { ana, ben, sent: Vec::new() })
    }

    /// Sends a message, and checks that every kind of read shows it at once.
    fn goes_on(&mut self, service: &Service) -> Result<()> {
        let content = format!("message {}", self.sent.len() + 1);
        let response =
            within(PATIENCE, "a send", || service.send(&self.ana, &self.ben, &content))?.expect(201)?;
        self.sent.insert(0, content);
        ensure!(response.json()?["seq"] == self.sent.len());
        let read = within(PATIENCE, "a read", || service.contents(&self.ben, &self.ana, 5))?;
        ensure!(read == self.sent[..self.sent.len().min(5)], "{read:?} instead of {:?}", self.sent);
        Ok(())
    }
}

fn start(database: &Database, redis: &Redis) -> Start {
    Start::on(database).env("REDIS_URL", &redis.url(0))
}

/// The warning of the state change, and no other.
fn warned(service: &Service, times: usize) -> Result<()> {
    let lines = service.process.lines_with(&["WARN", "Redis"]);
    ensure!(lines.len() == times, "{} instead of {times} warnings: {lines:#?}", lines.len());
    let errors = service.process.lines_with(&["ERROR"]);
    ensure!(errors.is_empty(), "{errors:#?}");
    Ok(())
}

/// Makes Redis unavailable and available again, twice, in the middle of a conversation.
fn fails_and_recovers(
    fail: impl Fn(&mut Redis) -> Result<()>,
    recover: impl Fn(&mut Redis) -> Result<()>,
) -> Result<()> {
    let database = Database::create()?;
    let (_scratch, mut redis) = private_redis()?;
    let service = start(&database, &redis).ready()?;
    let mut conversation = Conversation::start(&service)?;
    for round in 1..=2 {
        conversation.goes_on(&service)?;
        fail(&mut redis)?;
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
        recover(&mut redis)?;
        service.becomes("ok")?;
        for _ in 0..5 {
            conversation.goes_on(&service)?;
        }
        warned(&service, round)?;
        // Once at the start, and once after each recovery.
        let answers = service.process.lines_with(&["INFO", "Redis answers"]);
        ensure!(answers.len() == round + 1, "{answers:#?}");
    }
    ensure!(database.contents()?.len() == conversation.sent.len());
    database.has_no_gaps()
}

#[test]
fn the_service_works_without_a_killed_redis_until_it_is_started_again() -> Result<()> {
    fails_and_recovers(Redis::kill, Redis::restart)
}

#[test]
fn the_service_works_without_a_frozen_redis_until_it_continues() -> Result<()> {
    fails_and_recovers(
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
fn a_redis_that_refuses_writes_counts_as_unavailable() -> Result<()> {
    fails_and_recovers(
        |redis| redis.cli(&["CONFIG", "SET", "maxmemory", "1"]).map(drop),
        |redis| redis.cli(&["CONFIG", "SET", "maxmemory", "0"]).map(drop),
    )
}

#[test]
fn a_redis_that_is_unavailable_at_the_start_is_used_once_it_answers() -> Result<()> {
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
    service.hit(&conversation.ana, &conversation.ben, 1)?;
    conversation.goes_on(&service)
}

#[test]
fn a_redis_that_lost_its_data_is_filled_again() -> Result<()> {
    let database = Database::create()?;
    let (_scratch, redis) = private_redis()?;
    let service = start(&database, &redis).ready()?;
    let mut conversation = Conversation::start(&service)?;
    for lose in [&["FLUSHALL"][..], &["SCRIPT", "FLUSH"]] {
        for _ in 0..5 {
            conversation.goes_on(&service)?;
            redis.cli(lose)?;
        }
        conversation.goes_on(&service)?;
        service.becomes("ok")?;
    }
    Ok(())
}

#[test]
fn rate_limits_hold_without_redis() -> Result<()> {
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
    start_in_one_minute();
    for (path, allowed) in [("/login", 2), ("/register", 3)] {
        for _ in 0..allowed {
            Response::of(service.post(path, &json!({})))?.expect(422)?;
        }
        let refused = Response::of(service.post(path, &json!({})))?.expect(429)?;
        ensure!(!refused.header("retry-after").is_empty(), "{refused:?}");
    }
    for _ in 0..4 {
        service.send(&ana, &ben, "hello")?.expect(201)?;
    }
    service.send(&ana, &ben, "too much")?.expect(429)?;
    service.send(&ben, &ana, "counted separately")?.expect(201)?;
    Ok(())
}

#[test]
fn rate_limits_hold_when_redis_becomes_unavailable() -> Result<()> {
    let database = Database::create()?;
    let (_scratch, mut redis) = private_redis()?;
    let service = start(&database, &redis).env("REGISTER_RATE_LIMIT_PER_MINUTE", "3").ready()?;
    redis.kill()?;
    start_in_one_minute();
    let statuses = (0..4).map(|_| Ok(Response::of(service.post("/register", &json!({})))?.status));
    ensure!(statuses.collect::<Result<Vec<_>>>()? == [422, 422, 422, 429]);
    Ok(())
}

#[test]
fn every_replica_shows_what_a_replica_without_redis_acknowledged() -> Result<()> {
    let database = Database::create()?;
    let (_scratch, redis) = private_redis()?;
    let with = start(&database, &redis).ready()?;
    let closed = format!("redis://127.0.0.1:{}", closed_port()?);
    let mut conversation = Conversation::start(&with)?;
    // The window is in use before the other replica starts.
    conversation.goes_on(&with)?;
    with.hit(&conversation.ana, &conversation.ben, 1)?;
    let without = Start::on(&database).env("REDIS_URL", &closed).listen()?;
    let Conversation { ana, ben, sent } = &mut conversation;
    let mut taken = Vec::new();
    eventually("sends that are fast again", || {
        let content = format!("message {}", sent.len() + 1);
        // These reads keep the window filled.
        let before = with.contents(ana, ben, 5).ok()?;
        assert_eq!(before, sent[..sent.len().min(5)], "before {content}");
        let started = Instant::now();
        let response = without.send(ana, ben, &content).ok()?;
        taken.push(started.elapsed());
        assert_eq!(response.status, 201, "{response:?}");
        sent.insert(0, content);
        for replica in [&with, &without] {
            let after = replica.contents(ben, ana, 5).expect("a page");
            assert_eq!(after, sent[..sent.len().min(5)], "acknowledged, and not shown");
        }
        end_fast(&taken).then_some(())
    })?;
    ensure!(taken.iter().all(|taken| *taken < PATIENCE), "{taken:?}");
    // Both write in turns, and both show everything.
    for turn in 0..10 {
        conversation.goes_on(if turn % 2 == 0 { &with } else { &without })?;
        for replica in [&with, &without] {
            let newest = replica.contents(&conversation.ana, &conversation.ben, 1)?;
            ensure!(newest == conversation.sent[..1], "{newest:?} instead of {:?}", conversation.sent[0]);
        }
    }
    database.has_no_gaps()
}

/// The last sends took less than the wait for permissions to expire.
fn end_fast(taken: &[Duration]) -> bool {
    const COUNT: usize = 5;
    let last = taken.iter().rev().take(COUNT);
    taken.len() >= COUNT && last.into_iter().all(|taken| *taken < Duration::from_millis(450))
}
