//! Two people chat on the page.

use std::time::{SystemTime, UNIX_EPOCH};

use fantoccini::key::Key;
use jsonwebtoken::{EncodingKey, Header};
use serde_json::{Value, json};
use uuid::Uuid;

use super::browser::Person;
use crate::support::{PrefixProxy, SECRET_KEY, TestApp};

pub(super) use crate::support::PASSWORD;

const ENTER: char = '\u{e007}';
const TAB: char = '\u{e004}';

/// Lets a person go on as this user, with an access token alone.
pub(super) async fn logs_in(person: &Person, token: &str) {
    goes_on_with(person, &json!({"access": token})).await;
}

/// Loads the page again, with these tokens.
pub(super) async fn goes_on_with(person: &Person, tokens: &Value) {
    let keep = "sessionStorage.setItem('chat-tokens', JSON.stringify(arguments[0]))";
    person.runs(keep, tokens.clone()).await;
    person.reloads().await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a browser: cargo xtask test"]
async fn two_people_chat_reload_and_log_out() {
    let app = TestApp::start().await;
    let (ana, ben) = tokio::join!(Person::at(app.running.public), Person::at(app.running.public));
    tokio::join!(ana.registers("ana"), ben.registers("ben"));
    ana.opens("ben").await;
    ana.writes("Hello, Ben!").await;
    ana.writes("مرحبا 👋").await;
    ben.sees("#conversations .name", "ana").await;
    ben.sees("#conversations .new", "2\nnew").await;
    ben.sees("#conversations .last", "مرحبا 👋").await;
    ben.clicks("#conversations button").await;
    ben.sees_messages(&["Hello, Ben!", "مرحبا 👋"]).await;
    ben.writes("Hello, Ana!").await;
    ana.sees_messages(&["Hello, Ben!", "مرحبا 👋", "Hello, Ana!"]).await;
    // A screen reader reads what arrives, and nothing else of the history.
    ana.sees_text("#announcer", "ben: Hello, Ana!").await;
    let directions = "return [...document.querySelectorAll('#messages .text')].map((one) => getComputedStyle(one).direction)";
    assert_eq!(ana.runs(directions, Value::Null).await, json!(["ltr", "rtl", "ltr"]));

    // The session and what was seen outlive a reload.
    ben.reloads().await;
    ben.sees("#connection", "Connected").await;
    ben.sees("#conversations .last", "Hello, Ana!").await;
    assert_eq!(ben.runs("return document.querySelectorAll('.new').length", Value::Null).await, 0);
    ana.writes("Are you still there?").await;
    ben.sees("#conversations .new", "1\nnew").await;
    ben.sees_text("#announcer", "New message from ana").await;

    // Nothing comes from outside, and no address has the token in it.
    let outside = "return performance.getEntriesByType('resource').map((one) => one.name).filter((name) =>
        !name.startsWith(location.origin) ||
        ['access', 'refresh'].some((kind) => name.includes(JSON.parse(sessionStorage.getItem('chat-tokens'))[kind])))";
    assert_eq!(ben.runs(outside, Value::Null).await, json!([]));

    // After logging out nothing is left of it, also not behind a reload.
    ben.clicks("#log-out").await;
    ben.reloads().await;
    ben.sees("#enter", "Log in").await;
    let left = "return [sessionStorage.length, document.querySelectorAll('#conversations li').length]";
    assert_eq!(ben.runs(left, Value::Null).await, json!([0, 0]));
    assert_eq!(ana.log().await, Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a browser: cargo xtask test"]
async fn a_hostile_message_is_text() {
    let app = TestApp::start().await;
    let (ana, ben) = app.pair().await;
    let hostile = [
        "<img src=x onerror=\"window.hacked = 1\"><script>window.hacked = 2</script>",
        "javascript:window.hacked=3//</textarea></ol><svg onload=window.hacked=4>",
        "\u{202e}txet desrever\u{202c} \"&lt;b&gt;\"",
    ];
    for content in hostile {
        app.sent(&ana, &ben, content).await;
    }
    let person = Person::at(app.running.public).await;
    logs_in(&person, &ben.token).await;
    person.clicks("#conversations button").await;
    person.sees_messages(&hostile).await;
    let found = "return [window.hacked ?? null, document.querySelectorAll('#chat img, #chat script, #chat svg').length]";
    assert_eq!(person.runs(found, Value::Null).await, json!([null, 0]));
    assert_eq!(person.log().await, Vec::<String>::new());
    // The policy holds: what the page never does would not work either.
    let markup = "try { document.body.insertAdjacentHTML('beforeend', '<img src=x>'); return 'done' } \
                  catch (error) { return error.name }";
    assert_eq!(person.runs(markup, Value::Null).await, "TypeError");
}

/// A token that expires in so many seconds.
pub(super) fn token_for(user: &str, session: &str, seconds: u64) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("a time").as_secs();
    let claims = json!({"sub": user, "sid": session, "iat": now - 60, "exp": now + seconds});
    let key = EncodingKey::from_secret(SECRET_KEY.as_bytes());
    jsonwebtoken::encode(&Header::default(), &claims, &key).expect("a token")
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a browser: cargo xtask test"]
async fn an_expired_token_leads_back_to_the_entrance() {
    let app = TestApp::start().await;
    let (ana, _) = app.pair().await;
    let person = Person::at(app.running.public).await;
    logs_in(&person, &token_for(&ana.id, &Uuid::new_v4().to_string(), 3)).await;
    person.sees("#entrance-notice", "Your session has ended. Log in again.").await;
    assert_eq!(person.runs("return sessionStorage.length", Value::Null).await, 0);
    // It has expired before the page is loaded.
    logs_in(&person, "no.token.any-more").await;
    person.sees("#entrance-notice", "Your session has ended. Log in again.").await;
    assert_eq!(person.runs("return sessionStorage.length", Value::Null).await, 0);
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a browser: cargo xtask test"]
async fn a_person_needs_no_mouse() {
    let app = TestApp::start().await;
    app.user("ben").await;
    app.user("ana").await;
    let person = Person::at(app.running.public).await;
    // The focus is where one begins: the name.
    person.types_on(&format!("ana{TAB}")).await;
    person.types_on(&format!("wrong password{ENTER}")).await;
    person.sees("#entrance-notice", "wrong username or password").await;
    person.types("#password", &format!("{}{PASSWORD}{ENTER}", "\u{e003}".repeat(20))).await;
    person.sees("#connection", "Connected").await;
    person.types_on(&format!("nobody{ENTER}")).await;
    person.sees("#find-fault", "There is no user nobody.").await;
    person.types_on(&format!("{}ben{ENTER}", "\u{e003}".repeat(10))).await;
    person.sees("#peer", "ben").await;
    person.types_on(&format!("By keyboard{ENTER}")).await;
    person.sees("#conversations .last", "By keyboard").await;
    person.types_on(&char::from(Key::Escape).to_string()).await;
    person.sees("#peer", "No conversation is open").await;
    person.types_on(&ENTER.to_string()).await;
    person.sees_messages(&["By keyboard"]).await;
    // Whatever can be used has a name for a screen reader.
    let nameless =
        "return [...document.querySelectorAll('button, input, textarea, nav, [role=log]')].filter((one) =>
        !(one.labels?.length || one.ariaLabel || one.textContent.trim()))
        .map((one) => one.outerHTML)";
    assert_eq!(person.runs(nameless, Value::Null).await, json!([]));
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a browser: cargo xtask test"]
async fn the_page_fits_a_narrow_screen_and_the_dark() {
    let app = TestApp::start().await;
    let (ana, ben) = app.pair().await;
    app.sent_many(&ben, &ana, 30).await;
    app.sent(&ben, &ana, &"averylongwordwithoutanyspace".repeat(20)).await;
    let person = Person::at(app.running.public).await;
    logs_in(&person, &ana.token).await;
    person
        .commands(
            "Emulation.setDeviceMetricsOverride",
            json!({"width": 340, "height": 640, "deviceScaleFactor": 1, "mobile": true}),
        )
        .await;
    let shown =
        "return ['nav', '#conversation', '#back'].map((css) => document.querySelector(css).checkVisibility())
        .concat(document.documentElement.scrollWidth <= 340 && document.documentElement.scrollHeight <= 640)";
    person
        .awaits("the list alone", shown, Value::Null, |shown| *shown == json!([true, false, false, true]))
        .await;
    person.clicks("#conversations button").await;
    person
        .awaits("the conversation alone", shown, Value::Null, |shown| {
            *shown == json!([false, true, true, true])
        })
        .await;
    person.clicks("#back").await;
    person
        .awaits("the list again", shown, Value::Null, |shown| *shown == json!([true, false, false, true]))
        .await;
    let light = person.runs(BACKGROUND, Value::Null).await;
    let dark = json!({"features": [{"name": "prefers-color-scheme", "value": "dark"}]});
    person.commands("Emulation.setEmulatedMedia", dark).await;
    person.awaits("dark", BACKGROUND, Value::Null, |dark| brightness(dark) < 100).await;
    assert!(brightness(&light) > 600, "{light}");
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a browser: cargo xtask test"]
async fn older_messages_are_loaded_and_a_draft_stays_with_its_conversation() {
    let app = TestApp::start().await;
    let (ana, ben) = app.pair().await;
    let cleo = app.user("cleo").await;
    app.sent_many(&ben, &ana, 60).await;
    app.sent(&cleo, &ana, "from cleo").await;
    let person = Person::at(app.running.public).await;
    logs_in(&person, &ana.token).await;
    person.opens(&ben.name).await;
    let numbers = |range: std::ops::RangeInclusive<u32>| range.map(|n| n.to_string()).collect::<Vec<_>>();
    person.sees_messages(&numbers(11..=60)).await;
    let top = "return document.querySelector('#messages li:nth-last-child(50)').getBoundingClientRect().top";
    person.runs("document.getElementById('history').scrollTop = 0", Value::Null).await;
    let before = person.runs(top, Value::Null).await.as_f64();
    person.clicks("#earlier").await;
    person.sees_messages(&numbers(1..=60)).await;
    // What was read stays where it was, but for the button that is gone.
    let moved = person.runs(top, Value::Null).await.as_f64().zip(before).map(|(now, then)| now - then);
    assert!(moved.is_some_and(|moved| moved.abs() < 60.0), "{moved:?}");
    assert_eq!(person.runs("return document.getElementById('earlier').hidden", Value::Null).await, true);

    person.types("#content", "for ben alone").await;
    person.opens("cleo").await;
    let content = "return document.getElementById('content').value";
    assert_eq!(person.runs(content, Value::Null).await, "");
    person.opens(&ben.name).await;
    assert_eq!(person.runs(content, Value::Null).await, "for ben alone");
    // Too long is said before it is sent, and nothing is cut off.
    person.runs("document.getElementById('content').value = '👋'.repeat(4001)", Value::Null).await;
    person.types("#content", &ENTER.to_string()).await;
    person.sees("#notice", "A message has at most 4000 characters; this one has 4001.").await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a browser: cargo xtask test"]
async fn the_page_works_below_the_prefix_of_a_proxy() {
    let app = TestApp::start().await;
    let (ana, ben) = app.pair().await;
    app.sent(&ben, &ana, "below").await;
    let proxy = PrefixProxy::start(app.running.public, "/team/chat").await;
    let person = Person::at_url(proxy.url("/").as_str()).await;
    logs_in(&person, &ana.token).await;
    person.clicks("#conversations button").await;
    person.sees_messages(&["below"]).await;
    person.sees("#connection", "Connected").await;
    app.sent(&ben, &ana, "live").await;
    person.sees_messages(&["below", "live"]).await;
}

const BACKGROUND: &str = "return getComputedStyle(document.body).backgroundColor";

/// Of `rgb(r, g, b)`: the sum.
fn brightness(color: &Value) -> u32 {
    let color = color.as_str().unwrap_or_default();
    color.split(|one: char| !one.is_ascii_digit()).filter_map(|one| one.parse::<u32>().ok()).sum()
}
