//! `Authorization: Bearer`: who gets past it, on every endpoint that asks for it.

use std::time::{Duration, Instant};

use jsonwebtoken::{Algorithm, EncodingKey, Header};
use reqwest::Method;
use serde_json::{Value, json};
use uuid::Uuid;

use crate::support::{Answer, SECRET_KEY, TestApp, User, now_seconds, text};

/// Every endpoint that needs a token.
const AUTHENTICATED: [&str; 4] = ["GET /me", "GET /users/ben", "POST /send", "GET /messages"];

/// Asks `endpoint` with this header, and with everything else as it should be.
async fn ask(app: &TestApp, endpoint: &str, ben: &str, authorization: Option<&str>) -> Answer {
    let (method, path) = endpoint.split_once(' ').expect("a method and a path");
    let path = if path == "/messages" { format!("/messages?peer_id={ben}") } else { path.to_owned() };
    let mut call = app.request(Method::from_bytes(method.as_bytes()).expect("a method"), &path);
    if method == "POST" {
        call = call.json(&json!({"recipient_id": ben, "content": "hello"}));
    }
    if let Some(authorization) = authorization {
        call = call.header("authorization", authorization);
    }
    call.answer().await
}

fn sign(algorithm: Algorithm, key: &str, claims: &Value) -> String {
    let key = EncodingKey::from_secret(key.as_bytes());
    jsonwebtoken::encode(&Header::new(algorithm), claims, &key).expect("encodes")
}

/// A token of this service's key for the user, that ends then.
fn token_until(user: &User, exp: u64) -> String {
    sign(Algorithm::HS256, SECRET_KEY, &json!({"sub": user.id, "iat": exp - 60, "exp": exp}))
}

#[tokio::test(flavor = "multi_thread")]
async fn the_document_and_these_tests_agree_on_who_needs_a_token() {
    let document: Value = serde_json::from_str(
        &chat_service::http::routes::PublicApi::new().document_json().expect("a document"),
    )
    .expect("JSON");
    let mut secured = Vec::new();
    for (path, item) in document["paths"].as_object().expect("paths") {
        for (method, operation) in item.as_object().expect("operations") {
            if operation.get("security").is_some() {
                secured.push(format!("{} {}", method.to_uppercase(), path.replace("{username}", "ben")));
            }
        }
    }
    secured.sort();
    let mut tested = AUTHENTICATED.to_vec();
    tested.sort_unstable();
    assert_eq!(secured, tested);
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
    for endpoint in AUTHENTICATED {
        for (what, authorization) in &bad {
            let answer = ask(&app, endpoint, &ben.id, authorization.as_deref()).await;
            assert_eq!(answer.status, 401, "{endpoint} with {what}");
            answer.problem(401);
        }
        let answer = ask(&app, endpoint, &ben.id, Some(&format!("Bearer {}", ana.token))).await;
        assert!(answer.status < 300, "{endpoint} with a good token: {answer:?}");
    }
    assert_eq!(app.seqs(&ana, &ben, "").await, [1], "only the good token has sent something");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_schemes_name_is_taken_in_any_case() {
    let app = TestApp::start().await;
    let (ana, ben) = (app.user("ana").await, app.user("ben").await);
    for endpoint in AUTHENTICATED {
        for scheme in ["Bearer", "bearer", "BEARER", "bEaReR"] {
            let answer = ask(&app, endpoint, &ben.id, Some(&format!("{scheme} {}", ana.token))).await;
            assert!(answer.status < 300, "{endpoint} with {scheme}: {answer:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_is_good_until_it_expires_and_no_longer_than_a_second_after() {
    let app = TestApp::start().await;
    let (ana, ben) = (app.user("ana").await, app.user("ben").await);
    let exp = now_seconds() + 2;
    let authorization = format!("Bearer {}", token_until(&ana, exp));
    let answer = ask(&app, "GET /me", &ben.id, Some(&authorization)).await;
    assert!(answer.status == 200 || now_seconds() >= exp, "{answer:?}");
    let over = std::time::UNIX_EPOCH + Duration::from_millis(exp * 1000 + 1001);
    tokio::time::sleep(over.duration_since(std::time::SystemTime::now()).unwrap_or_default()).await;
    for endpoint in AUTHENTICATED {
        ask(&app, endpoint, &ben.id, Some(&authorization)).await.problem(401);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_of_the_previous_key_is_still_good_and_new_ones_have_the_new_key() {
    let old = TestApp::start().await;
    let (ana, ben) = (old.user("ana").await, old.user("ben").await);
    let new_key = "the key after the rotation, also long";
    let new = old.replica(&[("SECRET_KEY", new_key), ("SECRET_KEY_PREVIOUS", SECRET_KEY)]).await;
    let after = old.replica(&[("SECRET_KEY", new_key)]).await;
    let old_token = format!("Bearer {}", ana.token);
    let new_token = format!("Bearer {}", new.token(&ana.id));
    for endpoint in AUTHENTICATED {
        assert!(ask(&new, endpoint, &ben.id, Some(&old_token)).await.status < 300, "{endpoint}");
        assert!(ask(&after, endpoint, &ben.id, Some(&new_token)).await.status < 300, "{endpoint}");
        ask(&after, endpoint, &ben.id, Some(&old_token)).await.problem(401);
        ask(&old, endpoint, &ben.id, Some(&new_token)).await.problem(401);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_token_of_a_deleted_user_is_401_also_after_it_filled_the_window() {
    let app = TestApp::start().await;
    let (ana, ben) = (app.user("ana").await, app.user("ben").await);
    app.sent(&ana, &ben, "hello").await;
    app.hit(&ana, &ben, "").await;
    app.database.execute(&format!("DELETE FROM users WHERE id = '{}'", ana.id)).await;
    let deleted = Instant::now();
    let token = format!("Bearer {}", ana.token);
    for endpoint in AUTHENTICATED.into_iter().filter(|endpoint| *endpoint != "GET /messages") {
        ask(&app, endpoint, &ben.id, Some(&token)).await.problem(401);
    }
    // A lease that was granted before may be used up: that is a second at the most.
    while ask(&app, "GET /messages", &ben.id, Some(&token)).await.status != 401 {
        assert!(deleted.elapsed() < Duration::from_secs(2), "the window still answers a deleted user");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    ask(&app, "GET /messages", &ben.id, Some(&token)).await.problem(401);
    // Somebody who never was is not told apart.
    let nobody = format!("Bearer {}", app.token(&Uuid::now_v7().to_string()));
    for endpoint in AUTHENTICATED {
        ask(&app, endpoint, &ben.id, Some(&nobody)).await.problem(401);
    }
    let answer = app.messages(&ben, &ana, "").await;
    assert!(text(&answer.problem(404), "detail").contains("peer_id"), "the peer is gone too");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bad_token_is_told_before_a_bad_body_or_query() {
    let app = TestApp::start().await;
    app.post("/send").header("content-type", "text/plain").body("nonsense").answer().await.problem(401);
    app.get("/messages?limit=abc").answer().await.problem(401);
}
