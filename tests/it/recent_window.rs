//! The recent window in Redis: a read never shows less than was acknowledged, whatever data Redis loses.

use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::time::{Duration, Instant};

use deadpool_redis::redis;

use crate::support::{TestApp, User, together};

/// The key of the only list in the test's Redis.
async fn list_key(app: &TestApp) -> String {
    let keys: Vec<String> = app.redis.run(redis::cmd("KEYS").arg("chat:recent:*:list")).await;
    assert_eq!(keys.len(), 1, "{keys:?}");
    keys[0].clone()
}

/// How many pages Postgres was asked for.
async fn statements(app: &TestApp) -> f64 {
    app.metric("db_client_operation_duration_seconds_count{db_operation_name=\"read_messages\",db_system_name=\"postgresql\"}")
        .await
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
            // Longer than a permission.
            tokio::time::sleep(Duration::from_millis(500)).await;
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
async fn a_list_of_an_earlier_epoch_or_with_a_gap_is_not_used() {
    let app = TestApp::start().await;
    let (ana, ben) = app.pair().await;
    app.sent_many(&ana, &ben, 3).await;
    let truth = app.hit(&ana, &ben, "").await.json(200);
    let falsify = async || {
        let list = list_key(&app).await;
        let head: String = app.redis.run(redis::cmd("LINDEX").arg(&list).arg(0)).await;
        let falsified = head.replace("\"content\":\"3\"", "\"content\":\"never sent\"");
        assert_ne!(falsified, head);
        app.redis.run::<()>(redis::cmd("LSET").arg(&list).arg(0).arg(falsified)).await;
    };
    // Shows that this list is what a hit shows: the test changes the right key.
    falsify().await;
    assert_eq!(app.messages(&ana, &ben, "").await.json(200)[0]["content"], "never sent");
    app.database.execute("UPDATE window_suspension SET epoch = epoch + 1").await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert_eq!(app.messages(&ana, &ben, "").await.json(200), truth);

    // Nor is one that lacks what it should have.
    app.redis.flush().await;
    app.hit(&ana, &ben, "").await;
    let list = list_key(&app).await;
    app.redis.run::<()>(redis::cmd("RPOP").arg(&list)).await;
    assert_eq!(app.messages(&ana, &ben, "").await.json(200), truth);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_window_that_is_read_now_and_then_answers_every_time() {
    let app = TestApp::start().await;
    let (ana, ben) = app.pair().await;
    app.sent_many(&ana, &ben, 3).await;
    app.hit(&ana, &ben, "").await;
    let before = statements(&app).await;
    for query in ["", "limit=2", "offset=1", "after=1", "after=3", "after=0&limit=3", "limit=1"] {
        tokio::time::sleep(Duration::from_millis(1200)).await;
        let answer = app.hit(&ana, &ben, query).await;
        let without = app.replica(&[("CACHE_WINDOW", "0")]).await;
        let row = without.messages(&ana, &ben, query).await;
        assert_eq!(String::from_utf8_lossy(&answer.body), String::from_utf8_lossy(&row.body), "{query}");
        assert_eq!(answer.header("link"), row.header("link"), "{query}");
    }
    assert_eq!(statements(&app).await, before);
    let misses = app.metric("chat_cache_lookups_total{outcome=\"miss\"}").await;
    assert!(misses <= 1.0, "{misses} misses");
}

/// A committed message that its writer has neither appended to the window nor acknowledged.
async fn commit_without_append(app: &TestApp) {
    app.database
        .execute(
            "UPDATE conversations SET last_seq = 4;
             INSERT INTO messages SELECT conversation_id, 4, gen_random_uuid(), sender_id, '4', now()
             FROM messages WHERE seq = 3",
        )
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_window_hides_what_a_read_from_postgres_has_shown() {
    for query in ["before=99", "after=0&limit=100", "offset=0&limit=60"] {
        let one = TestApp::start().await;
        let other = one.replica(&[]).await;
        let (ana, ben) = one.pair().await;
        one.sent_many(&ana, &ben, 3).await;
        one.hit(&ana, &ben, "").await;
        commit_without_append(&one).await;
        assert_eq!(one.hit(&ana, &ben, "").await.seqs(), [3, 2, 1], "the window may still be behind");
        assert_eq!(other.seqs(&ben, &ana, query).await, [4, 3, 2, 1], "{query}");
        for app in [&one, &other, &one] {
            assert_eq!(app.seqs(&ana, &ben, "").await, [4, 3, 2, 1], "after {query} has shown it");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_window_soon_shows_a_message_whose_writer_died() {
    let app = TestApp::start().await;
    let (ana, ben) = app.pair().await;
    app.sent_many(&ana, &ben, 3).await;
    app.hit(&ana, &ben, "").await;
    commit_without_append(&app).await;
    let started = Instant::now();
    while app.seqs(&ana, &ben, "").await != [4, 3, 2, 1] {
        assert!(started.elapsed() < Duration::from_secs(8), "not shown after 8 s");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn of_many_readers_of_a_lost_window_one_asks_postgres() {
    let one = TestApp::start().await;
    let other = one.replica(&[]).await;
    let (ana, ben) = one.pair().await;
    one.sent_many(&ana, &ben, 3).await;
    for app in [&one, &other] {
        app.hit(&ana, &ben, "").await;
    }
    for round in 0..5 {
        let before = statements(&one).await + statements(&other).await;
        one.redis.flush().await;
        let readers = (0..40).map(|reader| {
            let app = if reader % 2 == 0 { &one } else { &other };
            app.seqs(&ana, &ben, "")
        });
        for seqs in together(readers).await {
            assert_eq!(seqs, [3, 2, 1]);
        }
        let asked = statements(&one).await + statements(&other).await - before;
        assert_eq!(asked, 1.0, "round {round}: 40 readers asked Postgres {asked} times");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_user_that_was_deleted_is_refused_within_a_second_although_a_window_could_answer() {
    let one = TestApp::start().await;
    let other = one.replica(&[]).await;
    let (ana, ben) = one.pair().await;
    one.sent_many(&ana, &ben, 3).await;
    for app in [&one, &other] {
        app.hit(&ana, &ben, "").await;
        app.hit(&ben, &ana, "").await;
    }
    // Numbered before, committed after: the order in which deletions commit must not matter.
    let mut early = one.database.connect().await;
    sqlx::raw_sql(sqlx::AssertSqlSafe(format!("BEGIN; DELETE FROM users WHERE id = '{}'", ana.id)))
        .execute(&mut early)
        .await
        .expect("a deletion");
    let (carl, _) = one.pair().await;
    one.database.execute(&format!("DELETE FROM users WHERE id = '{}'", carl.id)).await;
    tokio::time::sleep(Duration::from_millis(600)).await;
    one.hit(&ana, &ben, "").await;
    sqlx::raw_sql("COMMIT").execute(&mut early).await.expect("a commit");
    tokio::time::sleep(Duration::from_secs(1)).await;
    let third = one.replica(&[]).await;
    for app in [&one, &other, &third] {
        assert_eq!(app.messages(&ana, &ben, "").await.status, 401);
        assert_eq!(app.seqs(&ben, &ana, "").await, [3, 2, 1], "peers keep the conversation");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_of_an_older_release_keeps_the_windows_out_of_use() {
    let app = TestApp::start().await;
    let (ana, ben) = app.pair().await;
    app.sent_many(&ana, &ben, 3).await;
    app.hit(&ana, &ben, "").await;
    // As its probes do.
    app.redis.run::<()>(redis::cmd("SET").arg("chat:probe").arg(1)).await;
    tokio::time::sleep(Duration::from_millis(700)).await;
    let before = app.metric("chat_cache_lookups_total{outcome=\"hit\"}").await;
    for _ in 0..5 {
        app.sent(&ana, &ben, "hello").await;
        app.messages(&ana, &ben, "").await.json(200);
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    assert_eq!(app.metric("chat_cache_lookups_total{outcome=\"hit\"}").await, before);
    app.redis.run::<()>(redis::cmd("DEL").arg("chat:probe")).await;
    app.hit(&ana, &ben, "").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn replicas_with_different_redis_use_no_windows_and_show_every_message() {
    let one = TestApp::start().await;
    let (ana, ben) = one.pair().await;
    one.sent(&ana, &ben, "1").await;
    one.hit(&ana, &ben, "").await;
    // A proxy between the two would be another address of the same Redis.
    let scratch = tests::Scratch::new("second-redis").expect("a folder");
    let second = tests::Redis::start(&scratch.path().join("redis"), tests::RedisOptions::default());
    let second = second.expect("a second Redis");
    let other = one.replica(&[("REDIS_URL", &second.url(0))]).await;
    let mut slowest = Duration::ZERO;
    for number in 2..=60 {
        let (writer, reader) = if number % 3 == 0 { (&other, &one) } else { (&one, &other) };
        let started = Instant::now();
        writer.sent(&ana, &ben, &number.to_string()).await;
        slowest = slowest.max(started.elapsed());
        for app in [reader, writer] {
            assert_eq!(head(app, &ben, &ana).await, number);
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert!(slowest < Duration::from_millis(1500), "a message took {slowest:?}");
    // Alone again, one goes on with its own.
    drop(other);
    one.hit(&ana, &ben, "").await;
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
    let suspensions: i64 = sqlx::query_scalar("SELECT count(*) FROM window_suspension WHERE epoch > 1")
        .fetch_one(&mut one.database.connect().await)
        .await
        .expect("a count");
    assert_eq!(suspensions, 0);
    assert!(started.elapsed() < Duration::from_secs(1), "no window for {:?}", started.elapsed());
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
    let list = list_key(&app).await;
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
