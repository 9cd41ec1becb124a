//! Postgres and Redis as the service sees them, and what stands between them and a request: the pool, the outbox, the
//! cache.

use super::model::{Dashboard, Panel, Row, heatmap, lines, stack, stat, states};

pub(super) fn dashboard() -> Dashboard {
    Dashboard {
        name: "dependencies",
        title: "chat-service / Dependencies",
        description: "Postgres and Redis as the service sees them, the connection pool, the outbox and the cache.",
        rows: vec![reachable(), postgres(), pool(), outbox(), redis(), cache(), volume()],
    }
}

fn reachable() -> Row {
    Row {
        title: "Reachable",
        answers: "Does every replica reach Postgres and Redis?",
        panels: vec![
            states("Postgres and Redis", "Whether the replica reaches each of them. Without Postgres a replica is unready and answers 503; without Redis it works, but more slowly.")
                .query("{{dependency}} {{pod}}", "max by (dependency, pod) (chat_dependency_up{OURS})")
                .zero_one("unavailable", "available")
                .runbook("ChatServicePostgresDown")
                .runbook("ChatServiceRedisDown")
                .width(24)
                .height(6),
        ],
    }
}

fn postgres() -> Row {
    Row {
        title: "Postgres",
        answers: "Which statement is slow, and since when?",
        panels: vec![
            stack(
                "Statements",
                "ops",
                "Statements per second by operation. One `store_messages` writes a whole batch.",
            )
            .query("{{db_operation_name}}", &operations("postgresql"))
            .width(8),
            lines(
                "p99 of statements",
                "s",
                "99 % of an operation's statements end within this time, without the wait for a connection.",
            )
            .query("{{db_operation_name}}", &slowest("postgresql"))
            .from(0.25, "red")
            .width(8),
            heatmap(
                "Statements by duration",
                "s",
                "Distribution of the durations. A second band means a lock, a cold cache or a slow disk.",
            )
            .query("{{le}}", &durations("postgresql"))
            .width(8),
        ],
    }
}

fn operations(system: &str) -> String {
    format!(
        r#"sum by (db_operation_name) (rate(db_client_operation_duration_seconds_count{{OURS, db_system_name="{system}"}}[$__rate_interval]))"#
    )
}

fn slowest(system: &str) -> String {
    format!(
        r#"histogram_quantile(0.99, sum by (le, db_operation_name) (rate(db_client_operation_duration_seconds_bucket{{OURS, db_system_name="{system}"}}[$__rate_interval])))"#
    )
}

fn durations(system: &str) -> String {
    format!(
        r#"sum by (le) (increase(db_client_operation_duration_seconds_bucket{{OURS, db_system_name="{system}"}}[$__rate_interval]))"#
    )
}

fn pool() -> Row {
    Row {
        title: "Connection pool",
        answers: "Do requests wait for a connection?",
        panels: vec![
            stack("Connections", "none", "Postgres connections of all replicas together. They must fit into Postgres's `max_connections`.")
                .query("{{db_client_connection_state}}", "sum by (db_client_connection_state) (db_client_connection_count{OURS})")
                .width(8),
            lines("Pool utilization", "percentunit", "Share of a replica's connections that are in use. At 100 % requests wait.")
                .query("{{pod}}", "max by (pod) (instance:db_client_connection:utilization{OURS})")
                .max(1.0)
                .from(0.9, "red")
                .runbook("ChatServicePoolExhausted")
                .width(8),
            lines("Connection timeouts", "ops", "Requests per second that got no connection in time, and so got 503.")
                .query("{{pod}}", "sum by (pod) (rate(db_client_connection_timeouts_total{OURS}[$__rate_interval]))")
                .from(0.1, "red")
                .width(8),
        ],
    }
}

fn outbox() -> Row {
    Row {
        title: "Outbox",
        answers: "Are messages stored as fast as they arrive?",
        panels: vec![
            lines("Messages waiting", "none", "Messages that wait for a writer. If the queue is full, sends get 503 immediately.")
                .query("{{pod}}", "sum by (pod) (chat_outbox_queue_depth{OURS})")
                .query("capacity of one replica", "max(chat_outbox_queue_capacity{OURS})")
                .runbook("ChatServiceOutboxBackingUp")
                .width(8),
            lines("Batch size", "none", "Messages that one statement writes, on average. Batches grow with the load, which keeps the queue short.")
                .query("{{pod}}", "sum by (pod) (rate(chat_outbox_batch_rows_sum{OURS}[$__rate_interval])) / sum by (pod) (rate(chat_outbox_batch_rows_count{OURS}[$__rate_interval]))")
                .width(8),
            heatmap("Statements by batch size", "none", "Distribution of the batch sizes. If all are at the upper end, the writers are the bottleneck.")
                .query("{{le}}", "sum by (le) (increase(chat_outbox_batch_rows_bucket{OURS}[$__rate_interval]))")
                .width(8),
        ],
    }
}

fn redis() -> Row {
    Row {
        title: "Redis",
        answers: "Is Redis slow, and for which operation?",
        panels: vec![
            stack("Commands", "ops", "Round trips per second by operation.")
                .query("{{db_operation_name}}", &operations("redis"))
                .width(8),
            lines(
                "p99 of commands",
                "s",
                "99 % of an operation's round trips end within this time. The timeout is half a second.",
            )
            .query("{{db_operation_name}}", &slowest("redis"))
            .from(0.1, "red")
            .width(8),
            heatmap("Commands by duration", "s", "Distribution of the durations of round trips.")
                .query("{{le}}", &durations("redis"))
                .width(8),
        ],
    }
}

fn cache() -> Row {
    Row {
        title: "Cache of recent messages",
        answers: "How many reads does the cache save Postgres?",
        panels: vec![
            stat("Hit ratio", "percentunit", "Share of lookups answered from the cached window. Below a half the cache helps little: raise CACHE_TTL_SECONDS or Redis's memory.")
                .query("hits", r#"sum(rate(chat_cache_lookups_total{OURS, outcome="hit"}[$__rate_interval])) / sum(rate(chat_cache_lookups_total{OURS}[$__rate_interval]))"#)
                .base("orange")
                .from(0.5, "green")
                .width(6)
                .height(8),
            stack("Lookups", "ops", "Lookups per second by outcome. `bypass`: no window can answer, because the page is too old or Redis is unavailable.")
                .query("{{outcome}}", "sum by (outcome) (rate(chat_cache_lookups_total{OURS}[$__rate_interval]))")
                .width(18),
        ],
    }
}

fn volume() -> Row {
    Row {
        title: "Volume of the bundled Postgres",
        answers: "When will the disk be full?",
        panels: vec![
            usage("Used", "{{persistentvolumeclaim}}", VOLUME_USED)
                .max(1.0)
                .from(0.8, "orange")
                .from(0.9, "red"),
            usage(
                "Forecast for four days, from the last six hours",
                "{{persistentvolumeclaim}}",
                VOLUME_FORECAST,
            )
            .from(1.0, "red"),
        ],
    }
}

fn usage(title: &'static str, legend: &'static str, expr: &str) -> Panel {
    lines(
        title,
        "percentunit",
        "Share of the volume that is in use. When it is full, Postgres stops and every write fails.",
    )
    .query(legend, expr)
    .needs("the kubelet's metrics")
}

const VOLUME_USED: &str = r#"
    kubelet_volume_stats_used_bytes{CLUSTER, persistentvolumeclaim=~"data-.+-postgres-.+"}
    / kubelet_volume_stats_capacity_bytes{CLUSTER, persistentvolumeclaim=~"data-.+-postgres-.+"}"#;

const VOLUME_FORECAST: &str = r#"
    predict_linear(kubelet_volume_stats_used_bytes{CLUSTER, persistentvolumeclaim=~"data-.+-postgres-.+"}[6h], 4 * 86400)
    / kubelet_volume_stats_capacity_bytes{CLUSTER, persistentvolumeclaim=~"data-.+-postgres-.+"}"#;
