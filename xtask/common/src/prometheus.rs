//! A real Prometheus with the real rules, and what it says of alerts.

pub mod scale;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use harness::http;
use harness::install;
use harness::servers::{daemon, ports};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

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

#[derive(Debug)]
pub struct Prometheus {
    child: Child,
    port: u16,
}

/// What one scrape job asks, in Prometheus's own notation.
#[derive(Debug)]
pub struct ScrapeJob(pub Value);

/// One firing alert: its name, and the labels that tell it from its like.
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
    /// Starts one with the rule files on the faster clock. Its files are in `dir`.
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
        let log = dir.join("prometheus.log");
        let output = File::create(&log).with_context(|| format!("create {}", log.display()))?;
        let mut command = daemon::dies_with_us(server, "KILL");
        command.arg(format!("--config.file={}", file.display()));
        command.arg(format!("--storage.tsdb.path={}", dir.join("data").display()));
        command.arg(format!("--web.listen-address=127.0.0.1:{port}"));
        command.args(arguments);
        command.current_dir(dir).stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output);
        let child = daemon::spawn(command).context("start prometheus")?;
        let mut prometheus = Self { child, port };
        let ready = daemon::poll(START_LIMIT, || {
            let ended = prometheus.child.try_wait()?.is_some();
            Ok((ended || prometheus.get("/-/ready").is_ok()).then_some(!ended))
        })?;
        if ready != Some(true) {
            let words = daemon::tail(&fs::read_to_string(&log).unwrap_or_default(), 12);
            bail!("Prometheus is not ready, its last words:\n{words}");
        }
        Ok(prometheus)
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

    /// Waits until everything that it should scrape answers.
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
        // In order, so that what it recorded can be looked at; but not for long.
        let _ = kill_process(Pid::from_child(&self.child), Signal::TERM);
        let ended = daemon::poll(STOP_LIMIT, || Ok(self.child.try_wait()?));
        if !matches!(ended, Ok(Some(_))) {
            self.child.kill().ok();
            self.child.wait().ok();
        }
    }
}

/// The scaled rules pass the check that the shipped ones pass.
fn check(progress: &Progress, promtool: &Path, rules: &[PathBuf]) -> Result<()> {
    let mut command = std::process::Command::new(promtool);
    command.args(["check", "rules"]).args(rules);
    progress.run(command).map(drop)
}

/// When which alert began and ended to fire, as seen by asking again and again.
#[derive(Debug)]
pub struct History {
    started: Instant,
    fired: BTreeMap<Alert, Vec<Firing>>,
}

/// A time that an alert fired.
#[derive(Clone, Copy, Debug)]
struct Firing {
    from: Instant,
    /// Since when its condition does not hold any more.
    ended: Option<Instant>,
}

/// How long the condition has to be gone. On a busy machine a window may hold too few scrapes for a moment, and its alert
/// begins anew.
const CALM: Duration = Duration::from_secs(4);

impl History {
    pub fn new() -> Self {
        Self { started: Instant::now(), fired: BTreeMap::new() }
    }

    pub fn add(&mut self, active: &BTreeMap<Alert, bool>) {
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

    pub fn elapsed(&self) -> Duration {
        self.started.elapsed()
    }
}

impl Firing {
    fn end(&self) -> Option<Instant> {
        self.ended.filter(|ended| ended.elapsed() >= CALM)
    }
}
