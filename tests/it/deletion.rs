//! Deleted accounts: what ends at once, what is erased in the background, what peers see of it.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use reqwest::Method;
use serde_json::{Value, json};
use sqlx::{Connection as _, PgConnection};
use tokio::time::sleep;

use crate::support::races::{waits_for_statements_in_flight, wanted_rounds};
use crate::support::{Follower, PASSWORD, Request, Response, TestApp, User, members, text, together};

/// What a window may go on to answer.
const WINDOW: Duration = Duration::from_secs(1);

fn delete(app: &TestApp, user: &User, query: &str) -> Request {
    app.request(Method::DELETE, &format!("/me{query}")).by(user).json(&json!({"password": PASSWORD}))
}

async fn deleted(app: &TestApp, user: &User, query: &str) {
    let answer = delete(app, user, query).response().await;
    assert_eq!((answer.status, answer.body.len()), (202, 0), "{answer:?}");
}

/// Waits until nothing is left to remove.
async fn erased(app: &TestApp) {
    let deadline = Instant::now() + Duration::from_secs(40);
    while app.database.count("SELECT count(*) FROM erasures").await > 0 {
        assert!(Instant::now() < deadline, "an erasure does not end");
        sleep(Duration::from_millis(20)).await;
    }
}

/// Waits until the gauge has been counted again.
async fn pending(app: &TestApp, expected: f64) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while app.metric("chat_erasures_pending").await != expected {
        assert!(Instant::now() < deadline, "not {expected} pending");
        sleep(Duration::from_millis(20)).await;
    }
}

fn is_erased(message: &Value) -> bool {
    message["content"] == "" && message["erased"] == true
}

/// The next event, which must say that messages were erased.
async fn erasure(follower: &mut Follower) -> (String, i64) {
    let event = follower.next().await.expect("an event");
    assert_eq!(event.name, "erased", "{event:?}");
    assert!(event.id.is_some_and(|id| !id.is_empty()), "an erasure without a position");
    assert_eq!(members(&event.data), ["peer_id", "seq"]);
    (text(&event.data, "peer_id"), event.data["seq"].as_i64().expect("a seq"))
}

#[tokio::test(flavor = "multi_thread")]
async fn from_the_answer_on_nobody_is_the_user_on_any_replica() {
    let app = TestApp::start().await;
    let other = app.replica(&[]).await;
    let (ana, ben, carl) = (app.member().await, app.member().await, app.member().await);
    let tokens = app.login(&ana.name, PASSWORD).await.json(200);
    let second = User { token: text(&tokens, "access_token"), ..ana.clone() };
    let keyed = || app.send(&ana, &ben, "hello").header("idempotency-key", "key");
    keyed().response().await.json(201);
    for replica in [&app, &other] {
        replica.hit(&ana, &ben, "").await;
        replica.hit(&ben, &ana, "").await;
    }
    let mut followers = [app.follow(&ana, None).await, other.follow(&second, None).await];
    for follower in &mut followers {
        follower.ready().await;
    }
    let unknown = app.login("nobody", PASSWORD).await.problem(401)["detail"].clone();
    deleted(&app, &ana, "").await;
    let answered = Instant::now();
    for replica in [&app, &other] {
        for user in [&ana, &second] {
            replica.get("/me").by(user).response().await.problem(401);
            replica.send(user, &ben, "late").response().await.problem(401);
            delete(replica, user, "").response().await.problem(401);
        }
        assert_eq!(replica.login(&ana.name, PASSWORD).await.problem(401)["detail"], unknown);
        let refresh = json!({"refresh_token": tokens["refresh_token"]});
        replica.post("/refresh").json(&refresh).response().await.problem(401);
        replica.get("/stream").by(&ana).response().await.problem(401);
        replica.get(&format!("/users/{}", ana.name)).by(&ben).response().await.problem(404);
        replica.send(&ben, &ana, "are you there?").response().await.problem(404);
        // Who never had a conversation with the user learns nothing.
        replica.messages(&carl, &ana, "").await.problem(404);
        replica.messages(&ben, &ana, "").await.json(200);
    }
    for follower in &mut followers {
        assert_eq!(follower.end().await, "deleted");
    }
    assert!(answered.elapsed() < Duration::from_secs(4), "{:?}", answered.elapsed());
    keyed().response().await.problem(401);
    erased(&app).await;
    // The message of a key that was erased is no other message.
    keyed().response().await.problem(401);
    sleep(WINDOW.saturating_sub(answered.elapsed())).await;
    for replica in [&app, &other] {
        replica.messages(&ana, &ben, "").await.problem(401);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deletion_needs_the_password_and_a_query_that_parses() {
    let app = TestApp::start().await;
    let (ana, ben) = (app.member().await, app.member().await);
    app.sent(&ana, &ben, "hello").await;
    let ask = async |query: &str, body: Value| {
        app.request(Method::DELETE, &format!("/me{query}")).by(&ana).json(&body).response().await
    };
    ask("", json!({"password": "wrong horse battery"})).await.problem(403);
    assert_eq!(ask("", json!({})).await.invalid_fields(), ["password"]);
    for query in ["?erase_messages=1", "?erase_messages=", "?erase_messages=true&erase_messages=true"] {
        ask(query, json!({"password": PASSWORD})).await.problem(400);
    }
    app.get("/me").by(&ana).response().await.json(200);
    // Of two at once one is first.
    let both = together([0, 1].map(|_| delete(&app, &ana, "").response())).await;
    let mut statuses: Vec<u16> = both.iter().map(|answer| answer.status).collect();
    statuses.sort_unstable();
    assert!(statuses[0] == 202 && matches!(statuses[1], 401 | 403), "{statuses:?}");
    assert_eq!(app.database.count("SELECT count(*) FROM sessions").await, 1, "those of ben stay");
}

#[tokio::test(flavor = "multi_thread")]
async fn peers_keep_the_conversation_without_the_contents_of_the_deleted_user() {
    let app = TestApp::start().await;
    let other = app.replica(&[]).await;
    let (ana, ben) = (app.member().await, app.member().await);
    for number in 1..=7 {
        let (from, to) = if number % 3 == 0 { (&ben, &ana) } else { (&ana, &ben) };
        app.sent(from, to, &format!("text {number}")).await;
    }
    let before = app.hit(&ben, &ana, "limit=10").await.json(200);
    other.hit(&ben, &ana, "limit=10").await;
    let mut followers = [app.follow(&ben, None).await, other.follow(&ben, None).await];
    for follower in &mut followers {
        follower.ready().await;
    }
    let start = followers[0].last_id.clone();
    deleted(&app, &ana, "?erase_messages=true").await;
    erased(&app).await;
    let expected: Vec<Value> = before
        .as_array()
        .expect("an array")
        .iter()
        .cloned()
        .map(|mut message| {
            if message["sender_id"] == *ana.id {
                message["content"] = json!("");
                message["erased"] = json!(true);
            }
            message
        })
        .collect();
    for replica in [&app, &other] {
        assert_eq!(replica.messages(&ben, &ana, "limit=10").await.json(200), json!(expected));
        assert_eq!(replica.messages(&ben, &ana, "limit=2&before=3").await.json(200), json!(expected[5..]));
        assert_eq!(replica.messages(&ben, &ana, "limit=2&after=5").await.json(200), json!(expected[..2]));
        let list = replica.get("/conversations").by(&ben).response().await.json(200);
        assert_eq!(list[0]["peer"], json!({"id": ana.id, "username": null}));
        assert_eq!(list[0]["last_message"], expected[0]);
        assert_eq!(list[0]["last_seq"], 7);
    }
    for follower in &mut followers {
        assert_eq!(erasure(follower).await, (ana.id.clone(), 7));
        follower.nothing_more().await;
    }
    // Once, also for a stream that resumes.
    let mut resumed = other.follow(&ben, Some(&start)).await;
    assert!(resumed.ready().await);
    assert_eq!(erasure(&mut resumed).await, (ana.id.clone(), 7));
    resumed.nothing_more().await;
    let mut later = app.follow(&ben, Some(&resumed.last_id)).await;
    assert!(later.ready().await);
    later.nothing_more().await;
    let counted =
        app.metric("chat_erased_messages_total").await + other.metric("chat_erased_messages_total").await;
    assert_eq!(counted, 5.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_resumes_gets_messages_and_erasures_in_order() {
    let app = TestApp::start().await;
    let (ben, mut anas) = (app.member().await, Vec::new());
    let mut follower = app.follow(&ben, None).await;
    follower.ready().await;
    let start = follower.last_id.clone();
    for _ in 0..3 {
        let ana = app.member().await;
        app.sent_many(&ana, &ben, 40).await;
        app.sent(&ben, &ana, "mine").await;
        anas.push(ana);
    }
    for ana in &anas {
        deleted(&app, ana, "").await;
    }
    erased(&app).await;
    // The position between any two events is one.
    let (mut position, mut seen) = (start, BTreeMap::<String, Vec<i64>>::new());
    for events in [1, 39, 2, 60, 20, 1, 3] {
        let mut follower = app.follow(&ben, Some(&position)).await;
        assert!(follower.ready().await);
        for _ in 0..events {
            let event = follower.next().await.expect("an event");
            if event.name == "erased" {
                assert_eq!(event.data["seq"], 40);
                seen.entry(text(&event.data, "peer_id")).or_default().push(0);
                continue;
            }
            let peer = ["sender_id", "recipient_id"].map(|name| text(&event.data, name));
            let peer = peer.into_iter().find(|id| *id != ben.id).expect("a peer");
            assert_eq!(is_erased(&event.data), event.data["sender_id"] == *peer, "{event:?}");
            seen.entry(peer).or_default().push(event.data["seq"].as_i64().expect("a seq"));
        }
        position = follower.last_id.clone();
    }
    let expected: Vec<i64> = (1..=41).chain([0]).collect();
    assert_eq!(seen, anas.iter().map(|ana| (ana.id.clone(), expected.clone())).collect());
    let mut follower = app.follow(&ben, Some(&position)).await;
    assert!(follower.ready().await);
    follower.nothing_more().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn messages_stay_as_they_are_where_the_user_asks_for_it() {
    let app = TestApp::start().await;
    let (ana, ben) = (app.member().await, app.member().await);
    app.send(&ana, &ben, "hello").header("idempotency-key", "key").response().await.json(201);
    let before = app.hit(&ben, &ana, "").await.json(200);
    let mut follower = app.follow(&ben, None).await;
    follower.ready().await;
    deleted(&app, &ana, "?erase_messages=false").await;
    erased(&app).await;
    assert_eq!(app.messages(&ben, &ana, "").await.json(200), before);
    let list = app.get("/conversations").by(&ben).response().await.json(200);
    assert_eq!(list[0]["peer"]["username"], Value::Null);
    assert_eq!(list[0]["last_message"], before[0]);
    follower.nothing_more().await;
    for table in ["idempotency_keys", "erased_conversations"] {
        assert_eq!(app.database.count(&format!("SELECT count(*) FROM {table}")).await, 0, "{table}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_name_and_the_address_are_reserved_for_thirty_days() {
    let app = TestApp::start().await;
    let tag = &app.member().await.name[7..];
    let (name, email) = (format!("Ana.{tag}"), format!("Ana.{tag}@Example.com"));
    let ana = app.register(&name, &email, PASSWORD).await.json(201);
    let id = text(&ana, "id");
    let ana = User { token: app.token(&id), id, name: name.clone() };
    deleted(&app, &ana, "").await;
    let others = |new_name: &str, new_email: &str| {
        let (new_name, new_email) = (new_name.to_owned(), new_email.to_owned());
        let app = &app;
        async move { app.register(&new_name, &new_email, PASSWORD).await }
    };
    let free = format!("free.{tag}@example.com");
    let taken = others(&name.to_lowercase(), &free).await.problem(409);
    assert!(text(&taken, "detail").contains("username"), "{taken}");
    let taken = others(&format!("free.{tag}"), &email.to_uppercase()).await.problem(409);
    assert!(text(&taken, "detail").contains("email"), "{taken}");
    // As a release does that knows nothing of it.
    let insert = |name: &str, email: &str| {
        let columns = "id, username, username_key, email, email_key, password_hash";
        format!(
            "INSERT INTO users ({columns}) VALUES (gen_random_uuid(), '{name}', lower('{name}'), '{email}', lower('{email}'), 'x')"
        )
    };
    let mut connection = app.database.connect().await;
    for (sql, constraint) in
        [(insert(&name, &free), "users_username_taken"), (insert("free", &email), "users_email_taken")]
    {
        let error =
            sqlx::raw_sql(sqlx::AssertSqlSafe(sql)).execute(&mut connection).await.expect_err("taken");
        assert_eq!(error.as_database_error().and_then(|error| error.constraint()), Some(constraint));
    }
    app.database
        .execute("UPDATE reserved_names SET reserved_until = reserved_until - interval '30 days 1 s'")
        .await;
    others(&name, &email).await.json(201);
    // The sweep of a replica that starts.
    let _other = app.replica(&[]).await;
    let deadline = Instant::now() + Duration::from_secs(20);
    while app.database.count("SELECT count(*) FROM reserved_names").await > 0 {
        assert!(Instant::now() < deadline, "reservations are not swept");
        sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_streams_need_no_more_is_swept() {
    let app = TestApp::start().await;
    let (ana, ben) = (app.member().await, app.member().await);
    app.sent(&ana, &ben, "hello").await;
    deleted(&app, &ana, "").await;
    erased(&app).await;
    assert_eq!(app.database.count("SELECT count(*) FROM erased_conversations").await, 1);
    app.database.execute("UPDATE erased_conversations SET erased_at = now() - interval '8 days 1 s'").await;
    let _other = app.replica(&[]).await;
    let deadline = Instant::now() + Duration::from_secs(20);
    while app.database.count("SELECT count(*) FROM erased_conversations").await > 0 {
        assert!(Instant::now() < deadline, "it is not swept");
        sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn another_replica_continues_an_erasure_whose_replica_is_gone() {
    const MESSAGES: i64 = 6000;
    let app = TestApp::start().await;
    let (ana, ben, carl) = (app.member().await, app.member().await, app.member().await);
    for peer in [&ben, &carl] {
        app.sent(&ana, peer, "1").await;
    }
    // Every fourth message is the peer's.
    app.database
        .execute(&format!(
            "INSERT INTO messages (conversation_id, seq, id, sender_id, content, created_at)
         SELECT c.id, n, gen_random_uuid(), CASE WHEN n % 4 = 0 THEN peer ELSE '{0}' END, 'text ' || n, now()
         FROM generate_series(2, {MESSAGES}) n, conversations c,
              LATERAL (SELECT CASE WHEN low_user = '{0}' THEN high_user ELSE low_user END) p (peer);
         UPDATE conversations SET last_seq = {MESSAGES}",
            ana.id
        ))
        .await;
    let mut follower = app.follow(&ben, None).await;
    follower.ready().await;
    let position = follower.last_id.clone();
    // In the middle of each.
    let mut connection = app.database.connect().await;
    let mut holding = connection.begin().await.expect("a transaction");
    let locked = sqlx::query("SELECT FROM messages WHERE seq = 3001 FOR UPDATE").execute(&mut *holding).await;
    locked.expect("a lock");
    deleted(&app, &ana, "").await;
    let left = "SELECT count(*) FROM messages WHERE content <> '' AND sender_id = ";
    let left = format!("{left}'{}'", ana.id);
    let deadline = Instant::now() + Duration::from_secs(20);
    let own = MESSAGES * 3 / 4 * 2;
    // The first conversation is done up to the lock.
    while app.database.count(&left).await > own - MESSAGES / 4 {
        assert!(Instant::now() < deadline, "nothing is erased");
        sleep(Duration::from_millis(20)).await;
    }
    let other = app.replica(&[]).await;
    pending(&other, 1.0).await;
    drop(app);
    holding.rollback().await.expect("a rollback");
    erased(&other).await;
    assert_eq!(other.database.count(&left).await, 0);
    let kept =
        format!("SELECT count(*) FROM messages WHERE content LIKE 'text %' AND sender_id <> '{}'", ana.id);
    assert_eq!(other.database.count(&kept).await, MESSAGES / 4 * 2);
    let counted = other.metric("chat_erased_messages_total").await;
    assert!(counted > 0.0 && counted < own as f64, "{counted}: the other replica did it all, or nothing");
    pending(&other, 0.0).await;
    let mut follower = other.follow(&ben, Some(&position)).await;
    assert!(follower.ready().await);
    assert_eq!(erasure(&mut follower).await, (ana.id.clone(), MESSAGES - 1));
    follower.nothing_more().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deletion_is_answered_after_every_statement_that_may_not_have_seen_it() {
    let app = TestApp::start().await;
    let other = app.replica(&[]).await;
    let (ana, ben) = (app.member().await, app.member().await);
    app.sent(&ana, &ben, "hello").await;
    let deletion = deleted(&other, &ana, "");
    waits_for_statements_in_flight(&app, [&ana, &ben], deletion, "SELECT count(*) FROM erasures").await;
    erased(&app).await;
    let page = app.messages(&ben, &ana, "").await.json(200);
    assert!(page.as_array().is_some_and(|page| page.len() == 2 && page.iter().all(is_erased)), "{page}");
}

#[tokio::test(flavor = "multi_thread")]
async fn deletions_race_with_sends_reads_and_streams_of_both_peers() {
    const LANES: u64 = 5;
    let app = &TestApp::start().await;
    let replicas = [app, &app.replica(&[]).await];
    together((0..LANES).map(|_| async move {
        let ben = app.member().await;
        let mut connection = app.database.connect().await;
        for round in 0..wanted_rounds().unwrap_or(100) / LANES {
            race(&replicas, &ben, &mut connection, round).await;
        }
    }))
    .await;
    erased(app).await;
}

async fn race(replicas: &[&TestApp; 2], ben: &User, connection: &mut PgConnection, round: u64) {
    let ana = &replicas[0].member().await;
    replicas[0].sent(ana, ben, "first").await;
    for replica in replicas {
        replica.messages(ben, ana, "").await.json(200);
    }
    let mut bens = replicas[0].follow(ben, None).await;
    let mut anas = replicas[1].follow(ana, None).await;
    bens.ready().await;
    anas.ready().await;
    let send = |from, to, task: usize| async move {
        loop {
            let answer: Response = replicas[task % 2].send(from, to, "racing").response().await;
            if answer.status != 201 {
                break answer.status;
            }
        }
    };
    let sending = together(
        [(ana, ben, 0), (ana, ben, 1), (ben, ana, 0), (ben, ana, 1)]
            .map(|(from, to, task)| send(from, to, task)),
    );
    let deletion = async {
        sleep(Duration::from_micros(700 * (round % 20))).await;
        deleted(replicas[round as usize % 2], ana, "").await;
        last_seq(connection, ana).await
    };
    let reading = together([0, 1].map(|replica| read(replicas[replica], ben, ana)));
    let (statuses, at_answer, _) = tokio::join!(sending, deletion, reading);
    assert_eq!(statuses, [401, 401, 404, 404], "round {round}");
    let last = last_seq(connection, ana).await;
    assert_eq!(last.0, at_answer.0, "round {round}: stored after the answer");
    // Every message once and in order, and then the erasure.
    for seq in 1..=last.0 {
        if seq > 1 {
            assert_eq!(bens.message().await["seq"], seq, "round {round}");
        }
    }
    assert_eq!(erasure(&mut bens).await, (ana.id.clone(), last.1), "round {round}");
    loop {
        let event = anas.next().await.expect("an event");
        if event.name == "end" {
            assert_eq!(event.data["reason"], "deleted");
            break;
        }
        assert_eq!(event.name, "message");
    }
}

/// Reads the newest messages until all of the peer's are erased. What one read has shown as erased, no later one shows.
async fn read(app: &TestApp, reader: &User, peer: &User) {
    let deadline = Instant::now() + Duration::from_secs(30);
    let mut erased_up_to = 0;
    let mut newest = 0;
    loop {
        let page = app.messages(reader, peer, "limit=50").await.json(200);
        let page = page.as_array().expect("an array");
        let head = page[0]["seq"].as_i64().expect("a seq");
        assert!(head >= newest, "a read went back in time");
        newest = head;
        let of_peer: Vec<&Value> = page.iter().filter(|message| message["sender_id"] == *peer.id).collect();
        for message in &of_peer {
            let seq = message["seq"].as_i64().expect("a seq");
            assert!(seq > erased_up_to || is_erased(message), "{message} was erased before");
        }
        let erased = of_peer.iter().filter(|message| is_erased(message));
        erased_up_to =
            erased.filter_map(|message| message["seq"].as_i64()).max().unwrap_or(0).max(erased_up_to);
        if of_peer.first().is_some_and(|message| is_erased(message)) {
            return;
        }
        assert!(Instant::now() < deadline, "it is not erased");
    }
}

/// The last seq of the user's only conversation, and of the user's own messages.
async fn last_seq(connection: &mut PgConnection, user: &User) -> (i64, i64) {
    let id: uuid::Uuid = user.id.parse().expect("an id");
    sqlx::query_as(
        "SELECT c.last_seq, max(m.seq) FROM conversations c JOIN messages m ON m.conversation_id = c.id
         WHERE $1 IN (c.low_user, c.high_user) AND m.sender_id = $1 GROUP BY c.last_seq",
    )
    .bind(id)
    .fetch_one(connection)
    .await
    .expect("a conversation")
}
