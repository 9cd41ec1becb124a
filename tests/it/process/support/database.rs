//! The databases of the processes under test, and locks in them.

use std::collections::HashSet;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::{self, JoinHandle};

use anyhow::{Context as _, Result, ensure};
use tests::Postgres;
use tests::servers::sql::{self, Login, Row};

use super::eventually;

/// A database. On a shared server it is dropped with this value.
#[derive(Debug)]
pub(crate) struct Database {
    host: String,
    pub(crate) port: u16,
    user: String,
    password: String,
    name: String,
    shared: bool,
}

impl Database {
    /// A new one on the server of `TEST_DATABASE_URL`.
    pub(crate) fn create() -> Result<Self> {
        Self::create_with("")
    }

    /// Likewise, with clauses of `CREATE DATABASE`.
    pub(crate) fn create_with(clauses: &str) -> Result<Self> {
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
        database.query_in("postgres", &format!("CREATE DATABASE {} {clauses}", database.name))?;
        Ok(database)
    }

    /// A new one on a private server.
    pub(crate) fn on(postgres: &Postgres) -> Result<Self> {
        postgres.create_database("chat")?;
        Ok(Self::named_on(postgres, "chat"))
    }

    /// A database of a private server, which need not exist yet.
    pub(crate) fn named_on(postgres: &Postgres, name: &str) -> Self {
        Self {
            host: "127.0.0.1".to_owned(),
            port: postgres.port(),
            user: "postgres".to_owned(),
            password: postgres.password().to_owned(),
            name: name.to_owned(),
            shared: false,
        }
    }

    pub(crate) fn url(&self) -> String {
        let Self { host, port, user, password, name, .. } = self;
        let password = if password.is_empty() { String::new() } else { format!(":{password}") };
        format!("postgres://{user}{password}@{host}:{port}/{name}")
    }

    /// The URL for another role, which has the same password.
    pub(crate) fn url_of(&self, role: &str) -> String {
        let mut other = self.handle();
        other.user = role.to_owned();
        other.url()
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// The same database for another thread. It is not dropped with this value.
    pub(crate) fn handle(&self) -> Self {
        let Self { host, port, user, password, name, .. } = self;
        let [host, user, password, name] = [host, user, password, name].map(String::clone);
        Self { host, port: *port, user, password, name, shared: false }
    }

    pub(crate) fn query(&self, sql: &str) -> Result<Vec<Row>> {
        self.query_in(&self.name, sql)
    }

    fn query_in(&self, database: &str, sql: &str) -> Result<Vec<Row>> {
        let Self { host, port, user, password, .. } = self;
        sql::query(Login { host, port: *port, user, password, database }, sql)
    }

    /// The first column of the first row.
    pub(crate) fn value(&self, sql: &str) -> Result<String> {
        let row = self.query(sql)?.into_iter().next().with_context(|| format!("no row: {sql}"))?;
        Ok(row.into_iter().next().flatten().unwrap_or_default())
    }

    /// The contents of all messages, by conversation and seq.
    pub(crate) fn contents(&self) -> Result<Vec<String>> {
        let rows = self.query("SELECT content FROM messages ORDER BY conversation_id, seq")?;
        Ok(rows.into_iter().flatten().flatten().collect())
    }

    /// Checks that every acknowledged message is stored, and that no conversation has a gap. Returns how many are stored.
    pub(crate) fn keeps<'a>(&self, acknowledged: impl IntoIterator<Item = &'a String>) -> Result<usize> {
        let stored = self.contents()?.into_iter().collect::<HashSet<_>>();
        let lost: Vec<_> = acknowledged.into_iter().filter(|content| !stored.contains(*content)).collect();
        ensure!(lost.is_empty(), "acknowledged and lost: {lost:?}");
        self.has_no_gaps()?;
        Ok(stored.len())
    }

    /// Checks that every conversation counts 1, 2, 3 without a gap.
    pub(crate) fn has_no_gaps(&self) -> Result<()> {
        let gaps = self.query(
            "SELECT c.id FROM conversations c LEFT JOIN messages m ON m.conversation_id = c.id
             GROUP BY c.id, c.last_seq HAVING count(m.seq) <> c.last_seq OR max(m.seq) <> c.last_seq OR min(m.seq) <> 1",
        )?;
        ensure!(gaps.is_empty(), "conversations with gaps: {gaps:?}");
        Ok(())
    }

    /// How many of the service's statements wait for a lock.
    pub(crate) fn blocked(&self) -> Result<usize> {
        let count = self.value(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()
             AND application_name = 'chat-service' AND wait_event_type = 'Lock'",
        )?;
        Ok(count.parse()?)
    }

    /// Waits until at least that many of the service's statements wait for a lock.
    pub(crate) fn blocks(&self, count: usize) -> Result<()> {
        eventually("statements that wait for a lock", || {
            self.blocked().ok().filter(|found| *found >= count)
        })?;
        Ok(())
    }

    /// Locks every conversation, so that no message is stored.
    pub(crate) fn hold_conversations(&self) -> Result<Held> {
        self.hold("SELECT FROM conversations FOR UPDATE")
    }

    /// Holds the locks of a statement until the value is dropped, at most 55 s.
    pub(crate) fn hold(&self, lock: &str) -> Result<Held> {
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
pub(crate) struct Held {
    database: Database,
    release: String,
    session: Option<JoinHandle<Result<()>>>,
}

impl Held {
    pub(crate) fn release(self) {}
}

impl Drop for Held {
    fn drop(&mut self) {
        let _ = self.database.query(&self.release);
        if let Some(session) = self.session.take() {
            // Its query was cancelled: that is the error.
            let _ = session.join();
        }
    }
}
