//! Counts spans on their way to the collector: lost spans would otherwise go unnoticed.
//!
//! A span that has ended is queued, and its export then succeeds or fails; a full queue drops it. So `ended` minus
//! `exported` minus `failed`, over longer than an export takes, is the number of dropped spans.

use std::sync::LazyLock;
use std::time::Duration;

use opentelemetry::Context;
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::trace::{Span, SpanData, SpanExporter, SpanProcessor};
use prometheus::{IntCounter, IntCounterVec, Opts};

/// Global, like the exporter itself; the registry includes it.
pub(super) static SPANS: LazyLock<IntCounterVec> = LazyLock::new(|| {
    let help = "Trace spans: ended, exported, failed to export; ended without the others were dropped";
    let spans = IntCounterVec::new(Opts::new("chat_trace_spans_total", help), &["outcome"]);
    let spans = spans.expect("a valid name and label");
    for outcome in ["ended", "exported", "failed"] {
        spans.with_label_values(&[outcome]);
    }
    spans
});

static ENDED: LazyLock<IntCounter> = LazyLock::new(|| SPANS.with_label_values(&["ended"]));

/// Counts the spans that end, before they are queued.
#[derive(Debug)]
pub(super) struct CountEnded<P>(pub P);

/// Counts the spans that are exported, or fail to be.
#[derive(Debug)]
pub(super) struct CountExported<E>(pub E);

impl<P: SpanProcessor> SpanProcessor for CountEnded<P> {
    fn on_start(&self, span: &mut Span, context: &Context) {
        self.0.on_start(span, context);
    }

    fn on_end(&self, span: SpanData) {
        ENDED.inc();
        self.0.on_end(span);
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.0.force_flush()
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.0.shutdown_with_timeout(timeout)
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.0.set_resource(resource);
    }
}

impl<E: SpanExporter> SpanExporter for CountExported<E> {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        let count = batch.len() as u64;
        let outcome = self.0.export(batch).await;
        SPANS.with_label_values(&[if outcome.is_ok() { "exported" } else { "failed" }]).inc_by(count);
        outcome
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.0.shutdown_with_timeout(timeout)
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.0.force_flush()
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.0.set_resource(resource);
    }
}
