//! `POST /register`, `GET /me` and `GET /users/{username}`.

use reqwest::Method;
use serde_json::{Value, json};
use time::format_description::well_known::Rfc3339;
use time::{Duration, OffsetDateTime, UtcOffset};
use uuid::Uuid;

use crate::support::{Database, PASSWORD, TestApp, members, text, together};

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
    let goods = [
        "ana@example.com",
        "a.b+c@mail.example.org",
        "o'neil@example.com",
        // Letters with marks that are no letters themselves: virama, tone mark, nukta, a combining accent.
        "हिन्दी@example.com",
        "ผู้ใช้@example.com",
        "ज़ाहिर@example.com",
        "e\u{301}va@example.com",
        "ana@हिन्दी.example",
        "ana@xn--bcher-kva.example",
    ];
    for (number, good) in goods.into_iter().enumerate() {
        let user = app.register(&format!("user{number}"), good, PASSWORD).await;
        assert_eq!(user.status, 201, "{good}");
        assert_eq!(user.json(201)["email"], good, "as given");
    }
    let long = format!("{}@{}.com", "a".repeat(60), "b.".repeat(95) + "b");
    let bads = [
        "",
        "ana",
        "ana@",
        "@example.com",
        "Ana <ana@example.com>",
        "a b@c.de",
        "a@b@c.de",
        "a\u{200b}b@c.de",
        "a\u{a0}b@c.de",
        "a\u{85}b@c.de",
        "a\0b@c.de",
        "a@c\0.de",
        "a@xn--.de",
        &long,
        &"é".repeat(20_000),
    ];
    for bad in bads {
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
async fn a_passwords_characters_are_counted_in_nfc() {
    let app = TestApp::start().await;
    // U+1FB7 is three characters when it is decomposed.
    let longest = "\u{3b1}\u{342}\u{345}".repeat(128);
    assert_eq!(app.register("ana", "ana@example.com", &longest).await.status, 201);
    app.login("ana", &"\u{1fb7}".repeat(128)).await.json(200);
    for bad in ["e\u{301}".repeat(7), format!("{longest}x"), "e\u{301}\u{302}\u{303}\u{304}".repeat(4000)] {
        let answer = app.register("ben", "ben@example.com", &bad).await;
        assert_eq!(answer.status, 422, "{} characters", bad.chars().count());
        assert_eq!(answer.invalid_fields(), ["password"]);
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

/// Spellings of one address, in pairs.
const ONE_ADDRESS: &[(&str, &str)] = &[
    ("ασ@example.com", "ΑΣ@example.com"),
    ("ας@example.org", "ασ@example.org"),
    ("straße@example.com", "STRASSE@example.com"),
    ("\u{1e9e}a@example.com", "ßa@example.com"),
    ("\u{e9}va@example.com", "E\u{301}VA@example.com"),
    ("\u{fb01}n@example.com", "FIN@example.com"),
    ("\u{13a0}@example.com", "\u{ab70}@example.com"),
    ("ana@bücher.example", "ana@xn--bcher-kva.example"),
    ("ana@MÜLLER.example", "ana@mu\u{308}ller.example"),
    ("ana@ｅｘａｍｐｌｅ.net", "ana@example.net"),
];

#[tokio::test(flavor = "multi_thread")]
async fn one_address_in_another_spelling_is_409() {
    let app = TestApp::start().await;
    for (number, (one, other)) in ONE_ADDRESS.iter().enumerate() {
        let user = app.register(&format!("user{number}"), one, PASSWORD).await.json(201);
        assert_eq!(user["email"], *one, "as given");
        let again = app.register("other", other, PASSWORD).await;
        assert_eq!(again.status, 409, "{other} after {one}");
        assert!(text(&again.problem(409), "detail").contains("email"));
    }
    // Other domains, although they look alike when folded.
    app.register("ana1", "ana@straße.example", PASSWORD).await.json(201);
    app.register("ana2", "ana@strasse.example", PASSWORD).await.json(201);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_address_from_before_it_was_folded_is_409_in_every_spelling() {
    let database = Database::migrated().await;
    // As releases before this one stored them.
    for (number, (one, _)) in ONE_ADDRESS.iter().enumerate() {
        let (id, key) = (Uuid::now_v7(), one.to_lowercase());
        let row = format!("'{id}', 'User{number}', 'user{number}', '{one}', '{key}', 'hash'");
        let columns = "id, username, username_key, email, email_key, password_hash";
        database.execute(&format!("INSERT INTO users ({columns}) VALUES ({row})")).await;
    }
    let app = TestApp::on(database, &[]).await;
    for (one, other) in ONE_ADDRESS {
        for email in [one, other] {
            let again = app.register("other", email, PASSWORD).await;
            assert_eq!(again.status, 409, "{email} after {one}");
        }
    }
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

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_request_leaves_its_answer_to_no_other() {
    let app = TestApp::with(&[("DB_POOL_MAX", "4")]).await;
    let (ana, ben) = app.pair().await;
    for _ in 0..3 {
        let lock = app.database.lock("users IN ACCESS EXCLUSIVE MODE").await;
        let cancelled = (0..6).map(|_| {
            tokio::time::timeout(std::time::Duration::from_millis(200), app.get("/me").by(&ana).response())
        });
        assert!(together(cancelled).await.iter().all(Result::is_err), "a request passed the lock");
        lock.release().await;
        let answers = (0..20).map(|_| app.get("/me").by(&ben).response());
        for answer in together(answers).await {
            assert_eq!(answer.json(200)["id"], ben.id);
        }
    }
}
