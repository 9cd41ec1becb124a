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
        assert_eq!(members(&token), ["access_token", "expires_in", "token_type"]);
        assert_eq!(token["token_type"], "bearer");
        assert_eq!(token["expires_in"], seconds);
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
    let mut times = [Vec::new(), Vec::new()];
    for _ in 0..9 {
        for (username, times) in ["ana", "nobody"].into_iter().zip(&mut times) {
            let started = Instant::now();
            app.login(username, "wrong horse battery").await.problem(401);
            times.push(started.elapsed());
        }
    }
    // The fastest of each is disturbed least. Without the hash a login takes a tenth of the time.
    let [wrong, unknown] = times.map(|times| times.into_iter().min().unwrap_or(Duration::ZERO));
    assert!(unknown * 2 > wrong && wrong * 2 > unknown, "wrong password {wrong:?}, unknown user {unknown:?}");
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
