//! What users do, and what they are refused.

use super::model::{Dashboard, Panel, Row, lines, stack, stat};

pub(super) fn dashboard() -> Dashboard {
    Dashboard {
        name: "product",
        title: "chat-service / Product",
        description: "Registrations, logins, messages, reads, streams, and refused requests.",
        rows: vec![totals(), messages(), reading(), streams(), canary(), retention(), accounts(), limits()],
    }
}

fn totals() -> Row {
    Row {
        title: "Totals in the selected time range",
        answers: "How much was the product used?",
        panels: vec![
            total("Messages", "Messages that were stored.", r#"chat_messages_sent_total{OURS, outcome="stored"}"#),
            total("Reads", "Pages of messages that clients read.", r#"http_server_request_duration_seconds_count{OURS, http_route="/messages", http_response_status_code="200"}"#),
            total("Registrations", "Users that registered.", r#"chat_auth_attempts_total{OURS, kind="register", outcome="success"}"#),
            total("Logins", "Logins that succeeded.", r#"chat_auth_attempts_total{OURS, kind="login", outcome="success"}"#),
            total("Rate limited", "Requests that a rate limit refused.", "chat_rate_limited_total{OURS}"),
            stat("Reads per message", "none", "Pages read for each stored message. The higher the ratio, the more the cache saves.")
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
        answers: "Are messages sent, and are they stored?",
        panels: vec![
            stack("Messages by outcome", "ops", "Messages per second. `stored` and `replayed` are acknowledged. `rejected` is a client error, `refused` a full queue, `failed` an error of Postgres.")
                .query("{{outcome}}", "sum by (outcome) (rate(chat_messages_sent_total{OURS}[$__rate_interval]))"),
            lines("Messages not acknowledged", "percentunit", "Share of valid messages that were refused or failed.")
                .query("not acknowledged", r#"
                    sum(rate(chat_messages_sent_total{OURS, outcome=~"refused|failed"}[$__rate_interval]))
                    / sum(rate(chat_messages_sent_total{OURS, outcome!="rejected"}[$__rate_interval]))"#)
                .from(0.001, "red")
                .runbook("ChatServiceSendsFailing"),
            lines("Retries", "percentunit", "Share of messages that clients sent again with the same Idempotency-Key, because they did not get the first response.")
                .query("retries", r#"
                    sum(rate(chat_messages_sent_total{OURS, outcome="replayed"}[$__rate_interval]))
                    / sum(rate(chat_messages_sent_total{OURS, outcome=~"stored|replayed"}[$__rate_interval]))"#)
                .from(0.05, "orange"),
            lines("Duration of a send", "s", "Of requests whose message was stored.")
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
        answers: "How many pages are read, and how fast?",
        panels: vec![
            stack("Reads", "reqps", "Pages of messages per second by status.")
                .query("{{http_response_status_code}}", r#"sum by (http_response_status_code) (rate(http_server_request_duration_seconds_count{OURS, http_route="/messages"}[$__rate_interval]))"#),
            lines("Duration of a read", "s", "Of requests that returned a page.")
                .query("p50", &duration("0.5", "/messages", "200"))
                .query("p99", &duration("0.99", "/messages", "200"))
                .from(0.25, "red"),
        ],
    }
}

fn streams() -> Row {
    Row {
        title: "Streams",
        answers: "Do open streams get each message, and soon?",
        panels: vec![
            lines("Open streams", "short", "Of all replicas, and how many they may have.")
                .query("open", "sum(chat_stream_clients{OURS})")
                .query("limit", "sum(chat_stream_clients_max{OURS})")
                .runbook("ChatServiceStreamsNearLimit")
                .width(8),
            stack("Streams that began", "ops", "Per second. `reset` clients had a position that could not be taken up, and reload. `refused` were too many, or the replica stops.")
                .query("{{outcome}}", "sum by (outcome) (rate(chat_stream_opened_total{OURS}[$__rate_interval]))")
                .runbook("ChatServiceStreamReconnects")
                .width(8),
            stack("Streams that ended", "ops", "Per second. `slow` clients did not read, `client` ended it themselves or lost their connection.")
                .query("{{reason}}", "sum by (reason) (rate(chat_stream_ended_total{OURS}[$__rate_interval]))")
                .width(8),
            lines("Delay of a delivery", "s", "From the commit of a message to the stream's socket.")
                .query("p50", &delay("0.5"))
                .query("p99", &delay("0.99"))
                .from(1.0, "red")
                .runbook("ChatServiceStreamDeliverySlow")
                .width(8),
            lines("Messages delivered", "ops", "Messages per second that were written to streams, and how many of them streams read from Postgres by themselves, after a reconnect or because they had fallen behind.")
                .query("messages", "sum(rate(chat_stream_messages_total{OURS}[$__rate_interval]))")
                .query("catch-ups", "sum(rate(chat_stream_catch_ups_total{OURS}[$__rate_interval]))")
                .width(8),
            lines("Messages not announced", "ops", "Messages for open streams that no replica announced, so that they came seconds late. Expected while Redis is unavailable; otherwise see whether Redis refuses PUBLISH or SUBSCRIBE.")
                .query("gaps", "sum(rate(chat_stream_gaps_total{OURS}[$__rate_interval]))")
                .runbook("ChatServiceStreamGaps")
                .width(8),
        ],
    }
}

fn canary() -> Row {
    Row {
        title: "Canary",
        answers: "Can two accounts talk through the Service, and how fast? Empty unless the canary runs.",
        panels: vec![
            stack("Rounds", "ops", "Rounds per second. In a `success` both sides read the message, and it came on the stream.")
                .query("{{outcome}}", "sum by (outcome) (rate(chat_canary_rounds_total{CLUSTER}[$__rate_interval]))")
                .runbook("ChatServiceCanaryFailing")
                .width(8),
            lines("From the start of a send", "s", "To its acknowledgement, to the end of both reads, and to the recipient's stream: 99 of 100 took at most so long.")
                .query("{{step}}", "histogram_quantile(0.99, sum by (step, le) (rate(chat_canary_seconds_bucket{CLUSTER}[$__rate_interval])))")
                .from(1.0, "red")
                .width(8),
            lines("Failures and losses", "ops", "Per second: rounds that failed, by the step, and acknowledged messages that a read or the stream lacked.")
                .query("{{step}}", "sum by (step) (rate(chat_canary_failures_total{CLUSTER}[$__rate_interval]))")
                .query("lost", "sum(rate(chat_canary_lost_total{CLUSTER}[$__rate_interval]))")
                .runbook("ChatServiceCanaryLostMessage")
                .width(6),
            stat("Last success", "dateTimeFromNow", "When a round succeeded last.")
                .query("success", "1000 * max(chat_canary_last_success_timestamp_seconds{CLUSTER})")
                .base("blue")
                .width(2),
        ],
    }
}

fn retention() -> Row {
    Row {
        title: "Retention",
        answers: "Are old messages removed, and is the sweep through?",
        panels: vec![
            lines("Messages removed", "ops", "Messages per second that were removed for their age. One replica at a time removes 1000 at most.")
                .query("removed", "sum(rate(chat_messages_removed_total{OURS}[$__rate_interval]))")
                .width(8),
            lines("Progress of the sweep", "percentunit", "Share of the conversations that the sweep of old messages has done. It stays at 100 % for an hour, then the next one begins. 0 where MESSAGE_RETENTION_DAYS is 0.")
                .query("done", "max(chat_message_retention_sweep_ratio{OURS})")
                .max(1.0)
                .width(8),
            stat("Last complete sweep", "dateTimeFromNow", "When all conversations had been looked at last. Decades ago before the first, or where MESSAGE_RETENTION_DAYS is 0.")
                .query("completed", "1000 * max(chat_message_retention_completed_timestamp_seconds{OURS})")
                .base("blue")
                .width(8),
        ],
    }
}

fn delay(share: &str) -> String {
    format!(
        "histogram_quantile({share}, sum by (le) (rate(chat_stream_delivery_seconds_bucket{{OURS}}[$__rate_interval])))"
    )
}

fn accounts() -> Row {
    Row {
        title: "Accounts",
        answers: "Can users log in, and does an attacker guess passwords?",
        panels: vec![
            stack("Registrations", "ops", "Per second. `failure` is a taken name or address.")
                .query("{{outcome}}", r#"sum by (outcome) (rate(chat_auth_attempts_total{OURS, kind="register"}[$__rate_interval]))"#)
                .width(8),
            stack("Logins", "ops", "Per second. `failure` is a wrong name or password.")
                .query("{{outcome}}", r#"sum by (outcome) (rate(chat_auth_attempts_total{OURS, kind="login"}[$__rate_interval]))"#)
                .width(8),
            lines("Failed logins", "percentunit", "Share of logins with a wrong name or password. Users mistype sometimes; scripts that guess fail nearly always.")
                .query("failed", r#"
                    sum(rate(chat_auth_attempts_total{OURS, kind="login", outcome="failure"}[$__rate_interval]))
                    / sum(rate(chat_auth_attempts_total{OURS, kind="login"}[$__rate_interval]))"#)
                .max(1.0)
                .from(0.5, "red")
                .runbook("ChatServiceAuthFailures")
                .width(8),
            stack("Exports", "ops", "Exports of a user's data per second by how they ended. `refused` ones met another of the same user, or too many on the replica. All but `complete` can be resumed.")
                .query("{{outcome}}", "sum by (outcome) (rate(chat_exports_total{OURS}[$__rate_interval]))")
                .width(24),
            lines("Deleted users", "short", "Users who were deleted and of whom something is left to remove. It falls to 0 within minutes; the log names each of them at the beginning and the end.")
                .query("pending", "max(chat_erasures_pending{OURS})"),
            lines("Erased messages", "ops", "Messages of deleted users per second that lost their content.")
                .query("erased", "sum(rate(chat_erased_messages_total{OURS}[$__rate_interval]))"),
        ],
    }
}

fn limits() -> Row {
    Row {
        title: "Refused requests",
        answers: "Which requests are refused, and is a limit too low?",
        panels: vec![
            stack("Rate limited", "reqps", "Requests per second over a limit, answered with 429. `send` and `new_conversations` count per user, the others per client address.")
                .query("{{limit}}", "sum by (limit) (rate(chat_rate_limited_total{OURS}[$__rate_interval]))")
                .runbook("ChatServiceRateLimitSurge"),
            stack("Client errors (4xx)", "reqps", "Responses per second by status: 401 no valid token, 404 not found, 409 taken, 422 invalid, 429 over a limit.")
                .query("{{http_response_status_code}}", r#"sum by (http_response_status_code) (rate(http_server_request_duration_seconds_count{OURS, http_response_status_code=~"4.."}[$__rate_interval]))"#),
        ],
    }
}
