//! `GET /stream`: every message once and in order, from any position, on any replica.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use sqlx::Connection as _;
use tests::proxy::{Link, Proxy};
use uuid::Uuid;

use crate::support::{Database, SECRET_KEY, TestApp, User, together};

fn numbers(range: impl Iterator<Item = usize>) -> Vec<String> {
    range.map(|number| number.to_string()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn both_users_get_each_message_once_and_in_order_on_every_replica() {
    let app = TestApp::start().await;
    let other = app.replica(&[]).await;
    let (ana, ben) = app.pair().await;
    let cleo = app.user(&format!("cleo.{}", &ana.name[4..])).await;
    app.sent(&ana, &ben, "before").await;
    let mut followers = Vec::new();
    for (replica, user) in [(&app, &ana), (&app, &ben), (&other, &ana), (&other, &ben)] {
        let mut follower = replica.follow(user, None).await;
        assert!(!follower.ready().await, "resumed without a position");
        followers.push(follower);
    }
    let mut stranger = app.follow(&cleo, None).await;
    stranger.ready().await;
    let sent = app.sent(&ana, &ben, "0").await;
    for number in 1..10 {
        let (from, to) = if number % 2 == 0 { (&ana, &ben) } else { (&ben, &ana) };
        let replica = if number % 3 == 0 { &app } else { &other };
        replica.sent(from, to, &number.to_string()).await;
    }
    for follower in &mut followers {
        assert_eq!(follower.message().await, sent);
        assert_eq!(follower.contents(9).await, numbers(1..10));
        follower.nothing_more().await;
    }
    stranger.nothing_more().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_response_is_an_event_stream_that_nothing_in_between_may_hold_back() {
    let app = TestApp::start().await;
    let ana = app.user("ana").await;
    let follower = app.follow(&ana, None).await;
    let header = |name: &str| follower.response.headers()[name].to_str().expect("text").to_owned();
    assert_eq!(header("content-type"), "text/event-stream");
    assert_eq!(header("cache-control"), "no-store, no-transform");
    assert_eq!(header("x-accel-buffering"), "no");
    assert!(!follower.response.headers().contains_key("content-encoding"));
    let head = app.request(reqwest::Method::HEAD, "/stream").by(&ana).response().await;
    assert_eq!((head.status, head.header("content-type")), (200, Some("text/event-stream")));
    assert_eq!(app.metric("chat_stream_clients").await, 1.0);
}

/// Breaks off at every place: also within what one statement has stored, and within what one answer of Postgres had.
#[tokio::test(flavor = "multi_thread")]
async fn a_stream_resumes_behind_the_last_message_on_any_replica() {
    let app = TestApp::start().await;
    let other = app.replica(&[]).await;
    let (ana, ben) = app.pair().await;
    let cleo = app.user(&format!("cleo.{}", &ana.name[4..])).await;
    let mut first = app.follow(&ana, None).await;
    first.ready().await;
    let mut position = first.last_id.clone();
    drop(first);
    let senders = [&ben, &cleo];
    let mut shown: BTreeMap<String, Vec<i64>> = BTreeMap::new();
    let mut count = 0;
    for round in 0..12 {
        // Together, so that several are in one batch.
        let sends = (0..10).map(|number| {
            let (replica, ana) = (if number % 2 == 0 { &app } else { &other }, &ana);
            async move { replica.sent(senders[number % 2], ana, &format!("{round}.{number}")).await }
        });
        together(sends).await;
        let replica = if round % 2 == 0 { &app } else { &other };
        let mut follower = replica.follow(&ana, Some(&position)).await;
        assert!(follower.ready().await, "not resumed");
        // The last round reads what is left.
        let wanted = if round < 11 { round } else { 120 - count };
        for _ in 0..wanted {
            let message = follower.message().await;
            let sender = message["sender_id"].as_str().expect("a sender").to_owned();
            shown.entry(sender).or_default().push(message["seq"].as_i64().expect("a seq"));
            count += 1;
        }
        position.clone_from(&follower.last_id);
        if round == 11 {
            follower.nothing_more().await;
        }
    }
    let expected: Vec<i64> = (1..=60).collect();
    for sender in senders {
        assert_eq!(shown[&sender.id], expected);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn more_than_a_page_of_missed_messages_is_replayed() {
    let app = TestApp::start().await;
    let (ana, ben) = app.pair().await;
    let mut follower = app.follow(&ben, None).await;
    follower.ready().await;
    let position = follower.last_id.clone();
    drop(follower);
    for hundred in 0..4 {
        let sends = (0..100).map(|number| {
            let content = (hundred * 100 + number).to_string();
            let (app, ana, ben) = (&app, &ana, &ben);
            async move { app.sent(ana, ben, &content).await }
        });
        together(sends).await;
    }
    let mut follower = app.follow(&ben, Some(&position)).await;
    assert!(follower.ready().await);
    for seq in 1..=400 {
        assert_eq!(follower.message().await["seq"], seq);
    }
    follower.nothing_more().await;
    app.sent(&ana, &ben, "live").await;
    assert_eq!(follower.contents(1).await, ["live"]);
}

/// Stores a message as the writer does, in a transaction that another one overtakes.
#[tokio::test(flavor = "multi_thread")]
async fn a_message_that_commits_after_later_ones_is_missed_by_no_position() {
    let app = TestApp::start().await;
    let (ana, ben) = app.pair().await;
    let cleo = app.user(&format!("cleo.{}", &ana.name[4..])).await;
    app.sent(&ana, &ben, "old").await;
    let mut live = app.follow(&ben, None).await;
    live.ready().await;
    let mut connection = app.database.connect().await;
    let mut slow = connection.begin().await.expect("a transaction");
    let [low, high] = {
        let mut ids = [&ana.id, &ben.id].map(|id| Uuid::parse_str(id).expect("an id"));
        ids.sort();
        ids
    };
    let conversation: Uuid = sqlx::query_scalar(
        "UPDATE conversations SET last_seq = 2, last_at = now(), last_xact = pg_current_xact_id()
         WHERE low_user = $1 AND high_user = $2 RETURNING id",
    )
    .bind(low)
    .bind(high)
    .fetch_one(&mut *slow)
    .await
    .expect("updated");
    sqlx::query(
        "INSERT INTO messages (conversation_id, seq, id, sender_id, content, created_at)
         VALUES ($1, 2, $2, $3, 'slow', now())",
    )
    .bind(conversation)
    .bind(Uuid::now_v7())
    .bind(Uuid::parse_str(&ana.id).expect("an id"))
    .execute(&mut *slow)
    .await
    .expect("inserted");
    app.sent(&cleo, &ben, "quick").await;
    assert_eq!(live.contents(1).await, ["quick"]);
    let position = live.last_id.clone();
    slow.commit().await.expect("committed");
    // Nobody has announced it: the comparison finds it.
    assert_eq!(live.contents(1).await, ["slow"]);
    live.nothing_more().await;
    let mut resumed = app.follow(&ben, Some(&position)).await;
    assert!(resumed.ready().await);
    assert_eq!(resumed.contents(1).await, ["slow"]);
    resumed.nothing_more().await;
    assert!(app.metric("chat_stream_gaps_total").await >= 1.0);
}

/// What was announced is no gap, however late Postgres shows it.
#[tokio::test(flavor = "multi_thread")]
async fn a_slow_postgres_is_no_gap() {
    let app = TestApp::start().await;
    let (ana, ben) = app.pair().await;
    let mut through: reqwest::Url = app.database.url().parse().expect("a URL");
    let server = through.port().unwrap_or(5432);
    let handle = tokio::runtime::Handle::current();
    let proxy = tokio::task::spawn_blocking(move || Proxy::start(&handle, server)).await;
    let proxy = proxy.expect("not stopped").expect("a proxy");
    through.set_port(Some(proxy.port())).expect("a port");
    let other = app.replica(&[("DATABASE_URL", through.as_str())]).await;
    let mut live = other.follow(&ben, None).await;
    live.ready().await;
    proxy.set(Link::Slow(Duration::from_millis(150)));
    // Longer than between two comparisons.
    let begin = Instant::now();
    let mut sent = 0;
    while begin.elapsed() < Duration::from_secs(8) {
        app.sent(&ana, &ben, &sent.to_string()).await;
        sent += 1;
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(live.contents(sent).await, numbers(0..sent));
    assert_eq!(other.metric("chat_stream_gaps_total").await, 0.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_position_that_cannot_be_taken_up_resets_the_stream() {
    let app = TestApp::start().await;
    let (ana, ben) = app.pair().await;
    let mut follower = app.follow(&ana, None).await;
    follower.ready().await;
    let anas = follower.last_id.clone();
    let (head, tail) = anas.split_at(10);
    // The server's identifier is in the bytes from the fifth on.
    let other_epoch = format!("{}{}{}", &head[..8], if &head[8..] == "AA" { "BB" } else { "AA" }, tail);
    for (user, position, reason) in [
        (&ana, "nonsense", "malformed"),
        (&ana, "%F0%9F", "malformed"),
        (&ben, &*anas, "foreign"),
        (&ana, &*other_epoch, "epoch"),
    ] {
        let mut follower = app.follow(user, Some(position)).await;
        let event = follower.next().await.expect("an event");
        assert_eq!((&*event.name, event.data["reason"].as_str()), ("reset", Some(reason)), "{position}");
        assert_eq!(event.id.as_deref(), event.data["position"].as_str());
        // It begins now.
        let content = Uuid::new_v4().to_string();
        app.sent(&ana, &ben, &content).await;
        assert_eq!(follower.contents(1).await, [content]);
    }
    // The header wins over the query.
    let url = format!("http://{}/stream?after=nonsense", app.running.public);
    let response = reqwest::Client::builder().no_proxy().build().expect("a client").get(url);
    let response = response.bearer_auth(&ana.token).header("last-event-id", &anas);
    let mut response = response.send().await.expect("an answer");
    let first = response.chunk().await.expect("bytes").expect("bytes");
    assert!(String::from_utf8_lossy(&first).contains("\"resumed\":true"), "{first:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_from_the_position_of_the_list_has_what_the_list_lacks() {
    let app = TestApp::start().await;
    let (ana, ben) = app.pair().await;
    app.sent(&ana, &ben, "listed").await;
    let list = app.get("/conversations").by(&ben).response().await;
    let position = list.header("stream-position").expect("a position").to_owned();
    assert_eq!(list.json(200)[0]["last_message"]["content"], "listed");
    app.sent(&ana, &ben, "after the list").await;
    let mut follower = app.follow(&ben, Some(&position)).await;
    assert!(follower.ready().await);
    assert_eq!(follower.contents(1).await, ["after the list"]);
    follower.nothing_more().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn too_many_streams_are_told_to_come_back() {
    let app = TestApp::with(&[("STREAMS_PER_USER_MAX", "2"), ("STREAMS_MAX", "3")]).await;
    let (ana, ben) = app.pair().await;
    let mut open = Vec::new();
    for user in [&ana, &ana, &ben] {
        let mut follower = app.follow(user, None).await;
        follower.ready().await;
        open.push(follower);
    }
    // One too many of the user, and of the process.
    for user in [&ana, &ben] {
        assert_eq!(app.follow(user, None).await.end().await, "too_many");
    }
    open.pop();
    let deadline = Instant::now() + Duration::from_secs(10);
    while app.metric("chat_stream_clients").await > 2.0 {
        assert!(Instant::now() < deadline, "a closed stream still counts");
    }
    app.follow(&ben, None).await.ready().await;
}

fn expiring_token(user: &User, seconds: u64) -> String {
    let exp = crate::support::now_seconds() + seconds;
    let claims = json!({"sub": user.id, "iat": exp - 60, "exp": exp});
    let key = jsonwebtoken::EncodingKey::from_secret(SECRET_KEY.as_bytes());
    jsonwebtoken::encode(&jsonwebtoken::Header::default(), &claims, &key).expect("a token")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_ends_with_its_token_its_life_and_its_user() {
    let app = TestApp::with(&[("STREAM_MAX_SECONDS", "10")]).await;
    let (ana, ben) = app.pair().await;
    let expiring = User { token: expiring_token(&ana, 2), ..ana.clone() };
    let mut expires = app.follow(&expiring, None).await;
    expires.ready().await;
    assert_eq!(expires.end().await, "expired");
    let mut lives = app.follow(&ana, None).await;
    lives.ready().await;
    assert_eq!(lives.end().await, "lifetime");
    let lasting = app.replica(&[("STREAM_MAX_SECONDS", "600")]).await;
    let mut deleted = lasting.follow(&ben, None).await;
    deleted.ready().await;
    app.database.execute(&format!("DELETE FROM users WHERE id = '{}'", ben.id)).await;
    assert_eq!(deleted.end().await, "deleted");
    let refused = lasting.follow_request(&ben.token, None).send().await.expect("an answer");
    assert_eq!(refused.status(), 401);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stopping_process_ends_its_streams_over_a_while_and_answers_requests_meanwhile() {
    let app = TestApp::with(&[("STREAM_DRAIN_SECONDS", "4"), ("SHUTDOWN_GRACE_SECONDS", "1")]).await;
    let other = app.replica(&[]).await;
    let (ana, ben) = app.pair().await;
    let mut followers = Vec::new();
    for _ in 0..10 {
        let mut follower = app.follow(&ana, None).await;
        follower.ready().await;
        followers.push(follower);
    }
    let TestApp { running, .. } = app;
    let began = Instant::now();
    let stopping = tokio::spawn(running.stop(true));
    other.sent(&ben, &ana, "meanwhile").await;
    let ends = followers.into_iter().map(|mut follower| async move {
        let mut contents = Vec::new();
        loop {
            let event = follower.next().await.expect("the stream says that it ends");
            if event.name == "end" {
                assert_eq!(event.data["reason"], "draining");
                return (began.elapsed(), contents, follower.retry.expect("a delay"));
            }
            contents.push(event.data["content"].clone());
        }
    });
    let ends = together(ends).await;
    stopping.await.expect("stopped");
    assert!(began.elapsed() < Duration::from_secs(8), "{:?}", began.elapsed());
    let mut times: Vec<Duration> = ends.iter().map(|(time, ..)| *time).collect();
    times.sort();
    assert!(times[9] - times[0] > Duration::from_millis(500), "all at once: {times:?}");
    // Those that were still open got the message.
    assert!(ends.iter().any(|(_, contents, _)| contents == &[Value::from("meanwhile")]), "{ends:?}");
    let retries: Vec<u64> = ends.iter().map(|(.., retry)| *retry).collect();
    assert!(retries.iter().any(|retry| *retry != retries[0]), "all come back at once: {retries:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn without_redis_a_stream_has_other_replicas_messages_within_two_seconds() {
    let app = TestApp::start().await;
    let nowhere = "redis://127.0.0.1:1/0";
    let alone = app.replica(&[("REDIS_URL", nowhere)]).await;
    let (ana, ben) = app.pair().await;
    let mut follower = alone.follow(&ben, None).await;
    follower.ready().await;
    for _ in 0..3 {
        let content = Uuid::new_v4().to_string();
        app.sent(&ana, &ben, &content).await;
        let acknowledged = Instant::now();
        assert_eq!(follower.contents(1).await, [content]);
        assert!(acknowledged.elapsed() < Duration::from_secs(2), "{:?}", acknowledged.elapsed());
    }
}

/// What the client does not read is not kept: it is dropped, and resumes.
#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_does_not_read_is_dropped_and_misses_nothing() {
    const COUNT: usize = 1200;
    let app = TestApp::start().await;
    let (ana, ben) = app.pair().await;
    let mut slow = app.follow(&ben, None).await;
    slow.ready().await;
    let padding = "x".repeat(3900);
    for hundred in 0..COUNT / 100 {
        let sends = (0..100).map(|number| {
            let content = format!("{} {padding}", hundred * 100 + number);
            let (app, ana, ben) = (&app, &ana, &ben);
            async move { app.sent(ana, ben, &content).await }
        });
        together(sends).await;
    }
    let deadline = Instant::now() + Duration::from_secs(30);
    while app.metric("chat_stream_ended_total{reason=\"slow\"}").await < 1.0 {
        assert!(Instant::now() < deadline, "the stream is still open");
        tokio::time::sleep(Duration::from_millis(200)).await;
        app.sent(&ana, &ben, "more").await;
    }
    let mut seqs = Vec::new();
    while let Some(event) = slow.next().await {
        seqs.push(event.data["seq"].as_i64().expect("a message"));
    }
    let mut resumed = app.follow(&ben, Some(&slow.last_id)).await;
    assert!(resumed.ready().await);
    let last = app.sent(&ana, &ben, "last").await["seq"].as_i64().expect("a seq");
    while seqs.last() != Some(&last) {
        seqs.push(resumed.message().await["seq"].as_i64().expect("a seq"));
    }
    assert_eq!(seqs, (1..=last).collect::<Vec<_>>());
}

#[tokio::test(flavor = "multi_thread")]
async fn without_postgres_no_stream_begins_and_open_ones_go_on_afterwards() {
    let app = TestApp::with(&[("DATABASE_URL", "postgres://nobody@127.0.0.1:1/none")]).await;
    let id = Uuid::now_v7().to_string();
    let token = app.token(&id);
    let answer = app.follow_request(&token, None).send().await.expect("an answer");
    assert_eq!(answer.status(), 503);
    assert!(answer.headers().contains_key("retry-after"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_of_another_server_gives_its_old_messages_to_nobody() {
    let app = TestApp::on(Database::migrated().await, &[]).await;
    let (ana, ben) = app.pair().await;
    app.sent(&ana, &ben, "old").await;
    // As after a restore: the numbers are of a server that had counted further.
    app.database.execute("UPDATE messages SET xact = (xact::text::bigint + 5)::text::xid8").await;
    app.database
        .execute("UPDATE conversations SET last_xact = (last_xact::text::bigint + 5)::text::xid8")
        .await;
    app.database.execute("UPDATE position_server SET system_identifier = 1").await;
    let restored = app.replica(&[]).await;
    let mut follower = restored.follow(&ben, None).await;
    follower.ready().await;
    for number in 0..10 {
        restored.sent(&ana, &ben, &number.to_string()).await;
    }
    assert_eq!(follower.contents(10).await, numbers(0..10));
    follower.nothing_more().await;
}
