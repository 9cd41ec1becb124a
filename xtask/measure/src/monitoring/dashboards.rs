//! Checks of the dashboards that need no Grafana: with its own model, Prometheus's parser, and the service's metrics.
//! `cargo xtask drill` checks that every panel has data.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Result, bail, ensure};
use common::go_tools::{self, GoTool};
use common::steps::{Progress, Tally};
use common::workspace;
use harness::places;

use super::scrape::{self, Metrics};
use super::{lint, metrics, parse_queries};
use crate::dashboards::check::{self, Scope};
use crate::dashboards::{self, overview};
use crate::rules;

const MODEL: GoTool =
    GoTool { name: "dashboards", module: "deploy/lint", package: "./dashboards", settings: &[] };

/// Metrics of the service that are on no dashboard, with the reason.
const NOT_SHOWN: [(&str, &str); 1] =
    [("process_virtual_memory_bytes", "address space that costs nothing; resident memory is shown")];

/// What needs neither the service nor its servers.
pub(super) fn check(tally: &mut Tally, promtool: Option<&Path>) {
    tally.check("dashboards: generated", "cargo xtask dashboards", |_| dashboards::compare());
    tally.check("dashboards: lint", "", |_| lint::all());
    tally.check("dashboards: rules", "", |_| agrees_with_rules());
    if go_tools::can_use("dashboards: model") {
        tally.check("dashboards: model", "", model);
    }
    if let Some(promtool) = promtool {
        tally.check("dashboards: PromQL", "", |progress| parse(progress, promtool));
    }
}

/// Every query names existing metrics, and every metric of the service is in use.
pub(super) fn check_metrics(tally: &mut Tally, there: &Metrics) {
    tally.check("dashboards: metrics", "", |_| {
        exist(there)?;
        shown(there)
    });
}

/// Grafana's own model accepts the dashboards, and refuses unknown fields.
fn model(progress: &Progress) -> Result<()> {
    let tool = MODEL.build(progress)?;
    let check = |files: &[PathBuf]| {
        let mut command = Command::new(&tool);
        command.args(files).current_dir(workspace::root());
        progress.run(command)
    };
    let files: Vec<PathBuf> = dashboards::links().into_keys().collect();
    check(&files)?;
    let text = fs::read_to_string(workspace::root().join(&files[0]))?;
    let broken = places::target_dir()?.join("xtask/broken-dashboard.json");
    fs::create_dir_all(broken.parent().unwrap_or(Path::new(".")))?;
    for (field, wrong) in [("\"gridPos\"", "\"gridPosition\""), ("\"expr\"", "\"expression\"")] {
        fs::write(&broken, text.replacen(field, wrong, 1))?;
        match check(std::slice::from_ref(&broken)) {
            Ok(_) => bail!("{wrong} instead of {field} was taken"),
            Err(error) => ensure!(format!("{error:#}").contains(wrong.trim_matches('"')), "{error:#}"),
        }
    }
    Ok(())
}

/// Every query is one to Prometheus's own parser.
fn parse(progress: &Progress, promtool: &Path) -> Result<()> {
    let named = |(number, question): (usize, check::Question)| (format!("query{number}"), question.expr);
    let queries: Vec<(String, String)> = questions().into_iter().enumerate().map(named).collect();
    ensure!(!queries.is_empty(), "no query");
    parse_queries(progress, promtool, &queries)?;
    match parse_queries(progress, promtool, &[("broken".to_owned(), "sum by (le (up)".to_owned())]) {
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

/// The alerts behind the runbook links exist, and objectives count the same requests.
fn agrees_with_rules() -> Result<()> {
    let rules = rules::all()?;
    let alerts: BTreeSet<&str> = rules.iter().filter_map(|rule| rule.alert.as_deref()).collect();
    for dashboard in dashboards::all() {
        for alert in dashboard.panels().flat_map(|panel| &panel.runbooks) {
            ensure!(alerts.contains(alert), "{}: no alert is called {alert}", dashboard.title);
        }
    }
    for selector in [overview::API, overview::TIMED] {
        ensure!(
            rules.iter().any(|rule| rule.expr.contains(selector)),
            "the rules do not count by {selector}"
        );
    }
    Ok(())
}

/// Every metric in a query is exported, recorded, or of another exporter.
fn exist(there: &Metrics) -> Result<()> {
    for question in questions() {
        for name in metrics::of(&question.expr) {
            ensure!(
                !scrape::of_a_cluster(&name) || question.needs.is_some(),
                "{}: {name} needs more than the service, and the panel does not say so",
                question.place
            );
            ensure!(there.have(&name), "{}: there is no metric {name}", question.place);
        }
    }
    Ok(())
}

/// Every metric of the service is on a dashboard.
fn shown(there: &Metrics) -> Result<()> {
    let rules = rules::all()?;
    let asked: BTreeSet<String> = questions()
        .iter()
        .map(|question| &question.expr)
        // Or in a recording rule or an alert.
        .chain(rules.iter().map(|rule| &rule.expr))
        .flat_map(|expr| metrics::of(expr))
        .map(|name| there.family(&name))
        .collect();
    let exported: BTreeSet<String> = there.names.iter().map(|name| there.family(name)).collect();
    let excused = |name: &str| NOT_SHOWN.iter().any(|(excused, _)| *excused == name);
    let missing: Vec<&String> = exported.difference(&asked).filter(|name| !excused(name)).collect();
    ensure!(missing.is_empty(), "exported, and on no dashboard and in no rule: {missing:?}");
    let stale = NOT_SHOWN.iter().find(|(name, _)| asked.contains(*name) || !exported.contains(*name));
    ensure!(stale.is_none(), "NOT_SHOWN excuses what needs no excuse: {stale:?}");
    Ok(())
}
