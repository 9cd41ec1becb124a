//! The chart's tools and inputs: Helm itself, the values files, and the modules that hold the API's schemas.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use harness::places;
use harness::servers::daemon;
use serde_json::Value;

use crate::go_tools::{self, GoTool};
use crate::steps::Progress;
use crate::workspace;

/// The Go module of Helm and the linters.
pub const MODULE: &str = "deploy/lint";
pub const CHART: &str = "helm/chat-service";

pub const HELM: GoTool = GoTool {
    name: "helm",
    module: MODULE,
    package: "helm.sh/helm/v3/cmd/helm",
    settings: &[
        "helm.sh/helm/v3/internal/version.version=v3.19.5",
        "helm.sh/helm/v3/pkg/lint/rules.k8sVersionMajor=1",
        "helm.sh/helm/v3/pkg/lint/rules.k8sVersionMinor=34",
        "helm.sh/helm/v3/pkg/chartutil.k8sVersionMajor=1",
        "helm.sh/helm/v3/pkg/chartutil.k8sVersionMinor=34",
    ],
};

const DOWNLOAD_LIMIT: Duration = Duration::from_secs(600);

/// Modules that hold schemas, and the files in them.
pub const SCHEMA_SOURCES: [(&str, &[&str]); 3] = [
    ("k8s.io/kubernetes@v1.34.4", &["api/openapi-spec/swagger.json"]),
    (
        "github.com/prometheus-operator/prometheus-operator@v0.85.0",
        &[
            "example/prometheus-operator-crd/monitoring.coreos.com_podmonitors.yaml",
            "example/prometheus-operator-crd/monitoring.coreos.com_prometheusrules.yaml",
            "example/prometheus-operator-crd/monitoring.coreos.com_servicemonitors.yaml",
        ],
    ),
    ("sigs.k8s.io/gateway-api@v1.4.0", &["config/crd/standard/gateway.networking.k8s.io_httproutes.yaml"]),
];

/// The sets of values to render with, by name: the defaults, those for users, and those for the checks.
pub fn values_files() -> Result<Vec<(String, Vec<PathBuf>)>> {
    let chart = workspace::root().join(CHART);
    let mut found = vec![("default".to_owned(), vec![])];
    for folder in [chart.clone(), chart.join("ci")] {
        let mut files: Vec<PathBuf> = fs::read_dir(&folder)
            .with_context(|| format!("read {}", folder.display()))?
            .map(|entry| Ok(entry?.path()))
            .collect::<Result<_>>()?;
        files.sort();
        for file in files {
            let name = file.file_stem().unwrap_or_default().to_string_lossy().into_owned();
            if file.extension().is_some_and(|kind| kind == "yaml") && name.contains("values-")
                || name.ends_with("-values")
            {
                found.push((name, vec![file]));
            }
        }
    }
    // Its first lines say that it is used like this.
    let both = ["values-production.yaml", "values-external.yaml"].map(|file| chart.join(file));
    found.push(("values-production-external".to_owned(), both.to_vec()));
    Ok(found)
}

/// The command in the clone's top, without the user's own Helm settings.
pub fn at_top(command: &mut Command) -> Command {
    let mut own = Command::new(command.get_program());
    own.args(command.get_args()).current_dir(workspace::root());
    for (name, value) in command.get_envs() {
        value.map(|value| own.env(name, value));
    }
    let target = places::target_dir().unwrap_or_else(|_| workspace::root().join("target"));
    for home in ["HELM_CACHE_HOME", "HELM_CONFIG_HOME", "HELM_DATA_HOME"] {
        own.env(home, target.join("chart/helm"));
    }
    own.env("KUBECONFIG", "/dev/null");
    own
}

/// The folder of a Go module, fetched and checked by its sum.
pub fn module_folder(progress: &Progress, module: &str) -> Result<PathBuf> {
    let mut download = Command::new(go_tools::go()?);
    download.args(["mod", "download", "-json", module]).env("GOWORK", "off").env("GOFLAGS", "-mod=mod");
    progress.say(&format!("fetching {module}"));
    // Also in a dry run, which prints the names of files in it.
    let said = daemon::run_ok(at_top(&mut download), DOWNLOAD_LIMIT)?;
    let answer: Value = serde_json::from_str(&said).with_context(|| format!("go mod download {module}"))?;
    Ok(answer["Dir"].as_str().map(Path::new).with_context(|| format!("{module} has no folder"))?.to_owned())
}
