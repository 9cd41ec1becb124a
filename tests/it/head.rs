//! `HEAD` answers wherever `GET` does: the same status and headers, and no body.

use std::collections::{BTreeMap, BTreeSet};

use chat_service::http::routes::public_api;
use reqwest::Method;

use crate::support::{Request, Response, TestApp, User};

/// The headers that must be the same, which is all but those that differ between any two responses.
fn headers(answer: &Response) -> BTreeMap<String, Vec<u8>> {
    let all = answer.headers.iter().map(|(name, value)| (name.to_string(), value.as_bytes().to_vec()));
    all.filter(|(name, _)| name != "date" && name != "x-request-id").collect()
}

async fn answers_like_get(what: &str, status: u16, request: impl Fn(Method) -> Request) {
    let get = request(Method::GET).response().await;
    assert_eq!(get.status, status, "GET {what}");
    let head = request(Method::HEAD).response().await;
    assert_eq!(head.status, status, "HEAD {what}");
    assert_eq!(headers(&head), headers(&get), "{what}");
    assert_eq!(head.header("content-length"), Some(&*get.body.len().to_string()), "{what}");
    assert!(head.body.is_empty(), "HEAD {what} has a body");
}

#[tokio::test(flavor = "multi_thread")]
async fn head_is_answered_like_get_on_every_route_of_the_public_port() {
    let app = TestApp::start().await;
    let (ana, ben) = app.pair().await;
    app.sent_many(&ana, &ben, 7).await;
    let route = |route: &str| route.replace("{username}", &ben.name).replace("{**}", "");
    let gets = public_api().endpoints().into_iter().filter(|endpoint| endpoint.method == "GET");
    let paths: BTreeSet<String> = gets.map(|endpoint| route(&endpoint.route)).collect();
    assert!(paths.len() >= 6, "{paths:?}");
    for path in paths {
        // Their length is not known before their end.
        if path == "/stream" || path == "/me/export" {
            continue;
        }
        let path = if path == "/messages" { format!("{path}?peer_id={}", ben.id) } else { path };
        answers_like_get(&path, 200, |method| app.request(method, &path).by(&ana)).await;
    }
    answers_like_get("/docs", 302, |method| app.request(method, "/docs")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn head_is_answered_like_get_on_every_route_of_the_operations_port() {
    let app = TestApp::start().await;
    for path in ["/livez", "/healthz"] {
        answers_like_get(path, 200, |method| app.request_operations(method, path)).await;
    }
    // Its length changes from scrape to scrape.
    let metrics = app.request_operations(Method::HEAD, "/metrics").response().await;
    assert_eq!((metrics.status, metrics.body.len()), (200, 0));
    assert!(metrics.header("content-type").is_some_and(|kind| kind.starts_with("text/plain")));
    let length = metrics.header("content-length").and_then(|length| length.parse::<usize>().ok());
    assert!(length.is_some_and(|length| length > 1000), "{length:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_error_that_get_would_have_is_the_error_of_head_without_its_body() {
    let app = TestApp::start().await;
    let ana = app.user("ana").await;
    let gone = User { token: "none".to_owned(), ..ana.clone() };
    for (path, status) in [
        ("/users/nobody", 404),
        ("/nothing", 404),
        ("/messages", 422),
        ("/messages?limit=x", 400),
        ("/docs/nothing.js", 404),
    ] {
        let request = |method| app.request(method, path).by(&ana).header("x-request-id", "mine");
        answers_like_get(path, status, request).await;
    }
    let request = |method| app.request(method, "/me").by(&gone).header("x-request-id", "mine");
    answers_like_get("/me", 401, request).await;
    let draining = app.replica(&[]).await;
    draining.running.app.health.drain();
    answers_like_get("/healthz", 503, |method| draining.request(method, "/healthz")).await;
    let refused = app.request(Method::HEAD, "/send").response().await;
    assert_eq!((refused.status, refused.header("allow")), (405, Some("POST")));
    assert!(refused.body.is_empty());
}

/// A client library could hide what follows the head.
#[tokio::test(flavor = "multi_thread")]
async fn not_one_byte_follows_the_head() {
    let app = TestApp::start().await;
    for path in ["/healthz", "/docs/", "/nothing", "/openapi.json"] {
        let request = format!("HEAD {path} HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n");
        let answer = app.raw(request.as_bytes()).await;
        assert!(answer.body.is_empty(), "{path}: {:?}", String::from_utf8_lossy(&answer.body));
        let lengths: Vec<_> = answer.headers.get_all("content-length").iter().collect();
        assert_eq!(lengths.len(), 1, "{path}: {lengths:?}");
        assert!(answer.header("transfer-encoding").is_none(), "{path}");
    }
}
