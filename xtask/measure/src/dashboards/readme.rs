//! The tables of `deploy/grafana/README.md`: which dashboard and which row answers what.

use std::fmt::Write as _;

use anyhow::{Context, Result};

use super::model::Dashboard;

const BEGIN: &str = "<!-- dashboards -->\n";
const END: &str = "<!-- /dashboards -->";

/// The text with what stands between the marks made anew.
pub(super) fn with_tables(text: &str) -> Result<String> {
    let (before, rest) = text.split_once(BEGIN).context("no mark where the tables begin")?;
    let (_, after) = rest.split_once(END).context("no mark where the tables end")?;
    let tables: String = super::all().iter().map(table).collect();
    Ok(format!("{before}{BEGIN}{tables}\n{END}{after}"))
}

fn table(dashboard: &Dashboard) -> String {
    let mut text = format!(
        "\n### {}\n\n{} Uid `{}`, file [{name}.json]({name}.json).\n\n| row | answers | panels |\n| --- | --- | --- |\n",
        dashboard.title,
        dashboard.description,
        dashboard.uid(),
        name = dashboard.name,
    );
    for row in &dashboard.rows {
        let title = |panel: &super::model::Panel| match panel.needs {
            Some(_) => format!("{} \\*", panel.title),
            None => panel.title.to_owned(),
        };
        let panels: Vec<String> = row.panels.iter().map(title).collect();
        let _ = writeln!(text, "| {} | {} | {} |", row.title, row.answers, panels.join("; "));
    }
    text
}
