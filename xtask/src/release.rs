//! `cargo xtask release`: a version out of this commit, without a network and without a push.
//!
//! First the files that name the version are edited, then they are committed and tagged, and only then, from the tagged
//! commit, the artefacts are built: the revision in the binary is the release's own, and anybody can build it again.
//! Without `--commit` it stops after the first part and prints what to type.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use common::chart::HELM;
use common::dry_run::{self, DryRun};
use common::steps::{Progress, step};
use common::{git, image, signals, workspace};
use harness::places;
use harness::servers::{daemon, programs};

#[derive(clap::Args)]
#[command(after_help = "Examples:
  cargo xtask release 0.2.0 --dry-run    what would change, and the commands
  cargo xtask release 0.2.0              edit the files, and print how to go on
  cargo xtask release 0.2.0 --commit     the same, commit and tag it, and build the artefacts
  cargo xtask release 0.2.0              once more, at the tag: only the artefacts, in target/release-0.2.0

Nothing is pushed: `git push --follow-tags`, `cargo xtask image --tag 0.2.0 --push REPOSITORY` and
`helm push target/release-0.2.0/chat-service-0.2.0.tgz oci://REGISTRY` publish it.")]
pub(crate) struct Args {
    /// MAJOR.MINOR.PATCH, above every release so far
    version: String,
    /// Commit and tag the edited files, and go on to the artefacts
    #[arg(long)]
    commit: bool,
    /// Leave the image and its SBOM out
    #[arg(long)]
    without_image: bool,
    #[command(flatten)]
    dry_run: DryRun,
}

type Version = [u64; 3];

/// Every file that names the version; Cargo.lock is cargo's.
const CHANGELOG: &str = "CHANGELOG.md";
const UNRELEASED: &str = "## Unreleased\n";

pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    signals::listen()?;
    args.dry_run.apply();
    let version = parse(&args.version)?;
    let tag = format!("v{}", args.version);
    let dirty =
        git::ask(&["status", "--porcelain"]).context("a release needs git and this clone's history")?;
    ensure!(dirty.is_empty(), "the tree is dirty; commit or stash first:\n{dirty}");
    if let Some(tagged) = git::ask(&["rev-parse", "--verify", "--quiet", &format!("{tag}^{{commit}}")]) {
        let head = git::ask(&["rev-parse", "HEAD"]).context("HEAD")?;
        ensure!(
            tagged == head,
            "{tag} is released already: take a higher version, or check it out to build it again"
        );
        let named = workspace::version()?;
        ensure!(named == args.version, "the tag is {tag}, but Cargo.toml says {named}");
        return artefacts(args);
    }
    let used = git::ask(&["tag", "--list", "v*"]).unwrap_or_default();
    let highest = used.lines().filter_map(|tag| parse(tag.strip_prefix('v')?).ok()).max();
    if let Some(highest) = highest.filter(|highest| *highest >= version) {
        let shown = highest.map(|part| part.to_string()).join(".");
        bail!("{} is not above v{shown}, the newest release", args.version);
    }
    edit(&args.version)?;
    let paths =
        ["Cargo.toml", "Cargo.lock", CHANGELOG, "helm/chat-service/Chart.yaml", "tests/it/openapi.json"];
    let subject = format!("release: {}", args.version);
    let commands: [Vec<&str>; 3] = [
        [&["add", "--"][..], &paths].concat(),
        vec!["commit", "--quiet", "--message", &subject],
        vec!["tag", "--annotate", "--message", &subject, &tag],
    ];
    let commands = commands.map(|args| {
        let mut command = Command::new("git");
        command.args(args).current_dir(workspace::root());
        command
    });
    if !args.commit {
        println!("\nLook at `git diff`, then:\n");
        for command in &commands {
            println!("  {}", dry_run::shell_line(command));
        }
        let option = if args.without_image { " --without-image" } else { "" };
        println!("  cargo xtask release {}{option}", args.version);
        return Ok(ExitCode::SUCCESS);
    }
    step("commit and tag", |progress| {
        commands.into_iter().try_for_each(|command| progress.run(command).map(drop))
    })?;
    artefacts(args)
}

/// Pre-releases are no business of a product with one line of releases.
fn parse(text: &str) -> Result<Version> {
    let is_number = |part: &&str| {
        part.bytes().all(|byte| byte.is_ascii_digit()) && (*part == "0" || !part.starts_with('0'))
    };
    let parts: Vec<u64> = text.split('.').filter(is_number).filter_map(|part| part.parse().ok()).collect();
    let wrong = || format!("{text:?} is not a version like 1.2.3");
    ensure!(text.split('.').count() == 3, wrong());
    Version::try_from(parts).ok().with_context(wrong)
}

/// Writes the version into every file that has it.
fn edit(version: &str) -> Result<()> {
    let current = &workspace::version()?;
    let entries = changes()?;
    let date = {
        let mut date = Command::new("date");
        date.args(["-u", "+%Y-%m-%d"]);
        daemon::run_ok(date, Duration::from_secs(5))?
    };
    let quoted = |version: &str| format!("\"{version}\"");
    step("edit the files", |progress| {
        replace(
            progress,
            "Cargo.toml",
            &format!("\nversion = {}", quoted(current)),
            &format!("\nversion = {}", quoted(version)),
        )?;
        let chart = "helm/chat-service/Chart.yaml";
        replace(progress, chart, &format!("\nversion: {current}\n"), &format!("\nversion: {version}\n"))?;
        replace(
            progress,
            chart,
            &format!("\nappVersion: {}", quoted(current)),
            &format!("\nappVersion: {}", quoted(version)),
        )?;
        let in_document = |version: &str| format!("\"version\": {}", quoted(version));
        replace(progress, "tests/it/openapi.json", &in_document(current), &in_document(version))?;
        let log = fs::read_to_string(workspace::root().join(CHANGELOG)).context(CHANGELOG)?;
        write(progress, CHANGELOG, &released(&log, version, &date, &entries)?)?;
        // Of the lock file only this workspace's own packages change.
        progress.run(workspace::cargo(&["update", "--workspace", "--offline", "--quiet"])).map(drop)
    })
}

/// The subjects of the commits since the last release, for a changelog that nobody wrote.
fn changes() -> Result<Vec<String>> {
    let range = git::last_release().map_or_else(|| "HEAD".to_owned(), |tag| format!("{tag}..HEAD"));
    let log = git::ask(&["log", "--no-merges", "--format=%s", &range]).context("git log")?;
    Ok(log.lines().map(str::to_owned).collect())
}

/// The changelog in which what was unreleased has a version.
fn released(log: &str, version: &str, date: &str, commits: &[String]) -> Result<String> {
    let (before, rest) =
        log.split_once(UNRELEASED).with_context(|| format!("{CHANGELOG} has no line `## Unreleased`"))?;
    let (written, older) = rest.find("\n## ").map_or((rest, ""), |at| rest.split_at(at));
    let list = || commits.iter().map(|subject| format!("- {subject}")).collect::<Vec<_>>().join("\n");
    let written = if written.trim().is_empty() { list() } else { written.trim().to_owned() };
    Ok(format!("{before}{UNRELEASED}\n## {version} - {date}\n\n{written}\n{older}"))
}

/// Replaces the one place that has the text.
fn replace(progress: &Progress, file: &str, from: &str, to: &str) -> Result<()> {
    let text = fs::read_to_string(workspace::root().join(file)).with_context(|| format!("read {file}"))?;
    let count = text.matches(from).count();
    ensure!(count == 1, "{file} has {count} places like {:?}, not one", from.trim());
    write(progress, file, &text.replacen(from, to, 1))
}

fn write(progress: &Progress, file: &str, text: &str) -> Result<()> {
    if dry_run::is_on() {
        progress.note(&format!("would edit {file}"));
        return Ok(());
    }
    fs::write(workspace::root().join(file), text).with_context(|| format!("write {file}"))
}

/// All that is published, with checksums, from the tagged commit.
fn artefacts(args: &Args) -> Result<ExitCode> {
    let version = &args.version;
    let dir = places::target_dir()?.join(format!("release-{version}"));
    if !dry_run::is_on() {
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir_all(&dir).with_context(|| format!("create {}", dir.display()))?;
    }
    let chart = step("chart", |progress| package(&dir, version, progress))?;
    let mut files = vec![chart];
    if !args.without_image {
        files.extend(step("image and SBOM", |progress| image::for_release(version, &dir, progress))?);
    }
    if dry_run::is_on() {
        return Ok(ExitCode::SUCCESS);
    }
    step("checksums", |_| checksums(&dir, &files))?;
    println!("\n{}:", workspace::shown(&dir));
    for file in fs::read_dir(&dir)? {
        println!("  {}", file?.file_name().to_string_lossy());
    }
    Ok(ExitCode::SUCCESS)
}

/// The chart, as `helm install` takes it.
fn package(dir: &Path, version: &str, progress: &Progress) -> Result<PathBuf> {
    let helm = match programs::in_path("helm") {
        Some(helm) => helm,
        None if dry_run::is_on() => PathBuf::from("helm"),
        None => HELM.build(progress)?,
    };
    let mut package = Command::new(helm);
    package
        .args(["package", "--destination"])
        .arg(dir)
        .arg("helm/chat-service")
        .current_dir(workspace::root());
    progress.run(package)?;
    Ok(dir.join(format!("chat-service-{version}.tgz")))
}

/// As `sha256sum --check` reads it.
fn checksums(dir: &Path, files: &[PathBuf]) -> Result<()> {
    let mut sum = Command::new("sha256sum");
    sum.args(files.iter().filter_map(|file| file.file_name())).current_dir(dir);
    let sums = daemon::run_ok(sum, Duration::from_secs(120))?;
    fs::write(dir.join("SHA256SUMS"), sums + "\n")?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_version_is_three_numbers_and_they_have_an_order() {
        assert!(parse("0.10.0").expect("a version") > parse("0.9.12").expect("a version"));
        for text in ["1.2", "1.2.3.4", "v1.2.3", "1.2.x", "01.2.3", "1.2.3-rc1", "", "1..2"] {
            assert!(parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn what_was_unreleased_gets_the_version_and_an_empty_section_gets_the_commits() {
        let log = "# Changelog\n\n## Unreleased\n\n- New.\n\n## 0.1.0 - 2026-01-01\n\n- Old.\n";
        let text = released(log, "0.2.0", "2026-02-02", &[]).expect("a changelog");
        let expected = "# Changelog\n\n## Unreleased\n\n## 0.2.0 - 2026-02-02\n\n- New.\n\n## 0.1.0 - 2026-01-01\n\n- Old.\n";
        assert_eq!(text, expected);
        let commits = ["api: more".to_owned(), "db: less".to_owned()];
        let again = released(&text, "0.3.0", "2026-03-03", &commits).expect("a changelog");
        assert!(again.contains("## 0.3.0 - 2026-03-03\n\n- api: more\n- db: less\n\n## 0.2.0"), "{again}");
        assert!(released("# Changelog\n", "0.2.0", "2026-02-02", &[]).is_err());
    }
}
