//! Users: register, get the caller's user, find another.

use std::borrow::Cow;
use std::fmt::Display;

use salvo::http::StatusCode;
use salvo::{Depot, Request, Writer};
use salvo_oapi::{ToSchema, endpoint};
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use uuid::Uuid;

use super::body::{Body, Faults, Text};
use super::caller::Caller;
use super::error::{Error, MAY_BE_MISSING, Problem, USER_GONE};
use super::middleware::app;
use super::rate_limit::RegisterPermit;
use super::response::JsonResponse;
use crate::app::App;
use crate::security::passwords::{PASSWORD_LENGTH, password_length};
use crate::store::operation::Operation;
use crate::store::postgres::{Database, violated_constraint};
use crate::telemetry::metrics::AuthKind;
use crate::text::{self, email_key};
use crate::timestamp;

#[derive(Deserialize, ToSchema, Debug)]
#[salvo(schema(name = "Register"))]
pub(super) struct Register {
    /// Unique without regard to case.
    #[serde(default)]
    #[salvo(schema(value_type = String, required = true, min_length = 3, max_length = 32, pattern = "^[A-Za-z0-9_.-]+$", example = "ana"))]
    username: Text,
    /// Unique without regard to case, and to whether the domain is written in Unicode or as `xn--`.
    #[serde(default)]
    #[salvo(schema(value_type = String, required = true, max_length = 254, example = "ana@example.com"))]
    email: Text,
    /// Its characters are counted, and compared at a login, in Unicode's normal form C.
    #[serde(default)]
    #[salvo(schema(value_type = String, required = true, min_length = 8, max_length = 128, example = "correct horse battery"))]
    password: Text,
}

#[derive(Serialize, ToSchema, Debug)]
#[salvo(schema(name = "User"))]
pub(super) struct User {
    #[salvo(schema(value_type = String, example = "01920b1e-9f6a-7c7e-8f4e-0f6c1f4f2a11"))]
    pub id: Uuid,
    #[salvo(schema(example = "ana"))]
    pub username: String,
    #[salvo(schema(example = "ana@example.com"))]
    pub email: String,
    #[serde(serialize_with = "timestamp::serialize")]
    #[salvo(schema(value_type = String, format = DateTime, example = "2026-01-31T12:00:00.123456Z"))]
    pub created_at: OffsetDateTime,
}

/// What other users may see of a user.
#[derive(Serialize, ToSchema, Debug)]
#[salvo(schema(name = "PublicUser"))]
pub(super) struct PublicUser {
    #[salvo(schema(value_type = String, example = "01920b1e-9f6a-7c7e-8f4e-0f6c1f4f2a12"))]
    pub id: Uuid,
    #[salvo(schema(example = "ben"))]
    pub username: String,
}

/// Create a user
#[endpoint(
    operation_id = "register",
    tags("users"),
    responses(
        (status_code = 201, description = "The user", body = User),
        (status_code = 409, description = "The username or the email is taken", body = Problem, content_type = "application/problem+json"),
    )
)]
pub async fn register(
    _permit: RegisterPermit,
    body: Body<Register>,
    depot: &mut Depot,
) -> Result<JsonResponse, Error> {
    let app = app(depot)?;
    let Register { username, email, password } = body.0;
    let mut faults = Faults::default();
    let username = faults.take("username", username, valid_username);
    let email = faults.take("email", email, valid_email);
    let password = faults.take("password", password, valid_password);
    faults.check()?;
    // Before the expensive hash. The constraints decide in the end.
    if let Some(taken) = find_taken(&app.database, &username, &email).await? {
        app.metrics.auth_attempt(AuthKind::Register, false);
        return Err(taken);
    }
    let password_hash = app.passwords.hash(password).await?;
    let user = insert_user(&app.database, username, email, &password_hash).await;
    app.metrics.auth_attempt(AuthKind::Register, user.is_ok());
    JsonResponse::json(StatusCode::CREATED, &user?)
}

/// The caller's own user
#[endpoint(
    operation_id = "me",
    tags("users"),
    responses((status_code = 200, description = "The user", body = User))
)]
pub async fn me(caller: Caller, depot: &mut Depot) -> Result<JsonResponse, Error> {
    let app = app(depot)?;
    let user = find_user(&app.database, caller).await?;
    if user.is_none() {
        known_to_be_missing(app)?;
    }
    JsonResponse::json(StatusCode::OK, &user.ok_or(USER_GONE)?)
}

/// Find a user by name
///
/// This is how a client learns the id to send to.
#[endpoint(
    operation_id = "find_user",
    tags("users"),
    parameters(("username" = String, Path, description = "In any case", example = json!("ben"))),
    responses(
        (status_code = 200, description = "The user", body = PublicUser),
        (status_code = 404, description = "No such user", body = Problem, content_type = "application/problem+json"),
    )
)]
pub async fn find(caller: Caller, req: &mut Request, depot: &mut Depot) -> Result<JsonResponse, Error> {
    let username = req.param::<String>("username").unwrap_or_default();
    let app = app(depot)?;
    let (caller_exists, user) = find_by_username(&app.database, caller, &username).await?;
    if !caller_exists || user.is_none() {
        known_to_be_missing(app)?;
    }
    if !caller_exists {
        return Err(USER_GONE);
    }
    let user = user.ok_or(Error::NotFound(Cow::Borrowed("there is no user of this name")))?;
    JsonResponse::json(StatusCode::OK, &user)
}

/// A Postgres that only reads may lag behind, so a user that it lacks may exist: then this is 503 and not the answer that the
/// client would take as final.
pub(super) fn known_to_be_missing(app: &App) -> Result<(), Error> {
    match app.health.postgres_only_reads() {
        true => Err(MAY_BE_MISSING),
        false => Ok(()),
    }
}

fn valid_username(username: String) -> Result<String, Cow<'static, str>> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || "_.-".contains(c);
    if let Some(odd) = username.chars().find(|c| !allowed(*c)) {
        return Err(format!("has {odd:?}: use letters a-z, digits, and _ . - only").into());
    }
    if !(3..=32).contains(&username.len()) {
        return Err(format!("has {} characters: use 3 to 32", username.len()).into());
    }
    Ok(username)
}

fn valid_email(email: String) -> Result<String, Cow<'static, str>> {
    let fault = |fault: &dyn Display| format!("is not an address ({fault}): use one like ana@example.com");
    // RFC 5321 bounds the whole address.
    if email.len() > 254 {
        return Err(Cow::Borrowed("is longer than 254 bytes: use a shorter address"));
    }
    let Some((local, domain)) = email.rsplit_once('@') else {
        return Err(fault(&email_address::Error::MissingSeparator).into());
    };
    let Some(domain) = text::ascii_domain(domain) else {
        return Err(fault(&"its domain has a label that no domain can have").into());
    };
    // RFC 6531 allows every character beyond ASCII in the local part, also the marks that many scripts write vowels and
    // tones with. White space, controls and what is invisible would be a typing error or a trick. For the library, which
    // checks the rest, letters stand for them.
    if local.chars().any(|c| !c.is_ascii() && (c.is_control() || !text::is_visible(c))) {
        return Err(fault(&"it has an invisible character").into());
    }
    let address: String = local
        .bytes()
        .map(|byte| if byte.is_ascii() { char::from(byte) } else { 'x' })
        .chain(['@'])
        .chain(domain.chars())
        .collect();
    let options = email_address::Options::default().without_display_text().without_domain_literal();
    match email_address::EmailAddress::parse_with_options(&address, options.with_required_tld()) {
        Ok(_) => Ok(email),
        Err(error) => Err(fault(&error).into()),
    }
}

pub(super) fn valid_password(password: String) -> Result<String, Cow<'static, str>> {
    let length = password_length(&password);
    if PASSWORD_LENGTH.contains(&length) {
        Ok(password)
    } else {
        Err(format!("has {length} characters: use 8 to 128").into())
    }
}

async fn find_taken(database: &Database, username: &str, email: &str) -> Result<Option<Error>, Error> {
    let mut connection = database.acquire().await?;
    let query = sqlx::query!(
        r#"SELECT EXISTS (SELECT FROM users WHERE username_key = $1)
                      OR is_reserved_name('username', $1) AS "username!",
                  EXISTS (SELECT FROM users WHERE email_key = $2)
                      OR is_reserved_name('email', $2) AS "email!""#,
        username.to_ascii_lowercase(),
        email_key(email),
    );
    let taken = database.run(Operation::CheckTaken, query.fetch_one(&mut *connection)).await?;
    Ok(match (taken.username, taken.email) {
        (true, _) => Some(USERNAME_TAKEN),
        (_, true) => Some(EMAIL_TAKEN),
        _ => None,
    })
}

const USERNAME_TAKEN: Error = Error::Conflict("the username is taken: choose another");
const EMAIL_TAKEN: Error = Error::Conflict("the email is taken: log in, or use another");

async fn insert_user(
    database: &Database,
    username: String,
    email: String,
    password_hash: &str,
) -> Result<User, Error> {
    let id = Uuid::now_v7();
    let mut connection = database.acquire().await?;
    let query = sqlx::query_scalar!(
        "INSERT INTO users (id, username, username_key, email, email_key, password_hash)
         VALUES ($1, $2, $3, $4, $5, $6) RETURNING created_at",
        id,
        username,
        username.to_ascii_lowercase(),
        email,
        email_key(&email),
        password_hash,
    );
    match database.run(Operation::InsertUser, query.fetch_one(&mut *connection)).await {
        Ok(created_at) => Ok(User { id, username, email, created_at }),
        Err(error) => Err(match violated_constraint(&error) {
            Some("users_username_taken") => USERNAME_TAKEN,
            Some("users_email_taken") => EMAIL_TAKEN,
            _ => error.into(),
        }),
    }
}

async fn find_user(database: &Database, caller: Caller) -> Result<Option<User>, sqlx::Error> {
    let mut connection = database.acquire().await?;
    let query = sqlx::query_as!(
        User,
        "SELECT id, username, email, created_at FROM users
         WHERE id = $1 AND NOT EXISTS (SELECT FROM ended_sessions WHERE session_id = $2)",
        caller.id,
        caller.session,
    );
    database.run(Operation::FindUser, query.fetch_optional(&mut *connection)).await
}

/// Whether the caller's token is still good, and the user of that name.
async fn find_by_username(
    database: &Database,
    caller: Caller,
    username: &str,
) -> Result<(bool, Option<PublicUser>), sqlx::Error> {
    let mut connection = database.acquire().await?;
    let query = sqlx::query!(
        r#"SELECT EXISTS (SELECT FROM users WHERE id = $1)
                  AND NOT EXISTS (SELECT FROM ended_sessions WHERE session_id = $3) AS "caller!",
                  u.id AS "id?", u.username AS "username?"
           FROM (VALUES (1)) AS one LEFT JOIN users u ON u.username_key = $2"#,
        caller.id,
        username.to_ascii_lowercase().replace('\0', "?"),
        caller.session,
    );
    let found = database.run(Operation::FindUser, query.fetch_one(&mut *connection)).await?;
    let user = found.id.zip(found.username).map(|(id, username)| PublicUser { id, username });
    Ok((found.caller, user))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn usernames_are_short_and_plain() {
        for good in ["ana", "A.b_c-9", "000", &"x".repeat(32)] {
            assert!(valid_username(good.to_owned()).is_ok(), "{good}");
        }
        for bad in ["", "ab", "a b", "änne", "a@b", "ana\n", &"x".repeat(33)] {
            assert!(valid_username(bad.to_owned()).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn emails_are_addresses() {
        for good in ["ana@example.com", "a.b+c@x.example.org", "o'neil@example.com", "ü@example.com"] {
            assert!(valid_email(good.to_owned()).is_ok(), "{good}");
        }
        let long = format!("{}@{}.com", "a".repeat(60), "b.".repeat(95) + "b");
        for bad in [
            "",
            "ana",
            "ana@",
            "@example.com",
            "ana@localhost",
            "Ana <ana@example.com>",
            "a b@c.de",
            "a@b@c.de",
            &long,
        ] {
            assert!(valid_email(bad.to_owned()).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn passwords_are_counted_in_characters() {
        for good in ["12345678", "ÄÖÜäöüßß", &"🦀".repeat(128)] {
            assert!(valid_password(good.to_owned()).is_ok(), "{good}");
        }
        for bad in ["", "1234567", "ÄÖÜäöüß", &"x".repeat(129)] {
            assert!(valid_password(bad.to_owned()).is_err(), "{bad:?}");
        }
    }
}
