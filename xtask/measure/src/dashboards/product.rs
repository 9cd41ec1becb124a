//! What users do, and what they are refused.

use super::model::{Dashboard, Panel, Row, lines, stack, stat};

pub(super) fn dashboard() -> Dashboard {
    Dashboard {
        name: "product",
        title: "chat-service / Product",
        description: "Registrations, logins, messages and reads, and what was refused to whom.",
        rows: vec![totals(), messages(), reading(), accounts(), limits()],
    }
}

fn totals() -> Row {
    Row {
        title: "In the time that is shown",
        answers: "How much was the product used?",
        panels: vec![
            total("Messages", "Messages that were stored.", r#"chat_messages_sent_total{OURS, outcome="stored"}"#),
            total("Reads", "Pages of messages that were answered.", r#"http_server_request_duration_seconds_count{OURS, http_route="/messages", http_response_status_code="200"}"#),
            total("Registrations", "Users that registered.", r#"chat_auth_attempts_total{OURS, kind="register", outcome="success"}"#),
            total("Logins", "Logins that succeeded.", r#"chat_auth_attempts_total{OURS, kind="login", outcome="success"}"#),
            total("Rate limited", "Requests that a rate limit refused.", "chat_rate_limited_total{OURS}"),
            stat("Reads per message", "none", "Pages read for each message stored: how much the cache is worth.")
                .query("reads per message", r#"
                    sum(increase(http_server_request_duration_seconds_count{OURS, http_route="/messages", http_response_status_code="200"}[$__range]))
                    / sum(increase(chat_messages_sent_total{OURS, outcome="stored"}[$__range]))"#)
                .base("blue"),
        ],
    }
}

/// What a counter gained over the whole time.
fn total(title: &'static str, description: &'static str, counter: &str) -> Panel {
    stat(title, "short", description)
        .query(title, &format!("sum(increase({counter}[$__range]))"))
        .base("blue")
}

fn messages() -> Row {
    Row {
        title: "Messages",
        answers: "Are messages sent, and do they arrive?",
        panels: vec![
            stack("Messages by outcome", "ops", "Per second. `stored` and `replayed` are acknowledged; `rejected` is the client's fault; `refused` met a full queue, `failed` a fault of Postgres.")
                .query("{{outcome}}", "sum by (outcome) (rate(chat_messages_sent_total{OURS}[$__rate_interval]))"),
            lines("Messages that were not acknowledged", "percentunit", "Share of messages that were refused or failed, out of those that were not the client's fault.")
                .query("not acknowledged", r#"
                    sum(rate(chat_messages_sent_total{OURS, outcome=~"refused|failed"}[$__rate_interval]))
                    / sum(rate(chat_messages_sent_total{OURS, outcome!="rejected"}[$__rate_interval]))"#)
                .from(0.001, "red")
                .runbook("ChatServiceSendsFailing"),
            lines("Sent again", "percentunit", "Share of messages that came a second time with their Idempotency-Key: clients that did not get the first answer.")
                .query("sent again", r#"
                    sum(rate(chat_messages_sent_total{OURS, outcome="replayed"}[$__rate_interval]))
                    / sum(rate(chat_messages_sent_total{OURS, outcome=~"stored|replayed"}[$__rate_interval]))"#)
                .from(0.05, "orange"),
            lines("Duration of a send", "s", "From the request to the committed message, for those that were stored.")
                .query("p50", &duration("0.5", "/send", "201"))
                .query("p99", &duration("0.99", "/send", "201"))
                .from(0.25, "red"),
        ],
    }
}

fn duration(share: &str, route: &str, status: &str) -> String {
    format!(
        r#"histogram_quantile({share}, sum by (le) (rate(http_server_request_duration_seconds_bucket{{OURS, http_route="{route}", http_response_status_code="{status}"}}[$__rate_interval])))"#
    )
}

fn reading() -> Row {
    Row {
        title: "Reading",
        answers: "Are conversations read, and how fast?",
        panels: vec![
            stack("Reads", "reqps", "Pages of messages per second by status.")
                .query("{{http_response_status_code}}", r#"sum by (http_response_status_code) (rate(http_server_request_duration_seconds_count{OURS, http_route="/messages"}[$__rate_interval]))"#),
            lines("Duration of a read", "s", "From the request to the page, for those that were answered with one.")
                .query("p50", &duration("0.5", "/messages", "200"))
                .query("p99", &duration("0.99", "/messages", "200"))
                .from(0.25, "red"),
        ],
    }
}

fn accounts() -> Row {
    Row {
        title: "Accounts",
        answers: "Do logins succeed, and does somebody try passwords?",
        panels: vec![
            stack("Registrations", "ops", "Per second. A failure is a name or an address that is taken.")
                .query("{{outcome}}", r#"sum by (outcome) (rate(chat_auth_attempts_total{OURS, kind="register"}[$__rate_interval]))"#)
                .width(8),
            stack("Logins", "ops", "Per second. A failure is a wrong name or password.")
                .query("{{outcome}}", r#"sum by (outcome) (rate(chat_auth_attempts_total{OURS, kind="login"}[$__rate_interval]))"#)
                .width(8),
            lines("Logins that failed", "percentunit", "Share of logins with a wrong name or password. People mistype; programs that guess do nothing else.")
                .query("failed", r#"
                    sum(rate(chat_auth_attempts_total{OURS, kind="login", outcome="failure"}[$__rate_interval]))
                    / sum(rate(chat_auth_attempts_total{OURS, kind="login"}[$__rate_interval]))"#)
                .max(1.0)
                .from(0.5, "red")
                .runbook("ChatServiceAuthFailures")
                .width(8),
        ],
    }
}

fn limits() -> Row {
    Row {
        title: "Refused to clients",
        answers: "Who is refused, and is a limit too tight?",
        panels: vec![
            stack("Rate limited", "reqps", "Requests per second over a limit, answered with 429. `send` counts per user, the others per client address.")
                .query("{{limit}}", "sum by (limit) (rate(chat_rate_limited_total{OURS}[$__rate_interval]))")
                .runbook("ChatServiceRateLimitSurge"),
            stack("Answers that are the client's fault", "reqps", "Per second by status: 401 without a valid token, 404 for what is not there, 409 taken, 422 invalid, 429 over a limit.")
                .query("{{http_response_status_code}}", r#"sum by (http_response_status_code) (rate(http_server_request_duration_seconds_count{OURS, http_response_status_code=~"4.."}[$__rate_interval]))"#),
        ],
    }
}
