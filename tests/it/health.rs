//! `GET /healthz`, and the operations port: `/livez`, `/metrics`.

use std::time::{Duration, Instant};

use chat_service::store::migrations;
use serde_json::{Value, json};

use crate::support::{Database, PASSWORD, TestApp};

fn readiness(status: &str, changed: &[(&str, &str)]) -> Value {
    let mut checks = json!({"postgres": "ok", "schema": "ok", "redis": "ok", "process": "serving"});
    for (name, value) in changed {
        checks[*name] = json!(value);
    }
    json!({"status": status, "checks": checks})
}

#[tokio::test(flavor = "multi_thread")]
async fn a_healthy_replica_is_ready_on_both_ports_and_live_on_one() {
    let app = TestApp::start().await;
    assert_eq!(app.get("/healthz").response().await.json(200), readiness("ok", &[]));
    assert_eq!(app.get_operations("/healthz").response().await.json(200), readiness("ok", &[]));
    assert_eq!(app.get_operations("/livez").response().await.json(200), json!({"status": "ok"}));
    app.get("/livez").response().await.problem(404);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_draining_replica_is_live_but_not_ready_and_still_serves() {
    let app = TestApp::start().await;
    let (ana, ben) = app.pair().await;
    app.running.app.health.drain();
    let expected = readiness("unavailable", &[("process", "draining")]);
    let answer = app.get("/healthz").response().await;
    assert_eq!(answer.header("retry-after"), Some("1"));
    // So that no request fails because its kept-alive connection is closed.
    assert_eq!(answer.header("connection"), Some("close"));
    assert_eq!(answer.json(503), expected);
    assert_eq!(app.get_operations("/healthz").response().await.json(503), expected);
    app.get_operations("/livez").response().await.json(200);
    app.sent(&ana, &ben, "in flight").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_redis_a_replica_is_degraded_and_ready() {
    let app = TestApp::with(&[("REDIS_URL", "redis://127.0.0.1:1/0")]).await;
    assert_eq!(app.get("/healthz").response().await.json(200), readiness("degraded", &[("redis", "away")]));
    let (ana, ben) = app.pair().await;
    app.sent(&ana, &ben, "hello").await;
    assert_eq!(app.seqs(&ben, &ana, "").await, [1]);
    assert_eq!(app.metric("chat_dependency_up{dependency=\"redis\"}").await, 0.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_with_an_old_schema_is_live_but_not_ready_until_it_is_migrated() {
    let database = Database::empty().await;
    let options = database.options();
    let app = TestApp::on(database, &[("MIGRATE_ON_START", "false")]).await;
    let expected = readiness("unavailable", &[("schema", "behind")]);
    assert_eq!(app.get("/healthz").response().await.json(503), expected);
    app.get_operations("/livez").response().await.json(200);
    let version = migrations::migrate(&options).await.expect("migrates");
    let migrated = Instant::now();
    loop {
        let answer = app.get("/healthz").response().await;
        if answer.status == 200 {
            assert_eq!(answer.json(200), readiness("ok", &[]));
            break;
        }
        assert!(migrated.elapsed() < Duration::from_secs(10), "still not ready: {answer:?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(app.metric("chat_schema_version").await, version as f64);
    app.register("ana", "ana@example.com", PASSWORD).await.json(201);
}

#[tokio::test(flavor = "multi_thread")]
async fn without_postgres_a_replica_is_live_but_not_ready() {
    let app = TestApp::with(&[("DATABASE_URL", "postgres://postgres@127.0.0.1:1/nowhere")]).await;
    let expected = readiness("unavailable", &[("postgres", "away"), ("schema", "unknown")]);
    assert_eq!(app.get("/healthz").response().await.json(503), expected);
    app.get_operations("/livez").response().await.json(200);
    assert_eq!(app.metric("chat_dependency_up{dependency=\"postgres\"}").await, 0.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_are_counted_by_route_template_and_status_on_the_operations_port_only() {
    let app = TestApp::start().await;
    let (ana, ben) = app.pair().await;
    app.get(&format!("/users/{}", ben.name)).by(&ana).response().await.json(200);
    app.get("/users/nobody-at-all").by(&ana).response().await.problem(404);
    app.get("/secret-path").response().await.problem(404);
    app.sent(&ana, &ben, "a secret").await;
    app.messages(&ana, &ben, "limit=7").await.json(200);
    let answer = app.get_operations("/metrics").response().await;
    assert_eq!(answer.header("content-type"), Some("text/plain; version=0.0.4; charset=utf-8"));
    let text = answer.text(200);
    let count = |method: &str, route: &str, status: u16| {
        let labels = format!(
            "http_server_request_duration_seconds_count{{http_request_method=\"{method}\",\
             http_response_status_code=\"{status}\",http_route=\"{route}\"}} "
        );
        text.lines().find_map(|line| line.strip_prefix(&labels)).unwrap_or("0").to_owned()
    };
    assert_eq!(count("POST", "/register", 201), "2", "{text}");
    assert_eq!(count("GET", "/users/{username}", 200), "1", "{text}");
    assert_eq!(count("GET", "/users/{username}", 404), "1", "{text}");
    assert_eq!(count("GET", "unmatched", 404), "1", "{text}");
    assert_eq!(count("POST", "/send", 201), "1", "{text}");
    assert_eq!(count("GET", "/messages", 200), "1", "{text}");
    assert_eq!(count("GET", "/metrics", 200), "0", "{text}");
    assert_eq!(app.metric("chat_messages_sent_total{outcome=\"stored\"}").await, 1.0);
    for secret in [ben.name.as_str(), ana.id.as_str(), "nobody-at-all", "secret", "limit=7"] {
        assert!(!text.contains(secret), "{secret} in\n{text}");
    }
    app.get("/metrics").response().await.problem(404);
}
