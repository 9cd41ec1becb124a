//! What surrounds every request: its id, its span, its limit of time, its line in the log, its metrics, and the
//! form of errors that the framework makes itself.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Instant;

use futures_util::FutureExt as _;
use salvo::http::header::{CONNECTION, HeaderName, HeaderValue};
use salvo::http::{ResBody, StatusCode, Version};
use salvo::{Depot, FlowCtrl, Handler, Request, Response, async_trait};

use crate::app::App;
use crate::error::{Error, render_bare_status};
use crate::log_format::{RequestIds, SERVING};
use crate::metrics::{Endpoint, InFlight};
use crate::request_id::{RequestId, X_REQUEST_ID};
use crate::trace::{self, Span};

/// Where a request that is traced is found, in the form of W3C's Trace Context.
const TRACERESPONSE: HeaderName = HeaderName::from_static("traceresponse");

/// Stands before everything else, on 404 and 405 too.
#[derive(Debug)]
pub struct Edge {
    app: Arc<App>,
    /// False on the operations port: probes and scrapes are neither logged nor counted.
    recorded: bool,
}

impl Edge {
    pub fn new(app: Arc<App>) -> Self {
        Self { app, recorded: true }
    }

    pub fn quiet(app: Arc<App>) -> Self {
        Self { app, recorded: false }
    }

    /// Runs the rest of the chain. A panic and a time-out become answers like any other.
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
impl Handler for Edge {
    async fn handle(&self, req: &mut Request, depot: &mut Depot, res: &mut Response, ctrl: &mut FlowCtrl) {
        let id = RequestId::assign(req);
        depot.insert_typed(Arc::clone(&self.app));
        let mut record = self.recorded.then(|| Record::open(&self.app, req, &id));
        match &record {
            None => self.answer(req, depot, res, ctrl).await,
            Some(Record { ids, span, .. }) => {
                let work = SERVING.scope(ids.clone(), self.answer(req, depot, res, ctrl));
                trace::under(span.as_ref(), work).await;
            }
        }
        let status = *res.status_code.get_or_insert(StatusCode::OK);
        if (status.is_client_error() || status.is_server_error()) && !has_body(res) {
            render_bare_status(status, id.as_str(), res);
        }
        res.headers_mut().insert(X_REQUEST_ID, id.header());
        // Clients go elsewhere while we still answer: a connection that we close by ourselves may just then carry the
        // next request. HTTP/2 has GOAWAY for that.
        if self.app.health.is_draining() && req.version() <= Version::HTTP_11 {
            res.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
        }
        if let Some(record) = &mut record {
            record.status = Some(status);
            if let Some(header) = record.span.as_ref().and_then(Span::traceresponse) {
                res.headers_mut().insert(TRACERESPONSE, header);
            }
        }
    }
}

/// Logs and counts the request when it ends, also when the client went away and the handler was dropped.
struct Record<'a> {
    app: &'a App,
    endpoint: &'a Endpoint,
    started: Instant,
    ids: RequestIds,
    span: Option<Span>,
    status: Option<StatusCode>,
    _in_flight: InFlight,
}

impl<'a> Record<'a> {
    fn open(app: &'a App, req: &Request, id: &RequestId) -> Self {
        let endpoint = app.metrics.endpoint(req.method(), req.matched_path());
        let traced = trace::request(req, endpoint);
        let ids = RequestIds { request: id.clone(), trace: traced.as_ref().map(|traced| traced.trace) };
        let span = traced.and_then(|traced| traced.span);
        let _in_flight = app.metrics.request_started();
        Self { app, endpoint, started: Instant::now(), ids, span, status: None, _in_flight }
    }
}

impl Drop for Record<'_> {
    fn drop(&mut self) {
        let duration = self.started.elapsed();
        // nginx's number for a client that did not wait for the answer.
        let status = self.status.or_else(|| StatusCode::from_u16(499).ok()).unwrap_or_default();
        if let Some(span) = &self.span {
            span.answered(status);
        }
        self.app.metrics.request_finished(self.endpoint, status, duration);
        SERVING.sync_scope(self.ids.clone(), || {
            tracing::info!(
                method = self.endpoint.method,
                route = self.endpoint.route,
                status = status.as_u16(),
                duration_ms = duration.as_micros() as f64 / 1000.0,
                "request"
            );
        });
    }
}

fn has_body(res: &Response) -> bool {
    !matches!(res.body, ResBody::None | ResBody::Error(_))
}
