//! A client of `GET /stream`.

use std::time::Duration;

use serde_json::Value;

use super::{TestApp, User, text};

/// How long an event may take, unless a test says otherwise.
const LIMIT: Duration = Duration::from_secs(20);

/// An open stream.
pub(crate) struct Follower {
    pub(crate) response: reqwest::Response,
    received: Vec<u8>,
    /// What a client sends as `Last-Event-ID`.
    pub(crate) last_id: String,
    pub(crate) retry: Option<u64>,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Event {
    pub(crate) name: String,
    pub(crate) id: Option<String>,
    pub(crate) data: Value,
}

impl TestApp {
    pub(crate) async fn follow(&self, user: &User, position: Option<&str>) -> Follower {
        let request = self.follow_request(&user.token, position);
        let response = request.send().await.expect("the service answers");
        assert_eq!(response.status(), 200);
        Follower { response, received: Vec::new(), last_id: String::new(), retry: None }
    }

    pub(crate) fn follow_request(&self, token: &str, position: Option<&str>) -> reqwest::RequestBuilder {
        let request = reqwest::Client::builder().no_proxy().build().expect("a client");
        let request = request.get(format!("http://{}/stream", self.running.public)).bearer_auth(token);
        match position {
            Some(position) => request.header("last-event-id", position),
            None => request,
        }
    }
}

impl Follower {
    /// The next event; `None` at the end of the response.
    pub(crate) async fn next(&mut self) -> Option<Event> {
        tokio::time::timeout(LIMIT, self.read()).await.expect("an event in time")
    }

    /// The next event, if it comes within this time.
    pub(crate) async fn next_within(&mut self, limit: Duration) -> Option<Event> {
        tokio::time::timeout(limit, self.read()).await.ok().flatten()
    }

    async fn read(&mut self) -> Option<Event> {
        loop {
            let block = self.block().await?;
            let mut event = Event { name: String::new(), id: None, data: Value::Null };
            for line in block.trim_end().lines() {
                match line.split_once(": ") {
                    Some(("event", name)) => name.clone_into(&mut event.name),
                    Some(("id", id)) => event.id = Some(id.to_owned()),
                    Some(("data", data)) => event.data = serde_json::from_str(data).expect("JSON"),
                    Some(("retry", delay)) => self.retry = Some(delay.parse().expect("a delay")),
                    _ => assert_eq!(line, ":", "an unknown line"),
                }
            }
            if let Some(id) = &event.id {
                self.last_id.clone_from(id);
            }
            if !event.name.is_empty() {
                return Some(event);
            }
        }
    }

    /// What lies before the next empty line.
    async fn block(&mut self) -> Option<String> {
        loop {
            if let Some(end) = self.received.windows(2).position(|pair| pair == b"\n\n") {
                let rest = self.received.split_off(end + 2);
                let block = std::mem::replace(&mut self.received, rest);
                return Some(String::from_utf8(block).expect("UTF-8"));
            }
            match self.response.chunk().await {
                Ok(Some(bytes)) => self.received.extend_from_slice(&bytes),
                Ok(None) | Err(_) => return None,
            }
        }
    }

    /// The first event, which must be `ready`. Says whether the position was taken up.
    pub(crate) async fn ready(&mut self) -> bool {
        let event = self.next().await.expect("an event");
        assert_eq!(event.name, "ready", "{event:?}");
        assert_eq!(event.id.as_deref(), event.data["position"].as_str());
        event.data["resumed"].as_bool().expect("resumed")
    }

    /// The next event, which must be a message.
    pub(crate) async fn message(&mut self) -> Value {
        let event = self.next().await.expect("an event");
        assert_eq!(event.name, "message", "{event:?}");
        assert!(event.id.is_some_and(|id| !id.is_empty()), "a message without a position");
        event.data
    }

    /// The contents of the next messages.
    pub(crate) async fn contents(&mut self, count: usize) -> Vec<String> {
        let mut contents = Vec::with_capacity(count);
        for _ in 0..count {
            contents.push(text(&self.message().await, "content"));
        }
        contents
    }

    /// Fails if a message comes now.
    pub(crate) async fn nothing_more(&mut self) {
        let more = self.next_within(Duration::from_millis(400)).await;
        assert_eq!(more, None, "an unexpected event");
    }

    /// The last event, which says why, and then the end of the response.
    pub(crate) async fn end(&mut self) -> String {
        let event = self.next().await.expect("an event");
        assert_eq!(event.name, "end", "{event:?}");
        assert!(self.retry.is_some(), "no retry: before the end");
        assert_eq!(self.next().await, None, "something follows the end");
        text(&event.data, "reason")
    }
}
