//! `deploy/examples/chat.sh`, the API with curl alone.

use std::process::Command;
use std::time::Duration;

use tests::servers::daemon;

use crate::support::TestApp;

const SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/examples/chat.sh");
const LIMIT: Duration = Duration::from_secs(60);

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs curl: cargo xtask test"]
async fn the_example_with_curl_shows_each_message_once_over_a_broken_connection() {
    let app = TestApp::start().await;
    let run = |url: String| {
        let mut command = Command::new("sh");
        command.arg(SCRIPT).arg(url).env("NO_PROXY", "*");
        tokio::task::spawn_blocking(move || daemon::run(command, LIMIT).expect("the script ends"))
    };
    let output = run(format!("http://{}", app.running.public)).await.expect("a run");
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{said}\n{}", String::from_utf8_lossy(&output.stderr));
    let count = |text: &str| said.matches(text).count();
    assert_eq!((count("event: ready"), count("event: message"), count("event: reset")), (2, 3, 0), "{said}");
    assert!(said.contains("\"resumed\":true"), "{said}");
    // On the stream, in the conversation, and the last one in the list.
    for (message, times) in [("message 1", 2), ("message 2", 2), ("message 3", 3)] {
        assert_eq!(count(message), times, "{message}: {said}");
    }
    // A refusal is shown, and ends it.
    let refused = run(format!("http://{}/nowhere", app.running.public)).await.expect("a run");
    let error = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && error.contains("\"status\":404"), "{error}");
}
