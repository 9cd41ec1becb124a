//! `cargo xtask bench`: the service's speed, as ratios to what the machine's own Postgres, Redis and processor can do,
//! measured in one run.
//!
//! Absolute figures say more about the machine than about the service, and machines are shared and noisy. So each
//! figure is paired with a reference. Both are measured in turns, and the table shows the median and the range of the
//! ratios.

mod cpu;
mod measures;
mod reads;
mod reference;
mod scaling;
mod setup;
mod streams;
mod tracing;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Result, bail};
use common::args::Bench as Args;
use common::go_tools::COLLECTOR;
use common::steps::step;
use common::{go_tools, workspace};
use harness::servers;

use setup::Setup;

/// Users in pairs: one conversation for each of up to 256 connections.
const USERS: usize = 512;

/// One row of the table.
pub(crate) struct Row {
    pub(crate) name: &'static str,
    pub(crate) what: String,
    /// One value a round; what is quoted is the median.
    pub(crate) values: Vec<f64>,
    pub(crate) unit: &'static str,
    /// The required value and the aim; `AtMost` where less is better.
    pub(crate) goal: Option<Goal>,
    /// The figures that the values were made from.
    pub(crate) detail: String,
}

#[derive(Clone, Copy)]
pub(crate) enum Goal {
    AtLeast { floor: f64, aim: f64 },
    AtMost { floor: f64, aim: f64 },
}

/// What a measurement needs to know.
pub(crate) struct Bench {
    pub(crate) dir: PathBuf,
    pub(crate) binary: PathBuf,
    pub(crate) rounds: u32,
    pub(crate) duration: Duration,
    /// None without Go, which builds it.
    pub(crate) collector: Option<PathBuf>,
}

type Measure = fn(&Bench, &mut Setup) -> Result<Vec<Row>>;

/// In the order of the table. Those that fill the database come last.
const MEASURES: [(&str, Measure); 14] = [
    ("startup", measures::startup),
    ("memory", measures::memory),
    ("send", measures::send),
    ("messages", measures::messages),
    ("tracing", tracing::tracing),
    ("login", measures::login),
    ("storm", measures::storm),
    ("connections", scaling::connections),
    ("conversations", scaling::conversations),
    ("replicas", scaling::replicas),
    ("stream", streams::stream),
    ("reconnect", streams::reconnect),
    ("reads", reads::reads),
    ("depth", scaling::depth),
];

pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    for name in &args.only {
        if !MEASURES.iter().any(|(known, _)| known == name) {
            let known: Vec<_> = MEASURES.iter().map(|(name, _)| *name).collect();
            bail!("--only {name}: there is no such measurement; choose among {}", known.join(", "));
        }
    }
    harness::install::ensure_programs(|what| println!("{what}"))?;
    let dir = harness::places::target_dir()?.join("bench");
    servers::clear(&dir)?;
    std::fs::create_dir_all(&dir)?;
    let binary = match &args.binary {
        Some(binary) => std::path::absolute(binary)?,
        None => step("build, release", |progress| {
            let args = ["build", "--release", "--package", "chat-service"];
            progress.run(workspace::offline_cargo(&args))?;
            Ok(harness::places::target_dir()?.join("release/chat-service"))
        })?,
    };
    let collector = collector(args)?;
    let duration = Duration::from_secs(args.seconds);
    let bench = Bench { dir, binary, rounds: args.rounds, duration, collector };
    let mut setup = step("Postgres, Redis, users", |_| Setup::start(&bench.dir, &bench.binary, USERS))?;
    let mut rows = Vec::new();
    for (name, measure) in MEASURES {
        if args.wants(name) {
            rows.extend(step(name, |_| measure(&bench, &mut setup))?);
        }
    }
    drop(setup);
    servers::clear(&bench.dir)?;
    if args.json {
        print_json(&rows)
    } else {
        print_table(&rows)
    }
    let missed = rows.iter().any(|row| row.goal.is_some_and(|goal| !goal.floor_met(median(&row.values))));
    Ok(ExitCode::from(u8::from(missed)))
}

/// What `tracing` sends its spans to.
fn collector(args: &Args) -> Result<Option<PathBuf>> {
    if !args.wants("tracing") {
        return Ok(None);
    }
    match go_tools::go() {
        Err(error) if args.only.is_empty() => {
            println!("  tracing is left out: {error:#}");
            Ok(None)
        }
        _ => step("build the collector", |progress| COLLECTOR.build(progress)).map(Some),
    }
}

impl Goal {
    fn floor_met(self, value: f64) -> bool {
        match self {
            Self::AtLeast { floor, .. } => value >= floor,
            Self::AtMost { floor, .. } => value <= floor,
        }
    }

    fn aim_met(self, value: f64) -> bool {
        match self {
            Self::AtLeast { aim, .. } => value >= aim,
            Self::AtMost { aim, .. } => value <= aim,
        }
    }

    fn verdict(self, value: f64) -> &'static str {
        match (self.floor_met(value), self.aim_met(value)) {
            (_, true) => "aim met",
            (true, false) => "floor met",
            (false, false) => "BELOW FLOOR",
        }
    }

    fn shown(self) -> String {
        let (Self::AtLeast { floor, aim } | Self::AtMost { floor, aim }) = self;
        format!("{floor} / {aim}")
    }
}

pub(crate) fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    match (sorted.len(), sorted.len() / 2) {
        (0, _) => f64::NAN,
        (length, middle) if length % 2 == 1 => sorted[middle],
        (_, middle) => f64::midpoint(sorted[middle - 1], sorted[middle]),
    }
}

fn range(values: &[f64]) -> (f64, f64) {
    values
        .iter()
        .fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), value| (low.min(*value), high.max(*value)))
}

fn print_table(rows: &[Row]) {
    println!(
        "\n{:<14}{:>16}  {:<18}{:<14}{:<12}what",
        "name", "median", "min .. max", "floor / aim", "verdict"
    );
    for row in rows {
        let middle = median(&row.values);
        let (low, high) = range(&row.values);
        let goal = row.goal.map(Goal::shown).unwrap_or_default();
        let verdict = row.goal.map(|goal| goal.verdict(middle)).unwrap_or_default();
        println!(
            "{:<14}{:>16}  {:<18}{goal:<14}{verdict:<12}{}",
            row.name,
            format!("{middle:.2} {}", row.unit),
            format!("{low:.2} .. {high:.2}"),
            row.what
        );
        println!("{:<14}{}", "", row.detail);
    }
}

fn print_json(rows: &[Row]) {
    let rows: Vec<_> = rows
        .iter()
        .map(|row| {
            serde_json::json!({
                "name": row.name,
                "what": row.what,
                "unit": row.unit,
                "median": median(&row.values),
                "values": row.values,
                "detail": row.detail,
                "verdict": row.goal.map(|goal| goal.verdict(median(&row.values))),
            })
        })
        .collect();
    println!("{}", serde_json::Value::from(rows));
}

/// The figures of two series, for a row's detail.
pub(crate) fn figures(one: (&str, &[f64]), other: (&str, &[f64])) -> String {
    format!("{} {:.0}/s, {} {:.0}/s", one.0, median(one.1), other.0, median(other.1))
}

/// A folder for a measurement's files, deleted with the run.
pub(crate) fn scratch(bench: &Bench, name: &str) -> PathBuf {
    Path::new(&bench.dir).join(name)
}
