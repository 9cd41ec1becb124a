//! `cargo xtask dashboards`: writes Grafana's dashboards from the Rust of this folder, or checks them on a Prometheus.
//!
//! The files are in the chart, which may not reach outside its folder; `deploy/grafana` links to them.

pub(crate) mod check;
mod dependencies;
pub(crate) mod model;
pub(crate) mod overview;
mod product;
mod readme;
mod runtime;

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use common::args::Dashboards as Args;
use common::workspace;

use check::Scope;
use model::Dashboard;

/// Where the chart finds them.
const CHART_FOLDER: &str = "helm/chat-service/files/dashboards";
pub(crate) const FOLDER: &str = "deploy/grafana";
const FROM_FOLDER_TO_CHART: &str = "../../helm/chat-service/files/dashboards";

pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    let Some(url) = &args.check else {
        write()?;
        return Ok(ExitCode::SUCCESS);
    };
    let scope = Scope {
        namespace: args.namespace.clone(),
        range: Duration::from_secs(args.seconds),
        cluster: args.cluster,
        ..Scope::default()
    };
    print!("{}", check::check_panels(url, &scope)?);
    Ok(ExitCode::SUCCESS)
}

/// In reading order.
pub(crate) fn all() -> Vec<Dashboard> {
    vec![overview::dashboard(), dependencies::dashboard(), runtime::dashboard(), product::dashboard()]
}

/// Every generated file by its path from the clone's top, with its text.
pub(crate) fn files() -> Result<BTreeMap<PathBuf, String>> {
    let mut files = BTreeMap::new();
    for dashboard in all() {
        let json = serde_json::to_string_pretty(&dashboard.json())?;
        files.insert(Path::new(CHART_FOLDER).join(format!("{}.json", dashboard.name)), format!("{json}\n"));
    }
    let path = Path::new(FOLDER).join("README.md");
    let text = fs::read_to_string(workspace::root().join(&path))?;
    files.insert(path, readme::with_tables(&text)?);
    Ok(files)
}

/// What each link of `deploy/grafana` leads to.
pub(crate) fn links() -> BTreeMap<PathBuf, PathBuf> {
    let link = |dashboard: &Dashboard| {
        let file = format!("{}.json", dashboard.name);
        (Path::new(FOLDER).join(&file), Path::new(FROM_FOLDER_TO_CHART).join(file))
    };
    all().iter().map(link).collect()
}

fn write() -> Result<()> {
    let root = workspace::root();
    fs::create_dir_all(root.join(CHART_FOLDER))?;
    for (path, text) in files()? {
        fs::write(root.join(&path), text).with_context(|| format!("write {}", path.display()))?;
        println!("  {}", path.display());
    }
    for (path, target) in links() {
        let link = root.join(&path);
        if fs::read_link(&link).ok().as_ref() != Some(&target) {
            let _ = fs::remove_file(&link);
            symlink(&target, &link).with_context(|| format!("link {}", path.display()))?;
        }
    }
    Ok(())
}

/// Fails where a file or a link is not what would be written, or is not written any more.
pub(crate) fn compare() -> Result<()> {
    let root = workspace::root();
    for (path, text) in files()? {
        let committed = fs::read_to_string(root.join(&path)).unwrap_or_default();
        ensure!(committed == text, "{} is not what xtask/measure/src/dashboards makes of it", path.display());
    }
    for (path, target) in links() {
        let committed = fs::read_link(root.join(&path)).ok();
        ensure!(committed.as_ref() == Some(&target), "{} is no link to the chart's file", path.display());
    }
    for folder in [CHART_FOLDER, FOLDER] {
        for entry in fs::read_dir(root.join(folder)).with_context(|| format!("read {folder}"))? {
            let path = Path::new(folder).join(entry?.file_name());
            let known = files()?.contains_key(&path) || links().contains_key(&path);
            let is_json = path.extension().is_some_and(|kind| kind == "json");
            ensure!(known || !is_json, "{} is no dashboard of `cargo xtask dashboards`", path.display());
        }
    }
    Ok(())
}
