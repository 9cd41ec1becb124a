//! Checks of the developer's loop that need no Docker: kind reads its configuration, the programs parse the commands that
//! `cargo xtask kind --dry-run` prints, and actionlint reads the workflows.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use common::go_tools::GoTool;
use common::kind::{self, KIND, KIND_MODULE};
use common::steps::{Progress, Tally};
use common::workspace::{self, in_ci};
use harness::servers::programs;
use harness::{Scratch, places};

const MODULE: &str = "deploy/dev";
const ACTIONLINT: GoTool = GoTool {
    name: "actionlint",
    module: MODULE,
    package: "github.com/rhysd/actionlint/cmd/actionlint",
    settings: &[],
};

/// A stand-in for Docker that answers kind's questions and writes down its calls. The call that starts a node fails: only
/// Docker could do the rest.
const DOCKER: &str = r#"#!/bin/sh
echo "$*" >> "$DOCKER_CALLS"
case "$1 $2" in
    "info --format") echo '{"CgroupVersion": "2", "MemoryLimit": true, "PidsLimit": true, "CPUShares": true}' ;;
    "network ls") echo kind ;;
    "network inspect") echo '[]' ;;
    "run "*) exit 1 ;;
esac
"#;

/// The Docker commands of the first `kind up`. Docker's own client, where installed, has to accept them as well.
const DOCKERS: [&str; 5] = [
    "docker inspect --format {{.State.Running}} chat-registry",
    "docker run --detach --restart=always --name chat-registry --publish 127.0.0.1:5001:5000 docker.io/library/registry:3.0.0",
    "docker inspect --format {{json .NetworkSettings.Networks.kind}} chat-registry",
    "docker network connect kind chat-registry",
    "docker exec chat-control-plane sh -c mkdir -p /etc/containerd/certs.d/localhost:5001 && echo \
     '[host.\"http://chat-registry:5000\"]' > /etc/containerd/certs.d/localhost:5001/hosts.toml",
];

pub(super) fn check(tally: &mut Tally) {
    if !common::go_tools::can_use("kind, workflows") {
        return;
    }
    tally.check("kind: configuration", "", configuration);
    tally.check("kind: dry run", "", dry_run);
    tally.check("kind: ctlptl.yaml", "write into it what deploy/kind.yaml has", |_| ctlptl());
    tally.check("workflows", "", workflows);
}

/// kind reads the file, checks it, and would start this node.
fn configuration(progress: &Progress) -> Result<()> {
    let file = workspace::root().join("deploy/kind.yaml");
    let node = node_of(progress, &file)?;
    let text = fs::read_to_string(&file)?;
    let image = text.lines().find_map(|line| line.trim().strip_prefix("image: ")).context("no image")?;
    ensure!(node.ends_with(image), "another image than {image}: {node}");
    ensure!(image.contains("@sha256:"), "the node's image is not pinned by its digest");
    let own = common::chart::module_folder(progress, KIND_MODULE)?.join("pkg/apis/config/defaults/image.go");
    let own = fs::read_to_string(own)?;
    ensure!(
        own.contains(&format!("\"{image}\"")),
        "{image} is not the one that {KIND_MODULE} brings:\n{own}"
    );
    let port = format!("--publish=127.0.0.1:{0}:{0}/TCP", kind::NODE_PORT);
    ensure!(node.contains(&port) && node.contains("--name chat-control-plane "), "no {port}: {node}");
    // kind refuses a broken file before that.
    for (part, instead, reason) in [
        ("extraPortMappings", "extraPortMapings", "extraPortMapings"),
        ("hostPort: 30080", "hostPort: 300800", "300800"),
        ("role: control-plane", "role: control", "control"),
    ] {
        let broken = places::target_dir()?.join("xtask/kind.yaml");
        fs::write(&broken, text.replace(part, instead))?;
        match node_of(progress, &broken) {
            Ok(_) => bail!("kind takes {instead:?}"),
            Err(error) => ensure!(format!("{error:#}").contains(reason), "no word of {reason}: {error:#}"),
        }
    }
    Ok(())
}

/// The command by which kind would start the node.
fn node_of(progress: &Progress, config: &Path) -> Result<String> {
    let scratch = Scratch::new("kind")?;
    let docker = scratch.path().join("docker");
    fs::write(&docker, DOCKER)?;
    fs::set_permissions(&docker, fs::Permissions::from_mode(0o755))?;
    let calls = scratch.path().join("calls");
    let mut create = Command::new(KIND.build(progress)?);
    create.args(["create", "cluster", "--name", "chat", "--config"]).arg(config);
    create.env("PATH", format!("{}:/usr/bin:/bin", scratch.path().display()));
    create.env("DOCKER_CALLS", &calls).env("KUBECONFIG", scratch.path().join("kubeconfig"));
    create.env("KIND_EXPERIMENTAL_PROVIDER", "docker");
    let Err(error) = progress.run(create) else { bail!("kind believes that a node runs") };
    let calls = fs::read_to_string(&calls).unwrap_or_default();
    let node = calls.lines().find(|line| line.starts_with("run "));
    node.map(str::to_owned).ok_or(error)
}

/// Each program has to accept its printed commands; with --help it parses them and does nothing.
fn dry_run(progress: &Progress) -> Result<()> {
    let kind = KIND.build(progress)?;
    let kubectl = kubectl(progress)?;
    let mut dockers = BTreeSet::new();
    let mut checked = 0;
    for arguments in [&["up", "--metrics-server", "--prometheus-crds"][..], &["down"]] {
        let mut print = Command::new(std::env::current_exe()?);
        print.arg("kind").args(arguments).arg("--dry-run").current_dir(workspace::root());
        let printed = progress.run(print)?;
        for line in printed.lines().filter(|line| !line.starts_with('#') && !line.is_empty()) {
            let words = words(line)?;
            match (words[0].as_str(), &kubectl) {
                ("kind", _) => takes(progress, &kind, &words),
                ("kubectl", Some(kubectl)) => takes(progress, kubectl, &words),
                ("kubectl", None) => Ok(()),
                ("docker", _) => {
                    dockers.insert(words.join(" "));
                    takes_docker(progress, &words)
                }
                (other, _) => bail!("there is no check for {other}: {line}"),
            }
            .with_context(|| line.to_owned())?;
            checked += 1;
        }
    }
    for expected in DOCKERS {
        ensure!(dockers.contains(expected), "{expected} is not among what is printed: {dockers:#?}");
    }
    progress.note(&format!(
        "{checked} commands{}",
        if kubectl.is_some() { "" } else { "; those of kubectl unchecked" }
    ));
    Ok(())
}

/// Only CI builds kubectl for this alone.
fn kubectl(progress: &Progress) -> Result<Option<PathBuf>> {
    match programs::in_path("kubectl") {
        Some(program) => Ok(Some(program)),
        None if in_ci() => kind::kubectl_program(progress).map(Some),
        None => Ok(None),
    }
}

fn takes(progress: &Progress, program: &Path, words: &[String]) -> Result<()> {
    let mut help = Command::new(program);
    help.args(&words[1..]).arg("--help").env("KUBECONFIG", "/dev/null");
    let said = progress.run(help)?;
    // For an unknown command, a program shows the help of the group.
    let is_name =
        |word: &&String| word.chars().all(|c| c.is_ascii_lowercase() || c == '-') && !word.starts_with('-');
    let names = words[1..].iter().take_while(is_name);
    let usage = said.lines().skip_while(|line| !line.starts_with("Usage:")).nth(1).unwrap_or_default();
    for name in names {
        ensure!(usage.split_whitespace().any(|word| word == name), "{name} is not in `{}`", usage.trim());
    }
    Ok(())
}

/// Docker's client reads no flags behind an image's or a container's name.
fn takes_docker(progress: &Progress, words: &[String]) -> Result<()> {
    let Some(docker) = programs::in_path("docker") else { return Ok(()) };
    let names = if ["image", "network"].contains(&words[1].as_str()) { 3 } else { 2 };
    let mut help = Command::new(docker);
    help.args(&words[1..names]).arg("--help").args(&words[names..]);
    progress.run(help).map(drop)
}

/// The words of a printed line as a shell splits it, without the variables before them.
fn words(line: &str) -> Result<Vec<String>> {
    // After `printf`, an assignment is a plain word.
    let split = Command::new("sh").arg("-c").arg(format!("printf '%s\\n' {line}")).output()?;
    let all = String::from_utf8(split.stdout)?;
    let is_variable = |word: &&str| {
        let name = word.split_once('=').map_or("", |(name, _)| name);
        !name.is_empty() && name.chars().all(|c| c.is_ascii_uppercase() || c == '_')
    };
    let words: Vec<String> = all.lines().skip_while(is_variable).map(str::to_owned).collect();
    ensure!(!words.is_empty(), "no command in {line}");
    Ok(words)
}

/// The same node and the same registry as of `cargo xtask kind`.
fn ctlptl() -> Result<()> {
    let read = |name: &str| fs::read_to_string(workspace::root().join(name)).with_context(|| name.to_owned());
    let (kind, ctlptl) = (read("deploy/kind.yaml")?, read("deploy/ctlptl.yaml")?);
    let node = |text: &str| -> Vec<String> {
        let lines = text.lines().skip_while(|line| line.trim() != "nodes:").skip(1);
        let lines = lines.take_while(|line| line.starts_with(' ')).map(str::trim);
        lines.filter(|line| !line.starts_with('#')).map(str::to_owned).collect()
    };
    let (right, other) = (node(&kind), node(&ctlptl));
    ensure!(right.len() > 5 && right == other, "{right:#?}\n{other:#?}");
    ensure!(
        read("deploy/kind-registry.yaml")?.contains("host: \"localhost:5001\""),
        "another port in kind-registry.yaml"
    );
    ensure!(ctlptl.contains("port: 5001"), "another port in ctlptl.yaml");
    Ok(())
}

/// actionlint's rules, and ours: actions pinned by commit, minimal permissions, a timeout for every job.
fn workflows(progress: &Progress) -> Result<()> {
    let actionlint = ACTIONLINT.build(progress)?;
    let lint = |file: &Path| {
        let mut lint = Command::new(&actionlint);
        // Not every machine has the two, and the scripts have one line each.
        lint.args(["-no-color", "-shellcheck=", "-pyflakes="]).arg(file).current_dir(workspace::root());
        progress.run(lint)
    };
    let mut found = 0;
    for entry in fs::read_dir(workspace::root().join(".github/workflows"))? {
        let file = entry?.path();
        lint(&file)?;
        let text = fs::read_to_string(&file)?;
        own_rules(&text).with_context(|| workspace::shown(&file))?;
        let broken = places::target_dir()?.join("xtask/workflow.yml");
        fs::write(&broken, text.replace("runs-on:", "run-on:"))?;
        ensure!(lint(&broken).is_err(), "actionlint takes run-on");
        ensure!(
            own_rules(&text.replace("timeout-minutes", "timeout")).is_err(),
            "a job without an end is taken"
        );
        found += 1;
    }
    ensure!(found > 0, "no workflow");
    Ok(())
}

fn own_rules(text: &str) -> Result<()> {
    for line in text.lines().filter_map(|line| line.trim().trim_start_matches("- ").strip_prefix("uses: ")) {
        let commit = line.split_once('@').map_or("", |(_, rest)| rest.split(' ').next().unwrap_or_default());
        ensure!(
            commit.len() == 40 && commit.chars().all(|c| c.is_ascii_hexdigit()),
            "{line} is not by its commit"
        );
    }
    let jobs = text.matches("runs-on:").count();
    ensure!(text.matches("timeout-minutes:").count() == jobs, "a job without an end");
    ensure!(text.contains("\npermissions:\n  contents: read\n"), "more rights than to read");
    Ok(())
}
