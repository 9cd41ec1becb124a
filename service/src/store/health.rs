//! Whether Postgres answers, takes writes, and has a current schema. A task asks once a second, so that probes cost nothing
//! and any number of them cannot burden the database.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::sync::watch;

use super::migrations::{self, Answer, Schema};
use super::pooler;
use super::postgres::{Database, ReadOnly};

/// How old the answer to a probe may be, and how long Postgres may take for it.
const INTERVAL: Duration = Duration::from_secs(1);
const TIMEOUT: Duration = Duration::from_secs(2);

#[derive(Debug)]
pub struct Health {
    postgres: watch::Sender<PostgresState>,
    draining: AtomicBool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PostgresState {
    /// Not asked yet.
    Unknown,
    Unavailable,
    /// It answers and takes no writes.
    ReadOnly(ReadOnly, Schema),
    Answers(Schema),
}

impl Health {
    pub fn new() -> Arc<Self> {
        Arc::new(Self {
            postgres: watch::Sender::new(PostgresState::Unknown),
            draining: AtomicBool::new(false),
        })
    }

    /// Postgres's last answer.
    pub fn postgres(&self) -> PostgresState {
        *self.postgres.borrow()
    }

    /// True once Postgres was asked and did not answer: a request that waits for it again gains nothing.
    pub fn postgres_is_unavailable(&self) -> bool {
        self.postgres() == PostgresState::Unavailable
    }

    /// True if Postgres took no writes when it was last asked. It may be an old primary, so what it lacks may exist.
    pub fn postgres_only_reads(&self) -> bool {
        matches!(self.postgres(), PostgresState::ReadOnly(..))
    }

    /// True if Postgres answered when it was last asked, and took writes.
    pub fn postgres_answers(&self) -> bool {
        matches!(self.postgres(), PostgresState::Answers(_))
    }

    /// True if Postgres answered when it was last asked, and has all tables, which the service may use.
    pub fn has_tables(&self) -> bool {
        match self.postgres() {
            PostgresState::Answers(schema) | PostgresState::ReadOnly(_, schema) => {
                matches!(schema, Schema::Current { .. } | Schema::NotUtf8 { .. })
            }
            PostgresState::Unknown | PostgresState::Unavailable => false,
        }
    }

    /// The newest applied migration, 0 while that is unknown.
    pub fn schema_version(&self) -> i64 {
        match self.postgres() {
            PostgresState::Answers(schema) | PostgresState::ReadOnly(_, schema) => schema.version(),
            PostgresState::Unknown | PostgresState::Unavailable => 0,
        }
    }

    /// Whether `/healthz` answers 200. Redis is not needed for it.
    pub fn is_ready(&self) -> bool {
        matches!(self.postgres(), PostgresState::Answers(Schema::Current { .. })) && !self.is_draining()
    }

    /// Makes the process unready, because it is about to end.
    pub fn drain(&self) {
        self.draining.store(true, Ordering::Relaxed);
    }

    pub fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Relaxed)
    }

    /// Asks Postgres once and remembers the answer.
    pub async fn ask(&self, database: &Database) {
        let answer = tokio::time::timeout(TIMEOUT, migrations::schema(database)).await;
        let (postgres, fault) = match answer {
            Ok(Ok(Answer { schema, read_only: Some(why), .. })) => {
                (PostgresState::ReadOnly(why, schema), None)
            }
            Ok(Ok(Answer { schema, fault, .. })) => {
                (PostgresState::Answers(schema), fault.map(|fault| fault.to_string()))
            }
            Ok(Err(error)) => (PostgresState::Unavailable, Some(pooler::reason(&error))),
            Err(_) => (PostgresState::Unavailable, Some(format!("no answer within {} s", TIMEOUT.as_secs()))),
        };
        // A session that only reads would go on to do so, whatever has changed since it was opened. So the next answer comes
        // from a new one, and so does every request's once Postgres takes writes.
        if matches!(postgres, PostgresState::ReadOnly(..)) || self.postgres_only_reads() {
            database.replace_sessions();
        }
        // Before requests come.
        let is_new = matches!(postgres, PostgresState::Answers(_)) && !self.postgres_answers();
        let (postgres, fault) = match is_new {
            true => match pooler::check(database).await {
                Ok(()) => (postgres, fault),
                Err(fault) => (PostgresState::Unavailable, Some(fault.to_owned())),
            },
            false => (postgres, fault),
        };
        let before = self.postgres.send_replace(postgres);
        if before == postgres {
            return;
        }
        match postgres {
            PostgresState::ReadOnly(why, _) => tracing::warn!(
                reason = why.reason(),
                fix = why.fix(),
                "Postgres only reads: not ready, messages are refused, history is served as stale"
            ),
            PostgresState::Unavailable => tracing::warn!(
                error = fault.unwrap_or_default(),
                "Postgres is unavailable: not ready, messages are refused, cached history is served"
            ),
            PostgresState::Answers(Schema::Behind { version }) => {
                tracing::warn!(
                    version,
                    needed = migrations::known_version(),
                    fault,
                    "the schema is behind: not ready until it is migrated"
                );
            }
            PostgresState::Answers(Schema::Forbidden { .. } | Schema::NotUtf8 { .. }) => tracing::warn!(
                fault,
                "Postgres answers, but the service cannot work with its database: not ready"
            ),
            PostgresState::Answers(Schema::Current { version }) => {
                tracing::info!(version, "Postgres answers, the schema is current")
            }
            PostgresState::Unknown => {}
        }
    }

    /// Asks once a second until the process ends.
    pub async fn supervise(self: Arc<Self>, database: Database) {
        loop {
            self.ask(&database).await;
            database.close_idle().await;
            tokio::time::sleep(INTERVAL).await;
        }
    }
}
