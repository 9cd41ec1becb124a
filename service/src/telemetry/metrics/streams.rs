//! The metrics of the streams.

use prometheus::{Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, Registry};
use strum::VariantArray;

use super::register::{DURATION_BUCKETS, add, counters, gauge};

#[derive(Debug)]
pub(super) struct StreamMetrics {
    pub(super) clients: IntGauge,
    pub(super) clients_max: IntGauge,
    pub(super) opened: IntCounterVec,
    pub(super) ended: IntCounterVec,
    pub(super) messages: IntCounter,
    pub(super) delivery: Histogram,
    pub(super) gaps: IntCounter,
    pub(super) catch_ups: IntCounter,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, strum::IntoStaticStr, strum::VariantArray)]
#[strum(serialize_all = "snake_case")]
pub enum StreamOpened {
    New,
    Resumed,
    /// The position could not be taken up.
    Reset,
    /// There were too many, or the process stops.
    Refused,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, strum::IntoStaticStr, strum::VariantArray)]
#[strum(serialize_all = "snake_case")]
pub enum StreamEnd {
    Expired,
    Revoked,
    Deleted,
    Draining,
    Lifetime,
    /// The client did not read.
    Slow,
    /// The client ended it, or its connection broke.
    Client,
}

impl StreamMetrics {
    pub(super) fn new(registry: &Registry) -> Result<Self, prometheus::Error> {
        let counter = |name, help| add(registry, IntCounter::new(name, help)?);
        let metrics = Self {
            clients: gauge(registry, "chat_stream_clients", "Open streams")?,
            clients_max: gauge(registry, "chat_stream_clients_max", "Streams that may be open at once")?,
            opened: counters(
                registry,
                "chat_stream_opened_total",
                "Streams that began, by outcome",
                &["outcome"],
            )?,
            ended: counters(
                registry,
                "chat_stream_ended_total",
                "Streams that ended, by reason",
                &["reason"],
            )?,
            messages: counter("chat_stream_messages_total", "Messages written to streams")?,
            delivery: add(
                registry,
                Histogram::with_opts(
                    HistogramOpts::new(
                        "chat_stream_delivery_seconds",
                        "From the commit of a message to a stream's socket, without what a stream had missed",
                    )
                    .buckets(DURATION_BUCKETS.to_vec()),
                )?,
            )?,
            gaps: counter(
                "chat_stream_gaps_total",
                "Messages for open streams that were not announced, and found by comparison with Postgres",
            )?,
            catch_ups: counter(
                "chat_stream_catch_ups_total",
                "Times that a stream read from Postgres what it had missed",
            )?,
        };
        for outcome in StreamOpened::VARIANTS {
            metrics.opened.with_label_values(&[<&str>::from(outcome)]);
        }
        for reason in StreamEnd::VARIANTS {
            metrics.ended.with_label_values(&[<&str>::from(reason)]);
        }
        Ok(metrics)
    }
}
