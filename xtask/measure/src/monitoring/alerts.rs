//! Checks of the alerts that need no fault: with Prometheus's own tools, their unit tests, and the runbooks that they
//! link to. `cargo xtask drill` checks that they fire.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use common::steps::{Progress, Tally};
use common::workspace;
use harness::places;

use super::scrape::Metrics;
use super::{metrics, parse_queries};
use crate::rules::{self, AlertTest, Rule};

const RUNBOOKS: &str = "deploy/runbooks";

/// The sections of every runbook, in this order.
const SECTIONS: [&str; 5] = ["Meaning", "Impact", "Diagnosis", "Mitigation", "Escalation"];

const SEVERITIES: [&str; 3] = ["critical", "warning", "info"];

/// What `promtool check metrics` says of names that have a reason.
const LINT_EXCUSED: [(&str, &str); 1] =
    [("db_client_connection_count", "the semantic conventions' own name for it")];

/// Prefixes of all metrics: of the service, of recording rules and of a cluster.
const PREFIXES: [&str; 9] = [
    "chat_",
    "container_",
    "db_client_",
    "http_server_",
    "instance:",
    "kube_",
    "kubelet_",
    "namespace_job:",
    "process_",
];

/// What needs no running service.
pub(super) fn check(tally: &mut Tally, promtool: Option<&Path>) {
    if let Some(promtool) = promtool {
        tally.check("rules: lint", "", |progress| lint(progress, promtool));
        tally.check("rules: unit tests", "", |progress| unit_tests(progress, promtool));
        tally.check("runbooks: PromQL", "", |progress| parse(progress, promtool));
    }
    tally
        .check("rules: three ways", "", |_| three_ways(&rules::all()?, &runbooks()?, &rules::alert_tests()?));
}

/// What needs to know which metrics there are.
pub(super) fn check_metrics(tally: &mut Tally, promtool: Option<&Path>, there: &Metrics) {
    tally.check("rules: metrics", "", |_| exist(there));
    if let Some(promtool) = promtool {
        tally.check("metrics: lint", "", |_| lint_metrics(promtool, &there.text));
    }
}

/// promtool's lint; a duplicate rule proves that it works.
fn lint(progress: &Progress, promtool: &Path) -> Result<()> {
    let promtool_check = |files: &[PathBuf]| {
        let mut command = Command::new(promtool);
        command.args(["check", "rules", "--lint=all", "--lint-fatal"]).args(files);
        progress.run(command)
    };
    promtool_check(&rules::files()?)?;
    let broken = places::target_dir()?.join("xtask/broken-rules.yaml");
    let rule = "{record: a, expr: b}";
    fs::write(&broken, format!("groups: [{{name: twice, rules: [{rule}, {rule}]}}]"))?;
    match promtool_check(&[broken]) {
        Ok(_) => bail!("a rule that is there twice was taken"),
        Err(error) => ensure!(format!("{error:#}").contains("duplicate"), "{error:#}"),
    }
    Ok(())
}

fn unit_tests(progress: &Progress, promtool: &Path) -> Result<()> {
    let mut command = Command::new(promtool);
    command.args(["test", "rules"]).args(rules::yaml_files(&workspace::root().join(rules::TESTS))?);
    progress.run(command).map(drop)
}

/// The runbooks by name, and README.md with them.
fn runbooks() -> Result<BTreeMap<String, String>> {
    let folder = workspace::root().join(RUNBOOKS);
    let mut runbooks = BTreeMap::new();
    for entry in fs::read_dir(&folder).with_context(|| format!("read {}", folder.display()))? {
        let path = entry?.path();
        let name = path.file_stem().and_then(|name| name.to_str()).context("a name in UTF-8")?;
        runbooks.insert(name.to_owned(), fs::read_to_string(&path)?);
    }
    Ok(runbooks)
}

/// Every alert has a runbook and unit tests, and the reverse.
fn three_ways(rules: &[Rule], runbooks: &BTreeMap<String, String>, tests: &[AlertTest]) -> Result<()> {
    let mut severities: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    let alerts = rules.iter().filter_map(|rule| Some((rule.alert.as_deref()?, rule)));
    for (alert, rule) in alerts {
        let named = || format!("{alert} {:?}", rule.labels);
        check_words(alert, rule).with_context(named)?;
        check_tests(alert, rule, tests).with_context(named)?;
        severities.entry(alert).or_default().push(rule.label("severity"));
    }
    ensure!(!severities.is_empty(), "no alerts");
    for test in tests {
        ensure!(
            severities.contains_key(test.alertname.as_str()),
            "no alert {}, which has a test",
            test.alertname
        );
    }
    let readme = runbooks.get("README").context("no README.md among the runbooks")?;
    let rows: Vec<&str> = readme.lines().filter(|line| line.starts_with("| [")).collect();
    for (alert, severities) in &mut severities {
        let runbook = runbooks.get(*alert).with_context(|| format!("{RUNBOOKS}/{alert}.md is missing"))?;
        check_runbook(alert, runbook).with_context(|| format!("{RUNBOOKS}/{alert}.md"))?;
        severities.sort_by_key(|severity| SEVERITIES.iter().position(|known| known == severity));
        severities.dedup();
        let row = format!("| [{alert}]({alert}.md) | {} |", severities.join(", "));
        ensure!(rows.iter().any(|line| line.starts_with(&row)), "{RUNBOOKS}/README.md has no row {row}");
    }
    for name in runbooks.keys().filter(|name| *name != "README") {
        ensure!(severities.contains_key(name.as_str()), "{RUNBOOKS}/{name}.md is of no alert");
    }
    ensure!(rows.len() == severities.len(), "{RUNBOOKS}/README.md has a row of no alert, or two of one");
    Ok(())
}

/// The text that an alert carries.
fn check_words(alert: &str, rule: &Rule) -> Result<()> {
    ensure!(SEVERITIES.contains(&rule.label("severity")), "the severity is none of {SEVERITIES:?}");
    let annotation = |name: &str| rule.annotations.get(name).with_context(|| format!("no {name}"));
    let summary = annotation("summary")?;
    ensure!(summary.contains("$labels.namespace"), "the summary does not name the namespace");
    ensure!(summary.contains("$value"), "the summary does not name the number");
    ensure!(annotation("description")?.contains("$labels.namespace"), "the description names no namespace");
    let runbook = format!("{RUNBOOKS}/{alert}.md");
    ensure!(*annotation("runbook_url")? == runbook, "runbook_url is not {runbook}");
    Ok(())
}

/// One test in which this very rule fires, and one in which it does not.
fn check_tests(alert: &str, rule: &Rule, tests: &[AlertTest]) -> Result<()> {
    let fires = |test: &&AlertTest| {
        let is_ours = |(name, value): (&String, &String), labels: &BTreeMap<String, String>| {
            labels.get(name).is_some_and(|expected| expected == value)
        };
        test.exp_alerts.iter().any(|one| rule.labels.iter().all(|label| is_ours(label, &one.exp_labels)))
    };
    let (firing, quiet): (Vec<_>, Vec<_>) =
        tests.iter().filter(|test| test.alertname == alert).partition(fires);
    ensure!(!firing.is_empty(), "no unit test in {} in which it fires", rules::TESTS);
    ensure!(!quiet.is_empty(), "no unit test in {} in which it is quiet", rules::TESTS);
    Ok(())
}

fn check_runbook(alert: &str, text: &str) -> Result<()> {
    ensure!(text.starts_with(&format!("# {alert}\n")), "the title is not the alert's name");
    let sections: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix("## ")).collect();
    ensure!(sections == SECTIONS, "the sections are {sections:?}, not {SECTIONS:?}");
    Ok(())
}

/// The runbooks' queries, each with its file.
fn queries(runbooks: &BTreeMap<String, String>) -> Vec<(&str, String)> {
    let mut queries: Vec<(&str, String)> = Vec::new();
    for (name, text) in runbooks {
        let mut open = false;
        for line in text.lines() {
            match line.trim() {
                "```promql" => {
                    open = true;
                    queries.push((name, String::new()));
                }
                fence if fence.starts_with("```") => open = false,
                query if open => {
                    let (_, text) = queries.last_mut().expect("pushed when it was opened");
                    *text += query;
                    text.push('\n');
                }
                _ => {}
            }
        }
    }
    queries
}

/// Names of metrics in the running text, by how they begin.
fn mentioned(text: &str) -> impl Iterator<Item = &str> {
    let is_name = |word: &&str| {
        PREFIXES.iter().any(|prefix| word.starts_with(prefix))
            && word.chars().all(|c| c.is_ascii_alphanumeric() || c == '_' || c == ':')
    };
    // Odd pieces are code.
    text.split('`').skip(1).step_by(2).map(|code| code.split('{').next().unwrap_or(code)).filter(is_name)
}

/// Prometheus's own parser reads every query of the runbooks.
fn parse(progress: &Progress, promtool: &Path) -> Result<()> {
    let runbooks = runbooks()?;
    let queries: Vec<(String, String)> =
        queries(&runbooks).into_iter().map(|(name, query)| (name.to_owned(), query)).collect();
    ensure!(!queries.is_empty(), "no query in {RUNBOOKS}");
    parse_queries(progress, promtool, &queries)
}

/// Every metric in a rule or a runbook is exported, recorded, or of another exporter.
fn exist(there: &Metrics) -> Result<()> {
    let mut named: Vec<(String, String)> = Vec::new();
    for rule in rules::all()? {
        let name = rule.alert.or(rule.record).context("a rule without a name")?;
        named.extend(metrics::of(&rule.expr).into_iter().map(|metric| (name.clone(), metric)));
    }
    let runbooks = runbooks()?;
    for (name, query) in queries(&runbooks) {
        named.extend(metrics::of(&query).into_iter().map(|metric| (format!("{RUNBOOKS}/{name}.md"), metric)));
    }
    for (name, text) in &runbooks {
        let said = mentioned(text).filter(|metric| !there.is_histogram(metric));
        named.extend(said.map(|metric| (format!("{RUNBOOKS}/{name}.md"), metric.to_owned())));
    }
    for (place, metric) in named {
        ensure!(there.have(&metric), "{place}: there is no metric {metric}");
    }
    Ok(())
}

/// Prometheus's own conventions of naming, on all that is exported.
fn lint_metrics(promtool: &Path, text: &str) -> Result<()> {
    let faults = |text: &str| -> Result<Vec<String>> {
        let file = places::target_dir()?.join("xtask/metrics.txt");
        fs::write(&file, text)?;
        let mut command = Command::new(promtool);
        command.args(["check", "metrics"]).stdin(File::open(&file)?);
        let said = command.output().context("start promtool")?;
        let lines = [said.stdout, said.stderr].concat();
        Ok(String::from_utf8_lossy(&lines).lines().map(str::to_owned).collect())
    };
    let found = faults(text)?;
    let excused = |fault: &String| LINT_EXCUSED.iter().any(|(name, _)| fault.split(' ').next() == Some(name));
    let (excused, others): (Vec<_>, Vec<_>) = found.into_iter().partition(excused);
    ensure!(others.is_empty(), "promtool check metrics:\n  {}", others.join("\n  "));
    ensure!(excused.len() == LINT_EXCUSED.len(), "LINT_EXCUSED excuses what needs no excuse: {excused:?}");
    let broken = text.replacen("chat_messages_sent_total", "chatMessages", usize::MAX);
    ensure!(faults(&broken)?.len() > excused.len(), "promtool check metrics took a name in camel case");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const RULE: &str = "
groups: [{name: g, rules: [{alert: Hot, expr: a > 1, labels: {severity: critical}, annotations: {
    summary: '{{ $value }} in {{ $labels.namespace }}', description: 'In {{ $labels.namespace }}',
    runbook_url: deploy/runbooks/Hot.md}}]}]";
    const RUNBOOK: &str = "# Hot\n## Meaning\n## Impact\n## Diagnosis\n## Mitigation\n## Escalation\n";
    const README: &str = "| [Hot](Hot.md) | critical | it is hot |\n";
    const TESTS: &str = "
- {alertname: Hot, exp_alerts: []}
- {alertname: Hot, exp_alerts: [{exp_labels: {severity: critical, namespace: n}}]}";

    fn check(rules: &str, files: &[(&str, &str)], tests: &str) -> Result<()> {
        let files = files.iter().map(|(name, text)| ((*name).to_owned(), (*text).to_owned())).collect();
        three_ways(&rules::of(rules)?, &files, &serde_saphyr::from_str::<Vec<AlertTest>>(tests)?)
    }

    fn refused(outcome: Result<()>, word: &str) {
        let error = format!("{:#}", outcome.expect_err(word));
        assert!(error.contains(word), "{error}");
    }

    #[test]
    fn alerts_runbooks_and_tests_have_to_be_of_one_another() {
        let files = [("Hot", RUNBOOK), ("README", README)];
        check(RULE, &files, TESTS).expect("all there");
        refused(check(RULE, &files[1..], TESTS), "Hot.md is missing");
        refused(check(RULE, &files, "[{alertname: Hot, exp_alerts: []}]"), "it fires");
        let other = TESTS.replace("severity: critical", "severity: warning");
        refused(check(RULE, &files, &other), "it fires");
        let (_, firing) = TESTS.rsplit_once("\n").expect("two lines");
        refused(check(RULE, &files, firing), "it is quiet");
        refused(check(RULE, &files, &format!("{TESTS}\n- {{alertname: Cold, exp_alerts: []}}")), "Cold");
        refused(check(RULE, &[files[0], files[1], ("Cold", RUNBOOK)], TESTS), "Cold.md is of no alert");
        refused(check(RULE, &[("Hot", "# Hot\n## Meaning\n"), files[1]], TESTS), "sections");
        refused(check(RULE, &[files[0], ("README", "")], TESTS), "no row");
        refused(check(&RULE.replace("$value", "something"), &files, TESTS), "number");
        refused(check(&RULE.replace("books/Hot.md", "books/Cold.md"), &files, TESTS), "runbook_url");
    }

    #[test]
    fn queries_and_names_are_found_in_a_runbook() {
        let text =
            "See `chat_ready` and `kubectl get`.\n1. Then\n   ```promql\n   sum(a)\n   > 1\n   ```\n`up`\n";
        let runbooks = BTreeMap::from([("Hot".to_owned(), text.to_owned())]);
        assert_eq!(queries(&runbooks), [("Hot", "sum(a)\n> 1\n".to_owned())]);
        assert_eq!(
            mentioned("`chat_ready`, `chat_x{a=\"b\"}`, chat_y, `up`").collect::<Vec<_>>(),
            ["chat_ready", "chat_x"]
        );
    }
}
