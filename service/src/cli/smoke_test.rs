//! `chat-service smoke-test`: two new users exchange messages over the API. `helm test` runs it. It needs no configuration
//! and no shell, only the service's address.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use rand::distr::{Alphanumeric, SampleString as _};
use reqwest::Url;
use reqwest::blocking::{Client, RequestBuilder};
use reqwest::header::RETRY_AFTER;
use serde_json::{Value, json};

use super::answer::{Answer, address, text};

/// Longer than the service's own request timeout, so that its answer arrives before this timeout.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(15);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

#[derive(clap::Args, Clone, Debug)]
pub struct Args {
    /// The address of the service's public port
    #[arg(long, default_value = "http://localhost:8000", value_name = "URL")]
    url: Url,
}

struct Api {
    client: Client,
    base: Url,
}

struct User {
    name: String,
    password: String,
    id: String,
    token: String,
}

/// Registers two users, lets each send one message, and reads the conversation from both sides. The users and their
/// messages stay.
pub fn run(args: &Args) -> Result<()> {
    let mut client = Client::builder().timeout(REQUEST_TIMEOUT).connect_timeout(CONNECT_TIMEOUT).no_proxy();
    if args.url.scheme() == "http" {
        // Plain HTTP needs no certificate authorities, and a client that loads them fails where none are installed.
        client = client.tls_certs_only([]);
    }
    let api = Api { client: client.build()?, base: args.url.clone() };
    let started = Instant::now();
    step("ready", || api.is_ready())?;
    let mut alice = step("register", || api.register())?;
    let mut bob = step("register", || api.register())?;
    step("log in", || api.log_in(&mut alice))?;
    step("log in", || api.log_in(&mut bob))?;
    step("look up", || api.look_up(&alice, &bob))?;
    let question = step("send", || api.send(&alice, &bob, "Are you there?", 1))?;
    let answer = step("reply", || api.send(&bob, &alice, "I am. \u{1F44B}", 2))?;
    let expected = json!([answer, question]);
    step("read as the sender", || api.read(&alice, &bob, &expected))?;
    step("read as the recipient", || api.read(&bob, &alice, &expected))?;
    println!(
        "passed: {} and {} exchanged messages at {} in {} ms",
        alice.name,
        bob.name,
        api.base,
        ms(started)
    );
    Ok(())
}

/// Runs one step and prints it with its time.
fn step<T>(name: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let started = Instant::now();
    let outcome = work();
    let word = if outcome.is_ok() { "ok  " } else { "FAIL" };
    println!("{word}  {name:<21}  {:>5} ms", ms(started));
    outcome.with_context(|| format!("smoke-test: {name}"))
}

fn ms(since: Instant) -> u128 {
    since.elapsed().as_millis()
}

impl Api {
    fn is_ready(&self) -> Result<()> {
        let health = self.ask(self.get(&["healthz"]), 200)?;
        // At a mistyped address another server may answer everything with 200.
        let checks = health["status"].is_string() && health["checks"].is_object();
        ensure!(checks, "{} answers, but not as chat-service does: correct --url", self.base);
        Ok(())
    }

    fn register(&self) -> Result<User> {
        let name = format!("smoke-{}", random(16).to_lowercase());
        let password = random(24);
        let body =
            json!({"username": name, "email": format!("{name}@smoke-test.example"), "password": password});
        let user = self.ask(self.post(&["register"], &body), 201)?;
        let id = text(&user, "id")?;
        Ok(User { name, password, id, token: String::new() })
    }

    fn log_in(&self, user: &mut User) -> Result<()> {
        let body = json!({"username": user.name, "password": user.password});
        let login = self.ask(self.post(&["login"], &body), 200)?;
        user.token = text(&login, "access_token")?;
        Ok(())
    }

    fn look_up(&self, caller: &User, other: &User) -> Result<()> {
        let found = self.ask(self.get(&["users", &other.name]).bearer_auth(&caller.token), 200)?;
        ensure!(found["id"] == *other.id, "{} has the id {}, not {}", other.name, found["id"], other.id);
        Ok(())
    }

    fn send(&self, from: &User, to: &User, content: &str, seq: u64) -> Result<Value> {
        let body = json!({"recipient_id": to.id, "content": content});
        let message = self.ask(self.post(&["send"], &body).bearer_auth(&from.token), 201)?;
        let expected = json!({"sender_id": from.id, "recipient_id": to.id, "content": content, "seq": seq});
        for (field, value) in expected.as_object().into_iter().flatten() {
            ensure!(message[field] == *value, "{field} is {} instead of {value}", message[field]);
        }
        Ok(message)
    }

    fn read(&self, caller: &User, peer: &User, expected: &Value) -> Result<()> {
        let request = self.get(&["messages"]).query(&[("peer_id", &peer.id)]).bearer_auth(&caller.token);
        let messages = self.ask(request, 200)?;
        ensure!(messages == *expected, "the conversation is {messages} instead of {expected}");
        Ok(())
    }

    fn get(&self, path: &[&str]) -> RequestBuilder {
        self.client.get(address(&self.base, path))
    }

    fn post(&self, path: &[&str], body: &Value) -> RequestBuilder {
        self.client.post(address(&self.base, path)).json(body)
    }

    /// The answer's JSON, if its status is this one.
    fn ask(&self, request: RequestBuilder, expected: u16) -> Result<Value> {
        let response = request.send().with_context(|| {
            format!("no answer from {}: start the service there, or correct --url", self.base)
        })?;
        let (status, url) = (response.status().as_u16(), response.url().clone());
        let retry_after =
            response.headers().get(RETRY_AFTER).and_then(|value| value.to_str().ok()).map(str::to_owned);
        let body = response.text().with_context(|| format!("{url}: the answer breaks off"))?;
        Answer { url, status, retry_after, body }.expect(expected)
    }
}

fn random(chars: usize) -> String {
    Alphanumeric.sample_string(&mut rand::rng(), chars)
}
