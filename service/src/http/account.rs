//! The caller's account: change the password, delete it.

use salvo::extract::{Extractible, Metadata};
use salvo::http::StatusCode;
use salvo::{Depot, Request, Writer};
use salvo_oapi::{
    BasicType, Components, EndpointArgRegister, Object, Operation as Documented, ToSchema, endpoint,
};
use serde::Deserialize;

use super::body::{Body, Faults, Text};
use super::caller::Caller;
use super::error::{self, Error, Problem, USER_GONE};
use super::middleware::app;
use super::query::{document_query, query_text};
use super::rate_limit::LoginPermit;
use super::response::{Accepted, NoContent};
use super::users::{known_to_be_missing, valid_password};
use crate::app::App;
use crate::store::operation::Operation;
use crate::store::postgres::Database;
use crate::telemetry::metrics::AuthKind;

#[derive(Deserialize, ToSchema, Debug)]
#[salvo(schema(name = "ChangePassword"))]
pub(super) struct ChangePassword {
    #[serde(default)]
    #[salvo(schema(value_type = String, required = true, example = "correct horse battery"))]
    current_password: Text,
    /// Its characters are counted, and compared at a login, in Unicode's normal form C.
    #[serde(default)]
    #[salvo(schema(value_type = String, required = true, min_length = 8, max_length = 128, example = "staple of another battery"))]
    new_password: Text,
}

#[derive(Deserialize, ToSchema, Debug)]
#[salvo(schema(name = "DeleteAccount"))]
pub(super) struct DeleteAccount {
    #[serde(default)]
    #[salvo(schema(value_type = String, required = true, example = "correct horse battery"))]
    password: Text,
}

/// Change the password
///
/// This ends all other sessions of the user.
#[endpoint(
    operation_id = "change_password",
    tags("sessions"),
    responses(
        (status_code = 204, description = "The new password is in force"),
        (status_code = 403, description = "The current password is wrong", body = Problem, content_type = "application/problem+json"),
    )
)]
pub async fn change_password(
    _permit: LoginPermit,
    caller: Caller,
    body: Body<ChangePassword>,
    depot: &mut Depot,
) -> Result<NoContent, Error> {
    let app = app(depot)?;
    let ChangePassword { current_password, new_password } = body.0;
    let mut faults = Faults::default();
    let current_password = faults.take("current_password", current_password, Ok);
    let new_password = faults.take("new_password", new_password, valid_password);
    faults.check()?;
    let old_hash = confirm_password(app, caller, current_password).await?;
    let new_hash = app.passwords.hash(new_password).await?;
    match app.sessions.change_password(caller.id, [&old_hash, &new_hash], caller.session).await? {
        true => Ok(NoContent),
        // Another request was first.
        false => Err(WRONG_PASSWORD),
    }
}

/// Delete the caller's account
///
/// From the answer on nobody can log in or use a token of the user. The name and the address are free for others after 30 days.
/// The user's messages lose their content in the background, unless `erase_messages=false`; those of others stay.
#[endpoint(
    operation_id = "delete_account",
    tags("users"),
    responses(
        (status_code = 202, description = "The account is deleted; the content of the messages will be, if asked for"),
        (status_code = 403, description = "The password is wrong", body = Problem, content_type = "application/problem+json"),
    )
)]
pub async fn delete(
    _permit: LoginPermit,
    caller: Caller,
    query: DeletionQuery,
    body: Body<DeleteAccount>,
    depot: &mut Depot,
) -> Result<Accepted, Error> {
    let app = app(depot)?;
    let mut faults = Faults::default();
    let password = faults.take("password", body.0.password, Ok);
    faults.check()?;
    let hash = confirm_password(app, caller, password).await?;
    if !app.deletion.delete(caller.id, &hash, query.erase_messages).await? {
        // Another request has changed it, or was first.
        return Err(WRONG_PASSWORD);
    }
    app.erasures.begin();
    Ok(Accepted)
}

/// The query of `DELETE /me`.
#[derive(Debug)]
pub(super) struct DeletionQuery {
    erase_messages: bool,
}

impl<'ex> Extractible<'ex> for DeletionQuery {
    fn metadata() -> &'static Metadata {
        static METADATA: Metadata = Metadata::new("DeletionQuery");
        &METADATA
    }

    #[expect(refining_impl_trait, reason = "the concrete error is the more useful promise")]
    async fn extract(req: &'ex mut Request, _depot: &'ex mut Depot) -> Result<Self, Error> {
        match query_text(req, "erase_messages")? {
            None | Some("true") => Ok(Self { erase_messages: true }),
            Some("false") => Ok(Self { erase_messages: false }),
            Some(_) => Err(Error::BadRequest(
                "the query parameter erase_messages must be true or false: erase_messages=true".into(),
            )),
        }
    }
}

impl EndpointArgRegister for DeletionQuery {
    fn register(components: &mut Components, operation: &mut Documented, _arg: &str) {
        let schema = Object::with_type(BasicType::Boolean).default_value(true.into());
        let description = "Whether the user's messages lose their content";
        document_query(operation, "erase_messages", false, schema, description);
        let description = "A query parameter does not parse";
        error::document(components, operation, StatusCode::BAD_REQUEST, description, &[]);
    }
}

const WRONG_PASSWORD: Error = Error::Forbidden("the current password is wrong");

/// The hash of the caller's password, if that is the one.
pub(super) async fn confirm_password(app: &App, caller: Caller, password: String) -> Result<String, Error> {
    let hash = find_hash(&app.database, caller).await?;
    let Some(hash) = hash else {
        known_to_be_missing(app)?;
        return Err(USER_GONE);
    };
    let matches = app.passwords.verify(password, Some(hash.clone())).await?;
    app.metrics.auth_attempt(AuthKind::Confirm, matches);
    if matches { Ok(hash) } else { Err(WRONG_PASSWORD) }
}

async fn find_hash(database: &Database, caller: Caller) -> Result<Option<String>, sqlx::Error> {
    let mut connection = database.acquire().await?;
    let query = sqlx::query_scalar!(
        "SELECT password_hash FROM users
         WHERE id = $1 AND disabled_at IS NULL
               AND NOT EXISTS (SELECT FROM ended_sessions WHERE session_id = $2)",
        caller.id,
        caller.session,
    );
    database.run(Operation::FindCredentials, query.fetch_optional(&mut *connection)).await
}
