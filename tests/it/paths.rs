//! Each path has one spelling, and references in responses hold behind a proxy that strips a prefix.

use serde_json::Value;

use crate::support::{PrefixProxy, TestApp};

async fn status(app: &TestApp, method: &str, path: &str, token: &str) -> u16 {
    let request = format!(
        "{method} {path} HTTP/1.1\r\nhost: test\r\nconnection: close\r\nauthorization: Bearer {token}\r\n\
         content-length: 0\r\n\r\n"
    );
    let answer = app.raw(request.as_bytes()).await;
    if answer.status >= 400 {
        answer.problem(answer.status);
    }
    answer.status
}

#[tokio::test(flavor = "multi_thread")]
async fn each_path_has_one_spelling_and_any_other_is_404_whatever_the_method() {
    let app = TestApp::start().await;
    let ana = app.user("ana").await;
    for path in [
        "/me",
        "/me?",
        "http://test/me",
        "/users/ana",
        "/users/ANA",
        "/users/%61na",
        "/healthz",
        "/docs/",
        "/openapi.json",
    ] {
        assert_eq!(status(&app, "GET", path, &ana.token).await, 200, "{path}");
    }
    for path in [
        "//me",
        "///me",
        "/me/",
        "/me//",
        "/me/?x=1",
        "http://test//me",
        "/ME",
        "/%6de",
        "/%6De",
        "/m%65",
        "/me%2F",
        "/me%2f",
        "/%2Fme",
        "/me%",
        "/./me",
        "/me/.",
        "/%2e/me",
        "/users/../me",
        "/users/%2E%2E/me",
        "/me/../users/ana",
        "/mex",
        "/me;x",
        "//users/ana",
        "/users//ana",
        "/users/ana/",
        "/users/./ana",
        "/%75sers/ana",
        "/users%2Fana",
        "/usersana",
        "/users/a/na",
        "/send/",
        "//send",
        "/register/",
        "/messages/",
        "/healthz/",
        "//healthz",
        "/openapi.json/",
        "/openapi%2Ejson",
        "//docs",
        "//docs/",
        "/docs//",
        "/docsx",
        "/docs/./",
        "/docs/swagger-ui.css/",
        "/docs//swagger-ui.css",
        "/docs/swagger-ui%2Ecss",
        "/%64ocs/",
    ] {
        for method in ["GET", "HEAD", "POST", "PUT", "OPTIONS"] {
            let found = if method == "HEAD" {
                let line = format!("HEAD {path} HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n");
                app.raw(line.as_bytes()).await.status
            } else {
                status(&app, method, path, &ana.token).await
            };
            assert_eq!(found, 404, "{method} {path}");
        }
    }
    for path in ["//livez", "/livez/", "/%6civez", "/metrics/", "//metrics", "/healthz/"] {
        app.get_operations(path).response().await.problem(404);
    }
}

/// A parameter is decoded once, after the path was taken apart: a slash in it separates nothing.
#[tokio::test(flavor = "multi_thread")]
async fn what_a_path_parameter_encodes_is_part_of_a_name_that_no_user_has() {
    let app = TestApp::start().await;
    let ana = app.user("ana").await;
    for name in [
        "a%2Fna", "ana%2F", "%2Fana", "..%2Fme", "an%20a", "ana%20", "%00", "%FF", "%C3%A4", "%2561na",
        "an+a",
    ] {
        let answer = app.get(&format!("/users/{name}")).by(&ana).response().await;
        let problem = answer.problem(404);
        assert_eq!(problem["detail"], "there is no user of this name", "{name}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_misspelt_path_is_no_route_to_the_metrics() {
    let app = TestApp::start().await;
    let series = |route: &str| {
        format!(
            "http_server_request_duration_seconds_count{{http_request_method=\"GET\",\
             http_response_status_code=\"404\",http_route=\"{route}\"}}"
        )
    };
    let before = app.metric(&series("unmatched")).await;
    app.get("/me/").response().await.problem(404);
    assert_eq!(app.metric(&series("unmatched")).await, before + 1.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn pages_are_linked_below_the_prefix_of_a_proxy() {
    let app = TestApp::start().await;
    let (ana, ben) = app.pair().await;
    app.sent_many(&ana, &ben, 7).await;
    let proxy = PrefixProxy::start(app.running.public, "/chat").await;
    let mut url = proxy.url(&format!("/messages?peer_id={}&limit=3", ben.id));
    let mut pages = Vec::new();
    loop {
        let answer = app.get_url(url.clone()).by(&ana).response().await;
        assert_eq!(answer.status, 200, "{url}");
        pages.push(answer.seqs());
        let Some(next) = answer.next_url() else { break };
        url = next;
    }
    assert_eq!(pages, [vec![7, 6, 5], vec![4, 3, 2], vec![1]]);
    // What other clients make of it: RFC 2396 resolved a lone query otherwise, and its parsers are still in use.
    let link = app.messages(&ana, &ben, "limit=3").await.header("link").map(str::to_owned);
    assert!(link.as_ref().is_some_and(|link| link.starts_with("<messages?peer_id=")), "{link:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_documentation_works_below_the_prefix_of_a_proxy() {
    let app = TestApp::start().await;
    let ana = app.user("ana").await;
    for prefix in ["/chat", "/a/b"] {
        let proxy = PrefixProxy::start(app.running.public, prefix).await;
        for query in ["", "?deepLinking=true"] {
            let moved = app.get_url(proxy.url(&format!("/docs{query}"))).response().await;
            assert_eq!(moved.status, 302);
            let target = moved.resolve(moved.header("location").expect("a location"));
            assert_eq!(target, proxy.url(&format!("/docs/{query}")));
        }
        let page = app.get_url(proxy.url("/docs/")).response().await;
        let html = page.text(200);
        let (_, rest) = html.split_once("\"url\":\"").expect("the document's URL");
        let document = page.resolve(rest.split('"').next().unwrap_or_default());
        assert_eq!(document, proxy.url("/openapi.json"));
        let answer = app.get_url(document).response().await;
        let document: Value = serde_json::from_str(&answer.text(200)).expect("JSON");
        // Each path is appended to the server's URL, which clients use without its last slash.
        let server = answer.resolve(document["servers"][0]["url"].as_str().expect("a server"));
        let me = format!("{}/me", server.as_str().trim_end_matches('/'));
        app.get_url(me.parse().expect("a URL")).by(&ana).response().await.json(200);
    }
}
