//! The commands themselves: their examples, the completions, the doctor, and a release in a clone of this clone.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use common::chart::HELM;
use common::steps::{Progress, Tally};
use common::workspace::{self, in_ci};
use harness::servers::{daemon, programs};
use harness::{Scratch, install, places};

/// Above every real version.
const VERSION: &str = "999.0.0";
const LIMIT: Duration = Duration::from_secs(120);

/// Asks each shell for completions as it asks itself when Tab is pressed. `$1` is what `cargo xtask completions` prints.
const SHELLS: [(&str, &str); 3] = [
    (
        "bash",
        r#"
_cargo() { COMPREPLY=(cargos-own); }
complete -F _cargo cargo
source "$1"
source "$1"   # as in a start-up file that is read twice
ask() {
    COMP_WORDS=("$@") COMP_CWORD=$(($# - 1)) COMPREPLY=()
    local function=$(complete -p "$1" | sed -n 's/.* -F \([^ ]*\) .*/\1/p')
    "$function" "$1" "${@: -1}" "${@: -2:1}"
    echo "$*: ${COMPREPLY[*]}"
}
ask cargo xtask mig
ask cargo xtask migrate st
ask cargo xtask seed --us
ask xtask completions z
ask cargo bui
"#,
    ),
    (
        "zsh",
        r#"
zmodload zsh/zpty
zpty shell zsh -f -i
zpty -w shell "PROMPT=; RPROMPT=; unsetopt zle_bracketed_paste 2>/dev/null; autoload -Uz compinit; compinit -u -D"
zpty -w shell "function _cargo { compadd cargos-own }; source '$1'; bindkey '^I' complete-word"
zpty -w shell "function show { print -r -- \"<\$BUFFER>\"; BUFFER=; zle accept-line }; zle -N show; bindkey '^X' show"
zpty -w shell "print -r -- rea''dy"
zpty -r -m shell answer '*ready*'
for line in 'cargo xtask mig' 'cargo xtask migrate st' 'cargo xtask seed --us' 'xtask completions z' 'cargo c'; do
    zpty -w -n shell "$line"$'\t\x18'
    zpty -r -m shell answer '*<*>*' && print -r -- "$line: ${${answer##*<}%%>*}"
done
zpty -d shell
"#,
    ),
    (
        "fish",
        r#"
complete -c cargo -n __fish_use_subcommand -f -a cargos-own
source $argv[1]
for line in 'cargo xtask mig' 'cargo xtask migrate st' 'cargo xtask seed --us' 'xtask completions z' 'cargo cargos'
    echo $line: (complete -C $line)
end
"#,
    ),
];

pub(super) fn check(tally: &mut Tally) {
    tally.check("commands: completions", "xtask/src/completions.rs", completions);
    tally.check("commands: doctor", "", doctor);
    if common::go_tools::can_use("commands: release") {
        tally.check("commands: release", "", release);
    }
}

/// This program, as it is.
fn ours(args: &[&str]) -> Result<Command> {
    let mut command = Command::new(std::env::current_exe()?);
    command.args(args).current_dir(workspace::root());
    Ok(command)
}

fn completions(progress: &Progress) -> Result<()> {
    let scratch = Scratch::new("completions")?;
    let missing: Vec<_> = SHELLS.iter().map(|(shell, _)| *shell).filter(|shell| !is_there(shell)).collect();
    if in_ci() && !missing.is_empty() {
        progress.note(&format!("installing {} with apt-get", missing.join(" and ")));
        install::install(&missing)?;
    }
    let mut tried = Vec::new();
    for (shell, questions) in SHELLS.into_iter().filter(|(shell, _)| in_ci() || is_there(shell)) {
        let (script, ask) = (scratch.path().join(shell), scratch.path().join(format!("{shell}-questions")));
        fs::write(&script, daemon::run_ok(ours(&["completions", shell])?, LIMIT)?)?;
        fs::write(&ask, questions)?;
        let mut command = Command::new(shell);
        // Without the user's start-up files.
        command.arg(&ask).arg(&script).env("HOME", scratch.path()).env_remove("XDG_CONFIG_HOME");
        let said = progress.run(command)?;
        let answers: Vec<&str> = said.lines().map(str::trim_end).collect();
        for (line, expected) in [
            ("cargo xtask mig", "migrate"),
            ("cargo xtask migrate st", "status"),
            ("cargo xtask seed --us", "--users"),
            ("xtask completions z", "zsh"),
            ("cargo ", "cargos-own"),
        ] {
            // What clap writes for fish knows no values of arguments without a name.
            if shell == "fish" && expected == "zsh" {
                continue;
            }
            let is_it = |answer: &&&str| answer.starts_with(line) && answer.contains(expected);
            ensure!(
                answers.iter().any(|answer| is_it(&answer)),
                "{shell}: no {expected} for `{line}`: {said}"
            );
        }
        tried.push(shell);
    }
    progress.note(&format!("tried: {}", tried.join(", ")));
    Ok(())
}

fn is_there(program: &str) -> bool {
    programs::in_path(program).is_some()
}

/// With an empty PATH the doctor has to report every tool with its fix.
fn doctor(progress: &Progress) -> Result<()> {
    progress.run(ours(&["doctor"])?)?;
    let scratch = Scratch::new("doctor")?;
    let mut bare = ours(&["doctor", "--all"])?;
    bare.env("PATH", scratch.path());
    let output = daemon::run(bare, LIMIT)?;
    let said = String::from_utf8_lossy(&output.stdout);
    ensure!(output.status.code() == Some(1), "exit code {:?} without any program: {said}", output.status);
    let lines: Vec<&str> = said.lines().collect();
    for name in ["git", "Docker", "kind", "kubectl", "helm", "tilt", "cargo-deny"] {
        let at = lines.iter().position(|line| line.split_whitespace().take(2).eq(["FAIL", name]));
        let at = at.with_context(|| format!("{name} is not missed: {said}"))?;
        let fix = lines.get(at + 1).and_then(|line| line.trim().strip_prefix("fix: ")).unwrap_or_default();
        ensure!(fix.len() > 10, "{name} has no fix: {said}");
    }
    Ok(())
}

/// In a clone of this clone, which stays unchanged.
fn release(progress: &Progress) -> Result<()> {
    let scratch = Scratch::new("release")?;
    let clone = scratch.path().join("clone");
    let mut copy = Command::new("git");
    copy.args(["clone", "--quiet", "--no-tags"]).arg(workspace::root()).arg(&clone);
    if let Err(error) = progress.run(copy) {
        ensure!(!in_ci(), "{error:#}");
        progress.note("no git history here: nothing to release");
        return Ok(());
    }
    let made = places::target_dir()?.join(format!("release-{VERSION}"));
    let outcome = release_in(progress, &clone, &made);
    let _ = fs::remove_dir_all(made);
    outcome
}

fn release_in(progress: &Progress, clone: &Path, made: &Path) -> Result<()> {
    let helm = HELM.build(progress)?;
    let run = |args: &[&str]| -> Result<String> {
        let mut command = ours(&[&["release"], args].concat())?;
        command.current_dir(clone).env("CARGO_MANIFEST_DIR", clone.join("xtask"));
        command.env("PATH", path_with(helm.parent().context("a folder")?)?);
        for who in ["AUTHOR", "COMMITTER"] {
            command
                .env(format!("GIT_{who}_NAME"), "Test")
                .env(format!("GIT_{who}_EMAIL"), "test@example.com");
        }
        progress.run(command)
    };
    let git = |args: &[&str]| {
        let mut command = Command::new("git");
        command.args(args).current_dir(clone);
        daemon::run_ok(command, LIMIT)
    };
    let before = git(&["rev-parse", "HEAD"])?;
    let planned = run(&[VERSION, "--commit", "--dry-run"])?;
    for part in ["git add -- Cargo.toml", "git commit", "git tag", "helm package", " tree --locked"] {
        ensure!(planned.contains(part), "the dry run has no `{part}`: {planned}");
    }
    ensure!(git(&["rev-parse", "HEAD"])? == before && git(&["tag"])?.is_empty(), "the dry run committed");
    ensure!(git(&["status", "--porcelain"])?.is_empty() && !made.exists(), "the dry run changed something");

    run(&[VERSION, "--commit", "--without-image"])?;
    ensure!(
        git(&["status", "--porcelain"])?.is_empty(),
        "something is left: {}",
        git(&["status", "--porcelain"])?
    );
    ensure!(git(&["describe", "--exact-match"])? == format!("v{VERSION}"), "HEAD has no tag");
    versions(clone)?;
    artefacts(progress, &helm, made)?;
    // Once more, at the tag; and refusals that say what to do.
    run(&[VERSION, "--without-image"])?;
    refused(run(&["998.0.0"]), "is not above v999.0.0")?;
    refused(run(&["1.0"]), "is not a version like 1.2.3")?;
    fs::write(clone.join("README.md"), "")?;
    refused(run(&["999.0.1"]), "commit or stash first")
}

/// Every file that names the version names the new one, and cargo finds nothing to change in the lock file.
fn versions(clone: &Path) -> Result<()> {
    let mut metadata =
        workspace::cargo(&["metadata", "--locked", "--offline", "--no-deps", "--format-version=1"]);
    metadata.current_dir(clone);
    let metadata: serde_json::Value = serde_json::from_str(&daemon::run_ok(metadata, LIMIT)?)?;
    for package in metadata["packages"].as_array().context("packages")? {
        ensure!(package["version"] == VERSION, "{} is {}", package["name"], package["version"]);
    }
    let read = |file: &str| fs::read_to_string(clone.join(file)).with_context(|| file.to_owned());
    let log = read("CHANGELOG.md")?;
    let section = log.split_once(&format!("\n## {VERSION} - ")).context("no section in CHANGELOG.md")?.1;
    ensure!(section.contains("\n- ") && log.contains("## Unreleased\n\n## 999"), "the changelog: {log}");
    ensure!(read("tests/it/openapi.json")?.contains(VERSION), "openapi.json has another version");
    Ok(())
}

/// The packaged chart can be installed, and asks for the image of its version.
fn artefacts(progress: &Progress, helm: &Path, made: &Path) -> Result<()> {
    let chart = made.join(format!("chat-service-{VERSION}.tgz"));
    let ask = |words: &[&str]| {
        let mut command = Command::new(helm);
        command.args(words).arg(&chart).env("KUBECONFIG", "/dev/null");
        progress.run(command)
    };
    let about = ask(&["show", "chart"])?;
    for line in [format!("version: {VERSION}"), format!("appVersion: {VERSION}")] {
        ensure!(about.lines().any(|found| found == line), "no `{line}`: {about}");
    }
    let rendered = ask(&["template", "chat"])?;
    ensure!(rendered.contains(&format!("chat-service:{VERSION}")), "the chart asks for another image");
    let mut sums = Command::new("sha256sum");
    sums.args(["--check", "--strict", "SHA256SUMS"]).current_dir(made);
    let sums = daemon::run_ok(sums, LIMIT)?;
    ensure!(sums.contains(&format!("chat-service-{VERSION}.tgz: OK")), "{sums}");
    Ok(())
}

fn refused(outcome: Result<String>, reason: &str) -> Result<()> {
    let Err(error) = outcome else { anyhow::bail!("no word of {reason:?}: it was taken") };
    ensure!(format!("{error:#}").contains(reason), "no word of {reason:?}: {error:#}");
    Ok(())
}

fn path_with(first: &Path) -> Result<std::ffi::OsString> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders: Vec<PathBuf> = [first.to_owned()].into_iter().chain(std::env::split_paths(&path)).collect();
    Ok(std::env::join_paths(folders)?)
}

#[cfg(test)]
mod tests {
    use clap::error::ErrorKind;
    use clap::{CommandFactory as _, Parser as _};

    use super::*;
    use crate::Cli;

    /// The words of each `cargo xtask ...` in a text.
    fn examples(text: &str) -> Vec<Vec<String>> {
        let mut found = Vec::new();
        for part in text.split("cargo xtask ").skip(1) {
            let line = part.lines().next().unwrap_or_default();
            // The end of the command in prose.
            let ends = ["  ", "`", " && ", " #", " | ", ")", " <", ",", ";", ". ", "\"", "://..."];
            let end = ends.iter().filter_map(|end| line.find(end)).min().unwrap_or(line.len());
            let mut words: Vec<String> = Vec::new();
            // Odd pieces are quoted.
            for (index, piece) in line[..end].split('\'').enumerate() {
                match index % 2 {
                    0 => words.extend(piece.split_whitespace().map(str::to_owned)),
                    _ => words.push(piece.to_owned()),
                }
            }
            // `<TAB>` is for the shell.
            if !words.is_empty() && !words[0].starts_with('<') {
                found.push(words);
            }
        }
        found
    }

    /// Whether clap accepts it. In prose a name alone stands for the command, whatever it requires.
    fn is_taken(words: &[String]) -> Result<(), String> {
        if let [name] = words
            && Cli::command().find_subcommand(name).is_some()
        {
            return Ok(());
        }
        let words = ["xtask"].into_iter().chain(words.iter().map(String::as_str));
        match Cli::try_parse_from(words).map_err(|error| (error.kind(), error.to_string())) {
            Ok(_)
            | Err((
                ErrorKind::DisplayHelp
                | ErrorKind::MissingSubcommand
                | ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand,
                _,
            )) => Ok(()),
            Err((_, message)) => Err(message),
        }
    }

    #[test]
    fn the_commands_definition_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_command_has_examples_in_its_help_and_each_of_them_is_taken() {
        for command in Cli::command().get_subcommands_mut().filter(|command| command.get_name() != "help") {
            let name = command.get_name().to_owned();
            let help = command.render_long_help().to_string();
            let after = command.get_after_help().map(ToString::to_string).unwrap_or_default();
            let own: Vec<_> = examples(&after).into_iter().filter(|words| words[0] == name).collect();
            assert!(!own.is_empty(), "cargo xtask {name} --help has no example:\n{help}");
            for words in examples(&help) {
                is_taken(&words).unwrap_or_else(|error| panic!("{name} --help, {words:?}: {error}"));
            }
        }
    }

    #[test]
    fn every_command_that_the_documents_name_is_taken() {
        let mut found = 0;
        for file in ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "Tiltfile", "deploy/dev/README.md"] {
            let text = fs::read_to_string(workspace::root().join(file)).expect(file);
            for words in examples(&text) {
                is_taken(&words).unwrap_or_else(|error| panic!("{file}, {words:?}: {error}"));
                found += 1;
            }
        }
        assert!(found > 30, "{found}");
        assert!(
            is_taken(&["sead".to_owned()]).is_err()
                && is_taken(&["seed".to_owned(), "--user".to_owned()]).is_err()
        );
    }
}
