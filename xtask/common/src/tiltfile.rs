//! The Tiltfile, executed without Tilt: `deploy/dev/tiltfile` implements Tilt's functions, refuses what Tilt would
//! refuse, and prints what Tilt would do.

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
pub struct Plan {
    pub resources: Vec<Unit>,
    pub images: Vec<Image>,
    pub charts: Vec<Chart>,
    /// As kubectl names them: `kind/name`.
    pub objects: Vec<String>,
    pub manifests: Vec<Value>,
}

/// One of Tilt's resources.
#[derive(Debug, Deserialize)]
pub struct Unit {
    pub name: String,
    #[serde(default)]
    pub needs: Vec<String>,
    /// `Kind/name`.
    #[serde(default)]
    pub objects: Vec<String>,
    #[serde(default)]
    pub command: Vec<String>,
    pub auto: bool,
}

#[derive(Debug, Deserialize)]
pub struct Image {
    #[serde(rename = "ref")]
    pub name: String,
    pub command: Vec<String>,
    pub skips_local_docker: bool,
}

#[derive(Debug, Deserialize)]
pub struct Chart {
    pub path: String,
    pub values: Vec<String>,
}

/// How Tilt is run.
#[derive(Clone, Copy, Debug)]
pub struct Scenario<'a> {
    pub context: &'a str,
    pub namespace: &'a str,
    /// `up` or `ci`.
    pub subcommand: &'a str,
    /// What `uname -s` says.
    pub system: &'a str,
    pub arguments: &'a [&'a str],
}

impl Scenario<'_> {
    /// `tilt up` on Linux.
    pub fn up(context: &str) -> Scenario<'_> {
        Scenario { context, namespace: "default", subcommand: "up", system: "Linux", arguments: &[] }
    }
}

impl Plan {
    pub fn unit(&self, name: &str) -> Result<&Unit> {
        self.resources.iter().find(|unit| unit.name == name).with_context(|| format!("no resource {name}"))
    }
}

/// Executes a Tiltfile as if it were the one at the clone's top.
pub fn plan(progress: &Progress, helm: &Path, file: &Path, scenario: Scenario<'_>) -> Result<Plan> {
    let mut command = Command::new(PROGRAM.build(progress)?);
    command.arg("-helm").arg(helm).current_dir(workspace::root());
    command.args(["-context", scenario.context, "-namespace", scenario.namespace]);
    command.args(["-subcommand", scenario.subcommand, "-system", scenario.system]);
    command.arg(file).args(scenario.arguments);
    // helm must not ask a cluster.
    command.env("KUBECONFIG", "/dev/null");
    let said = progress.run(command)?;
    let json = said.find('{').map_or("", |start| &said[start..]);
    serde_json::from_str(json).with_context(|| format!("what the Tiltfile comes to: {said}"))
}
