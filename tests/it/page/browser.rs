//! A person with a browser: Chromium, driven through WebDriver.

use std::collections::HashMap;
use std::fmt::Debug;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use fantoccini::elements::Element;
use fantoccini::error::CmdError;
use fantoccini::key::Key;
use fantoccini::wd::{WebDriverCompatibleCommand, WindowHandle};
use fantoccini::{Client, ClientBuilder, Locator};
use hyper_util::client::legacy::connect::HttpConnector;
use reqwest::Url;
use serde_json::{Map, Value, json};
use tests::Scratch;
use tests::install::{self, Browser};
use tests::servers::daemon::{self, Daemon};
use tests::servers::ports;

/// For what the page shows after a step.
const LIMIT: Duration = Duration::from_secs(20);
const START_LIMIT: Duration = Duration::from_secs(60);

/// One profile without a history, on one page.
pub(super) struct Person {
    client: Client,
    /// The session's URL, which ends it.
    session: String,
}

impl Drop for Person {
    /// Also after a failure: the driver would leave the browser running. On another thread, because this one has a runtime.
    fn drop(&mut self) {
        let session = std::mem::take(&mut self.session);
        let end = move || reqwest::blocking::Client::builder().timeout(LIMIT).build()?.delete(session).send();
        std::thread::spawn(end).join().ok();
    }
}

impl Person {
    /// Opens the page of the service.
    pub(super) async fn at(service: SocketAddr) -> Self {
        Self::at_url(&format!("http://{service}/")).await
    }

    pub(super) async fn at_url(url: &str) -> Self {
        let (port, browser) = tokio::task::spawn_blocking(driver).await.expect("a driver");
        let options = json!({
            "binary": browser.chromium,
            "args": ["--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu",
                "--window-size=1100,800", "--lang=en"],
        });
        let log = json!({"browser": "ALL"});
        let capabilities = HashMap::from([
            ("goog:chromeOptions".to_owned(), options),
            ("goog:loggingPrefs".to_owned(), log),
        ]);
        let client = ClientBuilder::new(HttpConnector::new())
            .capabilities(Map::from_iter(capabilities))
            .connect(&format!("http://127.0.0.1:{port}"))
            .await
            .expect("a browser");
        let id = client.session_id().await.expect("a session").expect("an id");
        let person = Self { client, session: format!("http://127.0.0.1:{port}/session/{id}") };
        person.client.goto(url).await.expect("the page");
        person
    }

    pub(super) async fn goes_to(&self, service: SocketAddr) {
        self.client.goto(&format!("http://{service}/")).await.expect("the page");
    }

    pub(super) async fn registers(&self, name: &str) {
        self.clicks("input[value=register]").await;
        self.types("#username", name).await;
        self.types("#email", &format!("{name}@example.com")).await;
        self.types("#password", super::chat::PASSWORD).await;
        self.clicks("#enter").await;
        self.sees("#connection", "Connected").await;
    }

    /// Logs in as a user with the password of all tests.
    pub(super) async fn logs_in(&self, name: &str) {
        // The entrance may know it from before.
        self.acts("#username", async |element| element.clear().await).await;
        self.types("#username", name).await;
        self.types("#password", &format!("{}{}", super::chat::PASSWORD, char::from(Key::Enter))).await;
        self.sees("#connection", "Connected").await;
    }

    /// Opens another tab of this browser at a service, and goes on there.
    pub(super) async fn opens_tab(&self, service: SocketAddr) -> WindowHandle {
        let tab = self.client.new_window(true).await.expect("a tab").handle;
        self.goes_to_tab(&tab).await;
        self.goes_to(service).await;
        tab
    }

    pub(super) async fn tab(&self) -> WindowHandle {
        self.client.window().await.expect("a tab")
    }

    pub(super) async fn goes_to_tab(&self, tab: &WindowHandle) {
        self.client.switch_to_window(tab.clone()).await.expect("the tab");
    }

    /// Opens a conversation by the peer's name.
    pub(super) async fn opens(&self, peer: &str) {
        self.types("#find", &format!("{peer}{}", char::from(Key::Enter))).await;
        self.sees("#peer", peer).await;
    }

    pub(super) async fn writes(&self, content: &str) {
        self.types("#content", &format!("{content}{}", char::from(Key::Enter))).await;
    }

    pub(super) async fn types(&self, css: &str, text: &str) {
        self.acts(css, async |element| element.send_keys(text).await).await;
    }

    /// Types wherever the focus is.
    pub(super) async fn types_on(&self, text: &str) {
        self.types(":focus", text).await;
    }

    pub(super) async fn clicks(&self, css: &str) {
        self.acts(css, async |element| element.click().await).await;
    }

    /// Does something with an element, as soon as it is there, shown, and not just replaced.
    async fn acts(&self, css: &str, act: impl AsyncFn(Element) -> Result<(), CmdError>) {
        let deadline = Instant::now() + LIMIT;
        loop {
            let outcome = match self.client.find(Locator::Css(css)).await {
                Ok(element) => act(element).await,
                Err(error) => Err(error),
            };
            let Err(error) = outcome else { return };
            assert!(Instant::now() < deadline, "{css}: {error}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Waits until what this finds reads so.
    pub(super) async fn sees(&self, css: &str, text: &str) {
        let shown = "return [...document.querySelectorAll(arguments[0])].map((one) => one.innerText.trim())";
        self.awaits(&format!("{css} reads {text:?}"), shown, json!(css), |shown| {
            shown.as_array().is_some_and(|all| all.iter().any(|one| one == text))
        })
        .await;
    }

    /// Waits until an element has this text, shown or not.
    pub(super) async fn sees_text(&self, css: &str, text: &str) {
        let script = "return document.querySelector(arguments[0]).textContent";
        self.awaits(&format!("{css} has {text:?}"), script, json!(css), |found| found == text).await;
    }

    /// Waits until the open conversation has exactly these messages.
    pub(super) async fn sees_messages(&self, contents: &[impl AsRef<str>]) {
        let contents: Vec<&str> = contents.iter().map(AsRef::as_ref).collect();
        let shown = "return [...document.querySelectorAll('#messages .text')].map((one) => one.textContent)";
        self.awaits(&format!("messages {contents:?}"), shown, Value::Null, |shown| *shown == json!(contents))
            .await;
    }

    /// Waits until a script returns what is wanted.
    pub(super) async fn awaits(
        &self,
        what: &str,
        script: &str,
        argument: Value,
        is_so: impl Fn(&Value) -> bool,
    ) {
        let deadline = Instant::now() + LIMIT;
        loop {
            let shown = self.runs(script, argument.clone()).await;
            if is_so(&shown) {
                return;
            }
            assert!(Instant::now() < deadline, "{what}, but the page has {shown}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// What a script in the page returns.
    pub(super) async fn runs(&self, script: &str, argument: Value) -> Value {
        self.client.execute(script, vec![argument]).await.expect("the script runs")
    }

    /// As `runs`, for a script whose promise is awaited.
    pub(super) async fn runs_async(&self, script: &str, argument: Value) -> Value {
        let script = format!(
            "const done = arguments[1]; (async () => {{ {script} }})().then(done, (error) => done(String(error)));"
        );
        self.client.execute_async(&script, vec![argument]).await.expect("the script runs")
    }

    pub(super) async fn reloads(&self) {
        self.client.refresh().await.expect("the page loads");
    }

    /// A command of Chromium's own protocol.
    pub(super) async fn commands(&self, command: &'static str, parameters: Value) {
        let command =
            Custom { path: "goog/cdp/execute", body: json!({"cmd": command, "params": parameters}) };
        self.client.issue_cmd(command).await.expect("a command of the browser");
    }

    /// What the browser has logged about the page.
    pub(super) async fn log(&self) -> Vec<String> {
        let command = Custom { path: "se/log", body: json!({"type": "browser"}) };
        let entries = self.client.issue_cmd(command).await.expect("the browser's log");
        let entries = entries.as_array().cloned().unwrap_or_default();
        entries.iter().map(|entry| entry["message"].as_str().unwrap_or_default().to_owned()).collect()
    }
}

/// What WebDriver itself does not have.
#[derive(Debug)]
struct Custom {
    path: &'static str,
    body: Value,
}

impl WebDriverCompatibleCommand for Custom {
    fn endpoint(&self, base: &Url, session: Option<&str>) -> Result<Url, <Url as std::str::FromStr>::Err> {
        base.join(&format!("session/{}/{}", session.unwrap_or_default(), self.path))
    }

    fn method_and_body(&self, _url: &Url) -> (http::Method, Option<String>) {
        (http::Method::POST, Some(self.body.to_string()))
    }
}

/// The port of the one driver of all tests, started with the first, and the browser.
fn driver() -> (u16, Browser) {
    static DRIVER: Mutex<Option<(u16, Browser, Daemon, Scratch)>> = Mutex::new(None);
    let mut driver = DRIVER.lock().unwrap_or_else(PoisonError::into_inner);
    if driver.is_none() {
        let browser = install::browser().expect("chromium and chromedriver: run cargo xtask test");
        let port = ports::free().expect("a port");
        // With the browsers' profiles in it. A later run removes it: a static is never dropped.
        let scratch = Scratch::new("browser").expect("a directory");
        // The shell takes the whole process group with it, with the browsers: the driver alone would leave them.
        let mut command = daemon::dies_with_us(Path::new("/bin/sh"), "TERM");
        command.args(["-c", "trap 'kill -KILL 0' TERM; \"$@\" & wait", "sh"]).arg(&browser.driver);
        command.arg(format!("--port={port}")).env("TMPDIR", scratch.path());
        let log = scratch.path().join("log");
        let mut process = Daemon::start(command, &log).expect("the driver starts");
        let ready = || std::net::TcpStream::connect(("127.0.0.1", port)).is_ok();
        process.await_ready(START_LIMIT, ready).expect("the driver listens");
        *driver = Some((port, browser, process, scratch));
    }
    let (port, browser, ..) = driver.as_ref().expect("just started");
    (*port, browser.clone())
}
