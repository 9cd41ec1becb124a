//! One round: send, read from both sides, wait for the stream.

use std::collections::VecDeque;
use std::time::Duration;

use anyhow::{Result, bail, ensure};
use rand::distr::{Alphanumeric, SampleString as _};
use serde_json::Value;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep, timeout_at};

use super::client::{Api, Session};
use super::follower::{Arrival, State};
use super::metrics::Metrics;

/// With an interval of 5 s they stay below the limit of sends per minute.
const SENDS: u32 = 3;
const READ_LIMIT: Duration = Duration::from_secs(5);
const READ_PAUSE: Duration = Duration::from_millis(500);
const STREAM_LIMIT: Duration = Duration::from_secs(30);
/// So many of the last acknowledged messages must be in every read.
const REMEMBERED: usize = 20;

#[derive(Debug)]
struct Sent {
    id: String,
    content: String,
}

#[derive(Debug)]
pub(super) struct Canary<'a> {
    api: Api,
    metrics: &'a Metrics,
    sender: Session,
    pub(super) recipient: Session,
    state: watch::Receiver<State>,
    arrivals: mpsc::Receiver<Arrival>,
    acknowledged: VecDeque<Sent>,
}

impl<'a> Canary<'a> {
    pub(super) fn new(
        api: Api,
        metrics: &'a Metrics,
        (sender, recipient): (Session, Session),
        state: watch::Receiver<State>,
        arrivals: mpsc::Receiver<Arrival>,
    ) -> Self {
        Self { api, metrics, sender, recipient, state, arrivals, acknowledged: VecDeque::new() }
    }

    pub(super) async fn renew(&mut self) -> Result<()> {
        self.api.renew(&mut self.sender).await?;
        self.api.renew(&mut self.recipient).await
    }

    pub(super) async fn round(&mut self) {
        let outcome = self.steps().await;
        if let Err((step, error)) = &outcome {
            eprintln!("canary: {step}: {error:#}");
            self.metrics.failed(step);
        }
        self.metrics.round(outcome.is_ok());
    }

    async fn steps(&mut self) -> Result<(), (&'static str, anyhow::Error)> {
        let open = self.state.wait_for(|state| state.open);
        let ready = timeout_at(Instant::now() + STREAM_LIMIT, open).await;
        let before = ready.ok().and_then(Result::ok).map(|state| *state);
        let started = Instant::now();
        let id = self.send().await.map_err(|error| ("send", error))?;
        self.metrics.observe("send", started.elapsed().as_secs_f64());
        // Both, whatever the other says.
        let read = self.read().await;
        if read.is_ok() {
            self.metrics.observe("read", started.elapsed().as_secs_f64());
        }
        let arrived = self.arrived(&id, before, started).await;
        read.map_err(|error| ("read", error))?;
        arrived.map_err(|error| ("stream", error))
    }

    /// Sends under one key until the message is acknowledged.
    async fn send(&mut self) -> Result<String> {
        let key = Alphanumeric.sample_string(&mut rand::rng(), 24);
        let content = format!("canary {key}");
        let mut attempt = 1;
        let id = loop {
            match self.api.send(&self.sender, &self.recipient, &content, &key).await {
                Ok(id) => break id,
                Err(error) if attempt == SENDS => return Err(error),
                Err(_) => {}
            }
            sleep(Duration::from_secs(attempt.into()).mul_f64(1.0 + rand::random::<f64>())).await;
            attempt += 1;
        };
        self.acknowledged.push_front(Sent { id: id.clone(), content });
        self.acknowledged.truncate(REMEMBERED);
        Ok(id)
    }

    /// Both sides read each acknowledged message once.
    async fn read(&mut self) -> Result<()> {
        let deadline = Instant::now() + READ_LIMIT;
        loop {
            let sides = [(&self.sender, &self.recipient), (&self.recipient, &self.sender)];
            let mut wrong = Vec::new();
            for (caller, peer) in sides {
                let page = self.api.read(caller, peer).await?;
                wrong.extend(
                    self.acknowledged
                        .iter()
                        .filter(|sent| !is_there_once(&page, sent))
                        .map(|sent| sent.id.clone()),
                );
            }
            if wrong.is_empty() {
                return Ok(());
            }
            if Instant::now() >= deadline {
                wrong.sort_unstable();
                wrong.dedup();
                // Each is counted once.
                self.acknowledged.retain(|sent| !wrong.contains(&sent.id));
                self.metrics.lost.inc_by(wrong.len() as u64);
                bail!("acknowledged messages are lost or doubled: {}", wrong.join(", "));
            }
            sleep(READ_PAUSE).await;
        }
    }

    async fn arrived(&mut self, id: &str, before: Option<State>, started: Instant) -> Result<()> {
        ensure!(before.is_some(), "the recipient's stream does not open");
        let deadline = Instant::now() + STREAM_LIMIT;
        while let Ok(Some((arrived, at))) = timeout_at(deadline, self.arrivals.recv()).await {
            if arrived == id {
                self.metrics.observe("stream", at.duration_since(started).as_secs_f64());
                return Ok(());
            }
        }
        // A stream that was broken, or not taken up, may lack the message.
        let now = *self.state.borrow();
        ensure!(before == Some(now), "message {id} has not arrived, and the stream was interrupted");
        self.metrics.lost.inc();
        bail!("acknowledged message {id} has not arrived on the stream");
    }
}

/// Once under its id, and its content under no other.
fn is_there_once(page: &[Value], sent: &Sent) -> bool {
    let mut same = page.iter().filter(|message| message["content"] == *sent.content);
    same.next().is_some_and(|message| message["id"] == *sent.id) && same.next().is_none()
}
