//! What all operations have in common: each answers with every status that the OpenAPI document lists for it, and with no
//! other, which is checked for every response of every test.

use std::collections::BTreeSet;

use reqwest::Method;
use uuid::Uuid;

use crate::support::{Operation, PASSWORD, Request, TestApp, User, operations, text};

/// A bug's status. Every operation documents it; `send.rs` provokes it.
const INTERNAL_ERROR: u16 = 500;

/// The replicas that an operation is sent to.
struct Apps {
    usual: TestApp,
    limited: TestApp,
    impatient: TestApp,
    without_postgres: TestApp,
}

/// Requests that meet every condition which operations share. Most apply to some operations only, and succeed on others.
fn requests(
    apps: &Apps,
    operation: &Operation,
    ana: &User,
    ben: &User,
    blocker: &User,
    name: Option<String>,
) -> Vec<Request> {
    let app = &apps.usual;
    let new_name = || Uuid::new_v4().simple().to_string();
    let name = name.unwrap_or_else(new_name);
    let (path, body) = operation.example(ben, &name);
    let raw = |path: &str, content_type: &str, body: &str| {
        let request = app.request(operation.method.clone(), path).by(ana);
        if operation.documented.get("requestBody").is_none() {
            return request;
        }
        request.header("content-type", content_type).body(body)
    };
    let body = body.unwrap_or_default().to_string();
    let without_query = path.split('?').next().unwrap_or_default();
    let separator = if path.contains('?') { '&' } else { '?' };
    let unknown = User { id: Uuid::now_v7().to_string(), name: new_name(), token: String::new() };
    let send = |app: &TestApp, name: &str| operation.request(app, ben, name).by(ana);
    let keyed = |name: &str| send(app, name).header("idempotency-key", "key");
    vec![
        operation.request(app, &unknown, &new_name()).by(ana),
        // Once, again, and with the same key for something else.
        keyed(&name),
        keyed(&name),
        keyed(&new_name()),
        operation.request(app, ben, &new_name()),
        raw(&path, "application/json", "{"),
        raw(&path, "application/json", "{}"),
        raw(&path, "application/json", &" ".repeat(100_000)),
        raw(&path, "text/plain", &body),
        raw(without_query, "application/json", "{}"),
        raw(&format!("{path}{separator}limit=abc"), "application/json", "{}"),
        raw(&format!("{path}{separator}limit=0"), "application/json", "{}"),
        raw(&format!("{path}{separator}after=1&after=2"), "application/json", "{}"),
        raw(&format!("{path}{separator}after=x"), "application/json", "{}"),
        // Three within a minute or two: at least one is over the limit.
        send(&apps.limited, &new_name()),
        send(&apps.limited, &new_name()),
        send(&apps.limited, &new_name()),
        send(&apps.without_postgres, &name),
        operation.request(app, blocker, &new_name()).by(ana),
        operation.request(app, ana, &new_name()).by(blocker),
        operation.request(app, ana, &new_name()).by(ana),
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn every_documented_status_is_the_response_to_some_request() {
    let usual = TestApp::start().await;
    let limits = ["LOGIN", "SEND", "REGISTER"].map(|limit| format!("{limit}_RATE_LIMIT_PER_MINUTE"));
    let limits: Vec<_> = limits.iter().map(|name| (name.as_str(), "1")).collect();
    let limited = usual.replica(&limits).await;
    // Without windows, because a window can answer without Postgres.
    let unreachable = "postgres://postgres@127.0.0.1:1/nowhere";
    let without_postgres = usual.replica(&[("DATABASE_URL", unreachable), ("CACHE_WINDOW", "0")]).await;
    let impatient = usual.replica(&[("REQUEST_TIMEOUT_MS", "400")]).await;
    let apps = Apps { usual, limited, impatient, without_postgres };
    for operation in operations() {
        // Each begins with sessions, which it may end.
        let (ana, ben) = (apps.usual.member().await, apps.usual.member().await);
        let blocker = apps.usual.member().await;
        let block = apps.usual.request(Method::PUT, &format!("/blocks/{}", ana.id)).by(&blocker);
        assert_eq!(block.response().await.status, 204);
        // Its export runs already.
        let lease = format!(
            "INSERT INTO exports VALUES ('{}', gen_random_uuid(), now() + interval '1 minute')",
            blocker.id
        );
        apps.usual.database.execute(&lease).await;
        let is_about_caller = operation.path.starts_with("/sessions");
        let ben = if is_about_caller { &ana } else { &ben };
        let refresh_token = match operation.path.as_str() {
            "/refresh" => Some(text(&apps.usual.login(&ana.name, PASSWORD).await.json(200), "refresh_token")),
            "/me" => Some(PASSWORD.to_owned()),
            _ => None,
        };
        let mut seen = BTreeSet::from([INTERNAL_ERROR]);
        for request in requests(&apps, &operation, &ana, ben, &blocker, refresh_token) {
            seen.insert(request.response().await.status);
        }
        if operation.documented.get("requestBody").is_some() {
            // The body never comes.
            let head = format!(
                "{operation} HTTP/1.1\r\nhost: test\r\nauthorization: Bearer {}\r\n\
                 content-type: application/json\r\ncontent-length: 9\r\n\r\n",
                ana.token
            );
            seen.insert(apps.impatient.raw(head.as_bytes()).await.status);
        }
        assert_eq!(
            seen,
            operation.statuses(),
            "{operation}: the statuses of its requests, and the documented ones"
        );
    }
}
