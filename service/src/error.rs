//! One error for every fault that a client can see, and the one place where it becomes `problem+json`.

use std::borrow::Cow;
use std::time::Duration;

use salvo::http::header::{CONTENT_TYPE, HeaderName, HeaderValue, RETRY_AFTER, WWW_AUTHENTICATE};
use salvo::http::{ResBody, StatusCode};
use salvo::{Depot, Request, Response, Writer, async_trait};
use salvo_oapi::{Components, EndpointOutRegister, Operation, ToSchema};
use serde::Serialize;

use crate::request_id::RequestId;

pub const PROBLEM_JSON: &str = "application/problem+json";

/// How long a client should wait after a 503. Postgres restarts and queues drain in about this time.
const UNAVAILABLE_RETRY: Duration = Duration::from_secs(1);

#[derive(thiserror::Error, Debug)]
pub enum Error {
    #[error("{0}")]
    BadRequest(Cow<'static, str>),
    #[error("{0}")]
    Unauthorized(&'static str),
    #[error("{0}")]
    NotFound(Cow<'static, str>),
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
    #[error("{0}")]
    Unavailable(&'static str),
    /// A statement failed. Whether that is 503 or 500 is decided by `status`.
    #[error("the database did not answer as expected")]
    Database(#[from] sqlx::Error),
    #[error("an unexpected fault; the log has it under this request id")]
    Internal(#[source] Box<dyn std::error::Error + Send + Sync>),
}

/// What is wrong with one field of a well-formed request.
#[derive(Serialize, ToSchema, Clone, Debug, PartialEq, Eq)]
#[salvo(schema(name = "FieldError"))]
pub struct FieldError {
    /// The field's name, in the body or the query.
    pub field: Cow<'static, str>,
    /// The fault, and what would be right.
    pub message: Cow<'static, str>,
}

/// An error as RFC 9457 describes it. `errors` is there for 422 alone.
#[derive(Serialize, ToSchema, Debug)]
#[salvo(schema(name = "Problem"))]
pub struct Problem {
    /// `about:blank`: the status says what kind of problem it is.
    #[serde(rename = "type")]
    pub kind: &'static str,
    /// The status in words.
    pub title: &'static str,
    /// The HTTP status.
    pub status: u16,
    /// What went wrong with this very request, and how to mend it.
    pub detail: String,
    /// The response's `x-request-id`.
    pub request_id: String,
    /// Every invalid field, all at once.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub errors: Vec<FieldError>,
}

impl Problem {
    /// What such an error looks like, for the OpenAPI document.
    pub fn example(status: &str, description: &str) -> serde_json::Value {
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
    pub fn internal(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        Self::Internal(error.into())
    }

    pub fn status(&self) -> StatusCode {
        match self {
            Self::BadRequest(_) => StatusCode::BAD_REQUEST,
            Self::Unauthorized(_) => StatusCode::UNAUTHORIZED,
            Self::NotFound(_) => StatusCode::NOT_FOUND,
            Self::BodyTooLarge { .. } => StatusCode::PAYLOAD_TOO_LARGE,
            Self::NotJson => StatusCode::UNSUPPORTED_MEDIA_TYPE,
            Self::Conflict(_) => StatusCode::CONFLICT,
            Self::Invalid(_) => StatusCode::UNPROCESSABLE_ENTITY,
            Self::RateLimited { .. } => StatusCode::TOO_MANY_REQUESTS,
            Self::Unavailable(_) => StatusCode::SERVICE_UNAVAILABLE,
            Self::Database(error) if is_unavailable(error) => StatusCode::SERVICE_UNAVAILABLE,
            Self::Database(_) | Self::Internal(_) => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }

    fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::RateLimited { retry_after } => Some(*retry_after),
            _ if self.status() == StatusCode::SERVICE_UNAVAILABLE => Some(UNAVAILABLE_RETRY),
            _ => None,
        }
    }

    fn detail(&self) -> String {
        match self {
            Self::Database(error) if is_unavailable(error) => "the database is away: try again".to_owned(),
            Self::Database(_) => "an unexpected fault; the log has it under this request id".to_owned(),
            error => error.to_string(),
        }
    }
}

/// True when the fault is that Postgres cannot serve now: nothing is known to be wrong with the request.
pub fn is_unavailable(error: &sqlx::Error) -> bool {
    match error {
        sqlx::Error::Io(_)
        | sqlx::Error::Tls(_)
        | sqlx::Error::Protocol(_)
        | sqlx::Error::PoolTimedOut
        | sqlx::Error::PoolClosed
        | sqlx::Error::WorkerCrashed => true,
        sqlx::Error::Database(error) => error.code().is_some_and(|code| {
            let unavailable = ["08", "53", "57", "58"]; // connection, resources, operator, system
            // 25006: a read-only standby answers; 42P01: the schema is not there yet; 3D000: nor the database;
            // 55P03: a lock was not to be had in time.
            unavailable.iter().any(|class| code.starts_with(class))
                || ["25006", "42P01", "42703", "3D000", "55P03", "28P01", "28000"].contains(&&*code)
        }),
        _ => false,
    }
}

#[async_trait]
impl Writer for Error {
    async fn write(self, req: &mut Request, _depot: &mut Depot, res: &mut Response) {
        self.render(RequestId::of(req), res);
    }
}

impl Error {
    /// Logs what only the operator may see, and writes what the client may.
    pub fn render(&self, request_id: &str, res: &mut Response) {
        let status = self.status();
        match self {
            // Whoever watches Postgres has told that it is away, once; each request need not repeat it.
            Self::Database(error) if is_unavailable(error) => tracing::debug!(%error, "statement failed"),
            Self::Database(error) => tracing::error!(%error, "statement failed"),
            Self::Internal(error) => tracing::error!(%error, "internal fault"),
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

/// Gives an error that the framework made, an empty body under an error status, the same form as all others.
pub fn render_bare_status(status: StatusCode, request_id: &str, res: &mut Response) {
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
    /// Only what every endpoint may answer; the rest is declared where it arises: with the extractor, or on
    /// the endpoint.
    fn register(components: &mut Components, operation: &mut Operation) {
        document(components, operation, StatusCode::INTERNAL_SERVER_ERROR, "An unexpected fault", &[]);
        document(
            components,
            operation,
            StatusCode::SERVICE_UNAVAILABLE,
            "Postgres is away, or the service is saturated; nothing was acknowledged",
            &[RETRY_AFTER],
        );
    }
}

/// Adds one error response to an operation of the OpenAPI document.
pub fn document(
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
        response = response.add_header(name.as_str(), header(header_meaning(name)));
    }
    operation.responses.insert(status.as_str(), response);
}

/// A response header of the OpenAPI document.
pub fn header(description: &str) -> salvo_oapi::Header {
    let text = salvo_oapi::schema::Object::with_type(salvo_oapi::BasicType::String);
    salvo_oapi::Header::new(salvo_oapi::schema::Schema::Object(Box::new(text))).description(description)
}

fn header_meaning(name: &HeaderName) -> &'static str {
    match *name {
        RETRY_AFTER => "Seconds to wait before the next try",
        WWW_AUTHENTICATE => "The scheme to use: Bearer",
        _ => "See the response's description",
    }
}
