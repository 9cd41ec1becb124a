//! What may be wrong with a Postgres that answers: its encoding, the role's privileges and timeouts, where the tables are.

use std::fs;
use std::path::Path;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::json;
use tests::{Postgres, PostgresOptions, Scratch};

use super::support::{Database, LIMIT, Response, STRONG_KEY, Service, Start, eventually};

const LATIN1: &str = "ENCODING 'LATIN1' LC_COLLATE 'C' LC_CTYPE 'C' TEMPLATE template0";
const SQL_ASCII: &str = "ENCODING 'SQL_ASCII' LC_COLLATE 'C' LC_CTYPE 'C' TEMPLATE template0";

/// What readiness says of the schema.
fn schema_check(service: &Service) -> Result<String> {
    let health = service.operations("/healthz")?.json()?;
    Ok(health["checks"]["schema"].as_str().unwrap_or_default().to_owned())
}

fn becomes_unready(service: &Service, check: &str) -> Result<()> {
    eventually(&format!("the schema to be {check}; {}", service.process.said()), || {
        schema_check(service).ok().filter(|found| found == check)
    })?;
    service.operations("/healthz")?.expect(503)?;
    service.operations("/livez")?.expect(200)?;
    Ok(())
}

#[test]
fn a_database_that_is_not_in_utf8_is_refused_with_its_name_its_encoding_and_the_fix() -> Result<()> {
    for (encoding, clauses) in [("LATIN1", LATIN1), ("SQL_ASCII", SQL_ASCII)] {
        let database = Database::create_with(clauses)?;
        let start = Start::on(&database).env("SECRET_KEY", STRONG_KEY);
        for (subcommand, code) in [("migrate", 1), ("serve", 1), ("doctor", 1)] {
            let refused = start.clone().args(&[subcommand]).run()?;
            ensure!(refused.code == code, "{subcommand}: exit code {}: {}", refused.code, refused.said());
            let said = refused.said();
            let line = said.lines().rfind(|line| line.contains(encoding));
            let line = line.with_context(|| format!("{subcommand}: {said}"))?;
            for word in [database.name(), "CREATE DATABASE", "ENCODING 'UTF8'", "TEMPLATE template0"] {
                ensure!(line.contains(word), "{subcommand}: no {word:?}: {line}");
            }
        }
        ensure!(database.query("SELECT FROM pg_tables WHERE schemaname = 'public'")?.is_empty(), "migrated");
    }
    Ok(())
}

/// The schema, as releases have left it that did not look at the encoding.
fn migrate_by_hand(database: &Database) -> Result<()> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../service/migrations");
    let mut files = fs::read_dir(folder)?.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
    files.sort();
    database.query(
        "CREATE TABLE _sqlx_migrations (version bigint PRIMARY KEY, description text NOT NULL,
         installed_on timestamptz NOT NULL DEFAULT now(), success boolean NOT NULL, checksum bytea NOT NULL,
         execution_time bigint NOT NULL)",
    )?;
    for (index, file) in files.iter().enumerate() {
        let version = index + 1;
        database.query(&fs::read_to_string(file)?)?;
        database
            .query(&format!("INSERT INTO _sqlx_migrations VALUES ({version}, '', now(), true, '', 0)"))?;
    }
    Ok(())
}

#[test]
fn on_a_database_that_is_not_in_utf8_a_replica_is_unready_and_what_it_cannot_store_is_503() -> Result<()> {
    let database = Database::create_with(LATIN1)?;
    migrate_by_hand(&database)?;
    let service = Start::on(&database).env("MIGRATE_ON_START", "false").listen()?;
    becomes_unready(&service, "encoding")?;
    let warnings = service.process.lines_with(&["WARN", "LATIN1", "ENCODING 'UTF8'"]);
    ensure!(warnings.len() == 1, "{warnings:#?}");
    // Whoever asks it nevertheless.
    let (ana, ben) = service.two_users()?;
    thread::scope(|scope| -> Result<()> {
        let sends: Vec<_> = (0..20)
            .map(|number| {
                let (service, ana, ben) = (&service, &ana, &ben);
                let fits = number % 2 == 0;
                let content = if fits { "é".to_owned() } else { "😀".to_owned() };
                scope.spawn(move || (fits, service.send(ana, ben, &content)))
            })
            .collect();
        for send in sends {
            let (fits, answer) = send.join().expect("no panic");
            if fits {
                // Not even one of the same batch fails.
                answer?.expect(201)?;
            } else {
                answer?.is_unavailable()?;
            }
        }
        Ok(())
    })?;
    let body = json!({"username": "eve", "email": "ε@example.com", "password": "12345678"});
    Response::of(service.post("/register", &body))?.is_unavailable()?;
    let faults = service.process.logs(&["ERROR", "Postgres refuses", "UTF8"])?;
    ensure!(faults.len() == 1, "{faults:#?}");
    ensure!(service.process.lines_with(&["ERROR"]).len() == 1, "{}", service.process.said());
    Ok(())
}

/// A server with the roles `owner`, who has migrated the database `chat`, and `serving`.
struct TwoRoles {
    database: Database,
    serving: String,

    _postgres: Postgres,
    _scratch: Scratch,
}

fn two_roles(schema: &str) -> Result<TwoRoles> {
    let scratch = Scratch::new("roles")?;
    let postgres = Postgres::start(&scratch.path().join("postgres"), PostgresOptions::fast())?;
    let database = Database::on(&postgres)?;
    let password = postgres.password();
    for role in ["owner", "serving"] {
        database.query(&format!("CREATE ROLE {role} LOGIN PASSWORD '{password}'"))?;
    }
    database.query("ALTER DATABASE chat OWNER TO owner")?;
    database.query(&format!("CREATE SCHEMA IF NOT EXISTS {schema}; ALTER SCHEMA {schema} OWNER TO owner"))?;
    database.query(&format!("ALTER ROLE owner SET search_path = {schema}"))?;
    let serving = database.url_of("serving");
    let owner = Start::on(&database).env("DATABASE_URL", &database.url_of("owner"));
    ensure!(owner.args(&["migrate"]).run()?.code == 0);
    Ok(TwoRoles { database, serving, _postgres: postgres, _scratch: scratch })
}

impl TwoRoles {
    fn start(&self) -> Start {
        Start::on(&self.database).env("DATABASE_URL", &self.serving).env("SECRET_KEY", STRONG_KEY)
    }

    /// The statements that doctor prints.
    fn statements(&self) -> Result<Vec<String>> {
        let report = self.start().args(&["doctor"]).run()?;
        ensure!(report.code == 1 && report.stdout.contains("\nFAIL  access "), "{report:?}");
        let lines = report.stdout.lines().filter(|line| line.ends_with(';'));
        Ok(lines.map(str::to_owned).collect())
    }

    fn run_as_owner(&self, statements: &[String]) -> Result<()> {
        for statement in statements {
            // Only a superuser changes another role's settings.
            let role = if statement.starts_with("ALTER ROLE") { "postgres" } else { "owner" };
            self.database.query(&format!("SET ROLE {role}; {statement}"))?;
        }
        Ok(())
    }
}

#[test]
fn a_role_without_grants_is_unready_until_it_has_those_that_doctor_prints() -> Result<()> {
    let roles = two_roles("public")?;
    let service = roles.start().listen()?;
    becomes_unready(&service, "forbidden")?;
    // What used to be all that was asked for.
    roles.database.query("GRANT SELECT ON _sqlx_migrations TO serving")?;
    let warnings = service
        .process
        .logs(&["WARN", "GRANT SELECT, INSERT, UPDATE, DELETE ON public.users TO serving;"])?;
    ensure!(warnings.iter().all(|line| line.contains("serving may not use all")), "{warnings:#?}");
    thread::sleep(Duration::from_secs(3));
    becomes_unready(&service, "forbidden")?;
    let warnings = service.process.lines_with(&["WARN", "GRANT "]);
    ensure!(warnings.len() == 2, "not once for each change: {warnings:#?}");
    let body = json!({"username": "eve", "email": "eve@example.com", "password": "12345678"});
    Response::of(service.post("/register", &body))?.is_unavailable()?;
    service.process.logs(&["ERROR", "permission denied for table ", "chat-service doctor"])?;
    Response::of(service.post("/register", &body))?.is_unavailable()?;
    let faults = service.process.lines_with(&["ERROR"]);
    ensure!(faults.len() == 1, "{faults:#?}");

    let statements = roles.statements()?;
    ensure!(statements.iter().any(|line| line.starts_with("ALTER DEFAULT PRIVILEGES")), "{statements:#?}");
    roles.run_as_owner(&statements)?;
    service.becomes("ok")?;
    let (ana, ben) = service.two_users()?;
    service.send(&ana, &ben, "now")?.expect(201)?;
    let doctor = roles.start().args(&["doctor"]).run()?;
    ensure!(doctor.code == 0 && doctor.stdout.contains("\nok    access "), "{doctor:?}");

    // A start without Redis uses the rest: it suspends the windows, and sweeps.
    let start = roles.start().env("REDIS_URL", "redis://127.0.0.1:1").env("RUST_LOG", "debug");
    let service = start.listen()?;
    service.becomes("degraded")?;
    let body = json!({"recipient_id": ben.id, "content": "now"});
    let send = service.post("/send", &body).bearer_auth(&ana.token).header("idempotency-key", "k");
    Response::of(send)?.expect(201)?;
    ensure!(service.contents(&ben, &ana, 5)? == ["now", "now"]);
    eventually("a suspension", || {
        roles.database.value("SELECT count(*) FROM window_suspension").ok().filter(|count| count == "1")
    })?;
    let said = service.stop()?;
    ensure!(!said.contains("42501") && !said.contains("were not removed"), "{said}");
    Ok(())
}

#[test]
fn the_grants_of_the_charts_readme_are_enough() -> Result<()> {
    let readme = Path::new(env!("CARGO_MANIFEST_DIR")).join("../helm/chat-service/README.md.gotmpl");
    let readme = fs::read_to_string(readme)?;
    let (_, rest) = readme.split_once("```sql\n").context("the statements")?;
    let (statements, _) = rest.split_once("```").context("the end of the statements")?;
    let statements = statements.replace("chat_owner", "owner").replace(" TO chat;", " TO serving;");
    let roles = two_roles("public")?;
    // A table of a later release, too.
    roles.run_as_owner(&[statements, "CREATE TABLE later (n int)".to_owned()])?;
    roles.start().ready()?.two_users()?;
    let held = "SELECT has_table_privilege('serving', 'later', 'SELECT, INSERT, UPDATE, DELETE')";
    ensure!(roles.database.value(held)? == "t");
    Ok(())
}

#[test]
fn tables_where_search_path_does_not_lead_are_found_and_doctor_prints_what_makes_them_usable() -> Result<()> {
    let roles = two_roles("app")?;
    let start = roles.start().env("MIGRATE_ON_START", "false");
    let service = start.listen()?;
    becomes_unready(&service, "behind")?;
    service.process.logs(&["WARN", "search_path", "SET search_path = app;"])?;
    let statements = roles.statements()?;
    ensure!(statements[0] == "GRANT USAGE ON SCHEMA app TO serving;", "{statements:#?}");
    roles.run_as_owner(&statements)?;
    drop(service);
    let service = start.ready()?;
    service.two_users()?;
    Ok(())
}

#[test]
fn a_table_that_was_dropped_is_named_and_makes_the_service_unready() -> Result<()> {
    let database = Database::create()?;
    let start = Start::on(&database).env("SECRET_KEY", STRONG_KEY);
    let service = start.ready()?;
    database.query("ALTER TABLE messages RENAME TO messages_before")?;
    becomes_unready(&service, "forbidden")?;
    service.process.logs(&["WARN", "no table messages"])?;
    let report = start.args(&["doctor"]).run()?;
    ensure!(report.code == 1 && report.stdout.contains("no table messages"), "{report:?}");
    database.query("ALTER TABLE messages_before RENAME TO messages")?;
    service.becomes("ok")
}

#[test]
fn what_was_changed_by_hand_in_the_schema_is_503_and_logged_with_what_to_do() -> Result<()> {
    let database = Database::create()?;
    let service = Start::on(&database).ready()?;
    let (ana, ben) = service.two_users()?;
    for change in [
        "ALTER TABLE conversations DROP CONSTRAINT conversations_pkey",
        "ALTER TABLE messages ENABLE ROW LEVEL SECURITY; ALTER TABLE messages FORCE ROW LEVEL SECURITY",
    ] {
        database.query(change)?;
    }
    service.send(&ana, &ben, "not now")?.is_unavailable()?;
    let faults = service.process.logs(&["ERROR"])?;
    ensure!(faults.len() == 1 && faults[0].contains("changed by hand"), "{faults:#?}");
    Ok(())
}

/// What an administrator may have set for a role or a database, for the sake of other applications.
fn limit_sessions(database: &Database) -> Result<()> {
    for timeout in ["statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout"] {
        database.query(&format!("ALTER DATABASE {} SET {timeout} = 300", database.name()))?;
    }
    Ok(())
}

#[test]
fn timeouts_of_the_role_do_not_end_migrations_that_wait() -> Result<()> {
    let database = Database::create()?;
    // Not committed: the process that creates the table waits, and the others ask for the migration's lock again and again.
    let held = database.hold("CREATE TABLE _sqlx_migrations (version bigint)")?;
    limit_sessions(&database)?;
    let start = Start::on(&database);
    let mut migrations = [start.clone().args(&["migrate"]).spawn()?, start.args(&["migrate"]).spawn()?];
    database.blocks(1)?;
    thread::sleep(Duration::from_secs(1));
    for migration in &mut migrations {
        ensure!(migration.is_running(), "{}", migration.said());
    }
    held.release();
    for migration in &mut migrations {
        let code = migration.exit(LIMIT)?;
        ensure!(code == 0, "exit code {code}: {}", migration.said());
    }
    Ok(())
}

#[test]
fn a_replica_whose_schema_is_current_waits_for_no_migration() -> Result<()> {
    let database = Database::create()?;
    ensure!(Start::on(&database).args(&["migrate"]).run()?.code == 0);
    // As sqlx derives it from the database's name.
    let lock = 0x3d32_ad9e * i64::from(crc32(database.name()));
    let held = database.hold(&format!("SELECT pg_advisory_lock({lock})"))?;
    limit_sessions(&database)?;
    let mut service = Start::on(&database).ready()?;
    service.two_users()?;
    thread::sleep(Duration::from_secs(2));
    ensure!(service.process.is_running(), "{}", service.process.said());
    let migrate = Start::on(&database).args(&["migrate"]).run()?;
    ensure!(migrate.code == 0 && database.blocked()? == 0, "{migrate:?}");
    held.release();
    Ok(())
}

/// CRC-32 as Ethernet has it.
fn crc32(text: &str) -> u32 {
    let step = |crc: u32| (crc >> 1) ^ if crc & 1 == 1 { 0xedb8_8320 } else { 0 };
    let crc = text.bytes().fold(!0, |crc, byte| (0..8).fold(crc ^ u32::from(byte), |crc, _| step(crc)));
    !crc
}

#[test]
fn a_migration_that_is_cancelled_is_tried_again_by_a_replica() -> Result<()> {
    let database = Database::create()?;
    let held = database.hold("CREATE TABLE _sqlx_migrations (version bigint)")?;
    let mut service = Start::on(&database).listen()?;
    let cancel = "SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE datname = current_database()
                  AND application_name = 'chat-service' AND state = 'active' AND query LIKE '%CREATE TABLE%'";
    // The wait for the table may just have ended by itself: then the next one is cancelled.
    eventually("a cancelled migration that is tried again", || {
        database.query(cancel).ok()?;
        let words = ["WARN", "the migration failed", "user request", "trying again"];
        (!service.process.lines_with(&words).is_empty()).then_some(())
    })?;
    ensure!(service.process.is_running(), "{}", service.process.said());
    held.release();
    service.becomes("ok")
}

#[test]
fn a_migration_lets_others_pass_while_a_table_is_in_use() -> Result<()> {
    let database = Database::create()?;
    ensure!(Start::on(&database).args(&["migrate"]).run()?.code == 0);
    database.query("DELETE FROM _sqlx_migrations WHERE version = 4; DROP TABLE window_suspension")?;
    let held = database.hold("LOCK TABLE _sqlx_migrations IN SHARE MODE")?;
    let mut migrate = Start::on(&database).args(&["migrate"]).spawn()?;
    for _ in 0..2 {
        database.blocks(1)?;
        eventually("the migration to let the others pass", || {
            database.blocked().ok().filter(|count| *count == 0)
        })?;
    }
    held.release();
    let code = migrate.exit(LIMIT)?;
    ensure!(code == 0, "exit code {code}: {}", migrate.said());
    Ok(())
}

#[test]
fn an_error_of_postgres_is_said_once_and_without_a_position_in_its_source() -> Result<()> {
    let database = Database::create()?;
    let nowhere = database.url() + "_that_is_not_there";
    for (url, cause) in
        [("postgres://me@127.0.0.1:1/chat", "Connection refused"), (&nowhere, "does not exist")]
    {
        for arguments in [&["migrate"][..], &["migrate", "--status"], &["doctor"]] {
            let ended = Start::bare().env("DATABASE_URL", url).args(arguments).run()?;
            let said = ended.said();
            let line = said.lines().find(|line| line.contains(cause)).with_context(|| said.clone())?;
            ensure!(line.matches(cause).count() == 1 && !line.contains(" at line "), "{arguments:?}: {line}");
        }
    }
    let service = Start::bare().env("DATABASE_URL", &nowhere).listen()?;
    let lines = service.process.logs(&["WARN", "Postgres is unavailable", "does not exist"])?;
    ensure!(!lines[0].contains(" at line ") && !lines[0].contains("returned from"), "{lines:#?}");
    Ok(())
}
