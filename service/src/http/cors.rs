//! Whose pages may call the API from a browser: `CORS_ALLOWED_ORIGINS`.

use std::time::Duration;

use salvo::cors::{AllowHeaders, AllowMethods, AllowOrigin, Cors, CorsHandler, ExposeHeaders};
use salvo::http::Method;
use salvo::http::header::{
    AUTHORIZATION, CONTENT_TYPE, HeaderName, HeaderValue, LINK, ORIGIN, RETRY_AFTER, WARNING,
};

use super::messages::IDEMPOTENCY_REPLAYED;
use super::middleware::TRACERESPONSE;
use super::request_id::X_REQUEST_ID;
use crate::config::{ANY_ORIGIN, Config};

/// How long a browser may rely on a preflight; Chromium's own limit. Each response is checked nevertheless.
const MAX_AGE: Duration = Duration::from_secs(2 * 60 * 60);

/// What a page's script may send besides what every page may.
const SENT: [HeaderName; 7] = [
    AUTHORIZATION,
    CONTENT_TYPE,
    HeaderName::from_static("idempotency-key"),
    HeaderName::from_static("last-event-id"),
    HeaderName::from_static("traceparent"),
    HeaderName::from_static("tracestate"),
    X_REQUEST_ID,
];

/// What a page's script may read besides what every page may.
const READ: [HeaderName; 7] = [
    IDEMPOTENCY_REPLAYED,
    LINK,
    RETRY_AFTER,
    HeaderName::from_static("stream-position"),
    TRACERESPONSE,
    WARNING,
    X_REQUEST_ID,
];

/// Adds the headers by which a browser lets an allowed origin's pages read a response, and makes a preflight's response a 204.
/// `None` where no origin is allowed. Never with credentials: tokens travel in a header, and a cookie is none.
pub(super) fn handler(config: &Config, methods: impl IntoIterator<Item = Method>) -> Option<CorsHandler> {
    let origins = match &config.cors_allowed_origins[..] {
        [] => return None,
        [any] if any == ANY_ORIGIN => AllowOrigin::any(),
        origins => AllowOrigin::list(origins.iter().filter_map(|origin| HeaderValue::from_str(origin).ok())),
    };
    let cors = Cors::new()
        .allow_origin(origins)
        .allow_methods(AllowMethods::list(methods))
        .allow_headers(AllowHeaders::list(SENT))
        .expose_headers(ExposeHeaders::list(READ))
        .max_age(MAX_AGE)
        // The lists are the same for every preflight.
        .vary([ORIGIN]);
    Some(cors.into_handler())
}
