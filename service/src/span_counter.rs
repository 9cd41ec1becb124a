//! Counts spans on their way to the collector, because those that never arrive are missed by nobody otherwise.
//!
//! A span that ended is queued, and then exported or not. Where the queue was full it was dropped, so what is
//! missing between `ended` and the other two, for longer than an export takes, was dropped.

use std::sync::LazyLock;
use std::time::Duration;

use opentelemetry::Context;
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::trace::{Span, SpanData, SpanExporter, SpanProcessor};
use prometheus::{IntCounter, IntCounterVec, Opts};

/// Of the process, like the exporter itself; the registry shows it.
pub static SPANS: LazyLock<IntCounterVec> = LazyLock::new(|| {
    let help = "Trace spans: ended, exported, failed to export; ended without the others were dropped";
    let spans = IntCounterVec::new(Opts::new("chat_trace_spans_total", help), &["outcome"]);
    let spans = spans.expect("a valid name and label");
    for outcome in ["ended", "exported", "failed"] {
        spans.with_label_values(&[outcome]);
    }
    spans
});

static ENDED: LazyLock<IntCounter> = LazyLock::new(|| SPANS.with_label_values(&["ended"]));

/// Counts what ends, on its way into the queue.
#[derive(Debug)]
pub struct Ended<P>(pub P);

/// Counts what leaves.
#[derive(Debug)]
pub struct Counted<E>(pub E);

impl<P: SpanProcessor> SpanProcessor for Ended<P> {
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

impl<E: SpanExporter> SpanExporter for Counted<E> {
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
