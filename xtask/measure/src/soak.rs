//! `cargo xtask soak`: the history checker for as long as one likes, and the proof that it can fail.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Result, bail, ensure};
use common::args::{self, Soak as Args};
use common::steps::{Progress, Tally, step};
use common::{signals, workspace};
use harness::{install, places};
use tests::history_checker::{self, Options, Plan, RedisMode, Report, check};

/// Ways to break the service that `service/src/failpoints.rs` knows, each with the faults that show it. All kinds of faults
/// together show it, too, but some of them only after many minutes.
const FAILPOINTS: [(&str, Plan); 17] = [
    ("skip-invalidation", Plan::Mixed),
    ("ack-before-commit", Plan::Mixed),
    ("ignore-key", Plan::Mixed),
    ("skip-settle", Plan::Mixed),
    ("ignore-token", Plan::Mixed),
    ("skip-replay", Plan::SlowRedis),
    ("skip-wait", Plan::Cuts),
    ("ignore-suspension", Plan::Cuts),
    ("ignore-epoch", Plan::Cuts),
    ("trust-expired-permission", Plan::Apart),
    ("ignore-redis-identity", Plan::Splits),
    ("keep-permission-over-reconnect", Plan::UnseenRollbacks),
    ("resume-too-late", Plan::Mixed),
    ("resume-too-early", Plan::Mixed),
    ("skip-wake-up", Plan::LostWakeUps),
    ("publish-before-commit", Plan::LostWakeUps),
    ("ignore-gap-check", Plan::LostWakeUps),
];

/// How long a broken build may look sound.
const SELF_CHECK_LIMIT: Duration = Duration::from_secs(300);

/// By how much the memory of a replica may still grow in the last third of a run.
const GROWTH_MAX: f64 = 0.1;

pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    install::ensure_programs(|line| println!("{line}"))?;
    install::offer_libfaketime(|line| println!("{line}"))?;
    let seed = args.seed.unwrap_or_else(history_checker::random_seed);
    if args.self_check {
        let mut tally = Tally::default();
        self_check(&mut tally, seed, args.only.as_deref())?;
        return Ok(tally.close());
    }
    let binary = match &args.binary {
        Some(binary) => std::path::absolute(binary)?,
        None => step("build", |progress| {
            progress.run(workspace::build("chat-service"))?;
            places::service_binary()
        })?,
    };
    let duration = Duration::from_secs_f64(args.minutes * 60.0);
    if args.memory {
        return memory(&binary, duration);
    }
    let redis = match args.redis {
        args::RedisMode::Single => RedisMode::Single,
        args::RedisMode::Sentinel => RedisMode::Sentinel,
        args::RedisMode::Cluster => RedisMode::Cluster,
    };
    println!("  seed {seed}, redis {}", redis.name());
    let options = Options { redis, plan: Plan::Mixed, seed, duration, binary, environment: Vec::new() };
    let report = step("history", |progress| history_checker::run(&options, follow(progress, duration)))?;
    print_report(&options, &report);
    // Errors of a window show only while windows are used.
    let used = report.window_hits * 50 > report.reads;
    ensure!(used || !report.violations.is_empty(), "too few pages came from a window: this run shows little");
    Ok(ExitCode::from(u8::from(!report.violations.is_empty())))
}

/// Each build that is broken on purpose has to be found out.
fn self_check(tally: &mut Tally, seed: u64, only: Option<&str>) -> Result<()> {
    let wanted: Vec<_> =
        FAILPOINTS.iter().filter(|(name, _)| only.is_none_or(|only| only == *name)).collect();
    ensure!(
        !wanted.is_empty(),
        "no such failpoint; there are {}",
        FAILPOINTS.map(|(name, _)| name).join(", ")
    );
    println!("  seed {seed}");
    if tally.check("broken build", "", broken_build).is_none() {
        return Ok(());
    }
    for (failpoint, plan) in wanted {
        let fix = format!("cargo xtask soak --self-check --only {failpoint} --seed {seed}");
        tally.check(failpoint, &fix, |progress| find(progress, failpoint, *plan, seed));
    }
    Ok(())
}

/// Builds the service with the ways to break it, as a file of its own.
fn broken_build(progress: &Progress) -> Result<()> {
    let mut build = workspace::build("chat-service");
    build.args(["--features", "chat-service/failpoints"]);
    progress.run(build)?;
    let copied = std::fs::copy(places::target_dir()?.join("debug/chat-service"), broken_binary()?);
    // Whatever came of the copy, the sound one goes back to where others look for it.
    progress.run(workspace::build("chat-service"))?;
    copied?;
    Ok(())
}

fn broken_binary() -> Result<PathBuf> {
    let dir = places::target_dir()?.join("xtask");
    std::fs::create_dir_all(&dir)?;
    Ok(dir.join("chat-service-failpoints"))
}

/// Fails unless the checker finds what is wrong with a build that was broken in this way.
fn find(progress: &Progress, failpoint: &str, plan: Plan, seed: u64) -> Result<()> {
    let environment = vec![("CHAT_FAILPOINT".to_owned(), failpoint.to_owned())];
    let (duration, binary) = (SELF_CHECK_LIMIT, broken_binary()?);
    let options = Options { redis: RedisMode::Single, plan, seed, duration, binary, environment };
    let report = history_checker::run(&options, follow(progress, SELF_CHECK_LIMIT))?;
    signals::check()?;
    // A broken build may also answer 500, which needs no checker to be noticed.
    let noticed = report.violations.iter().find(|violation| violation.rule != check::WRONG_ANSWER);
    let Some(violation) = noticed else {
        bail!("the checker noticed nothing within {} s, seed {seed}", SELF_CHECK_LIMIT.as_secs());
    };
    progress.note(&format!("{failpoint} after {:.0} s: {violation}", report.elapsed.as_secs_f64()));
    Ok(())
}

/// What stands in the line of a running history; ends it on Ctrl-C.
fn follow(progress: &Progress, duration: Duration) -> impl FnMut(&history_checker::Progress) -> bool {
    move |now| {
        let history_checker::Progress { elapsed, operations, last_fault } = now;
        let (elapsed, all) = (elapsed.as_secs(), duration.as_secs());
        progress.say(&format!("{elapsed} of {all} s, {operations} operations, last fault: {last_fault}"));
        !signals::asked_to_end()
    }
}

fn memory(binary: &Path, duration: Duration) -> Result<ExitCode> {
    let memory = step("memory", |progress| {
        history_checker::overload(binary, duration, |elapsed, kib| {
            progress.say(&format!("{} of {} s, {} MiB", elapsed.as_secs(), duration.as_secs(), kib / 1024));
            !signals::asked_to_end()
        })
    })?;
    println!();
    row("seconds", &format!("{:.0}", memory.elapsed.as_secs_f64()));
    row("messages stored", &memory.stored);
    row("503", &memory.refused);
    row("other answers, broken connections", &memory.others);
    println!("  resident MiB by 10 s: {}", by_ten_seconds(&memory.resident_kib, 10));
    row("growth in the last third", &format!("{:+.1} %", 100.0 * memory.growth()));
    ensure!(memory.refused > 0, "nothing was refused: the queues were never full");
    ensure!(memory.growth() < GROWTH_MAX, "memory still grows in the last third of the run");
    Ok(ExitCode::SUCCESS)
}

fn row(name: &str, value: &dyn Display) {
    println!("  {name:<34}{value:>10}");
}

/// The greatest of every `group` values, in MiB.
fn by_ten_seconds(kib: &[u64], group: usize) -> String {
    let most = kib.chunks(group).filter_map(|values| values.iter().max());
    most.map(|kib| (kib / 1024).to_string()).collect::<Vec<_>>().join(" ")
}

fn print_report(options: &Options, report: &Report) {
    let (redis, seed, seconds) = (options.redis.name(), options.seed, report.elapsed.as_secs_f64());
    println!("\n  seed {seed}, redis {redis}, {seconds:.0} s");
    row("messages acknowledged", &report.acknowledged);
    row("  of these replayed", &report.replayed);
    row("pages read", &report.reads);
    row("  of these marked as stale", &report.stale_reads);
    row("  of these from a window", &report.window_hits);
    row("streams begun", &report.streams);
    row("  of these resumed", &report.resumed_streams);
    row("messages shown by streams", &report.streamed);
    let table = |title: &str, counts: &BTreeMap<&'static str, u64>| {
        row(title, &counts.values().sum::<u64>());
        for (name, count) in counts {
            row(&format!("  {name}"), count);
        }
    };
    table("requests without an answer", &report.unanswered);
    table("faults", &report.faults);
    println!("  resident MiB by 10 s: {}", by_ten_seconds(&report.resident_kib, 1));
    row("violations", &report.violations.len());
    print!("{}", history_checker::describe_violations(options, report));
}
