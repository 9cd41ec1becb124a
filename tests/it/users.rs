//! `POST /register`, `GET /me` and `GET /users/{username}`.

use reqwest::Method;
use serde_json::{Value, json};
use time::format_description::well_known::Rfc3339;
use time::{Duration, OffsetDateTime, UtcOffset};

use crate::support::{PASSWORD, TestApp, members, text, together};

#[tokio::test(flavor = "multi_thread")]
async fn a_registration_is_answered_with_201_and_the_user_as_given() {
    let app = TestApp::start().await;
    let user = app.register("Ana.B_c-1", "Ana@Example.com", PASSWORD).await.json(201);
    assert_eq!(members(&user), ["created_at", "email", "id", "username"]);
    assert_eq!(user["username"], "Ana.B_c-1");
    assert_eq!(user["email"], "Ana@Example.com");
    let created_at = OffsetDateTime::parse(&text(&user, "created_at"), &Rfc3339).expect("RFC 3339");
    assert_eq!(created_at.offset(), UtcOffset::UTC);
    assert!((OffsetDateTime::now_utc() - created_at).abs() < Duration::minutes(1), "{created_at}");
    let token = app.token(&text(&user, "id"));
    let me = app.get("/me").header("authorization", &format!("Bearer {token}")).response().await;
    assert_eq!(me.json(200), user, "GET /me is the caller's own user");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_password_is_stored_as_argon2id_and_no_response_has_it_or_its_hash() {
    let app = TestApp::start().await;
    let registered = app.register("ana", "ana@example.com", PASSWORD).await;
    let id = text(&registered.json(201), "id");
    let mut connection = app.database.connect().await;
    let hash: String = sqlx::query_scalar("SELECT password_hash FROM users")
        .fetch_one(&mut connection)
        .await
        .expect("one user");
    assert!(hash.starts_with("$argon2id$v=19$m=19456,t=2,p=1$"), "{hash}");
    let token = format!("Bearer {}", app.token(&id));
    let mut answers = vec![registered, app.login("ana", PASSWORD).await, app.login("ana", "wrong").await];
    answers.push(app.register("ana", "ana@example.com", PASSWORD).await);
    for path in ["/me", "/users/ana"] {
        answers.push(app.get(path).header("authorization", &token).response().await);
    }
    for answer in answers {
        let body = String::from_utf8_lossy(&answer.body).to_lowercase();
        for secret in [PASSWORD, "argon2", "password_hash", &hash.to_lowercase()] {
            assert!(!body.contains(secret), "{secret} in {body}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_username_has_3_to_32_letters_digits_and_marks() {
    let app = TestApp::start().await;
    for (number, good) in ["abc", "A.b_c-9", "000", &"x".repeat(32)].into_iter().enumerate() {
        app.register(good, &format!("{number}@example.com"), PASSWORD).await.json(201);
    }
    for bad in ["", "ab", &"x".repeat(33), "a b", "änne", "a@b", "ana\n", "ana/b", "anna\u{0}", " ana "] {
        let answer = app.register(bad, "somebody@example.com", PASSWORD).await;
        assert_eq!(answer.invalid_fields(), ["username"], "{bad:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_email_is_a_valid_address() {
    let app = TestApp::start().await;
    for (number, good) in
        ["ana@example.com", "a.b+c@mail.example.org", "o'neil@example.com"].into_iter().enumerate()
    {
        app.register(&format!("user{number}"), good, PASSWORD).await.json(201);
    }
    let long = format!("{}@{}.com", "a".repeat(60), "b.".repeat(95) + "b");
    for bad in ["", "ana", "ana@", "@example.com", "Ana <ana@example.com>", "a b@c.de", "a@b@c.de", &long] {
        let answer = app.register("somebody", bad, PASSWORD).await;
        assert_eq!(answer.invalid_fields(), ["email"], "{bad:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_password_has_8_to_128_characters_whatever_their_bytes() {
    let app = TestApp::start().await;
    let goods = ["12345678".to_owned(), "ÄÖÜäöüßß".to_owned(), "🦀".repeat(128), "\0".repeat(8)];
    for (number, good) in goods.iter().enumerate() {
        let name = format!("user{number}");
        app.register(&name, &format!("{name}@example.com"), good).await.json(201);
        app.login(&name, good).await.json(200);
    }
    for bad in ["", "1234567", "ÄÖÜäöüß", &"x".repeat(129)] {
        let answer = app.register("somebody", "somebody@example.com", bad).await;
        assert_eq!(answer.invalid_fields(), ["password"], "{bad:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registration_lists_all_its_errors_at_once() {
    let app = TestApp::start().await;
    let all = ["username", "email", "password"];
    for body in [
        json!({}),
        json!({"username": "a", "email": "b", "password": "c"}),
        json!({"username": 1, "email": null, "password": ["correct horse battery"]}),
        json!({"username": {"a": 1}, "email": true, "unknown": 1}),
    ] {
        let answer = app.post("/register").json(&body).response().await;
        assert_eq!(answer.invalid_fields(), all, "{body}");
    }
    let body = json!({"username": "ana", "email": 1, "password": PASSWORD});
    assert_eq!(app.post("/register").json(&body).response().await.invalid_fields(), ["email"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_username_or_an_email_that_is_taken_in_any_case_is_409() {
    let app = TestApp::start().await;
    app.register("Ana", "Ana@Example.com", PASSWORD).await.json(201);
    for (username, email, word) in [
        ("Ana", "other@example.com", "username"),
        ("aNA", "other@example.com", "username"),
        ("other", "Ana@Example.com", "email"),
        ("other", "aNA@eXAMPLE.COM", "email"),
        ("ANA", "ANA@EXAMPLE.COM", "username"),
    ] {
        let problem = app.register(username, email, PASSWORD).await.problem(409);
        assert!(text(&problem, "detail").contains(word), "{problem}");
    }
    app.register("other", "other@example.com", PASSWORD).await.json(201);
}

#[tokio::test(flavor = "multi_thread")]
async fn of_many_concurrent_registrations_of_one_name_one_succeeds() {
    let app = TestApp::start().await;
    let attempts = (0..8).map(|number| {
        let (app, name) = (&app, ["ana", "ANA"][number % 2]);
        async move { app.register(name, &format!("{number}@example.com"), PASSWORD).await }
    });
    let answers = together(attempts).await;
    let (won, lost): (Vec<_>, Vec<_>) = answers.iter().partition(|answer| answer.status == 201);
    assert_eq!((won.len(), lost.len()), (1, 7));
    lost.iter().for_each(|answer| drop(answer.problem(409)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_user_is_found_by_name_in_any_case_with_id_and_name_only() {
    let app = TestApp::start().await;
    let (ana, ben) = (app.user("Ana").await, app.user("Ben-2.x_y").await);
    for name in ["Ben-2.x_y", "ben-2.x_y", "BEN-2.X_Y"] {
        let found = app.get(&format!("/users/{name}")).by(&ana).response().await.json(200);
        assert_eq!(found, json!({"id": ben.id, "username": "Ben-2.x_y"}));
    }
    let own = app.get("/users/ana").by(&ana).response().await.json(200);
    assert_eq!(own["id"], ana.id);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unknown_name_is_404() {
    let app = TestApp::start().await;
    let ana = app.user("ana").await;
    let long = "x".repeat(2000);
    for name in
        ["nobody", "an", "ana%20", "an%61%00", "%00", "%25", "an_", "%F0%9F%A6%80", "a%2Fna", "%ff", &long]
    {
        let answer = app.get(&format!("/users/{name}")).by(&ana).response().await;
        answer.problem(404);
    }
    // Percent-encoding is only another way to write it.
    let found = app.get("/users/an%61").by(&ana).response().await.json(200);
    assert_eq!(found["username"], "ana");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_may_be_any_json_with_a_charset_and_spaces() {
    let app = TestApp::start().await;
    let body = " { \"username\" : \"an\\u0061\", \"email\":\"ana@example.com\",\"password\":\"12345678\" }\n";
    let request = app.request(Method::POST, "/register").body(body);
    let user: Value =
        request.header("content-type", "Application/JSON; charset=utf-8").response().await.json(201);
    assert_eq!(user["username"], "ana");
}
