//! People who talk without a pause, remember every acknowledged message, and forgive no failed request.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use harness::http::{Answer, Client};
use serde_json::{Value, json};

/// Longer than the service's own limit of a request.
const PATIENCE: Duration = Duration::from_secs(15);
/// Of so many requests, one comes over a connection of its own.
const FRESH_EVERY: usize = 4;
const FAILURES_SHOWN: usize = 8;
pub const PASSWORD: &str = "correct horse battery";

/// Two users and their conversation.
#[derive(Debug)]
pub struct Pair {
    names: [String; 2],
    ids: [String; 2],
    tokens: [String; 2],
    /// What was acknowledged: the message with `seq` N stands at N - 1.
    contents: Vec<String>,
}

/// What a load came to.
#[derive(Debug, Default)]
pub struct Report {
    pub requests: usize,
    pub failures: Vec<String>,
    slowest: Duration,
}

impl Report {
    /// A line of it, or what failed.
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
    pub fn new(address: SocketAddr, name: &str) -> Result<Self> {
        let mut client = Client::new(address);
        let mut pair = Self {
            names: ["a", "b"].map(|side| format!("{name}-{side}")),
            ids: Default::default(),
            tokens: Default::default(),
            contents: Vec::new(),
        };
        for side in 0..2 {
            let name = &pair.names[side];
            let body =
                json!({"username": name, "email": format!("{name}@example.com"), "password": PASSWORD});
            let user = expect(&mut client, 201, "POST", "/register", None, &body.to_string())?;
            pair.ids[side] = text(&user, "id")?;
        }
        pair.log_in(address)?;
        Ok(pair)
    }

    pub fn log_in(&mut self, address: SocketAddr) -> Result<()> {
        let mut client = Client::new(address);
        for (name, token) in self.names.iter().zip(&mut self.tokens) {
            let body = json!({"username": name, "password": PASSWORD}).to_string();
            *token = text(&expect(&mut client, 200, "POST", "/login", None, &body)?, "access_token")?;
        }
        Ok(())
    }

    pub fn token(&self) -> &str {
        &self.tokens[0]
    }

    /// Reads the whole conversation, upwards from its beginning: every acknowledged message, once, in order. Then it may
    /// hold one more, if `open`: sent, and never answered.
    pub fn verify(&mut self, address: SocketAddr) -> Result<usize> {
        let mut client = Client::new(address);
        let mut seen = 0;
        loop {
            let path = format!("/messages?peer_id={}&limit=100&after={seen}", self.ids[1]);
            let page = expect(&mut client, 200, "GET", &path, Some(&self.tokens[0]), "")?;
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
                    // Committed, and the answer was lost with its replica: a failure that was counted there.
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

    /// Talks until told to stop.
    fn talk(&mut self, address: SocketAddr, pause: Duration, stop: &AtomicBool) -> Report {
        let mut report = Report::default();
        let mut kept = Client::new(address);
        let begun = Instant::now();
        while !stop.load(Ordering::Relaxed) {
            let fresh = report.requests % FRESH_EVERY == FRESH_EVERY - 1;
            let mut other = Client::new(address);
            let client = if fresh { &mut other } else { &mut kept };
            let started = Instant::now();
            let outcome = if report.requests % 3 == 2 { self.read(client) } else { self.send(client) };
            report.slowest = report.slowest.max(started.elapsed());
            report.requests += 1;
            if let Err(error) = outcome {
                let connection = if fresh { "fresh" } else { "kept" };
                let at = begun.elapsed().as_secs_f64();
                report.failures.push(format!("{at:.1} s: {error:#} ({connection} connection)"));
                // Many failures of one outage tell no more than a few.
                thread::sleep(Duration::from_millis(100));
                // Whether a message without an answer was stored is to be seen.
                let _ = self.verify(address);
            }
            thread::sleep(pause);
        }
        report
    }

    fn send(&mut self, client: &mut Client) -> Result<()> {
        let number = self.contents.len();
        let from = number % 2;
        let content = format!("{} says {number}", self.names[from]);
        let body = json!({"recipient_id": self.ids[1 - from], "content": content}).to_string();
        let message = expect(client, 201, "POST", "/send", Some(&self.tokens[from]), &body)?;
        let seq = message["seq"].as_u64();
        // Nobody else writes to this conversation.
        self.contents.push(content);
        ensure!(seq == Some(number as u64 + 1), "seq {seq:?} follows {number}");
        Ok(())
    }

    /// The newest message, which one has just been told of.
    fn read(&self, client: &mut Client) -> Result<()> {
        let path = format!("/messages?peer_id={}&limit=1", self.ids[1]);
        let page = expect(client, 200, "GET", &path, Some(&self.tokens[0]), "")?;
        let newest = page[0]["seq"].as_u64().unwrap_or(0);
        let known = self.contents.len() as u64;
        ensure!(newest >= known, "the newest message is {newest}, though {known} was acknowledged");
        Ok(())
    }
}

/// Lets all pairs talk while `work` is done.
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
        // Some talk before and after, so that both edges are seen.
        thread::sleep(Duration::from_secs(1));
        let outcome = work();
        thread::sleep(Duration::from_secs(1));
        stop.store(true, Ordering::Relaxed);
        let mut all = Report::default();
        for talker in talkers {
            let report = talker.join().expect("a talker does not panic");
            all.requests += report.requests;
            all.failures.extend(report.failures);
            all.slowest = all.slowest.max(report.slowest);
        }
        outcome.map(|value| (value, all))
    })
}

/// One request; its status has to be the expected one.
pub fn expect(
    client: &mut Client,
    status: u16,
    method: &str,
    path: &str,
    token: Option<&str>,
    body: &str,
) -> Result<Value> {
    let answer = ask(client, method, path, token, body)?;
    let said = String::from_utf8_lossy(&answer.body);
    ensure!(answer.status == status, "{method} {path}: {} {said}", answer.status);
    serde_json::from_str(&said).with_context(|| format!("{method} {path} answers JSON"))
}

pub fn ask(client: &mut Client, method: &str, path: &str, token: Option<&str>, body: &str) -> Result<Answer> {
    let bearer = format!("Bearer {}", token.unwrap_or_default());
    let headers: &[(&str, &str)] = if token.is_some() { &[("authorization", &bearer)] } else { &[] };
    match client.request(method, path, headers, body, PATIENCE) {
        Ok(answer) => Ok(answer),
        Err(lost) => bail!("{method} {path}: {}", lost.reason()),
    }
}

fn text(value: &Value, field: &str) -> Result<String> {
    value[field].as_str().map(str::to_owned).with_context(|| format!("no {field} in {value}"))
}
