//! Behind PgBouncer, with the configuration that the chart's README gives, and with poolers that cannot serve.

use std::path::Path;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, ensure};
use tests::install::pgbouncer::{self, PgBouncers};
use tests::servers::sql::{self, Login, Row};
use tests::{PgBouncer, Postgres, PostgresOptions, Scratch};

use super::support::{Database, STRONG_KEY, Service, Start, eventually, within};

const PASSWORD: &str = "password-of-chat";

/// Fewer than the connections of one replica, so that clients share them.
const SERVER_CONNECTIONS: usize = 3;

/// The first block of this language in the chart's README, below the heading on PgBouncer.
fn documented(language: &str) -> Result<String> {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../helm/chat-service/README.md");
    let text = std::fs::read_to_string(file)?;
    let (_, section) = text.split_once("### Behind PgBouncer").context("the section on PgBouncer")?;
    let (_, block) = section.split_once(&format!("```{language}\n")).context("a block")?;
    Ok(block.split_once("```").context("the block's end")?.0.to_owned())
}

/// A Postgres with the README's database and role. The role has no limit of its own yet.
struct Server {
    postgres: Postgres,
    /// Straight to Postgres, as superuser.
    database: Database,
    scratch: Scratch,
}

impl Server {
    fn start() -> Result<Self> {
        let scratch = Scratch::new("pooler")?;
        let postgres = Postgres::start(&scratch.path().join("postgres"), PostgresOptions::fast())?;
        postgres.query("postgres", &format!("CREATE ROLE chat LOGIN PASSWORD '{PASSWORD}'"))?;
        postgres.query("postgres", "CREATE DATABASE chat_service OWNER chat")?;
        let database = Database::named_on(&postgres, "chat_service");
        Ok(Self { postgres, database, scratch })
    }

    fn migrated() -> Result<Self> {
        let server = Self::start()?;
        let migrated = server.direct().args(&["migrate"]).run()?;
        ensure!(migrated.code == 0, "{migrated:?}");
        Ok(server)
    }

    /// The README's configuration, changed by `change`, in front of this Postgres.
    fn behind(&self, program: &Path, change: impl Fn(&str) -> String) -> Result<PgBouncer> {
        let real = format!("host=127.0.0.1 port={}", self.postgres.port());
        let ini = replaced(&documented("ini")?, "host=db.example.com port=5432", &real)?;
        let users = format!("\"chat\" \"{PASSWORD}\"\n");
        PgBouncer::start(program, &self.scratch.path().join("pgbouncer"), &change(&ini), &users)
    }

    fn url(port: u16) -> String {
        format!("postgres://chat:{PASSWORD}@127.0.0.1:{port}/chat_service")
    }

    fn direct(&self) -> Start {
        Start::on(&self.database).env("DATABASE_URL", &Self::url(self.postgres.port()))
    }

    fn pooled(&self, pooler: &PgBouncer) -> Start {
        let start = Start::on(&self.database).env("DATABASE_URL", &Self::url(pooler.port()));
        start.env("SECRET_KEY", STRONG_KEY)
    }
}

fn replaced(text: &str, old: &str, new: &str) -> Result<String> {
    ensure!(text.contains(old), "no {old:?} in\n{text}");
    Ok(text.replace(old, new))
}

fn without(ini: &str, setting: &str) -> String {
    ini.lines().filter(|line| !line.starts_with(setting)).map(|line| format!("{line}\n")).collect()
}

fn unchanged(ini: &str) -> String {
    ini.to_owned()
}

/// Another client of the pooler.
fn ask(pooler: &PgBouncer, statements: &str) -> Result<Vec<Row>> {
    let login = Login {
        host: "127.0.0.1",
        port: pooler.port(),
        user: "chat",
        password: PASSWORD,
        database: "chat_service",
    };
    sql::query(login, statements)
}

/// What another client sees in each of the pooler's connections, which it takes all at once.
fn settings_seen(pooler: &PgBouncer) -> Result<Vec<Row>> {
    let settings = "BEGIN; SELECT pg_backend_pid(), current_setting('enable_seqscan'),
         current_setting('plan_cache_mode'), current_setting('jit'), current_setting('statement_timeout')
         FROM pg_sleep(1); COMMIT";
    thread::scope(|scope| {
        let clients: Vec<_> =
            (0..SERVER_CONNECTIONS).map(|_| scope.spawn(|| ask(pooler, settings))).collect();
        let rows = clients.into_iter().map(|client| client.join().map_err(|_| anyhow!("panicked"))?);
        Ok(rows.collect::<Result<Vec<_>>>()?.concat())
    })
}

/// Four conversations at once over two replicas: every message is stored once, in order, and read on the other replica.
fn converse(replicas: &[Service; 2], messages: usize) -> Result<Vec<String>> {
    let talk = |number: usize| -> Result<Vec<String>> {
        let (ana, ben) =
            (replicas[0].user(&format!("ana.{number}"))?, replicas[1].user(&format!("ben.{number}"))?);
        let mut sent = Vec::new();
        for message in 0..messages {
            let content = format!("{number}: {message}");
            replicas[message % 2].send(&ana, &ben, &content)?.expect(201)?;
            sent.push(content);
            let read = replicas[(message + 1) % 2].contents(&ben, &ana, 100)?;
            ensure!(read.iter().rev().eq(&sent), "{sent:?}, but read {read:?}");
        }
        Ok(sent)
    };
    thread::scope(|scope| {
        let talks: Vec<_> = (0..4).map(|number| scope.spawn(move || talk(number))).collect();
        let sent = talks.into_iter().map(|talk| talk.join().map_err(|_| anyhow!("panicked"))?);
        Ok(sent.collect::<Result<Vec<_>>>()?.concat())
    })
}

#[test]
fn two_replicas_share_the_connections_of_the_readmes_pgbouncer_and_leave_no_settings_in_them() -> Result<()> {
    let PgBouncers { current, .. } = pgbouncer::ensure()?;
    let server = Server::migrated()?;
    server.database.query(&documented("sql")?)?;
    let few = format!("default_pool_size = {SERVER_CONNECTIONS}");
    let pooler = server.behind(&current, |ini| ini.replace("default_pool_size = 20", &few))?;
    let start = server.pooled(&pooler);
    let replicas = [start.ready()?, start.ready()?];
    let sent = converse(&replicas, 25)?;
    let stored = server.database.keeps(&sent)?;
    ensure!(stored == sent.len(), "{stored} messages are stored, {} were sent", sent.len());
    let seen = settings_seen(&pooler)?;
    let pids = seen.iter().map(|row| &row[0]).collect::<std::collections::HashSet<_>>();
    ensure!(pids.len() == SERVER_CONNECTIONS, "not all connections were asked: {seen:?}");
    for row in &seen {
        let row: Vec<_> = row[1..].iter().map(|value| value.as_deref().unwrap_or_default()).collect();
        assert_eq!(
            row,
            ["on", "auto", "on", "5s"],
            "enable_seqscan, plan_cache_mode, jit, statement_timeout"
        );
    }
    let report = start.args(&["doctor"]).run()?;
    ensure!(report.code == 0 && !report.stdout.contains("warn"), "{report:?}");
    for replica in replicas {
        let log = replica.stop()?;
        ensure!(!log.contains("WARN") && !log.contains("ERROR"), "{log}");
    }
    Ok(())
}

#[test]
fn without_the_roles_limit_a_pooled_send_that_hangs_is_still_503_and_the_doctor_warns() -> Result<()> {
    let PgBouncers { current, .. } = pgbouncer::ensure()?;
    let server = Server::migrated()?;
    let pooler = server.behind(&current, unchanged)?;
    let start = server.pooled(&pooler).env("DB_STATEMENT_TIMEOUT_MS", "500");
    let service = start.ready()?;
    let (ana, ben) = service.two_users()?;
    service.send(&ana, &ben, "before")?.expect(201)?;
    let held = server.database.hold_conversations()?;
    let refused = within(Duration::from_secs(8), "the send", || service.send(&ana, &ben, "during"))?;
    refused.is_unavailable()?;
    held.release();
    service.send(&ana, &ben, "after")?.expect(201)?;
    let doctor = start.args(&["doctor"]);
    let report = doctor.run()?;
    let warning =
        report.stdout.lines().find(|line| line.starts_with("warn")).context(report.stdout.clone())?;
    let fix = "ALTER ROLE chat IN DATABASE chat_service SET statement_timeout = 500";
    for word in ["statement_timeout = 0", "DB_STATEMENT_TIMEOUT_MS=500", fix] {
        ensure!(warning.contains(word), "no {word}: {warning}");
    }
    ensure!(report.code == 0, "{report:?}");
    drop(service);
    drop(pooler);

    // With the limit of the README, Postgres itself gives up.
    server.database.query(&replaced(&documented("sql")?, "'5s'", "'500ms'")?)?;
    let pooler = server.behind(&current, unchanged)?;
    let start = server.pooled(&pooler).env("DB_STATEMENT_TIMEOUT_MS", "500");
    let service = start.ready()?;
    let _held = server.database.hold_conversations()?;
    service.send(&ana, &ben, "during")?.is_unavailable()?;
    eventually("Postgres to give up", || server.database.blocked().ok().filter(|blocked| *blocked == 0))?;
    let report = start.args(&["doctor"]).run()?;
    ensure!(report.code == 0 && !report.stdout.contains("warn"), "{report:?}");
    Ok(())
}

/// Doctor and start name the fault, with these words, in one line. The start ends with it, or stays unready.
fn is_refused(start: &Start, words: &[&str]) -> Result<()> {
    let has_all = |line: &str| words.iter().all(|word| line.contains(word));
    let report = start.clone().args(&["doctor"]).run()?;
    let line = report.stdout.lines().find(|line| line.starts_with("FAIL") && line.contains("postgres"));
    ensure!(report.code == 1 && line.is_some_and(has_all), "no {words:?}: {report:?}");
    for migrate in ["true", "false"] {
        let mut process = start.clone().env("MIGRATE_ON_START", migrate).spawn()?;
        let told = eventually("the fault in the log", || {
            let said = process.said();
            said.lines().find(|line| has_all(line)).map(str::to_owned)
        });
        let told = told.with_context(|| process.said())?;
        ensure!(told.contains("WARN") || told.contains("ERROR"), "{told}");
        ensure!(!process.said().contains("schema is current"), "{}", process.said());
        process.signal(rustix::process::Signal::TERM).ok();
        process.exit(Duration::from_secs(30))?;
    }
    Ok(())
}

#[test]
fn a_pooler_that_mixes_up_prepared_statements_is_refused_in_one_line_by_doctor_and_start() -> Result<()> {
    let PgBouncers { current, outdated } = pgbouncer::ensure()?;
    let server = Server::migrated()?;
    let words = ["prepared statements", "PgBouncer 1.21", "max_prepared_statements", "pool_mode = session"];
    let none = "max_prepared_statements = 0";
    let pooler = server.behind(&current, |ini| ini.replace("max_prepared_statements = 200", none))?;
    is_refused(&server.pooled(&pooler), &words)?;
    drop(pooler);
    // An old one knows no such setting.
    if let Some(outdated) = outdated {
        let pooler = server.behind(&outdated, |ini| without(ini, "max_prepared_statements"))?;
        is_refused(&server.pooled(&pooler), &words)?;
    }
    Ok(())
}

#[test]
fn every_pgbouncer_serves_with_a_session_per_client() -> Result<()> {
    let PgBouncers { current, outdated } = pgbouncer::ensure()?;
    let server = Server::migrated()?;
    server.database.query(&documented("sql")?)?;
    for (number, program) in [Some(current), outdated].into_iter().flatten().enumerate() {
        let pooler = server.behind(&program, |ini| {
            without(ini, "max_prepared_statements").replace("pool_mode = transaction", "pool_mode = session")
        })?;
        let start = server.pooled(&pooler).env("DB_POOL_MAX", "6");
        let service = start.ready()?;
        let (ana, ben) = (service.user(&format!("ana.{number}"))?, service.user(&format!("ben.{number}"))?);
        service.send(&ana, &ben, "hello")?.expect(201)?;
        ensure!(service.contents(&ben, &ana, 5)? == ["hello"]);
        let report = start.args(&["doctor"]).run()?;
        ensure!(report.code == 0, "{report:?}");
        service.stop()?;
    }
    Ok(())
}

#[test]
fn a_pooler_that_refuses_a_startup_parameter_is_named_with_the_setting_that_it_lacks() -> Result<()> {
    let PgBouncers { current, outdated } = pgbouncer::ensure()?;
    let server = Server::migrated()?;
    for program in [Some(current), outdated].into_iter().flatten() {
        let pooler = server.behind(&program, |ini| {
            without(&without(ini, "ignore_startup_parameters"), "max_prepared_statements")
        })?;
        is_refused(&server.pooled(&pooler), &["pooler", "ignore_startup_parameters = options"])?;
    }
    Ok(())
}

#[test]
fn a_pooler_without_transactions_is_refused() -> Result<()> {
    let PgBouncers { current, .. } = pgbouncer::ensure()?;
    let server = Server::migrated()?;
    let pooler =
        server.behind(&current, |ini| ini.replace("pool_mode = transaction", "pool_mode = statement"))?;
    is_refused(&server.pooled(&pooler), &["pooler", "pool_mode = transaction"])
}

#[test]
fn a_migration_through_a_pooler_in_transaction_mode_is_refused_unless_there_is_nothing_to_do() -> Result<()> {
    let PgBouncers { current, .. } = pgbouncer::ensure()?;
    let server = Server::start()?;
    let pooler = server.behind(&current, unchanged)?;
    let start = server.pooled(&pooler);
    for subcommand in ["migrate", "serve"] {
        let refused = start.clone().args(&[subcommand]).run()?;
        ensure!(refused.code == 1, "{refused:?}");
        let words = ["pooler in transaction mode", "straight to Postgres"];
        let said = refused.said();
        let line = said.lines().find(|line| words.iter().all(|word| line.contains(word)));
        ensure!(line.is_some(), "{said}");
    }
    ensure!(server.database.value("SELECT count(*) FROM pg_class WHERE relname = 'users'")? == "0");
    ensure!(server.direct().args(&["migrate"]).run()?.code == 0);
    let again = start.clone().args(&["migrate"]).run()?;
    ensure!(again.code == 0 && again.stdout.contains("the schema is at version "), "{again:?}");
    ensure!(server.database.value("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'")? == "0");
    start.ready().map(drop)
}
