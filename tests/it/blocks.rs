//! Blocks, and the limit of new conversations.

use std::time::Duration;

use reqwest::Method;
use serde_json::{Value, json};
use tokio::time::{Instant, sleep};
use uuid::Uuid;

use crate::support::races::{jam, race, rounds, waits_for_statements_in_flight};
use crate::support::{Response, TestApp, User, now_seconds, text, together, wait_for_an_hour};

async fn change(app: &TestApp, method: Method, by: &User, id: &str) -> Response {
    app.request(method, &format!("/blocks/{id}")).by(by).response().await
}

async fn block(app: &TestApp, by: &User, user: &User) {
    assert_eq!(change(app, Method::PUT, by, &user.id).await.status, 204);
}

async fn unblock(app: &TestApp, by: &User, user: &User) {
    assert_eq!(change(app, Method::DELETE, by, &user.id).await.status, 204);
}

async fn blocked(app: &TestApp, by: &User) -> Value {
    app.get("/blocks").by(by).response().await.json(200)
}

/// Users without a password.
async fn strangers(app: &TestApp, n: i32) -> Vec<User> {
    let users: Vec<(Uuid, String)> = sqlx::query_as(
        "INSERT INTO users (id, username, username_key, email, email_key, password_hash)
         SELECT gen_random_uuid(), name, name, name, name, ''
         FROM (SELECT 'stranger.' || gen_random_uuid() FROM generate_series(1, $1)) AS t (name)
         RETURNING id, username",
    )
    .bind(n)
    .fetch_all(&mut app.database.connect().await)
    .await
    .expect("users");
    let user =
        |(id, name): (Uuid, String)| User { id: id.to_string(), name, token: app.token(&id.to_string()) };
    users.into_iter().map(user).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_blocked_user_cannot_write_to_the_blocker_through_any_replica() {
    let app = TestApp::start().await;
    let other = app.replica(&[]).await;
    let (ana, ben) = app.pair().await;
    app.sent(&ben, &ana, "hello").await;
    for replica in [&app, &other] {
        replica.hit(&ben, &ana, "").await;
    }
    block(&app, &ana, &ben).await;
    for replica in [&app, &other] {
        let refusal = replica.send(&ben, &ana, "late").response().await.problem(403);
        assert_eq!(refusal["detail"], "you cannot write to this user");
    }
    // The blocker may still write, and both read.
    other.sent(&ana, &ben, "please stop").await;
    for replica in [&app, &other] {
        assert_eq!(replica.seqs(&ben, &ana, "").await, [2, 1]);
        assert_eq!(replica.seqs(&ana, &ben, "").await, [2, 1]);
    }
    block(&other, &ben, &ana).await;
    // Once more changes nothing.
    block(&app, &ben, &ana).await;
    for replica in [&app, &other] {
        replica.send(&ana, &ben, "late").response().await.problem(403);
        replica.send(&ben, &ana, "late").response().await.problem(403);
    }
    unblock(&other, &ana, &ben).await;
    unblock(&app, &ana, &ben).await;
    app.sent(&ben, &ana, "sorry").await;
    app.send(&ana, &ben, "late").response().await.problem(403);
    unblock(&app, &ben, &ana).await;
    assert_eq!(other.sent(&ana, &ben, "fine").await["seq"], 4);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replay_from_before_the_block_answers_as_it_did() {
    let app = TestApp::start().await;
    let other = app.replica(&[]).await;
    let (ana, ben) = app.pair().await;
    let send = async |app: &TestApp, content: &str, key: &str| {
        app.send(&ben, &ana, content).header("idempotency-key", key).response().await
    };
    let first = send(&app, "hello", "before").await.json(201);
    block(&app, &ana, &ben).await;
    for replica in [&app, &other] {
        assert_eq!(send(replica, "hello", "before").await.json(201), first);
        send(replica, "hello again", "before").await.problem(409);
        send(replica, "hello", "after").await.problem(403);
    }
    unblock(&app, &ana, &ben).await;
    // What was refused has used no key.
    assert_eq!(send(&app, "hello", "after").await.json(201)["seq"], 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_list_has_whom_the_caller_has_blocked_the_latest_first() {
    let app = TestApp::start().await;
    let (ana, ben) = app.pair().await;
    let cleo = app.user("cleo").await;
    assert_eq!(blocked(&app, &ana).await, json!([]));
    block(&app, &ana, &ben).await;
    block(&app, &ana, &cleo).await;
    block(&app, &ana, &ben).await;
    let public = |user: &User| json!({"id": user.id, "username": user.name});
    assert_eq!(blocked(&app, &ana).await, json!([public(&cleo), public(&ben)]));
    assert_eq!(blocked(&app, &ben).await, json!([]));
    unblock(&app, &ana, &cleo).await;
    assert_eq!(blocked(&app, &ana).await, json!([public(&ben)]));
    app.database.execute(&format!("DELETE FROM users WHERE id = '{}'", ben.id)).await;
    assert_eq!(blocked(&app, &ana).await, json!([]));
    change(&app, Method::PUT, &ana, &ben.id).await.problem(404);
    unblock(&app, &ana, &ben).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn only_another_user_can_be_blocked_and_1000_at_most() {
    let app = TestApp::start().await;
    let (ana, ben) = app.pair().await;
    for id in ["ben", "1", &Uuid::now_v7().to_string(), &Uuid::nil().to_string()] {
        change(&app, Method::PUT, &ana, id).await.problem(404);
        assert_eq!(change(&app, Method::DELETE, &ana, id).await.status, 204);
    }
    assert_eq!(change(&app, Method::PUT, &ana, &ana.id).await.invalid_fields(), ["user_id"]);
    let many = strangers(&app, 999).await;
    let fill =
        format!("INSERT INTO blocks SELECT '{}', id FROM users WHERE username LIKE 'stranger%'", ana.id);
    app.database.execute(&fill).await;
    block(&app, &ana, &ben).await;
    let cleo = app.user("cleo").await;
    assert_eq!(change(&app, Method::PUT, &ana, &cleo.id).await.invalid_fields(), ["user_id"]);
    app.sent(&cleo, &ana, "hello").await;
    // One that is there stays.
    block(&app, &ana, &many[7]).await;
    assert_eq!(blocked(&app, &ana).await.as_array().map(Vec::len), Some(1000));
    unblock(&app, &ana, &many[7]).await;
    block(&app, &ana, &cleo).await;
    app.send(&cleo, &ana, "hello").response().await.problem(403);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_block_is_answered_after_every_statement_that_may_not_have_seen_it() {
    let app = TestApp::start().await;
    let other = app.replica(&[]).await;
    let (ana, ben) = app.pair().await;
    app.sent(&ben, &ana, "hello").await;
    let blocking = block(&other, &ana, &ben);
    waits_for_statements_in_flight(&app, [&ben, &ana], blocking, "SELECT count(*) FROM blocks").await;
    app.send(&ben, &ana, "after").response().await.problem(403);
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_stored_after_the_answer_to_a_block() {
    let app = &TestApp::start().await;
    let replicas = [app, &app.replica(&[]).await];
    let (ana, ben) = app.pair().await;
    app.sent(&ben, &ana, "hello").await;
    let blocking = async {
        // Open already: the answer must be compared with what is there at once.
        let mut connection = app.database.connect().await;
        for round in rounds() {
            let replica = replicas[round as usize % 2];
            race(&replicas, &mut connection, [&ben, &ana], round, block(replica, &ana, &ben)).await;
            unblock(replica, &ana, &ben).await;
        }
    };
    tokio::select! {
        () = jam(app) => unreachable!("it never ends"),
        () = blocking => {}
    }
}

/// A service that allows this many new conversations, and nothing is counted twice because the hour ends.
async fn limited(per_hour: &str) -> TestApp {
    sleep(wait_for_an_hour()).await;
    TestApp::with(&[("NEW_CONVERSATIONS_PER_HOUR", per_hour)]).await
}

#[tokio::test(flavor = "multi_thread")]
async fn many_first_messages_at_once_begin_exactly_as_many_conversations_as_are_allowed() {
    let app = limited("10").await;
    let other = app.replica(&[]).await;
    let replicas = [&app, &other];
    for round in 0..5 {
        let sender = app.user(&format!("sender{round}")).await;
        let strangers = strangers(&app, 25).await;
        // Each twice, through both replicas.
        let sends = (0..50).map(|n| replicas[n % 2].send(&sender, &strangers[n / 2], "hello").response());
        let answers = together(sends).await;
        let statuses: Vec<u16> = answers.iter().map(|answer| answer.status).collect();
        assert_eq!(statuses.iter().filter(|status| **status == 201).count(), 20, "{statuses:?}");
        assert_eq!(statuses.iter().filter(|status| **status == 429).count(), 30, "{statuses:?}");
        for two in statuses.chunks(2) {
            assert_eq!(two[0], two[1], "one conversation, and one answer: {statuses:?}");
        }
        let sql =
            format!("SELECT count(*) FROM conversations WHERE '{}' IN (low_user, high_user)", sender.id);
        assert_eq!(app.database.count(&sql).await, 10);
        // Those that are found new twice count once.
        let sender = app.user(&format!("other{round}")).await;
        let sends = (0..20).map(|n| replicas[n % 2].send(&sender, &strangers[n / 2], "hello").response());
        let answers = together(sends).await;
        assert!(answers.iter().all(|answer| answer.status == 201), "{answers:?}");
    }
    let refused = "chat_rate_limited_total{limit=\"new_conversations\"}";
    assert_eq!(app.metric(refused).await + other.metric(refused).await, 150.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_goes_on_and_replies_and_refused_messages_do_not_count() {
    let app = limited("3").await;
    let other = app.replica(&[]).await;
    assert_eq!(app.metric("chat_rate_limited_total{limit=\"new_conversations\"}").await, 0.0);
    let (ana, enemy) = app.pair().await;
    let strangers = strangers(&app, 6).await;
    block(&app, &enemy, &ana).await;
    let nobody = User { id: Uuid::now_v7().to_string(), ..enemy.clone() };
    for _ in 0..5 {
        app.send(&ana, &enemy, "hello").response().await.problem(403);
        app.send(&ana, &nobody, "hello").response().await.problem(404);
    }
    // Of one batch at once.
    let lock = app.database.lock("conversations IN EXCLUSIVE MODE").await;
    let sends = together((0..6).map(|n| app.send(&ana, &strangers[n % 3], "hello").response()));
    let (answers, ()) = tokio::join!(sends, async {
        sleep(Duration::from_millis(300)).await;
        lock.release().await;
    });
    assert!(answers.iter().all(|answer| answer.status == 201), "{answers:?}");
    for replica in [&app, &other] {
        let before = now_seconds();
        let answer = replica.send(&ana, &strangers[3], "hello").response().await;
        let after = now_seconds();
        let detail = text(&answer.problem(429), "detail");
        let wait: u64 = answer.header("retry-after").and_then(|wait| wait.parse().ok()).expect("seconds");
        assert!((3600 - after % 3600..=3600 - before % 3600).contains(&wait), "{wait} s at {after}");
        assert!(detail.contains("new conversations") && detail.contains(&wait.to_string()), "{detail}");
        // As before.
        for stranger in &strangers[..3] {
            replica.sent(&ana, stranger, "hello again").await;
            replica.sent(stranger, &ana, "hello").await;
        }
    }
    other.sent(&strangers[3], &ana, "hello").await;
    app.sent(&ana, &strangers[3], "a reply").await;
    app.send(&ana, &strangers[4], "hello").response().await.problem(429);
    // Another user's count is another's.
    app.sent(&strangers[4], &strangers[5], "hello").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn each_hour_counts_anew_and_a_past_one_is_swept() {
    let app = limited("2").await;
    let (ana, ben) = app.pair().await;
    let strangers = strangers(&app, 4).await;
    app.sent(&ana, &strangers[0], "hello").await;
    app.sent(&ana, &strangers[1], "hello").await;
    app.send(&ana, &strangers[2], "hello").response().await.problem(429);
    // A statement that comes from the hour before counts in the one that has begun.
    app.database.execute("UPDATE new_conversations SET hour = hour + 1").await;
    app.send(&ana, &strangers[2], "hello").response().await.problem(429);
    let ahead = "SELECT hour - floor(extract(epoch FROM now()) / 3600)::bigint FROM new_conversations";
    assert_eq!(app.database.count(ahead).await, 1);
    app.database.execute("UPDATE new_conversations SET hour = hour - 2").await;
    app.sent(&ana, &strangers[2], "hello").await;
    app.sent(&ana, &strangers[3], "hello").await;
    app.send(&ana, &ben, "hello").response().await.problem(429);
    // A clock that was set back does not refuse for long.
    app.database.execute("UPDATE new_conversations SET hour = hour + 9").await;
    app.sent(&ana, &ben, "hello").await;
    app.database.execute("UPDATE new_conversations SET hour = hour - 2").await;
    // The sweep of another replica finds it when it starts.
    let _other = app.replica(&[]).await;
    let deadline = Instant::now() + Duration::from_secs(20);
    while app.database.count("SELECT count(*) FROM new_conversations").await > 0 {
        assert!(Instant::now() < deadline, "a count was not swept");
        sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn zero_allows_any_number_of_new_conversations() {
    let app = limited("0").await;
    let (ana, _) = app.pair().await;
    for stranger in strangers(&app, 40).await {
        app.sent(&ana, &stranger, "hello").await;
    }
    assert_eq!(app.database.count("SELECT count(*) FROM new_conversations").await, 0);
}
