//! The error type of every endpoint, what each error of the other layers means over HTTP, and its rendering as
//! `application/problem+json`.

use std::borrow::Cow;
use std::time::Duration;

use salvo::http::header::{CONTENT_TYPE, HeaderName, HeaderValue, RETRY_AFTER, WWW_AUTHENTICATE};
use salvo::http::{ResBody, StatusCode};
use salvo::{Depot, Request, Response, Writer, async_trait};
use salvo_oapi::{Components, EndpointOutRegister, Header, Operation, ToSchema};
use serde::Serialize;

use super::request_id::RequestId;
use crate::chat::conversations::ConversationsError;
use crate::chat::export::ExportError;
use crate::chat::history::HistoryError;
use crate::chat::outbox::SendError;
use crate::chat::streams::StreamError;
use crate::security::limits::RateLimited;
use crate::security::passwords::HashError;
use crate::security::tokens::TokenError;
use crate::store::postgres::{is_unavailable, reason};
use crate::telemetry::causes::causes;

pub(super) const PROBLEM_JSON: &str = "application/problem+json";

/// How long a client should wait after a 503. Postgres restarts and queues drain in about this time.
const UNAVAILABLE_RETRY: Duration = Duration::from_secs(1);

#[derive(thiserror::Error, Debug)]
pub(super) enum Error {
    #[error("{0}")]
    BadRequest(Cow<'static, str>),
    #[error("{0}")]
    Unauthorized(&'static str),
    #[error("{0}")]
    Forbidden(&'static str),
    #[error("{0}")]
    NotFound(Cow<'static, str>),
    #[error("the body did not arrive within {} ms: send it faster, or less of it", .limit.as_millis())]
    BodyTooSlow { limit: Duration },
    #[error("the body is larger than {limit_bytes} bytes")]
    BodyTooLarge { limit_bytes: usize },
    #[error("the body must be JSON: send Content-Type: application/json")]
    NotJson,
    #[error("{0}")]
    Conflict(&'static str),
    #[error("{}", summary(.0))]
    Invalid(Vec<FieldError>),
    #[error("too many requests: try again in {} s", .retry_after.as_secs())]
    RateLimited { retry_after: Duration },
    #[error("too many new conversations in this hour: try again in {} s", .retry_after.as_secs())]
    TooManyNewConversations { retry_after: Duration },
    #[error("another export of yours runs: try again in {} s, or read that one to its end", .retry_after.as_secs())]
    ExportRunning { retry_after: Duration },
    #[error("{0}")]
    Unavailable(&'static str),
    /// A statement failed: 503 where Postgres is unavailable, else 500.
    #[error("the database did not answer as expected")]
    Database(#[from] sqlx::Error),
    #[error("an unexpected fault; the log has it under this request id")]
    Internal(#[source] Box<dyn std::error::Error + Send + Sync>),
}

/// What is wrong with one field of a well-formed request.
#[derive(Serialize, ToSchema, Clone, Debug, PartialEq, Eq)]
#[salvo(schema(name = "FieldError"))]
pub(super) struct FieldError {
    /// The field's name, in the body or the query.
    pub field: Cow<'static, str>,
    /// The fault, and what would be right.
    pub message: Cow<'static, str>,
}

/// An error as RFC 9457 describes it. `errors` is there for 422 alone.
#[derive(Serialize, ToSchema, Debug)]
#[salvo(schema(name = "Problem"))]
pub(super) struct Problem {
    /// `about:blank`: the status says what kind of problem it is.
    #[serde(rename = "type")]
    pub kind: &'static str,
    /// The status in words.
    pub title: &'static str,
    /// The HTTP status.
    pub status: u16,
    /// What is wrong with this request, and how to fix it.
    pub detail: String,
    /// The response's `x-request-id`.
    pub request_id: String,
    /// Every invalid field, all at once.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub errors: Vec<FieldError>,
}

impl Problem {
    /// An example for the OpenAPI document.
    pub(super) fn example(status: &str, description: &str) -> serde_json::Value {
        let status = status.parse().unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let fault = FieldError { field: "content".into(), message: "is missing: send a string".into() };
        let errors = if status == StatusCode::UNPROCESSABLE_ENTITY { vec![fault] } else { Vec::new() };
        let detail = if errors.is_empty() { description.to_owned() } else { summary(&errors) };
        let problem = Self::new(status, detail, errors, "01920b1e9f6a7c7e8f4e0f6c1f4f2a11");
        serde_json::to_value(problem).unwrap_or_default()
    }

    fn new(status: StatusCode, detail: String, errors: Vec<FieldError>, request_id: &str) -> Self {
        Self {
            kind: "about:blank",
            title: status.canonical_reason().unwrap_or("Error"),
            status: status.as_u16(),
            detail,
            request_id: request_id.to_owned(),
            errors,
        }
    }
}

impl Error {
    pub(super) fn internal(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        Self::Internal(error.into())
    }

    pub(super) fn status(&self) -> StatusCode {
        match self {
            Self::BadRequest(_) => StatusCode::BAD_REQUEST,
            Self::Unauthorized(_) => StatusCode::UNAUTHORIZED,
            Self::Forbidden(_) => StatusCode::FORBIDDEN,
            Self::NotFound(_) => StatusCode::NOT_FOUND,
            Self::BodyTooSlow { .. } => StatusCode::REQUEST_TIMEOUT,
            Self::BodyTooLarge { .. } => StatusCode::PAYLOAD_TOO_LARGE,
            Self::NotJson => StatusCode::UNSUPPORTED_MEDIA_TYPE,
            Self::Conflict(_) => StatusCode::CONFLICT,
            Self::Invalid(_) => StatusCode::UNPROCESSABLE_ENTITY,
            Self::RateLimited { .. } | Self::TooManyNewConversations { .. } | Self::ExportRunning { .. } => {
                StatusCode::TOO_MANY_REQUESTS
            }
            Self::Unavailable(_) => StatusCode::SERVICE_UNAVAILABLE,
            Self::Database(error) if is_unavailable(error) => StatusCode::SERVICE_UNAVAILABLE,
            Self::Database(_) | Self::Internal(_) => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }

    fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::RateLimited { retry_after }
            | Self::TooManyNewConversations { retry_after }
            | Self::ExportRunning { retry_after } => Some(*retry_after),
            _ if self.status() == StatusCode::SERVICE_UNAVAILABLE => Some(UNAVAILABLE_RETRY),
            _ => None,
        }
    }

    fn detail(&self) -> String {
        match self {
            Self::Database(error) if is_unavailable(error) => {
                "the database is unavailable: try again".to_owned()
            }
            Self::Database(_) => "an unexpected fault; the log has it under this request id".to_owned(),
            error => error.to_string(),
        }
    }
}

/// A Postgres that only reads may lag behind, so what it lacks may exist.
pub(super) const MAY_BE_MISSING: Error =
    Error::Unavailable("the database only reads and may be out of date: try again");
/// A valid token whose session has ended, or whose user was deleted.
pub(super) const USER_GONE: Error =
    Error::Unauthorized("the token's session has ended, or its user is gone: log in again");
pub(super) const NO_PEER: Error = Error::NotFound(Cow::Borrowed("there is no user with this peer_id"));
pub(super) const NO_RECIPIENT: Error =
    Error::NotFound(Cow::Borrowed("there is no user with this recipient_id"));

impl From<SendError> for Error {
    fn from(error: SendError) -> Self {
        match error {
            SendError::SenderGone => USER_GONE,
            SendError::NoSuchRecipient => NO_RECIPIENT,
            // No more than the status says: neither why, nor since when.
            SendError::Blocked => Self::Forbidden("you cannot write to this user"),
            SendError::TooManyNewConversations { retry_after } => {
                Self::TooManyNewConversations { retry_after }
            }
            SendError::KeyReused => {
                Self::Conflict("this Idempotency-Key stands for another message: use a new key")
            }
            SendError::QueueFull => {
                Self::Unavailable("too many messages are waiting to be stored: try again")
            }
            SendError::OutcomeUnknown => Self::Unavailable(
                "the database is unavailable: the message may not have been stored, try again",
            ),
            SendError::WriterEnded => Self::Unavailable("the message may not have been stored: try again"),
            SendError::Database(error) => Self::Database(error),
            SendError::Internal(fault) => Self::internal(fault),
        }
    }
}

impl From<HistoryError> for Error {
    fn from(error: HistoryError) -> Self {
        match error {
            HistoryError::ReaderGone => USER_GONE,
            HistoryError::NoSuchPeer => NO_PEER,
            HistoryError::NotCached => {
                Self::Unavailable("the database is unavailable, and this page is not cached: try again")
            }
            HistoryError::MayBeMissing => MAY_BE_MISSING,
            HistoryError::Unsettled(_) => Self::Unavailable("the database is unavailable: try again"),
            HistoryError::Database(error) => Self::Database(error),
        }
    }
}

impl From<ConversationsError> for Error {
    fn from(error: ConversationsError) -> Self {
        match error {
            ConversationsError::UserGone => USER_GONE,
            ConversationsError::MayBeMissing => MAY_BE_MISSING,
            ConversationsError::OnlyReads => Self::Unavailable("the database only reads: try again"),
            ConversationsError::Unreadable => Self::internal(error),
            ConversationsError::Database(error) => Self::Database(error),
        }
    }
}

impl From<ExportError> for Error {
    fn from(error: ExportError) -> Self {
        match error {
            ExportError::UserGone => USER_GONE,
            ExportError::Running { retry_after } => Self::ExportRunning { retry_after },
            ExportError::TooMany => Self::Unavailable("too many exports at once: try again"),
            ExportError::Database(error) => Self::Database(error),
        }
    }
}

impl From<StreamError> for Error {
    fn from(error: StreamError) -> Self {
        match error {
            StreamError::UserGone => USER_GONE,
            StreamError::Unavailable => Self::Unavailable("the database is unavailable: try again"),
            StreamError::Database(error) => Self::Database(error),
        }
    }
}

impl From<HashError> for Error {
    fn from(error: HashError) -> Self {
        match error {
            HashError::QueueFull => Self::Unavailable("too many logins and registrations at once: try again"),
            error => Self::internal(error),
        }
    }
}

impl From<TokenError> for Error {
    fn from(error: TokenError) -> Self {
        Self::internal(error)
    }
}

impl From<RateLimited> for Error {
    fn from(RateLimited { retry_after }: RateLimited) -> Self {
        Self::RateLimited { retry_after }
    }
}

#[async_trait]
impl Writer for Error {
    async fn write(self, req: &mut Request, _depot: &mut Depot, res: &mut Response) {
        self.render(RequestId::of(req), res);
    }
}

impl Error {
    /// Logs what only the operator may see, and writes what the client may see.
    pub(super) fn render(&self, request_id: &str, res: &mut Response) {
        let status = self.status();
        match self {
            // The health task logs once that Postgres is unavailable; requests do not repeat it.
            Self::Database(error) if is_unavailable(error) => {
                tracing::debug!(error = reason(error), "statement failed")
            }
            Self::Database(error) => tracing::error!(error = reason(error), "statement failed"),
            Self::Internal(error) => tracing::error!(error = causes(&**error), "internal fault"),
            _ => {}
        }
        if let Some(after) = self.retry_after() {
            res.headers_mut().insert(RETRY_AFTER, HeaderValue::from(after.as_secs().max(1)));
        }
        let errors = match self {
            Self::Invalid(errors) => errors.clone(),
            _ => Vec::new(),
        };
        render_problem(status, self.detail(), errors, request_id, res);
    }
}

/// Renders an error of the framework, which has a status and no body, like all others.
pub(super) fn render_bare_status(status: StatusCode, request_id: &str, res: &mut Response) {
    let detail = match status {
        StatusCode::NOT_FOUND => "there is nothing at this path; GET /docs lists what there is".to_owned(),
        StatusCode::METHOD_NOT_ALLOWED => {
            "this path does not take the method: the Allow header names those it takes".to_owned()
        }
        StatusCode::INTERNAL_SERVER_ERROR => {
            "an unexpected fault; the log has it under this request id".to_owned()
        }
        _ => status.canonical_reason().unwrap_or("the request failed").to_lowercase(),
    };
    render_problem(status, detail, Vec::new(), request_id, res);
}

fn render_problem(
    status: StatusCode,
    detail: String,
    errors: Vec<FieldError>,
    request_id: &str,
    res: &mut Response,
) {
    let problem = Problem::new(status, detail, errors, request_id);
    if status == StatusCode::UNAUTHORIZED {
        res.headers_mut().insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
    }
    res.status_code(status);
    res.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(PROBLEM_JSON));
    let body = serde_json::to_vec(&problem).unwrap_or_default();
    res.replace_body(ResBody::Once(body.into()));
}

fn summary(errors: &[FieldError]) -> String {
    let faults: Vec<String> =
        errors.iter().map(|error| format!("{}: {}", error.field, error.message)).collect();
    faults.join("; ")
}

impl EndpointOutRegister for Error {
    /// Only what every endpoint may answer. Extractors and endpoints declare their own errors.
    fn register(components: &mut Components, operation: &mut Operation) {
        document(components, operation, StatusCode::INTERNAL_SERVER_ERROR, "An unexpected fault", &[]);
        document(
            components,
            operation,
            StatusCode::SERVICE_UNAVAILABLE,
            "Postgres is unavailable, or the service is saturated; nothing was acknowledged",
            &[RETRY_AFTER],
        );
    }
}

/// Adds one error response to an operation of the OpenAPI document.
pub(super) fn document(
    components: &mut Components,
    operation: &mut Operation,
    status: StatusCode,
    description: &str,
    headers: &[HeaderName],
) {
    let schema = Problem::to_schema(components);
    let mut response =
        salvo_oapi::Response::new(description).add_content(PROBLEM_JSON, salvo_oapi::Content::new(schema));
    for name in headers {
        response = response.add_header(name.as_str(), header(components, name));
    }
    operation.responses.insert(status.as_str(), response);
}

/// A response header of the OpenAPI document.
fn header(components: &mut Components, name: &HeaderName) -> Header {
    let (schema, description) = match *name {
        RETRY_AFTER => (u32::to_schema(components), "Seconds to wait before the next try"),
        WWW_AUTHENTICATE => (String::to_schema(components), "The scheme to use: Bearer"),
        _ => (String::to_schema(components), "See the response's description"),
    };
    Header::new(schema).description(description)
}
