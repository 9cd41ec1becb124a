//! Logs, traces and metrics. Logs go to stdout, one line per event; traces go to an OTLP collector where the standard
//! `OTEL_*` variables name one.

pub mod causes;
pub(crate) mod context;
mod log_format;
mod log_writer;
pub(crate) mod metrics;
mod span_metrics;
pub(crate) mod trace;

use std::time::Duration;

use opentelemetry::trace::TracerProvider as _;
use opentelemetry_sdk::trace::{BatchSpanProcessor, Sampler, SdkTracerProvider};
use opentelemetry_semantic_conventions::attribute::SERVICE_VERSION;
use tracing::{Level, Metadata};
use tracing_subscriber::filter::{FilterExt as _, filter_fn};
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, Layer as _};

use self::log_format::LogLine;
use self::log_writer::LogWriter;
use self::span_metrics::{CountEnded, CountExported};
use crate::config::Config;

/// Either of them switches the exporter on, as the OpenTelemetry specification says.
const ENDPOINT_VARIABLES: [&str; 2] = ["OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"];

/// Variables whose unknown values the SDK would silently replace, and the values that work here.
const CHOICES: [(&str, &[&str]); 5] = [
    ("OTEL_SDK_DISABLED", &["true", "false"]),
    ("OTEL_TRACES_EXPORTER", &["otlp", "none"]),
    ("OTEL_EXPORTER_OTLP_PROTOCOL", &["http/protobuf"]),
    ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", &["http/protobuf"]),
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

/// Variables that hold whole numbers; for anything else the SDK would silently take its default.
const NUMBERS: [(&str, &str); 9] = [
    ("OTEL_BSP_SCHEDULE_DELAY", "5000"),
    ("OTEL_BSP_EXPORT_TIMEOUT", "30000"),
    ("OTEL_BSP_MAX_QUEUE_SIZE", "2048"),
    ("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "512"),
    ("OTEL_EXPORTER_OTLP_TIMEOUT", "10000"),
    ("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "10000"),
    ("OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT", "128"),
    ("OTEL_SPAN_EVENT_COUNT_LIMIT", "128"),
    ("OTEL_SPAN_LINK_COUNT_LIMIT", "128"),
];

/// A list of these. Only the first has an effect: nothing here reads baggage.
const PROPAGATORS: &str = "OTEL_PROPAGATORS";
const KNOWN_PROPAGATORS: [&str; 3] = ["tracecontext", "baggage", "none"];

const SAMPLER: &str = "OTEL_TRACES_SAMPLER";
const SAMPLER_ARG: &str = "OTEL_TRACES_SAMPLER_ARG";

/// The share of requests that is traced by default, of those without a caller's trace: enough to see what is slow, and
/// little enough not to slow anything down.
const DEFAULT_RATIO: f64 = 0.1;

/// How long the last spans may delay the end of the process.
const FLUSH_LIMIT: Duration = Duration::from_secs(1);

/// Flushes what is still queued when the process ends.
#[derive(Debug)]
pub struct Telemetry {
    logs: LogWriter,
    traces: Option<SdkTracerProvider>,
}

/// An `OTEL_*` variable that cannot be used: one line with its name, its fault and a good example.
#[derive(thiserror::Error, Debug)]
#[error("{variable}: {fault}; for example {variable}={example}")]
pub struct BadVariable {
    variable: &'static str,
    fault: String,
    example: &'static str,
}

impl Telemetry {
    pub fn start(config: &Config) -> anyhow::Result<Self> {
        let filter = EnvFilter::try_new(&config.rust_log)?;
        let traces = tracer_provider()?;
        let writer = LogWriter::start()?;
        let logs = tracing_subscriber::fmt::layer()
            .with_ansi(false)
            .event_format(LogLine(config.log_format))
            .with_writer(writer.clone());
        let background = traces.as_ref().map(|provider| {
            tracing_opentelemetry::layer()
                .with_tracer(provider.tracer("chat-service"))
                // With its level: a filter without one makes every library's debug events ask it.
                .with_filter(
                    filter_fn(|metadata| metadata.target() == trace::BACKGROUND)
                        .with_max_level_hint(Level::INFO),
                )
        });
        tracing_subscriber::registry()
            .with(logs.with_filter(filter.and(filter_fn(is_for_the_log))))
            .with(background)
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

/// False for the exporter's spans, for the framework's messages on listening and draining, which `serve` logs better, and
/// for Postgres's notices on `IF NOT EXISTS`.
fn is_for_the_log(metadata: &Metadata<'_>) -> bool {
    let target = metadata.target();
    let chatter = target.starts_with("salvo_core") || target == "sqlx::postgres::notice";
    target != trace::BACKGROUND && !(chatter && *metadata.level() == Level::INFO)
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
        .with_span_processor(CountEnded(BatchSpanProcessor::builder(CountExported(exporter)).build()))
        .with_resource(resource.build());
    // The SDK reads the variable itself; only its default differs.
    if variable(SAMPLER).is_none() {
        let ratio = variable(SAMPLER_ARG).and_then(|ratio| ratio.parse().ok()).unwrap_or(DEFAULT_RATIO);
        let root = Sampler::TraceIdRatioBased(ratio);
        provider = provider.with_sampler(Sampler::ParentBased(Box::new(root)));
    }
    Ok(Some(provider.build()))
}

/// Refuses a variable's value if the SDK would silently use another.
fn check_variables() -> Result<(), BadVariable> {
    for (name, known) in CHOICES {
        check(name, known[0], "is not a known value", |value| known.contains(&value))?;
    }
    for (name, example) in NUMBERS {
        check(name, example, "is not a whole number", |value| value.parse::<usize>().is_ok())?;
    }
    check(PROPAGATORS, "tracecontext,baggage", "names an unknown propagator", |value| {
        value.split(',').all(|name| KNOWN_PROPAGATORS.contains(&name.trim()))
    })?;
    check(SAMPLER_ARG, "0.1", "is not a share from 0 to 1", |value| {
        value.parse().is_ok_and(|ratio: f64| (0.0..=1.0).contains(&ratio))
    })?;
    for name in ENDPOINT_VARIABLES {
        if variable(name).is_some_and(|value| !is_web_url(&value)) {
            // Without the value, which may hold a password.
            let fault = "not a URL that begins with http:// or https://".to_owned();
            return Err(BadVariable { variable: name, fault, example: "http://otel-collector:4318" });
        }
    }
    Ok(())
}

fn check(
    name: &'static str,
    example: &'static str,
    fault: &str,
    is_good: impl Fn(&str) -> bool,
) -> Result<(), BadVariable> {
    match variable(name).filter(|value| !is_good(value)) {
        Some(value) => Err(BadVariable { variable: name, fault: format!("'{value}' {fault}"), example }),
        None => Ok(()),
    }
}

fn is_web_url(text: &str) -> bool {
    reqwest::Url::parse(text).is_ok_and(|url| matches!(url.scheme(), "http" | "https"))
}

/// Whether the trace of a caller is continued: always, unless other propagators are asked for.
fn propagates() -> bool {
    variable(PROPAGATORS).is_none_or(|names| names.split(',').any(|name| name.trim() == "tracecontext"))
}
