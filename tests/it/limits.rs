//! Rate limits: fixed windows of a minute, per user or per client address.

use deadpool_redis::redis;
use serde_json::json;

use crate::support::{PASSWORD, Response, TestApp, now_seconds, text, wait_for_a_minute};

const MINUTE: u64 = 60;

/// Waits for the next window if this one is almost over, so that a test counts in one window only.
async fn in_one_window() {
    tokio::time::sleep(wait_for_a_minute()).await;
}

/// An attempt that is counted, although it is invalid.
async fn attempt(app: &TestApp, path: &str, forwarded: &[&str]) -> Response {
    let request = app.post(path).json(&json!({}));
    forwarded.iter().fold(request, |request, value| request.header("x-forwarded-for", value)).response().await
}

/// How many attempts of this client are allowed before the first that is not.
async fn allowed(app: &TestApp, path: &str, forwarded: &[&str]) -> u32 {
    for count in 0..100 {
        let answer = attempt(app, path, forwarded).await;
        if answer.status == 429 {
            answer.problem(429);
            return count;
        }
        answer.problem(422);
    }
    100
}

#[tokio::test(flavor = "multi_thread")]
async fn the_sixth_login_of_an_address_in_a_minute_is_429_until_the_window_ends() {
    // Empty is unset: the documented default.
    let app = TestApp::with(&[("LOGIN_RATE_LIMIT_PER_MINUTE", "")]).await;
    app.user("ana").await;
    in_one_window().await;
    for password in [PASSWORD, "wrong", PASSWORD] {
        let answer = app.login("ana", password).await;
        assert_eq!(answer.status, if password == PASSWORD { 200 } else { 401 });
    }
    app.login("nobody", PASSWORD).await.problem(401);
    attempt(&app, "/login", &[]).await.problem(422);
    for name in ["ana", "ben", "nobody"] {
        let before = now_seconds();
        let answer = app.login(name, PASSWORD).await;
        let after = now_seconds();
        answer.problem(429);
        let wait: u64 = answer.header("retry-after").and_then(|wait| wait.parse().ok()).expect("seconds");
        let to_the_end = |now: u64| MINUTE - now % MINUTE;
        assert!(
            (to_the_end(after)..=to_the_end(before)).contains(&wait),
            "{wait} s at second {}",
            after % MINUTE
        );
    }
    // Other limits count separately.
    app.user("ben").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_user_may_send_30_messages_a_minute_and_users_count_separately() {
    let app = TestApp::with(&[("SEND_RATE_LIMIT_PER_MINUTE", "")]).await;
    let (ana, ben) = app.pair().await;
    in_one_window().await;
    for number in 1..=30 {
        assert_eq!(app.sent(&ana, &ben, "hello").await["seq"], number);
    }
    app.send(&ana, &ben, "hello").response().await.problem(429);
    app.post("/send").by(&ana).json(&json!({})).response().await.problem(429);
    app.sent(&ben, &ana, "hello").await;
    assert_eq!(app.seqs(&ana, &ben, "limit=1").await, [31], "what was refused was not stored");
    // A bad token does not count for any user.
    app.post("/send").header("authorization", "Bearer x").json(&json!({})).response().await.problem(401);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_address_may_register_30_users_a_minute() {
    let app = TestApp::with(&[("REGISTER_RATE_LIMIT_PER_MINUTE", "")]).await;
    in_one_window().await;
    app.register("ana", "ana@example.com", PASSWORD).await.json(201);
    assert_eq!(allowed(&app, "/register", &[]).await, 29);
    app.register("ben", "ben@example.com", PASSWORD).await.problem(429);
    app.login("ana", PASSWORD).await.json(200);
}

#[tokio::test(flavor = "multi_thread")]
async fn zero_disables_a_limit() {
    let app = TestApp::with(&[
        ("LOGIN_RATE_LIMIT_PER_MINUTE", "0"),
        ("SEND_RATE_LIMIT_PER_MINUTE", "0"),
        ("REGISTER_RATE_LIMIT_PER_MINUTE", "0"),
    ])
    .await;
    for path in ["/login", "/register"] {
        assert_eq!(allowed(&app, path, &[]).await, 100, "{path}");
    }
    let (ana, ben) = app.pair().await;
    app.sent_many(&ana, &ben, 40).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn replicas_count_together_and_each_minute_separately() {
    let one = TestApp::with(&[("SEND_RATE_LIMIT_PER_MINUTE", "4")]).await;
    let other = one.replica(&[]).await;
    let (ana, ben) = one.pair().await;
    in_one_window().await;
    for app in [&one, &other, &one, &other] {
        app.sent(&ana, &ben, "hello").await;
    }
    for app in [&one, &other] {
        app.send(&ana, &ben, "hello").response().await.problem(429);
    }
    // The keys have the window's number, and expire.
    let window = (now_seconds() / MINUTE).to_string();
    let keys: Vec<String> = one.redis.run(redis::cmd("KEYS").arg("chat:limit:*")).await;
    assert!(!keys.is_empty(), "nothing was counted in Redis");
    for key in keys {
        assert!(key.split(':').any(|part| part == window), "{key} in window {window}");
        let ttl: i64 = one.redis.run(redis::cmd("TTL").arg(&key)).await;
        assert!((60..=120).contains(&ttl), "{key} lives for {ttl} s");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_limit_holds_while_redis_is_unavailable() {
    let app =
        TestApp::with(&[("REDIS_URL", "redis://127.0.0.1:1/0"), ("LOGIN_RATE_LIMIT_PER_MINUTE", "3")]).await;
    in_one_window().await;
    assert_eq!(allowed(&app, "/login", &[]).await, 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn x_forwarded_for_is_ignored_unless_it_comes_from_a_trusted_proxy() {
    for proxies in ["", "10.0.0.0/8,::1/128", "127.0.0.2/32"] {
        let app = TestApp::with(&[("LOGIN_RATE_LIMIT_PER_MINUTE", "2"), ("TRUSTED_PROXIES", proxies)]).await;
        in_one_window().await;
        for number in 0..2 {
            attempt(&app, "/login", &[&format!("203.0.113.{number}")]).await.problem(422);
        }
        for forwarded in [&["203.0.113.9"][..], &[], &["10.1.2.3"]] {
            attempt(&app, "/login", forwarded).await.problem(429);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn behind_trusted_proxies_each_client_counts_separately_by_its_last_untrusted_address() {
    let variables = [
        ("LOGIN_RATE_LIMIT_PER_MINUTE", "2"),
        ("REGISTER_RATE_LIMIT_PER_MINUTE", "3"),
        ("TRUSTED_PROXIES", "127.0.0.1, 10.0.0.0/8,2001:db8:1::/48"),
    ];
    let app = TestApp::with(&variables).await;
    in_one_window().await;
    // Two clients, and a limit per endpoint.
    assert_eq!(allowed(&app, "/login", &["203.0.113.1"]).await, 2);
    assert_eq!(allowed(&app, "/login", &["203.0.113.2"]).await, 2);
    assert_eq!(allowed(&app, "/register", &["203.0.113.1"]).await, 3);
    // The same client, whatever it invents, and however many trusted proxies it comes through.
    for forwarded in [
        &["198.51.100.7, 203.0.113.1"][..],
        &["203.0.113.99,203.0.113.1"],
        &["203.0.113.1, 10.0.0.5, 10.9.9.9"],
        &["203.0.113.1", "10.0.0.5"],
        &["198.51.100.7", "203.0.113.1, 10.0.0.5"],
        &["garbage, 203.0.113.1, 2001:db8:1::7"],
        &["::ffff:203.0.113.1"],
    ] {
        let answer = attempt(&app, "/login", forwarded).await;
        assert_eq!(answer.status, 429, "{forwarded:?}");
    }
    // IPv6, in every notation.
    assert_eq!(allowed(&app, "/login", &["2001:db8:2::1"]).await, 2);
    attempt(&app, "/login", &["2001:0db8:2:0::1"]).await.problem(429);
    // If the entry is not an address, the proxy that added it counts.
    assert_eq!(allowed(&app, "/login", &[]).await, 2);
    for forwarded in [&["garbage"][..], &[""], &["203.0.113.50, unknown"]] {
        let answer = attempt(&app, "/login", forwarded).await;
        assert_eq!(answer.status, 429, "{forwarded:?}");
    }
}

/// A service behind a trusted proxy, which allows one login in a minute. Without Redis it counts in the process.
async fn behind_a_proxy(redis: bool) -> TestApp {
    let mut variables = vec![("LOGIN_RATE_LIMIT_PER_MINUTE", "1"), ("TRUSTED_PROXIES", "127.0.0.0/8")];
    if !redis {
        variables.push(("REDIS_URL", "redis://127.0.0.1:1/0"));
    }
    TestApp::with(&variables).await
}

#[tokio::test(flavor = "multi_thread")]
async fn the_addresses_of_one_64_are_one_client() {
    for redis in [true, false] {
        let app = behind_a_proxy(redis).await;
        in_one_window().await;
        for (forwarded, status) in [
            ("2001:db8:1:2::1", 422),
            ("2001:db8:1:2::2", 429),
            ("2001:db8:1:2:ffff:ffff:ffff:ffff", 429),
            ("2001:db8:1:3::1", 422),
            ("fe80::1%eth0", 422),
            ("fe80::2%25eth1", 429),
            // An IPv4 client, however a translator writes it.
            ("203.0.113.1", 422),
            ("203.0.113.2", 422),
            ("::ffff:203.0.113.1", 429),
            ("::ffff:cb00:7102", 429),
            ("64:ff9b::203.0.113.1", 429),
            ("64:ff9b::203.0.113.3", 422),
        ] {
            let answer = attempt(&app, "/login", &[forwarded]).await;
            assert_eq!(answer.status, status, "{forwarded}, with Redis: {redis}");
        }
        if redis {
            let keys: Vec<String> = app.redis.run(redis::cmd("KEYS").arg("chat:limit:login:*")).await;
            let mut counted = Vec::new();
            for key in keys {
                counted.extend(app.redis.run::<Vec<String>>(redis::cmd("HKEYS").arg(key)).await);
            }
            counted.sort();
            let expected = ["2001:db8:1:2::/64", "2001:db8:1:3::/64", "203.0.113.1", "203.0.113.2"];
            assert_eq!(counted, [&expected[..], &["203.0.113.3", "fe80::/64"]].concat());
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_forwarded_address_may_have_a_port_quotes_and_blanks() {
    let app = behind_a_proxy(true).await;
    in_one_window().await;
    for (first, again) in [
        (
            "203.0.113.1:51234",
            &["203.0.113.1:80", "203.0.113.1", "\"203.0.113.1:1\"", "\t203.0.113.1:65535 "][..],
        ),
        (
            "[2001:db8:1::1]:443",
            &["[2001:db8:1::1]", "2001:db8:1::1", "\"[2001:db8:1::1]:443\"", " [2001:db8:1::9]"],
        ),
        ("[::ffff:203.0.113.2]:443", &["203.0.113.2"]),
        ("[fe80::1%eth0]:443", &["fe80::1"]),
    ] {
        attempt(&app, "/login", &[first]).await.problem(422);
        for forwarded in again {
            let answer = attempt(&app, "/login", &[forwarded]).await;
            assert_eq!(answer.status, 429, "{forwarded} after {first}");
        }
    }
    // Several headers are one list, and a proxy in it may have a port too.
    let lines = ["198.51.100.1, 203.0.113.9:1000", "127.0.0.7:80"];
    attempt(&app, "/login", &lines).await.problem(422);
    attempt(&app, "/login", &["203.0.113.9"]).await.problem(429);
    // What is no address is the proxy itself.
    attempt(&app, "/login", &[]).await.problem(422);
    for garbage in [
        "203.0.113.50:",
        "203.0.113.50:x",
        "203.0.113.50:65536",
        "[203.0.113.50",
        "203.0.113.50, ",
        "[]:1",
        ":80",
    ] {
        let answer = attempt(&app, "/login", &[garbage]).await;
        assert_eq!(answer.status, 429, "{garbage}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn bytes_in_a_header_that_are_no_text_do_not_hide_the_address_after_them() {
    let app = behind_a_proxy(true).await;
    in_one_window().await;
    let log_in = async |forwarded: &[u8]| {
        let head =
            b"POST /login HTTP/1.1\r\nhost: chat\r\nconnection: close\r\ncontent-type: application/json\r\n";
        let tail = b"\r\ncontent-length: 2\r\n\r\n{}";
        app.raw(&[&head[..], b"x-forwarded-for: ", forwarded, tail].concat()).await
    };
    log_in(b"\xff\xfe, 203.0.113.1").await.problem(422);
    log_in(b"\xff\xfe, 203.0.113.2").await.problem(422);
    log_in(b"203.0.113.1").await.problem(429);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_429_says_how_long_to_wait() {
    let app = TestApp::with(&[("LOGIN_RATE_LIMIT_PER_MINUTE", "1")]).await;
    in_one_window().await;
    attempt(&app, "/login", &[]).await.problem(422);
    let answer = attempt(&app, "/login", &[]).await;
    let detail = text(&answer.problem(429), "detail");
    let wait = answer.header("retry-after").expect("a Retry-After");
    assert!(detail.contains(wait), "{detail} without {wait}");
    assert!(app.metric("chat_rate_limited_total{limit=\"login\"}").await >= 1.0);
}
