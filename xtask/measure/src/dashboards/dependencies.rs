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
        answers: "Do Postgres and Redis answer, for every replica?",
        panels: vec![
            states("Postgres and Redis", "Whether each answers the replica. Without Postgres a replica is unready and answers 503; without Redis everything works, more slowly.")
                .query("{{dependency}} {{pod}}", "max by (dependency, pod) (chat_dependency_up{OURS})")
                .zero_one("unavailable", "answers")
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
                "Statements per second by what they are for. One `store_messages` writes a whole batch.",
            )
            .query("{{db_operation_name}}", &operations("postgresql"))
            .width(8),
            lines(
                "Slowest 1 % of statements",
                "s",
                "99 % of a kind of statement end within this time, the wait for a connection not included.",
            )
            .query("{{db_operation_name}}", &slowest("postgresql"))
            .from(0.25, "red")
            .width(8),
            heatmap(
                "Statements by duration",
                "s",
                "How many statements took how long. A second band is a lock, a cold cache or a slow disk.",
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
            stack("Connections", "none", "Connections to Postgres of all replicas together: what Postgres's `max_connections` has to hold.")
                .query("{{db_client_connection_state}}", "sum by (db_client_connection_state) (db_client_connection_count{OURS})")
                .width(8),
            lines("Pool in use", "percentunit", "Share of a replica's connections that are in use. At 100 % requests wait.")
                .query("{{pod}}", "max by (pod) (instance:db_client_connection:utilization{OURS})")
                .max(1.0)
                .from(0.9, "red")
                .runbook("ChatServicePoolExhausted")
                .width(8),
            lines("Waits that ran out of time", "ops", "Requests that got no connection in time, and were answered with 503.")
                .query("{{pod}}", "sum by (pod) (rate(db_client_connection_timeouts_total{OURS}[$__rate_interval]))")
                .from(0.1, "red")
                .width(8),
        ],
    }
}

fn outbox() -> Row {
    Row {
        title: "Outbox",
        answers: "Are messages written as fast as they come?",
        panels: vec![
            lines("Messages waiting", "none", "Messages that wait for a writer. A full queue refuses with 503 at once.")
                .query("{{pod}}", "sum by (pod) (chat_outbox_queue_depth{OURS})")
                .query("capacity of one replica", "max(chat_outbox_queue_capacity{OURS})")
                .runbook("ChatServiceOutboxBackingUp")
                .width(8),
            lines("Messages in one statement", "none", "How many messages a statement writes, on average. It grows with the load, which is what keeps the queue short.")
                .query("{{pod}}", "sum by (pod) (rate(chat_outbox_batch_rows_sum{OURS}[$__rate_interval])) / sum by (pod) (rate(chat_outbox_batch_rows_count{OURS}[$__rate_interval]))")
                .width(8),
            heatmap("Statements by number of messages", "none", "How many statements wrote how many messages. All at the upper end: the writers are the limit.")
                .query("{{le}}", "sum by (le) (increase(chat_outbox_batch_rows_bucket{OURS}[$__rate_interval]))")
                .width(8),
        ],
    }
}

fn redis() -> Row {
    Row {
        title: "Redis",
        answers: "Is Redis slow, and for what?",
        panels: vec![
            stack("Commands", "ops", "Round trips per second by what they are for.")
                .query("{{db_operation_name}}", &operations("redis"))
                .width(8),
            lines("Slowest 1 % of commands", "s", "99 % of a kind of round trip end within this time. Redis is given up on after half a second.")
                .query("{{db_operation_name}}", &slowest("redis"))
                .from(0.1, "red")
                .width(8),
            heatmap("Commands by duration", "s", "How many round trips took how long.")
                .query("{{le}}", &durations("redis"))
                .width(8),
        ],
    }
}

fn cache() -> Row {
    Row {
        title: "Cache of recent messages",
        answers: "How many reads does Postgres not see?",
        panels: vec![
            stat("Hits", "percentunit", "Share of look-ups that were answered from the window. Below a half the cache earns little: raise CACHE_TTL_SECONDS or Redis's memory.")
                .query("hits", r#"sum(rate(chat_cache_lookups_total{OURS, outcome="hit"}[$__rate_interval])) / sum(rate(chat_cache_lookups_total{OURS}[$__rate_interval]))"#)
                .base("orange")
                .from(0.5, "green")
                .width(6)
                .height(8),
            stack("Lookups", "ops", "Lookups per second by outcome. `bypass`: no window could answer, because the page was too deep or Redis was unavailable.")
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
                "Used in four days, at the pace of the last six hours",
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
        "Share of the volume that is in use. A full one stops Postgres, and with it every write.",
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
