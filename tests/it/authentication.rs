//! `Authorization: Bearer`: which tokens are accepted, on every operation that needs one.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use jsonwebtoken::{Algorithm, EncodingKey, Header};
use serde_json::{Value, json};
use uuid::Uuid;

use crate::support::{Operation, Response, SECRET_KEY, TestApp, User, now_seconds, operations};

/// All other operations need a token.
const PUBLIC: [&str; 4] = ["POST /register", "POST /login", "POST /refresh", "GET /healthz"];

fn authenticated() -> Vec<Operation> {
    operations().into_iter().filter(|operation| !PUBLIC.contains(&&*operation.to_string())).collect()
}

/// Sends the operation's example with this header.
async fn ask(app: &TestApp, operation: &Operation, ben: &User, authorization: Option<&str>) -> Response {
    let request = operation.request(app, ben, "hello");
    authorization
        .into_iter()
        .fold(request, |request, value| request.header("authorization", value))
        .response()
        .await
}

fn sign(algorithm: Algorithm, key: &str, claims: &Value) -> String {
    let key = EncodingKey::from_secret(key.as_bytes());
    jsonwebtoken::encode(&Header::new(algorithm), claims, &key).expect("encodes")
}

/// A token for the user, signed with the service's key, that expires at this time.
fn token_until(user: &User, exp: u64) -> String {
    sign(Algorithm::HS256, SECRET_KEY, &json!({"sub": user.id, "iat": exp - 60, "exp": exp}))
}

#[test]
fn the_document_says_of_every_operation_but_the_public_ones_that_it_needs_a_token() {
    let operations = operations();
    let public = operations.iter().filter(|operation| operation.documented.get("security").is_none());
    let public: BTreeSet<_> = public.map(ToString::to_string).collect();
    assert_eq!(public, PUBLIC.map(str::to_owned).into());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_bad_expired_or_foreign_token_is_401_everywhere() {
    let app = TestApp::start().await;
    let (ana, ben) = (app.user("ana").await, app.user("ben").await);
    let hour = now_seconds() + 3600;
    let good = json!({"sub": ana.id, "iat": now_seconds(), "exp": hour});
    let parts: Vec<&str> = ana.token.split('.').collect();
    let [head, body, signature] = parts[..] else { panic!("three parts: {}", ana.token) };
    let others = app.token(&ben.id);
    let bodies_swapped = format!("{head}.{}.{signature}", others.split('.').nth(1).expect("three parts"));
    let bad: Vec<(&str, Option<String>)> = vec![
        ("no header", None),
        ("an empty header", Some(String::new())),
        ("no token", Some("Bearer".to_owned())),
        ("an empty token", Some("Bearer ".to_owned())),
        ("no scheme", Some(ana.token.clone())),
        ("another scheme", Some(format!("Basic {}", ana.token))),
        ("a scheme with more letters", Some(format!("Bearers {}", ana.token))),
        ("garbage", Some("Bearer garbage".to_owned())),
        ("garbage in three parts", Some("Bearer a.b.c".to_owned())),
        ("something after the token", Some(format!("Bearer {} x", ana.token))),
        ("two parts", Some(format!("Bearer {head}.{body}"))),
        ("an empty signature", Some(format!("Bearer {head}.{body}."))),
        ("alg none", Some(format!("Bearer eyJhbGciOiJub25lIn0.{body}."))),
        ("alg none with the signature", Some(format!("Bearer eyJhbGciOiJub25lIn0.{body}.{signature}"))),
        ("another's body", Some(format!("Bearer {bodies_swapped}"))),
        ("another key", Some(format!("Bearer {}", sign(Algorithm::HS256, "another key", &good)))),
        ("another algorithm", Some(format!("Bearer {}", sign(Algorithm::HS512, SECRET_KEY, &good)))),
        ("expired", Some(format!("Bearer {}", token_until(&ana, now_seconds() - 2)))),
        (
            "no exp",
            Some(format!("Bearer {}", sign(Algorithm::HS256, SECRET_KEY, &json!({"sub": ana.id, "iat": 1})))),
        ),
        (
            "no sub",
            Some(format!("Bearer {}", sign(Algorithm::HS256, SECRET_KEY, &json!({"iat": 1, "exp": hour})))),
        ),
        (
            "a sub that is no id",
            Some(format!(
                "Bearer {}",
                sign(Algorithm::HS256, SECRET_KEY, &json!({"sub": "ana", "iat": 1, "exp": hour}))
            )),
        ),
    ];
    for operation in &authenticated() {
        for (what, authorization) in &bad {
            let answer = ask(&app, operation, &ben, authorization.as_deref()).await;
            assert_eq!(answer.status, 401, "{operation} with {what}");
            answer.problem(401);
        }
        // A new one each time, because some operations end its session.
        let answer = ask(&app, operation, &ben, Some(&format!("Bearer {}", app.token(&ana.id)))).await;
        assert_ne!(answer.status, 401, "{operation} with a good token: {answer:?}");
    }
    assert_eq!(app.seqs(&ana, &ben, "").await, [1], "only the good token has sent something");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_name_of_the_scheme_is_accepted_in_any_case() {
    let app = TestApp::start().await;
    let (ana, ben) = (app.user("ana").await, app.user("ben").await);
    for operation in &authenticated() {
        for scheme in ["Bearer", "bearer", "BEARER", "bEaReR"] {
            let answer = ask(&app, operation, &ben, Some(&format!("{scheme} {}", app.token(&ana.id)))).await;
            assert_ne!(answer.status, 401, "{operation} with {scheme}: {answer:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_is_accepted_until_at_most_a_second_after_it_expires() {
    let app = TestApp::start().await;
    let (ana, ben) = (app.user("ana").await, app.user("ben").await);
    let exp = now_seconds() + 2;
    let authorization = format!("Bearer {}", token_until(&ana, exp));
    let answer = app.get("/me").header("authorization", &authorization).response().await;
    assert!(answer.status == 200 || now_seconds() >= exp, "{answer:?}");
    let over = std::time::UNIX_EPOCH + Duration::from_millis(exp * 1000 + 1001);
    tokio::time::sleep(over.duration_since(std::time::SystemTime::now()).unwrap_or_default()).await;
    for operation in &authenticated() {
        ask(&app, operation, &ben, Some(&authorization)).await.problem(401);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_of_the_previous_key_is_accepted_and_new_ones_are_signed_with_the_new_key() {
    let old = TestApp::start().await;
    let (ana, ben) = (old.user("ana").await, old.user("ben").await);
    let new_key = "the key after the rotation, also long";
    let new = old.replica(&[("SECRET_KEY", new_key), ("SECRET_KEY_PREVIOUS", SECRET_KEY)]).await;
    let after = old.replica(&[("SECRET_KEY", new_key)]).await;
    for operation in &authenticated() {
        let old_token = format!("Bearer {}", old.token(&ana.id));
        let new_token = format!("Bearer {}", new.token(&ana.id));
        assert_ne!(ask(&new, operation, &ben, Some(&old_token)).await.status, 401, "{operation}");
        assert_ne!(ask(&after, operation, &ben, Some(&new_token)).await.status, 401, "{operation}");
        ask(&after, operation, &ben, Some(&old_token)).await.problem(401);
        ask(&old, operation, &ben, Some(&new_token)).await.problem(401);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_token_of_a_deleted_user_is_401_even_if_a_window_still_has_its_messages() {
    let app = TestApp::start().await;
    let (ana, ben) = (app.user("ana").await, app.user("ben").await);
    app.sent(&ana, &ben, "hello").await;
    app.hit(&ana, &ben, "").await;
    app.database.execute(&format!("DELETE FROM users WHERE id = '{}'", ana.id)).await;
    let deleted = Instant::now();
    let token = format!("Bearer {}", ana.token);
    for operation in authenticated().iter().filter(|operation| operation.path != "/messages") {
        ask(&app, operation, &ben, Some(&token)).await.problem(401);
    }
    // What replicas know of deleted users is half a second old at most.
    while app.messages(&ana, &ben, "").await.status != 401 {
        assert!(deleted.elapsed() < Duration::from_secs(2), "the window still answers a deleted user");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    app.messages(&ana, &ben, "").await.problem(401);
    // The token of a user that never existed gets the same answer.
    let nobody = format!("Bearer {}", app.token(&Uuid::now_v7().to_string()));
    for operation in &authenticated() {
        ask(&app, operation, &ben, Some(&nobody)).await.problem(401);
    }
    assert_eq!(app.seqs(&ben, &ana, "").await, [1], "the peer keeps the conversation");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bad_token_is_reported_before_a_bad_body_or_query() {
    let app = TestApp::start().await;
    app.post("/send").header("content-type", "text/plain").body("nonsense").response().await.problem(401);
    app.get("/messages?limit=abc").response().await.problem(401);
}
