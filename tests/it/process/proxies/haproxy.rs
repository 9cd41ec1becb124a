//! HAProxy.

use anyhow::{Result, ensure};

use super::front::{Front, dies_with_us, program};
use super::streams;

fn haproxy(change: impl FnOnce(String) -> String) -> Result<Front> {
    let program = program("haproxy")?;
    Front::start("haproxy.cfg", change, |_, configuration| {
        let mut command = dies_with_us(&program);
        command.arg("-db").arg("-f").arg(configuration);
        Ok(command)
    })
}

/// A stream says `no-transform`, and is carried as it is.
#[test]
fn events_arrive_at_once_also_where_text_is_compressed() -> Result<()> {
    let compressing = "mode http\n    compression algo gzip\n    compression type text/event-stream";
    streams::events_arrive_at_once(&haproxy(|text| text.replace("mode http", compressing))?)
}

#[test]
fn comments_outlive_the_timeouts_for_silence() -> Result<()> {
    let shorter = |text: String| {
        text.replace("timeout client 60s", "timeout client 17s")
            .replace("timeout server 60s", "timeout server 17s")
    };
    streams::silence_is_survived(&haproxy(shorter)?)
}

#[test]
fn timeouts_below_the_comments_end_streams() -> Result<()> {
    let front = haproxy(|text| text.replace("timeout server 60s", "timeout server 2s"))?;
    ensure!(streams::silence_is_survived(&front).is_err(), "HAProxy does not end silent streams");
    Ok(())
}

#[test]
fn a_thousand_streams_are_carried() -> Result<()> {
    streams::a_thousand_streams_are_carried(&haproxy(|text| text)?, streams::OPENING)
}

#[test]
fn with_fewer_connections_they_are_not() -> Result<()> {
    let front = haproxy(|text| text.replace("maxconn 9000", "maxconn 500"))?;
    ensure!(
        streams::a_thousand_streams_are_carried(&front, streams::REFUSED_WITHIN).is_err(),
        "500 connections are enough"
    );
    Ok(())
}
