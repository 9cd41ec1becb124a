//! `GET /me/export`: everything about a user, as lines of JSON that can be resumed.

use std::time::{Duration, Instant};

use reqwest::Method;
use serde_json::Value;
use tokio::time::sleep;

use crate::support::{PASSWORD, Response, TestApp, User, members, text};

async fn export(app: &TestApp, user: &User, after: &str) -> Response {
    app.get(&format!("/me/export{after}")).by(user).response().await
}

/// The lines of an export that is answered whole.
async fn lines(app: &TestApp, user: &User, after: &str) -> Vec<String> {
    let answer = export(app, user, after).await;
    assert_eq!(answer.header("content-type"), Some("application/x-ndjson"));
    let text = answer.text(200);
    assert!(text.is_empty() || text.ends_with('\n'), "{text}");
    text.lines().map(str::to_owned).collect()
}

fn json(line: &str) -> Value {
    serde_json::from_str(line).unwrap_or_else(|error| panic!("{error} in {line}"))
}

/// An export whose response is not read to its end.
async fn begin(app: &TestApp, user: &User) -> reqwest::Response {
    let client = reqwest::Client::builder().no_proxy().build().expect("a client");
    let request = client.get(format!("http://{}/me/export", app.running.public)).bearer_auth(&user.token);
    let mut response = request.send().await.expect("the service answers");
    assert_eq!(response.status(), 200);
    assert!(response.chunk().await.expect("a chunk").is_some());
    response
}

/// More messages than the sockets hold.
async fn fill(app: &TestApp, user: &User, peer: &User) {
    app.sent(user, peer, "hello").await;
    let own = format!("'{}' IN (low_user, high_user) AND '{}' IN (low_user, high_user)", user.id, peer.id);
    app.database
        .execute(&format!(
            "INSERT INTO messages (conversation_id, seq, id, sender_id, content, created_at)
             SELECT id, n, gen_random_uuid(), low_user, repeat('x', 4000), now()
             FROM conversations, generate_series(2, 5000) AS n WHERE {own};
             UPDATE conversations SET last_seq = 5000 WHERE {own}"
        ))
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_export_has_everything_about_the_caller_and_goes_on_behind_every_line() {
    let app = TestApp::start().await;
    let other = app.replica(&[]).await;
    let (ana, ben) = (app.member().await, app.member().await);
    let (cleo, dora) = (app.user("cleo").await, app.user("dora").await);
    app.login(&ana.name, PASSWORD).await.json(200);
    for blocked in [&cleo, &dora] {
        let block = app.request(Method::PUT, &format!("/blocks/{}", blocked.id)).by(&ana);
        assert_eq!(block.response().await.status, 204);
    }
    for content in ["hello", "\u{1f4f1} \"quoted\" \\ and\ntwo lines", "<b>"] {
        app.sent(&ana, &ben, content).await;
        app.sent(&ben, &ana, content).await;
    }
    app.sent(&ana, &cleo, "and you?").await;
    app.sent(&dora, &ben, "of others").await;
    app.sent(&ana, &dora, "to one who leaves").await;
    app.database.execute(&format!("DELETE FROM users WHERE id = '{}'", dora.id)).await;

    let all = lines(&app, &ana, "").await;
    let things: Vec<Value> = all.iter().map(|line| json(line)).collect();
    let kinds: Vec<&str> = things.iter().map(|thing| thing["type"].as_str().expect("a type")).collect();
    assert_eq!(kinds[..4], ["user", "session", "session", "block"]);
    assert_eq!(members(&things[0]), ["created_at", "cursor", "email", "id", "type", "username"]);
    assert_eq!(things[0]["email"], format!("{}@example.com", ana.name));
    assert_eq!(
        members(&things[1]),
        ["client_address", "created_at", "cursor", "id", "last_used_at", "type", "user_agent"]
    );
    assert_eq!(things[3]["username"], "cleo", "who was deleted is no longer blocked");
    let mut peers = vec![(&ben, Value::from(ben.name.clone()), 6), (&cleo, "cleo".into(), 1)];
    peers.push((&dora, Value::Null, 1));
    peers.sort_by_key(|(peer, _, _)| peer.id.clone());
    let mut rest = all[4..].iter();
    for (peer, name, count) in peers {
        let conversation = json(rest.next().expect("a conversation"));
        assert_eq!(
            members(&conversation),
            ["cursor", "last_seq", "peer_id", "peer_username", "type"],
            "{conversation}"
        );
        assert_eq!(
            (&conversation["type"], &conversation["peer_id"]),
            (&"conversation".into(), &peer.id.clone().into())
        );
        assert_eq!((&conversation["peer_username"], &conversation["last_seq"]), (&name, &count.into()));
        for seq in 1..=count {
            let line = rest.next().expect("a message");
            let cursor = text(&json(line), "cursor");
            if name.is_null() {
                assert_eq!(json(line)["content"], "to one who leaves");
                continue;
            }
            // Byte for byte as in a page.
            let page = app.messages(&ana, peer, &format!("before={}&limit=1", seq + 1)).await.text(200);
            let message = &page[2..page.len() - 1];
            assert_eq!(*line, format!("{{\"type\":\"message\",\"cursor\":\"{cursor}\",{message}"));
        }
    }
    assert_eq!(rest.next(), None);
    for (index, thing) in things.iter().enumerate() {
        let after = format!("?after={}", text(thing, "cursor"));
        assert_eq!(lines(&other, &ana, &after).await, all[index + 1..], "behind {thing}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cursor_that_is_malformed_or_anothers_is_422() {
    let app = TestApp::start().await;
    let (ana, ben) = app.pair().await;
    let cursor = text(&json(&lines(&app, &ben, "").await[0]), "cursor");
    for bad in ["", "x", "%20", &cursor, &cursor[1..]] {
        let answer = export(&app, &ana, &format!("?after={bad}")).await;
        assert_eq!(answer.invalid_fields(), ["after"], "{bad}");
    }
    export(&app, &ben, &format!("?after={cursor}&after={cursor}")).await.problem(400);
    assert_eq!(lines(&app, &ben, &format!("?after={cursor}")).await, Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_user_has_one_export_at_a_time_on_all_replicas_together() {
    let app = TestApp::start().await;
    let other = app.replica(&[]).await;
    let (ana, ben) = app.pair().await;
    fill(&app, &ana, &ben).await;
    let mut running = begin(&app, &ana).await;
    for replica in [&app, &other] {
        let answer = export(replica, &ana, "").await;
        answer.problem(429);
        let wait: u64 = answer.header("retry-after").and_then(|wait| wait.parse().ok()).expect("seconds");
        assert!((1..=60).contains(&wait), "{wait} s");
    }
    assert_eq!(app.metric("chat_exports_total{outcome=\"refused\"}").await, 1.0);
    // To its end: then another may begin at once.
    while running.chunk().await.expect("the rest").is_some() {}
    assert_eq!(lines(&other, &ana, "").await.len(), 2 + 5000);
    assert_eq!(app.metric("chat_exports_total{outcome=\"complete\"}").await, 1.0);
    // A client that leaves frees it, too.
    drop(begin(&app, &ana).await);
    let deadline = Instant::now() + Duration::from_secs(20);
    while export(&other, &ana, "").await.status == 429 {
        assert!(Instant::now() < deadline, "an export without a client runs on");
        sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(app.metric("chat_exports_total{outcome=\"client\"}").await, 1.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_runs_four_exports_and_refuses_more() {
    let app = TestApp::start().await;
    let other = app.replica(&[]).await;
    let (ana, ben) = app.pair().await;
    let mut running = Vec::new();
    for number in 0..4 {
        let user = app.user(&format!("user{number}")).await;
        fill(&app, &user, &ben).await;
        running.push(begin(&app, &user).await);
    }
    export(&app, &ana, "").await.problem(503);
    lines(&other, &ana, "").await;
    drop(running.pop());
    let deadline = Instant::now() + Duration::from_secs(20);
    while export(&app, &ana, "").await.status == 503 {
        assert!(Instant::now() < deadline, "the place is not free again");
        sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_export_is_broken_off_when_its_session_ends() {
    let app = TestApp::start().await;
    let other = app.replica(&[]).await;
    let (ana, ben) = app.pair().await;
    fill(&app, &ana, &ben).await;
    let mut running = begin(&app, &ana).await;
    assert_eq!(other.post("/logout").by(&ana).response().await.status, 204);
    let mut bytes = 0;
    let broken = loop {
        match running.chunk().await {
            Ok(Some(chunk)) => bytes += chunk.len(),
            Ok(None) => break false,
            Err(_) => break true,
        }
    };
    assert!(broken, "{bytes} bytes came to a regular end");
    export(&app, &ana, "").await.problem(401);
    assert_eq!(app.metric("chat_exports_total{outcome=\"revoked\"}").await, 1.0);
    // Another session has it at once.
    let again = User { token: app.token(&ana.id), ..ana };
    assert_eq!(lines(&app, &again, "").await.len(), 2 + 5000);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_takes_nothing_for_thirty_seconds_loses_its_export() {
    let app = TestApp::start().await;
    let (ana, ben) = app.pair().await;
    fill(&app, &ana, &ben).await;
    let running = begin(&app, &ana).await;
    let deadline = Instant::now() + Duration::from_secs(60);
    while app.metric("chat_exports_total{outcome=\"slow\"}").await < 1.0 {
        assert!(Instant::now() < deadline, "an export waits for its client for ever");
        sleep(Duration::from_millis(500)).await;
    }
    assert_eq!(lines(&app, &ana, "").await.len(), 2 + 5000);
    drop(running);
}
