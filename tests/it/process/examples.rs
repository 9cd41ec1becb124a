//! What `deploy/examples` shows to authors of clients.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use tests::servers::daemon;

use super::support::{Database, Start};

const LIMIT: Duration = Duration::from_secs(60);

#[test]
fn the_script_shows_each_message_once_and_the_conversation() -> Result<()> {
    let database = Database::create()?;
    let service = Start::on(&database).ready()?;
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/examples");
    let scratch = tests::Scratch::new("example")?;
    let mut script = Command::new("sh");
    script.arg(folder.join("chat.sh")).arg(format!("http://{}", service.public)).current_dir(scratch.path());
    let said = daemon::run_ok(script, LIMIT)?;
    let (streams, rest) = said.split_once("The conversation").context("the conversation")?;
    for number in 1..=3 {
        let count = streams.matches(&format!("\"content\":\"message {number}\"")).count();
        ensure!(count == 1, "message {number} is on the streams {count} times:\n{said}");
    }
    ensure!(streams.contains("\"resumed\":true"), "{said}");
    let [newest, middle, oldest] =
        [3, 2, 1].map(|number| rest.find(&format!("\"content\":\"message {number}\"")));
    ensure!(newest < middle && middle < oldest && newest.is_some(), "{said}");
    ensure!(rest.trim_end().ends_with("\n401"), "the tokens outlive the log-out:\n{said}");
    ensure!(scratch.path().read_dir()?.next().is_none(), "the script leaves a file");
    Ok(())
}

#[test]
fn the_script_shows_a_refusal_and_ends() -> Result<()> {
    let database = Database::create()?;
    let service = Start::on(&database).ready()?;
    let mut script = Command::new("sh");
    script.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/examples/chat.sh"));
    script.arg(format!("http://{}/nowhere", service.public));
    let output = daemon::run(script, LIMIT)?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(!output.status.success() && said.contains("\"status\":404"), "{}: {said}", output.status);
    Ok(())
}
