//! `cargo xtask soak`: the history checker for as long as one likes.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;
use tests::history::{self, Options, Report};
use tests::{install, places};

use crate::signals;
use crate::steps::step;
use crate::workspace::offline_cargo;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// How long faults happen
    #[arg(long, default_value_t = 10.0, value_name = "N", value_parser = minutes)]
    minutes: f64,
    /// The same choices as in an earlier run
    #[arg(long, value_name = "S")]
    seed: Option<u64>,
    /// Check this build instead of a fresh one
    #[arg(long, value_name = "PATH")]
    binary: Option<PathBuf>,
}

fn minutes(text: &str) -> Result<f64, String> {
    let minutes: f64 = text.parse().map_err(|_| "not a number of minutes".to_owned())?;
    if (0.1..=1440.0).contains(&minutes) { Ok(minutes) } else { Err("choose 0.1 to 1440 minutes".to_owned()) }
}

pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    signals::listen()?;
    install::ensure_programs(|line| println!("{line}"))?;
    let seed = args.seed.unwrap_or_else(history::random_seed);
    let binary = match &args.binary {
        Some(binary) => std::path::absolute(binary)?,
        None => step("build", |progress| {
            progress.run(offline_cargo(&["build", "-p", "chat-service"]))?;
            places::service_binary()
        })?,
    };
    let duration = Duration::from_secs_f64(args.minutes * 60.0);
    let report = soak(&Options { seed, duration, binary, environment: Vec::new() })?;
    print_report(seed, &report);
    Ok(ExitCode::from(u8::from(!report.violations.is_empty())))
}

fn soak(options: &Options) -> Result<Report> {
    println!("seed {}", options.seed);
    step("history", |progress| {
        history::run(options, |now| {
            progress.say(&format!(
                "{} of {} s, {} operations, last fault: {}",
                now.elapsed.as_secs(),
                options.duration.as_secs(),
                now.operations,
                now.last_fault
            ));
            !signals::asked_to_end()
        })
    })
}

fn print_report(seed: u64, report: &Report) {
    let row = |name: &str, value: &dyn std::fmt::Display| println!("  {name:<34}{value:>10}");
    println!("\nseed {seed}, {:.0} s", report.elapsed.as_secs_f64());
    row("messages acknowledged", &report.acknowledged);
    row("  of these replayed", &report.replayed);
    row("pages read", &report.reads);
    row("  of these marked as stale", &report.stale_reads);
    row("  of these from a window", &report.window_hits);
    let table = |title: &str, counts: &BTreeMap<&'static str, u64>| {
        row(title, &counts.values().sum::<u64>());
        for (name, count) in counts {
            row(&format!("  {name}"), count);
        }
    };
    table("requests without an answer", &report.unanswered);
    table("faults", &report.faults);
    let mib: Vec<_> = report.resident_kib.iter().map(|kib| (kib / 1024).to_string()).collect();
    println!("  resident MiB by 10 s: {}", mib.join(" "));
    row("violations", &report.violations.len());
    print!("{}", history::verdict(seed, report));
}
