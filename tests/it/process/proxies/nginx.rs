//! nginx.

use anyhow::{Result, ensure};

use super::front::{Front, dies_with_us, program};
use super::streams;

fn nginx(change: impl FnOnce(String) -> String) -> Result<Front> {
    let program = program("nginx")?;
    Front::start("nginx.conf", change, |directory, configuration| {
        let mut command = dies_with_us(&program);
        command.arg("-p").arg(directory).arg("-c").arg(configuration);
        command.args(["-e", "stderr", "-g", "daemon off; worker_processes 2; pid nginx.pid;"]);
        Ok(command)
    })
}

/// nginx' own files, where anybody may write.
fn here(text: String) -> String {
    let paths =
        ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"].map(|kind| format!("{kind}_temp_path {kind};"));
    text.replacen("http {", &format!("http {{ access_log off; {}", paths.concat()), 1)
}

#[test]
fn events_arrive_at_once() -> Result<()> {
    streams::events_arrive_at_once(&nginx(here)?)
}

/// nginx' default for its connections to the service: there a response has no chunks, which nginx would pass on whole.
fn over_http_1_0(text: &str) -> String {
    text.replace("proxy_http_version 1.1;", "")
}

#[test]
fn over_http_1_0_events_arrive_at_once_too() -> Result<()> {
    streams::events_arrive_at_once(&nginx(|text| here(over_http_1_0(&text)))?)
}

#[test]
fn without_the_header_that_switches_buffering_off_they_do_not() -> Result<()> {
    let ignoring = "proxy_ignore_headers X-Accel-Buffering; proxy_read_timeout";
    let front = nginx(|text| here(over_http_1_0(&text).replace("proxy_read_timeout", ignoring)))?;
    ensure!(streams::events_arrive_at_once(&front).is_err(), "nginx does not buffer");
    Ok(())
}

#[test]
fn comments_outlive_the_timeout_for_silence() -> Result<()> {
    streams::silence_is_survived(&nginx(|text| {
        here(text.replace("proxy_read_timeout 60s", "proxy_read_timeout 17s"))
    })?)
}

#[test]
fn a_timeout_below_the_comments_ends_streams() -> Result<()> {
    let front = nginx(|text| here(text.replace("proxy_read_timeout 60s", "proxy_read_timeout 2s")))?;
    ensure!(streams::silence_is_survived(&front).is_err(), "nginx does not end silent streams");
    Ok(())
}

#[test]
fn a_thousand_streams_are_carried() -> Result<()> {
    streams::a_thousand_streams_are_carried(&nginx(here)?, streams::OPENING)
}

#[test]
fn with_nginx_own_number_of_connections_they_are_not() -> Result<()> {
    let front = nginx(|text| here(text.replace("worker_connections 30000;", "")))?;
    ensure!(
        streams::a_thousand_streams_are_carried(&front, streams::REFUSED_WITHIN).is_err(),
        "the default is enough"
    );
    Ok(())
}
