//! The extractor that demands a valid access token.

use salvo::extract::{Extractible, Metadata};
use salvo::http::StatusCode;
use salvo::http::header::{AUTHORIZATION, WWW_AUTHENTICATE};
use salvo::{Depot, Request};
use salvo_oapi::{Components, EndpointArgRegister, Operation, SecurityRequirement};
use uuid::Uuid;

use super::error::{self, Error};
use super::middleware::app;
use crate::security::tokens::Verified;

/// The name of the bearer scheme in the OpenAPI document.
pub(super) const SECURITY_SCHEME: &str = "bearer";

/// The user that a valid token names. An endpoint that takes it answers 401 without one.
#[derive(Clone, Copy, Debug)]
pub(super) struct Caller {
    pub id: Uuid,
    pub session: Uuid,
    /// When the token expires, in seconds since 1970.
    pub expires: u64,
}

impl Caller {
    /// The caller that was extracted from this request.
    pub(super) fn of(depot: &Depot) -> Option<Self> {
        depot.get_typed::<Self>().ok().copied()
    }
}

impl<'ex> Extractible<'ex> for Caller {
    fn metadata() -> &'static Metadata {
        static METADATA: Metadata = Metadata::new("Caller");
        &METADATA
    }

    #[expect(refining_impl_trait, reason = "callers outside the endpoint macro want the concrete error")]
    async fn extract(req: &'ex mut Request, depot: &'ex mut Depot) -> Result<Self, Error> {
        let Some(header) = req.headers().get(AUTHORIZATION) else {
            return Err(Error::Unauthorized(
                "a token is needed: send Authorization: Bearer <token from POST /login>",
            ));
        };
        let token = header.to_str().ok().and_then(|header| header.split_once(' '));
        let app = app(depot)?;
        app.passwords.note_authenticated_request();
        let verified = match token {
            Some((scheme, token)) if scheme.eq_ignore_ascii_case("bearer") => {
                app.tokens.verify(token.trim_start_matches(' '))
            }
            _ => return Err(Error::Unauthorized("the header must be: Authorization: Bearer <token>")),
        };
        let Verified { user: id, session, expires } =
            verified.ok_or(Error::Unauthorized("the token is invalid or expired: log in again"))?;
        let caller = Self { id, session, expires };
        depot.insert_typed(caller);
        Ok(caller)
    }
}

impl EndpointArgRegister for Caller {
    fn register(components: &mut Components, operation: &mut Operation, _arg: &str) {
        let requirement = SecurityRequirement::new(SECURITY_SCHEME, Vec::<String>::new());
        operation.securities.get_or_insert_default().push(requirement);
        document_unauthorized(components, operation, "No token, or a bad, expired or foreign one");
    }
}

fn document_unauthorized(components: &mut Components, operation: &mut Operation, description: &str) {
    error::document(components, operation, StatusCode::UNAUTHORIZED, description, &[WWW_AUTHENTICATE]);
}
