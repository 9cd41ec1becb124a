//! The spans of a request: one for the request, named by its route, and below it one for each operation on Postgres and
//! Redis and for hashing. A batch of the outbox has a span below the first send in it, and links with all of them.
//!
//! They come from the OpenTelemetry API itself and are not `tracing` spans, so that a request that is not sampled pays
//! for little more than the decision. The work of a sampled request runs [`under`] its span and finds it as
//! [`current`].
//!
//! Background work, which is rare, has `tracing` spans of the target [`BACKGROUND`]; `tracing-opentelemetry` makes them
//! the current span, too.

use std::sync::OnceLock;

use futures_util::future::Either;
use opentelemetry::context::FutureExt as _;
use opentelemetry::propagation::{Extractor, TextMapPropagator as _};
use opentelemetry::trace::{
    Link, Span as _, SpanContext, SpanKind, Status, TraceContextExt as _, TraceId, Tracer as _,
};
use opentelemetry::{Context, KeyValue, Value};
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::SdkTracer;
use opentelemetry_semantic_conventions::attribute as name;
use salvo::Request;
use salvo::http::header::HeaderValue;
use salvo::http::{HeaderMap, StatusCode, Version};

use super::metrics::{Endpoint, OperationName};

/// The target of `tracing` spans for work that belongs to no request.
pub(crate) const BACKGROUND: &str = "chat_service::background";

/// Set where spans are exported. Without it requests have no spans at all.
static TRACER: OnceLock<Exporter> = OnceLock::new();

#[derive(Debug)]
struct Exporter {
    tracer: SdkTracer,
    /// Whether callers' traces are continued.
    propagates: bool,
}

/// Starts to make spans.
pub(crate) fn export(tracer: SdkTracer, propagates: bool) {
    TRACER.set(Exporter { tracer, propagates }).ok();
}

/// A span that will be exported. It ends with [`Span::end`], or with the last of its clones.
#[derive(Clone, Debug)]
pub(crate) struct Span(Context);

/// The trace id for a request's log line, and the request's span if it is sampled.
#[derive(Debug)]
pub(crate) struct RequestSpan {
    pub trace: TraceId,
    pub span: Option<Span>,
}

/// The attributes by which spans name a database server.
#[derive(Clone, Debug, Default)]
pub(crate) struct ServerAttributes {
    attributes: Vec<KeyValue>,
}

impl ServerAttributes {
    /// `namespace` is the database's name or number.
    pub(crate) fn new(address: &str, port: u16, namespace: &str) -> Self {
        let attributes = vec![
            KeyValue::new(name::SERVER_ADDRESS, Value::from(address.to_owned())),
            KeyValue::new(name::SERVER_PORT, i64::from(port)),
            KeyValue::new(name::DB_NAMESPACE, Value::from(namespace.to_owned())),
        ];
        Self { attributes }
    }
}

/// The span of a request, which continues the caller's trace; `None` where nothing is exported.
pub(crate) fn request(req: &Request, endpoint: &Endpoint) -> Option<RequestSpan> {
    let Exporter { tracer, propagates } = TRACER.get()?;
    let parent = if *propagates {
        TraceContextPropagator::new().extract_with_context(&Context::new(), &Headers(req.headers()))
    } else {
        Context::new()
    };
    // The attributes come after the decision: a request that is not sampled pays for two random ids alone.
    let builder = tracer.span_builder(endpoint.method).with_kind(SpanKind::Server);
    let mut made = tracer.build_with_context(builder, &parent);
    let trace = made.span_context().trace_id();
    if !made.span_context().is_sampled() {
        return Some(RequestSpan { trace, span: None });
    }
    made.update_name(endpoint.span_name.clone());
    made.set_attributes([
        KeyValue::new(name::HTTP_REQUEST_METHOD, endpoint.method),
        KeyValue::new(name::HTTP_ROUTE, endpoint.route.clone()),
        KeyValue::new(name::URL_SCHEME, "http"),
        KeyValue::new(
            name::NETWORK_PROTOCOL_VERSION,
            if req.version() == Version::HTTP_2 { "2" } else { "1.1" },
        ),
    ]);
    Some(RequestSpan { trace, span: Some(Span(parent.with_span(made))) })
}

/// The span of the request that this task serves, or of the batch that it writes.
pub(crate) fn current() -> Option<Span> {
    TRACER.get()?;
    Context::map_current(|context| context.span().span_context().is_sampled().then(|| Span(context.clone())))
}

/// Runs the work under a span, so that its operations become the span's children. Not an `async fn`, which would keep
/// room for the work twice.
pub(crate) fn under<F: Future>(span: Option<&Span>, work: F) -> impl Future<Output = F::Output> + use<F> {
    match span {
        None => Either::Left(work),
        Some(Span(context)) => Either::Right(work.with_context(context.clone())),
    }
}

/// A span of work inside this process, below the current one.
pub(crate) fn work(what: &'static str) -> Option<Span> {
    current().map(|parent| parent.child(what, SpanKind::Internal, Vec::new(), Vec::new()))
}

/// The span of an operation on Postgres or Redis, below the current one.
pub(crate) fn operation(of: OperationName, server: &ServerAttributes) -> Option<Span> {
    let parent = current()?;
    let mut attributes = Vec::with_capacity(server.attributes.len() + 2);
    attributes.push(KeyValue::new(name::DB_SYSTEM_NAME, of.system));
    attributes.push(KeyValue::new(name::DB_OPERATION_NAME, of.operation));
    attributes.extend_from_slice(&server.attributes);
    Some(parent.child(of.operation, SpanKind::Client, attributes, Vec::new()))
}

/// The span of a batch, below the first of the sends in it that are sampled, and linked with each of them.
pub(crate) fn batch<'a>(sends: impl Iterator<Item = &'a Span>, rows: usize) -> Option<Span> {
    let sends: Vec<&Span> = sends.collect();
    let (first, others) = sends.split_first()?;
    let links = sends.iter().map(|send| Link::with_context(send.context())).collect();
    let attributes = vec![KeyValue::new("chat.outbox.batch.rows", rows as i64)];
    let batch = first.child("write batch", SpanKind::Internal, attributes, links);
    // The other sends' traces do not contain the batch: a link leads from each to it.
    for send in others {
        send.0.span().add_link(batch.context(), Vec::new());
    }
    Some(batch)
}

impl Span {
    fn child(&self, what: &'static str, kind: SpanKind, attributes: Vec<KeyValue>, links: Vec<Link>) -> Self {
        let Some(Exporter { tracer, .. }) = TRACER.get() else { return self.clone() };
        let builder = tracer.span_builder(what).with_kind(kind).with_attributes(attributes).with_links(links);
        Self(self.0.with_span(tracer.build_with_context(builder, &self.0)))
    }

    fn context(&self) -> SpanContext {
        self.0.span().span_context().clone()
    }

    /// Notes that something happened now.
    pub(crate) fn event(&self, what: &'static str) {
        self.0.span().add_event(what, Vec::new());
    }

    /// Marks the span as failed; `kind` is one of few words or codes.
    pub(crate) fn fail(&self, kind: impl Into<Value>) {
        let span = self.0.span();
        span.set_attribute(KeyValue::new(name::ERROR_TYPE, kind));
        span.set_status(Status::error(""));
    }

    /// As [`Span::fail`], with the code that Postgres or Redis answered.
    pub(crate) fn operation_failed(&self, status_code: Option<&str>, kind: &'static str) {
        if let Some(code) = status_code {
            let code = Value::from(code.to_owned());
            self.0.span().set_attribute(KeyValue::new(name::DB_RESPONSE_STATUS_CODE, code.clone()));
            return self.fail(code);
        }
        self.fail(kind);
    }

    /// Ends the span of a request with the response's status.
    pub(crate) fn answered(&self, status: StatusCode) {
        self.0
            .span()
            .set_attribute(KeyValue::new(name::HTTP_RESPONSE_STATUS_CODE, i64::from(status.as_u16())));
        if status.is_server_error() {
            self.fail(i64::from(status.as_u16()).to_string());
        }
        self.end();
    }

    pub(crate) fn end(&self) {
        self.0.span().end();
    }

    /// The `traceresponse` header of W3C's Trace Context, which names this span to the caller.
    pub(crate) fn traceresponse(&self) -> Option<HeaderValue> {
        let context = self.context();
        HeaderValue::from_str(&format!("00-{}-{}-01", context.trace_id(), context.span_id())).ok()
    }
}

struct Headers<'a>(&'a HeaderMap);

impl Extractor for Headers<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key)?.to_str().ok()
    }

    fn keys(&self) -> Vec<&str> {
        self.0.keys().map(|name| name.as_str()).collect()
    }
}
