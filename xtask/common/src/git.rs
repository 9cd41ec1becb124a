//! Questions to git about this clone. Sources without their history, as from an archive, have no answers.

use std::process::Command;

use crate::workspace;

/// What git says, without the last line's end; `None` when it fails.
pub fn ask(args: &[&str]) -> Option<String> {
    let output =
        Command::new("git").args(args).current_dir(workspace::root()).env("TZ", "UTC").output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim_end().to_owned())
}

/// The newest release that this commit descends from: its tag.
pub fn last_release() -> Option<String> {
    ask(&["describe", "--tags", "--abbrev=0", "--match=v[0-9]*"])
}
