//! Logs, traces and metrics. Logs go to stdout, one line per event; traces go to an OTLP collector where the standard
//! `OTEL_*` variables name one.

pub mod causes;
pub(crate) mod context;
mod log_format;
mod log_writer;
pub(crate) mod metrics;
mod span_metrics;
pub(crate) mod trace;
mod variables;

use std::time::Duration;

use opentelemetry::trace::TracerProvider as _;
use opentelemetry_otlp::{SpanExporter, WithExportConfig as _, WithHttpConfig as _};
use opentelemetry_sdk::trace::{BatchSpanProcessor, Sampler, SdkTracerProvider};
use opentelemetry_semantic_conventions::attribute::SERVICE_VERSION;
use tracing::{Level, Metadata};
use tracing_subscriber::filter::{FilterExt as _, filter_fn};
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, Layer as _};

use self::log_format::LogLine;
use self::log_writer::LogWriter;
pub use self::log_writer::Output;
use self::span_metrics::{CountEnded, CountExported};
pub use self::variables::BadVariable;
use self::variables::{SAMPLER, SAMPLER_ARG, Settings, bad_identity, propagates, variable};
use crate::config::Config;

/// The share of requests that is traced by default, of those without a caller's trace: enough to see what is slow, and
/// little enough not to slow anything down.
const DEFAULT_RATIO: f64 = 0.1;

/// How long the last spans may delay the end of the process.
const FLUSH_LIMIT: Duration = Duration::from_secs(1);

/// The target of the lines that say what an operator did.
pub(crate) const AUDIT: &str = "audit";

/// Flushes what is still queued when the process ends.
#[derive(Debug)]
pub struct Telemetry {
    logs: LogWriter,
    traces: Option<SdkTracerProvider>,
}

impl Telemetry {
    /// With logs on stderr it is a command's, and the lines of [`AUDIT`] are written whatever `RUST_LOG` says.
    pub fn start(config: &Config, output: Output) -> anyhow::Result<Self> {
        let mut filter = EnvFilter::try_new(&config.rust_log)?;
        if output == Output::Stderr {
            filter = filter.add_directive(format!("{AUDIT}=info").parse()?);
        }
        let traces = tracer_provider()?;
        let writer = LogWriter::start(output)?;
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

fn tracer_provider() -> anyhow::Result<Option<SdkTracerProvider>> {
    let Some(settings) = variables::settings()? else { return Ok(None) };
    let resource = opentelemetry_sdk::Resource::builder()
        .with_service_name("chat-service")
        .with_attribute(opentelemetry::KeyValue::new(SERVICE_VERSION, env!("CARGO_PKG_VERSION")))
        .with_attributes(settings.resource.clone());
    let resource = match variable("OTEL_SERVICE_NAME") {
        Some(name) => resource.with_service_name(name),
        None => resource,
    };
    let mut provider = SdkTracerProvider::builder();
    if let Some(most) = settings.attributes_per_span {
        provider = provider.with_max_attributes_per_span(most);
    }
    if let Some(most) = settings.attributes_per_event {
        provider = provider.with_max_attributes_per_event(most);
    }
    if let Some(most) = settings.attributes_per_link {
        provider = provider.with_max_attributes_per_link(most);
    }
    let exporter = exporter(settings)?;
    provider = provider
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

/// The exporter reads its protocol and compression itself.
fn exporter(settings: Settings) -> anyhow::Result<SpanExporter> {
    let mut client = reqwest::blocking::Client::builder().timeout(settings.timeout);
    if let Some(authorities) = settings.authorities {
        client = client.tls_certs_only(authorities);
    }
    let client = match settings.identity {
        Some(identity) => client.identity(identity).build().map_err(|error| bad_identity(&error))?,
        None => client.build()?,
    };
    let exporter = SpanExporter::builder()
        .with_http()
        .with_http_client(client)
        .with_endpoint(settings.endpoint)
        .with_headers(settings.headers)
        .with_timeout(settings.timeout);
    Ok(exporter.build()?)
}
