//! The tests of `tests/it/page`, which need a real browser.

use common::servers::Servers;
use common::steps::Tally;
use common::workspace::in_ci;
use harness::install;

use super::{count, test_command};

/// Runs these tests, which the other run leaves out.
pub(super) fn check(tally: &mut Tally, servers: &Servers) {
    if !is_there(tally) {
        return;
    }
    let Ok(mut command) = test_command(servers) else { return };
    command.args(["--test", "it", "--", "--ignored", "page::"]);
    count::run(tally, "page", "cargo xtask test -- --test it -- --ignored NAME runs one alone", command);
}

/// Finds or installs the browser. Where neither works, it says so, and CI fails.
fn is_there(tally: &mut Tally) -> bool {
    if install::browser().is_none() && !install::can_install() && !in_ci() {
        println!("  {:24}skipped: needs chromium and chromedriver", "page");
        return false;
    }
    tally.check("browser", "", |progress| install::ensure_browser(|line| progress.note(line))).is_some()
}

/// For a run of single tests, which may be some of these.
pub(super) fn prepare(tally: &mut Tally, args: &[String]) {
    let names = |word: &str| args.iter().any(|arg| arg.contains(word));
    if names("ignored") && names("page") {
        is_there(tally);
    }
}
