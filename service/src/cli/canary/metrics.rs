//! What the canary exports. Every series exists from the start.

use std::time::{SystemTime, UNIX_EPOCH};

use prometheus::{
    Gauge, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, Opts, Registry, TextEncoder,
};

/// Seconds; the stream's limit is the last.
const BUCKETS: [f64; 11] = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 30.0];

#[derive(Debug)]
pub(super) struct Metrics {
    registry: Registry,
    rounds: IntCounterVec,
    failures: IntCounterVec,
    seconds: HistogramVec,
    pub(super) lost: IntCounter,
    last_success: Gauge,
}

impl Metrics {
    pub(super) fn new() -> Result<Self, prometheus::Error> {
        let rounds = Opts::new("chat_canary_rounds_total", "Rounds of the canary, by their outcome");
        let failures = Opts::new("chat_canary_failures_total", "Failures of the canary, by the step");
        let seconds = HistogramOpts::new(
            "chat_canary_seconds",
            "From the start of a send to its acknowledgement, to the end of both reads, and to the recipient's stream",
        );
        let lost = "Acknowledged messages that a read or the stream lacks, or that are there twice";
        let success = "When the last round succeeded; 0 before the first";
        let metrics = Self {
            registry: Registry::new(),
            rounds: IntCounterVec::new(rounds, &["outcome"])?,
            failures: IntCounterVec::new(failures, &["step"])?,
            seconds: HistogramVec::new(seconds.buckets(BUCKETS.to_vec()), &["step"])?,
            lost: IntCounter::new("chat_canary_lost_total", lost)?,
            last_success: Gauge::new("chat_canary_last_success_timestamp_seconds", success)?,
        };
        metrics.registry.register(Box::new(metrics.rounds.clone()))?;
        metrics.registry.register(Box::new(metrics.failures.clone()))?;
        metrics.registry.register(Box::new(metrics.seconds.clone()))?;
        metrics.registry.register(Box::new(metrics.lost.clone()))?;
        metrics.registry.register(Box::new(metrics.last_success.clone()))?;
        for outcome in ["success", "failure"] {
            metrics.rounds.with_label_values(&[outcome]);
        }
        metrics.failures.with_label_values(&["log_in"]);
        for step in ["send", "read", "stream"] {
            metrics.failures.with_label_values(&[step]);
            metrics.seconds.with_label_values(&[step]);
        }
        Ok(metrics)
    }

    pub(super) fn observe(&self, step: &str, seconds: f64) {
        self.seconds.with_label_values(&[step]).observe(seconds);
    }

    pub(super) fn failed(&self, step: &str) {
        self.failures.with_label_values(&[step]).inc();
    }

    pub(super) fn round(&self, success: bool) {
        self.rounds.with_label_values(&[if success { "success" } else { "failure" }]).inc();
        if success {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            self.last_success.set(now.as_secs_f64());
        }
    }

    pub(super) fn render(&self) -> Result<String, prometheus::Error> {
        TextEncoder::new().encode_to_string(&self.registry.gather())
    }
}
