//! Without Postgres nothing is acknowledged, cached history is marked as stale, and the service recovers by itself.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::json;
use tests::proxy::{Link, Proxy};
use tests::{Postgres, PostgresOptions, Redis, RedisOptions, Scratch};

use super::lifecycle::send_until;
use super::support::{Database, Response, Service, Start, User, closed_port, eventually, within};

/// No refusal takes this long, even on a busy machine: the request's own timeout is half of it.
const PATIENCE: Duration = Duration::from_secs(20);

struct Backends {
    postgres: Postgres,
    redis: Redis,
    /// Dropped last: the servers' directories are in it.
    _scratch: Scratch,
}

fn backends(options: PostgresOptions) -> Result<Backends> {
    let scratch = Scratch::new("backends")?;
    let postgres = Postgres::start(&scratch.path().join("postgres"), options)?;
    let redis = Redis::start(&scratch.path().join("redis"), RedisOptions::default())?;
    Ok(Backends { postgres, redis, _scratch: scratch })
}

fn start(database: &Database, redis: &Redis) -> Start {
    Start::on(database).env("REDIS_URL", &redis.url(0)).env("CACHE_TTL_SECONDS", "900")
}

/// Everything that needs Postgres is refused; the rest works.
fn refuses_everything(service: &Service, ana: &User, ben: &User) -> Result<()> {
    service.operations("/livez")?.expect(200)?;
    service.operations("/metrics")?.expect(200)?;
    ensure!(service.metric("chat_dependency_up{dependency=\"postgres\"}")? == 0.0);
    let health = service.operations("/healthz")?.expect(503)?.json()?;
    ensure!(health["status"] == "unavailable" && health["checks"]["postgres"] == "away", "{health}");
    Response::of(service.get("/healthz"))?.expect(503)?;
    let credentials = json!({"username": "ana", "password": "correct horse battery"});
    let registration = json!({"username": "eve", "email": "eve@example.com", "password": "12345678"});
    let calls: [(&str, &dyn Fn() -> Result<Response>); 5] = [
        ("register", &|| Response::of(service.post("/register", &registration))),
        ("login", &|| Response::of(service.post("/login", &credentials))),
        ("me", &|| service.me(&ana.token)),
        ("users", &|| Response::of(service.get("/users/ben").bearer_auth(&ana.token))),
        ("send", &|| service.send(ana, ben, "not now")),
    ];
    for (name, call) in calls {
        within(PATIENCE, name, call)?.is_unavailable()?;
    }
    Ok(())
}

/// The page comes from the window, is marked as stale, and needs a valid token.
fn shows_cached_history(service: &Service, ana: &User, ben: &User, newest_first: &[&str]) -> Result<()> {
    let limit = newest_first.len();
    let page = within(PATIENCE, "a read", || service.read(ben, ana, limit))?.expect(200)?;
    ensure!(page.header("warning") == "110 - \"Response is Stale\"", "{page:?}");
    ensure!(page.contents()? == newest_first, "{page:?}");
    let stranger = User { token: "a.b.c".to_owned(), ..ben.clone() };
    service.read(&stranger, ana, limit)?.expect(401)?;
    // A page that is longer than the window is refused.
    within(PATIENCE, "a read", || service.read(ben, ana, 100))?.is_unavailable()
}

fn has_recovered(service: &Service, ana: &User, ben: &User) -> Result<()> {
    service.becomes("ok")?;
    let message = service.send(ana, ben, "fourth")?.expect(201)?.json()?;
    ensure!(message["seq"] == 4, "{message}");
    let page = service.read(ben, ana, 5)?.expect(200)?;
    ensure!(page.header("warning").is_empty(), "{page:?}");
    ensure!(service.contents(ben, ana, 5)? == ["fourth", "third", "second", "first"]);
    service.me(&ana.token)?.expect(200)?;
    Ok(())
}

#[test]
fn without_a_killed_postgres_requests_get_503_or_cached_history_until_it_restarts() -> Result<()> {
    let Backends { mut postgres, mut redis, _scratch } = backends(PostgresOptions::fast())?;
    let database = Database::on(&postgres)?;
    let service = start(&database, &redis).ready()?;
    let (ana, ben) = service.conversation()?;
    postgres.kill()?;
    // At once, without waiting for the next probe.
    within(PATIENCE, "a send", || service.send(&ana, &ben, "not now"))?.is_unavailable()?;
    service.becomes("unavailable")?;
    for _ in 0..3 {
        refuses_everything(&service, &ana, &ben)?;
        shows_cached_history(&service, &ana, &ben, &["third", "second", "first"])?;
    }
    let warnings = service.process.lines_with(&["WARN", "Postgres is unavailable"]);
    ensure!(warnings.len() == 1, "{warnings:#?}");
    redis.kill()?;
    within(PATIENCE, "a read", || service.read(&ben, &ana, 3))?.is_unavailable()?;
    redis.restart()?;
    postgres.restart()?;
    has_recovered(&service, &ana, &ben)
}

#[test]
fn with_a_frozen_postgres_requests_get_503_or_cached_history_until_it_continues() -> Result<()> {
    let Backends { mut postgres, redis, _scratch } = backends(PostgresOptions::fast())?;
    let database = Database::on(&postgres)?;
    let service = start(&database, &redis).ready()?;
    let (ana, ben) = service.conversation()?;
    postgres.pause();
    service.becomes("unavailable")?;
    refuses_everything(&service, &ana, &ben)?;
    shows_cached_history(&service, &ana, &ben, &["third", "second", "first"])?;
    postgres.resume();
    service.becomes("ok")?;
    // The requests that froze with it were never acknowledged, but may have been stored.
    let stored = database.contents()?;
    ensure!(stored.len() >= 3 && stored[..3] == ["first", "second", "third"], "{stored:?}");
    let message = service.send(&ana, &ben, "afterwards")?.expect(201)?.json()?;
    ensure!(message["seq"] == database.contents()?.len(), "{message}");
    database.has_no_gaps()
}

/// A user waits for no more than this before old messages appear, whatever `REQUEST_TIMEOUT_MS` is.
const CACHED_PATIENCE: Duration = Duration::from_millis(1500);

#[test]
fn a_cached_read_is_answered_within_a_second_and_a_half_of_a_kill_or_a_freeze() -> Result<()> {
    for request_timeout in ["10000", "3000", "1000", "500"] {
        for freeze in [false, true] {
            let Backends { mut postgres, redis, _scratch } = backends(PostgresOptions::fast())?;
            let database = Database::on(&postgres)?;
            let service = start(&database, &redis).ready()?;
            let (ana, ben) = service.conversation()?;
            service.stop()?;
            let service = start(&database, &redis).env("REQUEST_TIMEOUT_MS", request_timeout).ready()?;
            // So that a session is open, and the window is filled.
            service.read(&ben, &ana, 100)?.expect(200)?;
            service.hit(&ben, &ana, 3)?;
            if freeze {
                postgres.pause();
            } else {
                postgres.kill()?;
            }
            // No permission is left, but the health check has not noticed yet.
            thread::sleep(Duration::from_millis(500));
            for _ in 0..4 {
                let page = within(CACHED_PATIENCE, "a cached read", || service.read(&ben, &ana, 3))?;
                let page = page.expect(200).with_context(|| format!("{request_timeout} ms, {freeze}"))?;
                ensure!(page.header("warning") == "110 - \"Response is Stale\"", "{page:?}");
                ensure!(page.contents()? == ["third", "second", "first"], "{page:?}");
            }
            if freeze {
                postgres.resume();
            }
        }
    }
    Ok(())
}

/// A server that died with its machine sends no reset. Its connections must not be waited for until TCP gives them up.
#[test]
fn connections_that_never_answer_again_do_not_keep_the_pool_from_recovering() -> Result<()> {
    let runtime = tokio::runtime::Runtime::new()?;
    let Backends { postgres, redis, _scratch } = backends(PostgresOptions::fast())?;
    let database = Database::on(&postgres)?;
    let proxy = Proxy::start(runtime.handle(), postgres.port())?;
    let setup = start(&database, &redis).ready()?;
    let (ana, ben) = setup.conversation()?;
    setup.stop()?;
    let service = through(&proxy, &postgres, &database, start(&database, &redis))
        .env("DB_POOL_MAX", "4")
        .env("DB_STATEMENT_TIMEOUT_MS", "3000")
        .ready()?;
    // All connections of the pool are in use when the server dies.
    let lock = database.hold("LOCK TABLE users")?;
    thread::scope(|scope| -> Result<()> {
        let requests: Vec<_> = (0..8).map(|_| scope.spawn(|| service.me(&ana.token))).collect();
        database.blocks(4)?;
        proxy.set(Link::Lost);
        lock.release();
        requests.into_iter().try_for_each(|request| request.join().expect("no panic")?.is_unavailable())
    })?;
    service.becomes("unavailable")?;
    proxy.set(Link::Open);
    within(Duration::from_secs(20), "the recovery", || service.becomes("ok"))?;
    has_recovered(&service, &ana, &ben)
}

/// Nor may such a connection keep the background tasks from their work: without a suspension no request could
/// be answered while Redis is unavailable.
#[test]
fn windows_stay_suspended_after_a_connection_that_never_answers_again() -> Result<()> {
    let runtime = tokio::runtime::Runtime::new()?;
    let Backends { postgres, redis: _redis, _scratch } = backends(PostgresOptions::fast())?;
    let database = Database::on(&postgres)?;
    let proxy = Proxy::start(runtime.handle(), postgres.port())?;
    let service = through(&proxy, &postgres, &database, Start::on(&database))
        .env("REDIS_URL", &format!("redis://127.0.0.1:{}", closed_port()?))
        .env("DB_STATEMENT_TIMEOUT_MS", "3000")
        .listen()?;
    service.becomes("degraded")?;
    let (ana, ben) = service.two_users()?;
    service.send(&ana, &ben, "first")?.expect(201)?;
    let quick_read = || {
        let read = || service.read(&ben, &ana, 1)?.expect(200);
        eventually("a read that does not wait for permissions to expire", || {
            within(Duration::from_millis(600), "", read).ok()
        })
    };
    quick_read()?;
    let lock = database.hold("LOCK TABLE window_suspension")?;
    // The renewal.
    database.blocks(1)?;
    proxy.set(Link::Lost);
    lock.release();
    thread::sleep(Duration::from_secs(1));
    proxy.set(Link::Open);
    // The suspension from before is over.
    thread::sleep(Duration::from_secs(10));
    quick_read()?;
    Ok(())
}

fn through(proxy: &Proxy, postgres: &Postgres, database: &Database, start: Start) -> Start {
    let (direct, proxied) = (format!(":{}/", postgres.port()), format!(":{}/", proxy.port()));
    start.env("DATABASE_URL", &database.url().replace(&direct, &proxied))
}

#[test]
fn a_postgres_that_is_unavailable_at_the_start_is_migrated_once_it_answers() -> Result<()> {
    let Backends { mut postgres, redis, _scratch } = backends(PostgresOptions::fast())?;
    let database = Database::on(&postgres)?;
    postgres.stop()?;
    let service = start(&database, &redis).listen()?;
    service.becomes("unavailable")?;
    let nobody = User { id: "x".to_owned(), name: "x".to_owned(), token: "x".to_owned() };
    service.operations("/livez")?.expect(200)?;
    let registration = json!({"username": "eve", "email": "eve@example.com", "password": "12345678"});
    Response::of(service.post("/register", &registration))?.is_unavailable()?;
    service.read(&nobody, &nobody, 5)?.expect(401)?;
    postgres.restart()?;
    service.becomes("ok")?;
    let (ana, ben) = service.conversation()?;
    has_recovered(&service, &ana, &ben)
}

#[test]
fn a_postgres_that_is_frozen_at_the_start_does_not_stop_the_process() -> Result<()> {
    let Backends { mut postgres, redis, _scratch } = backends(PostgresOptions::fast())?;
    let database = Database::on(&postgres)?;
    postgres.pause();
    let service = start(&database, &redis).listen()?;
    service.operations("/livez")?.expect(200)?;
    service.becomes("unavailable")?;
    postgres.resume();
    service.becomes("ok")?;
    service.two_users()?;
    Ok(())
}

#[test]
fn a_postgres_that_crashes_under_load_loses_nothing_acknowledged() -> Result<()> {
    let Backends { mut postgres, redis, _scratch } = backends(PostgresOptions::durable())?;
    let database = Database::on(&postgres)?;
    let service = start(&database, &redis).ready()?;
    let users = service.two_users()?;
    let stop = AtomicBool::new(false);
    let acknowledged = thread::scope(|scope| -> Result<Vec<String>> {
        let sending = scope.spawn(|| send_until(&service, &users, &stop));
        let mut crashes = || -> Result<()> {
            for _ in 0..2 {
                let before = eventually("messages", || database.contents().ok())?.len();
                eventually("more messages", || {
                    database.contents().ok().filter(|stored| stored.len() > before + 30)
                })?;
                postgres.kill()?;
                postgres.restart()?;
                service.becomes("ok")?;
            }
            Ok(())
        };
        let outcome = crashes();
        stop.store(true, Ordering::Relaxed);
        let acknowledged = sending.join().expect("no panic");
        outcome.and(acknowledged)
    })?;
    ensure!(acknowledged.len() > 30, "too few were acknowledged: {}", acknowledged.len());
    database.keeps(&acknowledged)?;
    // The windows show what Postgres has.
    let (ana, ben) = &users;
    let newest: Vec<_> = database.contents()?.iter().rev().take(20).cloned().collect();
    ensure!(service.contents(ana, ben, 20)? == newest);
    Ok(())
}

#[test]
fn the_service_survives_that_postgres_ends_its_sessions() -> Result<()> {
    let database = Database::create()?;
    let service = Start::on(&database).ready()?;
    let (ana, ben) = service.two_users()?;
    for round in 1..=3 {
        database.query(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database()
             AND pid <> pg_backend_pid()",
        )?;
        // The first request may meet a broken connection, and gets 503.
        let message = eventually("a message", || {
            let answer = service.send(&ana, &ben, &format!("round {round}")).ok()?;
            assert!([201, 503].contains(&answer.status), "{answer:?}");
            (answer.status == 201).then_some(answer)
        })?;
        ensure!(message.json()?["content"] == format!("round {round}"));
    }
    database.has_no_gaps()
}
