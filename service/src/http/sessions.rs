//! Sessions: log in, refresh the tokens, log out, see where one is logged in.

use std::borrow::Cow;

use salvo::http::StatusCode;
use salvo::http::header::USER_AGENT;
use salvo::{Depot, Request, Writer};
use salvo_oapi::{ToSchema, endpoint};
use secrecy::ExposeSecret as _;
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use uuid::Uuid;

use super::body::{Body, Faults, Text};
use super::caller::Caller;
use super::client_ip::client_ip;
use super::error::{Error, Problem, USER_GONE};
use super::middleware::app;
use super::rate_limit::LoginPermit;
use super::response::{JsonResponse, NoContent};
use super::users::known_to_be_missing;
use crate::app::App;
use crate::security::sessions::{Client, Ending, Grant};
use crate::store::operation::Operation;
use crate::store::postgres::Database;
use crate::telemetry::metrics::AuthKind;
use crate::timestamp;

#[derive(Deserialize, ToSchema, Debug)]
#[salvo(schema(name = "Login"))]
pub(super) struct Login {
    /// In any case.
    #[serde(default)]
    #[salvo(schema(value_type = String, required = true, example = "ana"))]
    username: Text,
    #[serde(default)]
    #[salvo(schema(value_type = String, required = true, example = "correct horse battery"))]
    password: Text,
}

#[derive(Deserialize, ToSchema, Debug)]
#[salvo(schema(name = "Refresh"))]
pub(super) struct Refresh {
    /// The newest one that the client was given.
    #[serde(default)]
    #[salvo(schema(value_type = String, required = true, example = "c29tZXRoaW5nIHRoYXQgb25seSB0aGUgY2xpZW50IGhhcw"))]
    refresh_token: Text,
}

#[derive(Serialize, ToSchema, Debug)]
#[salvo(schema(name = "Tokens"))]
pub(super) struct Tokens {
    /// Send it as `Authorization: Bearer <access_token>`.
    #[salvo(schema(example = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIwMTkyMGIxZSJ9.c2lnbmF0dXJl"))]
    pub access_token: String,
    #[salvo(schema(example = "bearer"))]
    pub token_type: &'static str,
    /// Seconds.
    #[salvo(schema(example = 3600))]
    pub expires_in: u64,
    /// For `POST /refresh`, once. Keep it where only this client can read it.
    #[salvo(schema(example = "c29tZXRoaW5nIHRoYXQgb25seSB0aGUgY2xpZW50IGhhcw"))]
    pub refresh_token: String,
    /// Seconds. Each refresh begins them anew.
    #[salvo(schema(example = 2592000))]
    pub refresh_expires_in: u64,
}

#[derive(Serialize, ToSchema, Debug)]
#[salvo(schema(name = "Session"))]
pub(super) struct Session {
    #[salvo(schema(value_type = String, example = "5f0c1f4f-2a11-4f4e-8f4e-01920b1e9f6a"))]
    pub id: Uuid,
    /// The login.
    #[serde(serialize_with = "timestamp::serialize")]
    #[salvo(schema(value_type = String, format = DateTime, example = "2026-01-31T12:00:00.123456Z"))]
    pub created_at: OffsetDateTime,
    /// The login or the last refresh.
    #[serde(serialize_with = "timestamp::serialize")]
    #[salvo(schema(value_type = String, format = DateTime, example = "2026-02-01T12:00:00.123456Z"))]
    pub last_used_at: OffsetDateTime,
    /// The address that logged in.
    #[salvo(schema(example = "203.0.113.7"))]
    pub client_address: Option<String>,
    /// The `User-Agent` that logged in, as it was sent.
    #[salvo(schema(example = "ana's phone"))]
    pub user_agent: Option<String>,
    /// Whether it is the caller's own.
    #[salvo(schema(example = true))]
    pub current: bool,
}

/// Exchange a username and a password for tokens
///
/// This begins a session.
#[endpoint(
    operation_id = "login",
    tags("sessions"),
    responses(
        (status_code = 200, description = "The tokens", body = Tokens),
        (status_code = 401, description = "Wrong username or password", body = Problem, content_type = "application/problem+json", headers(("www-authenticate" = String, description = "The scheme to use: Bearer"))),
    )
)]
pub async fn login(
    _permit: LoginPermit,
    body: Body<Login>,
    req: &mut Request,
    depot: &mut Depot,
) -> Result<JsonResponse, Error> {
    const WRONG: Error = Error::Unauthorized("wrong username or password");
    let app = app(depot)?;
    let Login { username, password } = body.0;
    let mut faults = Faults::default();
    // A name or password that no user can have is wrong, not an invalid request.
    let username = faults.take("username", username, Ok);
    let password = faults.take("password", password, Ok);
    faults.check()?;
    let known = find_credentials(&app.database, &username).await?;
    let (id, hash) = known.map(|known| (known.id, known.password_hash)).unzip();
    let matches = app.passwords.verify(password, hash.clone()).await?;
    app.metrics.auth_attempt(AuthKind::Login, matches);
    let (Some(id), Some(hash), true) = (id, hash, matches) else {
        known_to_be_missing(app)?;
        return Err(WRONG);
    };
    let agent = req.headers().get(USER_AGENT);
    let client = Client {
        address: client_ip(req, &app.config.trusted_proxies).map(|address| address.to_string()),
        agent: agent.map(|agent| String::from_utf8_lossy(agent.as_bytes()).into_owned()),
    };
    let grant = app.sessions.begin(id, &hash, client).await?;
    tokens(app, &grant.ok_or(WRONG)?)
}

/// Exchange a refresh token for new tokens
///
/// A refresh token works once. Used again within 10 seconds it answers the same tokens, for a client that lost the answer;
/// later it ends its session, because two clients have it.
#[endpoint(
    operation_id = "refresh",
    tags("sessions"),
    responses(
        (status_code = 200, description = "The tokens, both new", body = Tokens),
        (status_code = 401, description = "The refresh token is unknown, was used before, or has expired", body = Problem, content_type = "application/problem+json", headers(("www-authenticate" = String, description = "The scheme to use: Bearer"))),
    )
)]
pub async fn refresh(body: Body<Refresh>, depot: &mut Depot) -> Result<JsonResponse, Error> {
    let app = app(depot)?;
    let mut faults = Faults::default();
    let token = faults.take("refresh_token", body.0.refresh_token, Ok);
    faults.check()?;
    let grant = app.sessions.refresh(&token).await?;
    app.metrics.auth_attempt(AuthKind::Refresh, grant.is_some());
    match grant {
        Some(grant) => tokens(app, &grant),
        None => {
            known_to_be_missing(app)?;
            Err(Error::Unauthorized("the refresh token is unknown, used or expired: log in again"))
        }
    }
}

/// End the caller's session
#[endpoint(
    operation_id = "logout",
    tags("sessions"),
    responses((status_code = 204, description = "Its tokens are of no use any more"))
)]
pub async fn logout(caller: Caller, depot: &mut Depot) -> Result<NoContent, Error> {
    let app = app(depot)?;
    check_caller(app, caller).await?;
    app.sessions.end(caller.id, Ending::Own(caller.session)).await?;
    Ok(NoContent)
}

/// End all of the caller's sessions
#[endpoint(
    operation_id = "logout_all",
    tags("sessions"),
    responses((status_code = 204, description = "No token of the user is of any use any more"))
)]
pub async fn logout_all(caller: Caller, depot: &mut Depot) -> Result<NoContent, Error> {
    let app = app(depot)?;
    check_caller(app, caller).await?;
    app.sessions.end(caller.id, Ending::All).await?;
    Ok(NoContent)
}

/// The caller's sessions, newest first
#[endpoint(
    operation_id = "list_sessions",
    tags("sessions"),
    responses((status_code = 200, description = "The sessions", body = Vec<Session>))
)]
pub async fn list(caller: Caller, depot: &mut Depot) -> Result<JsonResponse, Error> {
    let app = app(depot)?;
    check_caller(app, caller).await?;
    let sessions = app.sessions.list(caller.id).await?;
    let sessions: Vec<Session> = sessions
        .into_iter()
        .map(|session| Session {
            id: session.id,
            created_at: session.created_at,
            last_used_at: session.last_used_at,
            client_address: session.client_address,
            user_agent: session.user_agent,
            current: session.id == caller.session,
        })
        .collect();
    JsonResponse::json(StatusCode::OK, &sessions)
}

/// End one of the caller's sessions
#[endpoint(
    operation_id = "end_session",
    tags("sessions"),
    parameters(("id" = String, Path, description = "As in `GET /sessions`", example = json!("5f0c1f4f-2a11-4f4e-8f4e-01920b1e9f6a"))),
    responses(
        (status_code = 204, description = "Its tokens are of no use any more"),
        (status_code = 404, description = "The caller has no such session", body = Problem, content_type = "application/problem+json"),
    )
)]
pub async fn end(caller: Caller, req: &mut Request, depot: &mut Depot) -> Result<NoContent, Error> {
    let app = app(depot)?;
    check_caller(app, caller).await?;
    // What is no id is no session's: the nil id is not, either.
    let id = req.param::<&str>("id").and_then(|id| Uuid::parse_str(id).ok()).unwrap_or_default();
    if app.sessions.end(caller.id, Ending::Listed(id)).await? == 0 {
        return Err(Error::NotFound(Cow::Borrowed("you have no such session: GET /sessions lists them")));
    }
    Ok(NoContent)
}

/// Fails if the token is of no use any more.
pub(super) async fn check_caller(app: &App, caller: Caller) -> Result<(), Error> {
    if app.sessions.is_valid(caller.id, caller.session).await? {
        return Ok(());
    }
    known_to_be_missing(app)?;
    Err(USER_GONE)
}

fn tokens(app: &App, grant: &Grant) -> Result<JsonResponse, Error> {
    let (access_token, expires_in) = app.tokens.issue(grant.user, grant.session, grant.issued_at)?;
    let tokens = Tokens {
        access_token,
        token_type: "bearer",
        expires_in,
        refresh_token: grant.refresh_token.expose_secret().to_owned(),
        refresh_expires_in: app.sessions.lifetime().as_secs(),
    };
    JsonResponse::json(StatusCode::OK, &tokens)
}

struct Credentials {
    id: Uuid,
    password_hash: String,
}

async fn find_credentials(database: &Database, username: &str) -> Result<Option<Credentials>, sqlx::Error> {
    // Postgres refuses NUL in a text; no username has one.
    if username.contains('\0') {
        return Ok(None);
    }
    let mut connection = database.acquire().await?;
    let query = sqlx::query_as!(
        Credentials,
        // One who is disabled is as good as unknown, and costs as much.
        "SELECT id, password_hash FROM users WHERE username_key = $1 AND disabled_at IS NULL",
        username.to_ascii_lowercase()
    );
    database.run(Operation::FindCredentials, query.fetch_optional(&mut *connection)).await
}
