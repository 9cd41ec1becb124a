//! Migrations go forward only, without gaps, and a shared one never changes.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Result, bail, ensure};
use common::migrations::Script;
use common::steps::Progress;

/// Each script must be as in the commit that brought it to the main branch: it may have been applied since.
pub(super) fn check(dir: &Path, scripts: &[Script], progress: &Progress) -> Result<()> {
    for entry in fs::read_dir(dir)? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        // sqlx takes such a pair for a reversible migration.
        if name.ends_with(".down.sql") || name.ends_with(".up.sql") {
            bail!("{name}: migrations go forward only; fix a mistake with the next one");
        }
        ensure!(name.ends_with(".sql") || name.starts_with('.'), "{name} is no SQL script");
    }
    for (index, script) in scripts.iter().enumerate() {
        let expected = index + 1;
        ensure!(script.version as usize == expected, "{} should be number {expected:04}", script.file);
    }
    let Some(shallow) = git(dir, &["rev-parse", "--is-shallow-repository"]) else {
        progress.note("no git history here: modified migrations go unnoticed");
        return Ok(());
    };
    if shallow == "true" {
        progress.note("a shallow clone: what was modified before it goes unnoticed (git fetch --unshallow)");
    }
    let mut faults = Vec::new();
    for (name, original) in originals(dir) {
        match scripts.iter().find(|script| script.file.ends_with(&name)) {
            None => faults.push(format!("    {name} is gone")),
            Some(script) if script.sql.trim_end() != original.trim_end() => {
                faults.push(format!("    {name} was modified"));
            }
            Some(_) => {}
        }
    }
    if !faults.is_empty() {
        bail!("{}", faults.join("\n"));
    }
    Ok(())
}

/// The scripts of the main branch, as they were added. On a branch, the branch's own scripts may still change.
fn originals(dir: &Path) -> Vec<(String, String)> {
    let branch = git(dir, &["rev-parse", "--abbrev-ref", "HEAD"]).unwrap_or_default();
    let shared = || ["origin/main", "main"].iter().find_map(|main| git(dir, &["merge-base", main, "HEAD"]));
    let tip = if branch == "main" { None } else { shared() }.unwrap_or_else(|| "HEAD".to_owned());
    let log = git(
        dir,
        &["log", "--first-parent", "-m", "--diff-filter=A", "--name-only", "--format=%H", &tip, "--", "."],
    );
    let mut commit = String::new();
    let mut seen = BTreeSet::new();
    let mut found = Vec::new();
    // The newest comes first; a script that went and came again counts as it came first.
    let log = log.unwrap_or_default();
    for line in log.lines().filter(|line| !line.is_empty()) {
        if !line.contains('/') && !line.ends_with(".sql") {
            commit = line.to_owned();
            continue;
        }
        let name = line.rsplit('/').next().unwrap_or(line).to_owned();
        if let Some(text) = git(dir, &["show", &format!("{commit}:./{name}")]) {
            if !seen.insert(name.clone()) {
                found.retain(|(known, _)| *known != name);
            }
            found.push((name, text));
        }
    }
    found
}

fn git(dir: &Path, args: &[&str]) -> Option<String> {
    let output = Command::new("git").args(args).current_dir(dir).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim_end().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use common::migrations::scripts;
    use common::steps::step;

    #[test]
    fn what_is_on_the_main_line_may_not_change_and_what_is_on_a_branch_may() {
        let scratch = harness::Scratch::new("history").expect("a directory");
        let dir = scratch.path();
        let git = |args: &[&str]| {
            let base = ["-c", "user.name=t", "-c", "user.email=t@example.com"];
            let status = Command::new("git").args(base).args(args).current_dir(dir).output().expect("git");
            assert!(status.status.success(), "{args:?}: {status:?}");
        };
        let write = |name: &str, text: &str| fs::write(dir.join(name), text).expect("written");
        let verdict = || step("history", |progress| check(dir, &scripts(dir)?, progress));
        let fails = |word: &str| {
            let error = format!("{:#}", verdict().expect_err(word));
            assert!(error.contains(word), "{error}");
        };
        git(&["init", "-q", "-b", "main"]);
        write("0001_a.sql", "SELECT 1;\n");
        git(&["add", "."]);
        git(&["commit", "-qm", "one"]);
        verdict().expect("as committed");
        write("0001_a.sql", "SELECT 2;\n");
        fails("0001_a.sql was modified");
        // Committed, the change is no better.
        git(&["commit", "-qam", "edited"]);
        fails("0001_a.sql was modified");
        write("0001_a.sql", "SELECT 1;\n");
        git(&["commit", "-qam", "undone"]);
        git(&["checkout", "-qb", "topic"]);
        for text in ["SELECT 3;\n", "SELECT 4;\n"] {
            write("0002_b.sql", text);
            git(&["add", "."]);
            git(&["commit", "-qm", "on a branch"]);
            verdict().expect("a branch's own");
        }
        write("0004_d.sql", "");
        fails("should be number 0003");
        fs::remove_file(dir.join("0004_d.sql")).expect("removed");
        write("0002_b.down.sql", "");
        fails("forward only");
        fs::remove_file(dir.join("0002_b.down.sql")).expect("removed");
        fs::rename(dir.join("0001_a.sql"), dir.join("0001_z.sql")).expect("renamed");
        fails("0001_a.sql is gone");
    }
}
