//! Logs and traces. Logs go to stdout, one line an event; traces go to an OTLP collector where the standard
//! `OTEL_*` variables name one, and nowhere else.

use std::time::Duration;

use opentelemetry::trace::TracerProvider as _;
use opentelemetry_sdk::trace::{BatchSpanProcessor, Sampler, SdkTracerProvider};
use opentelemetry_semantic_conventions::attribute::SERVICE_VERSION;
use tracing::{Level, Metadata};
use tracing_subscriber::filter::{FilterExt as _, filter_fn};
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, Layer as _};

use crate::config::Config;
use crate::log_format::Line;
use crate::log_writer::LogWriter;
use crate::span_counter::{Counted, Ended};
use crate::trace;

/// Either of them switches the exporter on, as the OpenTelemetry specification says.
const ENDPOINT_VARIABLES: [&str; 2] = ["OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"];

/// What the SDK would silently take for something else, and what can be meant.
const CHOICES: [(&str, &[&str]); 5] = [
    ("OTEL_TRACES_EXPORTER", &["otlp", "none"]),
    ("OTEL_EXPORTER_OTLP_PROTOCOL", &["http/protobuf"]),
    ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", &["http/protobuf"]),
    ("OTEL_PROPAGATORS", &["tracecontext", "tracecontext,baggage", "baggage", "none"]),
    (
        SAMPLER,
        &[
            "parentbased_traceidratio",
            "parentbased_always_on",
            "parentbased_always_off",
            "traceidratio",
            "always_on",
            "always_off",
        ],
    ),
];

const SAMPLER: &str = "OTEL_TRACES_SAMPLER";
const SAMPLER_ARG: &str = "OTEL_TRACES_SAMPLER_ARG";

/// The share of requests without a caller's trace that is traced where nothing else is said: enough to see what is
/// slow, and little enough not to be felt.
const DEFAULT_RATIO: f64 = 0.1;

/// What the last spans may add to the end of the process.
const FLUSH_LIMIT: Duration = Duration::from_secs(1);

/// Flushes what is still queued when the process ends.
#[derive(Debug)]
pub struct Telemetry {
    logs: LogWriter,
    traces: Option<SdkTracerProvider>,
}

/// A variable of OpenTelemetry that cannot be used.
#[derive(thiserror::Error, Debug)]
#[error("{variable}: {value:?} is not known here; for example {variable}={example}")]
pub struct BadVariable {
    variable: &'static str,
    value: String,
    example: &'static str,
}

impl Telemetry {
    pub fn start(config: &Config) -> anyhow::Result<Self> {
        let filter = EnvFilter::try_new(&config.rust_log)?;
        let traces = tracer_provider()?;
        let writer = LogWriter::start()?;
        let logs = tracing_subscriber::fmt::layer()
            .with_ansi(false)
            .event_format(Line(config.log_format))
            .with_writer(writer.clone());
        tracing_subscriber::registry()
            .with(logs.with_filter(filter.and(filter_fn(is_for_the_log))))
            .try_init()?;
        if let Some(provider) = &traces {
            trace::export(provider.tracer("chat-service"), propagates());
        }
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

/// Not the framework's word on listening and draining, which `serve` says better, and not what Postgres remarks on
/// `IF NOT EXISTS`.
fn is_for_the_log(metadata: &Metadata<'_>) -> bool {
    let target = metadata.target();
    let chatter = target.starts_with("salvo_core") || target == "sqlx::postgres::notice";
    !(chatter && *metadata.level() == Level::INFO)
}

/// A variable's value; one that is empty counts as unset.
fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

fn tracer_provider() -> anyhow::Result<Option<SdkTracerProvider>> {
    let is = |name, value: &str| variable(name).is_some_and(|found| found.eq_ignore_ascii_case(value));
    let wanted = ENDPOINT_VARIABLES.iter().any(|name| variable(name).is_some());
    if !wanted || is("OTEL_SDK_DISABLED", "true") || is("OTEL_TRACES_EXPORTER", "none") {
        return Ok(None);
    }
    check_variables()?;
    let exporter = opentelemetry_otlp::SpanExporter::builder().with_http().build()?;
    let resource = opentelemetry_sdk::Resource::builder()
        .with_attribute(opentelemetry::KeyValue::new(SERVICE_VERSION, env!("CARGO_PKG_VERSION")));
    let resource = match variable("OTEL_SERVICE_NAME") {
        Some(_) => resource,
        None => resource.with_service_name("chat-service"),
    };
    let mut provider = SdkTracerProvider::builder()
        .with_span_processor(Ended(BatchSpanProcessor::builder(Counted(exporter)).build()))
        .with_resource(resource.build());
    // The SDK reads the variable by itself; only its default is another.
    if variable(SAMPLER).is_none() {
        let ratio = variable(SAMPLER_ARG).and_then(|ratio| ratio.parse().ok()).unwrap_or(DEFAULT_RATIO);
        let root = Sampler::TraceIdRatioBased(ratio);
        provider = provider.with_sampler(Sampler::ParentBased(Box::new(root)));
    }
    Ok(Some(provider.build()))
}

/// Names a variable with which the SDK would do something else than what was meant.
fn check_variables() -> Result<(), BadVariable> {
    for (variable_name, known) in CHOICES {
        if let Some(value) = variable(variable_name)
            && !known.contains(&value.as_str())
        {
            return Err(BadVariable { variable: variable_name, value, example: known[0] });
        }
    }
    let is_ratio = |value: &String| value.parse().is_ok_and(|ratio: f64| (0.0..=1.0).contains(&ratio));
    match variable(SAMPLER_ARG).filter(|value| !is_ratio(value)) {
        Some(value) => Err(BadVariable { variable: SAMPLER_ARG, value, example: "0.1" }),
        None => Ok(()),
    }
}

/// Whether the trace of a caller is continued: always, unless other propagators are asked for.
fn propagates() -> bool {
    variable("OTEL_PROPAGATORS").is_none_or(|names| names.split(',').any(|name| name == "tracecontext"))
}
