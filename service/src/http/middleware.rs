//! The middleware of every request: its id, span, timeout, log line and metrics, and the rendering of the framework's
//! own errors.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::FutureExt as _;
use salvo::cors::CorsHandler;
use salvo::http::header::{CONNECTION, CONTENT_LENGTH, HeaderName, HeaderValue};
use salvo::http::{Method, ResBody, StatusCode, Version};
use salvo::{Depot, FlowCtrl, Handler, Request, Response, async_trait};

use super::error::{Error, render_bare_status};
use super::request_id::{RequestId, X_REQUEST_ID};
use crate::app::App;
use crate::telemetry::context::{CURRENT, RequestContext};
use crate::telemetry::metrics::{Endpoint, InFlight};
use crate::telemetry::trace::{self, Span};

/// Names a sampled request's span to the caller, in the form of W3C's Trace Context.
pub(super) const TRACERESPONSE: HeaderName = HeaderName::from_static("traceresponse");

/// The application, which the middleware adds to every request.
pub(super) fn app(depot: &Depot) -> Result<&Arc<App>, Error> {
    depot.get_typed::<Arc<App>>().map_err(|_| Error::internal("the request did not pass the middleware"))
}

/// A shorter wait for a body is not worth a note: it came with the head.
const WAIT_NOTED: Duration = Duration::from_millis(1);

/// How long a request has waited for its client's body.
struct Waited(Duration);

/// The metrics do not count this time: it is the client's.
pub(super) fn note_wait(depot: &mut Depot, wait: Duration) {
    if wait >= WAIT_NOTED {
        depot.insert_typed(Waited(wait));
    }
}

/// Runs before everything else, also for 404 and 405.
#[derive(Debug)]
pub(super) struct Middleware {
    app: Arc<App>,
    /// False on the operations port, whose probes and scrapes are neither logged nor counted.
    recorded: bool,
    /// `None` where no page of another origin may call the API.
    cors: Option<CorsHandler>,
}

impl Middleware {
    pub(super) fn new(app: Arc<App>, cors: Option<CorsHandler>) -> Self {
        Self { app, recorded: true, cors }
    }

    /// Without logs, metrics and CORS.
    pub(super) fn unrecorded(app: Arc<App>) -> Self {
        Self { app, recorded: false, cors: None }
    }

    /// Runs the handler and its extractors. A panic and a timeout become errors like any other.
    async fn answer(&self, req: &mut Request, depot: &mut Depot, res: &mut Response, ctrl: &mut FlowCtrl) {
        let limit = self.app.config.request_timeout();
        let outcome =
            tokio::time::timeout(limit, AssertUnwindSafe(ctrl.call_next(req, depot, res)).catch_unwind())
                .await;
        let error = match outcome {
            Ok(Ok(_)) => return,
            Ok(Err(_)) => Error::internal("a handler panicked"),
            Err(_) => Error::Unavailable("the request took too long: try again"),
        };
        ctrl.skip_rest();
        res.headers_mut().clear();
        error.render(RequestId::of(req), res);
    }
}

#[async_trait]
impl Handler for Middleware {
    async fn handle(&self, req: &mut Request, depot: &mut Depot, res: &mut Response, ctrl: &mut FlowCtrl) {
        let id = RequestId::assign(req);
        depot.insert_typed(Arc::clone(&self.app));
        let mut record = self.recorded.then(|| Record::open(&self.app, req, &id));
        match &record {
            None => self.answer(req, depot, res, ctrl).await,
            Some(Record { context, span, .. }) => {
                let work = CURRENT.scope(context.clone(), self.answer(req, depot, res, ctrl));
                trace::under(span.as_ref(), work).await;
            }
        }
        // Here and not around the handlers, so that a page can read errors, too. No handler is left for it to call.
        if let Some(cors) = &self.cors {
            cors.handle(req, depot, res, ctrl).await;
        }
        let status = *res.status_code.get_or_insert(StatusCode::OK);
        if (status.is_client_error() || status.is_server_error()) && !has_body(res) {
            render_bare_status(status, id.as_str(), res);
        }
        if req.method() == Method::HEAD {
            drop_body(res);
        }
        res.headers_mut().insert(X_REQUEST_ID, id.header());
        // A draining process asks its clients to leave while it still answers: if it simply closed a connection, it
        // could cut off the next request. HTTP/2 has GOAWAY for that. A body of which there is more is not read any further.
        let unread = matches!(status, StatusCode::REQUEST_TIMEOUT | StatusCode::PAYLOAD_TOO_LARGE);
        if (unread || self.app.health.is_draining()) && req.version() <= Version::HTTP_11 {
            res.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
        }
        if let Some(record) = &mut record {
            record.status = Some(status);
            record.waited = depot.get_typed().map_or(Duration::ZERO, |Waited(wait)| *wait);
            if let Some(header) = record.span.as_ref().and_then(Span::traceresponse) {
                res.headers_mut().insert(TRACERESPONSE, header);
            }
        }
    }
}

/// Logs and counts the request when it ends, also if the client has disconnected and the handler was dropped.
struct Record<'a> {
    app: &'a App,
    endpoint: &'a Endpoint,
    started: Instant,
    context: RequestContext,
    span: Option<Span>,
    status: Option<StatusCode>,
    waited: Duration,
    _in_flight: InFlight,
}

impl<'a> Record<'a> {
    fn open(app: &'a App, req: &Request, id: &RequestId) -> Self {
        // Without a route the path is empty, as the page's is.
        let matched = Some(req.matched_path()).filter(|path| !path.is_empty() || req.uri().path() == "/");
        let endpoint = app.metrics.endpoint(req.method(), matched);
        let traced = trace::request(req, endpoint);
        let trace_id = traced.as_ref().map(|traced| traced.trace);
        let context = RequestContext { request_id: id.header(), trace_id };
        let span = traced.and_then(|traced| traced.span);
        let _in_flight = app.metrics.request_started();
        let (started, waited) = (Instant::now(), Duration::ZERO);
        Self { app, endpoint, started, context, span, status: None, waited, _in_flight }
    }
}

impl Drop for Record<'_> {
    fn drop(&mut self) {
        let duration = self.started.elapsed();
        // nginx's status for a client that did not wait for the answer.
        let status = self.status.or_else(|| StatusCode::from_u16(499).ok()).unwrap_or_default();
        if let Some(span) = &self.span {
            span.answered(status);
        }
        self.app.metrics.request_finished(self.endpoint, status, duration.saturating_sub(self.waited));
        CURRENT.sync_scope(self.context.clone(), || {
            tracing::info!(
                method = self.endpoint.method,
                route = &*self.endpoint.route,
                status = status.as_u16(),
                duration_ms = duration.as_micros() as f64 / 1000.0,
                "request"
            );
        });
    }
}

/// Leaves of a body its length, where it is known.
fn drop_body(res: &mut Response) {
    let length = if has_body(res) { res.body.size() } else { Some(0) };
    if let Some(length) = length {
        res.headers_mut().insert(CONTENT_LENGTH, HeaderValue::from(length));
    }
    res.take_body();
}

fn has_body(res: &Response) -> bool {
    !matches!(res.body, ResBody::None | ResBody::Error(_))
}
