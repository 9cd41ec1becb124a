//! `CORS_ALLOWED_ORIGINS`: whose pages may call the API from a browser.

use std::collections::BTreeSet;

use reqwest::Method;
use serde_json::json;

use crate::support::{Request, Response, TestApp, operations};

const PAGE: &str = "https://chat.example.com";
const ORIGINS: (&str, &str) = ("CORS_ALLOWED_ORIGINS", "https://chat.example.com,http://localhost:5173");

/// What a script must be able to read.
const EXPOSED: [&str; 7] = [
    "link",
    "x-request-id",
    "retry-after",
    "idempotency-replayed",
    "stream-position",
    "warning",
    "traceresponse",
];

fn preflight(app: &TestApp, origin: &str, method: &str, path: &str) -> Request {
    app.request(Method::OPTIONS, path)
        .header("origin", origin)
        .header("access-control-request-method", method)
        .header("access-control-request-headers", "authorization,content-type,idempotency-key")
}

/// The members of a list in a header.
fn list(answer: &Response, name: &str) -> BTreeSet<String> {
    let values = answer.headers.get_all(name).iter().filter_map(|value| value.to_str().ok());
    values.flat_map(|value| value.split(',')).map(|member| member.trim().to_lowercase()).collect()
}

/// What a browser demands before it lets the page's script read a response.
fn is_readable(answer: &Response, origin: &str) {
    assert_eq!(answer.header("access-control-allow-origin"), Some(origin), "{answer:?}");
    assert!(list(answer, "vary").contains("origin"), "{answer:?}");
    let exposed = list(answer, "access-control-expose-headers");
    for name in EXPOSED {
        assert!(exposed.contains(name), "{name} is not exposed: {exposed:?}");
    }
    // Tokens travel in a header, so no page needs credentials.
    assert_eq!(answer.header("access-control-allow-credentials"), None);
}

fn has_no_cors(answer: &Response) {
    let named: Vec<_> =
        answer.headers.keys().filter(|name| name.as_str().starts_with("access-control-")).collect();
    assert!(named.is_empty(), "{named:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_preflight_of_an_allowed_origin_is_204_on_every_path_and_names_what_it_may_send() {
    let app = TestApp::with(&[ORIGINS]).await;
    let mut paths: BTreeSet<String> =
        operations().iter().map(|operation| operation.path.replace("{username}", "ana")).collect();
    paths.insert("/nothing".to_owned());
    let methods: BTreeSet<String> =
        operations().iter().map(|operation| operation.method.to_string().to_lowercase()).collect();
    for path in &paths {
        for origin in [PAGE, "http://localhost:5173"] {
            let answer = preflight(&app, origin, "POST", path).response().await;
            assert_eq!((answer.status, answer.body.len()), (204, 0), "{path}");
            assert_eq!(answer.header("content-type"), None);
            assert_eq!(answer.header("access-control-allow-origin"), Some(origin), "{path}");
            assert!(list(&answer, "vary").contains("origin"));
            let allowed = list(&answer, "access-control-allow-methods");
            assert!(allowed.is_superset(&methods) && allowed.contains("head"), "{allowed:?}");
            let allowed = list(&answer, "access-control-allow-headers");
            for name in [
                "authorization",
                "content-type",
                "idempotency-key",
                "x-request-id",
                "traceparent",
                "last-event-id",
            ] {
                assert!(allowed.contains(name), "{name}: {allowed:?}");
            }
            let age = answer.header("access-control-max-age").and_then(|age| age.parse::<u32>().ok());
            assert!(age.is_some_and(|age| age >= 600), "{age:?}");
            assert_eq!(answer.header("access-control-allow-credentials"), None);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_response_to_an_allowed_origin_can_be_read_errors_included() {
    let app =
        TestApp::with(&[ORIGINS, ("LOGIN_RATE_LIMIT_PER_MINUTE", "1"), ("MAX_BODY_BYTES", "1024")]).await;
    let (ana, ben) = app.pair().await;
    app.sent_many(&ana, &ben, 7).await;
    let page = app.get(&format!("/messages?peer_id={}", ben.id)).by(&ana).header("origin", PAGE);
    let page = page.response().await;
    assert!(page.header("link").is_some());
    is_readable(&page, PAGE);
    let login = || app.post("/login").json(&json!({})).header("origin", PAGE);
    let send = || app.post("/send").by(&ana).header("origin", PAGE);
    for (request, status) in [
        (app.get("/me").by(&ana).header("origin", PAGE), 200),
        (app.request(Method::HEAD, "/me").by(&ana).header("origin", PAGE), 200),
        (app.send(&ana, &ben, "hello").header("origin", PAGE), 201),
        (app.get("/docs").header("origin", PAGE), 302),
        (app.get("/messages?limit=x").by(&ana).header("origin", PAGE), 400),
        (app.get("/me").header("origin", PAGE), 401),
        (app.get("/nothing").header("origin", PAGE), 404),
        (app.get("/me/").header("origin", PAGE), 404),
        (app.request(Method::PUT, "/me").header("origin", PAGE), 405),
        (send().header("content-type", "application/json").body("x".repeat(2000)), 413),
        (send().body("{}"), 415),
        (send().json(&json!({})), 422),
        (login(), 422),
    ] {
        let answer = request.response().await;
        assert_eq!(answer.status, status);
        is_readable(&answer, PAGE);
    }
    // At least one of three within two minutes is over the limit.
    let mut limited = None;
    for _ in 0..3 {
        limited = Some(login().response().await).filter(|answer| answer.status == 429).or(limited);
    }
    is_readable(&limited.expect("a 429"), PAGE);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unavailable_service_and_a_timeout_can_be_read_too() {
    let healthy = TestApp::start().await;
    let ana = healthy.user("ana").await;
    let unreachable = ("DATABASE_URL", "postgres://postgres@127.0.0.1:1/nowhere");
    let app = healthy.replica(&[ORIGINS, unreachable]).await;
    let answer = app.get("/me").by(&ana).header("origin", PAGE).response().await;
    answer.problem(503);
    is_readable(&answer, PAGE);
    let impatient = healthy.replica(&[ORIGINS, ("REQUEST_TIMEOUT_MS", "300")]).await;
    let lock = healthy.database.lock("users").await;
    let answer = impatient.get("/me").by(&ana).header("origin", PAGE).response().await;
    lock.release().await;
    answer.problem(503);
    is_readable(&answer, PAGE);
}

#[tokio::test(flavor = "multi_thread")]
async fn another_origin_is_not_allowed_and_caches_keep_the_answers_apart() {
    let app = TestApp::with(&[ORIGINS]).await;
    let ana = app.user("ana").await;
    for origin in [
        "https://evil.example.com",
        "http://chat.example.com",
        "https://chat.example.com:8443",
        "https://chat.example.com.evil.example",
        "https://sub.chat.example.com",
        "null",
        "*",
    ] {
        for answer in [
            app.get("/me").by(&ana).header("origin", origin).response().await,
            preflight(&app, origin, "POST", "/send").response().await,
        ] {
            assert_eq!(answer.header("access-control-allow-origin"), None, "{origin}");
            assert!(list(&answer, "vary").contains("origin"), "{origin}");
        }
    }
    let without = app.get("/me").by(&ana).response().await;
    assert_eq!(without.header("access-control-allow-origin"), None);
    assert!(list(&without, "vary").contains("origin"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_star_allows_every_origin() {
    let app = TestApp::with(&[("CORS_ALLOWED_ORIGINS", "*")]).await;
    let ana = app.user("ana").await;
    for origin in [PAGE, "null", "capacitor://localhost"] {
        let answer = app.get("/me").by(&ana).header("origin", origin).response().await;
        is_readable(&answer, "*");
        let answer = preflight(&app, origin, "POST", "/send").response().await;
        assert_eq!((answer.status, answer.header("access-control-allow-origin")), (204, Some("*")));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn without_the_variable_no_origin_is_allowed_and_options_is_405() {
    let app = TestApp::start().await;
    let ana = app.user("ana").await;
    for path in ["/me", "/send", "/healthz"] {
        let answer = preflight(&app, PAGE, "POST", path).response().await;
        answer.problem(405);
        assert!(answer.header("allow").is_some());
        has_no_cors(&answer);
    }
    let answer = app.get("/me").by(&ana).header("origin", PAGE).response().await;
    has_no_cors(&answer);
    assert_eq!(answer.header("vary"), None);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_options_request_that_is_no_preflight_is_405() {
    let app = TestApp::with(&[ORIGINS]).await;
    for request in [
        app.request(Method::OPTIONS, "/conversations"),
        app.request(Method::OPTIONS, "/conversations").header("origin", PAGE),
        app.request(Method::OPTIONS, "/conversations").header("access-control-request-method", "GET"),
    ] {
        let answer = request.response().await;
        answer.problem(405);
        assert_eq!(list(&answer, "allow"), BTreeSet::from(["get".to_owned(), "head".to_owned()]));
    }
    preflight(&app, PAGE, "GET", "/conversations").response().await.text(204);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_operations_port_has_no_cors() {
    let app = TestApp::with(&[("CORS_ALLOWED_ORIGINS", "*")]).await;
    for path in ["/metrics", "/healthz", "/livez"] {
        let answer = app.get_operations(path).header("origin", PAGE).response().await;
        assert_eq!(answer.status, 200);
        has_no_cors(&answer);
        let answer = app.request_operations(Method::OPTIONS, path).header("origin", PAGE);
        let answer = answer.header("access-control-request-method", "GET").response().await;
        answer.problem(405);
        has_no_cors(&answer);
    }
}
