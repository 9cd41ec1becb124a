//! `--dry-run`: the commands that would run, printed as a shell script that can be read, compared and pasted.
//!
//! A command that drives outside programs flattens [`DryRun`] into its arguments and calls [`DryRun::apply`] first.
//! From then on [`crate::steps::Progress::run`] prints instead of running, and [`ask`] returns a given answer.

use std::ffi::OsStr;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::Result;
use harness::servers::daemon;

use crate::workspace;

static ON: AtomicBool = AtomicBool::new(false);

#[derive(clap::Args, Clone, Copy, Debug, Default)]
pub struct DryRun {
    /// Print the commands that would run, as a shell script, and change nothing
    #[arg(long, global = true)]
    dry_run: bool,
}

impl DryRun {
    pub fn apply(self) {
        ON.store(self.dry_run, Ordering::Relaxed);
    }
}

/// Whether commands are only printed. Code that changes something without an outside program has to check this.
pub fn is_on() -> bool {
    ON.load(Ordering::Relaxed)
}

/// Runs an outside program for its answer. A dry run prints the command, and uses the given answer.
pub fn ask(command: Command, limit: Duration, answer_when_dry: &str) -> Result<String> {
    if is_on() {
        println!("{}", shell_line(&command));
        return Ok(answer_when_dry.to_owned());
    }
    daemon::run_ok(command, limit)
}

/// The command as bash at the clone's top would take it, with the variables that it sets or removes.
pub fn shell_line(command: &Command) -> String {
    let mut words = Vec::new();
    let (mut removed, mut set) = (Vec::new(), Vec::new());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => set.push(format!("{}={}", name.to_string_lossy(), quoted(value))),
            None => removed.push(format!("-u {}", quoted(name))),
        }
    }
    if !removed.is_empty() {
        words.push("env".to_owned());
        words.append(&mut removed);
    }
    words.append(&mut set);
    // Cargo names itself by its full path to what it runs.
    let is_cargo = std::env::var_os("CARGO").is_some_and(|cargo| cargo == command.get_program());
    words.push(if is_cargo { "cargo".to_owned() } else { quoted(command.get_program()) });
    words.extend(command.get_args().map(quoted));
    let line = words.join(" ");
    match command.get_current_dir().filter(|dir| *dir != workspace::root()) {
        Some(dir) => format!("(cd {} && {line})", quoted(dir.as_os_str())),
        None => line,
    }
}

/// A word of a shell's line. Paths in the clone are shown from its top.
fn quoted(word: &OsStr) -> String {
    let shown = Path::new(word).strip_prefix(workspace::root()).map_or(word, Path::as_os_str);
    let text = shown.to_string_lossy();
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "_-./:=,@%+".contains(c);
    if shown.is_empty() {
        // The clone's top itself, or an empty word.
        return if word.is_empty() { "''".to_owned() } else { ".".to_owned() };
    }
    if text.chars().any(char::is_control) {
        // Only bash has a visible notation for them.
        let escaped: String = text.chars().map(escaped).collect();
        return format!("$'{escaped}'");
    }
    if text.chars().all(is_plain) { text.into_owned() } else { format!("'{}'", text.replace('\'', r"'\''")) }
}

fn escaped(c: char) -> String {
    match c {
        '\\' | '\'' => format!("\\{c}"),
        c if c.is_ascii_control() => format!("\\x{:02x}", u32::from(c)),
        c => c.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bash_runs_the_printed_line_as_the_command_would_run() {
        let mut command = Command::new("printf");
        command.args(["%s|", "plain", "two words", "it's", "", "$HOME", "a\"b", "x\x1fy"]);
        command.env("NAME", "a b").env_remove("OTHER").current_dir("/");
        let line = shell_line(&command);
        assert!(line.starts_with("(cd / && env -u OTHER NAME='a b' printf '%s|' plain "), "{line}");
        let said = Command::new("bash").arg("-c").arg(&line).output().expect("bash");
        assert_eq!(String::from_utf8_lossy(&said.stdout), "plain|two words|it's||$HOME|a\"b|x\x1fy|");
    }

    #[test]
    fn paths_of_the_clone_are_shown_from_its_top() {
        let mut command = workspace::cargo(&["run"]);
        command.arg(workspace::root().join("deploy/kind.yaml")).arg(workspace::root());
        assert!(shell_line(&command).ends_with(" run deploy/kind.yaml ."), "{}", shell_line(&command));
    }
}
