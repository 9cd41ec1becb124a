//! What writers and readers do, and the requests that they record in the history.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::run::Run;
use super::schedule::{self, CONVERSATIONS, REQUEST_TIMEOUT, RelativePage};
use super::system::lock;
use super::{Action, Message, Operation, Outcome, Page};
use crate::User;
use crate::http::{Client, RequestError, Response};

/// After a failed request, so that clients of a replica that is down do not spin.
pub(super) const BACK_OFF: Duration = Duration::from_millis(20);

/// The longest that a client goes on repeating a message.
const RETRY_LIMIT: Duration = Duration::from_secs(20);

impl Run<'_> {
    pub(super) fn write(&self, client: u32) {
        let conversation = client as usize / 2;
        let [sender, recipient] = self.users(conversation, client as usize % 2);
        let mut user_client = UserClient::new(self, client, sender, recipient, conversation);
        for index in 0.. {
            if self.end.load(Ordering::Relaxed) {
                return;
            }
            let step = schedule::write_step(self.options.plan, self.options.seed, client, index);
            self.idle(step.pause);
            let content = format!("{client}.{index} {}", "x".repeat(step.padding)).trim_end().to_owned();
            let keyed = step.retries.is_some();
            let mut acknowledged = user_client.send(step.replica, &content, keyed, step.timeout);
            let deadline = Instant::now() + RETRY_LIMIT;
            for replica in step.retries.iter().flatten().cycle() {
                if acknowledged || Instant::now() >= deadline {
                    break;
                }
                acknowledged = user_client.send(*replica, &content, keyed, REQUEST_TIMEOUT);
            }
            if !acknowledged {
                continue;
            }
            for replica in step.reads_after {
                // Its outcome is in the history.
                let _ = user_client.read(replica, Page::Offset { offset: 0, limit: 5 });
            }
            if let Some(replica) = step.repeated_on {
                user_client.send(replica, &content, keyed, REQUEST_TIMEOUT);
            }
        }
    }

    /// Returns early once the end has come.
    fn idle(&self, time: Duration) {
        const SLICE: Duration = Duration::from_millis(500);
        let until = Instant::now() + time;
        while !self.end.load(Ordering::Relaxed) {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            thread::sleep(left.min(SLICE));
        }
    }

    pub(super) fn read(&self, client: u32) {
        let mut clients: Vec<[UserClient<'_>; 2]> = (0..CONVERSATIONS.len())
            .map(|conversation| {
                [0, 1].map(|side| {
                    let [reader, peer] = self.users(conversation, side);
                    UserClient::new(self, client, reader, peer, conversation)
                })
            })
            .collect();
        for index in 0.. {
            if self.end.load(Ordering::Relaxed) {
                return;
            }
            let step = schedule::read_step(self.options.seed, client, index);
            thread::sleep(step.pause);
            let user_client = &mut clients[step.conversation][step.side];
            for (replica, page) in step.reads {
                let newest = self.newest[step.conversation].load(Ordering::Relaxed);
                let page = match page {
                    RelativePage::Newest { offset, limit } => Page::Offset { offset, limit },
                    RelativePage::Before { back, limit } => {
                        Page::Before { seq: (newest - back).max(1), limit }
                    }
                    RelativePage::After { back, limit } => Page::After { seq: (newest - back).max(0), limit },
                };
                let _ = user_client.read(replica, page);
            }
        }
    }
}

/// One user of a conversation, with a connection to each replica. It records what it does in the history.
pub(super) struct UserClient<'a> {
    run: &'a Run<'a>,
    client: u32,
    user: &'a User,
    /// The user's id, and the number of the token's session.
    id: Arc<str>,
    session: u32,
    peer: &'a User,
    conversation: usize,
    connections: Vec<Client>,
}

impl<'a> UserClient<'a> {
    pub(super) fn new(
        run: &'a Run<'a>,
        client: u32,
        user: &'a User,
        peer: &'a User,
        conversation: usize,
    ) -> Self {
        let connections = run.system.replicas.iter().map(|replica| Client::new(replica.public)).collect();
        // All clients of a user have the token of its one session.
        let session = run.system.users.iter().position(|one| one.id == user.id).unwrap_or_default() as u32;
        Self { run, client, user, id: Arc::from(&*user.id), session, peer, conversation, connections }
    }

    /// Whether it was acknowledged.
    fn send(&mut self, replica: usize, content: &str, keyed: bool, timeout: Duration) -> bool {
        let body = format!(r#"{{"recipient_id":"{}","content":"{content}"}}"#, self.peer.id);
        let key = content.split(' ').next().unwrap_or(content);
        let authorization = format!("Bearer {}", self.user.token);
        let mut headers = vec![("authorization", &*authorization)];
        if keyed {
            headers.push(("idempotency-key", key));
        }
        let start = self.run.now();
        let response = self.connections[replica].request("POST", "/send", &headers, &body, timeout);
        let end = self.run.now();
        let mut history = lock(&self.run.history);
        let outcome = match response {
            Ok(response) if response.status == 201 => {
                let replayed = response.header("idempotency-replayed") == Some("true");
                match serde_json::from_slice(&response.body).ok().as_ref().and_then(message) {
                    Some(message) => {
                        self.run.newest[self.conversation].fetch_max(message.seq, Ordering::Relaxed);
                        Outcome::Acknowledged { message: history.intern(message), replayed }
                    }
                    None => wrong(201, &response.body),
                }
            }
            Ok(response) if response.status == 503 => Outcome::Unknown("503"),
            Ok(response) => wrong(response.status, &response.body),
            Err(error) => Outcome::Unknown(error.reason()),
        };
        let acknowledged = matches!(outcome, Outcome::Acknowledged { .. });
        let lost = matches!(outcome, Outcome::Unknown(_));
        let action = Action::Send { content: content.to_owned(), keyed };
        history.operations.push(self.operation(replica, start, end, action, outcome));
        drop(history);
        if lost {
            thread::sleep(BACK_OFF);
        }
        acknowledged
    }

    /// The oldest seq of the page, unless it is empty; the error says why there is no page.
    pub(super) fn read(&mut self, replica: usize, page: Page) -> Result<Option<i64>, &'static str> {
        let query = match page {
            Page::Offset { offset: 0, limit } => format!("limit={limit}"),
            Page::Offset { offset, limit } => format!("limit={limit}&offset={offset}"),
            Page::Before { seq, limit } => format!("limit={limit}&before={seq}"),
            Page::After { seq, limit } => format!("limit={limit}&after={seq}"),
        };
        let path = format!("/messages?peer_id={}&{query}", self.peer.id);
        let authorization = format!("Bearer {}", self.user.token);
        let headers = [("authorization", &*authorization)];
        let start = self.run.now();
        let response = self.connections[replica].request("GET", &path, &headers, "", REQUEST_TIMEOUT);
        let end = self.run.now();
        let (outcome, oldest) = self.page(response);
        let lost = if let Outcome::Unknown(reason) = outcome { Some(reason) } else { None };
        let operation = self.operation(replica, start, end, Action::Read(page), outcome);
        lock(&self.run.history).operations.push(operation);
        if let Some(reason) = lost {
            thread::sleep(BACK_OFF);
            return Err(reason);
        }
        Ok(oldest)
    }

    fn page(&self, response: Result<Response, RequestError>) -> (Outcome, Option<i64>) {
        let response = match response {
            Ok(response) if response.status == 200 => response,
            Ok(response) if response.status == 503 => return (Outcome::Unknown("503"), None),
            Ok(response) => return (wrong(response.status, &response.body), None),
            Err(error) => return (Outcome::Unknown(error.reason()), None),
        };
        let stale = response.header("warning").is_some_and(|warning| warning.starts_with("110"));
        let next = response.header("link").is_some_and(|link| link.contains("rel=\"next\""));
        let parsed: Option<Vec<Message>> = serde_json::from_slice::<Value>(&response.body)
            .ok()
            .and_then(|page| page.as_array()?.iter().map(message).collect());
        let Some(parsed) = parsed else { return (wrong(200, &response.body), None) };
        let oldest = parsed.last().map(|message| message.seq);
        if let Some(newest) = parsed.first() {
            self.run.newest[self.conversation].fetch_max(newest.seq, Ordering::Relaxed);
        }
        let mut history = lock(&self.run.history);
        let messages = parsed.into_iter().map(|message| history.intern(message)).collect();
        (Outcome::Page { messages, stale, next }, oldest)
    }

    fn operation(
        &self,
        replica: usize,
        start: Duration,
        end: Duration,
        action: Action,
        outcome: Outcome,
    ) -> Operation {
        Operation {
            client: self.client,
            user: Arc::clone(&self.id),
            session: self.session,
            replica,
            conversation: self.conversation,
            start,
            end,
            action,
            outcome,
        }
    }
}

fn wrong(status: u16, body: &[u8]) -> Outcome {
    Outcome::Wrong(format!("{status} {}", String::from_utf8_lossy(&body[..body.len().min(300)])))
}

/// The message in a JSON value, if it has all of a message's fields.
pub(super) fn message(value: &Value) -> Option<Message> {
    let text = |name: &str| value[name].as_str().map(str::to_owned);
    Some(Message {
        id: text("id")?,
        seq: value["seq"].as_i64()?,
        sender: text("sender_id")?,
        recipient: text("recipient_id")?,
        content: text("content")?,
        // The rest is compared with what Postgres says, digit by digit.
        created_at: text("created_at")?.strip_suffix('Z')?.to_owned(),
        erased: value["erased"].as_bool().unwrap_or(false),
    })
}
