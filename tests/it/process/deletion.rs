//! What is left of a deleted user: every table, every key of Redis, the log and the metrics are searched for it.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use deadpool_redis::redis::{self, Value};
use reqwest::Method;
use serde_json::json;

use super::support::{Database, PASSWORD, Response, Service, Start, User, eventually, shared_redis};

const NAME: &str = "Quagga.Zebra_77";
const EMAIL: &str = "okapi.giraffe+1@Example.ORG";
const AGENT: &str = "numbat-telephone/1.0";
const KEY: &str = "pangolin-key-1";

/// The tables that may name the user's id: README.md says for how long.
const TABLES_WITH_ID: [&str; 4] = ["conversations", "deleted_users", "erased_conversations", "messages"];

/// Registers, logs in, and has a conversation in which both have written. Returns the user, the peer, and what may not be left.
fn live(service: &Service) -> Result<(User, User, Vec<String>)> {
    let ben = service.user("ben")?;
    let body = json!({"username": NAME, "email": EMAIL, "password": PASSWORD});
    let id = Response::of(service.post("/register", &body))?.expect(201)?.json()?;
    let id = id["id"].as_str().context("an id")?.to_owned();
    let login = json!({"username": NAME, "password": PASSWORD});
    let tokens = service.post("/login", &login).header("user-agent", AGENT);
    let tokens = Response::of(tokens)?.expect(200)?.json()?;
    let [token, refresh_token] = ["access_token", "refresh_token"].map(|name| tokens[name].as_str());
    let (token, refresh_token) =
        (token.context("a token")?.to_owned(), refresh_token.context("a token")?.to_owned());
    let ana = User { id, name: NAME.to_owned(), token };
    let mut gone = [NAME, EMAIL, AGENT, KEY, PASSWORD].map(str::to_owned).to_vec();
    gone.extend([ana.token.clone(), refresh_token]);
    for number in 0..20 {
        let content = format!("the aardvark {number} says \u{1f993}");
        let message = json!({"recipient_id": ben.id, "content": content});
        let request = service.post("/send", &message).bearer_auth(&ana.token);
        Response::of(request.header("idempotency-key", format!("{KEY}{number}")))?.expect(201)?;
        gone.push(content);
        service.send(&ben, &ana, "an answer")?.expect(201)?;
    }
    service.hit(&ben, &ana, 50)?;
    service.hit(&ana, &ben, 50)?;
    for path in ["/me", "/sessions", "/conversations", "/me/export"] {
        Response::of(service.get(path).bearer_auth(&ana.token))?;
    }
    Response::of(service.get(&format!("/users/{NAME}")).bearer_auth(&ben.token))?.expect(200)?;
    Ok((ana, ben, gone))
}

/// Every row of every table, with the table's name.
fn rows(database: &Database) -> Result<Vec<(String, String)>> {
    let tables = database.query("SELECT relname FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'p', 'm')")?;
    let mut rows = Vec::new();
    for table in tables.into_iter().flatten().flatten() {
        for row in database.query(&format!("SELECT t::text FROM {table} t"))?.into_iter().flatten().flatten()
        {
            rows.push((table.clone(), row));
        }
    }
    ensure!(rows.iter().any(|(table, _)| table == "messages"), "the tables were not found");
    Ok(rows)
}

/// Every key of Redis with all that it holds.
fn keys(url: &str) -> Result<Vec<(String, String)>> {
    let mut connection = redis::Client::open(url)?.get_connection()?;
    let keys: Vec<Vec<u8>> = redis::cmd("KEYS").arg("*").query(&mut connection)?;
    let mut found = Vec::new();
    for key in keys {
        let kind: String = redis::cmd("TYPE").arg(&key).query(&mut connection)?;
        let command = match kind.as_str() {
            "string" => redis::cmd("GET").arg(&key).to_owned(),
            "list" => redis::cmd("LRANGE").arg(&key).arg(0).arg(-1).to_owned(),
            "hash" => redis::cmd("HGETALL").arg(&key).to_owned(),
            "none" => continue,
            kind => anyhow::bail!("a key of type {kind}: search it, too"),
        };
        let value: Value = command.query(&mut connection)?;
        found.push((String::from_utf8_lossy(&key).into_owned(), printed(&value)));
    }
    Ok(found)
}

fn printed(value: &Value) -> String {
    match value {
        Value::BulkString(bytes) => String::from_utf8_lossy(bytes).into_owned(),
        Value::Array(values) => values.iter().map(printed).collect::<Vec<_>>().join("\n"),
        Value::Map(pairs) => pairs
            .iter()
            .map(|(key, value)| printed(key) + " " + &printed(value))
            .collect::<Vec<_>>()
            .join("\n"),
        other => format!("{other:?}"),
    }
}

/// Whether the text has the other one, in any case, as it is, in hexadecimal digits, or as in JSON.
fn has(text: &str, searched: &str) -> bool {
    let text = text.to_lowercase();
    let forms = [searched.to_lowercase(), searched.replace('-', "")];
    let hex = |text: &str| text.bytes().map(|byte| format!("{byte:02x}")).collect::<String>();
    forms.iter().any(|form| text.contains(form))
        || text.contains(&hex(searched))
        || text.contains(&hex(&forms[0]))
}

#[test]
fn nothing_is_left_of_a_deleted_user_but_what_the_document_names() -> Result<()> {
    let (database, redis) = (Database::create()?, shared_redis());
    redis::cmd("FLUSHDB").exec(&mut redis::Client::open(&*redis)?.get_connection()?)?;
    let start = Start::on(&database).env("REDIS_URL", &redis).env("SEND_RATE_LIMIT_PER_MINUTE", "1000");
    let service = start.ready()?;
    let (ana, ben, gone) = live(&service)?;
    // The search finds what is there.
    let has_all = |found: &[(String, String)], all: &[&str]| {
        all.iter().all(|text| found.iter().any(|(_, row)| has(row, text)))
    };
    ensure!(
        has_all(&rows(&database)?, &[NAME, EMAIL, AGENT, KEY, &gone[7], &ana.id]),
        "the search of Postgres"
    );
    let in_redis: Vec<_> =
        keys(&redis)?.into_iter().map(|(key, value)| (String::new(), key + "\n" + &value)).collect();
    ensure!(has_all(&in_redis, &["the aardvark 1 says", &ana.id]), "the search of Redis");

    let request = reqwest::blocking::Client::builder().no_proxy().build()?;
    let request =
        request.request(Method::DELETE, format!("http://{}/me?erase_messages=true", service.public));
    Response::of(request.bearer_auth(&ana.token).json(&json!({"password": PASSWORD})))?.expect(202)?;
    eventually("the end of the erasure", || {
        database.value("SELECT count(*) FROM erasures").ok().filter(|count| count == "0")
    })?;
    // Peers go on to read.
    let page = service.read(&ben, &ana, 50)?.expect(200)?;
    ensure!(page.body.matches("\"erased\":true").count() == 20, "{page:?}");
    std::thread::sleep(Duration::from_millis(300));

    let mut tables = BTreeSet::new();
    for (table, row) in rows(&database)? {
        for text in &gone {
            ensure!(!has(&row, text), "{text} is left in {table}: {row}");
        }
        if has(&row, &ana.id) {
            tables.insert(table);
        }
    }
    ensure!(tables == TABLES_WITH_ID.map(str::to_owned).into(), "the id is in {tables:?}");
    for (key, value) in keys(&redis)? {
        for text in &gone {
            ensure!(!has(&key, text) && !has(&value, text), "{text} is left in {key}: {value}");
        }
        // Counters of a minute, which expire.
        let may_have_id = key.starts_with("chat:limit:send:");
        ensure!(
            may_have_id || !has(&key, &ana.id) && !has(&value, &ana.id),
            "the id is left in {key}: {value}"
        );
    }
    let metrics = service.operations("/metrics")?.expect(200)?.body;
    let log = service.stop()?;
    for text in &gone {
        ensure!(!has(&metrics, text) && !has(&log, text), "{text} is in the metrics or the log");
    }
    ensure!(!has(&metrics, &ana.id), "the id is in the metrics");
    let lines: Vec<&str> = log.lines().filter(|line| has(line, &ana.id)).collect();
    ensure!(lines.len() == 2 && lines.iter().all(|line| line.contains("of a deleted user")), "{lines:#?}");
    Ok(())
}
