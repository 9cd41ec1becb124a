//! The recent window in Redis: a read never shows less than was acknowledged, whatever data Redis loses.

use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::time::{Duration, Instant};

use deadpool_redis::redis;

use crate::support::{TestApp, User};

/// The keys of the only list in the test's Redis, and of its lease.
async fn window_keys(app: &TestApp) -> (String, String) {
    let keys: Vec<String> = app.redis.run(redis::cmd("KEYS").arg("chat:recent:*")).await;
    let key = |part: &str| keys.iter().find(|key| key.ends_with(part)).cloned();
    let keys = key(":list").zip(key(":lease"));
    keys.unwrap_or_else(|| panic!("no window with a lease in Redis"))
}

async fn head(app: &TestApp, reader: &User, peer: &User) -> i64 {
    app.seqs(reader, peer, "limit=3").await.first().copied().unwrap_or(0)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_is_shown_by_every_replica_as_soon_as_one_acknowledged_it() {
    let one = TestApp::start().await;
    let other = one.replica(&[]).await;
    let (ana, ben) = one.pair().await;
    // Also while the windows of both are in use.
    one.hit(&ana, &ben, "").await;
    other.hit(&ben, &ana, "").await;
    for number in 1..=60 {
        let (writer, reader) = if number % 3 == 0 { (&other, &one) } else { (&one, &other) };
        let message = writer.sent(&ana, &ben, &number.to_string()).await;
        for app in [reader, writer] {
            let page = app.messages(&ben, &ana, "limit=2").await.json(200);
            assert_eq!(page[0], message, "after the 201 of message {number}");
        }
        if number % 20 == 0 {
            // Longer than a lease.
            tokio::time::sleep(Duration::from_millis(1000)).await;
        }
    }
    assert!(
        one.metric("chat_cache_lookups_total{outcome=\"hit\"}").await > 20.0,
        "the window was not in use"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn reads_from_the_window_and_from_postgres_are_the_same_bytes() {
    let app = TestApp::with(&[("CACHE_WINDOW", "100")]).await;
    let without = app.replica(&[("CACHE_WINDOW", "0")]).await;
    let (ana, ben) = app.pair().await;
    for content in ["1 2 3", "{\"seq\": 9}", "é\u{2028}🦀\\\"\t\u{7f}", "<b>"] {
        app.sent(&ana, &ben, content).await;
        app.sent(&ben, &ana, content).await;
    }
    for query in ["", "limit=8", "limit=3&offset=2", "limit=100"] {
        let (hit, row) = (app.hit(&ana, &ben, query).await, without.messages(&ana, &ben, query).await);
        assert_eq!(String::from_utf8_lossy(&hit.body), String::from_utf8_lossy(&row.body), "{query}");
        assert_eq!(hit.header("link"), row.header("link"), "{query}");
    }
    assert_eq!(without.metric("chat_cache_lookups_total{outcome=\"hit\"}").await, 0.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_redis_that_lost_its_data_hides_no_message() {
    let one = TestApp::start().await;
    let other = one.replica(&[]).await;
    let (ana, ben) = one.pair().await;
    for number in 1..=12 {
        let writer = if number % 2 == 0 { &one } else { &other };
        one.hit(&ana, &ben, "").await;
        assert_eq!(writer.sent(&ana, &ben, "hello").await["seq"], number);
        one.redis.flush().await;
        for app in [&one, &other, &one] {
            assert_eq!(head(app, &ben, &ana).await, number, "after everything was lost");
        }
        one.hit(&ana, &ben, "").await;
        one.redis.flush().await;
        assert_eq!(writer.sent(&ben, &ana, "hello").await["seq"], number + 1);
        assert_eq!(head(&other, &ben, &ana).await, number + 1);
        assert_eq!(head(&one, &ana, &ben).await, number + 1);
        one.database
            .execute(&format!(
                "DELETE FROM messages WHERE seq > {number}; UPDATE conversations SET last_seq = {number}"
            ))
            .await;
        one.redis.flush().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn reads_never_go_back_in_time_while_redis_keeps_losing_its_data() {
    let one = TestApp::start().await;
    let other = one.replica(&[]).await;
    let (ana, ben) = one.pair().await;
    // For some time after it connects, a replica trusts no lease.
    one.hit(&ana, &ben, "").await;
    other.hit(&ana, &ben, "").await;
    let (acknowledged, shown, done) = (AtomicI64::new(0), AtomicI64::new(0), AtomicBool::new(false));
    let write = async {
        let deadline = Instant::now() + Duration::from_secs(4);
        while Instant::now() < deadline {
            for app in [&one, &other] {
                let message = app.sent(&ana, &ben, "hello").await;
                acknowledged.fetch_max(message["seq"].as_i64().expect("a seq"), Ordering::SeqCst);
            }
            tokio::time::sleep(Duration::from_millis(3)).await;
        }
        done.store(true, Ordering::SeqCst);
    };
    let lose = async {
        let mut pause = 1;
        while !done.load(Ordering::SeqCst) {
            tokio::time::sleep(Duration::from_millis(pause)).await;
            one.redis.flush().await;
            pause = (pause * 7) % 211;
        }
    };
    let read = async |reader: &User, peer: &User| {
        let mut replicas = [&one, &other].into_iter().cycle();
        while let Some(app) = replicas.next().filter(|_| !done.load(Ordering::SeqCst)) {
            let known = acknowledged.load(Ordering::SeqCst).max(shown.load(Ordering::SeqCst));
            let seen = head(app, reader, peer).await;
            assert!(seen >= known, "read {seen} after {known} was acknowledged or shown");
            shown.fetch_max(seen, Ordering::SeqCst);
        }
    };
    tokio::join!(write, lose, read(&ana, &ben), read(&ben, &ana), read(&ana, &ben));
    assert_eq!(head(&one, &ana, &ben).await, acknowledged.load(Ordering::SeqCst));
    for app in [&one, &other] {
        let hits = app.metric("chat_cache_lookups_total{outcome=\"hit\"}").await;
        assert!(hits > 20.0, "the window answered {hits} times only");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_list_without_its_lease_is_not_trusted() {
    let app = TestApp::start().await;
    let (ana, ben) = app.pair().await;
    app.sent_many(&ana, &ben, 3).await;
    let truth = app.hit(&ana, &ben, "").await.json(200);
    // Shows that this list is what a hit shows: the test changes the right key.
    let falsify = async || {
        app.hit(&ana, &ben, "").await;
        let (list, lease) = window_keys(&app).await;
        let head: String = app.redis.run(redis::cmd("LINDEX").arg(&list).arg(0)).await;
        let falsified = head.replace("\"content\":\"3\"", "\"content\":\"never sent\"");
        assert_ne!(falsified, head);
        app.redis.run::<()>(redis::cmd("LSET").arg(&list).arg(0).arg(falsified)).await;
        (list, lease)
    };
    let (_, lease) = falsify().await;
    app.redis.run::<()>(redis::cmd("PERSIST").arg(&lease)).await;
    assert_eq!(app.hit(&ana, &ben, "").await.json(200)[0]["content"], "never sent");
    app.redis.flush().await;

    // A list that lacks its newest message, as when a writer died before it could append: its lease has run out.
    let (list, lease) = {
        app.hit(&ana, &ben, "").await;
        window_keys(&app).await
    };
    app.redis.run::<()>(redis::cmd("LPOP").arg(&list)).await;
    app.redis.run::<()>(redis::cmd("DEL").arg(&lease)).await;
    assert_eq!(app.messages(&ana, &ben, "").await.json(200), truth);

    // A lease for a seq that the list does not have is not trusted either.
    let (list, lease) = {
        app.hit(&ana, &ben, "").await;
        window_keys(&app).await
    };
    app.redis.run::<()>(redis::cmd("PERSIST").arg(&lease)).await;
    app.redis.run::<()>(redis::cmd("LPOP").arg(&list)).await;
    assert_eq!(app.messages(&ana, &ben, "").await.json(200), truth);
    app.redis.run::<()>(redis::cmd("DEL").arg(&list)).await;
    app.redis.run::<()>(redis::cmd("SET").arg(&lease).arg(3)).await;
    assert_eq!(app.messages(&ana, &ben, "").await.json(200), truth);
}

#[tokio::test(flavor = "multi_thread")]
async fn no_window_hides_what_a_read_from_postgres_has_shown() {
    for query in ["before=99", "after=0&limit=100", "offset=0&limit=60"] {
        let one = TestApp::start().await;
        let other = one.replica(&[]).await;
        let (ana, ben) = one.pair().await;
        one.sent_many(&ana, &ben, 3).await;
        one.hit(&ana, &ben, "").await;
        let (_, lease) = window_keys(&one).await;
        one.redis.run::<()>(redis::cmd("PERSIST").arg(&lease)).await;
        // Committed, but its writer has not updated Redis or acknowledged it yet.
        one.database
            .execute(
                "UPDATE conversations SET last_seq = 4;
                 INSERT INTO messages SELECT conversation_id, 4, gen_random_uuid(), sender_id, '4', now()
                 FROM messages WHERE seq = 3",
            )
            .await;
        assert_eq!(one.hit(&ana, &ben, "").await.seqs(), [3, 2, 1], "the window may still be behind");
        assert_eq!(other.seqs(&ben, &ana, query).await, [4, 3, 2, 1], "{query}");
        for app in [&one, &other, &one] {
            assert_eq!(app.seqs(&ana, &ben, "").await, [4, 3, 2, 1], "after {query} has shown it");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_that_starts_does_not_suspend_the_windows() {
    let one = TestApp::start().await;
    let (ana, ben) = one.pair().await;
    one.sent(&ana, &ben, "hello").await;
    let other = one.replica(&[]).await;
    let started = Instant::now();
    for app in [&one, &other] {
        app.hit(&ana, &ben, "").await;
    }
    let suspensions: i64 = sqlx::query_scalar("SELECT count(*) FROM window_suspension")
        .fetch_one(&mut one.database.connect().await)
        .await
        .expect("a count");
    assert_eq!(suspensions, 0);
    assert!(started.elapsed() < Duration::from_secs(5), "no window for {:?}", started.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unused_window_expires() {
    let app = TestApp::with(&[("CACHE_TTL_SECONDS", "2")]).await;
    let (ana, ben) = app.pair().await;
    app.sent_many(&ana, &ben, 3).await;
    app.hit(&ana, &ben, "").await;
    let keys = async || app.redis.run::<Vec<String>>(redis::cmd("KEYS").arg("chat:recent:*")).await;
    assert!(!keys().await.is_empty());
    for key in keys().await {
        let ttl: i64 = app.redis.run(redis::cmd("PTTL").arg(&key)).await;
        assert!((-2..=2000).contains(&ttl) && ttl != -1, "{key} lives for {ttl} ms");
    }
    let started = Instant::now();
    while !keys().await.is_empty() {
        assert!(started.elapsed() < Duration::from_secs(6), "{:?} are still there", keys().await);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(app.seqs(&ana, &ben, "").await, [3, 2, 1]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_window_has_no_more_messages_than_its_limit() {
    let app = TestApp::with(&[("CACHE_WINDOW", "4")]).await;
    let (ana, ben) = app.pair().await;
    app.sent_many(&ana, &ben, 3).await;
    app.hit(&ana, &ben, "limit=3").await;
    app.sent_many(&ana, &ben, 6).await;
    assert_eq!(app.hit(&ana, &ben, "limit=4").await.seqs(), [9, 8, 7, 6]);
    let (list, _) = window_keys(&app).await;
    assert_eq!(app.redis.run::<i64>(redis::cmd("LLEN").arg(&list)).await, 4);
    assert_eq!(app.seqs(&ana, &ben, "limit=100").await, (1..=9).rev().collect::<Vec<_>>());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_window_that_is_written_but_not_read_expires_and_no_key_stays_for_ever() {
    let app = TestApp::with(&[("CACHE_TTL_SECONDS", "2")]).await;
    let (ana, ben) = app.pair().await;
    // A read of the empty conversation makes the first message start the list.
    app.messages(&ana, &ben, "").await.json(200);
    let started = Instant::now();
    let mut expired = false;
    while !expired && started.elapsed() < Duration::from_secs(15) {
        app.sent(&ana, &ben, "written, not read").await;
        let keys: Vec<String> = app.redis.run(redis::cmd("KEYS").arg("chat:*")).await;
        for key in &keys {
            let life: i64 = app.redis.run(redis::cmd("PTTL").arg(key)).await;
            assert_ne!(life, -1, "{key} never expires");
        }
        expired = !keys.iter().any(|key| key.ends_with(":list"));
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert!(expired, "every message keeps the window alive");
}
