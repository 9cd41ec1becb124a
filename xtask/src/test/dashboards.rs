//! The dashboards, as far as they can be judged without Grafana: by its own model, by Prometheus's parser, and by the
//! metrics that there are. That every panel has data is seen by `cargo xtask drill`.

mod lint;
mod metrics;

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};
use serde_json::{Value, json};
use tests::servers::{daemon, ports, programs};
use tests::{Postgres, Redis, Scratch, install, places};

use super::chart;
use crate::dashboards::check::{self, Scope};
use crate::dashboards::{self, overview};
use crate::go_tools::{self, GoTool};
use crate::steps::{Progress, Tally};
use crate::workspace::{self, in_ci};

const MODEL: GoTool =
    GoTool { name: "dashboards", module: "deploy/lint", package: "./dashboards", settings: &[] };

/// Whose documentation names the metrics of Kubernetes' objects.
const KUBE_STATE_METRICS: &str = "k8s.io/kube-state-metrics/v2@v2.18.0";

/// What Prometheus makes itself, of each scrape and of each alert.
const PROMETHEUS_OWN: [&str; 4] = ["up", "scrape_duration_seconds", "scrape_samples_scraped", "ALERTS"];

/// Names that the kubelet and its cAdvisor export; there is no list of them to compare with.
const KUBELET: [&str; 6] = [
    "container_cpu_cfs_periods_total",
    "container_cpu_cfs_throttled_periods_total",
    "container_cpu_usage_seconds_total",
    "container_memory_working_set_bytes",
    "kubelet_volume_stats_capacity_bytes",
    "kubelet_volume_stats_used_bytes",
];

/// Metrics of the service that are on no dashboard, with the reason.
const NOT_SHOWN: [(&str, &str); 1] =
    [("process_virtual_memory_bytes", "address space that costs nothing; resident memory is shown")];

const START_LIMIT: Duration = Duration::from_secs(20);

/// What needs neither the service nor its servers.
pub(super) fn check(tally: &mut Tally) {
    tally.check("dashboards: generated", "cargo xtask dashboards", |_| dashboards::compare());
    tally.check("dashboards: lint", "", |_| lint::all());
    tally.check("dashboards: rules", "", |_| agrees_with_rules());
    if go_tools::go().is_ok() || in_ci() {
        tally.check("dashboards: model", "", model);
    } else {
        println!("  {:24}skipped: needs Go", "dashboards: model");
    }
    match promtool() {
        Ok(promtool) => {
            tally.check("dashboards: PromQL", "", |progress| parse(progress, &promtool));
        }
        Err(error) if in_ci() => {
            tally.check("dashboards: PromQL", "", |_| -> Result<()> { Err(error) });
        }
        Err(error) => println!("  {:24}skipped: {error:#}", "dashboards: PromQL"),
    }
}

/// Which metrics there are is asked of the built service.
pub(super) fn check_metrics(tally: &mut Tally, postgres: &Postgres, redis: &Redis) {
    tally.check("dashboards: metrics", "", |progress| {
        let scraped = scrape(postgres, redis)?;
        let objects = kube_state_metrics(progress)?;
        exist(&scraped, objects.as_ref())?;
        shown(&scraped)
    });
}

/// CI installs what it lacks.
fn promtool() -> Result<PathBuf> {
    if programs::in_path("promtool").is_none() && in_ci() {
        install::install(&["prometheus"])?;
    }
    programs::in_path("promtool").context("needs promtool (Debian: apt-get install prometheus)")
}

/// Grafana's own model, and that it is one: a field that it does not have is refused.
fn model(progress: &Progress) -> Result<()> {
    let tool = MODEL.build(progress)?;
    let judge = |files: &[PathBuf]| {
        let mut judge = Command::new(&tool);
        judge.args(files).current_dir(workspace::root());
        progress.run(judge)
    };
    let files: Vec<PathBuf> = dashboards::links().into_keys().collect();
    judge(&files)?;
    let text = fs::read_to_string(workspace::root().join(&files[0]))?;
    let broken = places::target_dir()?.join("xtask/broken-dashboard.json");
    fs::create_dir_all(broken.parent().unwrap_or(Path::new(".")))?;
    for (field, wrong) in [("\"gridPos\"", "\"gridPosition\""), ("\"expr\"", "\"expression\"")] {
        fs::write(&broken, text.replacen(field, wrong, 1))?;
        match judge(std::slice::from_ref(&broken)) {
            Ok(_) => bail!("{wrong} instead of {field} was taken"),
            Err(error) => ensure!(format!("{error:#}").contains(wrong.trim_matches('"')), "{error:#}"),
        }
    }
    Ok(())
}

/// Every query as a recording rule, which Prometheus's own parser reads.
fn parse(progress: &Progress, promtool: &Path) -> Result<()> {
    let judge = |exprs: Vec<String>| {
        let rule = |(number, expr): (usize, &String)| json!({ "record": format!("query:number{number}"), "expr": expr });
        let rules: Vec<Value> = exprs.iter().enumerate().map(rule).collect();
        let file = places::target_dir()?.join("xtask/dashboard-queries.yaml");
        // JSON is YAML.
        fs::write(&file, json!({ "groups": [{ "name": "dashboards", "rules": rules }] }).to_string())?;
        let mut judge = Command::new(promtool);
        judge.args(["check", "rules"]).arg(&file);
        progress.run(judge).map(drop)
    };
    let exprs: Vec<String> = questions().into_iter().map(|question| question.expr).collect();
    ensure!(!exprs.is_empty(), "no query");
    judge(exprs)?;
    match judge(vec!["sum by (le (up)".to_owned()]) {
        Ok(()) => bail!("a query that cannot be read was taken"),
        Err(error) => ensure!(format!("{error:#}").contains("parse"), "{error:#}"),
    }
    Ok(())
}

fn questions() -> Vec<check::Question> {
    let scope = Scope::default();
    let of = |dashboard: &dashboards::model::Dashboard| -> Vec<check::Question> {
        dashboard.panels().flat_map(|panel| check::questions(dashboard, panel, &scope)).collect()
    };
    dashboards::all().iter().flat_map(of).collect()
}

/// The text of all rules.
fn rules() -> Result<String> {
    let folder = workspace::root().join("helm/chat-service/files/rules");
    let mut text = String::new();
    for entry in fs::read_dir(&folder).with_context(|| format!("read {}", folder.display()))? {
        text += &fs::read_to_string(entry?.path())?;
    }
    Ok(text)
}

/// What follows this word in the rules: `record` or `alert`.
fn named<'a>(rules: &'a str, word: &str) -> BTreeSet<&'a str> {
    let name =
        |line: &'a str| line.trim_start().trim_start_matches("- ").strip_prefix(word)?.strip_prefix(": ");
    rules.lines().filter_map(name).collect()
}

/// The alerts behind the runbook links exist, and objectives count the same requests.
fn agrees_with_rules() -> Result<()> {
    let rules = rules()?;
    let alerts = named(&rules, "alert");
    for dashboard in dashboards::all() {
        for alert in dashboard.panels().flat_map(|panel| &panel.runbooks) {
            ensure!(alerts.contains(alert), "{}: no alert is called {alert}", dashboard.title);
        }
    }
    for selector in [overview::API, overview::TIMED] {
        ensure!(rules.contains(selector), "the rules do not count by {selector}");
    }
    Ok(())
}

/// A running service; dropping it ends it.
struct Service(Child);

impl Drop for Service {
    fn drop(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

/// The names of all samples that a service without traffic exports.
fn scrape(postgres: &Postgres, redis: &Redis) -> Result<BTreeSet<String>> {
    const DATABASE: &str = "dashboards";
    postgres.query("postgres", &format!("DROP DATABASE IF EXISTS {DATABASE}"))?;
    postgres.create_database(DATABASE)?;
    let scratch = Scratch::new("dashboards")?;
    let log = File::create(scratch.path().join("service.log"))?;
    let ops_port = ports::free()?;
    let mut command = daemon::dies_with_us(&places::service_binary()?, "KILL");
    command.arg("serve").env_clear().current_dir(scratch.path());
    command.envs([
        ("DATABASE_URL", postgres.url(DATABASE)),
        ("REDIS_URL", redis.url(0)),
        ("HOST", "127.0.0.1".to_owned()),
        ("PORT", ports::free()?.to_string()),
        ("OPS_PORT", ops_port.to_string()),
    ]);
    command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
    let _service = Service(daemon::spawn(command).context("start the service")?);
    let url = format!("http://127.0.0.1:{ops_port}");
    let client = reqwest::blocking::Client::builder().timeout(Duration::from_secs(5)).build()?;
    let text = daemon::poll(START_LIMIT, || {
        let get = |path: &str| client.get(format!("{url}{path}")).send()?.error_for_status()?.text();
        Ok(get("/healthz").and_then(|_| get("/metrics")).ok())
    })?;
    let text = text.ok_or_else(|| anyhow!("no metrics within {} s", START_LIMIT.as_secs()))?;
    let name = |line: &str| line.split(['{', ' ']).next().unwrap_or_default().to_owned();
    Ok(text.lines().filter(|line| !line.starts_with('#')).map(name).collect())
}

/// What the documentation of kube-state-metrics says; nothing where Go is not there to fetch it.
fn kube_state_metrics(progress: &Progress) -> Result<Option<String>> {
    if go_tools::go().is_err() && !in_ci() {
        return Ok(None);
    }
    let folder = chart::module_folder(progress, KUBE_STATE_METRICS)?.join("docs/metrics");
    let mut text = String::new();
    for area in fs::read_dir(&folder).with_context(|| format!("read {}", folder.display()))? {
        for file in fs::read_dir(area?.path())? {
            text += &fs::read_to_string(file?.path())?;
        }
    }
    Ok(Some(text))
}

/// Whatever a query names is exported, recorded, or another exporter's.
fn exist(scraped: &BTreeSet<String>, objects: Option<&String>) -> Result<()> {
    let rules = rules()?;
    let recorded = named(&rules, "record");
    for question in questions() {
        for name in metrics::of(&question.expr) {
            let cluster = KUBELET.contains(&name.as_str()) || name.starts_with("kube_");
            ensure!(
                !cluster || question.needs.is_some(),
                "{}: {name} needs more than the service, and the panel does not say so",
                question.place
            );
            let documented = objects.is_none_or(|text| text.contains(&format!("| {name} ")));
            let known = scraped.contains(&name)
                || recorded.contains(name.as_str())
                || PROMETHEUS_OWN.contains(&name.as_str())
                || KUBELET.contains(&name.as_str())
                || name.starts_with("kube_") && documented;
            ensure!(known, "{}: there is no metric {name}", question.place);
        }
    }
    Ok(())
}

/// Whatever the service exports is on a dashboard.
fn shown(scraped: &BTreeSet<String>) -> Result<()> {
    let family = |name: &str| {
        let histogram =
            |suffix| name.strip_suffix(suffix).filter(|stem| scraped.contains(&format!("{stem}_bucket")));
        ["_bucket", "_sum", "_count"].into_iter().find_map(histogram).unwrap_or(name).to_owned()
    };
    let mut asked: BTreeSet<String> = questions()
        .iter()
        .flat_map(|question| metrics::of(&question.expr))
        .map(|name| family(&name))
        .collect();
    // By way of what is recorded of it.
    asked.extend(metrics::of(&rules()?).iter().map(|name| family(name)));
    let exported: BTreeSet<String> = scraped.iter().map(|name| family(name)).collect();
    let excused = |name: &str| NOT_SHOWN.iter().any(|(excused, _)| *excused == name);
    let missing: Vec<&String> = exported.difference(&asked).filter(|name| !excused(name)).collect();
    ensure!(missing.is_empty(), "exported, and on no dashboard and in no rule: {missing:?}");
    let stale = NOT_SHOWN.iter().find(|(name, _)| asked.contains(*name) || !exported.contains(*name));
    ensure!(stale.is_none(), "NOT_SHOWN excuses what needs no excuse: {stale:?}");
    Ok(())
}
