//! Sessions: refresh tokens, logout on every replica, the list of sessions, a changed password.

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::time::sleep;
use uuid::Uuid;

use crate::support::races::{jam, race, rounds, waits_for_statements_in_flight};
use crate::support::{PASSWORD, Response, TestApp, User, members, session, text, together};

/// What a window may go on to answer after a session has ended.
const WINDOW: Duration = Duration::from_secs(1);

async fn refresh(app: &TestApp, token: &str) -> Response {
    app.post("/refresh").json(&json!({"refresh_token": token})).response().await
}

async fn log_in(app: &TestApp, user: &User) -> (User, String) {
    let tokens = app.login(&user.name, PASSWORD).await.json(200);
    (User { token: text(&tokens, "access_token"), ..user.clone() }, text(&tokens, "refresh_token"))
}

async fn me(app: &TestApp, user: &User) -> u16 {
    app.get("/me").by(user).response().await.status
}

async fn end(app: &TestApp, user: &User, path: &str) {
    assert_eq!(app.post(path).by(user).response().await.status, 204, "{path}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refresh_token_is_good_for_one_exchange_and_ten_seconds_more() {
    let app = TestApp::start().await;
    let other = app.replica(&[]).await;
    let (ana, first) = log_in(&app, &app.member().await).await;
    let exchanged = refresh(&app, &first).await.json(200);
    assert_eq!(
        members(&exchanged),
        ["access_token", "expires_in", "refresh_expires_in", "refresh_token", "token_type"]
    );
    let second = text(&exchanged, "refresh_token");
    assert_ne!(first, second);
    // The client may have lost the answer.
    assert_eq!(refresh(&other, &first).await.json(200), exchanged);
    let renewed = User { token: text(&exchanged, "access_token"), ..ana.clone() };
    assert_eq!(session(&renewed.token), session(&ana.token), "the session stays");
    assert_eq!((me(&app, &ana).await, me(&other, &renewed).await), (200, 200));
    let third = text(&refresh(&app, &second).await.json(200), "refresh_token");
    // Two rotations old: someone else has it.
    refresh(&app, &first).await.problem(401);
    for token in [&first, &second, &third] {
        refresh(&other, token).await.problem(401);
    }
    assert_eq!((me(&app, &renewed).await, me(&other, &ana).await), (401, 401));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refresh_token_that_is_used_again_later_ends_its_session_alone() {
    let app = TestApp::start().await;
    let member = app.member().await;
    let (ana, first) = log_in(&app, &member).await;
    let second = text(&refresh(&app, &first).await.json(200), "refresh_token");
    app.database.execute("UPDATE sessions SET last_used_at = last_used_at - interval '11 s'").await;
    refresh(&app, &first).await.problem(401);
    refresh(&app, &second).await.problem(401);
    assert_eq!((me(&app, &ana).await, me(&app, &member).await), (401, 200));
}

#[tokio::test(flavor = "multi_thread")]
async fn of_many_exchanges_at_once_all_answer_the_same_tokens() {
    let app = TestApp::start().await;
    let other = app.replica(&[]).await;
    for _ in 0..10 {
        let (_, token) = log_in(&app, &app.member().await).await;
        let replicas = [&app, &other, &app, &other, &app, &other];
        let answers = together(replicas.map(|replica| refresh(replica, &token))).await;
        let mut bodies: Vec<Value> = answers.iter().map(|answer| answer.json(200)).collect();
        bodies.dedup();
        assert_eq!(bodies.len(), 1, "{bodies:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_refresh_token_is_refused_and_ends_nothing() {
    let app = TestApp::start().await;
    let (ana, token) = log_in(&app, &app.member().await).await;
    for bad in ["", "x", &token[1..], &ana.token, "\u{0}", &"x".repeat(10_000)] {
        refresh(&app, bad).await.problem(401);
    }
    assert_eq!(app.post("/refresh").json(&json!({})).response().await.invalid_fields(), ["refresh_token"]);
    assert_eq!(app.post("/refresh").json(&json!({"refresh_token": 1})).response().await.status, 422);
    refresh(&app, &token).await.json(200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_ends_when_its_refresh_token_was_not_used_for_long() {
    let app = TestApp::with(&[("REFRESH_TOKEN_EXP_DAYS", "2"), ("ACCESS_TOKEN_EXP_MINUTES", "10000")]).await;
    let (ana, token) = log_in(&app, &app.member().await).await;
    app.database.execute("UPDATE sessions SET last_used_at = last_used_at - interval '49 h'").await;
    refresh(&app, &token).await.problem(401);
    // The sweep of another replica finds them when it starts.
    let other = app.replica(&[]).await;
    let deadline = Instant::now() + Duration::from_secs(20);
    while me(&other, &ana).await != 401 {
        assert!(Instant::now() < deadline, "a session was not swept");
        sleep(Duration::from_millis(50)).await;
    }
    let left = app.database.count("SELECT count(*) FROM sessions").await;
    assert_eq!(left, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn after_a_logout_the_token_is_refused_on_every_replica() {
    let app = TestApp::start().await;
    let other = app.replica(&[]).await;
    let (ben, member) = (app.member().await, app.member().await);
    let (ana, refresh_token) = log_in(&app, &member).await;
    app.sent(&ana, &ben, "hello").await;
    app.hit(&ana, &ben, "").await;
    other.hit(&ana, &ben, "").await;
    let mut followers = [app.follow(&ana, None).await, other.follow(&ana, None).await];
    for follower in &mut followers {
        follower.ready().await;
    }
    end(&app, &ana, "/logout").await;
    let ended = Instant::now();
    for replica in [&app, &other] {
        assert_eq!(me(replica, &ana).await, 401);
        replica.send(&ana, &ben, "late").response().await.problem(401);
        for path in ["/conversations", "/sessions", "/stream", &format!("/users/{}", ben.name)] {
            replica.get(path).by(&ana).response().await.problem(401);
        }
        replica.post("/logout-all").by(&ana).response().await.problem(401);
        refresh(replica, &refresh_token).await.problem(401);
    }
    for follower in &mut followers {
        assert_eq!(follower.end().await, "revoked");
    }
    assert!(ended.elapsed() < Duration::from_secs(2), "{:?}", ended.elapsed());
    sleep(WINDOW.saturating_sub(ended.elapsed())).await;
    for replica in [&app, &other] {
        replica.messages(&ana, &ben, "").await.problem(401);
        assert_eq!(me(replica, &member).await, 200, "the other session goes on");
    }
    app.post("/logout").by(&ana).response().await.problem(401);
    assert_eq!(me(&app, &member).await, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_logout_of_all_ends_every_session_also_one_of_a_release_without_sessions() {
    let app = TestApp::start().await;
    let ben = app.member().await;
    let (ana, _) = log_in(&app, &ben).await;
    // Its session is the user's id.
    let old_token = |id: &str| app.token_of(id, Uuid::parse_str(id).expect("an id"));
    let old = User { token: old_token(&ana.id), ..ana.clone() };
    assert_eq!(me(&app, &old).await, 200);
    end(&app, &ana, "/logout-all").await;
    for user in [&ana, &ben, &old] {
        assert_eq!(me(&app, user).await, 401);
    }
    let (again, _) = log_in(&app, &ana).await;
    assert_eq!(me(&app, &again).await, 200);
    let old = app.user("old").await;
    let old = User { token: old_token(&old.id), ..old };
    end(&app, &old, "/logout").await;
    assert_eq!(me(&app, &old).await, 401);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_list_has_the_callers_sessions_with_address_and_agent() {
    let app = TestApp::with(&[("TRUSTED_PROXIES", "127.0.0.1")]).await;
    let (ana, ben) = (app.member().await, app.member().await);
    let body = json!({"username": ana.name, "password": PASSWORD});
    let login = app.post("/login").json(&body).header("user-agent", "ana's phone \u{1f4f1}");
    let phone = login.header("x-forwarded-for", "203.0.113.7").response().await.json(200);
    let phone = User { token: text(&phone, "access_token"), ..ana.clone() };
    let list = app.get("/sessions").by(&phone).response().await.json(200);
    let sessions = list.as_array().expect("an array");
    assert_eq!(sessions.len(), 2, "{list}");
    assert_eq!(
        members(&sessions[0]),
        ["client_address", "created_at", "current", "id", "last_used_at", "user_agent"]
    );
    assert_eq!(text(&sessions[0], "id"), session(&phone.token));
    assert_eq!(sessions[0]["user_agent"], "ana's phone \u{1f4f1}");
    assert_eq!(sessions[0]["client_address"], "203.0.113.7");
    assert_eq!((&sessions[0]["current"], &sessions[1]["current"]), (&json!(true), &json!(false)));
    let delete = |user, id: String| app.request(reqwest::Method::DELETE, &format!("/sessions/{id}")).by(user);
    for id in [session(&ben.token), Uuid::now_v7().to_string(), "phone".to_owned()] {
        delete(&ana, id).response().await.problem(404);
    }
    assert_eq!(delete(&ana, session(&phone.token)).response().await.status, 204);
    assert_eq!((me(&app, &phone).await, me(&app, &ana).await, me(&app, &ben).await), (401, 200, 200));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_changed_password_ends_all_other_sessions() {
    const NEW: &str = "staple of another battery";
    let app = TestApp::start().await;
    let ana = app.member().await;
    let (other, other_refresh) = log_in(&app, &ana).await;
    let change = async |current: Value, new: Value| {
        let body = json!({"current_password": current, "new_password": new});
        app.post("/password").by(&ana).json(&body).response().await
    };
    change(json!("wrong horse battery"), json!(NEW)).await.problem(403);
    // The fields are looked at first.
    assert_eq!(change(json!("wrong"), json!("short")).await.invalid_fields(), ["new_password"]);
    assert_eq!(change(json!(1), Value::Null).await.invalid_fields(), ["current_password", "new_password"]);
    assert_eq!(me(&app, &other).await, 200);
    assert_eq!(change(json!(PASSWORD), json!(NEW)).await.status, 204);
    assert_eq!((me(&app, &ana).await, me(&app, &other).await), (200, 401));
    refresh(&app, &other_refresh).await.problem(401);
    app.login(&ana.name, PASSWORD).await.problem(401);
    app.login(&ana.name, NEW).await.json(200);
    change(json!(PASSWORD), json!(NEW)).await.problem(403);
}

/// A login with the old password either is refused, or its session has ended.
#[tokio::test(flavor = "multi_thread")]
async fn no_login_with_the_old_password_outlives_the_change() {
    let app = TestApp::start().await;
    let other = app.replica(&[]).await;
    for _ in 0..20 {
        let ana = app.member().await;
        let body = json!({"current_password": PASSWORD, "new_password": "staple of another battery"});
        let change = async { app.post("/password").by(&ana).json(&body).response().await };
        let logins = async { together([0; 4].map(|_| other.login(&ana.name, PASSWORD))).await };
        let (changed, logins) = tokio::join!(change, logins);
        assert_eq!(changed.status, 204);
        for login in logins.iter().filter(|login| login.status == 200) {
            let token = text(&login.json(200), "access_token");
            assert_eq!(me(&app, &User { token, ..ana.clone() }).await, 401);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_logout_is_answered_after_every_statement_that_may_not_have_seen_it() {
    let app = TestApp::start().await;
    let other = app.replica(&[]).await;
    let (ana, ben) = (app.member().await, app.member().await);
    app.sent(&ana, &ben, "hello").await;
    let logout = end(&other, &ana, "/logout");
    waits_for_statements_in_flight(&app, [&ana, &ben], logout, "SELECT count(*) FROM ended_sessions").await;
    app.send(&ana, &ben, "after").response().await.problem(401);
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_stored_after_the_answer_to_a_logout() {
    let app = &TestApp::start().await;
    let replicas = [app, &app.replica(&[]).await];
    let (member, ben) = (app.member().await, app.member().await);
    app.sent(&member, &ben, "hello").await;
    tokio::select! {
        () = jam(app) => unreachable!("it never ends"),
        () = log_out_while_sending(&replicas, &member, &ben) => {}
    }
}

async fn log_out_while_sending(replicas: &[&TestApp; 2], member: &User, ben: &User) {
    // Open already: the answer must be compared with what is there at once.
    let mut connection = replicas[0].database.connect().await;
    for round in rounds() {
        let ana = &User { token: replicas[0].token(&member.id), ..member.clone() };
        let logout = end(replicas[round as usize % 2], ana, "/logout");
        race(replicas, &mut connection, [ana, ben], round, logout).await;
    }
}
