//! A run of `cargo test`, counted by its tests, with the failures out of its output.

use std::process::Command;

use anyhow::bail;
use common::steps::Tally;
use harness::servers::daemon;

/// A run counts as its tests, or as one failure when it fails for another reason, such as a build.
pub(super) fn run(tally: &mut Tally, name: &str, fix: &str, command: Command) {
    let mut counts = (0, 0);
    let mut failures = Failures::default();
    let ran = tally.check(name, fix, |progress| {
        let outcome = progress.run_counted(command, |line| {
            failures.see(line);
            if let Some((passed, failed)) = result(line) {
                counts.0 += passed;
                counts.1 += failed;
            }
        });
        match outcome {
            Ok(_) if counts.0 == 0 => bail!("no test ran"),
            Err(_) if !failures.lines.is_empty() => bail!(failures.text()),
            outcome => outcome,
        }
    });
    // The check counted itself as one.
    match ran {
        Some(_) => tally.passed -= 1,
        None if counts.1 > 0 => tally.failed -= 1,
        None => {}
    }
    tally.passed += counts.0;
    tally.failed += counts.1;
}

/// libtest's report of the failed tests, out of the whole output.
#[derive(Default)]
struct Failures {
    lines: Vec<String>,
    open: bool,
}

impl Failures {
    /// The most that is shown; the step's log has all of it.
    const LINES_MAX: usize = 400;

    fn see(&mut self, line: &str) {
        self.open = line == "failures:" || (self.open && !line.starts_with("test result: "));
        if self.open && self.lines.len() < Self::LINES_MAX {
            self.lines.push(line.to_owned());
        }
    }

    fn text(&self) -> String {
        daemon::tail(&self.lines.join("\n"), Self::LINES_MAX)
    }
}

/// The counts of libtest's `test result: ok. 7 passed; 0 failed; ...`.
fn result(line: &str) -> Option<(u64, u64)> {
    let (_, counts) = line.strip_prefix("test result: ")?.split_once(". ")?;
    let mut numbers = counts.split("; ").map(|count| count.split(' ').next()?.parse::<u64>().ok());
    Some((numbers.next()??, numbers.next()??))
}
