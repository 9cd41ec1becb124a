//! `chat-service admin`: what it does to a running replica, what it prints, and how it exits.

use std::path::Path;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use tests::servers::daemon::{self, dies_with_us};
use tests::service_binary;
use tests::sse::{EventStream, Next};

use super::support::{
    Database, LIMIT, PASSWORD, Response, Service, Start, User, closed_port, eventually, has_none_of,
};
use crate::support::{FUTURE_MIGRATION, TestApp};

const NEW_PASSWORD: &str = "staple of another battery";

/// A stream ends that soon.
const STREAM: Duration = Duration::from_secs(2);

/// Without Redis, which it does not need.
fn admin(database: &Database, args: &[&str]) -> Start {
    Start::bare().env("DATABASE_URL", &database.url()).args(&[&["admin"], args].concat())
}

/// The answer, which has to be one JSON document.
fn ask(database: &Database, args: &[&str]) -> Result<Value> {
    let ended = admin(database, &[args, &["--json"]].concat()).run()?;
    ensure!(ended.code == 0, "{args:?}: {ended:?}");
    ensure!(ended.stdout.lines().count() == 1, "{args:?}: {ended:?}");
    Ok(serde_json::from_str(&ended.stdout)?)
}

fn changed(user: &User, outcome: &str, sessions: u64) -> Value {
    json!({"user_id": user.id, "outcome": outcome, "sessions_ended": sessions, "dry_run": false})
}

fn log_in(service: &Service, password: &str) -> Result<Response> {
    Response::of(service.post("/login", &json!({"username": "ana", "password": password})))
}

/// The answer that a client gets, apart from the number of its request.
fn refusal(response: &Response) -> Result<(u16, Value)> {
    let mut problem = response.json()?;
    problem["request_id"].take();
    Ok((response.status, problem))
}

#[test]
fn a_disabled_user_is_refused_at_once_until_it_is_enabled() -> Result<()> {
    let database = Database::create()?;
    let service = Start::on(&database).ready()?;
    let (ana, ben) = service.two_users()?;
    let tokens = log_in(&service, PASSWORD)?.expect(200)?.json()?;
    let bearer = format!("Bearer {}", ana.token);
    let mut stream = EventStream::open(service.public, "/stream", &[("authorization", &bearer)], LIMIT)?;
    ensure!(matches!(stream.next(LIMIT), Next::Event(event) if event.name == "ready"));

    let disable = ["user", "disable", "ANA"];
    assert_eq!(ask(&database, &disable)?, changed(&ana, "disabled", 2));
    service.me(&ana.token)?.expect(401)?;
    service.send(&ana, &ben, "late")?.expect(401)?;
    let refresh = json!({"refresh_token": tokens["refresh_token"]});
    Response::of(service.post("/refresh", &refresh))?.expect(401)?;
    let passwords = json!({"current_password": PASSWORD, "new_password": NEW_PASSWORD});
    Response::of(service.post("/password", &passwords).bearer_auth(&ana.token))?.expect(401)?;
    let (right, wrong) = (log_in(&service, PASSWORD)?, log_in(&service, "wrong horse battery")?);
    assert_eq!(refusal(&right)?, refusal(&wrong)?);
    ensure!(right.status == 401, "{right:?}");
    let end = stream.next(STREAM);
    ensure!(
        matches!(&end, Next::Event(event) if event.name == "end" && event.data.contains("revoked")),
        "{end:?}"
    );
    service.send(&ben, &ana, "are you there?")?.expect(201)?;

    assert_eq!(ask(&database, &disable)?, changed(&ana, "already_disabled", 0));
    let enable = ["user", "enable", &ana.id];
    assert_eq!(ask(&database, &enable)?, changed(&ana, "enabled", 0));
    assert_eq!(ask(&database, &enable)?, changed(&ana, "already_enabled", 0));
    service.me(&ana.token)?.expect(401)?;
    service.me(&service.log_in("ana")?)?.expect(200)?;
    service.me(&ben.token)?.expect(200)?;
    Ok(())
}

/// A replica of a release that does not know of disabled users may begin a session.
#[test]
fn a_session_of_a_disabled_user_is_not_refreshed_and_changes_no_password() -> Result<()> {
    let database = Database::create()?;
    let service = Start::on(&database).ready()?;
    let ana = service.user("ana")?;
    let tokens = log_in(&service, PASSWORD)?.expect(200)?.json()?;
    database.query("UPDATE users SET disabled_at = now()")?;
    let refresh = json!({"refresh_token": tokens["refresh_token"]});
    Response::of(service.post("/refresh", &refresh))?.expect(401)?;
    let passwords = json!({"current_password": PASSWORD, "new_password": NEW_PASSWORD});
    Response::of(service.post("/password", &passwords).bearer_auth(&ana.token))?.expect(401)?;
    assert_eq!(ask(&database, &["user", "disable", "ana"])?, changed(&ana, "already_disabled", 2));
    service.me(&ana.token)?.expect(401)?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_of_a_release_without_sessions_is_refused_too() {
    let app = TestApp::start().await;
    for command in ["revoke", "disable", "reset-password"] {
        let member = app.member().await;
        let token = app.token_of(&member.id, member.id.parse().expect("an id"));
        let old = crate::support::User { token, ..member.clone() };
        let me = async || app.get("/me").by(&old).response().await.status;
        assert_eq!(me().await, 200, "{command}");
        let start = Start::bare().env("DATABASE_URL", app.database.url());
        let ended = tokio::task::block_in_place(|| start.args(&["admin", "user", command, &member.id]).run());
        assert_eq!(ended.expect("it ran").code, 0, "{command}");
        assert_eq!(me().await, 401, "{command}");
    }
}

#[test]
fn a_new_password_ends_all_sessions_and_is_in_force() -> Result<()> {
    let database = Database::create()?;
    let service = Start::on(&database).ready()?;
    let ana = service.user("ana")?;
    let mut reset = ask(&database, &["user", "reset-password", "ana"])?;
    let password = reset["password"].take();
    let password = password.as_str().context("a password")?;
    ensure!(password.len() == 24 && password.chars().all(|c| c.is_ascii_alphanumeric()), "{password}");
    reset.as_object_mut().context("an object")?.remove("password");
    assert_eq!(reset, changed(&ana, "password_reset", 1));
    service.me(&ana.token)?.expect(401)?;
    log_in(&service, PASSWORD)?.expect(401)?;
    log_in(&service, password)?.expect(200)?;

    let from_stdin = admin(&database, &["user", "reset-password", "ana", "--password-stdin"]);
    let ended = from_stdin.clone().stdin(&format!("{NEW_PASSWORD}\r\n")).run()?;
    ensure!(ended.code == 0, "{ended:?}");
    has_none_of(&ended.said(), [NEW_PASSWORD])?;
    log_in(&service, password)?.expect(401)?;
    log_in(&service, NEW_PASSWORD)?.expect(200)?;
    for bad in ["", "\n", "2 short\n", &"x".repeat(129), &"x".repeat(100_000)] {
        let refused = from_stdin.clone().stdin(bad).run()?;
        ensure!(refused.code == 2 && refused.stdout.is_empty(), "{refused:?}");
        ensure!(refused.stderr.contains("8 to 128"), "{refused:?}");
    }
    let token = log_in(&service, NEW_PASSWORD)?.expect(200)?.json()?;
    assert_eq!(ask(&database, &["user", "revoke", "ana"])?["outcome"], "revoked");
    service.me(token["access_token"].as_str().context("a token")?)?.expect(401)?;
    assert_eq!(ask(&database, &["user", "revoke", "ana"])?, changed(&ana, "revoked", 0));
    ask(&database, &["user", "disable", "ana"])?;
    let reset = ask(&database, &["user", "reset-password", "ana"])?;
    log_in(&service, reset["password"].as_str().context("a password")?)?.expect(401)?;
    Ok(())
}

#[test]
fn a_user_and_the_largest_conversations_are_shown() -> Result<()> {
    let database = Database::create()?;
    let service = Start::on(&database).ready()?;
    let (ana, ben) = service.conversation()?;
    let cleo = service.user("cleo")?;
    service.send(&ben, &ana, "fourth")?.expect(201)?;
    service.send(&cleo, &ana, "hello")?.expect(201)?;
    let shown = ask(&database, &["user", "show", &ana.id.to_uppercase()])?;
    assert_eq!(shown, ask(&database, &["user", "show", "Ana"])?);
    let expected = json!({
        "id": ana.id, "username": "ana", "email": "ana@example.com", "disabled_at": null, "sessions": 1,
        "conversations": 2, "messages_sent": 3, "messages_sent_is_exact": true,
        "created_at": shown["created_at"], "last_used_at": shown["last_used_at"],
    });
    assert_eq!(shown, expected);
    let me = service.me(&ana.token)?.json()?;
    assert_eq!(shown["created_at"], me["created_at"]);
    ensure!(shown["last_used_at"].as_str() > shown["created_at"].as_str(), "{shown}");
    database.query("DELETE FROM sessions")?;
    ask(&database, &["user", "disable", "ana"])?;
    let shown = ask(&database, &["user", "show", "ana"])?;
    ensure!(shown["disabled_at"].is_string() && shown["last_used_at"].is_null(), "{shown}");
    let text = admin(&database, &["user", "show", "ana"]).run()?;
    for line in ["username       ana", "sessions       0, last used: never", "messages sent  3"] {
        ensure!(text.stdout.lines().any(|found| found == line), "{line}: {text:?}");
    }

    let largest = ask(&database, &["conversations", "largest"])?;
    let found = largest["conversations"].as_array().context("an array")?;
    let (first, second) = (&found[0], &found[1]);
    assert_eq!((&first["last_seq"], &second["last_seq"], found.len()), (&json!(4), &json!(1), 2));
    let mut users = [&*ana.id, &*ben.id];
    users.sort_unstable();
    assert_eq!(first["user_ids"], json!(users));
    let one = ask(&database, &["conversations", "largest", "--limit", "1"])?;
    assert_eq!(one["conversations"], json!([first]));
    let text = admin(&database, &["conversations", "largest"]).run()?;
    ensure!(text.code == 0 && text.stdout.lines().count() == 3, "{text:?}");
    Ok(())
}

#[test]
fn an_export_is_that_of_the_user() -> Result<()> {
    let database = Database::create()?;
    let service = Start::on(&database).ready()?;
    let (ana, _) = service.conversation()?;
    let export = ["user", "export", "ana"];
    let printed = admin(&database, &export).run()?;
    let own = Response::of(service.get("/me/export").bearer_auth(&ana.token))?.expect(200)?.body;
    // Whose session it is depends on who asks.
    let lines = |text: &str| {
        text.lines()
            .filter(|line| !line.contains(r#""type":"session""#))
            .map(str::to_owned)
            .collect::<Vec<_>>()
    };
    assert_eq!((printed.code, lines(&printed.stdout)), (0, lines(&own)));
    let last = printed.stdout.lines().rev().nth(1).context("two lines")?;
    let cursor = serde_json::from_str::<Value>(last)?["cursor"].as_str().context("a cursor")?.to_owned();
    let rest = admin(&database, &[&export[..], &["--after", &cursor]].concat()).run()?;
    assert_eq!(rest.stdout.lines().collect::<Vec<_>>(), [printed.stdout.lines().last().context("a line")?]);
    fails(&admin(&database, &[&export[..], &["--after", "x"]].concat()), 2, &["--after 'x' is no cursor"])?;
    database.query(&format!(
        "INSERT INTO exports VALUES ('{}', gen_random_uuid(), now() + interval '1 minute')",
        ana.id
    ))?;
    fails(&admin(&database, &export), 1, &["another export of this user runs: repeat the command in"])
}

#[test]
fn a_deleted_user_is_gone_and_its_messages_are_erased() -> Result<()> {
    let database = Database::create()?;
    let service = Start::on(&database).ready()?;
    let (ana, ben) = service.conversation()?;
    service.send(&ben, &ana, "fourth")?.expect(201)?;
    let delete = ["user", "delete", "ana"];
    let said = ask(&database, &delete)?;
    assert_eq!(
        said,
        json!({"user_id": ana.id, "outcome": "deleted", "erase_messages": true, "dry_run": false})
    );
    assert_eq!(service.me(&ana.token)?.status, 401);
    assert_eq!(log_in(&service, PASSWORD)?.status, 401);
    assert_eq!(service.send(&ben, &ana, "hello")?.status, 404);
    let page = || {
        let path = format!("/messages?peer_id={}&limit=100", ana.id);
        Response::of(service.get(&path).bearer_auth(&ben.token))?.expect(200)?.contents()
    };
    eventually("its messages to be erased", || (page().ok()? == ["fourth", "", "", ""]).then_some(()))?;
    fails(&admin(&database, &delete), 3, &["no such user"])?;
    // Another, whose messages stay.
    ask(&database, &["user", "delete", &ben.id, "--keep-messages"])?;
    assert_eq!(database.value("SELECT count(*) FROM users")?, "0");
    eventually("the end of the erasure", || {
        (database.value("SELECT count(*) FROM erasures").ok()? == "0").then_some(())
    })?;
    let left = database.value("SELECT string_agg(content, ' ' ORDER BY seq) FROM messages")?;
    assert_eq!(left, "   fourth");
    Ok(())
}

#[test]
fn a_purge_removes_what_is_old_and_no_more() -> Result<()> {
    let database = Database::create()?;
    let service = Start::on(&database).ready()?;
    let (ana, ben) = service.conversation()?;
    let seqs = || -> Result<Vec<Value>> {
        let page = service.get(&format!("/messages?peer_id={}&limit=100", ben.id)).bearer_auth(&ana.token);
        let page = Response::of(page)?.expect(200)?.json()?;
        Ok(page.as_array().context("an array")?.iter().map(|message| message["seq"].clone()).collect())
    };
    let all = seqs()?;
    ensure!(all.len() == 3, "{all:?}");
    database.query("UPDATE messages SET created_at = created_at - interval '3 days' WHERE seq < 3")?;
    let purge = |days: &str, more: &[&str]| {
        ask(&database, &[&["messages", "purge", "--older-than", days], more].concat())
    };
    let said = purge("2", &["--dry-run"])?;
    assert_eq!(
        (&said["outcome"], &said["messages"], &said["dry_run"]),
        (&json!("purged"), &json!(2), &json!(true))
    );
    assert_eq!(database.value("SELECT count(*) FROM messages")?, "3");
    for (days, outcome, messages) in
        [("4", "nothing_to_purge", 0), ("2", "purged", 2), ("2", "nothing_to_purge", 0)]
    {
        let said = purge(days, &[])?;
        assert_eq!((&said["outcome"], &said["messages"]), (&json!(outcome), &json!(messages)), "{days}");
    }
    assert_eq!(database.value("SELECT string_agg(seq::text, ' ') FROM messages")?, "3");
    // A replica had them in a window.
    eventually("the window to lose them", || (seqs().ok()? == [json!(3)]).then_some(()))?;
    service.send(&ana, &ben, "next")?.expect(201)?;
    assert_eq!(seqs()?, [json!(4), json!(3)]);
    fails(&admin(&database, &["messages", "purge"]), 2, &["--older-than"])?;
    fails(&admin(&database, &["messages", "purge", "--older-than", "0"]), 2, &["--older-than"])
}

/// Every row of every table.
fn dump(database: &Database) -> Result<Vec<String>> {
    let tables = database.query("SELECT tablename FROM pg_tables WHERE schemaname = 'public' ORDER BY 1")?;
    let mut rows = Vec::new();
    for table in tables.into_iter().flatten().flatten() {
        let found = database.query(&format!("SELECT t::text FROM {table} t ORDER BY 1"))?;
        rows.extend(found.into_iter().flatten().flatten().map(|row| format!("{table} {row}")));
    }
    Ok(rows)
}

#[test]
fn a_dry_run_says_what_would_be_done_and_changes_nothing() -> Result<()> {
    let database = Database::create()?;
    let service = Start::on(&database).ready()?;
    let (ana, ben) = service.two_users()?;
    service.send(&ana, &ben, "hello")?.expect(201)?;
    service.stop()?;
    database.query(&format!("UPDATE users SET disabled_at = now() WHERE id = '{}'", ben.id))?;
    let before = dump(&database)?;
    ensure!(before.iter().any(|row| row.starts_with("sessions ")), "{before:?}");
    let commands: [(&[&str], &str, u64); 6] = [
        (&["user", "disable", "ana"], "disabled", 1),
        (&["user", "disable", "ben"], "already_disabled", 1),
        (&["user", "enable", "ana"], "already_enabled", 0),
        (&["user", "enable", "ben"], "enabled", 0),
        (&["user", "revoke", "ana"], "revoked", 1),
        (&["user", "reset-password", "ana"], "password_reset", 1),
    ];
    for (command, outcome, ended) in commands {
        let said = ask(&database, &[command, &["--dry-run"]].concat())?;
        let id = if command[2] == "ana" { &ana.id } else { &ben.id };
        let expected = json!({"user_id": id, "outcome": outcome, "sessions_ended": ended, "dry_run": true});
        assert_eq!(said, expected, "{command:?}");
        let text = admin(&database, &[command, &["--dry-run"]].concat()).run()?;
        ensure!(text.code == 0 && text.stdout.contains("nothing was changed"), "{text:?}");
        assert_eq!(dump(&database)?, before, "{command:?}");
    }
    for command in [
        &["user", "show", "ana"][..],
        &["user", "export", "ana", "--dry-run"],
        &["user", "delete", "ana", "--dry-run"],
        &["conversations", "largest"],
        &["messages", "purge", "--older-than", "1", "--dry-run"],
    ] {
        ask(&database, command)?;
        assert_eq!(dump(&database)?, before, "{command:?}");
    }
    ask(&database, &["user", "revoke", "ana"])?;
    ensure!(dump(&database)? != before, "the comparison sees no change");
    Ok(())
}

/// Ends with this code, says this on stderr, and nothing on stdout.
fn fails(start: &Start, code: i32, words: &[&str]) -> Result<()> {
    let ended = start.run()?;
    ensure!(ended.code == code && ended.stdout.is_empty(), "{code}: {ended:?}");
    for word in words {
        ensure!(ended.stderr.contains(word), "no {word:?}: {ended:?}");
    }
    Ok(())
}

#[test]
fn the_exit_code_says_why_a_command_failed() -> Result<()> {
    let database = Database::create()?;
    let show = admin(&database, &["user", "show", "ana"]);
    let disable = admin(&database, &["user", "disable", "ana"]);
    fails(&show, 1, &["version 0", "chat-service migrate"])?;
    ensure!(Start::on(&database).args(&["migrate"]).run()?.code == 0);
    for nobody in ["ana", "", "0192", "01920b1e-9f6a-7c7e-8f4e-0f6c1f4f2a11", "ana@example.com", "ä"] {
        for command in ["show", "disable", "enable", "revoke", "reset-password", "export", "delete"] {
            fails(&admin(&database, &["user", command, nobody]), 3, &["no such user"])?;
        }
    }
    fails(&admin(&database, &["user", "show"]), 2, &["<USER>"])?;
    fails(&admin(&database, &["user", "show", "ana", "--reason", ""]), 2, &["1 to 200"])?;
    fails(&admin(&database, &["user", "show", "ana", "--reason", &"x".repeat(201)]), 2, &["1 to 200"])?;
    fails(&admin(&database, &["conversations", "largest", "--limit", "0"]), 2, &["--limit"])?;
    fails(&show.clone().env("PORT", "no port"), 78, &["PORT"])?;
    let closed = format!("postgres://me@127.0.0.1:{}/chat", closed_port()?);
    fails(&show.clone().env("DATABASE_URL", &closed), 1, &["Postgres cannot be reached", "start Postgres"])?;

    let read_only = format!("ALTER DATABASE {} SET default_transaction_read_only", database.name());
    database.query(&format!("{read_only} = on"))?;
    fails(&disable, 1, &["only reads", "default_transaction_read_only"])?;
    fails(&show, 3, &["no such user"])?;
    let writable = format!("SET transaction_read_only = off; {read_only} = off");
    database.query(&writable)?;
    database.query(FUTURE_MIGRATION)?;
    fails(&show, 1, &["9999", "newer release"])?;
    fails(&disable, 1, &["9999", "newer release"])
}

#[test]
fn every_command_leaves_one_line_that_names_nobody() -> Result<()> {
    let database = Database::create()?;
    let service = Start::on(&database).ready()?;
    let ana = service.user("ana.of.the.log")?;
    // Whatever the log's filter says.
    let logged = |args: &[&str]| {
        let args = [&["user"], args, &["ANA.of.the.log", "--reason", "ticket \"4711\""]].concat();
        admin(&database, &args).env("RUST_LOG", "off").env("LOG_FORMAT", "json")
    };
    let commands: [(&[&str], &str, bool); 6] = [
        (&["show"], "shown", false),
        (&["disable", "--dry-run"], "disabled", true),
        (&["disable"], "disabled", false),
        (&["disable"], "already_disabled", false),
        (&["enable"], "enabled", false),
        (&["reset-password"], "password_reset", false),
    ];
    for (command, outcome, dry_run) in commands {
        let ended = logged(command).run()?;
        ensure!(ended.code == 0 && ended.stderr.lines().count() == 1, "{ended:?}");
        let line: Value = serde_json::from_str(&ended.stderr)?;
        let expected = json!({
            "timestamp": line["timestamp"], "level": "INFO", "message": "audit", "command": format!("user {}", command[0]),
            "user_id": ana.id, "outcome": outcome, "dry_run": dry_run, "reason": "ticket \"4711\"",
            "uid": rustix::process::getuid().as_raw(), "host": line["host"],
        });
        assert_eq!(line, expected);
        ensure!(line["host"].as_str().is_some_and(|host| !host.is_empty()), "{line}");
        has_none_of(&ended.stderr.to_lowercase(), ["ana.of.the.log", "example.com"])?;
        if outcome == "password_reset" {
            let password = ended.stdout.trim_end().rsplit(' ').next().context("a password")?;
            ensure!(password.len() == 24, "{ended:?}");
            has_none_of(&ended.stderr, [password])?;
        }
    }
    let nobody = admin(&database, &["user", "show", "nobody"]).run()?;
    ensure!(
        nobody.stderr.contains("outcome=\"no_such_user\"") && !nobody.stderr.contains("nobody"),
        "{nobody:?}"
    );
    let failed = logged(&["revoke"]).env("DATABASE_URL", "postgres://me:s3cret@127.0.0.1:1/chat").run()?;
    ensure!(failed.code == 1 && failed.stderr.contains("\"outcome\":\"failed\""), "{failed:?}");
    has_none_of(&failed.said(), ["s3cret"])
}

/// As in a pod: the service is the first process, and its log is a pipe.
#[test]
fn in_a_container_the_line_is_in_the_log_of_the_service_too() -> Result<()> {
    const SCRIPT: &str = r#"
        (until [ "$(readlink /proc/1/exe)" = "$0" ]; do sleep 0.1; done
         "$0" admin user show nobody --reason "from within" >/dev/null 2>&1
         while sleep 0.5; do kill -TERM 1; done) &
        exec "$0" serve"#;
    let isolated = |arguments: &[&str]| {
        let mut command = dies_with_us(Path::new("unshare"), "KILL");
        command.args(["--user", "--map-root-user", "--pid", "--fork", "--mount-proc", "--kill-child"]);
        command
            .args(arguments)
            .current_dir("/")
            .env_clear()
            .envs(std::env::var_os("PATH").map(|path| ("PATH", path)));
        command
    };
    // Linux has such namespaces, and some machines forbid them.
    if !daemon::run(isolated(&["true"]), LIMIT).is_ok_and(|ran| ran.status.success()) {
        return Ok(());
    }
    let database = Database::create()?;
    ensure!(Start::on(&database).args(&["migrate"]).run()?.code == 0);
    let mut command = isolated(&["sh", "-c", SCRIPT]);
    command.arg(std::fs::canonicalize(service_binary()?)?).env("DATABASE_URL", database.url());
    command.env("REDIS_URL", format!("redis://127.0.0.1:{}", closed_port()?));
    command.env("HOST", "127.0.0.1").env("PORT", "0").env("OPS_PORT", "0");
    let ran = daemon::run(command, LIMIT)?;
    let log = String::from_utf8_lossy(&ran.stdout);
    let lines: Vec<_> = log.lines().filter(|line| line.contains(" audit ")).collect();
    ensure!(lines.len() == 1 && lines[0].contains("no_such_user"), "{log}");
    ensure!(lines[0].contains("from within") && !lines[0].contains("nobody"), "{log}");
    Ok(())
}

/// Both wait for the user's row, in this order.
#[test]
fn no_login_beside_a_change_leaves_a_session() -> Result<()> {
    let database = Database::create()?;
    let service = Start::on(&database).ready()?;
    for command in ["disable", "revoke", "reset-password"] {
        for login_first in [true, false] {
            database.query("DELETE FROM users")?;
            service.user("ana")?;
            let held = database.hold("SELECT FROM users FOR UPDATE")?;
            let change = admin(&database, &["user", command, "ana"]);
            let (login, changed) = thread::scope(|scope| -> Result<_> {
                let begin = || scope.spawn(|| log_in(&service, PASSWORD));
                let mut first = login_first.then(begin);
                if login_first {
                    database.blocks(1)?;
                }
                let mut process = change.spawn()?;
                database.blocks(if login_first { 2 } else { 1 })?;
                let login = match first.take() {
                    Some(login) => login,
                    None => begin(),
                };
                database.blocks(2)?;
                held.release();
                let code = process.exit(LIMIT)?;
                Ok((login.join().expect("no panic")?, code))
            })?;
            ensure!(changed == 0, "{command}: {changed}");
            let case = format!("{command}, login first: {login_first}");
            match login.json()?["access_token"].as_str() {
                // A login after the sessions have ended begins another.
                Some(token) if command == "revoke" && !login_first => drop(service.me(token)?.expect(200)?),
                Some(token) => {
                    ensure!(login_first, "{case}: {login:?}");
                    service.me(token)?.expect(401).context(case)?;
                }
                None => ensure!(!login_first && login.status == 401, "{case}: {login:?}"),
            }
        }
    }
    Ok(())
}

#[test]
fn a_command_ends_after_every_statement_that_may_not_have_seen_it() -> Result<()> {
    let database = Database::create()?;
    let service = Start::on(&database).env("DB_STATEMENT_TIMEOUT_MS", "20000").ready()?;
    for command in ["disable", "revoke", "reset-password"] {
        database.query("DELETE FROM users")?;
        database.query("TRUNCATE messages, conversations")?;
        let (ana, ben) = service.two_users()?;
        service.send(&ana, &ben, "before")?.expect(201)?;
        let held = database.hold_conversations()?;
        thread::scope(|scope| -> Result<()> {
            // The statement has its snapshot, and waits for the conversation.
            let sending = scope.spawn(|| service.send(&ana, &ben, "beside"));
            database.blocks(1)?;
            let change = admin(&database, &["user", command, "ana", "--json"]);
            let impatient = change.clone().env("DB_STATEMENT_TIMEOUT_MS", "300").run()?;
            ensure!(impatient.code == 1 && impatient.stderr.contains("it is done"), "{impatient:?}");
            let said: Value = serde_json::from_str(&impatient.stdout)?;
            assert_eq!(said["user_id"], ana.id);
            let mut patient = change.spawn()?;
            thread::sleep(Duration::from_millis(700));
            ensure!(patient.is_running(), "{command}: {}", patient.said());
            held.release();
            ensure!(patient.exit(LIMIT)? == 0, "{command}: {}", patient.said());
            let stored = database.contents()?;
            sending.join().expect("no panic")?.expect(201)?;
            assert_eq!(stored, ["before", "beside"], "{command}");
            service.send(&ana, &ben, "after")?.expect(401)?;
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn help_has_examples_and_exit_codes() -> Result<()> {
    let help = Start::bare().args(&["admin", "--help"]).run()?;
    ensure!(help.code == 0 && help.stdout.contains("Exit codes:"), "{help:?}");
    for words in ["kubectl", "--dry-run", "--json", "--reason <TEXT>", "no such user"] {
        ensure!(help.stdout.contains(words), "no {words}: {}", help.stdout);
    }
    for command in [&["user", "disable"][..], &["user", "reset-password"], &["conversations", "largest"]] {
        let help = Start::bare().args(&[&["admin"], command, &["--help"]].concat()).run()?;
        ensure!(help.code == 0 && help.stdout.contains("--dry-run"), "{help:?}");
    }
    Ok(())
}
