//! `POST /login`: tokens for a name and a password.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::support::{PASSWORD, SECRET_KEY, TestApp, claims, members, now_seconds, text, together};

#[tokio::test(flavor = "multi_thread")]
async fn a_login_returns_a_bearer_token_and_its_lifetime_in_seconds() {
    for (minutes, seconds) in [(None, 3600), (Some("2"), 120)] {
        let variables: Vec<_> =
            minutes.map(|minutes| ("ACCESS_TOKEN_EXP_MINUTES", minutes)).into_iter().collect();
        let app = TestApp::with(&variables).await;
        let ana = app.user("Ana").await;
        let before = now_seconds();
        let token = app.login("aNA", PASSWORD).await.json(200);
        assert_eq!(
            members(&token),
            ["access_token", "expires_in", "refresh_expires_in", "refresh_token", "token_type"]
        );
        assert_eq!(token["token_type"], "bearer");
        assert_eq!(token["expires_in"], seconds);
        assert_eq!(token["refresh_expires_in"], 30 * 24 * 3600);
        let access_token = text(&token, "access_token");
        let claims = claims(&access_token, SECRET_KEY);
        assert_eq!(claims["sub"], ana.id);
        let issued_at = claims["iat"].as_u64().expect("iat");
        assert!((before..=now_seconds()).contains(&issued_at), "{claims}");
        assert_eq!(claims["exp"].as_u64(), Some(issued_at + seconds));
        let me = app.get("/me").header("authorization", &format!("Bearer {access_token}")).response().await;
        assert_eq!(me.json(200)["id"], ana.id);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unknown_user_and_a_wrong_password_get_the_same_answer() {
    let app = TestApp::start().await;
    app.user("ana").await;
    let mut answers = Vec::new();
    for (username, password) in [
        ("ana", "wrong horse battery"),
        ("nobody", PASSWORD),
        ("ana", ""),
        ("ana", "short"),
        ("", PASSWORD),
        ("an\0a", PASSWORD),
        ("ana\0", PASSWORD),
        ("not a name", PASSWORD),
        ("ana", &PASSWORD.to_uppercase()),
        ("ana", &"x".repeat(10_000)),
    ] {
        let mut problem = app.login(username, password).await.problem(401);
        problem["request_id"] = Value::Null;
        answers.push(problem);
    }
    answers.dedup();
    assert_eq!(answers.len(), 1, "{answers:#?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unknown_user_takes_as_much_time_as_a_wrong_password() {
    let app = TestApp::start().await;
    app.user("ana").await;
    // The second one is not in NFC, and so is compared in two forms.
    for (password, differ) in [("wrong horse battery", 2.0), ("wrong cafe\u{301} battery", 1.5)] {
        let mut times = [Vec::new(), Vec::new()];
        for _ in 0..15 {
            for (username, times) in ["ana", "nobody"].into_iter().zip(&mut times) {
                let started = Instant::now();
                app.login(username, password).await.problem(401);
                times.push(started.elapsed());
            }
        }
        // The fastest of each is disturbed least. Without the hash a login takes a tenth of the time.
        let [wrong, unknown] = times.map(|times| times.into_iter().min().unwrap_or(Duration::ZERO));
        assert!(
            unknown.mul_f64(differ) > wrong && wrong.mul_f64(differ) > unknown,
            "{password:?}: wrong password {wrong:?}, unknown user {unknown:?}"
        );
    }
}

/// One password as two devices send it, of which one composes characters.
const COMPOSED: &str = "caf\u{e9} \u{ac00}\u{1e69} 1234";
const DECOMPOSED: &str = "cafe\u{301} \u{1100}\u{1161}s\u{307}\u{323} 1234";

#[tokio::test(flavor = "multi_thread")]
async fn a_password_is_the_same_however_a_device_composes_its_characters() {
    let app = TestApp::start().await;
    for (name, registered) in [("ana", COMPOSED), ("ben", DECOMPOSED)] {
        app.register(name, &format!("{name}@example.com"), registered).await.json(201);
        for typed in [COMPOSED, DECOMPOSED] {
            assert_eq!(app.login(name, typed).await.status, 200, "{registered:?}, typed as {typed:?}");
        }
        // Compatibility characters stay what they are.
        app.login(name, &COMPOSED.replace('1', "\u{ff11}")).await.problem(401);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hash_from_before_passwords_were_normalised_still_works() {
    const OF_DECOMPOSED: &str =
        "$argon2id$v=19$m=19456,t=2,p=1$VL/mkTg5xXaeI7Fl5QrCAg$/anlMM4xgjBp90ZIGPmHopCwyFNnVVRJlx6DkGlU+ok";
    let app = TestApp::start().await;
    app.user("ana").await;
    app.database.execute(&format!("UPDATE users SET password_hash = '{OF_DECOMPOSED}'")).await;
    app.login("ana", COMPOSED).await.problem(401);
    app.login("ana", DECOMPOSED).await.json(200);
    app.login("ana", "another cafe\u{301}").await.problem(401);
    app.login("nobody", DECOMPOSED).await.problem(401);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_username_is_not_folded_beyond_ascii() {
    let app = TestApp::start().await;
    let kim = app.user("Kim").await;
    app.login("kIM", PASSWORD).await.json(200);
    // The Kelvin sign, whose lower case is k.
    assert_eq!(app.login("\u{212a}im", PASSWORD).await.status, 401);
    assert_eq!(app.get("/users/%E2%84%AAim").by(&kim).response().await.status, 404);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_login_lists_all_its_errors_at_once() {
    let app = TestApp::start().await;
    for body in
        [json!({}), json!({"username": 1, "password": false}), json!({"username": null, "Password": "x"})]
    {
        let answer = app.post("/login").json(&body).response().await;
        assert_eq!(answer.invalid_fields(), ["username", "password"], "{body}");
    }
    let answer = app.post("/login").json(&json!({"username": "ana"})).response().await;
    assert_eq!(answer.invalid_fields(), ["password"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn while_the_password_queue_is_full_a_login_is_503_at_once() {
    let app = TestApp::start().await;
    app.user("ana").await;
    // Per core, 64 logins wait and one is hashed; all others are refused.
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let logins = 66 * cores + 60;
    let answers = together((0..logins).map(|_| app.login("ana", "wrong horse battery"))).await;
    let mut refused = 0;
    for answer in answers {
        if answer.status == 503 {
            refused += 1;
            answer.problem(503);
        } else {
            answer.problem(401);
        }
    }
    assert!(refused > 0, "{logins} concurrent logins were all accepted");
}
