//! Rules beyond the schema: each panel has a place, a description and a unit, and uses the variables.

use std::collections::BTreeSet;
use std::fs;

use anyhow::{Context, Result, ensure};
use common::workspace;
use serde_json::Value;

use crate::dashboards;

const PLUGINS: [&str; 7] = ["row", "stat", "timeseries", "heatmap", "bargauge", "state-timeline", "table"];
const COLUMNS: u64 = 24;

/// A ConfigMap holds at most 1 MiB, with its labels.
const BYTES_MAX: usize = 900 * 1024;

pub(super) fn all() -> Result<()> {
    let mut uids = BTreeSet::new();
    let paths = dashboards::links();
    ensure!(!paths.is_empty(), "no dashboard");
    for path in paths.keys() {
        let text = fs::read_to_string(workspace::root().join(path))?;
        ensure!(text.len() < BYTES_MAX, "{} does not fit a ConfigMap", path.display());
        let dashboard: Value = serde_json::from_str(&text)?;
        check(&dashboard).with_context(|| path.display().to_string())?;
        ensure!(
            uids.insert(text_of(&dashboard, "uid")?.to_owned()),
            "{}: the uid is another's",
            path.display()
        );
    }
    Ok(())
}

fn check(dashboard: &Value) -> Result<()> {
    for field in ["uid", "title", "description"] {
        ensure!(!text_of(dashboard, field)?.is_empty(), "no {field}");
    }
    ensure!(dashboard["schemaVersion"].as_u64() >= Some(39), "an old schema");
    let variables = dashboard["templating"]["list"].as_array().context("no variables")?;
    for name in ["datasource", "namespace", "job", "pod"] {
        ensure!(variables.iter().any(|variable| variable["name"] == name), "no variable {name}");
    }
    let panels = dashboard["panels"].as_array().context("no panels")?;
    let mut ids = BTreeSet::new();
    let mut taken: Vec<[u64; 4]> = Vec::new();
    for panel in panels {
        let title = text_of(panel, "title")?;
        let id = panel["id"].as_u64().with_context(|| format!("{title}: no id"))?;
        ensure!(ids.insert(id), "{title}: the id is another panel's");
        let place = place(panel).with_context(|| title.to_owned())?;
        ensure!(place[0] + place[2] <= COLUMNS, "{title}: over the edge");
        ensure!(!taken.iter().any(|other| overlap(place, *other)), "{title}: overlaps another panel");
        taken.push(place);
        if panel["type"] != "row" {
            check_panel(panel).with_context(|| title.to_owned())?;
        }
    }
    no_fixed_source(dashboard)
}

fn check_panel(panel: &Value) -> Result<()> {
    ensure!(PLUGINS.iter().any(|known| panel["type"] == *known), "an unknown type: {}", panel["type"]);
    let description = text_of(panel, "description")?;
    ensure!(description.len() > 20 && description.ends_with('.'), "no description that says something");
    ensure!(panel["fieldConfig"]["defaults"]["unit"].is_string(), "no unit");
    let targets = panel["targets"].as_array().filter(|list| !list.is_empty()).context("no query")?;
    let mut refs = BTreeSet::new();
    for target in targets {
        ensure!(refs.insert(text_of(target, "refId")?), "two queries are called {}", target["refId"]);
        ensure!(!text_of(target, "legendFormat")?.is_empty(), "a query without a legend");
        let expr = text_of(target, "expr")?;
        ensure!(expr.contains(r#"namespace=~"$namespace""#), "not only of the chosen namespaces: {expr}");
        ensure!(!expr.contains("{OURS") && !expr.contains("{CLUSTER") && !expr.contains("{RULE"), "{expr}");
        // A fixed one is empty where the scrape interval is longer, and blurs where it is shorter.
        for function in ["rate(", "irate("] {
            for call in expr.split(function).skip(1) {
                // Behind the labels, whose patterns may hold brackets, too.
                let window = call.split_once("}[").map_or("", |(_, rest)| rest);
                let window = window.split(']').next().unwrap_or_default();
                ensure!(window.starts_with("$__"), "{function} over [{window}] instead of $__rate_interval");
            }
        }
    }
    Ok(())
}

/// Whatever refers to a data source refers to the variable; Grafana's own holds its annotations.
fn no_fixed_source(value: &Value) -> Result<()> {
    match value {
        Value::Object(fields) => {
            if let Some(source) = fields.get("datasource") {
                let known = source["uid"] == "${datasource}" || source["uid"] == "-- Grafana --";
                ensure!(known, "a fixed data source: {source}");
            }
            fields.values().try_for_each(no_fixed_source)
        }
        Value::Array(list) => list.iter().try_for_each(no_fixed_source),
        _ => Ok(()),
    }
}

fn text_of<'a>(value: &'a Value, field: &str) -> Result<&'a str> {
    value[field].as_str().with_context(|| format!("no {field}"))
}

/// Column, line, width and height.
fn place(panel: &Value) -> Result<[u64; 4]> {
    let number =
        |field| panel["gridPos"][field].as_u64().filter(|number| *number > 0 || ["x", "y"].contains(&field));
    let number = |field| number(field).with_context(|| format!("no {field} in its place"));
    Ok([number("x")?, number("y")?, number("w")?, number("h")?])
}

fn overlap(a: [u64; 4], b: [u64; 4]) -> bool {
    let along = |axis: usize| a[axis] < b[axis] + b[axis + 2] && b[axis] < a[axis] + a[axis + 2];
    along(0) && along(1)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::check;
    use crate::dashboards;

    /// A sound dashboard after one change, and what is said of it.
    fn verdict(change: impl FnOnce(&mut Value)) -> String {
        let mut dashboard = dashboards::all()[0].json();
        change(&mut dashboard);
        check(&dashboard).err().map_or_else(String::new, |error| format!("{error:#}"))
    }

    #[test]
    fn a_sound_dashboard_passes() {
        assert_eq!(verdict(|_| ()), "");
    }

    #[test]
    fn what_is_broken_is_found() {
        let found = |change: fn(&mut Value), words: &str| {
            let said = verdict(change);
            assert!(said.contains(words), "{said:?} does not speak of {words:?}");
        };
        found(|all| all["panels"][2]["id"] = json!(1), "the id is another panel's");
        found(|all| all["panels"][2]["gridPos"] = all["panels"][1]["gridPos"].clone(), "overlaps");
        found(|all| all["panels"][2]["gridPos"]["x"] = json!(23), "over the edge");
        found(|all| all["panels"][2]["type"] = json!("graph"), "an unknown type");
        found(|all| all["panels"][2]["description"] = json!(""), "no description");
        found(|all| all["panels"][2]["fieldConfig"]["defaults"]["unit"] = Value::Null, "no unit");
        found(|all| all["panels"][2]["targets"] = json!([]), "no query");
        found(
            |all| all["panels"][2]["datasource"]["uid"] = json!("P1809F7CD0C75ACF3"),
            "a fixed data source",
        );
        found(|all| all["panels"][2]["targets"][0]["expr"] = json!("sum(up)"), "not only of the chosen");
        found(
            |all| all["panels"][3]["targets"][0]["expr"] = json!(r#"rate(up{namespace=~"$namespace"}[5m])"#),
            "instead of $__rate_interval",
        );
        found(|all| all["templating"]["list"] = json!([]), "no variable");
    }
}
