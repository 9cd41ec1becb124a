//! Conversations that remember every acknowledged message, and count every failed request.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use harness::User;
use harness::http::Client;
use serde_json::{Value, json};

/// One of so many requests uses a new connection.
const FRESH_EVERY: usize = 4;
const FAILURES_SHOWN: usize = 8;

/// Two users and their conversation.
#[derive(Debug)]
pub struct Pair {
    users: [User; 2],
    /// What was acknowledged: the message with `seq` N stands at N - 1.
    contents: Vec<String>,
}

/// The outcome of all requests.
#[derive(Debug, Default)]
pub struct Report {
    pub requests: usize,
    pub failures: Vec<String>,
    pub slowest: Duration,
}

impl Report {
    /// A summary, or the failures as an error.
    pub fn verdict(&self) -> Result<String> {
        let Self { requests, failures, slowest } = self;
        if !failures.is_empty() {
            let shown = failures.iter().take(FAILURES_SHOWN).map(|line| format!("\n    {line}"));
            bail!("{} of {requests} requests failed:{}", failures.len(), shown.collect::<String>());
        }
        ensure!(*requests > 0, "no request was made");
        Ok(format!("{requests} requests, none failed, the slowest {:.0} ms", slowest.as_secs_f64() * 1e3))
    }
}

impl Pair {
    /// Registers both and logs them in.
    pub fn new(service: SocketAddr, name: &str) -> Result<Self> {
        let user = |side: &str| User::register(service, &format!("{name}-{side}"));
        Ok(Self { users: [user("a")?, user("b")?], contents: Vec::new() })
    }

    pub fn log_in(&mut self, service: SocketAddr) -> Result<()> {
        self.users.iter_mut().try_for_each(|user| user.log_in(service))
    }

    pub fn token(&self) -> &str {
        &self.users[0].token
    }

    /// Reads the whole conversation, upwards from its beginning: every acknowledged message once and in
    /// sequence. It may end with one more, whose answer was lost.
    pub fn verify(&mut self, address: SocketAddr) -> Result<usize> {
        let mut client = Client::new(address);
        let mut seen = 0;
        loop {
            let path = format!("/messages?peer_id={}&limit=100&after={seen}", self.users[1].id);
            let page = client.expect(200, "GET", &path, Some(&self.users[0].token), "")?;
            let page = page.as_array().context("a page is an array")?;
            // Newest first.
            for message in page.iter().rev() {
                let (seq, content) = (message["seq"].as_u64(), text(message, "content")?);
                ensure!(seq == Some(seen as u64 + 1), "after seq {seen} comes {seq:?}");
                match self.contents.get(seen) {
                    Some(acknowledged) => {
                        ensure!(
                            *acknowledged == content,
                            "seq {} is {content}, not {acknowledged}",
                            seen + 1
                        );
                    }
                    // Committed, but its answer was lost: counted as a failure there.
                    None => self.contents.push(content),
                }
                seen += 1;
            }
            if page.is_empty() {
                break;
            }
        }
        ensure!(seen >= self.contents.len(), "{} of {} messages are lost", self.contents.len() - seen, seen);
        Ok(seen)
    }

    /// Sends and reads until `stop` is set.
    fn talk(&mut self, address: SocketAddr, pause: Duration, stop: &AtomicBool) -> Report {
        let mut report = Report::default();
        let mut kept = Client::new(address);
        let begun = Instant::now();
        while !stop.load(Ordering::Relaxed) {
            let fresh = report.requests % FRESH_EVERY == FRESH_EVERY - 1;
            let mut other = Client::new(address);
            let client = if fresh { &mut other } else { &mut kept };
            let started = Instant::now();
            let outcome = match report.requests % 6 {
                2 => self.read(client, false),
                5 => self.read(client, true),
                _ => self.send(client),
            };
            report.slowest = report.slowest.max(started.elapsed());
            report.requests += 1;
            if let Err(error) = outcome {
                let connection = if fresh { "fresh" } else { "kept" };
                let at = begun.elapsed().as_secs_f64();
                report.failures.push(format!("{at:.1} s: {error:#} ({connection} connection)"));
                // Many failures of one outage say no more than a few.
                thread::sleep(Duration::from_millis(100));
                // It shows whether the message without an answer was stored.
                let _ = self.verify(address);
            }
            thread::sleep(pause);
        }
        report
    }

    fn send(&mut self, client: &mut Client) -> Result<()> {
        let number = self.contents.len();
        let from = number % 2;
        let content = format!("{} says {number}", self.users[from].name);
        let body = json!({"recipient_id": self.users[1 - from].id, "content": content}).to_string();
        let message = client.expect(201, "POST", "/send", Some(&self.users[from].token), &body)?;
        let seq = message["seq"].as_u64();
        // No other client writes to this conversation.
        self.contents.push(content);
        ensure!(seq == Some(number as u64 + 1), "seq {seq:?} follows {number}");
        Ok(())
    }

    /// Reads the newest message, from the window in Redis or from Postgres. It has to be the last acknowledged one.
    fn read(&self, client: &mut Client, from_postgres: bool) -> Result<()> {
        // `before` is never answered by the window.
        let deep = if from_postgres { "&before=1000000" } else { "" };
        let path = format!("/messages?peer_id={}&limit=1{deep}", self.users[1].id);
        let page = client.expect(200, "GET", &path, Some(&self.users[0].token), "")?;
        let newest = page[0]["seq"].as_u64().unwrap_or(0);
        let known = self.contents.len() as u64;
        ensure!(newest >= known, "the newest message is {newest}, though {known} was acknowledged");
        Ok(())
    }
}

/// Runs all conversations while `work` is done.
pub fn during<T>(
    pairs: &mut [Pair],
    address: SocketAddr,
    pause: Duration,
    work: impl FnOnce() -> Result<T>,
) -> Result<(T, Report)> {
    let stop = Arc::new(AtomicBool::new(false));
    thread::scope(|scope| {
        let talkers: Vec<_> = pairs
            .iter_mut()
            .map(|pair| {
                let stop = Arc::clone(&stop);
                scope.spawn(move || pair.talk(address, pause, &stop))
            })
            .collect();
        // Also requests before and after, so that both edges are covered.
        thread::sleep(Duration::from_secs(1));
        let outcome = work();
        thread::sleep(Duration::from_secs(1));
        stop.store(true, Ordering::Relaxed);
        let mut all = Report::default();
        for talker in talkers {
            let report = talker.join().expect("no panic");
            all.requests += report.requests;
            all.failures.extend(report.failures);
            all.slowest = all.slowest.max(report.slowest);
        }
        outcome.map(|value| (value, all))
    })
}

fn text(value: &Value, field: &str) -> Result<String> {
    value[field].as_str().map(str::to_owned).with_context(|| format!("no {field} in {value}"))
}
