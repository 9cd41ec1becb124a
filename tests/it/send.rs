//! `POST /send`: which messages are accepted, how they are numbered, and that they are stored exactly.

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use uuid::Uuid;

use crate::support::{Response, TestApp, User, members, text, together};

async fn send_json(app: &TestApp, sender: &User, body: &Value) -> Response {
    app.post("/send").by(sender).json(body).response().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_is_answered_with_201_and_all_its_fields() {
    let app = TestApp::start().await;
    let (ana, ben) = app.pair().await;
    let message = app.sent(&ana, &ben, "Hello, Ben!").await;
    assert_eq!(members(&message), ["content", "created_at", "id", "recipient_id", "sender_id", "seq"]);
    assert_eq!(message["seq"], 1);
    assert_eq!(message["sender_id"], ana.id);
    assert_eq!(message["recipient_id"], ben.id);
    assert_eq!(message["content"], "Hello, Ben!");
    assert_ne!(message["id"], message["sender_id"]);
    let created_at = text(&message, "created_at");
    assert!(created_at.ends_with('Z'), "{created_at}");
    let created_at = OffsetDateTime::parse(&created_at, &Rfc3339).expect("RFC 3339");
    assert!((OffsetDateTime::now_utc() - created_at).abs() < time::Duration::minutes(1), "{created_at}");
    for reader in [(&ana, &ben), (&ben, &ana)] {
        let page = app.messages(reader.0, reader.1, "").await.json(200);
        assert_eq!(page, json!([message]), "both read the same message");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_sender_is_the_tokens_subject_whatever_the_body_says() {
    let app = TestApp::start().await;
    let (ana, ben) = app.pair().await;
    let body =
        json!({"recipient_id": ben.id, "content": "hello", "sender_id": ben.id, "seq": 7, "id": ben.id});
    let message = send_json(&app, &ana, &body).await.json(201);
    assert_eq!((&message["sender_id"], &message["seq"]), (&json!(ana.id), &json!(1)));
    assert_ne!(message["id"], ben.id);
}

#[tokio::test(flavor = "multi_thread")]
async fn content_loses_the_white_space_at_its_edges_and_nothing_else() {
    let app = TestApp::start().await;
    let (ana, ben) = app.pair().await;
    for (sent, kept) in [
        (" \t\r\n a  b\t\nc \u{a0}\u{2003}\u{3000}", "a  b\t\nc"),
        ("\u{85}\u{2028}x\u{2029}\u{1680}", "x"),
        // To Unicode these are not white space; beside something visible they are kept.
        ("\u{200b}\u{feff}.\u{180e}\u{2800}", "\u{200b}\u{feff}.\u{180e}\u{2800}"),
        // VT and FF are white space.
        ("\u{b}\u{c}x\u{c}", "x"),
        ("<script>alert('&amp;\"')</script>", "<script>alert('&amp;\"')</script>"),
        ("👩‍👩‍👧‍👦 🏳️‍🌈 \u{1f468}\u{1f3ff}", "👩‍👩‍👧‍👦 🏳️‍🌈 \u{1f468}\u{1f3ff}"),
        ("\u{202e}שלום עולם\u{202c} مرحبا", "\u{202e}שלום עולם\u{202c} مرحبا"),
        // Composed and decomposed characters are not changed.
        ("é e\u{301} ﬁ Ω Ω", "é e\u{301} ﬁ Ω Ω"),
        ("\u{7f}\u{9f}\u{fffd}\u{ffff}\u{10ffff}", "\u{7f}\u{9f}\u{fffd}\u{ffff}\u{10ffff}"),
        ("\\u0041 \\ / ' \" ; -- $1 %s", "\\u0041 \\ / ' \" ; -- $1 %s"),
        ("{\"content\": null}", "{\"content\": null}"),
    ] {
        let message = app.sent(&ana, &ben, sent).await;
        assert_eq!(message["content"], kept, "{sent:?}");
        let page = app.messages(&ben, &ana, "limit=1").await.json(200);
        assert_eq!(page, json!([message]), "{sent:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn content_has_1_to_4000_characters_however_many_bytes_they_take() {
    let app = TestApp::start().await;
    let (ana, ben) = app.pair().await;
    for good in ["x".to_owned(), "x".repeat(4000), "🦀".repeat(4000), format!("  {}\n", "é".repeat(4000))]
    {
        let message = app.sent(&ana, &ben, &good).await;
        assert_eq!(message["content"], good.trim());
    }
    for bad in ["", " ", " \u{2003}\n", &"x".repeat(4001), &"🦀".repeat(4001), "a\0b", "\0"] {
        let answer = app.send(&ana, &ben, bad).response().await;
        assert_eq!(answer.invalid_fields(), ["content"], "{:?}", &bad[..bad.len().min(12)]);
    }
    assert_eq!(app.seqs(&ana, &ben, "").await, [4, 3, 2, 1], "refused messages took no seq");
}

#[tokio::test(flavor = "multi_thread")]
async fn content_that_shows_nothing_is_empty() {
    let app = TestApp::start().await;
    let (ana, ben) = app.pair().await;
    for nothing in [
        "\u{2800}",
        "\u{3164}",
        " \u{2800}\n\u{3164} ",
        "\u{200b}\u{feff}\u{180e}",
        "\u{ad}\u{34f}\u{61c}\u{115f}\u{1160}\u{17b4}\u{ffa0}",
        "\u{200d}\u{fe0f}",
        "\u{202e}\u{2066}\u{2069}",
        "\u{e0041}\u{e01ef}\u{1d173}\u{fff0}",
        &"\u{2060}".repeat(4000),
    ] {
        let answer = app.send(&ana, &ben, nothing).response().await;
        assert_eq!(answer.status, 422, "{:?}", nothing.chars().take(8).collect::<String>());
        assert_eq!(answer.invalid_fields(), ["content"]);
        // One visible character is enough, wherever it is.
        let content = format!("{nothing}.");
        if content.chars().count() <= 4000 {
            assert_eq!(app.sent(&ana, &ben, &content).await["content"], content.trim());
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn control_characters_are_refused_but_tab_and_line_ends() {
    let app = TestApp::start().await;
    let (ana, ben) = app.pair().await;
    for control in ('\0'..' ').rev().filter(|control| !"\t\r\n".contains(*control)) {
        let answer = app.send(&ana, &ben, &format!("a{control}b")).response().await;
        assert_eq!(answer.status, 422, "{control:?}");
        let problem = answer.problem(422);
        assert_eq!(problem["errors"][0]["field"], "content");
        assert!(text(&problem, "detail").contains(&format!("U+{:04X}", u32::from(control))), "{problem}");
    }
    // DEL and C1 are not among them.
    let kept = "a\tb\r\nc\u{7f}\u{80}\u{85}\u{9b}d";
    assert_eq!(app.sent(&ana, &ben, kept).await["content"], kept);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_lists_all_its_errors_at_once() {
    let app = TestApp::start().await;
    let (ana, ben) = app.pair().await;
    for body in [
        json!({}),
        json!({"recipient_id": 7, "content": {"text": "hello"}}),
        json!({"recipient_id": null, "content": "  "}),
        json!({"recipientId": ben.id, "Content": "hello"}),
        json!({"recipient_id": ana.id, "content": "x".repeat(4001)}),
    ] {
        let mut fields = send_json(&app, &ana, &body).await.invalid_fields();
        fields.sort();
        assert_eq!(fields, ["content", "recipient_id"], "{body}");
    }
    let request = app.post("/send").by(&ana).json(&json!({})).header("idempotency-key", "a b");
    let mut fields = request.response().await.invalid_fields();
    fields.sort();
    assert_eq!(fields, ["Idempotency-Key", "content", "recipient_id"]);
    let problem = send_json(&app, &ana, &json!({"recipient_id": [], "content": "x"})).await.problem(422);
    assert_eq!(problem["errors"][0]["field"], "recipient_id");
}

#[tokio::test(flavor = "multi_thread")]
async fn json_of_another_shape_is_422_and_what_is_not_json_is_400() {
    let app = TestApp::start().await;
    let ana = app.user("ana").await;
    let send = |body: &'static [u8]| {
        app.post("/send").by(&ana).header("content-type", "application/json").body(body).response()
    };
    for body in [&b"[]"[..], b"7", b"\"text\"", b"null", b"true", b"[\"a\", \"b\"]"] {
        assert_eq!(send(body).await.invalid_fields(), ["body"], "{body:?}");
    }
    send(b"{\"content\": \"a\", \"content\": \"b\"}").await.problem(422);
    for body in [
        &b""[..],
        b"{",
        b"nonsense",
        b"{} {}",
        b"{'content': 'a'}",
        b"recipient_id=a&content=b",
        b"{\"content\": \"\\ud800\"}",
        b"{\"content\": \"\xff\"}",
        b"{\"content\": \"a\nb\"}",
    ] {
        send(body).await.problem(400);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unknown_or_malformed_recipient_is_404() {
    let app = TestApp::start().await;
    let (ana, ben) = app.pair().await;
    for recipient in
        [Uuid::now_v7().to_string(), "".to_owned(), "nobody".to_owned(), ben.name.clone(), "\0".to_owned()]
    {
        let body = json!({"recipient_id": recipient, "content": "hello"});
        let problem = send_json(&app, &ana, &body).await.problem(404);
        assert!(text(&problem, "detail").contains("recipient_id"), "{problem}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_to_oneself_is_422() {
    let app = TestApp::start().await;
    let ana = app.user("ana").await;
    for id in [ana.id.clone(), ana.id.to_uppercase()] {
        let answer = send_json(&app, &ana, &json!({"recipient_id": id, "content": "hello"})).await;
        assert_eq!(answer.invalid_fields(), ["recipient_id"]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn each_conversation_counts_from_1_in_both_directions() {
    let app = TestApp::start().await;
    let (ana, ben, cleo) = (app.user("ana").await, app.user("ben").await, app.user("cleo").await);
    let mut last = String::new();
    for (number, (from, to)) in
        [(&ana, &ben), (&ben, &ana), (&ben, &ana), (&ana, &ben)].into_iter().enumerate()
    {
        let message = app.sent(from, to, "hello").await;
        assert_eq!(message["seq"], number as i64 + 1);
        let created_at = text(&message, "created_at");
        assert!(parse(&created_at) >= parse(&last), "{created_at} after {last}");
        last = created_at;
    }
    assert_eq!(app.sent(&cleo, &ana, "hello").await["seq"], 1);
    assert_eq!(app.sent(&ana, &cleo, "hello").await["seq"], 2);
    assert_eq!(app.sent(&ben, &cleo, "hello").await["seq"], 1);
    assert_eq!(app.seqs(&ben, &ana, "").await, [4, 3, 2, 1]);
    assert_eq!(app.seqs(&cleo, &ana, "").await, [2, 1]);
}

fn parse(time: &str) -> OffsetDateTime {
    OffsetDateTime::parse(time, &Rfc3339).unwrap_or(OffsetDateTime::UNIX_EPOCH)
}

#[tokio::test(flavor = "multi_thread")]
async fn fifty_concurrent_senders_in_both_directions_on_two_replicas_leave_no_gap() {
    const EACH: usize = 4;
    let one = TestApp::start().await;
    let other = one.replica(&[]).await;
    let (ana, ben) = one.pair().await;
    let senders = (0..50).map(|sender| {
        let app = if sender % 4 < 2 { &one } else { &other };
        let (from, to) = if sender % 2 == 0 { (&ana, &ben) } else { (&ben, &ana) };
        async move {
            let mut sent = Vec::new();
            for number in 0..EACH {
                let message = app.sent(from, to, &format!("{sender}.{number}")).await;
                assert_eq!(message["sender_id"], from.id);
                sent.push((message["seq"].as_i64().expect("a seq"), message));
            }
            // One sender's messages are numbered in the order that they were sent in.
            assert!(sent.is_sorted_by_key(|(seq, _)| *seq), "{sent:?}");
            sent
        }
    });
    let mut acknowledged: Vec<_> = together(senders).await.into_iter().flatten().collect();
    acknowledged.sort_by_key(|(seq, _)| std::cmp::Reverse(*seq));
    let total = 50 * EACH as i64;
    let seqs: Vec<i64> = acknowledged.iter().map(|(seq, _)| *seq).collect();
    assert_eq!(seqs, (1..=total).rev().collect::<Vec<_>>());
    // The stored messages are those that were acknowledged, and their times are in the order of seq.
    let mut stored = Vec::new();
    for offset in [0, 100] {
        let page = other.messages(&ben, &ana, &format!("limit=100&offset={offset}")).await.json(200);
        stored.extend(page.as_array().expect("a page").clone());
    }
    let acknowledged: Vec<Value> = acknowledged.into_iter().map(|(_, message)| message).collect();
    assert_eq!(stored, acknowledged);
    assert!(stored.is_sorted_by_key(|message| std::cmp::Reverse(parse(&text(message, "created_at")))));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_that_cannot_be_stored_does_not_fail_its_batch() {
    // With two connections there is one writer, for which all of them wait.
    let app = TestApp::with(&[("DB_POOL_MAX", "2")]).await;
    let (ana, ben) = app.pair().await;
    app.database
        .execute(
            "CREATE FUNCTION refuse_poison() RETURNS trigger LANGUAGE plpgsql AS $$
             BEGIN
                 IF NEW.content = 'poison' THEN RAISE EXCEPTION 'poison'; END IF;
                 RETURN NEW;
             END $$;
             CREATE TRIGGER refuse_poison BEFORE INSERT ON messages
             FOR EACH ROW EXECUTE FUNCTION refuse_poison()",
        )
        .await;
    // The first one blocks the writer until the others are queued.
    let lock = app.database.lock("conversations IN EXCLUSIVE MODE").await;
    let contents = ["first", "a", "b", "poison", "c", "d"];
    let statements_before = app.metric("chat_outbox_batch_rows_count").await;
    let answers = together(contents.iter().enumerate().map(|(number, content)| {
        let (app, ana, ben) = (&app, &ana, &ben);
        async move {
            while number > 0 && app.metric("chat_outbox_batch_rows_count").await == statements_before {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            app.send(ana, ben, content).response().await
        }
    }));
    let release = async {
        let started = Instant::now();
        while app.metric("chat_outbox_queue_depth").await < 5.0 {
            assert!(started.elapsed() < Duration::from_secs(4), "the messages are not queued");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        lock.release().await;
    };
    let (answers, ()) = tokio::join!(answers, release);
    assert_eq!(app.metric("chat_outbox_batch_rows_count").await, statements_before + 2.0, "two batches");
    for (content, answer) in contents.iter().zip(answers) {
        match *content {
            "poison" => drop(answer.problem(500)),
            _ => assert_eq!(answer.json(201)["content"], *content),
        }
    }
    assert_eq!(app.seqs(&ana, &ben, "limit=10").await, [5, 4, 3, 2, 1], "no seq is missing");
    app.send(&ana, &ben, "poison").response().await.problem(500);
    assert_eq!(app.sent(&ana, &ben, "the writer still works").await["seq"], 6);
}

#[tokio::test(flavor = "multi_thread")]
async fn while_the_queue_is_full_a_send_is_503_at_once_and_accepted_messages_are_stored() {
    // One writer: it writes a batch of 256, and 1024 messages wait.
    const ACCEPTED_MAX: usize = 256 + 1024;
    let app = TestApp::with(&[("DB_POOL_MAX", "2"), ("REQUEST_TIMEOUT_MS", "60000")]).await;
    let (ana, ben) = app.pair().await;
    app.sent(&ana, &ben, "first").await;
    let lock = app.database.lock("conversations IN EXCLUSIVE MODE").await;
    let answers = together((0..ACCEPTED_MAX + 200).map(|number| {
        let (app, ana, ben) = (&app, &ana, &ben);
        async move { app.send(ana, ben, &number.to_string()).response().await }
    }));
    let release = async {
        let started = Instant::now();
        while app.metric(r#"chat_messages_sent_total{outcome="refused"}"#).await < 1.0 {
            assert!(started.elapsed() < Duration::from_secs(4), "nothing is refused");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        lock.release().await;
    };
    let (answers, ()) = tokio::join!(answers, release);
    let mut stored = 0;
    for answer in answers {
        match answer.status {
            201 => stored += 1,
            _ => drop(answer.problem(503)),
        }
    }
    assert!((1024..ACCEPTED_MAX + 200).contains(&stored), "{stored} were stored");
    let newest = app.sent(&ana, &ben, "last").await;
    assert_eq!(newest["seq"], 1 + stored + 1, "refused messages left no gap, and nothing else is stored");
}
