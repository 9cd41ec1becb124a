//! `cargo xtask openapi`: the committed copy of the API's document, which a test holds the service to.

use std::fs;
use std::process::{Command, ExitCode};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use tests::places;
use tests::servers::daemon;

use crate::steps::step;
use crate::{signals, workspace};

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
    step("build", |progress| progress.run(workspace::offline_cargo(&["build", "-p", "chat-service"])))?;
    let mut print = Command::new(places::target_dir()?.join("debug/chat-service"));
    print.arg("openapi");
    let document = daemon::run_ok(print, Duration::from_secs(20))? + "\n";
    let file = workspace::root().join(SNAPSHOT);
    let committed = fs::read_to_string(&file).unwrap_or_default();
    match first_difference(&committed, &document) {
        None => println!("{SNAPSHOT} is what the service prints"),
        Some(difference) if args.check => {
            bail!("{SNAPSHOT} is not what the service prints, first {difference}\n  fix: cargo xtask openapi")
        }
        Some(difference) => {
            fs::write(&file, document).with_context(|| format!("write {SNAPSHOT}"))?;
            println!("{SNAPSHOT} is renewed, first {difference}");
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Where the two part, for a reader.
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
mod of_differences {
    use super::first_difference;

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
