//! `MESSAGE_RETENTION_DAYS`: old messages are removed from the beginning of each conversation, and all else goes on.

use std::time::{Duration, Instant};

use serde_json::Value;
use sqlx::Connection as _;
use tokio::time::sleep;
use uuid::Uuid;

use crate::support::{Response, TestApp, User, text, together};

const LIMIT: Duration = Duration::from_secs(60);

/// Makes these messages older.
async fn age(app: &TestApp, condition: &str, by: &str) {
    let sql = format!("UPDATE messages SET created_at = created_at - interval '{by}' WHERE {condition}");
    app.database.execute(&sql).await;
}

async fn wait_until(app: &TestApp, condition: &str) {
    let started = Instant::now();
    while app.database.count(&format!("SELECT ({condition})::int::bigint")).await == 0 {
        assert!(started.elapsed() < LIMIT, "waited for {condition}");
        sleep(Duration::from_millis(20)).await;
    }
}

/// A replica that removes old messages, once it has removed them.
async fn swept(app: &TestApp, days: &str) -> TestApp {
    let replica = app.replica(&[("MESSAGE_RETENTION_DAYS", days)]).await;
    sweep(app, "clock_timestamp()").await;
    replica
}

/// A sweep from its beginning to its end.
async fn sweep(app: &TestApp, held_until: &str) {
    app.database
        .execute(&format!(
            "UPDATE message_retention SET next_at = clock_timestamp(), held_until = {held_until}, completed_at = NULL"
        ))
        .await;
    wait_until(app, "SELECT completed_at IS NOT NULL FROM message_retention").await;
}

/// Conversations of users that do not exist, each with so many messages of last year.
async fn seed(app: &TestApp, conversations: u32, messages: u32) {
    let sql = format!(
        "WITH added AS (
             INSERT INTO conversations (low_user, high_user, id, last_seq, last_at)
             SELECT least(a, b), greatest(a, b), gen_random_uuid(), {messages}, now() - interval '1 year'
             FROM (SELECT gen_random_uuid() AS a, gen_random_uuid() AS b FROM generate_series(1, {conversations})) users
             RETURNING id, low_user
         )
         INSERT INTO messages (conversation_id, seq, id, sender_id, content, created_at)
         SELECT id, seq, gen_random_uuid(), low_user, 'old', now() - interval '1 year'
         FROM added, generate_series(1, {messages}) seq"
    );
    app.database.execute(&sql).await;
}

async fn listed(app: &TestApp, user: &User) -> Vec<String> {
    let page = app.get("/conversations?limit=2").by(user).response().await.json(200);
    page.as_array().expect("an array").iter().map(|listed| text(&listed["peer"], "id")).collect()
}

fn down(from: i64, to: i64) -> Vec<i64> {
    (to..=from).rev().collect()
}

/// The page, and whether another follows.
fn shown(page: &Response) -> (Vec<i64>, bool) {
    (page.seqs(), page.next().is_some())
}

#[tokio::test(flavor = "multi_thread")]
async fn pages_end_where_history_ends_and_seq_goes_on() {
    let app = TestApp::start().await;
    let without = app.replica(&[("CACHE_WINDOW", "0")]).await;
    let (ana, ben) = app.pair().await;
    app.sent_many(&ana, &ben, 20).await;
    age(&app, "seq <= 12", "31 days").await;
    // Not yet.
    age(&app, "seq > 12", "29 days").await;
    let replica = swept(&app, "30").await;
    assert_eq!(app.database.count("SELECT count(*) FROM messages").await, 8);
    for (query, seqs, more) in [
        ("limit=7", down(20, 14), true),
        ("limit=8", down(20, 13), false),
        ("limit=9", down(20, 13), false),
        ("limit=100", down(20, 13), false),
        ("offset=5&limit=2", down(15, 14), true),
        ("offset=6&limit=2", down(14, 13), false),
        ("offset=6&limit=5", down(14, 13), false),
        ("offset=8", vec![], false),
        ("offset=19", vec![], false),
        ("before=16&limit=2", down(15, 14), true),
        ("before=15&limit=2", down(14, 13), false),
        ("before=13", vec![], false),
        ("before=5", vec![], false),
        ("after=0&limit=3", down(15, 13), true),
        ("after=11&limit=3", down(15, 13), true),
        ("after=12&limit=8", down(20, 13), false),
        ("after=3&limit=100", down(20, 13), false),
        ("after=20", vec![], false),
    ] {
        for (name, app) in [("window", &app), ("Postgres", &without), ("window", &replica)] {
            let page = app.messages(&ben, &ana, query).await;
            assert_eq!(shown(&page), (seqs.clone(), more), "{query} from the {name}");
        }
    }
    // The window knows where history begins.
    for (query, seqs, more) in [
        ("limit=7", down(20, 14), true),
        ("limit=8", down(20, 13), false),
        ("limit=40", down(20, 13), false),
        ("after=3&limit=10", down(20, 13), false),
        ("offset=7&limit=4", down(13, 13), false),
    ] {
        assert_eq!(shown(&app.hit(&ben, &ana, query).await), (seqs, more), "{query}");
    }
    assert_eq!(app.sent(&ana, &ben, "next").await["seq"], 21);
    assert_eq!(shown(&app.hit(&ben, &ana, "limit=40").await), (down(21, 13), false));
    assert_eq!(replica.metric("chat_messages_removed_total").await, 12.0);
    assert_eq!(app.metric("chat_messages_removed_total").await, 0.0);
    wait_for(&replica, "chat_message_retention_completed_timestamp_seconds", 1.7e9).await;
    wait_for(&replica, "chat_message_retention_sweep_ratio", 1.0).await;
}

async fn wait_for(app: &TestApp, metric: &str, at_least: f64) {
    let started = Instant::now();
    while app.metric(metric).await < at_least {
        assert!(started.elapsed() < LIMIT, "{metric}");
        sleep(Duration::from_millis(100)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_conversation_of_which_nothing_is_left_is_not_listed_and_goes_on_with_its_seq() {
    let app = TestApp::start().await;
    let without = app.replica(&[("CACHE_WINDOW", "0")]).await;
    let (ana, ben) = app.pair().await;
    let cleo = app.member().await;
    // The one that goes was active last.
    app.sent(&cleo, &ana, "new").await;
    app.sent_many(&ana, &ben, 3).await;
    age(&app, "content <> 'new'", "31 days").await;
    let _replica = swept(&app, "30").await;
    for app in [&app, &without] {
        assert_eq!(listed(app, &ana).await, [&*cleo.id]);
        let page = app.get("/conversations?limit=1").by(&ana).response().await;
        assert_eq!((page.json(200)[0]["last_message"]["content"].as_str(), page.next()), (Some("new"), None));
        assert_eq!(listed(app, &ben).await, Vec::<String>::new());
        for query in ["", "before=3", "after=0", "after=2", "offset=1"] {
            assert_eq!(shown(&app.messages(&ana, &ben, query).await), (vec![], false), "{query}");
        }
    }
    assert_eq!(shown(&app.hit(&ana, &ben, "").await), (vec![], false));
    assert_eq!(app.sent(&ben, &ana, "again").await["seq"], 4);
    for app in [&app, &without] {
        assert_eq!(listed(app, &ana).await, [&*ben.id, &*cleo.id]);
        for query in ["", "after=0", "limit=1", "before=9"] {
            assert_eq!(shown(&app.messages(&ana, &ben, query).await), (vec![4], false), "{query}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn no_window_shows_what_was_removed() {
    let app = TestApp::start().await;
    let other = app.replica(&[]).await;
    let (ana, ben) = app.pair().await;
    let remover = app.replica(&[("MESSAGE_RETENTION_DAYS", "7")]).await;
    app.sent_many(&ana, &ben, 40).await;
    for first in [5, 17, 33] {
        for app in [&app, &other] {
            app.hit(&ana, &ben, "limit=50").await;
        }
        age(&app, &format!("seq < {first}"), "8 days").await;
        // While windows are read.
        tokio::select! {
            () = sweep(&app, "held_until") => {}
            () = async { loop { app.hit(&ana, &ben, "limit=50").await; } } => {}
        }
        for app in [&app, &other, &remover] {
            assert_eq!(shown(&app.messages(&ana, &ben, "limit=50").await), (down(40, first), false));
            assert_eq!(shown(&app.messages(&ana, &ben, "limit=3").await), (down(40, 38), true));
        }
    }
}

/// As a process that dies before it has dropped the windows.
async fn removed_without_windows(app: &TestApp, first: i64) {
    app.database
        .execute(&format!(
            "DELETE FROM messages WHERE seq < {first}; UPDATE conversations SET first_seq = {first}"
        ))
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_window_that_shows_removed_messages_is_found() {
    let app = TestApp::start().await;
    let other = app.replica(&[]).await;
    let (ana, ben) = app.pair().await;
    app.sent_many(&ana, &ben, 10).await;
    app.hit(&ana, &ben, "limit=50").await;
    // A reader that was not shown them any more: from then on nobody is.
    removed_without_windows(&app, 4).await;
    assert_eq!(shown(&other.messages(&ana, &ben, "before=5").await), (vec![4], false));
    assert_eq!(shown(&app.messages(&ana, &ben, "limit=50").await), (down(10, 4), false));
    // And the one that shows nothing removed, but more to come.
    app.hit(&ana, &ben, "limit=50").await;
    for first in [6, 11] {
        removed_without_windows(&app, first).await;
        let started = Instant::now();
        while shown(&app.messages(&ana, &ben, "limit=50").await).0.len() as i64 != 11 - first {
            assert!(started.elapsed() < Duration::from_secs(12), "the window was not compared");
            sleep(Duration::from_millis(100)).await;
        }
        app.hit(&ana, &ben, "limit=50").await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_from_a_position_that_lacks_removed_messages_is_reset() {
    let app = TestApp::start().await;
    let (ana, ben) = app.pair().await;
    let cleo = app.user(&format!("cleo.{}", &ana.name[4..])).await;
    let mut live = app.follow(&ana, None).await;
    live.ready().await;
    let mut positions = vec![live.last_id.clone()];
    for number in 1..=8 {
        app.sent(&ben, &ana, &number.to_string()).await;
        live.message().await;
        positions.push(live.last_id.clone());
    }
    drop(live);
    let list = app.get("/conversations").by(&ana).response().await;
    let whole = list.header("stream-position").expect("a position").to_owned();
    // Nobody has seen it, but all before it is seen.
    app.sent(&cleo, &ana, "cleo's").await;
    age(&app, "content IN ('1', '2', '3', '4', '5')", "2 days").await;
    let _replica = swept(&app, "1").await;
    for (seen, position) in positions.iter().enumerate() {
        let mut stream = app.follow(&ana, Some(position)).await;
        if seen < 5 {
            let event = stream.next().await.expect("an event");
            assert_eq!((&*event.name, event.data["reason"].as_str()), ("reset", Some("too_old")), "{seen}");
            continue;
        }
        assert!(stream.ready().await, "{seen}");
        let mut contents = stream.contents(8 - seen + 1).await;
        contents.retain(|content| content != "cleo's");
        let expected: Vec<String> = (seen + 1..=8).map(|number| number.to_string()).collect();
        assert_eq!(contents, expected, "after {seen}");
        stream.nothing_more().await;
    }
    // Everything was seen of a conversation of which nothing is left.
    age(&app, "content <> 'cleo''s'", "2 days").await;
    sweep(&app, "held_until").await;
    assert_eq!(app.database.count("SELECT count(*) FROM messages").await, 1);
    let mut stream = app.follow(&ana, Some(&whole)).await;
    assert!(stream.ready().await);
    assert_eq!(stream.contents(1).await, ["cleo's"]);
    assert_eq!(app.metric("chat_stream_gaps_total").await, 0.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_stays_for_as_long_as_its_idempotency_key() {
    let app = TestApp::start().await;
    let (ana, ben) = app.pair().await;
    let send = || app.send(&ana, &ben, "once").header("idempotency-key", "k1").response();
    let first = send().await.json(201);
    app.sent(&ana, &ben, "no key").await;
    // A day is 25 hours.
    age(&app, "true", "24 hours 30 minutes").await;
    let _replica = swept(&app, "1").await;
    assert_eq!(app.database.count("SELECT count(*) FROM messages").await, 2);
    age(&app, "true", "1 hour").await;
    app.database
        .execute("UPDATE idempotency_keys SET created_at = created_at - interval '25 hours 30 minutes'")
        .await;
    // The key is late: what is locked is not removed.
    let mut connection = app.database.connect().await;
    let mut holding = connection.begin().await.expect("a transaction");
    let locked = sqlx::query("SELECT FROM idempotency_keys FOR UPDATE").execute(&mut *holding).await;
    assert_eq!(locked.expect("a lock").rows_affected(), 1);
    sweep(&app, "held_until").await;
    assert_eq!(app.database.count("SELECT count(*) FROM messages").await, 2);
    let again = send().await;
    assert_eq!(
        (again.json(201)["id"].clone(), again.header("idempotency-replayed")),
        (first["id"].clone(), Some("true"))
    );
    holding.rollback().await.expect("a rollback");
    app.database.execute("DELETE FROM idempotency_keys").await;
    sweep(&app, "held_until").await;
    assert_eq!(app.database.count("SELECT count(*) FROM messages").await, 0);
    assert_eq!(send().await.json(201)["seq"], 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_retention_nothing_is_removed() {
    let app = TestApp::start().await;
    let _other = app.replica(&[("MESSAGE_RETENTION_DAYS", "0")]).await;
    seed(&app, 1, 10).await;
    // Longer than a replica needs to ask for the turn.
    sleep(Duration::from_secs(7)).await;
    assert_eq!(app.database.count("SELECT count(*) FROM messages").await, 10);
    assert_eq!(app.database.count("SELECT count(*) FROM message_retention WHERE holder IS NULL").await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn several_replicas_remove_no_faster_than_one_and_one_goes_on_where_another_stopped() {
    let app = TestApp::start().await;
    seed(&app, 40, 300).await;
    let retention = [("MESSAGE_RETENTION_DAYS", "30")];
    let replicas = together([0; 3].map(|_| app.replica(&retention))).await;
    let left = async || app.database.count("SELECT count(*) FROM messages").await;
    wait_until(&app, "SELECT count(*) < 12000 FROM messages").await;
    let (before, started) = (left().await, Instant::now());
    sleep(Duration::from_secs(4)).await;
    let (removed, taken) = (before - left().await, started.elapsed().as_secs_f64());
    assert!(removed > 0);
    assert!(removed as f64 <= 1000.0 * taken + 500.0, "{removed} in {taken} s");
    let mut active = Vec::new();
    for (index, replica) in replicas.iter().enumerate() {
        if replica.metric("chat_messages_removed_total").await > 0.0 {
            active.push(index);
        }
    }
    assert_eq!(active.len(), 1, "{active:?}");
    let mut replicas = replicas;
    let stopped = replicas.remove(active[0]);
    stopped.running.stop(false).await;
    let reached = "SELECT count(*) FROM conversations WHERE id < (SELECT reached FROM message_retention)";
    let reached = app.database.count(reached).await;
    assert!((1..40).contains(&reached), "{reached} conversations are done");
    // The others wait until its turn is over.
    wait_until(&app, "SELECT completed_at IS NOT NULL FROM message_retention").await;
    assert_eq!(left().await, 0);
    assert_eq!(app.database.count("SELECT count(*) FROM conversations WHERE first_seq = 301").await, 40);
}

#[tokio::test(flavor = "multi_thread")]
async fn sends_to_a_conversation_go_on_while_it_is_swept() {
    let app = TestApp::start().await;
    let (ana, ben) = app.pair().await;
    app.sent(&ana, &ben, "first").await;
    app.database
        .execute(
            "INSERT INTO messages (conversation_id, seq, id, sender_id, content, created_at)
             SELECT id, seq, gen_random_uuid(), low_user, 'old', now() FROM conversations, generate_series(2, 4000) seq;
             UPDATE conversations SET last_seq = 4000;
             UPDATE messages SET created_at = now() - interval '1 year'",
        )
        .await;
    let replica = app.replica(&[("MESSAGE_RETENTION_DAYS", "30")]).await;
    let (mut sent, mut slowest, begun) = (4000, Duration::ZERO, Instant::now());
    while app.database.count("SELECT first_seq FROM conversations").await <= 4000 {
        assert!(begun.elapsed() < LIMIT, "the old messages are not removed");
        for app in [&app, &replica] {
            let started = Instant::now();
            sent += 1;
            assert_eq!(app.sent(&ana, &ben, "new").await["seq"], sent);
            slowest = slowest.max(started.elapsed());
        }
    }
    assert!(sent > 4010, "{sent}");
    assert!(slowest < Duration::from_secs(1), "{slowest:?}");
    let page: Value = app.messages(&ana, &ben, "after=0&limit=100").await.json(200);
    let oldest = page.as_array().and_then(|page| page.last()).expect("a message");
    assert_eq!((oldest["seq"].as_i64(), oldest["content"].as_str()), (Some(4001), Some("new")));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_conversation_that_is_locked_is_left_for_later_and_holds_up_no_other() {
    let app = TestApp::start().await;
    seed(&app, 5, 10).await;
    let mut connection = app.database.connect().await;
    let mut holding = connection.begin().await.expect("a transaction");
    let held: Uuid = sqlx::query_scalar("SELECT id FROM conversations ORDER BY id LIMIT 1 FOR UPDATE")
        .fetch_one(&mut *holding)
        .await
        .expect("a lock");
    let _replica = app.replica(&[("MESSAGE_RETENTION_DAYS", "30")]).await;
    wait_until(&app, "SELECT count(*) = 10 FROM messages").await;
    let of_held = format!("SELECT count(*) FROM messages WHERE conversation_id = '{held}'");
    assert_eq!(app.database.count(&of_held).await, 10);
    holding.rollback().await.expect("a rollback");
    wait_until(&app, "SELECT count(*) = 0 FROM messages").await;
}
