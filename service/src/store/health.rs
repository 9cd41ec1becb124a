//! Whether Postgres answers and its schema is current. A task asks once a second, so that probes cost nothing and any
//! number of them cannot burden the database.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::sync::watch;

use super::migrations::{self, Schema};
use super::postgres::{self, Database};

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

    /// True if Postgres answered when it was last asked.
    pub fn postgres_answers(&self) -> bool {
        matches!(self.postgres(), PostgresState::Answers(_))
    }

    /// The newest applied migration, 0 while that is unknown.
    pub fn schema_version(&self) -> i64 {
        match self.postgres() {
            PostgresState::Answers(schema) => schema.version(),
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
            Ok(Ok((schema, fault))) => (PostgresState::Answers(schema), fault.map(|fault| fault.to_string())),
            Ok(Err(error)) => (PostgresState::Unavailable, Some(postgres::reason(&error))),
            Err(_) => (PostgresState::Unavailable, Some(format!("no answer within {} s", TIMEOUT.as_secs()))),
        };
        let before = self.postgres.send_replace(postgres);
        if before == postgres {
            return;
        }
        match postgres {
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
            tokio::time::sleep(INTERVAL).await;
        }
    }
}
