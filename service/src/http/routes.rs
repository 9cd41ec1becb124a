//! The only place where paths and middleware are named.

use std::collections::BTreeSet;
use std::sync::Arc;

use salvo::http::StatusCode;
use salvo::http::header::{CONTENT_SECURITY_POLICY, CONTENT_TYPE, HeaderName, HeaderValue, LOCATION};
use salvo::{Depot, FlowCtrl, Request, Response, Router, Service, handler};
use salvo_oapi::OpenApi;
use salvo_oapi::swagger_ui::SwaggerUi;

use super::error::Error;
use super::middleware::{Middleware, app};
use super::paths::{with_head, with_one_spelling};
use super::{
    account, blocks, conversations, cors, export, health, messages, openapi, page, sessions, stream, users,
};
use crate::app::App;
use crate::telemetry::metrics::EndpointName;

const DOCUMENT: &str = "/openapi.json";
/// Relative, as every reference in a response, so that a proxy may strip a prefix.
const DOCUMENT_FROM_DOCS: &str = "../openapi.json";
const DOCS: &str = "/docs/{**}";

/// The page of the documentation. Its assets lie beside it, so it ends with a slash, as no other path does.
const DOCS_PAGE: &str = "/docs/";

/// The public port's API, and all that is derived from it.
#[derive(Debug)]
pub struct PublicApi {
    document: OpenApi,
}

pub fn public_api() -> PublicApi {
    PublicApi { document: openapi::document(&api()) }
}

impl PublicApi {
    /// The OpenAPI document as text.
    pub fn document_json(&self) -> serde_json::Result<String> {
        serde_json::to_string_pretty(&self.document)
    }

    /// Every endpoint of the public port, so that its metrics exist before its first request.
    pub fn endpoints(&self) -> Vec<EndpointName> {
        let mut endpoints = openapi::endpoints(&self.document);
        let page = page::FILES.map(|file| file.path);
        endpoints.extend([DOCUMENT, DOCS].into_iter().chain(page).map(|route| EndpointName {
            method: "GET",
            route: route.into(),
            success: StatusCode::OK,
        }));
        endpoints
    }

    /// The service of the public port.
    pub fn service(self, app: &Arc<App>) -> Service {
        let methods = self.endpoints().into_iter().map(|endpoint| endpoint.method);
        let methods: BTreeSet<&str> = methods.chain(["HEAD"]).collect();
        let cors = cors::handler(&app.config, methods.into_iter().filter_map(|method| method.parse().ok()));
        let docs = SwaggerUi::new(DOCUMENT_FROM_DOCS).title("chat-service");
        let mut router = api()
            .push(Router::with_path(DOCUMENT).get(self.document))
            .push(Router::with_path(DOCS).hoop(docs_headers).hoop(docs_redirect).get(docs));
        if app.config.has_chat_page() {
            router = router.push(page::routes());
        }
        Service::new(with_head(with_one_spelling(router))).hoop(Middleware::new(Arc::clone(app), cors))
    }
}

/// Every endpoint that the OpenAPI document describes. What else needs to know them (metrics, documents, tests) reads them
/// from here.
fn api() -> Router {
    Router::new()
        .hoop(api_headers)
        .push(Router::with_path("/register").post(users::register))
        .push(Router::with_path("/login").post(sessions::login))
        .push(Router::with_path("/refresh").post(sessions::refresh))
        .push(Router::with_path("/logout").post(sessions::logout))
        .push(Router::with_path("/logout-all").post(sessions::logout_all))
        .push(Router::with_path("/password").post(account::change_password))
        .push(Router::with_path("/sessions").get(sessions::list))
        .push(Router::with_path("/sessions/{id}").delete(sessions::end))
        .push(Router::with_path("/me").get(users::me).delete(account::delete))
        .push(Router::with_path("/me/export").get(export::export))
        .push(Router::with_path("/users/{username}").get(users::find))
        .push(Router::with_path("/blocks").get(blocks::list))
        .push(Router::with_path("/blocks/{user_id}").put(blocks::put).delete(blocks::remove))
        .push(Router::with_path("/send").post(messages::send))
        .push(Router::with_path("/messages").get(messages::list))
        .push(Router::with_path("/conversations").get(conversations::list))
        .push(Router::with_path("/stream").get(stream::follow))
        .push(Router::with_path("/healthz").get(health::readiness))
}

/// The service of the operations port, for probes and Prometheus. Its requests are neither logged nor counted: there would
/// be more of them than of clients' requests.
pub fn operations(app: &Arc<App>) -> Service {
    let router = Router::new()
        .push(Router::with_path("/metrics").get(metrics))
        .push(Router::with_path("/livez").get(health::liveness))
        .push(Router::with_path("/healthz").get(health::readiness));
    Service::new(with_head(with_one_spelling(router))).hoop(Middleware::unrecorded(Arc::clone(app)))
}

#[handler]
async fn metrics(depot: &mut Depot, res: &mut Response) -> Result<(), Error> {
    let app = app(depot)?;
    let text = app.metrics.render(&app.gauges()).map_err(Error::internal)?;
    res.headers_mut()
        .insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8"));
    res.status_code(StatusCode::OK);
    res.write_body(text).map_err(Error::internal)
}

const NOSNIFF: (HeaderName, HeaderValue) =
    (HeaderName::from_static("x-content-type-options"), HeaderValue::from_static("nosniff"));

/// Browsers must not cache, sniff or run the API's responses.
#[handler]
async fn api_headers(req: &mut Request, depot: &mut Depot, res: &mut Response, ctrl: &mut FlowCtrl) {
    ctrl.call_next(req, depot, res).await;
    let (name, value) = NOSNIFF;
    res.headers_mut().insert(name, value);
    res.headers_mut().entry("cache-control").or_insert(HeaderValue::from_static("no-store"));
}

/// Swagger UI starts from an inline script, so its pages need a policy of their own. Nothing else comes from outside.
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

/// Swagger UI would redirect to an absolute path.
#[handler]
async fn docs_redirect(req: &mut Request, res: &mut Response, ctrl: &mut FlowCtrl) {
    if req.uri().path() == DOCS_PAGE.trim_end_matches('/') {
        let query = req.uri().query().map(|query| format!("?{query}")).unwrap_or_default();
        if let Ok(target) = HeaderValue::from_str(&format!("docs/{query}")) {
            res.headers_mut().insert(LOCATION, target);
            res.status_code(StatusCode::FOUND);
            ctrl.skip_rest();
        }
    }
}
