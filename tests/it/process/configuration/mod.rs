//! Every variable does what the README says of it, as seen in responses, in Postgres and in Redis.

mod limits;
mod stores;

use std::net::TcpStream;

use anyhow::{Context as _, Result, ensure};
use rustix::process::Signal;
use serde_json::{Value, json};

use super::support::{Database, LIMIT, PASSWORD, Response, Service, Start, closed_port, eventually};
use crate::support::claims;

#[test]
fn secret_key_signs_tokens_and_has_a_public_default() -> Result<()> {
    let database = Database::create()?;
    let start = Start::on(&database);
    let default = start.ready()?;
    let ana = default.user("ana")?;
    let same = start.clone().env("SECRET_KEY", "please-change").ready()?;
    same.me(&ana.token)?.expect(200)?;
    let other = start.env("SECRET_KEY", "another key of at least thirty-two bytes").ready()?;
    other.me(&ana.token)?.expect(401)?;
    Ok(())
}

#[test]
fn secret_key_previous_keeps_users_logged_in_over_a_rotation() -> Result<()> {
    const OLD: &str = "the old key of at least thirty-two bytes";
    const NEW: &str = "the new key of at least thirty-two bytes";
    let database = Database::create()?;
    let start = Start::on(&database);
    let before = start.clone().env("SECRET_KEY", OLD).ready()?;
    let ana = before.user("ana")?;
    let rotated = start.clone().env("SECRET_KEY", NEW).env("SECRET_KEY_PREVIOUS", OLD).ready()?;
    rotated.me(&ana.token)?.expect(200)?;
    // New tokens are signed with the new key.
    let renewed = rotated.log_in("ana")?;
    before.me(&renewed)?.expect(401)?;
    let after = start.env("SECRET_KEY", NEW).ready()?;
    after.me(&renewed)?.expect(200)?;
    after.me(&ana.token)?.expect(401)?;
    Ok(())
}

#[test]
fn access_token_exp_minutes_is_in_the_login_response_and_in_the_token() -> Result<()> {
    let database = Database::create()?;
    for (minutes, seconds) in [(None, 3600), (Some("7"), 420)] {
        let service = Start::on(&database).env_if("ACCESS_TOKEN_EXP_MINUTES", minutes).ready()?;
        if minutes.is_none() {
            service.user("ana")?;
        }
        let body = json!({"username": "ana", "password": PASSWORD});
        let token = Response::of(service.post("/login", &body))?.expect(200)?.json()?;
        assert_eq!(token["expires_in"], seconds);
        let claims = claims(token["access_token"].as_str().context("a token")?, "please-change");
        let life = claims["exp"].as_u64().zip(claims["iat"].as_u64()).map(|(exp, iat)| exp - iat);
        assert_eq!(life, Some(seconds), "{claims}");
    }
    Ok(())
}

#[test]
fn host_is_the_address_of_both_ports() -> Result<()> {
    let database = Database::create()?;
    let service = Start::on(&database).env("HOST", "127.0.0.2").ready()?;
    for address in [service.public, service.operations] {
        ensure!(address.ip().to_string() == "127.0.0.2", "{address}");
        ensure!(
            TcpStream::connect(("127.0.0.1", address.port())).is_err(),
            "the service listens elsewhere too"
        );
    }
    let everywhere = Start::on(&database).unset("HOST").ready()?;
    for address in [everywhere.public, everywhere.operations] {
        ensure!(address.ip().is_unspecified(), "{address}");
        TcpStream::connect(("127.0.0.3", address.port()))
            .context("the service does not listen on all addresses")?;
    }
    Ok(())
}

#[test]
fn port_serves_the_api_and_ops_port_the_operations() -> Result<()> {
    let database = Database::create()?;
    let [public, operations] = [closed_port()?, closed_port()?];
    let start =
        Start::on(&database).env("PORT", &public.to_string()).env("OPS_PORT", &operations.to_string());
    let service = start.ready()?;
    ensure!(service.public.port() == public && service.operations.port() == operations);
    for path in ["/docs/", "/openapi.json", "/healthz"] {
        Response::of(service.get(path))?.expect(200)?;
    }
    for path in ["/metrics", "/livez", "/healthz"] {
        service.operations(path)?.expect(200)?;
    }
    Response::of(service.get("/metrics"))?.expect(404)?;
    service.operations("/openapi.json")?.expect(404)?;
    Ok(())
}

#[test]
fn max_body_bytes_is_the_largest_body() -> Result<()> {
    let database = Database::create()?;
    for (limit, bytes) in [(None, 65_536), (Some("2000"), 2_000)] {
        let service = Start::on(&database).env_if("MAX_BODY_BYTES", limit).ready()?;
        let padded = |length: usize| {
            let body = format!("{{{}}}", " ".repeat(length - 2));
            Response::of(service.post("/register", &json!({})).body(body))
        };
        padded(bytes)?.expect(422)?;
        let refused = padded(bytes + 1)?.expect(413)?;
        ensure!(refused.body.contains(&bytes.to_string()), "{}", refused.body);
    }
    Ok(())
}

#[test]
fn with_migrate_on_start_false_the_service_is_live_and_unready_until_the_migration() -> Result<()> {
    let database = Database::create()?;
    let start = Start::on(&database);
    let service = start.clone().env("MIGRATE_ON_START", "false").listen()?;
    service.becomes("unavailable")?;
    let health = service.operations("/healthz")?.expect(503)?.json()?;
    ensure!(health["checks"]["postgres"] == "ok" && health["checks"]["schema"] == "behind", "{health}");
    service.operations("/livez")?.expect(200)?;
    Response::of(service.post("/login", &json!({"username": "ana", "password": "12345678"})))?
        .is_unavailable()?;
    ensure!(database.value("SELECT count(*) FROM pg_tables WHERE schemaname = 'public'")? == "0");
    ensure!(start.args(&["migrate"]).run()?.code == 0);
    service.becomes("ok")?;
    let (ana, ben) = service.two_users()?;
    service.send(&ana, &ben, "hello")?.expect(201)?;
    Ok(())
}

#[test]
fn migrate_on_start_is_true_when_it_is_not_set() -> Result<()> {
    let database = Database::create()?;
    let _service = Start::on(&database).ready()?;
    ensure!(database.value("SELECT count(*) FROM _sqlx_migrations WHERE success")? != "0");
    Ok(())
}

#[test]
fn shutdown_grace_seconds_is_in_the_log_of_a_stopping_process() -> Result<()> {
    let database = Database::create()?;
    for (grace, said) in [(None, "grace_seconds=20"), (Some("3"), "grace_seconds=3")] {
        let mut service = Start::on(&database).env_if("SHUTDOWN_GRACE_SECONDS", grace).ready()?;
        service.process.signal(Signal::TERM)?;
        ensure!(service.process.exit(LIMIT)? == 0);
        ensure!(service.process.lines_with(&["stopping", said]).len() == 1, "{}", service.process.said());
    }
    Ok(())
}

#[test]
fn with_log_format_json_every_line_is_an_object_and_with_text_none_is() -> Result<()> {
    let database = Database::create()?;
    let service = Start::on(&database).env("LOG_FORMAT", "json").ready()?;
    let request = service.get("/me").header("x-request-id", "a-request-of-mine");
    Response::of(request)?.expect(401)?;
    let said = service.stop()?;
    let mut requests = Vec::new();
    for line in said.lines() {
        let event: Value = serde_json::from_str(line).with_context(|| line.to_owned())?;
        ensure!(event["timestamp"].is_string() && event["level"].is_string(), "{event}");
        if event["message"] == "request" {
            requests.push(event);
        }
    }
    let mine = requests.iter().find(|event| event["route"] == "/me").context("the request's line")?;
    ensure!(mine.to_string().contains("\"request_id\":\"a-request-of-mine\""), "{mine}");
    ensure!(mine["method"] == "GET" && mine["status"] == 401 && mine["duration_ms"].is_number(), "{mine}");

    let text = Start::on(&database).ready()?.stop()?;
    for line in text.lines() {
        ensure!(serde_json::from_str::<Value>(line).is_err() && !line.contains('\u{1b}'), "{line}");
    }
    Ok(())
}

#[test]
fn rust_log_filters_by_level_and_by_target() -> Result<()> {
    let database = Database::create()?;
    let [public, operations] = [closed_port()?, closed_port()?].map(|port| port.to_string());
    let start = Start::on(&database);
    let default = start.ready()?;
    default.me("nonsense")?.expect(401)?;
    let said = default.stop()?;
    ensure!(said.contains(" INFO ") && !said.contains("DEBUG"), "{said}");
    let debug = start.clone().env("RUST_LOG", "debug").ready()?.stop()?;
    ensure!(debug.contains("DEBUG"), "{debug}");
    // The log does not name the ports now, so they are set.
    let quiet = start.env("PORT", &public).env("OPS_PORT", &operations);
    for (filter, expected) in [("warn", "WARN"), ("off,chat_service=warn", "WARN"), ("off", "")] {
        let mut process = quiet.clone().env("RUST_LOG", filter).spawn()?;
        let port: u16 = operations.parse()?;
        eventually("the port", || TcpStream::connect(("127.0.0.1", port)).ok())?;
        process.signal(Signal::TERM)?;
        ensure!(process.exit(LIMIT)? == 0);
        let said = process.said();
        ensure!(said.lines().all(|line| !expected.is_empty() && line.contains(expected)), "{filter}: {said}");
        ensure!(said.is_empty() == expected.is_empty(), "{filter}: {said}");
    }
    Ok(())
}

#[test]
fn a_dotenv_file_is_read_and_the_environment_wins() -> Result<()> {
    let database = Database::create()?;
    let file = format!(
        "# a comment\nDATABASE_URL={}\nexport ACCESS_TOKEN_EXP_MINUTES=11\nLOG_FORMAT='json'\n",
        database.url()
    );
    let start = Start::on(&database).unset("DATABASE_URL").file(".env", &file);
    let service = start.ready()?;
    service.user("ana")?;
    let body = json!({"username": "ana", "password": PASSWORD});
    let log_in = |service: &Service| Response::of(service.post("/login", &body))?.expect(200)?.json();
    assert_eq!(log_in(&service)?["expires_in"], 660);
    ensure!(service.stop()?.starts_with('{'), "the log is not JSON");
    let service = start.env("ACCESS_TOKEN_EXP_MINUTES", "5").env("LOG_FORMAT", "text").ready()?;
    assert_eq!(log_in(&service)?["expires_in"], 300);
    ensure!(!service.stop()?.starts_with('{'), "the file overrode the environment");
    Ok(())
}

#[test]
fn an_empty_value_counts_as_unset() -> Result<()> {
    let database = Database::create()?;
    let start =
        Start::on(&database).env("TRUSTED_PROXIES", "").env("APP_ENV", "").env("SECRET_KEY_PREVIOUS", "");
    start.env("LOG_FORMAT", "").ready()?;
    Ok(())
}
