//! The page loses its connection, and nothing is lost or doubled.

use tests::proxy::{Link, Proxy};
use tokio::runtime::Handle;

use super::browser::Person;
use super::chat::logs_in;
use crate::support::TestApp;

fn proxy(app: &TestApp) -> Proxy {
    tokio::task::block_in_place(|| Proxy::start(&Handle::current(), app.running.public.port()))
        .expect("a proxy")
}

#[tokio::test(flavor = "multi_thread")]
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
    person.awaits("it is sent", sent, ().into(), |count| *count == 1).await;
    person.sees("#connection", "Connected").await;

    proxy.set(Link::Cut);
    let state = "return document.getElementById('connection').dataset.state";
    person.awaits("the outage is shown", state, ().into(), |state| state == "waiting").await;
    app.sent(&ben, &ana, "from ben, meanwhile").await;
    person.writes("from ana, meanwhile").await;
    let again = "return document.querySelectorAll('#messages .unsent button').length";
    person.awaits("it says that it was not sent", again, ().into(), |count| *count == 1).await;

    proxy.set(Link::Open);
    person.sees_messages(&["before", "from ben, meanwhile", "from ana, meanwhile"]).await;
    person.clicks("#messages .unsent button").await;
    person.awaits("it is sent", again, ().into(), |count| *count == 0).await;
    person.sees_messages(&["before", "from ben, meanwhile", "from ana, meanwhile"]).await;
    assert_eq!(app.seqs(&ana, &ben, "").await, [3, 2, 1]);
    person.leaves().await;
}

#[tokio::test(flavor = "multi_thread")]
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
    let again = "return document.querySelectorAll('#messages .unsent button').length";
    person.awaits("it says that it was not sent", again, ().into(), |count| *count == 1).await;

    proxy.set(Link::Open);
    person.clicks("#messages .unsent button").await;
    person.sees_messages(&["once"]).await;
    assert_eq!(app.seqs(&ana, &ben, "").await, [1]);
    person.leaves().await;
}
