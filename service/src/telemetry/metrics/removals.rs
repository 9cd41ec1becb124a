//! The metrics of what is removed in the background: old messages, and what deleted users leave.

use prometheus::{Gauge, IntCounter, IntGauge, Registry};

use super::register::{add, gauge};

#[derive(Debug)]
pub(super) struct RemovalMetrics {
    pub(super) removed: IntCounter,
    pub(super) swept: Gauge,
    pub(super) completed: Gauge,
    pub(super) erasures_pending: IntGauge,
    pub(super) erased: IntCounter,
}

impl RemovalMetrics {
    pub(super) fn new(registry: &Registry) -> Result<Self, prometheus::Error> {
        let counter = |name, help| add(registry, IntCounter::new(name, help)?);
        let number = |name, help| add(registry, Gauge::new(name, help)?);
        Ok(Self {
            removed: counter("chat_messages_removed_total", "Messages that were removed for their age")?,
            swept: number(
                "chat_message_retention_sweep_ratio",
                "Share of the conversations that the sweep of old messages has done",
            )?,
            completed: number(
                "chat_message_retention_completed_timestamp_seconds",
                "When the last sweep of old messages was through; 0 before the first",
            )?,
            erasures_pending: gauge(
                registry,
                "chat_erasures_pending",
                "Deleted users of whom something is left to remove, all replicas together",
            )?,
            erased: counter(
                "chat_erased_messages_total",
                "Messages of deleted users that lost their content",
            )?,
        })
    }
}
