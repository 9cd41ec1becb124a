//! The page keeps its session: tokens that are renewed, tabs that share them, and every way in which a session ends.

use std::time::{Duration, Instant};

use reqwest::Method;
use serde_json::{Value, json};
use tests::proxy::Link;

use super::browser::Person;
use super::chat::{PASSWORD, goes_on_with, token_for};
use super::outages::proxy;
use crate::support::{TestApp, User, now_seconds, session, text};

const ENDED: &str = "Your session has ended. Log in again.";
const LOGGED_OUT: &str = "You were logged out: here, on another device, or by a new password. Log in again.";

/// What the tab keeps.
async fn tokens(person: &Person) -> Value {
    person.runs("return JSON.parse(sessionStorage.getItem('chat-tokens'))", Value::Null).await
}

/// The same tokens, which are to be renewed.
fn due(tokens: &Value) -> Value {
    let mut due = tokens.clone();
    due["renewAt"] = json!(0);
    due
}

async fn refreshed(app: &TestApp) -> f64 {
    app.metric("chat_auth_attempts_total{kind=\"refresh\",outcome=\"success\"}").await
}

/// As if every refresh had been so long ago that no used token is taken any more.
async fn let_the_grace_pass(app: &TestApp) {
    app.database.execute("UPDATE sessions SET last_used_at = last_used_at - interval '11 s'").await;
}

/// Waits until this counts so many.
async fn awaits_count(app: &TestApp, sql: &str, count: i64) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while app.database.count(sql).await != count {
        assert!(Instant::now() < deadline, "not {count}: {sql}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

async fn is_accepted(app: &TestApp, tokens: &Value) -> bool {
    let token = text(tokens, "access");
    let user = User { id: String::new(), name: String::new(), token };
    app.get("/me").by(&user).response().await.status == 200
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a browser: cargo xtask test"]
async fn a_stream_whose_token_expires_goes_on_with_new_ones_and_shows_each_message_once() {
    let app = TestApp::start().await;
    let ben = app.user("ben").await;
    let person = Person::at(app.running.public).await;
    person.registers("ana").await;
    let first = tokens(&person).await;
    let access = text(&first, "access");
    let me = app.get("/me").by(&User { token: access.clone(), ..ben.clone() }).response().await.json(200);
    let ana = User { id: text(&me, "id"), name: "ana".to_owned(), token: access.clone() };
    app.sent(&ben, &ana, "0").await;
    // The page believes that it lives for an hour.
    let mut short = first.clone();
    short["access"] = json!(token_for(&ana.id, &session(&access), 4));
    goes_on_with(&person, &short).await;
    person.clicks("#conversations button").await;
    person.sees("#connection", "Connected").await;
    let last = 80;
    for number in 1..=last {
        app.sent(&ben, &ana, &number.to_string()).await;
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    person.sees_messages(&(0..=last).map(|number| number.to_string()).collect::<Vec<_>>()).await;
    assert_eq!(refreshed(&app).await, 1.0);
    let renewed = tokens(&person).await;
    assert!(renewed["access"] != short["access"] && renewed["refresh"] != first["refresh"], "{renewed}");
    assert_eq!(session(&text(&renewed, "access")), session(&access));
}

/// The module with a clock that can be put forward, and a session.
const MODULE: &str = "
    const { ChatClient } = await import('./page/chat-client.js');
    window.ahead = 0;
    window.chat = new ChatClient(document.baseURI, { now: () => Date.now() + window.ahead });
    await chat.login('ana', arguments[0]);
    return chat.tokens;
";

/// Puts the clock to where the tokens are to be renewed, or a second before, and asks for the user.
const ASK: &str = "
    window.ahead = chat.tokens.renewAt - Date.now() + arguments[0];
    await chat.me();
    return chat.tokens;
";

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a browser: cargo xtask test"]
async fn tokens_are_renewed_before_they_expire() {
    let app = TestApp::with(&[("ACCESS_TOKEN_EXP_MINUTES", "1")]).await;
    let ana = app.user("ana").await;
    let person = Person::at(app.running.public).await;
    let first = person.runs_async(MODULE, json!(PASSWORD)).await;
    assert_eq!(first["expiresAt"].as_i64().zip(first["renewAt"].as_i64()).map(|(e, r)| e - r), Some(15_000));
    assert_eq!(person.runs_async(ASK, json!(-1000)).await, first);
    let second = person.runs_async(ASK, json!(0)).await;
    // An access token that was issued in the same second is the same.
    assert_ne!(first["refresh"], second["refresh"]);
    assert_eq!((first["id"].clone(), refreshed(&app).await), (second["id"].clone(), 1.0));
    // Many requests at once need one exchange.
    let many = "window.ahead = 3600000;
        const all = await Promise.allSettled(Array.from({ length: 20 }, () => chat.me()));
        return all.filter((one) => one.status === 'fulfilled').length";
    assert_eq!(person.runs_async(many, Value::Null).await, 20);
    assert_eq!(refreshed(&app).await, 2.0);
    // A clock that is wrong does no harm: a 401 says that the token is of no use.
    let short = token_for(&ana.id, &session(&text(&second, "access")), 0);
    let wrong = "window.ahead = 0; chat.tokens = { ...chat.tokens, access: arguments[0], renewAt: Infinity };
        await chat.me(); return chat.tokens.access !== arguments[0]";
    tokio::time::sleep(Duration::from_millis(2100)).await;
    assert_eq!(person.runs_async(wrong, json!(short)).await, true);
    assert_eq!(refreshed(&app).await, 3.0);
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a browser: cargo xtask test"]
async fn a_refresh_whose_answer_is_lost_is_repeated_with_the_same_token() {
    let app = TestApp::start().await;
    app.user("ana").await;
    let proxy = proxy(&app);
    let person = Person::at(([127, 0, 0, 1], proxy.port()).into()).await;
    person.runs_async(MODULE, json!(PASSWORD)).await;
    proxy.set(Link::Muted);
    let ask =
        "ahead = chat.tokens.renewAt - Date.now(); window.answer = chat.me().then(() => 'answered', String)";
    person.runs(ask, Value::Null).await;
    awaits_count(&app, "SELECT count(*) FROM sessions WHERE previous_hash IS NOT NULL", 1).await;
    // The exchange has happened, and the client knows nothing of it.
    proxy.set(Link::Cut);
    // Connections see the last state alone.
    tokio::time::sleep(Duration::from_millis(200)).await;
    proxy.set(Link::Open);
    assert_eq!(person.runs_async("return await window.answer", Value::Null).await, "answered");
    assert_eq!(refreshed(&app).await, 2.0);
    // It has the newest tokens: later they are exchanged, and the session lives.
    let_the_grace_pass(&app).await;
    person.runs_async(ASK, json!(0)).await;
    assert_eq!(refreshed(&app).await, 3.0);
    assert_eq!(app.database.count("SELECT count(*) FROM sessions").await, 1);
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a browser: cargo xtask test"]
async fn two_tabs_of_a_session_renew_its_tokens_once_and_both_go_on() {
    let app = TestApp::start().await;
    let person = Person::at(app.running.public).await;
    person.registers("ana").await;
    let first = tokens(&person).await;
    let one = person.tab().await;
    let other = person.opens_tab(app.running.public).await;
    goes_on_with(&person, &first).await;
    person.sees("#connection", "Connected").await;

    // Both at once.
    let mut seen = vec![text(&first, "refresh")];
    for round in 1..=3 {
        let race = "sessionStorage.setItem('chat-tokens', JSON.stringify(arguments[0].tokens));
                    setTimeout(() => location.reload(), arguments[0].at - Date.now())";
        let at = 1000 * (now_seconds() + 2);
        let tokens_now = due(&tokens(&person).await);
        for tab in [&one, &other] {
            person.goes_to_tab(tab).await;
            person.runs(race, json!({"tokens": tokens_now, "at": at})).await;
        }
        tokio::time::sleep(Duration::from_secs(3)).await;
        for tab in [&one, &other] {
            person.goes_to_tab(tab).await;
            person.sees("#connection", "Connected").await;
            seen.push(text(&tokens(&person).await, "refresh"));
        }
        assert_eq!(refreshed(&app).await, f64::from(round));
    }
    seen.dedup();
    assert_eq!(seen.len(), 4, "{seen:?}");

    // A tab that slept meanwhile has used tokens. It asks before it uses them again, which would end the session.
    let_the_grace_pass(&app).await;
    goes_on_with(&person, &due(&first)).await;
    person.sees("#connection", "Connected").await;
    assert_eq!(text(&tokens(&person).await, "refresh"), seen[3]);
    assert_eq!(refreshed(&app).await, 3.0);

    // What ends the session of one ends that of the other.
    person.clicks("#log-out").await;
    person.goes_to_tab(&one).await;
    person.sees("#entrance-notice", LOGGED_OUT).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a browser: cargo xtask test"]
async fn logging_out_ends_the_session_on_the_service_and_here_also_without_the_service() {
    let app = TestApp::start().await;
    let person = Person::at(app.running.public).await;
    person.registers("ana").await;
    let kept = tokens(&person).await;
    assert!(is_accepted(&app, &kept).await);
    person.clicks("#log-out").await;
    person.sees("#enter", "Log in").await;
    awaits_count(&app, "SELECT count(*) FROM sessions", 0).await;
    assert!(!is_accepted(&app, &kept).await);
    let body = json!({"refresh_token": kept["refresh"]});
    app.post("/refresh").json(&body).response().await.problem(401);
    assert_eq!(tokens(&person).await, Value::Null);
    assert_eq!(person.log().await, Vec::<String>::new());

    person.logs_in("ana").await;
    person.commands("Network.enable", json!({})).await;
    person.commands("Network.setBlockedURLs", json!({"urls": ["*/logout"]})).await;
    person.clicks("#log-out").await;
    let notice =
        "You are logged out here, but the service could not be reached: there your session has not ended.";
    person.sees("#entrance-notice", notice).await;
    assert_eq!(tokens(&person).await, Value::Null);
    assert_eq!(app.database.count("SELECT count(*) FROM sessions").await, 1);
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a browser: cargo xtask test"]
async fn a_session_that_ends_elsewhere_leads_to_the_entrance_which_says_why() {
    let app = TestApp::start().await;
    let person = Person::at(app.running.public).await;
    person.registers("ana").await;
    let left = "return [sessionStorage.length, document.querySelectorAll('#conversations li').length]";
    let other = User {
        id: String::new(),
        name: "ana".to_owned(),
        token: text(&app.login("ana", PASSWORD).await.json(200), "access_token"),
    };
    assert_eq!(app.post("/logout-all").by(&other).response().await.status, 204);
    person.sees("#entrance-notice", LOGGED_OUT).await;
    assert_eq!(person.runs(left, Value::Null).await, json!([0, 0]));

    // A refresh token that is refused.
    person.logs_in("ana").await;
    let mut refused = due(&tokens(&person).await);
    refused["refresh"] = json!("of another service");
    goes_on_with(&person, &refused).await;
    person.sees("#entrance-notice", ENDED).await;
    assert_eq!(person.runs(left, Value::Null).await, json!([0, 0]));

    person.logs_in("ana").await;
    app.database.execute("DELETE FROM users WHERE username = 'ana'").await;
    person.sees("#entrance-notice", "This account was deleted.").await;
    assert_eq!(person.runs(left, Value::Null).await, json!([0, 0]));
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a browser: cargo xtask test"]
async fn erased_messages_a_deleted_peer_and_a_refused_message_are_shown_as_such() {
    let app = TestApp::start().await;
    let (ana, ben) = (app.member().await, app.member().await);
    app.sent(&ben, &ana, "secret").await;
    app.sent(&ana, &ben, "mine").await;
    let person = Person::at(app.running.public).await;
    super::chat::logs_in(&person, &ana.token).await;
    person.clicks("#conversations button").await;
    person.sees_messages(&["secret", "mine"]).await;
    person.sees("#connection", "Connected").await;
    let block = app.request(Method::PUT, &format!("/blocks/{}", ana.id)).by(&ben);
    assert_eq!(block.response().await.status, 204);
    person.writes("too late").await;
    let refused = "Not sent: You cannot write to this person.Send againDiscard";
    let shown = "return document.querySelector('#messages .unsent')?.textContent ?? null";
    person.awaits("the message is refused", shown, Value::Null, |shown| shown == refused).await;
    person.clicks("#messages .discard").await;
    let deletion = app.request(Method::DELETE, "/me").by(&ben).json(&json!({"password": PASSWORD}));
    assert_eq!(deletion.response().await.status, 202);
    // The stream says that messages were erased.
    person.sees_messages(&["Message erased", "mine"]).await;
    person.sees("#peer", "Deleted user").await;
    person.sees("#conversations .name", "Deleted user").await;
    assert_eq!(person.runs("return document.getElementById('write-form').hidden", Value::Null).await, true);
    let left = "return document.body.textContent.includes('secret')";
    assert_eq!(person.runs(left, Value::Null).await, false);
}
