//! The recipient's stream, followed over broken connections.

use std::time::Duration;

use anyhow::{Result, ensure};
use serde_json::Value;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep};

use super::client::Api;

/// What one event may take.
const EVENT_MAX: usize = 256 * 1024;
const PAUSE: Duration = Duration::from_secs(2);

/// A message's id, and when it arrived.
pub(super) type Arrival = (String, Instant);

#[derive(Debug)]
pub(super) struct Follower {
    api: Api,
    token: watch::Receiver<String>,
    /// How many streams could not be taken up where the last one ended, and whether one is open.
    state: watch::Sender<State>,
    arrivals: mpsc::Sender<Arrival>,
    position: Option<String>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct State {
    pub(super) open: bool,
    pub(super) resets: u64,
}

impl Follower {
    pub(super) fn new(
        api: Api,
        token: watch::Receiver<String>,
        state: watch::Sender<State>,
        arrivals: mpsc::Sender<Arrival>,
    ) -> Self {
        Self { api, token, state, arrivals, position: None }
    }

    pub(super) async fn run(mut self) {
        loop {
            if let Err(error) = self.follow().await {
                eprintln!("canary: stream: {error:#}");
            }
            self.state.send_modify(|state| state.open = false);
            sleep(PAUSE.mul_f64(1.0 + rand::random::<f64>())).await;
        }
    }

    /// Follows one stream to its end.
    async fn follow(&mut self) -> Result<()> {
        let token = self.token.borrow_and_update().clone();
        let mut response = self.api.follow(&token, self.position.as_deref()).await?;
        let mut buffer = Vec::new();
        while let Some(chunk) = response.chunk().await? {
            buffer.extend_from_slice(&chunk);
            while let Some(end) = buffer.windows(2).position(|two| two == b"\n\n") {
                let event: Vec<u8> = buffer.drain(..end + 2).collect();
                self.take(&String::from_utf8_lossy(&event)).await;
            }
            ensure!(buffer.len() < EVENT_MAX, "an event has no end");
        }
        Ok(())
    }

    async fn take(&mut self, event: &str) {
        let field = |name: &str| event.lines().find_map(|line| line.strip_prefix(name));
        if let Some(position) = field("id: ") {
            self.position = Some(position.to_owned());
        }
        match field("event: ") {
            Some("ready") => self.state.send_modify(|state| state.open = true),
            Some("reset") => self.state.send_modify(|state| {
                state.open = true;
                state.resets += 1;
            }),
            Some("message") => {
                let message: Value =
                    field("data: ").and_then(|data| serde_json::from_str(data).ok()).unwrap_or_default();
                if let Some(id) = message["id"].as_str() {
                    // It ends with the canary.
                    let _ = self.arrivals.send((id.to_owned(), Instant::now())).await;
                }
            }
            _ => {}
        }
    }
}
