//! The rules for Prometheus, as Prometheus reads them, and their unit tests, as promtool does.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use common::prometheus::RULES;
use common::workspace;
use serde::Deserialize;

pub(crate) const TESTS: &str = "deploy/prometheus/tests";

/// A recording rule or an alert. Several alerts may have one name, and then differ in their window or severity.
#[derive(Clone, Debug, Default, Deserialize)]
pub(crate) struct Rule {
    pub(crate) record: Option<String>,
    pub(crate) alert: Option<String>,
    pub(crate) expr: String,
    #[serde(default)]
    pub(crate) labels: BTreeMap<String, String>,
    #[serde(default)]
    pub(crate) annotations: BTreeMap<String, String>,
}

/// One alert asked for at one time of a unit test.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct AlertTest {
    pub(crate) alertname: String,
    pub(crate) exp_alerts: Vec<Expected>,
}

/// An alert that has to fire there.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Expected {
    #[serde(default)]
    pub(crate) exp_labels: BTreeMap<String, String>,
}

/// An expression at one time of a unit test.
#[derive(Deserialize)]
struct ExprTest {
    expr: String,
    #[serde(default)]
    exp_samples: Vec<Sample>,
}

#[derive(Deserialize)]
struct Sample {
    labels: String,
}

impl ExprTest {
    /// What it says of an alert, if it asks whether that fires, whatever its labels.
    fn of_an_alert(&self) -> Option<AlertTest> {
        let rest = self.expr.strip_prefix("ALERTS{alertname=\"")?;
        let alertname = rest.strip_suffix("\", alertstate=\"firing\"}")?.to_owned();
        let expected = |sample: &Sample| Expected { exp_labels: labels(&sample.labels) };
        Some(AlertTest { alertname, exp_alerts: self.exp_samples.iter().map(expected).collect() })
    }
}

/// Those of `name{label="value", ...}`.
fn labels(series: &str) -> BTreeMap<String, String> {
    let inside = series.split_once('{').map_or("", |(_, inside)| inside);
    let pair = |text: &str| {
        let (name, value) = text.split_once("=\"")?;
        Some((name.trim_matches([',', ' ']).to_owned(), value.to_owned()))
    };
    inside
        .split_inclusive('"')
        .collect::<Vec<_>>()
        .chunks(2)
        .filter_map(|two| pair(two.concat().trim_end_matches('"')))
        .collect()
}

impl Rule {
    /// A label's value, or nothing.
    pub(crate) fn label(&self, name: &str) -> &str {
        self.labels.get(name).map_or("", String::as_str)
    }
}

/// The YAML files of a folder, by name.
pub(crate) fn yaml_files(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).with_context(|| format!("read {}", folder.display()))? {
        let path = entry?.path();
        if path.extension().is_some_and(|kind| kind == "yaml") {
            files.push(path);
        }
    }
    files.sort();
    ensure!(!files.is_empty(), "{} has no .yaml files", folder.display());
    Ok(files)
}

/// The rule files, as they are shipped.
pub(crate) fn files() -> Result<Vec<PathBuf>> {
    yaml_files(&workspace::root().join(RULES))
}

/// Every rule in them.
pub(crate) fn all() -> Result<Vec<Rule>> {
    let mut rules = Vec::new();
    for path in files()? {
        let text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
        rules.extend(of(&text).with_context(|| format!("parse {}", path.display()))?);
    }
    Ok(rules)
}

/// Every rule in the text of a rule file.
pub(crate) fn of(text: &str) -> Result<Vec<Rule>> {
    #[derive(Deserialize)]
    struct Group {
        rules: Vec<Rule>,
    }
    #[derive(Deserialize)]
    struct File {
        groups: Vec<Group>,
    }
    let file: File = serde_saphyr::from_str(text)?;
    Ok(file.groups.into_iter().flat_map(|group| group.rules).collect())
}

/// Everything that the unit tests ask of alerts, by name or by what Prometheus records of them.
pub(crate) fn alert_tests() -> Result<Vec<AlertTest>> {
    #[derive(Deserialize)]
    struct Test {
        #[serde(default)]
        alert_rule_test: Vec<AlertTest>,
        #[serde(default)]
        promql_expr_test: Vec<ExprTest>,
    }
    #[derive(Deserialize)]
    struct File {
        tests: Vec<Test>,
    }
    let mut tests = Vec::new();
    for path in yaml_files(&workspace::root().join(TESTS))? {
        let text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
        let file: File =
            serde_saphyr::from_str(&text).with_context(|| format!("parse {}", path.display()))?;
        for test in file.tests {
            tests.extend(test.alert_rule_test);
            tests.extend(test.promql_expr_test.iter().filter_map(ExprTest::of_an_alert));
        }
    }
    Ok(tests)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_question_about_a_firing_alert_is_a_test_of_it() {
        let test = |expr: &str, samples: &[&str]| {
            let exp_samples = samples.iter().map(|labels| Sample { labels: (*labels).to_owned() }).collect();
            ExprTest { expr: expr.to_owned(), exp_samples }.of_an_alert()
        };
        let hot = r#"ALERTS{alertname="Hot", alertstate="firing"}"#;
        let quiet = test(hot, &[]).expect("of an alert");
        assert_eq!((quiet.alertname.as_str(), quiet.exp_alerts.len()), ("Hot", 0));
        let firing = test(hot, &[r#"ALERTS{alertname="Hot", severity="critical", window="1h"}"#])
            .expect("of an alert");
        let expected = [("alertname", "Hot"), ("severity", "critical"), ("window", "1h")];
        let expected = expected.map(|(name, value)| (name.to_owned(), value.to_owned()));
        assert_eq!(firing.exp_alerts[0].exp_labels, BTreeMap::from(expected));
        assert!(test(r#"ALERTS{alertname="Hot", alertstate="firing", window="1h"}"#, &[]).is_none());
        assert!(test("up", &[]).is_none());
    }
}
