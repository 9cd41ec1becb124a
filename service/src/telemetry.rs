//! Logs and traces. Logs go to stdout, one line an event; traces go to an OTLP collector where the standard
//! `OTEL_*` variables name one, and nowhere else.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use opentelemetry::propagation::{Extractor, TextMapPropagator as _};
use opentelemetry::trace::{TraceContextExt as _, TraceId, TracerProvider as _};
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::SdkTracerProvider;
use salvo::Request;
use salvo::http::{HeaderMap, StatusCode};
use tracing::field::Empty;
use tracing::{Level, Metadata, Span};
use tracing_opentelemetry::OpenTelemetrySpanExt as _;
use tracing_subscriber::filter::{FilterExt as _, filter_fn};
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, Layer as _};

use crate::config::Config;
use crate::log_format::Line;
use crate::log_writer::LogWriter;
use crate::span_counter::{Counted, Ended};

/// Any of them switches the exporter on, as the OpenTelemetry specification says.
const ENDPOINT_VARIABLES: [&str; 2] = ["OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"];

/// The target of spans that are for the exporter alone.
pub const TRACE_TARGET: &str = "chat_service::trace";

/// What the last spans may add to the end of the process.
const FLUSH_LIMIT: Duration = Duration::from_secs(1);

/// Whether there is an exporter. Without one no request pays for a span that nobody reads.
static EXPORTING: AtomicBool = AtomicBool::new(false);

/// Flushes what is still queued when the process ends.
#[derive(Debug)]
pub struct Telemetry {
    logs: LogWriter,
    traces: Option<SdkTracerProvider>,
}

impl Telemetry {
    pub fn start(config: &Config) -> anyhow::Result<Self> {
        let filter = EnvFilter::try_new(&config.rust_log)?;
        let writer = LogWriter::start()?;
        let logs = tracing_subscriber::fmt::layer()
            .with_ansi(false)
            .event_format(Line(config.log_format))
            .with_writer(writer.clone());
        let traces = tracer_provider()?;
        let spans = traces.as_ref().map(|provider| {
            tracing_opentelemetry::layer()
                .with_tracer(provider.tracer("chat-service"))
                .with_filter(filter_fn(|metadata| metadata.target() == TRACE_TARGET))
        });
        EXPORTING.store(traces.is_some(), Ordering::Relaxed);
        tracing_subscriber::registry()
            .with(spans)
            .with(logs.with_filter(filter.and(filter_fn(is_for_the_log))))
            .try_init()?;
        Ok(Self { logs: writer, traces })
    }

    /// Sends and writes what is queued, within a limit: neither a collector nor a reader of stdout that has
    /// stopped may keep the process from ending.
    pub fn shutdown(self) {
        if let Some(traces) = self.traces {
            traces.shutdown_with_timeout(FLUSH_LIMIT).ok();
        }
        self.logs.flush();
    }
}

/// The span of a request, which continues the caller's trace: none where nothing is exported.
pub fn request_span(req: &Request, method: &'static str, route: &str) -> Span {
    if !EXPORTING.load(Ordering::Relaxed) {
        return Span::none();
    }
    let span = tracing::info_span!(
        target: TRACE_TARGET,
        "request",
        otel.name = format!("{method} {route}"),
        otel.kind = "server",
        otel.status_code = Empty,
        http.request.method = method,
        http.route = route,
        http.response.status_code = Empty,
    );
    span.set_parent(TraceContextPropagator::new().extract(&Headers(req.headers()))).ok();
    span
}

/// The trace that a request's span belongs to.
pub fn trace_id(span: &Span) -> Option<TraceId> {
    (!span.is_none()).then(|| span.context().span().span_context().trace_id())
}

/// Tells the span how its request ended.
pub fn close(span: &Span, status: StatusCode) {
    span.record("http.response.status_code", status.as_u16());
    if status.is_server_error() {
        span.record("otel.status_code", "ERROR");
    }
}

/// Not the exporter's spans, not the framework's word on listening and draining, which `serve` says better, and
/// not what Postgres remarks on `IF NOT EXISTS`.
fn is_for_the_log(metadata: &Metadata<'_>) -> bool {
    let target = metadata.target();
    let chatter = target.starts_with("salvo_core") || target == "sqlx::postgres::notice";
    target != TRACE_TARGET && !(chatter && *metadata.level() == Level::INFO)
}

fn tracer_provider() -> anyhow::Result<Option<SdkTracerProvider>> {
    let wanted =
        ENDPOINT_VARIABLES.iter().any(|name| std::env::var_os(name).is_some_and(|value| !value.is_empty()));
    let disabled = std::env::var("OTEL_SDK_DISABLED").is_ok_and(|value| value.eq_ignore_ascii_case("true"));
    if !wanted || disabled {
        return Ok(None);
    }
    let exporter = opentelemetry_otlp::SpanExporter::builder().with_http().build()?;
    let resource = opentelemetry_sdk::Resource::builder()
        .with_attribute(opentelemetry::KeyValue::new("service.version", env!("CARGO_PKG_VERSION")));
    let resource = match std::env::var_os("OTEL_SERVICE_NAME") {
        Some(_) => resource,
        None => resource.with_service_name("chat-service"),
    };
    Ok(Some(
        SdkTracerProvider::builder()
            .with_span_processor(Ended)
            .with_batch_exporter(Counted(exporter))
            .with_resource(resource.build())
            .build(),
    ))
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
