//! `GET /conversations`: most recently active first, page by page.

use std::time::Duration;

use serde_json::Value;
use tokio::time::{Instant, sleep};

use crate::support::{TestApp, members, text};

fn peers(page: &Value) -> Vec<String> {
    let page = page.as_array().expect("an array");
    page.iter().map(|conversation| text(&conversation["peer"], "username")).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn conversations_come_with_their_peer_and_last_message() {
    let app = TestApp::start().await;
    let (ana, ben) = app.pair().await;
    let cleo = app.user(&format!("cleo.{}", &ana.name[4..])).await;
    let empty = app.get("/conversations").by(&ana).response().await;
    assert_eq!(empty.json(200), Value::Array(Vec::new()));
    assert!(empty.header("stream-position").is_some_and(|position| !position.is_empty()));
    app.sent(&ana, &ben, "one").await;
    let last = app.sent(&ben, &ana, "two").await;
    app.sent(&cleo, &ana, "three").await;
    let list = app.get("/conversations").by(&ana).response().await;
    let page = list.json(200);
    assert_eq!(list.next(), None);
    assert_eq!(peers(&page), [&*cleo.name, &*ben.name]);
    assert_eq!(members(&page[1]), ["last_message", "last_seq", "peer"]);
    assert_eq!(page[1]["last_message"], last);
    assert_eq!(page[1]["last_seq"], 2);
    assert_eq!(text(&page[1]["peer"], "id"), ben.id);
    // A message moves its conversation to the top.
    app.sent(&ana, &ben, "four").await;
    assert_eq!(
        peers(&app.get("/conversations").by(&ana).response().await.json(200)),
        [&*ben.name, &*cleo.name]
    );
    app.database.execute(&format!("DELETE FROM users WHERE id = '{}'", ben.id)).await;
    let page = app.get("/conversations?limit=1").by(&ana).response().await.json(200);
    assert_eq!(page[0]["peer"]["username"], Value::Null);
    assert_eq!(text(&page[0]["peer"], "id"), ben.id);
}

#[tokio::test(flavor = "multi_thread")]
async fn pages_follow_one_another_while_messages_arrive() {
    let app = TestApp::start().await;
    let (ana, _) = app.pair().await;
    let mut others = Vec::new();
    for number in 0..7 {
        let other = app.user(&format!("u{number}.{}", &ana.name[4..])).await;
        app.sent(&other, &ana, "hello").await;
        others.push(other);
    }
    let mut names: Vec<&str> = others.iter().map(|other| &*other.name).collect();
    names.reverse();
    let mut path = Some("/conversations?limit=3".to_owned());
    let (mut shown, mut pages) = (Vec::new(), 0);
    while let Some(next) = path {
        let page = app.get(&next).by(&ana).response().await;
        shown.extend(peers(&page.json(200)));
        path = page.next();
        pages += 1;
        // Of one that was shown: it moves to the top, and shifts nothing.
        app.sent(&ana, &others[6], "again").await;
    }
    assert_eq!(shown, names);
    assert_eq!(pages, 3);
    // The last page has no link, also when it is full.
    let whole = app.get("/conversations?limit=7").by(&ana).response().await;
    assert_eq!((peers(&whole.json(200)).len(), whole.next()), (7, None));
}

/// What the sweep and the trigger have not noted yet is in its place among what they have.
#[tokio::test(flavor = "multi_thread")]
async fn pages_of_several_hours_are_in_order() {
    let app = TestApp::start().await;
    let (ana, _) = app.pair().await;
    app.database
        .execute(&format!(
            "INSERT INTO users (id, username, username_key, email, email_key, password_hash)
             SELECT gen_random_uuid(), n || 'old', n || 'old', n || '@old', n || '@old', '' FROM generate_series(1, 60) n;
             INSERT INTO conversations (low_user, high_user, id, last_seq, last_at)
             SELECT least(id, '{ana}'), greatest(id, '{ana}'), gen_random_uuid(), 1,
                    now() - interval '1 day' * floor(random() * 2) - interval '4 hours' * random()
             FROM users WHERE email LIKE '%@old';
             INSERT INTO messages (conversation_id, seq, id, sender_id, content, created_at)
             SELECT id, 1, id, high_user, 'hello', last_at FROM conversations WHERE '{ana}' IN (low_user, high_user);
             UPDATE conversations SET active_hour = hour_of(last_at) WHERE id > '80000000-0000-0000-0000-000000000000'",
            ana = ana.id
        ))
        .await;
    let unnoted = app.database.count("SELECT count(*) FROM conversations WHERE active_hour = 0").await;
    assert!((1..60).contains(&unnoted), "{unnoted} without an hour");
    let whole = app.get("/conversations?limit=100").by(&ana).response().await.json(200);
    let mut pages = Vec::new();
    let mut path = Some("/conversations?limit=7".to_owned());
    while let Some(next) = path {
        let page = app.get(&next).by(&ana).response().await;
        pages.extend(page.json(200).as_array().expect("an array").clone());
        path = page.next();
    }
    assert_eq!(Value::Array(pages.clone()), whole);
    let times: Vec<String> = pages.iter().map(|one| text(&one["last_message"], "created_at")).collect();
    assert_eq!(times.len(), 60);
    assert!(times.is_sorted_by(|newer, older| newer > older), "{times:?}");
}

/// The list of a user finds its conversations by their hour: it changes with the first message of an hour, and with no other.
#[tokio::test(flavor = "multi_thread")]
async fn the_hour_of_a_conversation_is_noted() {
    let app = TestApp::start().await;
    let (ana, ben) = app.pair().await;
    let of_now = "SELECT count(*) FROM conversations WHERE active_hour = hour_of(last_at)";
    app.sent(&ana, &ben, "one").await;
    app.sent(&ana, &ben, "two").await;
    assert_eq!(app.database.count(of_now).await, 1);
    app.database.execute("UPDATE conversations SET last_at = last_at - interval '3 hours'").await;
    app.sent(&ben, &ana, "three").await;
    assert_eq!(app.database.count(of_now).await, 1);
    // A replica sweeps when it starts.
    app.database
        .execute(
            "ALTER TABLE conversations DISABLE TRIGGER conversations_active_hour;
             UPDATE conversations SET active_hour = 0",
        )
        .await;
    let _other = app.replica(&[]).await;
    let deadline = Instant::now() + Duration::from_secs(20);
    while app.database.count(of_now).await != 1 {
        assert!(Instant::now() < deadline, "the hour was not noted");
        sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_query_out_of_range_is_refused_by_its_name() {
    let app = TestApp::start().await;
    let ana = app.user("ana").await;
    for (query, field) in
        [("limit=0", "limit"), ("limit=101", "limit"), ("before=x", "before"), ("before=", "before")]
    {
        let answer = app.get(&format!("/conversations?{query}")).by(&ana).response().await;
        assert_eq!(answer.invalid_fields(), [field], "{query}");
    }
    app.get("/conversations?limit=x").by(&ana).response().await.problem(400);
    app.get("/conversations").response().await.problem(401);
}
