//! The only place where paths and middleware are named.

use std::sync::Arc;

use salvo::http::StatusCode;
use salvo::http::header::{CONTENT_SECURITY_POLICY, CONTENT_TYPE, HeaderName, HeaderValue};
use salvo::{Depot, FlowCtrl, Request, Response, Router, Service, handler};
use salvo_oapi::swagger_ui::SwaggerUi;

use crate::app::App;
use crate::edge::Edge;
use crate::error::Error;
use crate::input::app;
use crate::{health, messages, openapi, users};

/// What the public port answers, and the status of success: the labels of its metrics, made before the first
/// request. A route that is missing here would be counted as unmatched.
pub const ENDPOINTS: [(&str, &str, StatusCode); 9] = [
    ("POST", "/register", StatusCode::CREATED),
    ("POST", "/login", StatusCode::OK),
    ("GET", "/me", StatusCode::OK),
    ("GET", "/users/{username}", StatusCode::OK),
    ("POST", "/send", StatusCode::CREATED),
    ("GET", "/messages", StatusCode::OK),
    ("GET", "/healthz", StatusCode::OK),
    ("GET", "/openapi.json", StatusCode::OK),
    ("GET", "/docs/{**}", StatusCode::OK),
];

/// The public port.
pub fn public(app: &Arc<App>) -> Service {
    let document = openapi::document(&api());
    let docs = SwaggerUi::new("/openapi.json").title("chat-service");
    let router = api()
        .push(Router::with_path("/openapi.json").get(document))
        .push(Router::with_path("/docs/{**}").hoop(docs_headers).get(docs));
    Service::new(router).hoop(Edge::new(Arc::clone(app)))
}

/// What the OpenAPI document describes.
pub fn api() -> Router {
    Router::new()
        .hoop(api_headers)
        .push(Router::with_path("/register").post(users::register))
        .push(Router::with_path("/login").post(users::login))
        .push(Router::with_path("/me").get(users::me))
        .push(Router::with_path("/users/{username}").get(users::find))
        .push(Router::with_path("/send").post(messages::send))
        .push(Router::with_path("/messages").get(messages::history))
        .push(Router::with_path("/healthz").get(health::readiness))
}

/// The operations port, for probes and Prometheus. What happens there is not logged or counted: it would only
/// drown what clients do.
pub fn operations(app: &Arc<App>) -> Service {
    let router = Router::new()
        .push(Router::with_path("/metrics").get(metrics))
        .push(Router::with_path("/livez").get(health::liveness))
        .push(Router::with_path("/healthz").get(health::readiness));
    Service::new(router).hoop(Edge::quiet(Arc::clone(app)))
}

#[handler]
async fn metrics(depot: &mut Depot, res: &mut Response) -> Result<(), Error> {
    let app = app(depot)?;
    let text = app.metrics.render(app).map_err(Error::internal)?;
    res.headers_mut()
        .insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8"));
    res.status_code(StatusCode::OK);
    res.write_body(text).map_err(Error::internal)
}

const NOSNIFF: (HeaderName, HeaderValue) =
    (HeaderName::from_static("x-content-type-options"), HeaderValue::from_static("nosniff"));

/// Nothing here is meant for a browser to keep, guess at or run.
#[handler]
async fn api_headers(req: &mut Request, depot: &mut Depot, res: &mut Response, ctrl: &mut FlowCtrl) {
    ctrl.call_next(req, depot, res).await;
    let (name, value) = NOSNIFF;
    res.headers_mut().insert(name, value);
    res.headers_mut().entry("cache-control").or_insert(HeaderValue::from_static("no-store"));
}

/// Swagger UI starts from an inline script, so its pages need a policy of their own; all else is from here.
#[handler]
async fn docs_headers(res: &mut Response) {
    res.headers_mut().insert(
        CONTENT_SECURITY_POLICY,
        HeaderValue::from_static(
            "default-src 'self'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; \
             img-src 'self' data:; frame-ancestors 'none'",
        ),
    );
    res.headers_mut().insert("cache-control", HeaderValue::from_static("no-cache"));
}
