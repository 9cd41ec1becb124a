//! A serving process, the requests that tests send it, and their responses.

use std::net::SocketAddr;
use std::sync::LazyLock;

use anyhow::{Context as _, Result, ensure};
use reqwest::blocking::{Client, RequestBuilder};
use reqwest::header::HeaderMap;
use rustix::process::Signal;
use serde_json::{Value, json};
use tests::servers::daemon;
use tests::{PASSWORD, User};

use super::process::Process;
use super::{LIMIT, eventually};

/// It opens a connection per request: a kept connection may belong to a process that a test has restarted.
static CLIENT: LazyLock<Client> = LazyLock::new(|| {
    let client = Client::builder().timeout(LIMIT).pool_max_idle_per_host(0).no_proxy();
    client.build().expect("a plain client can be built")
});

/// A process that listens.
#[derive(Debug)]
pub(crate) struct Service {
    pub(crate) process: Process,
    pub(crate) public: SocketAddr,
    pub(crate) operations: SocketAddr,
}

/// A whole response.
#[derive(Debug)]
pub(crate) struct Response {
    pub(crate) status: u16,
    pub(crate) headers: HeaderMap,
    pub(crate) body: String,
}

impl Response {
    pub(crate) fn of(request: RequestBuilder) -> Result<Self> {
        let response = request.send()?;
        let (status, headers) = (response.status().as_u16(), response.headers().clone());
        Ok(Self { status, headers, body: response.text()? })
    }

    pub(crate) fn json(&self) -> Result<Value> {
        serde_json::from_str(&self.body).with_context(|| format!("not JSON: {}", self.body))
    }

    pub(crate) fn header(&self, name: &str) -> &str {
        self.headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default()
    }

    /// The response, if it has this status.
    pub(crate) fn expect(self, status: u16) -> Result<Self> {
        ensure!(self.status == status, "{} instead of {status}: {}", self.status, self.body);
        Ok(self)
    }

    /// The contents of a page of messages.
    pub(crate) fn contents(&self) -> Result<Vec<String>> {
        let page = self.json()?;
        let text = |message: &Value| message["content"].as_str().map(str::to_owned);
        page.as_array().context("an array")?.iter().map(|message| text(message).context("content")).collect()
    }

    /// Checks that this is the service's 503.
    pub(crate) fn is_unavailable(&self) -> Result<()> {
        ensure!(self.status == 503, "{}: {}", self.status, self.body);
        ensure!(self.header("content-type") == "application/problem+json", "{self:?}");
        let seconds: u64 = self.header("retry-after").parse().context("Retry-After")?;
        ensure!(seconds >= 1, "{self:?}");
        let problem = self.json()?;
        ensure!(
            problem["status"] == 503 && problem["request_id"] == self.header("x-request-id"),
            "{problem}"
        );
        Ok(())
    }
}

impl Service {
    pub(crate) fn get(&self, path: &str) -> RequestBuilder {
        CLIENT.get(format!("http://{}{path}", reachable(self.public)))
    }

    pub(crate) fn post(&self, path: &str, body: &Value) -> RequestBuilder {
        CLIENT.post(format!("http://{}{path}", reachable(self.public))).json(body)
    }

    /// A path of the operations port.
    pub(crate) fn operations(&self, path: &str) -> Result<Response> {
        Response::of(CLIENT.get(format!("http://{}{path}", reachable(self.operations))))
    }

    /// The status code and the status of readiness, on the operations port.
    pub(crate) fn health(&self) -> Result<(u16, String)> {
        let answer = self.operations("/healthz")?;
        Ok((answer.status, answer.json()?["status"].as_str().unwrap_or_default().to_owned()))
    }

    /// Waits until readiness is `ok`, `degraded` or `unavailable`.
    pub(crate) fn becomes(&self, status: &str) -> Result<()> {
        eventually(&format!("/healthz to say {status}; {}", self.process.said()), || {
            self.health().ok().filter(|(_, found)| found == status)
        })?;
        Ok(())
    }

    /// Registers a user and logs in.
    pub(crate) fn user(&self, name: &str) -> Result<User> {
        let email = format!("{name}@example.com");
        let body = json!({"username": name, "email": email, "password": PASSWORD});
        let user = Response::of(self.post("/register", &body))?.expect(201)?.json()?;
        let id = user["id"].as_str().context("an id")?.to_owned();
        Ok(User { id, name: name.to_owned(), token: self.log_in(name)? })
    }

    pub(crate) fn log_in(&self, name: &str) -> Result<String> {
        let body = json!({"username": name, "password": PASSWORD});
        let token = Response::of(self.post("/login", &body))?.expect(200)?.json()?;
        Ok(token["access_token"].as_str().context("a token")?.to_owned())
    }

    pub(crate) fn two_users(&self) -> Result<(User, User)> {
        Ok((self.user("ana")?, self.user("ben")?))
    }

    /// Two users with three messages from the first to the second, whose window is in use.
    pub(crate) fn conversation(&self) -> Result<(User, User)> {
        let (from, to) = self.two_users()?;
        for content in ["first", "second", "third"] {
            self.send(&from, &to, content)?.expect(201)?;
        }
        self.hit(&from, &to, 3)?;
        Ok((from, to))
    }

    pub(crate) fn me(&self, token: &str) -> Result<Response> {
        Response::of(self.get("/me").bearer_auth(token))
    }

    pub(crate) fn send(&self, from: &User, to: &User, content: &str) -> Result<Response> {
        let body = json!({"recipient_id": to.id, "content": content});
        Response::of(self.post("/send", &body).bearer_auth(&from.token))
    }

    pub(crate) fn read(&self, reader: &User, peer: &User, limit: usize) -> Result<Response> {
        let query = [("peer_id", peer.id.clone()), ("limit", limit.to_string())];
        Response::of(self.get("/messages").query(&query).bearer_auth(&reader.token))
    }

    /// A page that was answered from the window, as the metrics say: the first reads only fill it. All pages until then
    /// have to be the same.
    pub(crate) fn hit(&self, reader: &User, peer: &User, limit: usize) -> Result<Response> {
        let mut first = None;
        let hit = daemon::poll(LIMIT, || {
            let before = self.metric("chat_cache_lookups_total{outcome=\"hit\"}")?;
            let page = self.read(reader, peer, limit)?.expect(200)?;
            ensure!(page.header("warning").is_empty(), "{page:?}");
            ensure!(first.get_or_insert_with(|| page.body.clone()) == &page.body, "{first:?}, then {page:?}");
            let after = self.metric("chat_cache_lookups_total{outcome=\"hit\"}")?;
            Ok((after > before).then_some(page))
        })?;
        hit.context("no read is answered from the window")
    }

    /// The contents of the newest messages, newest first.
    pub(crate) fn contents(&self, reader: &User, peer: &User, limit: usize) -> Result<Vec<String>> {
        self.read(reader, peer, limit)?.expect(200)?.contents()
    }

    /// The value of a metric, named with its labels.
    pub(crate) fn metric(&self, name: &str) -> Result<f64> {
        let text = self.operations("/metrics")?.expect(200)?.body;
        let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        value.with_context(|| format!("no metric {name}"))?.parse().context("a number")
    }

    /// Shuts it down gracefully, and returns its log.
    pub(crate) fn stop(mut self) -> Result<String> {
        self.process.signal(Signal::TERM)?;
        let code = self.process.exit(LIMIT)?;
        ensure!(code == 0, "exit code {code}:\n{}", self.process.said());
        Ok(self.process.said())
    }
}

/// The address that a client connects to, where the service listens on all addresses.
fn reachable(mut address: SocketAddr) -> SocketAddr {
    if address.ip().is_unspecified() {
        address.set_ip([127, 0, 0, 1].into());
    }
    address
}
