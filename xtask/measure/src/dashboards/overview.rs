//! What somebody looks at first: does it work, do the objectives hold, and if not, which route and what is full.
//!
//! What counts for the objectives is what counts in the recording rules; `cargo xtask test` compares the selectors.

use super::model::{Dashboard, Panel, Row, bars, heatmap, lines, stack, stat, table};

pub(super) fn dashboard() -> Dashboard {
    Dashboard {
        name: "overview",
        title: "chat-service / Overview and SLO",
        description: "Whether the service works, how much of its error budget is left, and which resources are saturated.",
        rows: vec![now(), objectives(), routes(), latency(), saturation()],
    }
}

fn now() -> Row {
    Row {
        title: "Now",
        answers: "Does it work now, and do alerts fire?",
        panels: vec![
            stat("Replicas ready", "none", "Replicas whose `/healthz` answers 200. Only ready replicas get traffic.")
                .query("ready", "sum(chat_ready{OURS})")
                .base("red")
                .from(1.0, "green")
                .runbook("ChatServiceDown")
                .runbook("ChatServiceNotReady"),
            stat("Replicas not ready", "none", "Scraped replicas that are not ready, and replicas that cannot be scraped.")
                .query("not ready", "count(up{OURS}) - (sum(chat_ready{OURS}) or vector(0))")
                .from(1.0, "orange")
                .from(2.0, "red")
                .runbook("ChatServiceReplicaDown")
                .runbook("ChatServiceReplicaNotReady"),
            stat("Requests", "reqps", "Requests per second on the public port, probes included.")
                .query("requests", "sum(rate(http_server_request_duration_seconds_count{OURS}[$__rate_interval]))")
                .base("blue"),
            stat("Failed requests", "percentunit", "Share of the API's requests that ended with a 5xx: the service failed, not the client.")
                .query("failed", &failed_share())
                .from(0.001, "orange")
                .from(0.01, "red"),
            stat("p99 latency", "s", "99 % of the API's requests are answered within this time, without logins and registrations.")
                .query("p99", &format!("histogram_quantile(0.99, sum by (le) (rate(http_server_request_duration_seconds_bucket{{OURS, {TIMED}}}[$__rate_interval])))"))
                .from(0.25, "orange")
                .from(1.0, "red"),
            stat("Alerts firing", "none", "Alerts of the service that fire now in the selected namespaces. Each has a runbook.")
                .query("firing", r#"count(ALERTS{CLUSTER, alertname=~"ChatService.+", alertstate="firing"}) or vector(0)"#)
                .from(1.0, "red"),
        ],
    }
}

/// What counts for availability: every request to a route of the API.
pub(crate) const API: &str = r#"http_route!~"/healthz|/docs.*|/openapi.json|unmatched""#;

/// What counts for latency: the same without what hashes passwords.
pub(crate) const TIMED: &str =
    r#"http_route!~"/login|/password|/register|/healthz|/docs.*|/openapi.json|unmatched""#;

fn failed_share() -> String {
    format!(
        r#"sum(rate(http_server_request_duration_seconds_count{{OURS, {API}, http_response_status_code=~"5.."}}[$__rate_interval]))
        / sum(rate(http_server_request_duration_seconds_count{{OURS, {API}}}[$__rate_interval]))"#
    )
}

fn objectives() -> Row {
    Row {
        title: "Objectives: 99.9 % do not fail, 99 % within 250 ms",
        answers: "How much of the error budget is left, and how fast does it burn?",
        panels: vec![
            budget_left("Availability budget left", "Share of the 30-day budget that is left. The budget is 0.1 % failed requests. Each hour with traffic weighs the same. Below 0 the objective is missed.", "failed", "0.001")
                .runbook("ChatServiceErrorBudgetBurn"),
            stat("Availability", "percentunit", "Share of the API's requests that did not end with a 5xx, over the selected time range.")
                .query("availability", &format!(r#"
                    1 - sum(increase(http_server_request_duration_seconds_count{{OURS, {API}, http_response_status_code=~"5.."}}[$__range]))
                    / sum(increase(http_server_request_duration_seconds_count{{OURS, {API}}}[$__range]))"#))
                .base("red")
                .from(0.999, "green")
                .height(7),
            burn_rates("Availability burn rate", "How fast the budget burns, by window: at 1 it lasts 30 days, at 14.4 two days. An alert fires when a long window and its short one are both above the threshold: 1 h and 5 m at 14.4, 6 h and 30 m at 6, 1 d and 2 h at 3, 3 d and 6 h at 1.", "failed", "0.001")
                .runbook("ChatServiceErrorBudgetBurn"),
            budget_left("Latency budget left", "Share of the 30-day budget that is left. The budget is 1 % slow responses among those that did not fail. Logins and registrations do not count, since hashing is slow by design. Each hour with traffic weighs the same.", "slow", "0.01")
                .runbook("ChatServiceLatencyBudgetBurn"),
            stat("Within 250 ms", "percentunit", "Share of the API's responses within 250 ms, over the selected time range, without failures, logins and registrations.")
                .query("within 250 ms", &format!(r#"
                    sum(increase(http_server_request_duration_seconds_bucket{{OURS, {TIMED}, http_response_status_code!~"5..", le="0.25"}}[$__range]))
                    / sum(increase(http_server_request_duration_seconds_count{{OURS, {TIMED}, http_response_status_code!~"5.."}}[$__range]))"#))
                .base("red")
                .from(0.99, "green")
                .height(7),
            burn_rates("Latency burn rate", "As above, for responses that took longer than 250 ms.", "slow", "0.01")
                .runbook("ChatServiceLatencyBudgetBurn"),
        ],
    }
}

fn budget_left(title: &'static str, description: &'static str, what: &str, budget: &str) -> Panel {
    let recorded = format!("namespace_job:http_server_requests_{what}:ratio_rate1h");
    stat(title, "percentunit", description)
        .query("left", &format!("min(1 - avg_over_time({recorded}{{RULE}}[30d]) / {budget})"))
        .max(1.0)
        .base("red")
        .from(0.0, "orange")
        .from(0.25, "green")
        .height(7)
}

fn burn_rates(title: &'static str, description: &'static str, what: &str, budget: &str) -> Panel {
    let recorded = format!("namespace_job:http_server_requests_{what}:ratio_rate");
    ["5m", "30m", "1h", "2h", "6h", "1d", "3d"]
        .into_iter()
        .fold(lines(title, "none", description), |panel, window| {
            panel.query(window, &format!("max({recorded}{window}{{RULE}}) / {budget}"))
        })
        .from(1.0, "yellow")
        .from(6.0, "orange")
        .from(14.4, "red")
        .width(16)
        .height(7)
}

fn routes() -> Row {
    Row {
        title: "Routes",
        answers: "Which route has the traffic, the errors, the slow responses?",
        panels: vec![
            stack("Requests by route", "reqps", "Requests per second. All unknown paths share one route.")
                .query("{{http_route}}", "sum by (http_route) (rate(http_server_request_duration_seconds_count{OURS}[$__rate_interval]))")
                .width(8),
            lines("Failures by route and status", "reqps", "5xx responses per second. 503, with Retry-After, means that Postgres is unavailable or a queue is full. 500 is a bug.")
                .query(
                    "{{http_route}} {{http_response_status_code}}",
                    r#"sum by (http_route, http_response_status_code) (rate(http_server_request_duration_seconds_count{OURS, http_response_status_code=~"5.."}[$__rate_interval]))"#,
                )
                .runbook("ChatServiceInternalErrors")
                .width(8),
            lines("p99 latency by route", "s", "99 % of a route's requests are answered within this time. A login takes 15 ms of hashing by design.")
                .query(
                    "{{http_route}}",
                    "histogram_quantile(0.99, sum by (le, http_route) (rate(http_server_request_duration_seconds_bucket{OURS}[$__rate_interval])))",
                )
                .from(0.25, "red")
                .width(8),
            table("Routes in the selected time range", "Each route over the selected time range: requests, the share of 5xx, the share of 4xx, and latency.")
                .column("Requests", "short", "sum by (http_route) (increase(http_server_request_duration_seconds_count{OURS}[$__range]))")
                .column("Failed", "percentunit", &share_of_route("5.."))
                .column("Client errors (4xx)", "percentunit", &share_of_route("4.."))
                .column("p50", "s", "histogram_quantile(0.5, sum by (le, http_route) (rate(http_server_request_duration_seconds_bucket{OURS}[$__range])))")
                .column("p99", "s", "histogram_quantile(0.99, sum by (le, http_route) (rate(http_server_request_duration_seconds_bucket{OURS}[$__range])))"),
        ],
    }
}

fn share_of_route(statuses: &str) -> String {
    format!(
        r#"sum by (http_route) (increase(http_server_request_duration_seconds_count{{OURS, http_response_status_code=~"{statuses}"}}[$__range]))
        / sum by (http_route) (increase(http_server_request_duration_seconds_count{{OURS}}[$__range]))"#
    )
}

fn latency() -> Row {
    Row {
        title: "Latency",
        answers: "Are all requests slow, or only a few?",
        panels: vec![
            heatmap("Requests by duration", "s", "Distribution of the durations. Two bands are two kinds of requests, such as cached reads and logins. A rising band is a queue.")
                .query("{{le}}", "sum by (le) (increase(http_server_request_duration_seconds_bucket{OURS}[$__rate_interval]))"),
            lines("Duration", "s", "Percentiles of the durations of all requests. The dashed line is the objective for 99 %.")
                .query("p50", &quantile("0.5"))
                .query("p90", &quantile("0.9"))
                .query("p99", &quantile("0.99"))
                .from(0.25, "red"),
        ],
    }
}

fn quantile(share: &str) -> String {
    format!(
        "histogram_quantile({share}, sum by (le) (rate(http_server_request_duration_seconds_bucket{{OURS}}[$__rate_interval])))"
    )
}

fn saturation() -> Row {
    Row {
        title: "Saturation",
        answers: "Which resource is saturated, or will be soon?",
        panels: vec![
            fullness(),
            lines(
                "Requests in flight",
                "none",
                "Requests that a replica is processing. The number grows when requests arrive faster than responses leave.",
            )
            .query("{{pod}}", "sum by (pod) (http_server_active_requests{OURS})")
            .width(8),
            lines(
                "CPU",
                "none",
                "Cores in use by a replica. Most of it is password hashing; see Runtime and rollout.",
            )
            .query("{{pod}}", "sum by (pod) (rate(process_cpu_seconds_total{OURS}[$__rate_interval]))")
            .width(8),
        ],
    }
}

/// Everything that has an end, of the replica that is nearest to it.
fn fullness() -> Panel {
    bars("Utilization", "percentunit", "Share of each bounded resource in use, on the fullest replica. At 100 % requests get 503: from a queue immediately, from the pool after a timeout.")
        .query("Postgres pool", "max(instance:db_client_connection:utilization{OURS})")
        .query("Outbox", "max(instance:chat_outbox_queue:utilization{OURS})")
        .query("Hashing", "max(instance:chat_password_queue:utilization{OURS})")
        .query("File descriptors", "max(process_open_fds{OURS} / process_max_fds{OURS})")
        .max(1.0)
        .from(0.7, "orange")
        .from(0.9, "red")
        .runbook("ChatServicePoolExhausted")
        .runbook("ChatServiceOutboxBackingUp")
        .runbook("ChatServicePasswordQueueFilling")
        .width(8)
}
