//! Times are RFC 3339 in UTC with six digits after the second, and every response has the same bytes for one message.

use serde_json::Value;

use crate::support::{Response, TestApp, text};

/// What Postgres stores, and what clients get.
const TIMES: [(&str, &str); 6] = [
    ("2026-01-31 12:00:00.123456+00", "2026-01-31T12:00:00.123456Z"),
    ("2026-01-31 12:00:00.12345+00", "2026-01-31T12:00:00.123450Z"),
    ("2026-01-31 12:00:00.12+00", "2026-01-31T12:00:00.120000Z"),
    ("2026-01-31 12:00:00.000001+00", "2026-01-31T12:00:00.000001Z"),
    ("2026-01-31 12:00:00+00", "2026-01-31T12:00:00.000000Z"),
    ("2024-02-29 00:30:00+01", "2024-02-28T23:30:00.000000Z"),
];

async fn execute(app: &TestApp, statement: &str) {
    let mut connection = app.database.connect().await;
    sqlx::raw_sql(sqlx::AssertSqlSafe(statement)).execute(&mut connection).await.expect("a valid statement");
}

/// The only message of a page, as it was sent.
fn only_message(page: &Response) -> String {
    let body = page.text(200);
    body.strip_prefix('[').and_then(|body| body.strip_suffix(']')).expect("an array").to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_messages_time_has_six_digits_and_the_same_bytes_in_every_response() {
    let app = TestApp::start().await;
    let without = app.replica(&[("CACHE_WINDOW", "0")]).await;
    for (stored, rendered) in TIMES {
        let (ana, ben) = app.pair().await;
        let send = || app.send(&ana, &ben, "hello").header("idempotency-key", "key").response();
        let id = text(&send().await.json(201), "id");
        execute(&app, &format!("UPDATE messages SET created_at = '{stored}' WHERE id = '{id}'")).await;
        let row = only_message(&without.messages(&ana, &ben, "").await);
        let message: Value = serde_json::from_str(&row).expect("a message");
        assert_eq!(message["created_at"], rendered);
        let replayed = send().await;
        assert_eq!(replayed.header("idempotency-replayed"), Some("true"));
        assert_eq!(replayed.text(201), row, "a replayed 201");
        // The window has the time from before the change.
        app.redis.flush().await;
        assert_eq!(only_message(&app.messages(&ana, &ben, "").await), row, "a read that fills the window");
        assert_eq!(only_message(&app.hit(&ana, &ben, "").await), row, "from the window");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_201_and_both_reads_are_the_same_bytes_at_any_time() {
    let app = TestApp::start().await;
    let without = app.replica(&[("CACHE_WINDOW", "0")]).await;
    let (ana, ben) = app.pair().await;
    app.hit(&ana, &ben, "").await;
    for number in 0..60 {
        let sent = app.send(&ana, &ben, "hello").header("idempotency-key", &number.to_string());
        let sent = sent.response().await.text(201);
        let created_at = text(&serde_json::from_str(&sent).expect("a message"), "created_at");
        assert_eq!(created_at.len(), "2026-01-31T12:00:00.120000Z".len(), "{created_at}");
        assert_eq!(only_message(&app.messages(&ana, &ben, "limit=1").await), sent);
        assert_eq!(only_message(&without.messages(&ana, &ben, "limit=1").await), sent);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_users_time_has_six_digits() {
    let app = TestApp::start().await;
    let ana = app.user("ana").await;
    for (stored, rendered) in TIMES {
        execute(&app, &format!("UPDATE users SET created_at = '{stored}'")).await;
        assert_eq!(app.get("/me").by(&ana).response().await.json(200)["created_at"], rendered);
    }
    // The clock decides, so that one in ten has a last digit of 0.
    for number in 0..30 {
        let user =
            app.register(&format!("user-{number}"), &format!("{number}@example.com"), "long enough").await;
        let created_at = text(&user.json(201), "created_at");
        assert_eq!(created_at.len(), "2026-01-31T12:00:00.120000Z".len(), "{created_at}");
    }
}
