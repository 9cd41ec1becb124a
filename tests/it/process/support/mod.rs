//! Starts the built binary in a clean environment, talks to it, and looks into its database.
//!
//! Every wait has a limit, and the limits are generous: they tell a hang from a slow machine, not fast from slow.

use std::fs::{self, File};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU16, AtomicU32, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, bail, ensure};
use reqwest::blocking::{Client, RequestBuilder};
use reqwest::header::HeaderMap;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tests::servers::daemon::{self, dies_with_us};
use tests::servers::sql::{self, Login, Row};
use tests::{Postgres, Scratch, service_binary};

/// What takes longer hangs.
pub(super) const LIMIT: Duration = Duration::from_secs(60);

/// Long enough for production, and of no value to anyone.
pub(super) const STRONG_KEY: &str = "a-test-key-of-more-than-thirty-two-bytes";

/// A new connection for each request, so that one test's restarts are not another request's broken connection.
static CLIENT: LazyLock<Client> = LazyLock::new(|| {
    let client = Client::builder().timeout(LIMIT).pool_max_idle_per_host(0).no_proxy();
    client.build().expect("a plain client can be built")
});

/// Asks until there is an answer. `what` is what one waits for.
pub(super) fn eventually<T>(what: &str, mut ask: impl FnMut() -> Option<T>) -> Result<T> {
    daemon::poll(LIMIT, || Ok(ask()))?.with_context(|| format!("waited {} s for {what}", LIMIT.as_secs()))
}

/// As the start of the line, because rate limits count in minutes of the wall clock: makes sure that what follows
/// falls into one.
pub(super) fn avoid_the_minutes_edge() {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let left = 60 - now.as_secs() % 60;
    if left < 20 {
        thread::sleep(Duration::from_secs(left));
    }
}

/// What a process is started with. Nothing is inherited.
#[derive(Clone, Debug, Default)]
pub(super) struct Start {
    environment: Vec<(String, String)>,
    arguments: Vec<String>,
    files: Vec<(String, String)>,
}

impl Start {
    /// Free ports on the loopback address, and nothing else.
    pub(super) fn bare() -> Self {
        Self::default().env("HOST", "127.0.0.1").env("PORT", "0").env("OPS_PORT", "0")
    }

    /// With this database, the shared Redis and without limits, which are counted by address and all tests have one.
    pub(super) fn on(database: &Database) -> Self {
        Self::bare()
            .env("DATABASE_URL", &database.url())
            .env("REDIS_URL", &shared_redis())
            .env("LOGIN_RATE_LIMIT_PER_MINUTE", "0")
            .env("SEND_RATE_LIMIT_PER_MINUTE", "0")
            .env("REGISTER_RATE_LIMIT_PER_MINUTE", "0")
    }

    #[must_use]
    pub(super) fn env(mut self, name: &str, value: &str) -> Self {
        self = self.unset(name);
        self.environment.push((name.to_owned(), value.to_owned()));
        self
    }

    #[must_use]
    pub(super) fn unset(mut self, name: &str) -> Self {
        self.environment.retain(|(known, _)| known != name);
        self
    }

    #[must_use]
    pub(super) fn args(mut self, arguments: &[&str]) -> Self {
        self.arguments = arguments.iter().map(|argument| (*argument).to_owned()).collect();
        self
    }

    /// A file in the working directory.
    #[must_use]
    pub(super) fn file(mut self, name: &str, text: &str) -> Self {
        self.files.push((name.to_owned(), text.to_owned()));
        self
    }

    pub(super) fn spawn(&self) -> Result<Process> {
        let directory = Scratch::new("process")?;
        for (name, text) in &self.files {
            fs::write(directory.path().join(name), text)?;
        }
        let [stdout, stderr] = ["stdout", "stderr"].map(|name| directory.path().join(name));
        let mut command = dies_with_us(&service_binary()?, "KILL");
        command.env_clear().envs(self.environment.iter().cloned()).args(&self.arguments);
        command.current_dir(directory.path()).stdin(Stdio::null());
        command.stdout(File::create(&stdout)?).stderr(File::create(&stderr)?);
        let child = daemon::spawn(command)?;
        Ok(Process { child, stdout, stderr, _directory: directory })
    }

    /// Runs a command that ends by itself.
    pub(super) fn run(&self) -> Result<Finished> {
        let mut process = self.spawn()?;
        let code = process.exit(LIMIT)?;
        Ok(Finished { code, stdout: process.stdout(), stderr: process.stderr() })
    }

    /// Serves, and returns when it listens, ready or not.
    pub(super) fn listen(&self) -> Result<Service> {
        let mut process = self.spawn()?;
        let addresses = daemon::poll(LIMIT, || {
            if let Some(status) = process.child.try_wait()? {
                bail!("it ended at once ({status}):\n{}{}", process.stdout(), process.stderr());
            }
            Ok(addresses(&process.stdout()))
        })?;
        let [public, operations] = addresses.context("it does not listen")?;
        Ok(Service { process, public, operations })
    }

    /// Serves, and returns when it is ready with all it depends on.
    pub(super) fn ready(&self) -> Result<Service> {
        let service = self.listen()?;
        service.becomes("ok")?;
        Ok(service)
    }
}

/// The two addresses in the line that tells of them, in either log format.
fn addresses(log: &str) -> Option<[SocketAddr; 2]> {
    let line = log.lines().find(|line| line.contains("listening"))?;
    let address = |name: &str| {
        let from = line.find(name)? + name.len();
        let text = line[from..].trim_start_matches(['=', '"', ':']);
        text[..text.find([' ', '"']).unwrap_or(text.len())].parse().ok()
    };
    Some([address("public")?, address("operations")?])
}

/// What a process that has ended left.
#[derive(Debug)]
pub(super) struct Finished {
    pub(super) code: i32,
    pub(super) stdout: String,
    pub(super) stderr: String,
}

impl Finished {
    pub(super) fn said(&self) -> String {
        format!("{}{}", self.stdout, self.stderr)
    }
}

#[derive(Debug)]
pub(super) struct Process {
    child: Child,
    stdout: PathBuf,
    stderr: PathBuf,
    _directory: Scratch,
}

impl Process {
    pub(super) fn signal(&self, signal: Signal) -> Result<()> {
        Ok(kill_process(Pid::from_child(&self.child), signal)?)
    }

    pub(super) fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// The exit code, 128 and the signal where one ended it.
    pub(super) fn exit(&mut self, limit: Duration) -> Result<i32> {
        use std::os::unix::process::ExitStatusExt as _;
        let status = daemon::poll(limit, || Ok(self.child.try_wait()?))?;
        let Some(status) = status else {
            bail!("it did not end within {} s:\n{}{}", limit.as_secs(), self.stdout(), self.stderr());
        };
        Ok(status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or_default()))
    }

    pub(super) fn stdout(&self) -> String {
        read(&self.stdout)
    }

    pub(super) fn stderr(&self) -> String {
        read(&self.stderr)
    }

    pub(super) fn said(&self) -> String {
        self.stdout() + &self.stderr()
    }

    /// The lines of the log that have all of these words.
    pub(super) fn lines_with(&self, words: &[&str]) -> Vec<String> {
        let log = self.stdout();
        let lines = log.lines().filter(|line| words.iter().all(|word| line.contains(word)));
        lines.map(str::to_owned).collect()
    }

    pub(super) fn logs(&self, words: &[&str]) -> Result<Vec<String>> {
        eventually(&format!("a log line with {words:?}"), || {
            Some(self.lines_with(words)).filter(|lines| !lines.is_empty())
        })
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if self.is_running() {
            let _ = self.child.kill();
        }
        let _ = self.child.wait();
        if thread::panicking() {
            eprintln!("its log:\n{}", daemon::tail(&self.said(), 30));
        }
    }
}

fn read(file: &Path) -> String {
    String::from_utf8_lossy(&fs::read(file).unwrap_or_default()).into_owned()
}

/// A process that listens.
#[derive(Debug)]
pub(super) struct Service {
    pub(super) process: Process,
    pub(super) public: SocketAddr,
    pub(super) operations: SocketAddr,
}

#[derive(Clone, Debug)]
pub(super) struct User {
    pub(super) id: String,
    pub(super) token: String,
}

pub(super) const PASSWORD: &str = "correct horse battery";

/// A whole response.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) status: u16,
    pub(super) headers: HeaderMap,
    pub(super) body: String,
}

impl Answer {
    pub(super) fn of(request: RequestBuilder) -> Result<Self> {
        let response = request.send()?;
        let (status, headers) = (response.status().as_u16(), response.headers().clone());
        Ok(Self { status, headers, body: response.text()? })
    }

    pub(super) fn json(&self) -> Result<Value> {
        serde_json::from_str(&self.body).with_context(|| format!("not JSON: {}", self.body))
    }

    pub(super) fn header(&self, name: &str) -> &str {
        self.headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default()
    }

    /// The answer, if its status is this one.
    pub(super) fn expect(self, status: u16) -> Result<Self> {
        ensure!(self.status == status, "{} instead of {status}: {}", self.status, self.body);
        Ok(self)
    }

    /// Checks that this is how the service says that it cannot serve now.
    pub(super) fn is_unavailable(&self) -> Result<()> {
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
    pub(super) fn get(&self, path: &str) -> RequestBuilder {
        CLIENT.get(format!("http://{}{path}", reachable(self.public)))
    }

    pub(super) fn post(&self, path: &str, body: &Value) -> RequestBuilder {
        CLIENT.post(format!("http://{}{path}", reachable(self.public))).json(body)
    }

    /// A path of the operations port.
    pub(super) fn operations(&self, path: &str) -> Result<Answer> {
        Answer::of(CLIENT.get(format!("http://{}{path}", reachable(self.operations))))
    }

    /// The status and the word of readiness, on the operations port.
    pub(super) fn health(&self) -> Result<(u16, String)> {
        let answer = self.operations("/healthz")?;
        Ok((answer.status, answer.json()?["status"].as_str().unwrap_or_default().to_owned()))
    }

    /// Waits until readiness says `ok`, `degraded` or `unavailable`.
    pub(super) fn becomes(&self, status: &str) -> Result<()> {
        eventually(&format!("/healthz to say {status}; {}", self.process.said()), || {
            self.health().ok().filter(|(_, found)| found == status)
        })?;
        Ok(())
    }

    /// Registers somebody and logs in.
    pub(super) fn user(&self, name: &str) -> Result<User> {
        let email = format!("{name}@example.com");
        let body = json!({"username": name, "email": email, "password": PASSWORD});
        let user = Answer::of(self.post("/register", &body))?.expect(201)?.json()?;
        let id = user["id"].as_str().context("an id")?.to_owned();
        Ok(User { id, token: self.log_in(name)? })
    }

    pub(super) fn log_in(&self, name: &str) -> Result<String> {
        let body = json!({"username": name, "password": PASSWORD});
        let token = Answer::of(self.post("/login", &body))?.expect(200)?.json()?;
        Ok(token["access_token"].as_str().context("a token")?.to_owned())
    }

    pub(super) fn two_users(&self) -> Result<(User, User)> {
        Ok((self.user("ana")?, self.user("ben")?))
    }

    pub(super) fn me(&self, token: &str) -> Result<Answer> {
        Answer::of(self.get("/me").bearer_auth(token))
    }

    pub(super) fn send(&self, from: &User, to: &User, content: &str) -> Result<Answer> {
        let body = json!({"recipient_id": to.id, "content": content});
        Answer::of(self.post("/send", &body).bearer_auth(&from.token))
    }

    pub(super) fn read(&self, reader: &User, peer: &User, limit: usize) -> Result<Answer> {
        let query = [("peer_id", peer.id.clone()), ("limit", limit.to_string())];
        Answer::of(self.get("/messages").query(&query).bearer_auth(&reader.token))
    }

    /// The contents of the newest messages, newest first.
    pub(super) fn contents(&self, reader: &User, peer: &User, limit: usize) -> Result<Vec<String>> {
        let page = self.read(reader, peer, limit)?.expect(200)?.json()?;
        let text = |message: &Value| message["content"].as_str().map(str::to_owned);
        page.as_array().context("an array")?.iter().map(|message| text(message).context("content")).collect()
    }

    /// The value of a metric, named with its labels.
    pub(super) fn metric(&self, name: &str) -> Result<f64> {
        let text = self.operations("/metrics")?.expect(200)?.body;
        let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        value.with_context(|| format!("no metric {name}"))?.parse().context("a number")
    }

    /// Ends it in good order.
    pub(super) fn stop(mut self) -> Result<String> {
        self.process.signal(Signal::TERM)?;
        let code = self.process.exit(LIMIT)?;
        ensure!(code == 0, "exit code {code}:\n{}", self.process.said());
        Ok(self.process.said())
    }
}

/// Where a client finds what listens on every address.
fn reachable(mut address: SocketAddr) -> SocketAddr {
    if address.ip().is_unspecified() {
        address.set_ip([127, 0, 0, 1].into());
    }
    address
}

/// A database of `TEST_REDIS_URL`, from the upper half of those that the harness's servers have.
pub(super) fn shared_redis() -> String {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let url = std::env::var("TEST_REDIS_URL").expect("TEST_REDIS_URL: run by `cargo xtask test`");
    let server = url.splitn(4, '/').take(3).collect::<Vec<_>>().join("/");
    let start = std::process::id().wrapping_mul(97) as u16;
    let number = start.wrapping_add(NEXT.fetch_add(1, Ordering::Relaxed)) % 2048;
    format!("{server}/{}", 2048 + number)
}

/// A port that refuses connections.
pub(super) fn closed_port() -> Result<u16> {
    tests::servers::ports::free()
}

/// A database on a server, gone afterwards where the server stays.
#[derive(Debug)]
pub(super) struct Database {
    host: String,
    pub(super) port: u16,
    user: String,
    password: String,
    name: String,
    shared: bool,
}

impl Database {
    /// A new one on the server of `TEST_DATABASE_URL`.
    pub(super) fn create() -> Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let url =
            std::env::var("TEST_DATABASE_URL").context("TEST_DATABASE_URL: run by `cargo xtask test`")?;
        let url = reqwest::Url::parse(&url)?;
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let database = Self {
            host: url.host_str().context("a host")?.to_owned(),
            port: url.port().unwrap_or(5432),
            user: url.username().to_owned(),
            password: url.password().unwrap_or_default().to_owned(),
            name: format!("process_{}_{number}", std::process::id()),
            shared: true,
        };
        database.query_in("postgres", &format!("DROP DATABASE IF EXISTS {} WITH (FORCE)", database.name))?;
        database.query_in("postgres", &format!("CREATE DATABASE {}", database.name))?;
        Ok(database)
    }

    /// A new one on a private server.
    pub(super) fn on(postgres: &Postgres) -> Result<Self> {
        postgres.create_database("chat")?;
        Ok(Self::named_on(postgres, "chat"))
    }

    /// One that may not be there yet.
    pub(super) fn named_on(postgres: &Postgres, name: &str) -> Self {
        Self {
            host: "127.0.0.1".to_owned(),
            port: postgres.port(),
            user: "postgres".to_owned(),
            password: postgres.password().to_owned(),
            name: name.to_owned(),
            shared: false,
        }
    }

    pub(super) fn url(&self) -> String {
        let Self { host, port, user, password, name, .. } = self;
        let password = if password.is_empty() { String::new() } else { format!(":{password}") };
        format!("postgres://{user}{password}@{host}:{port}/{name}")
    }

    /// The same database for another thread, which leaves it in place.
    pub(super) fn handle(&self) -> Self {
        let Self { host, port, user, password, name, .. } = self;
        let [host, user, password, name] = [host, user, password, name].map(String::clone);
        Self { host, port: *port, user, password, name, shared: false }
    }

    pub(super) fn query(&self, sql: &str) -> Result<Vec<Row>> {
        self.query_in(&self.name, sql)
    }

    fn query_in(&self, database: &str, sql: &str) -> Result<Vec<Row>> {
        let Self { host, port, user, password, .. } = self;
        sql::query(Login { host, port: *port, user, password, database }, sql)
    }

    /// The first column of the first row.
    pub(super) fn value(&self, sql: &str) -> Result<String> {
        let row = self.query(sql)?.into_iter().next().with_context(|| format!("no row: {sql}"))?;
        Ok(row.into_iter().next().flatten().unwrap_or_default())
    }

    /// Every message's content in the order of its seq, of all conversations.
    pub(super) fn contents(&self) -> Result<Vec<String>> {
        let rows = self.query("SELECT content FROM messages ORDER BY conversation_id, seq")?;
        Ok(rows.into_iter().flatten().flatten().collect())
    }

    /// Checks that every conversation counts 1, 2, 3 without a gap.
    pub(super) fn has_no_gaps(&self) -> Result<()> {
        let gaps = self.query(
            "SELECT c.id FROM conversations c LEFT JOIN messages m ON m.conversation_id = c.id
             GROUP BY c.id, c.last_seq HAVING count(m.seq) <> c.last_seq OR max(m.seq) <> c.last_seq OR min(m.seq) <> 1",
        )?;
        ensure!(gaps.is_empty(), "conversations with gaps: {gaps:?}");
        Ok(())
    }

    /// How many of the service's statements wait for a lock.
    pub(super) fn blocked(&self) -> Result<usize> {
        let count = self.value(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()
             AND application_name = 'chat-service' AND wait_event_type = 'Lock'",
        )?;
        Ok(count.parse()?)
    }

    /// Waits until that many of the service's statements wait for a lock.
    pub(super) fn blocks(&self, count: usize) -> Result<()> {
        eventually("statements that wait for a lock", || {
            self.blocked().ok().filter(|found| *found >= count)
        })?;
        Ok(())
    }

    /// Holds the locks of every conversation, so that no message is stored.
    pub(super) fn hold_conversations(&self) -> Result<Held> {
        self.hold("SELECT FROM conversations FOR UPDATE")
    }

    /// Holds what the statement locks, until it is dropped or most of a minute is over.
    pub(super) fn hold(&self, lock: &str) -> Result<Held> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let mark = format!("held {} {}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let holder = self.handle();
        let statements = format!("BEGIN; {lock}; SELECT pg_sleep(55) /* {mark} */");
        let session = thread::spawn(move || holder.query(&statements).map(drop));
        let find = format!(
            "SELECT pid FROM pg_stat_activity WHERE query LIKE '%/* {mark} */' AND wait_event = 'PgSleep'"
        );
        let pid = eventually("the lock", || self.value(&find).ok().filter(|pid| !pid.is_empty()))?;
        let release = format!("SELECT pg_cancel_backend({pid})");
        Ok(Held { database: self.handle(), release, session: Some(session) })
    }
}

impl Drop for Database {
    fn drop(&mut self) {
        if self.shared {
            let _ = self.query_in("postgres", &format!("DROP DATABASE {} WITH (FORCE)", self.name));
        }
    }
}

/// A transaction that holds locks.
#[derive(Debug)]
pub(super) struct Held {
    database: Database,
    release: String,
    session: Option<JoinHandle<Result<()>>>,
}

impl Held {
    pub(super) fn release(self) {}
}

impl Drop for Held {
    fn drop(&mut self) {
        let _ = self.database.query(&self.release);
        if let Some(session) = self.session.take() {
            // It was cancelled, which is its error.
            let _ = session.join();
        }
    }
}

/// Fails unless `work` is over within the limit; for what must not take as long as something else would.
pub(super) fn within<T>(limit: Duration, what: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let started = Instant::now();
    let outcome = work()?;
    let taken = started.elapsed();
    ensure!(taken < limit, "{what} took {taken:?}, more than {limit:?}");
    Ok(outcome)
}
