//! Exports: their memory, and one whose process is killed.

use std::io::{BufRead as _, BufReader, Read as _};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use reqwest::blocking::RequestBuilder;
use rustix::process::Signal;
use serde_json::Value;

use super::support::{Database, LIMIT, Response, Service, Start, User};

const CONVERSATIONS: usize = 50;
const MESSAGES: usize = 2000;

const GROWTH_MAX_KIB: u64 = 20 * 1024;

fn export(service: &Service, user: &User) -> RequestBuilder {
    service.get("/me/export").bearer_auth(&user.token)
}

fn content(conversation: usize, seq: usize) -> String {
    format!("message {seq} of {conversation} {}", "\u{1f980}\"".repeat(seq % 50))
}

/// Half of the peers have ids below the user's, the others above: the first conversations of an export are those below.
fn fill(database: &Database, user: &User) -> Result<()> {
    database.query(&format!(
        "CREATE TEMP TABLE peers AS
         SELECT n, (CASE WHEN n <= {half} THEN '00000000' ELSE 'ffffffff' END || '-0000-4000-8000-'
                    || lpad(n::text, 12, '0'))::uuid AS id
         FROM generate_series(1, {CONVERSATIONS}) AS n;
         INSERT INTO users SELECT id, 'peer' || n, 'peer' || n, 'peer' || n, 'peer' || n, '' FROM peers;
         INSERT INTO conversations (low_user, high_user, id, last_seq, last_at)
         SELECT least(id, '{user}'), greatest(id, '{user}'), id, {MESSAGES}, now() FROM peers;
         INSERT INTO messages (conversation_id, seq, id, sender_id, content, created_at)
         SELECT p.id, seq, gen_random_uuid(), CASE seq % 2 WHEN 0 THEN p.id ELSE '{user}' END,
                'message ' || seq || ' of ' || n || ' ' || repeat(U&'\\+01F980\"', (seq % 50)::int), now()
         FROM peers p, generate_series(1, {MESSAGES}) AS seq",
        half = CONVERSATIONS / 2,
        user = user.id,
    ))?;
    Ok(())
}

#[test]
#[cfg(target_os = "linux")]
fn an_export_of_100_000_messages_is_whole_and_takes_little_memory() -> Result<()> {
    let database = Database::create()?;
    let service = Start::on(&database).ready()?;
    let ana = service.user("ana")?;
    fill(&database, &ana)?;
    let before = service.process.peak_kib()?;
    let started = Instant::now();
    let response = export(&service, &ana).send()?;
    ensure!(response.status() == 200, "{response:?}");
    let mut lines = BufReader::new(response).lines();
    let mut next = || -> Result<Value> { Ok(serde_json::from_str(&lines.next().context("a line")??)?) };
    for kind in ["user", "session"] {
        ensure!(next()?["type"] == kind, "the line of the {kind}");
    }
    for conversation in 1..=CONVERSATIONS {
        let line = next()?;
        ensure!(line["peer_username"] == format!("peer{conversation}"), "{line}");
        for seq in 1..=MESSAGES {
            let line = next()?;
            ensure!(line["seq"] == seq && line["content"] == content(conversation, seq), "{line}");
        }
    }
    ensure!(lines.next().is_none(), "more lines");
    ensure!(started.elapsed() < LIMIT, "{:?}", started.elapsed());
    let growth = service.process.peak_kib()?.saturating_sub(before);
    ensure!(growth < GROWTH_MAX_KIB, "the export took {growth} KiB");
    Ok(())
}

#[test]
fn the_export_of_a_killed_process_keeps_no_other_from_beginning_for_long() -> Result<()> {
    let database = Database::create()?;
    let start = Start::on(&database);
    let (mut killed, other) = (start.ready()?, start.ready()?);
    let ana = killed.user("ana")?;
    fill(&database, &ana)?;
    let mut running = export(&killed, &ana).send()?;
    running.read_exact(&mut [0; 1024])?;
    killed.process.signal(Signal::KILL)?;
    killed.process.exit(LIMIT)?;
    let refused = Response::of(export(&other, &ana))?.expect(429)?;
    let wait: u64 = refused.header("retry-after").parse().context("Retry-After")?;
    ensure!((1..=60).contains(&wait), "{refused:?}");
    // As if that time had passed.
    let age = Duration::from_secs(wait + 1).as_secs();
    database.query(&format!("UPDATE exports SET expires_at = expires_at - interval '{age} s'"))?;
    Response::of(export(&other, &ana))?.expect(200)?;
    ensure!(database.value("SELECT count(*) FROM exports")? == "0", "the lease is left");
    Ok(())
}
