//! Probes: readiness and liveness.

use salvo::Depot;
use salvo::http::StatusCode;
use salvo::http::header::{HeaderValue, RETRY_AFTER};
use salvo_oapi::{ToSchema, endpoint};
use serde::Serialize;

use super::error::Error;
use super::middleware::app;
use super::response::JsonResponse;
use crate::app::App;
use crate::store::health::PostgresState;
use crate::store::migrations::Schema;

#[derive(Serialize, ToSchema, Debug)]
#[salvo(schema(name = "Readiness"))]
pub(super) struct Readiness {
    /// `ok`, `degraded` while Redis is unavailable, or `unavailable`.
    #[salvo(schema(example = "ok"))]
    status: &'static str,
    checks: Checks,
}

#[derive(Serialize, ToSchema, Debug)]
#[salvo(schema(name = "Checks"))]
pub(super) struct Checks {
    /// `ok`, `away`, or `read_only` while it answers and takes no writes.
    #[salvo(schema(example = "ok"))]
    postgres: &'static str,
    /// `ok`; `behind` before its migrations; `forbidden` while the role lacks privileges; `encoding` where the database is
    /// not in UTF8; `unknown` while Postgres is unavailable.
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
pub(super) struct Liveness {
    #[salvo(schema(example = "ok"))]
    status: &'static str,
}

/// Readiness
///
/// Ready while Postgres answers and takes writes, the schema is current and the process is not about to end. Without Redis the
/// service is slower, but ready.
#[endpoint(
    operation_id = "readiness",
    tags("operations"),
    responses(
        (status_code = 200, description = "Ready", body = Readiness),
        (status_code = 503, description = "Not ready: send no requests", body = Readiness, headers(("retry-after" = u32, description = "Seconds to wait before the next try"))),
    )
)]
pub async fn readiness(depot: &mut Depot) -> Result<JsonResponse, Error> {
    let (status, body) = Readiness::of(app(depot)?);
    let response = JsonResponse::json(status, &body)?;
    Ok(if status == StatusCode::OK {
        response
    } else {
        response.header(RETRY_AFTER, HeaderValue::from_static("1"))
    })
}

/// Liveness
///
/// Answers while the process runs, and checks nothing else: a restart would not bring Postgres back.
#[endpoint(
    operation_id = "liveness",
    tags("operations"),
    responses((status_code = 200, description = "Alive", body = Liveness))
)]
pub async fn liveness() -> Result<JsonResponse, Error> {
    JsonResponse::json(StatusCode::OK, &Liveness { status: "ok" })
}

impl Readiness {
    fn of(app: &App) -> (StatusCode, Self) {
        let (postgres, draining) = (app.health.postgres(), app.health.is_draining());
        let redis_answers = app.redis.live().is_some();
        let checks = Checks {
            postgres: match postgres {
                PostgresState::Answers(_) => "ok",
                PostgresState::ReadOnly(..) => "read_only",
                PostgresState::Unknown | PostgresState::Unavailable => "away",
            },
            schema: match postgres {
                PostgresState::Answers(schema) | PostgresState::ReadOnly(_, schema) => match schema {
                    Schema::Current { .. } => "ok",
                    Schema::Behind { .. } => "behind",
                    Schema::Forbidden { .. } => "forbidden",
                    Schema::NotUtf8 { .. } => "encoding",
                },
                PostgresState::Unknown | PostgresState::Unavailable => "unknown",
            },
            redis: if redis_answers { "ok" } else { "away" },
            process: if draining { "draining" } else { "serving" },
        };
        match (app.health.is_ready(), redis_answers) {
            (true, true) => (StatusCode::OK, Self { status: "ok", checks }),
            (true, false) => (StatusCode::OK, Self { status: "degraded", checks }),
            (false, _) => (StatusCode::SERVICE_UNAVAILABLE, Self { status: "unavailable", checks }),
        }
    }
}
