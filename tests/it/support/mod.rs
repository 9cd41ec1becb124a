//! A running service for one test: the real router on real ports, a database and a Redis index of its own.

mod client;
mod database;
mod document;
mod operations;
mod prefix_proxy;
pub(crate) mod races;
mod redis;
mod stream;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use chat_service::config::Config;
use chat_service::serve::{self, Running};
use reqwest::{Method, Url};
use serde_json::{Value, json};
use uuid::Uuid;

pub(crate) use client::{Request, Response};
pub(crate) use database::{Database, FUTURE_MIGRATION};
pub(crate) use document::document;
pub(crate) use operations::{Operation, operations};
pub(crate) use prefix_proxy::PrefixProxy;
pub(crate) use redis::RedisIndex;
pub(crate) use stream::Follower;
pub(crate) use tests::{PASSWORD, User};

/// The signing key of the tests' services.
pub(crate) const SECRET_KEY: &str = "a key for tests that is long enough";

/// One replica of the service. Its database is dropped with the last of its replicas.
pub(crate) struct TestApp {
    pub(crate) running: Running,
    pub(crate) database: Arc<Database>,
    pub(crate) redis: Arc<RedisIndex>,
    variables: BTreeMap<String, String>,
    client: reqwest::Client,
}

impl TestApp {
    /// A service without rate limits, which most tests do not need.
    pub(crate) async fn start() -> Self {
        Self::with(&[]).await
    }

    /// A service with these variables, in addition to those that every test needs.
    pub(crate) async fn with(variables: &[(&str, &str)]) -> Self {
        Self::on(Database::migrated().await, variables).await
    }

    pub(crate) async fn on(database: Database, variables: &[(&str, &str)]) -> Self {
        let redis = RedisIndex::claim().await;
        let mut all = BTreeMap::from(
            [
                ("APP_ENV", "development"),
                ("DATABASE_URL", database.url()),
                ("REDIS_URL", redis.url()),
                ("SECRET_KEY", SECRET_KEY),
                ("HOST", "127.0.0.1"),
                ("PORT", "0"),
                ("OPS_PORT", "0"),
                // Many services share one Postgres.
                ("DB_POOL_MAX", "6"),
                ("LOGIN_RATE_LIMIT_PER_MINUTE", "0"),
                ("SEND_RATE_LIMIT_PER_MINUTE", "0"),
                ("REGISTER_RATE_LIMIT_PER_MINUTE", "0"),
                ("NEW_CONVERSATIONS_PER_HOUR", "0"),
            ]
            .map(|(name, value)| (name.to_owned(), value.to_owned())),
        );
        all.extend(variables.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())));
        Self::launch(all, Arc::new(database), Arc::new(redis)).await
    }

    /// Another replica: the same database, the same Redis, and these variables changed.
    pub(crate) async fn replica(&self, variables: &[(&str, &str)]) -> Self {
        let mut all = self.variables.clone();
        all.extend(variables.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())));
        Self::launch(all, Arc::clone(&self.database), Arc::clone(&self.redis)).await
    }

    async fn launch(
        variables: BTreeMap<String, String>,
        database: Arc<Database>,
        redis: Arc<RedisIndex>,
    ) -> Self {
        // As `main` does. Only the first test's call has an effect.
        rustls::crypto::aws_lc_rs::default_provider().install_default().ok();
        let config = Config::from_variables(&variables).expect("a valid configuration");
        let running = serve::start(config).await.expect("the service starts");
        let client = reqwest::Client::builder()
            .no_proxy()
            .redirect(reqwest::redirect::Policy::none())
            .build()
            .expect("a client");
        Self { running, database, redis, variables, client }
    }

    /// A request to the public port. Its response is checked against the OpenAPI document.
    pub(crate) fn request(&self, method: Method, path: &str) -> Request {
        let url = format!("http://{}{path}", self.running.public);
        Request::new(self.client.request(method.clone(), url), method, path)
    }

    pub(crate) fn get(&self, path: &str) -> Request {
        self.request(Method::GET, path)
    }

    pub(crate) fn post(&self, path: &str) -> Request {
        self.request(Method::POST, path)
    }

    /// A request to the operations port, which is not documented.
    pub(crate) fn request_operations(&self, method: Method, path: &str) -> Request {
        let url = format!("http://{}{path}", self.running.operations);
        Request::undocumented(self.client.request(method, url))
    }

    pub(crate) fn get_operations(&self, path: &str) -> Request {
        self.request_operations(Method::GET, path)
    }

    /// A request to any URL, such as a proxy's. Redirects are not followed.
    pub(crate) fn get_url(&self, url: Url) -> Request {
        Request::undocumented(self.client.get(url))
    }

    /// Sends these bytes. The request must close the connection.
    pub(crate) async fn raw(&self, request: &[u8]) -> Response {
        client::raw(self.running.public, request).await
    }

    /// Registers `name` and issues a token, without the time that a login takes.
    pub(crate) async fn user(&self, name: &str) -> User {
        let answer = self.register(name, &format!("{name}@example.com"), PASSWORD).await;
        let user = answer.json(201);
        let id = text(&user, "id");
        let token = self.token(&id);
        User { id, name: name.to_owned(), token }
    }

    /// A user with a unique name who has logged in.
    pub(crate) async fn member(&self) -> User {
        let name = format!("member.{}", &Uuid::new_v4().simple().to_string()[..12]);
        let user = self.user(&name).await;
        let token = text(&self.login(&name, PASSWORD).await.json(200), "access_token");
        User { token, ..user }
    }

    /// Two users with unique names.
    pub(crate) async fn pair(&self) -> (User, User) {
        let tag = &Uuid::new_v4().simple().to_string()[..12];
        (self.user(&format!("ana.{tag}")).await, self.user(&format!("ben.{tag}")).await)
    }

    /// A token of a session of its own, which no list shows.
    pub(crate) fn token(&self, id: &str) -> String {
        self.token_of(id, Uuid::new_v4())
    }

    pub(crate) fn token_of(&self, id: &str, session: Uuid) -> String {
        let id = Uuid::parse_str(id).expect("an id");
        self.running.app.tokens.issue(id, session, now_seconds()).expect("a token").0
    }

    pub(crate) async fn register(&self, username: &str, email: &str, password: &str) -> Response {
        let body = json!({"username": username, "email": email, "password": password});
        self.post("/register").json(&body).response().await
    }

    pub(crate) async fn login(&self, username: &str, password: &str) -> Response {
        self.post("/login").json(&json!({"username": username, "password": password})).response().await
    }

    /// A request to send a message.
    pub(crate) fn send(&self, from: &User, to: &User, content: &str) -> Request {
        self.post("/send").by(from).json(&json!({"recipient_id": to.id, "content": content}))
    }

    /// Sends a message that must be accepted.
    pub(crate) async fn sent(&self, from: &User, to: &User, content: &str) -> Value {
        self.send(from, to, content).response().await.json(201)
    }

    /// `n` messages in one direction, with their numbers as content.
    pub(crate) async fn sent_many(&self, from: &User, to: &User, n: usize) {
        for number in 1..=n {
            self.sent(from, to, &number.to_string()).await;
        }
    }

    /// A page of the conversation. `query` follows the peer's id.
    pub(crate) async fn messages(&self, reader: &User, peer: &User, query: &str) -> Response {
        let query = if query.is_empty() { String::new() } else { format!("&{query}") };
        self.get(&format!("/messages?peer_id={}{query}", peer.id)).by(reader).response().await
    }

    /// The `seq`s of a page.
    pub(crate) async fn seqs(&self, reader: &User, peer: &User, query: &str) -> Vec<i64> {
        self.messages(reader, peer, query).await.seqs()
    }

    /// A page that was answered from the window, as the metrics say: the first reads only fill it.
    pub(crate) async fn hit(&self, reader: &User, peer: &User, query: &str) -> Response {
        let deadline = std::time::Instant::now() + Duration::from_secs(20);
        loop {
            let before = self.metric("chat_cache_lookups_total{outcome=\"hit\"}").await;
            let answer = self.messages(reader, peer, query).await;
            if self.metric("chat_cache_lookups_total{outcome=\"hit\"}").await > before {
                return answer;
            }
            assert!(std::time::Instant::now() < deadline, "no read is answered from the window");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// The value of a metric, by its name with its labels.
    pub(crate) async fn metric(&self, name: &str) -> f64 {
        let text = self.get_operations("/metrics").response().await.text(200);
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.and_then(|value| value.parse().ok()).unwrap_or_else(|| panic!("no metric {name} in\n{text}"))
    }
}

/// A string member of an object.
pub(crate) fn text(value: &Value, name: &str) -> String {
    value[name].as_str().unwrap_or_else(|| panic!("{name} is no string in {value}")).to_owned()
}

/// The names of an object's members.
pub(crate) fn members(value: &Value) -> Vec<&str> {
    let mut names: Vec<&str> = value
        .as_object()
        .unwrap_or_else(|| panic!("no object: {value}"))
        .keys()
        .map(String::as_str)
        .collect();
    names.sort_unstable();
    names
}

/// Runs them all at once. The outcomes are in the order of the futures.
pub(crate) async fn together<F: Future>(futures: impl IntoIterator<Item = F>) -> Vec<F::Output> {
    futures_util::future::join_all(futures).await
}

pub(crate) fn now_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_secs()
}

/// Rate limits count in minutes of the wall clock: how long to wait for one with at least 20 s left.
pub(crate) fn wait_for_a_minute() -> Duration {
    let left = 60 - now_seconds() % 60;
    Duration::from_secs(if left < 20 { left } else { 0 })
}

/// The same for the hours in which new conversations count.
pub(crate) fn wait_for_an_hour() -> Duration {
    let left = 3600 - now_seconds() % 3600;
    Duration::from_secs(if left < 20 { left } else { 0 })
}

/// The claims of a token that the service signed with this key.
pub(crate) fn claims(token: &str, key: &str) -> Value {
    let key = jsonwebtoken::DecodingKey::from_secret(key.as_bytes());
    let validation = jsonwebtoken::Validation::new(jsonwebtoken::Algorithm::HS256);
    jsonwebtoken::decode::<Value>(token, &key, &validation).expect("an HS256 token of this service").claims
}

/// The value of a variable that `cargo xtask test` sets.
fn given(variable: &str) -> String {
    std::env::var(variable).unwrap_or_else(|_| panic!("{variable} is not set: run cargo xtask test"))
}

/// The session that an access token names.
pub(crate) fn session(token: &str) -> String {
    text(&claims(token, SECRET_KEY), "sid")
}
