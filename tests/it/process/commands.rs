//! The subcommands: what they print, and how they exit.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, ensure};
use serde_json::Value;

use super::support::{Database, LIMIT, Response, STRONG_KEY, Start, closed_port};
use crate::support::FUTURE_MIGRATION;

#[test]
fn healthcheck_exits_with_zero_while_the_instance_is_ready_and_with_one_when_not() -> Result<()> {
    let database = Database::create()?;
    let start = Start::on(&database);
    let service = start.ready()?;
    let port = service.operations.port().to_string();
    let check = start.args(&["healthcheck"]).env("OPS_PORT", &port);
    ensure!(check.run()?.code == 0);
    // An instance that listens on all addresses is asked on the loopback address.
    ensure!(check.clone().unset("HOST").run()?.code == 0);

    let held = database.hold("LOCK TABLE _sqlx_migrations IN ACCESS EXCLUSIVE MODE")?;
    service.becomes("unavailable")?;
    let unready = check.run()?;
    ensure!(unready.code == 1 && unready.stderr.contains("503"), "{unready:?}");
    let started = Instant::now();
    let timed_out = check.clone().args(&["healthcheck", "--wait", "1"]).run()?;
    ensure!(timed_out.code == 1 && timed_out.stderr.lines().count() == 1, "{timed_out:?}");
    ensure!(started.elapsed() >= Duration::from_secs(1), "{timed_out:?} after {:?}", started.elapsed());
    let waits = check.clone().args(&["healthcheck", "--wait", "20"]);
    let waiting = thread::spawn(move || waits.run());
    thread::sleep(Duration::from_millis(500));
    ensure!(!waiting.is_finished(), "{:?}", waiting.join());
    held.release();
    service.becomes("ok")?;
    let in_time = waiting.join().map_err(|_| anyhow!("panicked"))??;
    ensure!(in_time.code == 0 && in_time.stderr.is_empty(), "{in_time:?}");
    service.stop()?;
    let gone = check.run()?;
    ensure!(gone.code == 1 && gone.stderr.contains(&port) && gone.stderr.contains("OPS_PORT"), "{gone:?}");
    Ok(())
}

#[test]
fn openapi_prints_what_is_served_and_needs_no_configuration() -> Result<()> {
    let printed = Start::default().env("PORT", "not a port").args(&["openapi"]).run()?;
    ensure!(printed.code == 0 && printed.stderr.is_empty(), "{printed:?}");
    let database = Database::create()?;
    let service = Start::on(&database).ready()?;
    let served = Response::of(service.get("/openapi.json"))?.expect(200)?.json()?;
    assert_eq!(serde_json::from_str::<Value>(&printed.stdout)?, served);
    Ok(())
}

#[test]
fn migrate_status_lists_the_status_of_each_migration_and_changes_nothing() -> Result<()> {
    let database = Database::create()?;
    let start = Start::on(&database);
    let status = start.clone().args(&["migrate", "--status"]);
    let fresh = status.run()?;
    ensure!(fresh.code == 0 && fresh.stdout.lines().all(|line| line.contains("pending")), "{fresh:?}");
    ensure!(fresh.stdout.starts_with("0001  pending   users\n"), "{fresh:?}");
    ensure!(status.run()?.stdout == fresh.stdout, "the status changed something");
    ensure!(start.args(&["migrate"]).run()?.code == 0);
    let migrated = status.run()?;
    ensure!(
        migrated.code == 0 && migrated.stdout == fresh.stdout.replace("pending", "applied"),
        "{migrated:?}"
    );
    database.query("UPDATE _sqlx_migrations SET checksum = '\\x00' WHERE version = 1")?;
    let modified = status.run()?;
    ensure!(
        modified.code == 1 && modified.stdout.contains("0001  modified  users: undo the edit"),
        "{modified:?}"
    );
    database.query(FUTURE_MIGRATION)?;
    let newer = status.run()?;
    ensure!(newer.code == 1 && newer.stdout.contains("9999  unknown   of the future"), "{newer:?}");
    Ok(())
}

#[test]
fn doctor_reports_no_failure_in_a_healthy_installation() -> Result<()> {
    let database = Database::create()?;
    let start = Start::on(&database).env("SECRET_KEY", STRONG_KEY);
    ensure!(start.clone().args(&["migrate"]).run()?.code == 0);
    let report = start.args(&["doctor"]).run()?;
    ensure!(report.code == 0, "{report:?}");
    for check in ["config", "secret", "postgres", "schema", "redis"] {
        let found = report.stdout.lines().any(|line| line.starts_with("ok") && line.contains(check));
        ensure!(found, "{check} is missing: {}", report.stdout);
    }
    ensure!(!report.stdout.contains("FAIL"), "{}", report.stdout);
    Ok(())
}

/// The doctor reports that this check failed, with these words, and exits with 1.
fn fails(start: &Start, check: &str, fix: &[&str]) -> Result<()> {
    let report = start.clone().args(&["doctor"]).run()?;
    ensure!(report.code == 1, "{check}: exit code {}: {}", report.code, report.said());
    let line = report.stdout.lines().find(|line| line.starts_with("FAIL") && line.contains(check));
    let line = line.with_context(|| format!("{check} did not fail: {}", report.said()))?;
    for word in fix {
        ensure!(line.contains(word), "no {word:?}: {line}");
    }
    Ok(())
}

#[test]
fn doctor_names_the_fix_of_each_failure() -> Result<()> {
    let database = Database::create()?;
    let start = Start::on(&database).env("SECRET_KEY", STRONG_KEY);
    fails(&start, "schema", &["version 0", "chat-service migrate"])?;
    ensure!(start.clone().args(&["migrate"]).run()?.code == 0);
    fails(&start.clone().unset("SECRET_KEY"), "secret", &["SECRET_KEY", "openssl rand"])?;
    let closed = closed_port()?;
    let unavailable = start.clone().env("REDIS_URL", &format!("redis://127.0.0.1:{closed}"));
    fails(&unavailable, "redis", &["start Redis", "REDIS_URL"])?;
    let unavailable = start.clone().env("DATABASE_URL", &format!("postgres://me@127.0.0.1:{closed}/chat"));
    fails(&unavailable, "postgres", &["start Postgres", "DATABASE_URL", &closed.to_string()])?;
    fails(&unavailable, "schema", &["without Postgres"])?;
    let nowhere = database.url() + "_that_is_not_there";
    fails(&start.clone().env("DATABASE_URL", &nowhere), "postgres", &["createdb", "DB_NAME"])?;
    database.query(FUTURE_MIGRATION)?;
    fails(&start, "schema", &["9999", "newer release"])
}

#[test]
fn migrate_can_be_repeated() -> Result<()> {
    let database = Database::create()?;
    let migrate = Start::on(&database).args(&["migrate"]);
    let first = migrate.run()?;
    ensure!(first.code == 0 && first.stdout.contains("the schema is at version "), "{first:?}");
    let applied = database.value("SELECT count(*) FROM _sqlx_migrations WHERE success")?;
    let second = migrate.run()?;
    ensure!(second.code == 0 && second.stdout.contains("the schema is at version "), "{second:?}");
    ensure!(database.value("SELECT count(*) FROM _sqlx_migrations WHERE success")? == applied);
    Ok(())
}

#[test]
fn fifty_migrations_of_an_empty_database_at_once_all_succeed() -> Result<()> {
    let database = Database::create()?;
    let migrate = Start::on(&database).args(&["migrate"]);
    let mut processes = (0..50).map(|_| migrate.spawn()).collect::<Result<Vec<_>>>()?;
    for process in &mut processes {
        let code = process.exit(2 * LIMIT)?;
        ensure!(code == 0, "exit code {code}: {}", process.said());
    }
    Ok(())
}

#[test]
fn replicas_that_start_at_once_on_an_empty_database_all_become_ready() -> Result<()> {
    let database = Database::create()?;
    let start = Start::on(&database);
    thread::scope(|scope| {
        let replicas: Vec<_> = (0..5).map(|_| scope.spawn(|| start.ready())).collect();
        replicas.into_iter().try_for_each(|replica| replica.join().expect("no panic").map(drop))
    })
}

#[test]
fn a_database_newer_than_the_binary_is_refused() -> Result<()> {
    let database = Database::create()?;
    let start = Start::on(&database);
    ensure!(start.clone().args(&["migrate"]).run()?.code == 0);
    database.query(FUTURE_MIGRATION)?;
    for subcommand in ["migrate", "serve"] {
        let refused = start.clone().args(&[subcommand]).run()?;
        ensure!(refused.code != 0, "{subcommand}: {refused:?}");
        let said = refused.said();
        let line = said.lines().find(|line| line.contains("newer than this binary"));
        let line = line.with_context(|| format!("{subcommand}: {said}"))?;
        ensure!(line.contains("9999") && line.contains("newer release"), "{line}");
    }
    Ok(())
}

#[test]
fn an_applied_migration_that_was_edited_is_refused() -> Result<()> {
    let database = Database::create()?;
    let migrate = Start::on(&database).args(&["migrate"]);
    ensure!(migrate.run()?.code == 0);
    database.query("UPDATE _sqlx_migrations SET checksum = '\\x00' WHERE version = 1")?;
    let refused = migrate.run()?;
    ensure!(refused.code == 1 && refused.stderr.contains("migration 1 was changed"), "{refused:?}");
    Ok(())
}

#[test]
fn migrate_without_postgres_fails_and_names_the_cause() -> Result<()> {
    let closed = closed_port()?;
    let url = format!("postgres://me@127.0.0.1:{closed}/chat");
    let ended = Start::bare().env("DATABASE_URL", &url).args(&["migrate"]).run()?;
    ensure!(ended.code == 1 && ended.stderr.contains("Postgres cannot be reached"), "{ended:?}");
    ensure!(ended.stderr.lines().count() == 1, "{ended:?}");
    Ok(())
}

#[test]
fn help_and_version_are_printed() -> Result<()> {
    let help = Start::default().args(&["--help"]).run()?;
    ensure!(help.code == 0, "{help:?}");
    let subcommands = [
        "serve",
        "migrate",
        "healthcheck",
        "openapi",
        "doctor",
        "admin",
        "smoke-test",
        "canary",
        "create-secret",
    ];
    for subcommand in subcommands {
        ensure!(help.stdout.contains(&format!("\n  {subcommand} ")), "{}", help.stdout);
    }
    let version = Start::default().args(&["--version"]).run()?;
    ensure!(version.stdout == format!("chat-service {}\n", env!("CARGO_PKG_VERSION")), "{version:?}");
    let unknown = Start::default().args(&["dance"]).run()?;
    ensure!(unknown.code == 2 && unknown.stderr.contains("dance"), "{unknown:?}");
    Ok(())
}
