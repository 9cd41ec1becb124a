//! `/metrics`: all series of alerts and dashboards exist from the first scrape on, and their number is bounded.

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::Value;

use crate::support::{PASSWORD, TestApp, text, together};

/// A scrape: the value of every series, by its name with its labels.
async fn scrape(app: &TestApp) -> BTreeMap<String, f64> {
    let text = app.get_operations("/metrics").response().await.text(200);
    let series = text.lines().filter(|line| !line.starts_with('#')).map(|line| {
        let (name, value) = line.rsplit_once(' ').unwrap_or_else(|| panic!("no value in {line}"));
        (name.to_owned(), value.parse().unwrap_or_else(|_| panic!("no number in {line}")))
    });
    series.collect()
}

fn request(method: &str, route: &str, status: u16) -> String {
    format!(
        "http_server_request_duration_seconds_count{{http_request_method=\"{method}\",\
         http_response_status_code=\"{status}\",http_route=\"{route}\"}}"
    )
}

fn operation(system: &str, name: &str) -> String {
    format!(
        "db_client_operation_duration_seconds_count{{db_operation_name=\"{name}\",db_system_name=\"{system}\"}}"
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn every_series_exists_at_the_first_scrape() {
    let app = TestApp::start().await;
    let first = scrape(&app).await;
    let value = |name: &str| *first.get(name).unwrap_or_else(|| panic!("no {name} in {first:#?}"));
    for (name, expected) in [
        ("chat_ready", 1.0),
        ("chat_dependency_up{dependency=\"postgres\"}", 1.0),
        ("chat_outbox_queue_depth", 0.0),
        // Two writers.
        ("chat_outbox_queue_capacity", 2048.0),
        ("chat_password_queue_depth", 0.0),
        ("db_client_connection_max{db_client_connection_pool_name=\"chat\"}", 6.0),
        ("db_client_connection_timeouts_total{db_client_connection_pool_name=\"chat\"}", 0.0),
        ("chat_messages_sent_total{outcome=\"failed\"}", 0.0),
        ("chat_outbox_batch_rows_count", 0.0),
        ("chat_rate_limited_total{limit=\"login\"}", 0.0),
        ("chat_auth_attempts_total{kind=\"login\",outcome=\"failure\"}", 0.0),
        ("chat_cache_lookups_total{outcome=\"bypass\"}", 0.0),
        ("chat_trace_spans_total{outcome=\"failed\"}", 0.0),
        ("chat_messages_removed_total", 0.0),
        ("chat_message_retention_sweep_ratio", 0.0),
        ("chat_message_retention_completed_timestamp_seconds", 0.0),
        ("http_server_active_requests", 0.0),
    ] {
        assert_eq!(value(name), expected, "{name}");
    }
    let cores = std::thread::available_parallelism().map_or(1, usize::from) as f64;
    assert_eq!(value("chat_password_queue_capacity"), 65.0 * cores + 1.0);
    assert!(value("chat_schema_version_expected") > 0.0);
    assert_eq!(value("chat_schema_version"), value("chat_schema_version_expected"));
    for name in ["read_messages", "find_user", "find_credentials", "check_taken", "insert_user"] {
        assert_eq!(value(&operation("postgresql", name)), 0.0, "{name}");
    }
    for name in ["count_attempt", "look_up_window", "claim_window", "settle_window", "append_window"] {
        assert_eq!(value(&operation("redis", name)), 0.0, "{name}");
    }
    assert_eq!(value(&operation("postgresql", "store_messages")), 0.0);
    assert!(value(&operation("postgresql", "check_schema")) >= 1.0, "readiness has checked the schema");
}

#[tokio::test(flavor = "multi_thread")]
async fn every_documented_route_has_its_series_before_the_first_request() {
    let app = TestApp::start().await;
    let first = scrape(&app).await;
    let document = app.get("/openapi.json").response().await.text(200);
    let document: Value = serde_json::from_str(&document).expect("JSON");
    let mut routes = vec![("GET".to_owned(), "/docs/{**}".to_owned(), 200)];
    for (path, methods) in document["paths"].as_object().expect("paths") {
        for (method, operation) in methods.as_object().expect("methods") {
            let statuses = operation["responses"].as_object().expect("responses").keys();
            let success = statuses.filter_map(|status| status.parse().ok()).find(|status| *status < 300);
            routes.push((method.to_uppercase(), path.clone(), success.expect("a success")));
        }
    }
    assert!(routes.len() >= 8, "{routes:?}");
    for (method, route, success) in routes {
        for status in [success, 500, 503] {
            let name = request(&method, &route, status);
            assert_eq!(first.get(&name), Some(&0.0), "{name}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn database_operations_are_timed() {
    let app = TestApp::with(&[("SEND_RATE_LIMIT_PER_MINUTE", "1000")]).await;
    let (ana, ben) = app.pair().await;
    app.login(&ana.name, PASSWORD).await.json(200);
    app.sent(&ana, &ben, "hello").await;
    app.hit(&ben, &ana, "").await;
    app.get("/me").by(&ana).response().await.json(200);
    let now = scrape(&app).await;
    for (name, expected) in
        [("check_taken", 2.0), ("insert_user", 2.0), ("find_credentials", 1.0), ("store_messages", 1.0)]
    {
        assert_eq!(now[&operation("postgresql", name)], expected, "{name}");
    }
    assert_eq!(now[&operation("postgresql", "find_user")], 1.0);
    assert!(now[&operation("postgresql", "read_messages")] >= 1.0);
    assert_eq!(now[&operation("redis", "append_window")], 1.0);
    for name in ["count_attempt", "look_up_window", "claim_window", "settle_window"] {
        assert!(now[&operation("redis", name)] >= 1.0, "{name}");
    }
    let seconds = now[&operation("postgresql", "store_messages").replace("_count{", "_sum{")];
    assert!(seconds > 0.0 && seconds < 10.0, "{seconds} s");
}

/// A statement that takes longer than its client waits must be in the histogram too.
#[tokio::test(flavor = "multi_thread")]
async fn timeouts_of_the_connection_pool_are_counted_and_cancelled_operations_are_timed() {
    let app = TestApp::with(&[("DB_POOL_MAX", "2"), ("DB_STATEMENT_TIMEOUT_MS", "60000")]).await;
    let ana = app.user("ana").await;
    let timeouts = "db_client_connection_timeouts_total{db_client_connection_pool_name=\"chat\"}";
    let finds = operation("postgresql", "find_user");
    let lock = app.database.lock("users").await;
    // Each uses a connection, or waits for one.
    let requests = (0..6).map(|_| async {
        let request = app.get("/me").by(&ana).response();
        tokio::time::timeout(Duration::from_secs(8), request).await.map(|answer| answer.status).ok()
    });
    let statuses = together(requests).await;
    lock.release().await;
    assert!(statuses.contains(&Some(503)), "{statuses:?}");
    let now = scrape(&app).await;
    assert!(now[timeouts] >= 1.0, "{statuses:?}: {}", now[timeouts]);
    let cancelled = statuses.iter().filter(|status| status.is_none()).count() as f64;
    assert!(cancelled >= 1.0, "{statuses:?}");
    let deadline = std::time::Instant::now() + Duration::from_secs(20);
    while scrape(&app).await[&finds] < cancelled {
        assert!(std::time::Instant::now() < deadline, "cancelled operations were not timed: {statuses:?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn readiness_is_also_a_metric() {
    let app = TestApp::with(&[("DATABASE_URL", "postgres://postgres@127.0.0.1:1/nowhere")]).await;
    assert_eq!(app.metric("chat_ready").await, 0.0);
    assert_eq!(app.metric("chat_schema_version").await, 0.0);
    assert!(app.metric("chat_schema_version_expected").await > 0.0);
    let app = TestApp::start().await;
    assert_eq!(app.metric("chat_ready").await, 1.0);
    app.running.app.health.drain();
    assert_eq!(app.metric("chat_ready").await, 0.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_cannot_create_series() {
    let app = TestApp::start().await;
    let (ana, ben) = app.pair().await;
    app.sent(&ana, &ben, "hello").await;
    let before = scrape(&app).await;
    let id = text(&app.sent(&ana, &ben, "again").await, "id");
    app.get(&format!("/{id}")).response().await.problem(404);
    app.request(reqwest::Method::from_bytes(b"BREW").expect("a token"), "/coffee")
        .response()
        .await
        .problem(404);
    let after = scrape(&app).await;
    let new: Vec<_> = after.keys().filter(|name| !before.contains_key(*name)).collect();
    assert!(new.is_empty(), "{new:?}");
}

/// A monitor's HEAD does the work of a GET, and creates no series of its own.
#[tokio::test(flavor = "multi_thread")]
async fn a_head_is_counted_as_the_get_that_it_stands_for() {
    let app = TestApp::start().await;
    let ana = app.user("ana").await;
    let before = scrape(&app).await;
    for (route, path) in [
        ("/healthz", "/healthz"),
        ("/me", "/me"),
        ("/docs/{**}", "/docs/"),
        ("/users/{username}", "/users/ana"),
    ] {
        let head = app.request(reqwest::Method::HEAD, path).by(&ana).response().await;
        assert_eq!(head.status, 200, "{path}");
        let name = request("GET", route, 200);
        assert_eq!(scrape(&app).await[&name], before[&name] + 1.0, "{name}");
    }
    let after = scrape(&app).await;
    let new: Vec<_> = after.keys().filter(|name| !before.contains_key(*name)).collect();
    assert!(new.is_empty(), "{new:?}");
}
