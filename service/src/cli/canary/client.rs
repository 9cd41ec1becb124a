//! The canary's accounts as clients of the API.

use std::cell::Cell;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use reqwest::header::RETRY_AFTER;
use reqwest::{Client, RequestBuilder, Response, Url};
use serde_json::{Value, json};
use tokio::time::Instant;

use crate::cli::answer::{Answer, address, text};

/// Longer than the service's own request timeout, so that its answer arrives before this timeout.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(15);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// A stream has a comment every 15 s at the latest.
const SILENCE: Duration = Duration::from_secs(20);

#[derive(Clone, Debug)]
pub(super) struct Api {
    client: Client,
    base: Url,
}

/// An account that is logged in.
#[derive(Debug)]
pub(super) struct Session {
    pub(super) id: String,
    pub(super) token: String,
    refresh: String,
    /// When its tokens are exchanged: after half their time, or once one is refused.
    renew: Cell<Instant>,
}

impl Api {
    pub(super) fn new(base: &Url) -> Result<Self> {
        let mut client = Client::builder().connect_timeout(CONNECT_TIMEOUT).read_timeout(SILENCE).no_proxy();
        if base.scheme() == "http" {
            // Plain HTTP needs no certificate authorities, and a client that loads them fails where none are installed.
            client = client.tls_certs_only([]);
        }
        Ok(Self { client: client.build()?, base: base.clone() })
    }

    /// Logs in; registers the account first where it is unknown.
    pub(super) async fn log_in(&self, name: &str, password: &str) -> Result<Session> {
        let login = json!({"username": name, "password": password});
        let mut answer = self.answer(self.post(&["login"], &login)).await?;
        if answer.status == 401 {
            let account =
                json!({"username": name, "email": format!("{name}@canary.example"), "password": password});
            let registered = self.answer(self.post(&["register"], &account)).await?;
            if registered.status == 409 {
                bail!(
                    "{name} exists, and CANARY_PASSWORD is not its password: set the password that it was registered \
                     with, or delete the account with `chat-service admin user delete {name}`"
                );
            }
            registered.expect(201)?;
            answer = self.answer(self.post(&["login"], &login)).await?;
        }
        let tokens = answer.expect(200)?;
        let mut session = session(&tokens)?;
        let me = self.answer_to(&session, self.get(&["me"])).await?.expect(200)?;
        session.id = text(&me, "id")?;
        Ok(session)
    }

    /// Exchanges the tokens when it is time.
    pub(super) async fn renew(&self, old: &mut Session) -> Result<()> {
        if Instant::now() < old.renew.get() {
            return Ok(());
        }
        let request = self.post(&["refresh"], &json!({"refresh_token": old.refresh}));
        let new = session(&self.answer(request).await?.expect(200)?)?;
        let id = std::mem::take(&mut old.id);
        *old = Session { id, ..new };
        Ok(())
    }

    pub(super) async fn send(
        &self,
        from: &Session,
        to: &Session,
        content: &str,
        key: &str,
    ) -> Result<String> {
        let body = json!({"recipient_id": to.id, "content": content});
        let request = self.post(&["send"], &body).header("idempotency-key", key);
        text(&self.answer_to(from, request).await?.expect(201)?, "id")
    }

    /// The newest messages of a conversation: more than a recent window has by default, so that Postgres is asked.
    pub(super) async fn read(&self, caller: &Session, peer: &Session) -> Result<Vec<Value>> {
        let query = [("peer_id", peer.id.as_str()), ("limit", "100")];
        let page = self.answer_to(caller, self.get(&["messages"]).query(&query)).await?.expect(200)?;
        page.as_array().cloned().context("the conversation is no list")
    }

    /// Opens the stream behind a position.
    pub(super) async fn follow(&self, token: &str, position: Option<&str>) -> Result<Response> {
        let mut request = self.client.get(address(&self.base, &["stream"])).bearer_auth(token);
        if let Some(position) = position {
            request = request.header("last-event-id", position);
        }
        Ok(request.send().await?.error_for_status()?)
    }

    fn get(&self, path: &[&str]) -> RequestBuilder {
        self.client.get(address(&self.base, path)).timeout(REQUEST_TIMEOUT)
    }

    fn post(&self, path: &[&str], body: &Value) -> RequestBuilder {
        self.client.post(address(&self.base, path)).timeout(REQUEST_TIMEOUT).json(body)
    }

    /// A session that has ended is found out at once: the key of the tokens may be a new one.
    async fn answer_to(&self, session: &Session, request: RequestBuilder) -> Result<Answer> {
        let answer = self.answer(request.bearer_auth(&session.token)).await?;
        if answer.status == 401 {
            session.renew.set(Instant::now());
        }
        Ok(answer)
    }

    async fn answer(&self, request: RequestBuilder) -> Result<Answer> {
        let response = request.send().await.with_context(|| {
            format!("no answer from {}: start the service there, or correct --url", self.base)
        })?;
        let (status, url) = (response.status().as_u16(), response.url().clone());
        let retry_after =
            response.headers().get(RETRY_AFTER).and_then(|value| value.to_str().ok()).map(str::to_owned);
        let body = response.text().await.with_context(|| format!("{url}: the answer breaks off"))?;
        Ok(Answer { url, status, retry_after, body })
    }
}

fn session(tokens: &Value) -> Result<Session> {
    let seconds = tokens["expires_in"].as_u64().context("the answer has no expires_in")?;
    Ok(Session {
        id: String::new(),
        token: text(tokens, "access_token")?,
        refresh: text(tokens, "refresh_token")?,
        renew: Cell::new(Instant::now() + Duration::from_secs(seconds / 2)),
    })
}
