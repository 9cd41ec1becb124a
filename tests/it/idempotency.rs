//! `Idempotency-Key` on `POST /send`: a request can be repeated.

use std::time::{Duration, Instant};

use serde_json::Value;

use crate::support::{Response, TestApp, User, text, together};

async fn send(app: &TestApp, from: &User, to: &User, content: &str, key: &str) -> Response {
    app.send(from, to, content).header("idempotency-key", key).response().await
}

fn replayed(answer: &Response) -> Option<&str> {
    answer.header("idempotency-replayed")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_repeated_key_is_answered_with_the_first_message_and_marked_as_replayed() {
    let one = TestApp::start().await;
    let other = one.replica(&[]).await;
    let (ana, ben) = one.pair().await;
    let first = send(&one, &ana, &ben, "hello", "key-1").await;
    let message = first.json(201);
    assert_eq!(replayed(&first), None);
    one.sent(&ben, &ana, "in between").await;
    // White space around the content is not part of the message.
    for (app, content) in [(&one, "hello"), (&other, "hello"), (&other, "  hello\n")] {
        let again = send(app, &ana, &ben, content, "key-1").await;
        assert_eq!(again.json(201), message);
        assert_eq!(replayed(&again), Some("true"));
    }
    assert_eq!(one.seqs(&ana, &ben, "").await, [2, 1]);
    // Without a key the same message is another one.
    let plain = one.send(&ana, &ben, "hello").response().await;
    assert_eq!((replayed(&plain), plain.json(201)["seq"].as_i64()), (None, Some(3)));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_key_with_another_body_is_409() {
    let app = TestApp::start().await;
    let (ana, ben) = app.pair().await;
    let cleo = app.user("cleo").await;
    send(&app, &ana, &ben, "hello", "key").await.json(201);
    send(&app, &ana, &ben, "Hello", "key").await.problem(409);
    send(&app, &ana, &cleo, "hello", "key").await.problem(409);
    app.sent(&ana, &cleo, "a conversation").await;
    send(&app, &ana, &cleo, "hello", "key").await.problem(409);
    assert_eq!(app.seqs(&ana, &ben, "").await, [1]);
    assert_eq!(app.seqs(&ana, &cleo, "").await, [1]);
    // Keys are case-sensitive.
    let other = send(&app, &ana, &ben, "Hello", "KEY").await;
    assert_eq!((replayed(&other), other.json(201)["seq"].as_i64()), (None, Some(2)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_belongs_to_its_sender_only() {
    let app = TestApp::start().await;
    let (ana, ben) = app.pair().await;
    let cleo = app.user("cleo").await;
    let first = send(&app, &ana, &ben, "hello", "key").await.json(201);
    for (number, (from, to)) in [(&ben, &ana), (&cleo, &ben)].into_iter().enumerate() {
        let answer = send(&app, from, to, "hello", "key").await;
        assert_eq!(replayed(&answer), None);
        let message = answer.json(201);
        assert_ne!(message["id"], first["id"]);
        assert_eq!(message["seq"], 2 - number as i64);
        assert_eq!(message["sender_id"], from.id);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn identical_concurrent_requests_on_two_replicas_make_one_message() {
    let one = TestApp::start().await;
    let other = one.replica(&[]).await;
    let (ana, ben) = one.pair().await;
    for round in 0..5 {
        let key = format!("round-{round}");
        let requests = (0..20).map(|number| send([&one, &other][number % 2], &ana, &ben, "hello", &key));
        let answers = together(requests).await;
        let mut ids: Vec<String> = answers.iter().map(|answer| text(&answer.json(201), "id")).collect();
        ids.dedup();
        assert_eq!(ids.len(), 1, "{answers:#?}");
        assert_eq!(answers.iter().filter(|answer| replayed(answer).is_none()).count(), 1);
        assert_eq!(one.seqs(&ana, &ben, "limit=1").await, [round + 1]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn different_concurrent_requests_with_one_key_make_one_message() {
    let one = TestApp::start().await;
    let other = one.replica(&[]).await;
    let (ana, ben) = one.pair().await;
    let contents: Vec<String> = (0..12).map(|number| number.to_string()).collect();
    let requests = contents
        .iter()
        .enumerate()
        .map(|(number, content)| send([&one, &other][number % 2], &ana, &ben, content, "key"));
    let answers = together(requests).await;
    let (stored, refused): (Vec<&Response>, Vec<&Response>) =
        answers.iter().partition(|answer| answer.status == 201);
    assert_eq!(stored.len(), 1, "{answers:#?}");
    refused.iter().for_each(|answer| drop(answer.problem(409)));
    let page: Value = one.messages(&ana, &ben, "").await.json(200);
    assert_eq!(page[0], stored[0].json(201));
    assert_eq!(page.as_array().map(Vec::len), Some(1));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_is_1_to_255_visible_ascii_characters() {
    let app = TestApp::start().await;
    let (ana, ben) = app.pair().await;
    for (number, good) in ["a", "~!", "\"{}\\,;", &"x".repeat(255)].into_iter().enumerate() {
        assert_eq!(send(&app, &ana, &ben, "hello", good).await.json(201)["seq"], number as i64 + 1);
        assert_eq!(replayed(&send(&app, &ana, &ben, "hello", good).await), Some("true"), "{good}");
    }
    let body = format!("{{\"recipient_id\":\"{}\",\"content\":\"hello\"}}", ben.id);
    let bads = [&b""[..], b"a b", b"a\tb", b"\xc3\xa4", b"a\xff", &[b'x'; 256]];
    for bad in bads {
        let mut request = format!(
            "POST /send HTTP/1.1\r\nhost: test\r\nconnection: close\r\nauthorization: Bearer {}\r\n\
             content-type: application/json\r\ncontent-length: {}\r\nidempotency-key: ",
            ana.token,
            body.len()
        )
        .into_bytes();
        request.extend_from_slice(bad);
        request.extend_from_slice(format!("\r\n\r\n{body}").as_bytes());
        let answer = app.raw(&request).await;
        assert_eq!(answer.invalid_fields(), ["Idempotency-Key"], "{bad:?}");
    }
    assert_eq!(app.seqs(&ana, &ben, "limit=1").await, [4]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_is_kept_for_24_hours_and_then_removed() {
    let app = TestApp::start().await;
    let (ana, ben) = app.pair().await;
    let first = send(&app, &ana, &ben, "hello", "young").await.json(201);
    send(&app, &ana, &ben, "hello", "old").await.json(201);
    app.database
        .execute(
            "UPDATE idempotency_keys SET created_at = created_at - interval '23 hours 59 minutes';
             UPDATE idempotency_keys SET created_at = created_at - interval '2 minutes' WHERE key = 'old'",
        )
        .await;
    // A replica sweeps when it starts.
    let _replica = app.replica(&[]).await;
    let started = Instant::now();
    loop {
        let again = send(&app, &ana, &ben, "hello", "old").await;
        if replayed(&again).is_none() {
            assert_eq!(again.json(201)["seq"], 3);
            break;
        }
        assert!(started.elapsed() < Duration::from_secs(10), "the old key is still there");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let again = send(&app, &ana, &ben, "hello", "young").await;
    assert_eq!((replayed(&again), again.json(201)), (Some("true"), first));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_request_does_not_use_its_key() {
    let app = TestApp::start().await;
    let (ana, ben) = app.pair().await;
    assert_eq!(send(&app, &ana, &ben, " ", "key").await.invalid_fields(), ["content"]);
    let nobody = User { id: uuid::Uuid::now_v7().to_string(), ..ben.clone() };
    send(&app, &ana, &nobody, "hello", "key").await.problem(404);
    let answer = send(&app, &ana, &ben, "hello", "key").await;
    assert_eq!((replayed(&answer), answer.json(201)["seq"].as_i64()), (None, Some(1)));
}
