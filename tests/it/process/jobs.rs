//! The subcommands that the chart's Jobs and tests run: migrations that wait, the smoke test, secrets.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use tests::{Postgres, PostgresOptions, Scratch};

use super::support::{Database, Start, closed_port, eventually, start_in_one_minute, within};
use crate::support::FUTURE_MIGRATION;

#[test]
fn migrate_waits_until_postgres_answers() -> Result<()> {
    let scratch = Scratch::new("jobs")?;
    let mut postgres = Postgres::start(&scratch.path().join("postgres"), PostgresOptions::fast())?;
    let database = Database::on(&postgres)?;
    postgres.stop()?;
    let migrate = Start::on(&database).args(&["migrate", "--wait", "50"]);
    let mut process = migrate.spawn()?;
    eventually("a line that says that it waits", || {
        process.stderr().contains("trying again for ").then_some(())
    })?;
    postgres.restart()?;
    let code = process.exit(Duration::from_secs(50))?;
    ensure!(code == 0 && process.stdout().contains("the schema is at version "), "{}", process.said());
    ensure!(process.stderr().lines().count() == 1, "{}", process.stderr());
    Ok(())
}

#[test]
fn migrate_waits_no_longer_than_its_limit() -> Result<()> {
    let url = format!("postgres://me@127.0.0.1:{}/chat", closed_port()?);
    let started = Instant::now();
    let ended = Start::bare().env("DATABASE_URL", &url).args(&["migrate", "--wait", "2"]).run()?;
    ensure!(
        ended.code == 1 && ended.stderr.contains("chat-service: Postgres cannot be reached"),
        "{ended:?}"
    );
    let waited = started.elapsed();
    ensure!(waited >= Duration::from_secs(2) && waited < Duration::from_secs(20), "{waited:?}");
    Ok(())
}

#[test]
fn migrate_does_not_wait_when_postgres_refuses_it() -> Result<()> {
    let database = Database::create()?;
    let nowhere = database.url() + "_that_is_not_there";
    let start = Start::on(&database).env("DATABASE_URL", &nowhere).args(&["migrate", "--wait", "50"]);
    let refused = within(Duration::from_secs(20), "the refusal", || start.run())?;
    ensure!(refused.code == 1 && refused.stderr.contains("does not exist"), "{refused:?}");
    Ok(())
}

#[test]
fn migrate_accepts_a_newer_schema_only_with_allow_newer() -> Result<()> {
    let database = Database::create()?;
    let start = Start::on(&database);
    let allow_newer = start.clone().args(&["migrate", "--allow-newer"]);
    ensure!(allow_newer.run()?.code == 0);
    database.query(FUTURE_MIGRATION)?;
    let tables = "SELECT count(*), max(version) FROM _sqlx_migrations";
    let before = database.query(tables)?;
    ensure!(start.args(&["migrate"]).run()?.code == 1);
    let allowed = allow_newer.run()?;
    ensure!(allowed.code == 0, "{allowed:?}");
    ensure!(allowed.stdout.contains("9999") && allowed.stdout.contains("left as it is"), "{allowed:?}");
    ensure!(database.query(tables)? == before);
    // Other errors remain errors.
    database.query("UPDATE _sqlx_migrations SET checksum = '\\x00' WHERE version = 1")?;
    database.query("DELETE FROM _sqlx_migrations WHERE version = 9999")?;
    let edited = allow_newer.run()?;
    ensure!(edited.code == 1 && edited.stderr.contains("migration 1 was changed"), "{edited:?}");
    Ok(())
}

fn smoke_test(address: impl std::fmt::Display) -> Start {
    Start::bare().args(&["smoke-test", "--url", &format!("http://{address}")])
}

#[test]
fn smoke_test_exchanges_messages_between_two_new_users_and_can_be_repeated() -> Result<()> {
    let database = Database::create()?;
    let service = Start::on(&database).ready()?;
    for round in 1..=2 {
        let passed = smoke_test(service.public).run()?;
        ensure!(passed.code == 0 && passed.stderr.is_empty(), "{passed:?}");
        let steps = passed.stdout.lines().filter(|line| line.starts_with("ok  ") && line.ends_with(" ms"));
        ensure!(steps.count() == 10 && passed.stdout.contains("\npassed: "), "{passed:?}");
        let stored = database.value("SELECT count(*) FROM messages")?;
        ensure!(stored == (2 * round).to_string(), "{stored} messages");
    }
    database.has_no_gaps()
}

/// The smoke test fails in this step, with one error line that has these words.
fn smoke_test_fails(address: impl std::fmt::Display, step: &str, words: &[&str]) -> Result<()> {
    let failed = smoke_test(address).run()?;
    ensure!(failed.code == 1, "{failed:?}");
    let last = failed.stdout.lines().last().context("a step")?;
    ensure!(last.starts_with(&format!("FAIL  {step} ")), "{failed:?}");
    ensure!(failed.stderr.lines().count() == 1, "{failed:?}");
    for word in words {
        ensure!(failed.stderr.contains(word), "no {word:?}: {failed:?}");
    }
    Ok(())
}

#[test]
fn smoke_test_names_the_cause_and_the_fix() -> Result<()> {
    let closed = format!("127.0.0.1:{}", closed_port()?);
    smoke_test_fails(&closed, "ready", &[&closed, "start the service", "correct --url"])?;

    let database = Database::create()?;
    let start = Start::on(&database);
    let service = start.clone().env("REGISTER_RATE_LIMIT_PER_MINUTE", "1").ready()?;
    // A path that the service does not have, and its operations port, which has no API.
    smoke_test_fails(format!("{}/chat", service.public), "ready", &["/chat/healthz", "404 instead of 200"])?;
    smoke_test_fails(service.operations, "register", &["/register", "404 instead of 201"])?;
    start_in_one_minute();
    smoke_test_fails(service.public, "register", &["429", "repeat this in ", "_RATE_LIMIT_PER_MINUTE"])?;

    let held = database.hold("LOCK TABLE _sqlx_migrations IN ACCESS EXCLUSIVE MODE")?;
    service.becomes("unavailable")?;
    smoke_test_fails(service.public, "ready", &["503", "not ready"])?;
    held.release();
    Ok(())
}

#[test]
fn create_secret_outside_a_pod_names_the_cause_and_the_fix() -> Result<()> {
    const ARGS: [&str; 5] = ["create-secret", "--name", "chat", "--key", "secret-key=48"];
    let refused = |start: &Start, words: &[&str]| -> Result<()> {
        let refused = within(Duration::from_secs(20), "the refusal", || start.run())?;
        ensure!(refused.code == 1 && refused.stderr.lines().count() == 1, "{refused:?}");
        for word in words {
            ensure!(refused.stderr.contains(word), "no {word:?}: {refused:?}");
        }
        Ok(())
    };
    let outside = Start::bare().args(&ARGS);
    refused(&outside, &["KUBERNETES_SERVICE_HOST is not set", "kubectl create secret"])?;
    let pod = outside.env("KUBERNETES_SERVICE_HOST", "127.0.0.1").env("KUBERNETES_SERVICE_PORT", "443");
    refused(&pod, &["/serviceaccount/namespace", "automountServiceAccountToken"])?;
    let account = [&ARGS[..], &["--service-account", "."]].concat();
    let pod = pod.args(&account).file("namespace", "chat").file("token", "t").file("ca.crt", "nonsense");
    refused(&pod, &["./ca.crt: no certificates", "kubectl create secret"])?;
    let wrong = Start::bare().args(&["create-secret", "--name", "chat", "--key", "secret-key=8"]).run()?;
    ensure!(wrong.code == 2 && wrong.stderr.contains("for example password=32"), "{wrong:?}");
    Ok(())
}
