//! The rules for Prometheus, as Prometheus reads them, and their unit tests, as promtool does.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

use crate::workspace;

/// Where they are, from the clone's top.
pub(crate) const RULES: &str = "deploy/prometheus/rules";
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

/// Everything that the unit tests ask of alerts.
pub(crate) fn alert_tests() -> Result<Vec<AlertTest>> {
    #[derive(Deserialize)]
    struct Test {
        #[serde(default)]
        alert_rule_test: Vec<AlertTest>,
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
        tests.extend(file.tests.into_iter().flat_map(|test| test.alert_rule_test));
    }
    Ok(tests)
}
