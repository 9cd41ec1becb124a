//! Readiness and liveness. A task asks Postgres once a second, so that probes cost nothing and no crowd of
//! them can burden the database.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use salvo::Depot;
use salvo::http::StatusCode;
use salvo::http::header::{HeaderValue, RETRY_AFTER};
use salvo_oapi::{ToSchema, endpoint};
use serde::Serialize;
use tokio::sync::watch;

use crate::db::{self, Database, Schema};
use crate::error::Error;
use crate::input::app;
use crate::reply::Reply;

/// How old the answer of a probe may be, and how long Postgres may take for it.
const INTERVAL: Duration = Duration::from_secs(1);
const TIMEOUT: Duration = Duration::from_secs(2);

#[derive(Debug)]
pub struct Health {
    postgres: watch::Sender<Postgres>,
    draining: AtomicBool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Postgres {
    /// Not asked yet.
    Unknown,
    Away,
    Answers(Schema),
}

#[derive(Serialize, ToSchema, Debug)]
#[salvo(schema(name = "Readiness"))]
pub struct Readiness {
    /// `ok`, `degraded` while Redis is away, or `unavailable`.
    #[salvo(schema(example = "ok"))]
    status: &'static str,
    checks: Checks,
}

#[derive(Serialize, ToSchema, Debug)]
#[salvo(schema(name = "Checks"))]
pub struct Checks {
    /// `ok` or `away`.
    #[salvo(schema(example = "ok"))]
    postgres: &'static str,
    /// `ok`, `behind` before its migrations, or `unknown` while Postgres is away.
    #[salvo(schema(example = "ok"))]
    schema: &'static str,
    /// `ok` or `away`.
    #[salvo(schema(example = "ok"))]
    redis: &'static str,
    /// `serving`, or `draining` before the process ends.
    #[salvo(schema(example = "serving"))]
    process: &'static str,
}

#[derive(Serialize, ToSchema, Debug)]
#[salvo(schema(name = "Liveness"))]
pub struct Liveness {
    #[salvo(schema(example = "ok"))]
    status: &'static str,
}

impl Health {
    pub fn new() -> Arc<Self> {
        Arc::new(Self { postgres: watch::Sender::new(Postgres::Unknown), draining: AtomicBool::new(false) })
    }

    /// True once Postgres was asked and did not answer: waiting for it again would not help a request.
    pub fn postgres_is_away(&self) -> bool {
        *self.postgres.borrow() == Postgres::Away
    }

    /// True once Postgres has answered, and did so last.
    pub fn postgres_answers(&self) -> bool {
        matches!(*self.postgres.borrow(), Postgres::Answers(_))
    }

    /// The newest migration that was applied, 0 while that is unknown.
    pub fn schema_version(&self) -> i64 {
        match *self.postgres.borrow() {
            Postgres::Answers(Schema::Behind { version } | Schema::Current { version }) => version,
            Postgres::Unknown | Postgres::Away => 0,
        }
    }

    /// What `/healthz` answers: Redis is not needed for it.
    pub fn is_ready(&self) -> bool {
        matches!(*self.postgres.borrow(), Postgres::Answers(Schema::Current { .. })) && !self.is_draining()
    }

    /// From now on not ready: the process is about to end.
    pub fn drain(&self) {
        self.draining.store(true, Ordering::Relaxed);
    }

    pub fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Relaxed)
    }

    /// Asks Postgres once and remembers the answer.
    pub async fn ask(&self, database: &Database) {
        let answer = tokio::time::timeout(TIMEOUT, db::schema(database)).await;
        let (postgres, fault) = match answer {
            Ok(Ok(schema)) => (Postgres::Answers(schema), None),
            Ok(Err(error)) => (Postgres::Away, Some(error.to_string())),
            Err(_) => (Postgres::Away, Some(format!("no answer within {} s", TIMEOUT.as_secs()))),
        };
        let before = self.postgres.send_replace(postgres);
        if before == postgres {
            return;
        }
        match postgres {
            Postgres::Away => tracing::warn!(
                error = fault.unwrap_or_default(),
                "Postgres is away: not ready, messages are refused, cached history is served"
            ),
            Postgres::Answers(Schema::Behind { version }) => {
                tracing::warn!(
                    version,
                    needed = db::known_version(),
                    "the schema is behind: not ready until it is migrated"
                );
            }
            Postgres::Answers(Schema::Current { version }) => {
                tracing::info!(version, "Postgres answers, the schema is current")
            }
            Postgres::Unknown => {}
        }
    }

    /// Asks again and again, until the process ends.
    pub async fn supervise(self: Arc<Self>, database: Database) {
        loop {
            self.ask(&database).await;
            tokio::time::sleep(INTERVAL).await;
        }
    }

    fn readiness(&self, redis_answers: bool) -> (StatusCode, Readiness) {
        let postgres = *self.postgres.borrow();
        let draining = self.is_draining();
        let checks = Checks {
            postgres: if matches!(postgres, Postgres::Answers(_)) { "ok" } else { "away" },
            schema: match postgres {
                Postgres::Answers(Schema::Current { .. }) => "ok",
                Postgres::Answers(Schema::Behind { .. }) => "behind",
                Postgres::Unknown | Postgres::Away => "unknown",
            },
            redis: if redis_answers { "ok" } else { "away" },
            process: if draining { "draining" } else { "serving" },
        };
        match (self.is_ready(), redis_answers) {
            (true, true) => (StatusCode::OK, Readiness { status: "ok", checks }),
            (true, false) => (StatusCode::OK, Readiness { status: "degraded", checks }),
            (false, _) => (StatusCode::SERVICE_UNAVAILABLE, Readiness { status: "unavailable", checks }),
        }
    }
}

/// Readiness
///
/// Ready while Postgres answers, the schema is current and the process is not about to end. Without Redis the
/// service is slower, but ready.
#[endpoint(
    operation_id = "readiness",
    tags("operations"),
    responses(
        (status_code = 200, description = "Ready", body = Readiness),
        (status_code = 503, description = "Not ready: send no requests", body = Readiness, headers(("retry-after" = String, description = "Seconds to wait before the next try"))),
    )
)]
pub async fn readiness(depot: &mut Depot) -> Result<Reply, Error> {
    let app = app(depot)?;
    let (status, body) = app.health.readiness(app.redis.live().is_some());
    let reply = Reply::json(status, &body)?;
    Ok(if status == StatusCode::OK {
        reply
    } else {
        reply.header(RETRY_AFTER, HeaderValue::from_static("1"))
    })
}

/// Liveness
///
/// Answers while the process runs, and asks nothing else: a restart would not bring Postgres back.
#[endpoint(
    operation_id = "liveness",
    tags("operations"),
    responses((status_code = 200, description = "Alive", body = Liveness))
)]
pub async fn liveness() -> Result<Reply, Error> {
    Reply::json(StatusCode::OK, &Liveness { status: "ok" })
}
