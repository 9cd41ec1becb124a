//! Errors that come from the middleware, and what is common to all requests.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use chat_service::http::routes::public_api;
use reqwest::Method;
use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::support::{TestApp, User, operations, text};

fn method(name: &str) -> Method {
    Method::from_bytes(name.as_bytes()).expect("a method")
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unknown_path_is_404_whatever_the_method_on_both_ports() {
    let app = TestApp::with(&[("CHAT_PAGE", "false")]).await;
    for path in [
        "/",
        "/nothing",
        "/users",
        "/users/",
        "/users/a/b",
        "/send/x",
        "/docs/nothing.js",
        "/metrics",
        "/livez",
    ] {
        for name in ["GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "BREW"] {
            if path.starts_with("/docs/") && name != "GET" {
                continue;
            }
            app.request(method(name), path).response().await.problem(404);
        }
    }
    for path in ["/", "/nothing", "/me", "/docs/", "/openapi.json"] {
        app.get_operations(path).response().await.problem(404);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_method_that_a_path_does_not_have_is_405_and_the_allowed_ones_are_named() {
    let app = TestApp::start().await;
    let mut allowed: BTreeMap<_, BTreeSet<_>> = BTreeMap::new();
    for endpoint in public_api().endpoints() {
        let path = endpoint.route.replace("{username}", "ana").replace("{**}", "");
        let methods = allowed.entry(path).or_default();
        methods.insert(endpoint.method);
        if endpoint.method == "GET" {
            methods.insert("HEAD");
        }
    }
    for (path, allowed) in allowed {
        for name in ["GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "BREW"]
            .into_iter()
            .filter(|name| !allowed.contains(name))
        {
            let path = path.as_str();
            let answer = app.request(method(name), path).response().await;
            assert_eq!(answer.status, 405, "{name} {path}");
            answer.problem(405);
            let named = answer.header("allow").unwrap_or_default().split(", ").collect::<BTreeSet<_>>();
            assert_eq!(named, allowed, "{name} {path}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_over_the_limit_is_413_and_one_of_exactly_the_limit_is_read() {
    for (variables, limit) in [(&[][..], 65_536), (&[("MAX_BODY_BYTES", "1024")][..], 1024)] {
        let app = TestApp::with(variables).await;
        let ana = app.user("ana").await;
        for path in ["/register", "/login", "/send"] {
            let body = |length: usize| format!("{{\"x\":\"{}\"}}", "x".repeat(length - 8));
            let post = |body: String| {
                app.post(path).by(&ana).header("content-type", "application/json").body(body).response()
            };
            post(body(limit)).await.problem(422);
            let problem = post(body(limit + 1)).await.problem(413);
            assert!(text(&problem, "detail").contains(&limit.to_string()), "{problem}");
            post("x".repeat(limit * 3)).await.problem(413);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_chunked_body_is_counted_as_it_arrives() {
    let app = TestApp::with(&[("MAX_BODY_BYTES", "2048")]).await;
    let ana = app.user("ana").await;
    for path in ["/register", "/login", "/send"] {
        for (length, status) in [(2048, 422), (2049, 413), (100_000, 413)] {
            let body = format!("{{\"x\":\"{}\"}}", "x".repeat(length - 8));
            let mut request = format!(
                "POST {path} HTTP/1.1\r\nhost: test\r\nconnection: close\r\nauthorization: Bearer {}\r\n\
                 content-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n",
                ana.token
            );
            for chunk in body.as_bytes().chunks(500) {
                let chunk = std::str::from_utf8(chunk).expect("ASCII");
                request.push_str(&format!("{:x}\r\n{chunk}\r\n", chunk.len()));
            }
            request.push_str("0\r\n\r\n");
            let answer = app.raw(request.as_bytes()).await;
            assert_eq!(answer.status, status, "{length} bytes to {path}");
            answer.problem(status);
        }
    }
}

/// A POST whose body is framed by `framing`, as far as its end or its first bytes.
fn post(path: &str, user: &User, framing: &str, body: &str) -> String {
    format!(
        "POST {path} HTTP/1.1\r\nhost: test\r\nauthorization: Bearer {}\r\ncontent-type: application/json\r\n\
         {framing}\r\n\r\n{body}",
        user.token
    )
}

/// The number of requests to `path` with this status, and of those that took at most 250 ms.
async fn counted(app: &TestApp, path: &str, status: u16) -> (f64, f64) {
    let labels =
        format!("http_request_method=\"POST\",http_response_status_code=\"{status}\",http_route=\"{path}\"");
    let name = "http_server_request_duration_seconds";
    let all = app.metric(&format!("{name}_count{{{labels}}}")).await;
    (all, app.metric(&format!("{name}_bucket{{{labels},le=\"0.25\"}}")).await)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_that_stops_half_way_is_408_and_no_failure_of_the_service() {
    let app = TestApp::with(&[("REQUEST_TIMEOUT_MS", "2000")]).await;
    let ana = app.user("ana").await;
    for path in ["/register", "/login", "/send"] {
        for framing in ["content-length: 20", "transfer-encoding: chunked"] {
            for body in ["", "5\r\n{\"x\":\r\n"] {
                let started = Instant::now();
                let answer = app.raw(post(path, &ana, framing, body).as_bytes()).await;
                answer.problem(408);
                assert_eq!(answer.header("connection"), Some("close"), "{path}");
                let taken = started.elapsed();
                assert!((900..1900).contains(&taken.as_millis()), "{path}: {taken:?}");
            }
        }
        assert_eq!(counted(&app, path, 503).await, (0.0, 0.0), "{path}");
        assert_eq!(counted(&app, path, 408).await, (4.0, 4.0), "{path}: the client's time counts as ours");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_that_arrives_slowly_is_no_slow_request() {
    let app = TestApp::start().await;
    let (ana, ben) = app.pair().await;
    let body = json!({"recipient_id": ben.id, "content": "hello"}).to_string();
    let (first, rest) = body.split_at(10);
    let framing = format!("connection: close\r\ncontent-length: {}", body.len());
    let mut stream = TcpStream::connect(app.running.public).await.expect("connects");
    stream.write_all(post("/send", &ana, &framing, first).as_bytes()).await.expect("writes");
    tokio::time::sleep(Duration::from_millis(600)).await;
    stream.write_all(rest.as_bytes()).await.expect("writes");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.expect("an answer");
    assert!(answer.starts_with("HTTP/1.1 201"), "{answer}");
    assert_eq!(counted(&app, "/send", 201).await, (1.0, 1.0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_that_is_declared_or_found_too_large_is_413_before_its_end() {
    let app = TestApp::start().await;
    let ana = app.user("ana").await;
    let chunk = format!("11000\r\n{}\r\n", "x".repeat(0x11000));
    for path in ["/register", "/login", "/send"] {
        for (framing, body) in [
            ("content-length: 65537", ""),
            ("content-length: 1000000000000", "{"),
            ("content-length: 65537\r\nexpect: 100-continue", ""),
            ("transfer-encoding: chunked", chunk.as_str()),
        ] {
            let started = Instant::now();
            let answer = app.raw(post(path, &ana, framing, body).as_bytes()).await;
            answer.problem(413);
            assert_eq!(answer.header("connection"), Some("close"), "{path} {framing}");
            let taken = started.elapsed();
            assert!(taken < Duration::from_secs(2), "{path} {framing}: {taken:?}");
        }
    }
}

/// Sends everything, then reads everything.
async fn exchange(app: &TestApp, request: &[u8]) -> String {
    let mut stream = TcpStream::connect(app.running.public).await.expect("connects");
    stream.write_all(request).await.expect("the service reads on");
    let mut answer = String::new();
    let reading = tokio::time::timeout(Duration::from_secs(20), stream.read_to_string(&mut answer));
    reading.await.expect("the end of the connection").expect("no reset");
    answer
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_sends_what_is_refused_is_not_reset_before_it_reads_the_answer() {
    let app = TestApp::start().await;
    let ana = app.user("ana").await;
    let stranger = User { token: "none".to_owned(), ..ana.clone() };
    let body = "x".repeat(8_000_000);
    let framing = format!("content-length: {}", body.len());
    for (user, status) in [(&ana, 413), (&stranger, 401)] {
        for _ in 0..5 {
            let answer = exchange(&app, post("/send", user, &framing, &body).as_bytes()).await;
            assert!(answer.starts_with(&format!("HTTP/1.1 {status}")), "{answer}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_http_is_answered_with_a_status_alone() {
    let app = TestApp::start().await;
    let many = "a: b\r\n".repeat(101);
    let long = format!("a: {}\r\n", "b".repeat(3_000_000));
    for (request, status) in [
        ("GET /me\r\n\r\n".to_owned(), 400),
        ("GET /me HTTP/1.1\r\na b: c\r\n\r\n".to_owned(), 400),
        (format!("GET /{} HTTP/1.1\r\n\r\n", "a".repeat(70_000)), 414),
        (format!("GET /me HTTP/1.1\r\n{many}\r\n"), 431),
        (format!("GET /me HTTP/1.1\r\n{long}\r\n"), 431),
    ] {
        let answer = exchange(&app, request.as_bytes()).await.to_ascii_lowercase();
        assert!(answer.starts_with(&format!("http/1.1 {status}")), "{answer}");
        assert!(answer.contains("connection: close") && answer.ends_with("\r\n\r\n"), "{answer}");
        assert!(!answer.contains("x-request-id"), "it has an id: correct the documents");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_without_the_content_type_of_json_is_415() {
    let app = TestApp::start().await;
    let ana = app.user("ana").await;
    for path in ["/register", "/login", "/send"] {
        let post = |kind: Option<&str>| {
            let request = app.post(path).by(&ana).body("{}");
            kind.into_iter().fold(request, |request, kind| request.header("content-type", kind)).response()
        };
        for kind in [
            None,
            Some(""),
            Some("text/plain"),
            Some("application/x-www-form-urlencoded"),
            Some("multipart/form-data; boundary=x"),
            Some("application/jsonp"),
            Some("application/problem+json"),
            Some("text/json; application/json"),
        ] {
            let answer = post(kind).await;
            assert_eq!(answer.status, 415, "{kind:?} to {path}");
            answer.problem(415);
        }
        for kind in ["application/json", "application/json; charset=utf-8", "APPLICATION/JSON;charset=UTF-8"]
        {
            post(Some(kind)).await.problem(422);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_with_invalid_utf_8_is_400_wherever_it_is() {
    let app = TestApp::start().await;
    let (ana, ben) = app.pair().await;
    for path in ["/register", "/login", "/send"] {
        let valid = format!(
            "{{\"recipient_id\":\"{}\",\"content\":\"hello\",\"username\":\"carl\",\"password\":\"long enough\",\
             \"email\":\"carl@example.com\",\"ignored\":\"?\",\"also\":{{\"?\":[\"?\"]}}}}",
            ben.id
        );
        for (at, _) in valid.match_indices('?') {
            let mut body = valid.clone().into_bytes();
            body[at] = 0xff;
            let request = app.post(path).by(&ana).header("content-type", "application/json").body(body);
            let problem = request.response().await.problem(400);
            assert!(text(&problem, "detail").contains("UTF-8"), "{problem}");
        }
    }
    assert!(app.seqs(&ana, &ben, "").await.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_valid_request_id_is_kept_on_every_status() {
    let app = TestApp::with(&[("LOGIN_RATE_LIMIT_PER_MINUTE", "1000000")]).await;
    let ana = app.user("ana").await;
    for id in ["a", "A.b_c-9", "0123456789", &"x".repeat(64)] {
        for (name, path, status) in [
            ("GET", "/me", 200),
            ("GET", "/users/nobody", 404),
            ("GET", "/nothing", 404),
            ("PUT", "/me", 405),
            ("POST", "/send", 415),
            ("GET", "/messages", 422),
            ("GET", "/messages?limit=x", 400),
            ("GET", "/healthz", 200),
            ("GET", "/openapi.json", 200),
            ("GET", "/docs/", 200),
            ("GET", "/docs", 302),
        ] {
            let answer = app.request(method(name), path).by(&ana).header("x-request-id", id).response().await;
            assert_eq!((answer.status, answer.header("x-request-id")), (status, Some(id)), "{name} {path}");
            if status >= 400 {
                assert_eq!(answer.problem(status)["request_id"], id);
            }
        }
        let answer = app.get("/me").header("x-request-id", id).response().await;
        assert_eq!(answer.problem(401)["request_id"], id);
        let answer = app.get_operations("/livez").header("x-request-id", id).response().await;
        assert_eq!(answer.header("x-request-id"), Some(id));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn any_other_request_id_is_replaced_and_no_two_are_the_same() {
    let app = TestApp::start().await;
    let mut seen = BTreeSet::new();
    let long = "x".repeat(65);
    let odd: [&[u8]; 8] = [b"", b"a b", b"a\"b", b"a/b", b"\xc3\xa4", b"a\tb", b"{}", long.as_bytes()];
    for id in odd {
        for line in ["GET /healthz", "GET /nothing", "PUT /me"] {
            let mut request =
                format!("{line} HTTP/1.1\r\nhost: test\r\nconnection: close\r\nx-request-id: ").into_bytes();
            request.extend_from_slice(id);
            request.extend_from_slice(b"\r\n\r\n");
            let answer = app.raw(&request).await;
            let new = answer.header("x-request-id").expect("an id").to_owned();
            assert_ne!(new.as_bytes(), id);
            if answer.status >= 400 {
                answer.problem(answer.status);
            }
            assert!(seen.insert(new), "the same id twice");
        }
    }
    for _ in 0..10 {
        let id = app.get("/nothing").response().await.header("x-request-id").map(str::to_owned);
        assert!(seen.insert(id.expect("an id")), "the same id twice");
    }
}

/// Every operation that needs Postgres is refused with this status.
async fn refuses_everything(app: &TestApp, ana: &User, ben: &User, status: u16) {
    for operation in operations().iter().filter(|operation| operation.path != "/healthz") {
        operation.request(app, ben, "carl").by(ana).response().await.problem(status);
    }
    for query in ["offset=70", "before=5", "after=5"] {
        app.messages(ana, ben, query).await.problem(status);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn without_postgres_everything_that_needs_it_is_503() {
    let healthy = TestApp::start().await;
    let (ana, ben) = healthy.pair().await;
    let app = healthy.replica(&[("DATABASE_URL", "postgres://postgres@127.0.0.1:1/nowhere")]).await;
    refuses_everything(&app, &ana, &ben, 503).await;
    assert_eq!(app.get("/healthz").response().await.status, 503);
    app.get_operations("/livez").response().await.json(200);
    // Errors that are found without Postgres come first.
    app.get("/me").response().await.problem(401);
    app.post("/login").json(&json!({})).response().await.problem(422);
    app.get("/nothing").response().await.problem(404);
}

#[tokio::test(flavor = "multi_thread")]
async fn without_the_schema_everything_that_needs_it_is_503() {
    let healthy = TestApp::start().await;
    let (ana, ben) = healthy.pair().await;
    let empty = crate::support::Database::empty().await;
    let app = healthy.replica(&[("DATABASE_URL", empty.url()), ("MIGRATE_ON_START", "false")]).await;
    refuses_everything(&app, &ana, &ben, 503).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_takes_too_long_is_503() {
    // The request's timeout and the statement's: the shorter one counts.
    for variables in [[("REQUEST_TIMEOUT_MS", "300")], [("DB_STATEMENT_TIMEOUT_MS", "300")]] {
        let patient = TestApp::start().await;
        let ana = patient.user("ana").await;
        let app = patient.replica(&variables).await;
        let lock = app.database.lock("users").await;
        let started = Instant::now();
        app.get("/me").by(&ana).response().await.problem(503);
        let taken = started.elapsed();
        assert!((Duration::from_millis(300)..Duration::from_secs(4)).contains(&taken), "{taken:?}");
        lock.release().await;
        patient.get("/me").by(&ana).response().await.json(200);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_with_an_unknown_outcome_can_be_repeated_under_its_key() {
    let patient = TestApp::start().await;
    let (ana, ben) = patient.pair().await;
    let app = patient.replica(&[("REQUEST_TIMEOUT_MS", "300")]).await;
    let lock = app.database.lock("conversations").await;
    let send = |app: &TestApp| app.send(&ana, &ben, "once").header("idempotency-key", "key").response();
    send(&app).await.problem(503);
    send(&app).await.problem(503);
    lock.release().await;
    assert_eq!(send(&patient).await.json(201)["seq"], 1);
    assert_eq!(patient.seqs(&ben, &ana, "").await, [1]);
}
