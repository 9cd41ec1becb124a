//! The Tiltfile, executed without Tilt: `deploy/dev/tiltfile` stands in for Tilt's functions, refuses what Tilt would
//! refuse, and tells what Tilt would do.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};
use serde::Deserialize;
use serde_json::Value;

use crate::go_tools::GoTool;
use crate::steps::Progress;
use crate::workspace;

const PROGRAM: GoTool =
    GoTool { name: "tiltfile", module: "deploy/dev", package: "./tiltfile", settings: &[] };

/// What Tilt would do.
#[derive(Debug, Deserialize)]
pub(crate) struct Plan {
    pub(crate) resources: Vec<Unit>,
    pub(crate) images: Vec<Image>,
    pub(crate) charts: Vec<Chart>,
    /// As kubectl names them: `kind/name`.
    pub(crate) objects: Vec<String>,
    pub(crate) manifests: Vec<Value>,
}

/// One of Tilt's resources.
#[derive(Debug, Deserialize)]
pub(crate) struct Unit {
    pub(crate) name: String,
    #[serde(default)]
    pub(crate) needs: Vec<String>,
    /// `Kind/name`.
    #[serde(default)]
    pub(crate) objects: Vec<String>,
    #[serde(default)]
    pub(crate) command: Vec<String>,
    pub(crate) auto: bool,
}

#[derive(Debug, Deserialize)]
pub(crate) struct Image {
    #[serde(rename = "ref")]
    pub(crate) name: String,
    pub(crate) command: Vec<String>,
    pub(crate) skips_local_docker: bool,
}

#[derive(Debug, Deserialize)]
pub(crate) struct Chart {
    pub(crate) path: String,
    pub(crate) values: Vec<String>,
}

/// As what Tilt is run.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Scenario<'a> {
    pub(crate) context: &'a str,
    pub(crate) namespace: &'a str,
    /// `up` or `ci`.
    pub(crate) subcommand: &'a str,
    /// What `uname -s` says.
    pub(crate) system: &'a str,
    pub(crate) arguments: &'a [&'a str],
}

impl Scenario<'_> {
    /// `tilt up` on Linux.
    pub(crate) fn up(context: &str) -> Scenario<'_> {
        Scenario { context, namespace: "default", subcommand: "up", system: "Linux", arguments: &[] }
    }
}

impl Plan {
    pub(crate) fn unit(&self, name: &str) -> Result<&Unit> {
        self.resources.iter().find(|unit| unit.name == name).with_context(|| format!("no resource {name}"))
    }
}

/// Executes a Tiltfile as if it were the one at the clone's top.
pub(crate) fn plan(progress: &Progress, helm: &Path, file: &Path, scenario: Scenario<'_>) -> Result<Plan> {
    let mut command = Command::new(PROGRAM.build(progress)?);
    command.arg("-helm").arg(helm).current_dir(workspace::root());
    command.args(["-context", scenario.context, "-namespace", scenario.namespace]);
    command.args(["-subcommand", scenario.subcommand, "-system", scenario.system]);
    command.arg(file).args(scenario.arguments);
    // helm asks no cluster for what it renders here.
    command.env("KUBECONFIG", "/dev/null");
    let said = progress.run(command)?;
    let json = said.find('{').map_or("", |start| &said[start..]);
    serde_json::from_str(json).with_context(|| format!("what the Tiltfile comes to: {said}"))
}
