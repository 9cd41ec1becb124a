//! A real Prometheus with the shipped rules, and its alerts over time.

pub mod scale;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use harness::http;
use harness::install;
use harness::servers::daemon::{self, Daemon};
use harness::servers::ports;
use serde_json::Value;

use crate::signals;
use crate::steps::Progress;

/// The rules as they are shipped, from the clone's top.
pub const RULES: &str = "deploy/prometheus/rules";

/// The alerts that only a cluster can show, and the check of `cargo xtask e2e` that sees them fire and resolve.
pub const ON_A_CLUSTER: (&str, [&str; 5]) = (
    "alerts",
    [
        "ChatServiceCrashLooping",
        "ChatServiceHpaAtLimit",
        "ChatServiceMigrationFailed",
        "ChatServiceReplicasUnavailable",
        "ChatServiceRolloutStuck",
    ],
);

const START_LIMIT: Duration = Duration::from_secs(60);
const STOP_LIMIT: Duration = Duration::from_secs(20);
const ANSWER_LIMIT: Duration = Duration::from_secs(10);
const POLL: Duration = Duration::from_millis(250);

#[derive(Debug)]
pub struct Prometheus {
    daemon: Daemon,
    port: u16,
}

/// A scrape job, in Prometheus's own notation.
#[derive(Debug)]
pub struct ScrapeJob(pub Value);

/// One firing alert: its name, and the labels that distinguish it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Alert {
    pub name: String,
    pub namespace: String,
    severity: String,
    window: String,
}

impl Alert {
    /// Whether it is what a drill calls `key`, in this namespace.
    pub fn is(&self, key: &str, namespace: &str) -> bool {
        self.namespace == namespace && scale::is(key, &self.name, [&self.severity, &self.window])
    }

    /// Its name, with its window if it has one.
    pub fn shown(&self) -> String {
        format!("{} {}", self.name, self.window).trim_end().to_owned()
    }
}

impl Prometheus {
    /// Starts one with the rules on the faster clock. Its files are in `dir`.
    pub fn start(progress: &Progress, dir: &Path, rules: &[PathBuf], jobs: Vec<ScrapeJob>) -> Result<Self> {
        let programs = install::ensure_prometheus(|line| progress.note(line))?;
        let scaled = scale::write(rules, &dir.join("rules"))?;
        check(progress, &programs.promtool, &scaled)?;
        let interval = scale::render(scale::SCRAPE_INTERVAL);
        let config = serde_json::json!({
            "global": {
                "scrape_interval": interval,
                "scrape_timeout": interval,
                "evaluation_interval": scale::render(scale::EVALUATION_INTERVAL),
            },
            "rule_files": scaled,
            "scrape_configs": jobs.into_iter().map(|job| job.0).collect::<Vec<_>>(),
        });
        // JSON is YAML.
        let config = serde_json::to_string_pretty(&config)?;
        let lookback = format!("--query.lookback-delta={}", scale::render(scale::LOOKBACK));
        Self::launch(&programs.server, dir, &config, ports::free()?, &[lookback])
    }

    /// Starts the program with this configuration, whose paths are absolute. Its files are in `dir`.
    pub fn launch(server: &Path, dir: &Path, config: &str, port: u16, arguments: &[String]) -> Result<Self> {
        let file = dir.join("prometheus.yaml");
        fs::write(&file, config).with_context(|| format!("write {}", file.display()))?;
        let mut command = daemon::dies_with_us(server, "KILL");
        command.arg(format!("--config.file={}", file.display()));
        command.arg(format!("--storage.tsdb.path={}", dir.join("data").display()));
        command.arg(format!("--web.listen-address=127.0.0.1:{port}"));
        command.args(arguments).current_dir(dir);
        let mut daemon = Daemon::start(command, &dir.join("prometheus.log")).context("start prometheus")?;
        daemon.await_ready(START_LIMIT, || get(port, "/-/ready").is_ok()).context("Prometheus")?;
        Ok(Self { daemon, port })
    }

    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// Every alert whose condition holds now, and whether it fires already.
    pub fn active(&self) -> Result<BTreeMap<Alert, bool>> {
        let answer = self.get("/api/v1/alerts")?;
        let alerts = answer["data"]["alerts"].as_array().context("no alerts in the answer")?;
        let mut active = BTreeMap::new();
        for alert in alerts {
            let label = |name: &str| alert["labels"][name].as_str().unwrap_or_default().to_owned();
            let key = Alert {
                name: label("alertname"),
                namespace: label("namespace"),
                severity: label("severity"),
                window: label("window"),
            };
            *active.entry(key).or_default() |= alert["state"] == "firing";
        }
        Ok(active)
    }

    /// Fails with the name of a rule that cannot be evaluated.
    pub fn rules_are_healthy(&self) -> Result<()> {
        let answer = self.get("/api/v1/rules")?;
        let groups = answer["data"]["groups"].as_array().context("no rule groups")?;
        for rule in groups.iter().flat_map(|group| group["rules"].as_array().into_iter().flatten()) {
            ensure!(rule["health"] != "err", "{} cannot be evaluated: {}", rule["name"], rule["lastError"]);
        }
        Ok(())
    }

    /// Waits until all targets are up.
    pub fn await_targets(&self, limit: Duration) -> Result<()> {
        let mut down = String::new();
        let up = daemon::poll(limit, || {
            let answer = self.get("/api/v1/targets?state=active")?;
            let targets = answer["data"]["activeTargets"].as_array().context("no targets")?.clone();
            let missing = targets.iter().find(|target| target["health"] != "up");
            down =
                missing.map_or_else(String::new, |one| format!("{}: {}", one["scrapeUrl"], one["lastError"]));
            Ok((missing.is_none() && !targets.is_empty()).then_some(()))
        })?;
        ensure!(up.is_some(), "not scraped within {} s: {down}", limit.as_secs());
        Ok(())
    }

    fn get(&self, path: &str) -> Result<Value> {
        get(self.port, path)
    }
}

/// Asks the Prometheus on this port.
pub fn get(port: u16, path: &str) -> Result<Value> {
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let answer = http::get(address, path, ANSWER_LIMIT).context("no answer from Prometheus")?;
    ensure!(answer.status == 200, "Prometheus answers {} to {path}: {}", answer.status, answer.text());
    // `/-/ready` says so in a sentence.
    Ok(serde_json::from_slice(&answer.body).unwrap_or(Value::Null))
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        // Gracefully, so that its data can be opened later.
        let _ = self.daemon.stop(STOP_LIMIT);
    }
}

/// The scaled rules pass the check that the shipped ones pass.
fn check(progress: &Progress, promtool: &Path, rules: &[PathBuf]) -> Result<()> {
    let mut command = std::process::Command::new(promtool);
    command.args(["check", "rules"]).args(rules);
    progress.run(command).map(drop)
}

/// When which alert started and stopped firing, as polled.
#[derive(Debug)]
pub struct History {
    started: Instant,
    fired: BTreeMap<Alert, Vec<Firing>>,
}

/// One firing of an alert.
#[derive(Clone, Copy, Debug)]
struct Firing {
    from: Instant,
    /// When its condition stopped to hold.
    ended: Option<Instant>,
}

/// How long the condition must not hold before the alert counts as resolved. On a busy machine a window may hold too few
/// scrapes for a moment.
const CALM: Duration = Duration::from_secs(4);

impl History {
    fn new() -> Self {
        Self { started: Instant::now(), fired: BTreeMap::new() }
    }

    fn add(&mut self, active: &BTreeMap<Alert, bool>) {
        let now = Instant::now();
        for (alert, fires) in active {
            let firings = self.fired.entry(alert.clone()).or_default();
            match firings.last_mut() {
                Some(Firing { ended, .. }) if ended.is_none_or(|ended| now - ended < CALM) => *ended = None,
                _ if *fires => firings.push(Firing { from: now, ended: None }),
                _ => {}
            }
        }
        let open = self.fired.iter_mut().filter(|(alert, _)| !active.contains_key(alert));
        for firing in open.filter_map(|(_, firings)| firings.last_mut()) {
            firing.ended.get_or_insert(now);
        }
    }

    fn of<'a>(&'a self, key: &'a str, namespace: &'a str) -> impl Iterator<Item = &'a Firing> {
        let ours = self.fired.iter().filter(move |(alert, _)| alert.is(key, namespace));
        ours.flat_map(|(_, firings)| firings)
    }

    /// Whether it fires now, or did a moment ago.
    pub fn fires(&self, key: &str, namespace: &str) -> bool {
        self.of(key, namespace).any(|firing| firing.end().is_none())
    }

    /// When this alert first fired in the namespace after this moment, and when all of it had ended, if it has.
    pub fn since(&self, moment: Instant, key: &str, namespace: &str) -> Option<(Instant, Option<Instant>)> {
        let firings: Vec<_> = self.of(key, namespace).filter(|firing| firing.from >= moment).collect();
        let from = firings.iter().map(|firing| firing.from).min()?;
        let ends: Option<Vec<Instant>> = firings.iter().map(|firing| firing.end()).collect();
        Some((from, ends.and_then(|ends| ends.into_iter().max())))
    }

    /// All that fired in the namespace after this moment.
    pub fn all_since(&self, moment: Instant, namespace: &str) -> Vec<&Alert> {
        let ours = self.fired.iter().filter(|(alert, _)| alert.namespace == namespace);
        ours.filter(|(_, firings)| firings.iter().any(|firing| firing.from >= moment))
            .map(|(alert, _)| alert)
            .collect()
    }
}

impl Firing {
    fn end(&self) -> Option<Instant> {
        self.ended.filter(|ended| ended.elapsed() >= CALM)
    }
}

/// Polls a Prometheus, so that no alert is missed.
#[derive(Debug)]
pub struct Watch<'a> {
    prometheus: &'a Prometheus,
    history: Mutex<History>,
    over: AtomicBool,
}

impl<'a> Watch<'a> {
    pub fn new(prometheus: &'a Prometheus) -> Self {
        Self { prometheus, history: Mutex::new(History::new()), over: AtomicBool::new(false) }
    }

    /// Records what fires while the work is done.
    pub fn during<T>(&self, progress: &Progress, work: impl FnOnce() -> T) -> T {
        thread::scope(|scope| {
            scope.spawn(|| self.run(progress));
            let outcome = work();
            self.over.store(true, Ordering::Relaxed);
            outcome
        })
    }

    fn run(&self, progress: &Progress) {
        while !self.over.load(Ordering::Relaxed) {
            match self.prometheus.active() {
                Ok(active) => {
                    let mut history = self.history();
                    history.add(&active);
                    let firing = active.iter().filter(|(_, fires)| **fires);
                    let names: BTreeSet<&str> = firing.map(|(alert, _)| alert.name.as_str()).collect();
                    let names = names.into_iter().collect::<Vec<_>>().join(" ");
                    progress.say(&format!("{:.0} s: {names}", history.started.elapsed().as_secs_f32()));
                }
                // The next poll may work; an alert that is missed meanwhile fails its own check.
                Err(error) => progress.say(&format!("{error:#}")),
            }
            thread::sleep(POLL);
        }
    }

    pub fn history(&self) -> MutexGuard<'_, History> {
        self.history.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for an answer for each alert; the error names those without.
    pub fn wait<T>(
        &self,
        limit: Duration,
        what: &str,
        alerts: &[&'static str],
        ask: impl Fn(&History, &'static str) -> Option<T>,
    ) -> Result<Vec<T>> {
        let deadline = Instant::now() + limit;
        loop {
            signals::check()?;
            let answers: Vec<Option<T>> = {
                let history = self.history();
                alerts.iter().map(|alert| ask(&history, alert)).collect()
            };
            let unanswered = alerts.iter().zip(&answers).filter(|(_, answer)| answer.is_none());
            let missing = unanswered.map(|(alert, _)| *alert).collect::<Vec<_>>().join(", ");
            if missing.is_empty() {
                return Ok(answers.into_iter().flatten().collect());
            }
            ensure!(Instant::now() < deadline, "{missing} {what} within {} s", limit.as_secs());
            thread::sleep(POLL);
        }
    }
}
