//! `cargo xtask openapi`: the committed OpenAPI document, which a test compares with the service's.

use std::fs;
use std::path::Path;
use std::process::{Command, ExitCode};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use common::steps::step;
use common::{signals, workspace};
use harness::places;
use harness::servers::daemon;

const SNAPSHOT: &str = "tests/it/openapi.json";

#[derive(clap::Args)]
#[command(after_help = "Examples:
  cargo xtask openapi            after a change of the API: renew tests/it/openapi.json
  cargo xtask openapi --check    fail when it is not what the service prints")]
pub(crate) struct Args {
    /// Change nothing, and fail when the file is not up to date
    #[arg(long)]
    check: bool,
}

pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    signals::listen()?;
    step("build", |progress| progress.run(workspace::build("chat-service")))?;
    let mut print = Command::new(places::target_dir()?.join("debug/chat-service"));
    print.arg("openapi");
    let document = daemon::run_ok(print, Duration::from_secs(20))? + "\n";
    println!("{}", settle(&workspace::root().join(SNAPSHOT), &document, args.check)?);
    Ok(ExitCode::SUCCESS)
}

/// Writes the document to the file, or only checks it.
fn settle(file: &Path, document: &str, check: bool) -> Result<String> {
    let committed = fs::read_to_string(file).unwrap_or_default();
    match first_difference(&committed, document) {
        None => Ok(format!("{SNAPSHOT} is what the service prints")),
        Some(difference) if check => {
            bail!("{SNAPSHOT} is not what the service prints, first {difference}\n  fix: cargo xtask openapi")
        }
        Some(difference) => {
            fs::write(file, document).with_context(|| format!("write {SNAPSHOT}"))?;
            Ok(format!("{SNAPSHOT} is renewed, first {difference}"))
        }
    }
}

/// The first difference, for a reader.
fn first_difference(old: &str, new: &str) -> Option<String> {
    let (mut olds, mut news) = (old.lines(), new.lines());
    for number in 1.. {
        match (olds.next(), news.next()) {
            (None, None) => break,
            (old, new) if old == new => {}
            (old, new) => {
                let shown =
                    |line: Option<&str>| line.map_or("the end".to_owned(), |line| format!("{line:?}"));
                return Some(format!("in line {number}: {} became {}", shown(old), shown(new)));
            }
        }
    }
    (old != new).then(|| "in its last line's end".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_check_changes_nothing_and_names_the_fix_and_the_command_without_it_mends() {
        let scratch = harness::Scratch::new("openapi").expect("a directory");
        let file = scratch.path().join("openapi.json");
        let committed = || fs::read_to_string(&file).expect("the file");
        fs::write(&file, "{\n}\n").expect("written");
        let error = settle(&file, "{ }\n", true).expect_err("they differ").to_string();
        assert!(error.contains("line 1") && error.contains("fix: cargo xtask openapi"), "{error}");
        assert_eq!(committed(), "{\n}\n");
        settle(&file, "{ }\n", false).expect("renewed");
        assert_eq!(committed(), "{ }\n");
        settle(&file, "{ }\n", true).expect("it is what it should be");
    }

    #[test]
    fn the_first_difference_is_named_with_its_line() {
        assert_eq!(first_difference("a\nb\n", "a\nb\n"), None);
        let changed = first_difference("a\nb\n", "a\nc\n").expect("they differ");
        assert_eq!(changed, r#"in line 2: "b" became "c""#);
        let longer = first_difference("a\n", "a\nb\n").expect("they differ");
        assert_eq!(longer, r#"in line 2: the end became "b""#);
        assert!(first_difference("a", "a\n").is_some());
    }
}
