//! The page loses its connection, and nothing is lost or doubled.

use fantoccini::key::Key;
use serde_json::{Value, json};
use tests::proxy::{Link, Proxy};
use tokio::runtime::Handle;

use super::browser::Person;
use super::chat::{PASSWORD, logs_in};
use crate::support::TestApp;

pub(super) fn proxy(app: &TestApp) -> Proxy {
    tokio::task::block_in_place(|| Proxy::start(&Handle::current(), app.running.public.port()))
        .expect("a proxy")
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a browser: cargo xtask test"]
async fn what_was_written_and_sent_during_an_outage_is_there_once_after_it() {
    let app = TestApp::start().await;
    let (ana, ben) = app.pair().await;
    let proxy = proxy(&app);
    let person = Person::at(([127, 0, 0, 1], proxy.port()).into()).await;
    logs_in(&person, &ana.token).await;
    person.opens(&ben.name).await;
    person.writes("before").await;
    person.sees_messages(&["before"]).await;
    let sent = "return document.querySelectorAll('#messages time').length";
    person.awaits("it is sent", sent, Value::Null, |count| *count == 1).await;
    person.sees("#connection", "Connected").await;

    proxy.set(Link::Cut);
    let state = "return document.getElementById('connection').dataset.state";
    person.awaits("the outage is shown", state, Value::Null, |state| state == "waiting").await;
    app.sent(&ben, &ana, "from ben, meanwhile").await;
    person.writes("from ana, meanwhile").await;
    let again = "return document.querySelectorAll('#messages .again').length";
    person.awaits("it says that it was not sent", again, Value::Null, |count| *count == 1).await;

    proxy.set(Link::Open);
    person.sees_messages(&["before", "from ben, meanwhile", "from ana, meanwhile"]).await;
    person.clicks("#messages .again").await;
    person.awaits("it is sent", again, Value::Null, |count| *count == 0).await;
    person.sees_messages(&["before", "from ben, meanwhile", "from ana, meanwhile"]).await;
    assert_eq!(app.seqs(&ana, &ben, "").await, [3, 2, 1]);
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a browser: cargo xtask test"]
async fn a_message_whose_answer_was_lost_is_sent_again_under_its_key() {
    let app = TestApp::start().await;
    let (ana, ben) = app.pair().await;
    let proxy = proxy(&app);
    let person = Person::at(([127, 0, 0, 1], proxy.port()).into()).await;
    logs_in(&person, &ana.token).await;
    person.opens(&ben.name).await;
    person.sees("#connection", "Connected").await;

    proxy.set(Link::Muted);
    person.writes("once").await;
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
    while app.seqs(&ana, &ben, "").await != [1] {
        assert!(std::time::Instant::now() < deadline, "the message is not stored");
    }
    proxy.set(Link::Cut);
    let again = "return document.querySelectorAll('#messages .again').length";
    person.awaits("it says that it was not sent", again, Value::Null, |count| *count == 1).await;

    proxy.set(Link::Open);
    person.clicks("#messages .again").await;
    person.sees_messages(&["once"]).await;
    assert_eq!(app.seqs(&ana, &ben, "").await, [1]);
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a browser: cargo xtask test"]
async fn what_was_not_sent_outlives_another_conversation_and_a_reload() {
    let app = TestApp::start().await;
    let (ana, ben) = app.pair().await;
    app.user("cleo").await;
    let person = Person::at(app.running.public).await;
    logs_in(&person, &ana.token).await;
    person.opens(&ben.name).await;
    person.commands("Network.enable", json!({})).await;
    person.commands("Network.setBlockedURLs", json!({"urls": ["*/send"]})).await;
    person.writes("kept").await;
    person.writes("thrown away").await;
    let again = "return document.querySelectorAll('#messages .again').length";
    person.awaits("both failed", again, Value::Null, |count| *count == 2).await;
    person.clicks("#messages li:last-child .discard").await;
    person.opens("cleo").await;
    person.sees_messages(&[""; 0]).await;
    person.opens(&ben.name).await;
    person.sees_messages(&["kept"]).await;

    person.commands("Network.setBlockedURLs", json!({"urls": []})).await;
    person.reloads().await;
    person.sees("#conversations .last", "kept").await;
    person.opens(&ben.name).await;
    person.sees_messages(&["kept"]).await;
    assert_eq!(person.runs(again, Value::Null).await, 0);
    assert_eq!(app.seqs(&ana, &ben, "").await, [1]);
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a browser: cargo xtask test"]
async fn a_browser_that_was_offline_catches_up_at_once() {
    let app = TestApp::start().await;
    let (ana, ben) = app.pair().await;
    app.sent(&ben, &ana, "before").await;
    let person = Person::at(app.running.public).await;
    logs_in(&person, &ana.token).await;
    person.clicks("#conversations button").await;
    person.sees("#connection", "Connected").await;
    person.commands("Network.enable", json!({})).await;
    let conditions = |offline: bool| json!({"offline": offline, "latency": 0, "downloadThroughput": -1, "uploadThroughput": -1});
    person.commands("Network.emulateNetworkConditions", conditions(true)).await;
    person.sees("#connection", "Reconnecting…").await;
    app.sent(&ben, &ana, "meanwhile").await;
    app.sent(&ben, &ana, "and more").await;
    person.commands("Network.emulateNetworkConditions", conditions(false)).await;
    person.sees("#connection", "Connected").await;
    person.sees_messages(&["before", "meanwhile", "and more"]).await;
    // A page that could not load a conversation does so when it is back.
    person.commands("Network.setBlockedURLs", json!({"urls": ["*/messages?*"]})).await;
    person.clicks("#conversations button").await;
    person.types_on(&char::from(Key::Escape).to_string()).await;
    person.clicks("#conversations button").await;
    person.sees("#earlier", "Load messages").await;
    person.commands("Network.setBlockedURLs", json!({"urls": []})).await;
    person.clicks("#earlier").await;
    person.sees_messages(&["before", "meanwhile", "and more"]).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a browser: cargo xtask test"]
async fn what_was_not_sent_when_the_session_ended_is_sent_after_the_next_login() {
    let app = TestApp::start().await;
    let (ana, ben) = app.pair().await;
    let proxy = proxy(&app);
    let person = Person::at(([127, 0, 0, 1], proxy.port()).into()).await;
    logs_in(&person, &ana.token).await;
    person.opens(&ben.name).await;
    person.sees("#connection", "Connected").await;
    // Behind the next connection the token is worth nothing.
    let other = app.replica(&[("SECRET_KEY", "another key for tests, long enough")]).await;
    proxy.set(Link::Cut);
    person.writes("at last").await;
    person.sees("#messages .again", "Send again").await;
    proxy.lead_to(other.running.public.port());
    proxy.set(Link::Open);
    person.sees("#entrance-notice", "Your session has ended. Log in again.").await;

    person.types("#username", &ana.name).await;
    person.types("#password", &format!("{PASSWORD}{}", char::from(Key::Enter))).await;
    person.sees("#conversations .last", "at last").await;
    assert_eq!(app.seqs(&ana, &ben, "").await, [1]);
    // Another user in this tab gets nothing of it.
    person.clicks("#log-out").await;
    person.types("#username", &ben.name).await;
    person.types("#password", &format!("{PASSWORD}{}", char::from(Key::Enter))).await;
    person.sees("#me", &ben.name).await;
    let kept = "return Object.keys(sessionStorage)";
    assert_eq!(person.runs(kept, Value::Null).await, json!(["chat-tokens"]));
}
