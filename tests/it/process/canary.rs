//! The canary against a real service: what it counts, what it says, and how it ends.

use std::time::Duration;

use anyhow::{Result, ensure};
use rustix::process::Signal;

use super::support::{Database, Response, Service, Start, closed_port, eventually};

fn canary(service: &Service, port: u16, password: &str) -> Start {
    let [url, listen] = [format!("http://{}", service.public), format!("127.0.0.1:{port}")];
    let args = ["canary", "--url", &url, "--interval", "5", "--listen", &listen];
    Start::default().env("CANARY_PASSWORD", password).args(&args)
}

fn metrics(port: u16) -> Result<String> {
    let client = reqwest::blocking::Client::builder().timeout(Duration::from_secs(5)).no_proxy().build()?;
    Ok(Response::of(client.get(format!("http://127.0.0.1:{port}/metrics")))?.expect(200)?.body)
}

/// The value of a series once it is at least this; 0 before the canary listens.
fn reaches(port: u16, series: &str, least: f64) -> Result<String> {
    eventually(&format!("{series} of {least}"), || {
        let text = metrics(port).unwrap_or_default();
        let value = text.lines().find_map(|line| line.strip_prefix(series)?.trim().parse::<f64>().ok());
        (value? >= least).then_some(text)
    })
}

#[test]
fn canary_has_rounds_with_success_and_ends_at_sigterm() -> Result<()> {
    let database = Database::create()?;
    let service = Start::on(&database).ready()?;
    let port = closed_port()?;
    let mut process = canary(&service, port, "a fine password").spawn()?;
    let text = reaches(port, "chat_canary_rounds_total{outcome=\"success\"}", 2.0)?;
    for series in [
        "chat_canary_rounds_total{outcome=\"failure\"} 0",
        "chat_canary_failures_total{step=\"log_in\"} 0",
        "chat_canary_failures_total{step=\"send\"} 0",
        "chat_canary_lost_total 0",
        "chat_canary_seconds_count{step=\"read\"} 2",
        "chat_canary_seconds_count{step=\"stream\"} 2",
    ] {
        ensure!(text.contains(series), "no {series}: {text}");
    }
    ensure!(database.value("SELECT count(*) FROM messages")? == "2");
    process.signal(Signal::TERM)?;
    ensure!(process.exit(Duration::from_secs(20))? == 0, "{}", process.said());
    // The accounts exist now, and their password is another.
    let process = canary(&service, port, "another password").spawn()?;
    reaches(port, "chat_canary_failures_total{step=\"log_in\"}", 1.0)?;
    for word in ["canary-1 exists", "CANARY_PASSWORD", "admin user delete canary-1"] {
        ensure!(process.stderr().contains(word), "no {word:?}: {}", process.said());
    }
    Ok(())
}

#[test]
fn canary_logs_in_again_when_its_sessions_have_ended() -> Result<()> {
    let database = Database::create()?;
    let service = Start::on(&database).env("LOGIN_RATE_LIMIT_PER_MINUTE", "0").ready()?;
    let port = closed_port()?;
    let _process = canary(&service, port, "a fine password").spawn()?;
    reaches(port, "chat_canary_rounds_total{outcome=\"success\"}", 1.0)?;
    for user in ["canary-1", "canary-2"] {
        let revoked = Start::on(&database).args(&["admin", "user", "revoke", user]).run()?;
        ensure!(revoked.code == 0, "{revoked:?}");
    }
    reaches(port, "chat_canary_rounds_total{outcome=\"failure\"}", 1.0)?;
    let before = database.value("SELECT count(*) FROM messages")?.parse::<f64>()?;
    reaches(port, "chat_canary_rounds_total{outcome=\"success\"}", before + 1.0)?;
    Ok(())
}

#[test]
fn canary_counts_a_message_that_is_removed_behind_its_back() -> Result<()> {
    let database = Database::create()?;
    let service = Start::on(&database).env("CACHE_WINDOW", "0").ready()?;
    let port = closed_port()?;
    let process = canary(&service, port, "a fine password").spawn()?;
    reaches(port, "chat_canary_rounds_total{outcome=\"success\"}", 1.0)?;
    database.query("DELETE FROM messages")?;
    reaches(port, "chat_canary_lost_total", 1.0)?;
    let text = reaches(port, "chat_canary_rounds_total{outcome=\"success\"}", 2.0)?;
    ensure!(text.contains("chat_canary_lost_total 1\n"), "it is counted once: {text}{}", process.said());
    ensure!(text.contains("chat_canary_failures_total{step=\"read\"} 1\n"), "{text}");
    Ok(())
}

#[test]
fn canary_without_a_password_says_which_variable_to_set() -> Result<()> {
    for start in [Start::default(), Start::default().env("CANARY_PASSWORD", "short")] {
        let refused = start.args(&["canary"]).run()?;
        ensure!(refused.code == 1 && refused.stderr.contains("set CANARY_PASSWORD"), "{refused:?}");
    }
    Ok(())
}
