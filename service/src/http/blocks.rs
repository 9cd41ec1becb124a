//! Blocks: whose messages a user does not want. The statement that stores messages looks for them.

use std::borrow::Cow;

use salvo::http::StatusCode;
use salvo::{Depot, Request, Writer};
use salvo_oapi::endpoint;
use uuid::Uuid;

use super::caller::Caller;
use super::error::{Error, FieldError, Problem, USER_GONE};
use super::middleware::app;
use super::response::{JsonResponse, NoContent};
use super::sessions::check_caller;
use super::users::{PublicUser, known_to_be_missing};
use crate::app::App;
use crate::store::barrier;
use crate::store::operation::Operation;
use crate::store::postgres::{Database, violated_constraint};

/// Users that one user may block, so that the list is one answer of a hundred kilobytes at most. Requests at the same moment may
/// exceed it by a few.
const BLOCKED_MAX: i64 = 1000;

const NO_USER: Error = Error::NotFound(Cow::Borrowed("there is no user with this id"));

/// Block a user
///
/// From the answer on no message of theirs to the caller is stored: they get 403. The caller may still write to them, and both
/// read what there is. One user blocks 1000 others at most.
#[endpoint(
    operation_id = "block_user",
    tags("blocks"),
    parameters(("user_id" = String, Path, description = "As in `GET /users/{username}`", example = json!("01920b1e-9f6a-7c7e-8f4e-0f6c1f4f2a12"))),
    responses(
        (status_code = 204, description = "The user is blocked"),
        (status_code = 404, description = "No such user", body = Problem, content_type = "application/problem+json"),
        (status_code = 422, description = "The caller's own id, or too many blocks", body = Problem, content_type = "application/problem+json"),
    )
)]
pub async fn put(caller: Caller, req: &mut Request, depot: &mut Depot) -> Result<NoContent, Error> {
    let app = app(depot)?;
    check_caller(app, caller).await?;
    let blocked = named_user(req).ok_or(NO_USER)?;
    if blocked == caller.id {
        return Err(invalid("is your own id: block another user"));
    }
    match block(&app.database, caller.id, blocked).await? {
        Outcome::Blocked => {}
        Outcome::NoSuchUser => {
            known_to_be_missing(app)?;
            return Err(NO_USER);
        }
        Outcome::CallerGone => return Err(USER_GONE),
        Outcome::TooMany => {
            return Err(invalid("is one too many: you block 1000 users, remove one of them first"));
        }
    }
    // Also where the block was there: who repeats a request may not have had its answer.
    barrier::writers_before_now_have_ended(&app.database, app.config.statement_timeout()).await?;
    Ok(NoContent)
}

/// Remove a block
#[endpoint(
    operation_id = "unblock_user",
    tags("blocks"),
    parameters(("user_id" = String, Path, description = "As in `GET /blocks`", example = json!("01920b1e-9f6a-7c7e-8f4e-0f6c1f4f2a12"))),
    responses((status_code = 204, description = "The user is not blocked, or no longer"))
)]
pub async fn remove(caller: Caller, req: &mut Request, depot: &mut Depot) -> Result<NoContent, Error> {
    let app = app(depot)?;
    check_caller(app, caller).await?;
    // What is no id is nobody's.
    if let Some(blocked) = named_user(req) {
        unblock(&app.database, caller.id, blocked).await?;
    }
    Ok(NoContent)
}

/// The users whom the caller has blocked, the latest first
///
/// All of them: there are 1000 at most.
#[endpoint(
    operation_id = "list_blocks",
    tags("blocks"),
    responses((status_code = 200, description = "The users", body = Vec<PublicUser>))
)]
pub async fn list(caller: Caller, depot: &mut Depot) -> Result<JsonResponse, Error> {
    let app = app(depot)?;
    check_caller(app, caller).await?;
    JsonResponse::json(StatusCode::OK, &find_blocked(app, caller.id).await?)
}

fn invalid(fault: &'static str) -> Error {
    Error::Invalid(vec![FieldError { field: "user_id".into(), message: fault.into() }])
}

fn named_user(req: &Request) -> Option<Uuid> {
    req.param::<&str>("user_id").and_then(|id| Uuid::try_parse(id).ok())
}

enum Outcome {
    Blocked,
    NoSuchUser,
    CallerGone,
    TooMany,
}

async fn block(database: &Database, blocker: Uuid, blocked: Uuid) -> Result<Outcome, sqlx::Error> {
    let mut connection = database.acquire().await?;
    let query = sqlx::query!(
        r#"WITH known AS (
               SELECT id, EXISTS (SELECT FROM blocks WHERE blocker = $1 AND blocked = $2)
                          OR (SELECT count(*) FROM blocks WHERE blocker = $1) < $3 AS fits
               FROM users WHERE id = $2
           ), added AS (
               INSERT INTO blocks (blocker, blocked) SELECT $1, id FROM known WHERE fits
               ON CONFLICT DO NOTHING
           ), marked AS (
               UPDATE users SET has_blocked = true
               WHERE id = $1 AND NOT has_blocked AND EXISTS (SELECT FROM known WHERE fits)
           )
           SELECT fits AS "fits!" FROM known"#,
        blocker,
        blocked,
        BLOCKED_MAX,
    );
    match database.run(Operation::Block, query.fetch_optional(&mut *connection)).await {
        Ok(Some(known)) if known.fits => Ok(Outcome::Blocked),
        Ok(Some(_)) => Ok(Outcome::TooMany),
        Ok(None) => Ok(Outcome::NoSuchUser),
        // Deleted at this moment.
        Err(error) => match violated_constraint(&error) {
            Some("blocks_blocked_fkey") => Ok(Outcome::NoSuchUser),
            Some("blocks_blocker_fkey") => Ok(Outcome::CallerGone),
            _ => Err(error),
        },
    }
}

async fn unblock(database: &Database, blocker: Uuid, blocked: Uuid) -> Result<(), sqlx::Error> {
    let mut connection = database.acquire().await?;
    let query = sqlx::query!("DELETE FROM blocks WHERE blocker = $1 AND blocked = $2", blocker, blocked);
    database.run(Operation::Unblock, query.execute(&mut *connection)).await.map(|_| ())
}

async fn find_blocked(app: &App, blocker: Uuid) -> Result<Vec<PublicUser>, sqlx::Error> {
    let mut connection = app.database.acquire().await?;
    let query = sqlx::query_as!(
        PublicUser,
        "SELECT u.id, u.username FROM blocks b JOIN users u ON u.id = b.blocked
         WHERE b.blocker = $1
         ORDER BY b.created_at DESC, u.id LIMIT $2",
        blocker,
        BLOCKED_MAX,
    );
    app.database.run(Operation::ListBlocks, query.fetch_all(&mut *connection)).await
}
