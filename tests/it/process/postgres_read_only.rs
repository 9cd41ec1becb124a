//! A Postgres that answers and takes no writes: a standby after a failover, or one that was set to read only because its
//! disk is full. The service is unready and says why, and what it still shows is marked.

use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::json;
use tests::{Postgres, PostgresOptions, Redis, RedisOptions, Scratch};

use super::support::{Database, LIMIT, PASSWORD, Response, STRONG_KEY, Service, Start, User, eventually};

const STALE: &str = "110 - \"Response is Stale\"";

struct Backends {
    postgres: Postgres,
    redis: Redis,
    /// Dropped last: the servers' directories are in it.
    scratch: Scratch,
}

fn backends() -> Result<Backends> {
    let scratch = Scratch::new("read-only")?;
    let postgres = Postgres::start(&scratch.path().join("postgres"), PostgresOptions::fast())?;
    let redis = Redis::start(&scratch.path().join("redis"), RedisOptions::default())?;
    Ok(Backends { postgres, redis, scratch })
}

fn start(database: &Database, redis: &Redis) -> Start {
    Start::on(database).env("REDIS_URL", &redis.url(0)).env("SECRET_KEY", STRONG_KEY)
}

/// For the whole server, as an operator does it whose disk is full: it reaches sessions that are open.
fn set_read_only(postgres: &Postgres, value: &str) -> Result<()> {
    postgres.query("postgres", &format!("ALTER SYSTEM SET default_transaction_read_only = {value}"))?;
    postgres.query("postgres", "SELECT pg_reload_conf()")?;
    Ok(())
}

/// For one database: it reaches only the sessions that are opened later.
fn set_database_read_only(postgres: &Postgres, value: &str) -> Result<()> {
    postgres
        .query("postgres", &format!("ALTER DATABASE chat SET default_transaction_read_only = {value}"))?;
    Ok(())
}

fn register(service: &Service, name: &str) -> Result<Response> {
    let user = json!({"username": name, "email": format!("{name}@example.com"), "password": PASSWORD});
    Response::of(service.post("/register", &user))
}

fn log_in(service: &Service, name: &str) -> Result<Response> {
    Response::of(service.post("/login", &json!({"username": name, "password": PASSWORD})))
}

/// Waits until the service says that its Postgres only reads, everywhere where it says so.
fn says_read_only(service: &Service) -> Result<()> {
    service.becomes("unavailable")?;
    let checks = service.operations("/healthz")?.expect(503)?.json()?["checks"].clone();
    ensure!(checks["postgres"] == "read_only" && checks["schema"] == "ok", "{checks}");
    ensure!(service.metric("chat_dependency_up{dependency=\"postgres\"}")? == 0.0);
    ensure!(service.metric("chat_ready")? == 0.0);
    Ok(())
}

/// Nothing is stored, what is shown is marked, and what may only be missing here is not said to be missing.
fn refuses_writes(service: &Service, ana: &User, ben: &User, newest_first: &[&str]) -> Result<()> {
    service.send(ana, ben, "not now")?.is_unavailable()?;
    register(service, "eve")?.is_unavailable()?;
    // The window is still there.
    thread::sleep(Duration::from_secs(1));
    // From the window, and beyond it from Postgres.
    for limit in [newest_first.len(), 100] {
        let page = service.read(ben, ana, limit)?.expect(200)?;
        ensure!(page.header("warning") == STALE, "{page:?}");
        ensure!(page.contents()? == newest_first, "{page:?}");
    }
    service.me(&ana.token)?.expect(200)?;
    // A login stores its session.
    log_in(service, "ana")?.is_unavailable()?;
    log_in(service, "eve")?.is_unavailable()?;
    Response::of(service.get("/users/ben").bearer_auth(&ana.token))?.expect(200)?;
    Response::of(service.get("/users/eve").bearer_auth(&ana.token))?.is_unavailable()?;
    let nobody = User { id: ana.id.replace(|digit: char| digit.is_ascii_digit(), "f"), ..ana.clone() };
    service.read(ana, &nobody, 5)?.is_unavailable()
}

fn takes_writes(service: &Service, ana: &User, ben: &User) -> Result<()> {
    service.becomes("ok")?;
    ensure!(service.metric("chat_dependency_up{dependency=\"postgres\"}")? == 1.0);
    let message = service.send(ana, ben, "fourth")?.expect(201)?.json()?;
    ensure!(message["seq"] == 4, "{message}");
    let page = service.read(ben, ana, 5)?.expect(200)?;
    ensure!(page.header("warning").is_empty(), "{page:?}");
    ensure!(page.contents()? == ["fourth", "third", "second", "first"], "{page:?}");
    register(service, "eve")?.expect(201)?;
    Ok(())
}

fn warned(service: &Service, times: usize) -> Result<()> {
    let warnings = service.process.lines_with(&["WARN", "Postgres"]);
    ensure!(warnings.len() == times, "{warnings:#?}");
    ensure!(warnings.iter().all(|line| line.contains("Postgres only reads")), "{warnings:#?}");
    Ok(())
}

#[test]
fn a_postgres_set_to_read_only_makes_the_service_unready_until_it_takes_writes() -> Result<()> {
    let Backends { postgres, redis, scratch: _scratch } = backends()?;
    let database = Database::on(&postgres)?;
    let service = start(&database, &redis).ready()?;
    let (ana, ben) = service.conversation()?;
    set_read_only(&postgres, "on")?;
    says_read_only(&service)?;
    for _ in 0..3 {
        refuses_writes(&service, &ana, &ben, &["third", "second", "first"])?;
    }
    warned(&service, 1)?;
    set_read_only(&postgres, "off")?;
    takes_writes(&service, &ana, &ben)
}

#[test]
fn a_primary_that_became_a_standby_makes_the_service_unready_until_it_is_promoted() -> Result<()> {
    let Backends { mut postgres, redis, scratch: _scratch } = backends()?;
    let database = Database::on(&postgres)?;
    let service = start(&database, &redis).ready()?;
    let (ana, ben) = service.conversation()?;
    postgres.restart_as_standby()?;
    eventually("the standby to be noticed", || says_read_only(&service).ok())?;
    refuses_writes(&service, &ana, &ben, &["third", "second", "first"])?;
    postgres.query("postgres", "SELECT pg_promote()")?;
    takes_writes(&service, &ana, &ben)
}

#[test]
fn sessions_that_were_opened_read_only_are_not_used_once_postgres_takes_writes() -> Result<()> {
    let Backends { postgres, redis, scratch: _scratch } = backends()?;
    let database = Database::on(&postgres)?;
    start(&database, &redis).ready()?.stop()?;
    set_database_read_only(&postgres, "on")?;
    let service = start(&database, &redis).env("MIGRATE_ON_START", "false").listen()?;
    says_read_only(&service)?;
    let register_together = |round: &str| -> Result<Vec<u16>> {
        thread::scope(|scope| {
            let register =
                |number| register(&service, &format!("{round}-{number}")).map(|answer| answer.status);
            let requests: Vec<_> = (0..12).map(|number| scope.spawn(move || register(number))).collect();
            requests.into_iter().map(|request| request.join().expect("no panic")).collect()
        })
    };
    let refused = register_together("early")?;
    ensure!(refused.iter().all(|status| *status == 503), "{refused:?}");
    set_database_read_only(&postgres, "off")?;
    service.becomes("ok")?;
    let accepted = register_together("late")?;
    ensure!(accepted.iter().all(|status| *status == 201), "{accepted:?}");
    warned(&service, 1)
}

#[test]
fn a_database_that_was_set_to_read_only_is_noticed_by_the_first_session_that_meets_it() -> Result<()> {
    let Backends { postgres, redis, scratch: _scratch } = backends()?;
    let database = Database::on(&postgres)?;
    let service = start(&database, &redis).ready()?;
    let (ana, ben) = service.conversation()?;
    set_database_read_only(&postgres, "on")?;
    // Two sessions at least are needed at once, and a new one is opened.
    let lock = database.handle().hold("SET TRANSACTION READ WRITE; LOCK TABLE users")?;
    thread::scope(|scope| -> Result<()> {
        let calls: Vec<_> = (0..12).map(|_| scope.spawn(|| service.me(&ana.token))).collect();
        database.blocks(6)?;
        lock.release();
        calls.into_iter().try_for_each(|call| call.join().expect("no panic").map(drop))
    })?;
    let mut names = (0..).map(|number| format!("eve-{number}"));
    let mut refused = || register(&service, &names.next()?).ok()?.is_unavailable().ok();
    eventually("a refused registration", &mut refused)?;
    says_read_only(&service)?;
    // Although sessions from before could still write, it does not change its mind with each session.
    for _ in 0..40 {
        ensure!(service.health()?.0 == 503);
        thread::sleep(Duration::from_millis(100));
    }
    warned(&service, 1)?;
    set_database_read_only(&postgres, "off")?;
    service.becomes("ok")?;
    service.send(&ana, &ben, "fourth")?.expect(201)?;
    Ok(())
}

/// A replica that still talks to the old server after a failover must not show its history as the newest, and must not
/// put it into a window from which other replicas answer.
#[test]
fn a_standby_that_lags_behind_never_shows_its_history_unmarked() -> Result<()> {
    let Backends { mut postgres, redis, scratch } = backends()?;
    let database = Database::on(&postgres)?;
    let current = start(&database, &redis).ready()?;
    let (ana, ben) = current.conversation()?;
    let standby = postgres.stale_standby(&scratch.path().join("standby"))?;
    current.becomes("ok")?;
    let behind =
        start(&Database::named_on(&standby, "chat"), &redis).env("MIGRATE_ON_START", "false").listen()?;
    eventually("a message", || current.send(&ana, &ben, "fourth").ok()?.expect(201).ok())?;
    for round in 0..30 {
        // Redis may lose the window at any time; then the next reader may fill it.
        if round % 2 == 1 {
            redis.cli(&["FLUSHALL"])?;
        }
        let page = behind.read(&ben, &ana, 4)?.expect(200)?;
        let marked = page.header("warning") == STALE;
        ensure!(marked || page.contents()?.contains(&"fourth".to_owned()), "{page:?}");
        let page = current.read(&ben, &ana, 4)?.expect(200)?;
        ensure!(page.header("warning").is_empty(), "{page:?}");
        ensure!(page.contents()? == ["fourth", "third", "second", "first"], "{page:?}");
        thread::sleep(Duration::from_millis(100));
    }
    Ok(())
}

#[test]
fn a_start_on_a_postgres_that_only_reads_serves_a_current_schema_and_waits_for_a_pending_one() -> Result<()> {
    let Backends { postgres, redis, scratch: _scratch } = backends()?;
    let database = Database::on(&postgres)?;
    set_read_only(&postgres, "on")?;
    // Nothing was migrated yet.
    let pending = start(&database, &redis).listen()?;
    pending.becomes("unavailable")?;
    let checks = pending.operations("/healthz")?.expect(503)?.json()?["checks"].clone();
    ensure!(checks["postgres"] == "read_only" && checks["schema"] == "behind", "{checks}");
    let migrated = start(&database, &redis).args(&["migrate"]).run()?;
    ensure!(migrated.code == 1 && migrated.stderr.lines().count() == 1, "{migrated:?}");
    for word in ["only reads", "default_transaction_read_only"] {
        ensure!(migrated.stderr.contains(word), "no {word:?}: {migrated:?}");
    }
    let waiting = start(&database, &redis).args(&["migrate", "--wait", "60"]).spawn()?;
    set_read_only(&postgres, "off")?;
    pending.becomes("ok")?;
    let mut waiting = waiting;
    ensure!(waiting.exit(LIMIT)? == 0, "{}", waiting.said());
    // Now there is nothing to migrate.
    set_read_only(&postgres, "on")?;
    let current = start(&database, &redis).listen()?;
    says_read_only(&current)?;
    set_read_only(&postgres, "off")?;
    current.becomes("ok")
}

#[test]
fn doctor_names_a_postgres_that_only_reads_with_a_fix() -> Result<()> {
    let Backends { mut postgres, redis, scratch: _scratch } = backends()?;
    let database = Database::on(&postgres)?;
    start(&database, &redis).ready()?.stop()?;
    let doctor = |words: &[&str]| -> Result<()> {
        let report = start(&database, &redis).args(&["doctor"]).run()?;
        ensure!(report.code == 1, "{report:?}");
        let line = report.stdout.lines().find(|line| line.starts_with("FAIL  postgres"));
        let line = line.with_context(|| report.said())?;
        for word in words {
            ensure!(line.contains(word), "no {word:?}: {line}");
        }
        Ok(())
    };
    set_read_only(&postgres, "on")?;
    doctor(&["only reads", "default_transaction_read_only", "full disk", "ALTER SYSTEM RESET"])?;
    set_read_only(&postgres, "off")?;
    postgres.restart_as_standby()?;
    doctor(&["only reads", "standby", "DB_HOST", "DATABASE_URL", "primary"])
}
