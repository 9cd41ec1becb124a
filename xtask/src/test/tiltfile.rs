//! Checks of the Tiltfile: what it names exists, it fits the chart, it works for each kind of cluster and touches no
//! other; and broken ones are noticed.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use common::chart::HELM;
use common::steps::{Progress, Tally};
use common::tiltfile::{Plan, Scenario, plan};
use common::workspace;
use harness::places;

use super::chart;

const KIND: &str = "kind-chat";

/// Broken Tiltfiles, each with a word of the refusal.
const BROKEN: [(&str, &str, &str); 14] = [
    ("auto_init = auto", "auto_start = auto", "unexpected keyword argument"),
    ("k8s_yaml(chart)", "k8s_yml(chart)", "undefined: k8s_yml"),
    ("'service', '.sqlx'", "'services', '.sqlx'", "nothing makes it"),
    ("'--compile-to', BINARY", "'--compile-to', 'elsewhere'", "nothing makes it"),
    ("values-dev.yaml", "values-develop.yaml", "values-develop.yaml"),
    ("'redis.auth.existingSecret='", "'redis.auth.existingSecrte='", "existingSecrte"),
    ("'redis.auth.existingSecret=' + SECRET,", "", "is a hook"),
    (
        "k8s_resource(NAME + '-redis'",
        "k8s_resource(NAME + '-valkey'",
        "chat-chat-service-valkey is the name of 0",
    ),
    ("'postgres'], labels", "'postgers'], labels", "needs postgers"),
    (
        "resource_deps = ['accounts'], labels",
        "resource_deps = ['chat-service'], labels",
        "wait for one another",
    ),
    ("    'chat-service',\n    ' '.join", "    'chat-servcie',\n    ' '.join", "nothing runs the image"),
    ("$EXPECTED_REF", "$EXPECTED", "the name that Tilt expects"),
    ("port_forward(9000, 9000", "port_forward(9000, 9001", "no port 9001"),
    ("ttlSecondsAfterFinished=86400", "ttlSecondsAfterFinished=60", "gone 60 s after its end"),
];

pub(super) fn check(tally: &mut Tally) {
    if !common::go_tools::can_use("Tiltfile") {
        return;
    }
    let file = workspace::root().join("Tiltfile");
    let Some(helm) = tally.check("Tiltfile: tools", "", |progress| HELM.build(progress)) else { return };
    tally.check("Tiltfile", "", |progress| every_scenario(progress, &helm, &file));
    tally.check("Tiltfile: refusals", "", |progress| refusals(progress, &helm, &file));
    tally.check("Tiltfile: broken ones", "", |progress| broken(progress, &helm, &file));
}

fn every_scenario(progress: &Progress, helm: &Path, file: &Path) -> Result<()> {
    let kind = plan(progress, helm, file, Scenario::up(KIND))?;
    ensure!(!image(&kind)?.0 && image(&kind)?.1.contains("--with docker"), "kind gets its image from Docker");
    let ci = Scenario { subcommand: "ci", ..Scenario::up(KIND) };
    let ci = plan(progress, helm, file, ci)?;
    ensure!(
        ci.unit("smoke-test")?.auto && !kind.unit("smoke-test")?.auto,
        "`tilt ci` alone runs the smoke test"
    );
    let named = ["--allow-context", "somewhere"];
    let elsewhere = Scenario { arguments: &named, namespace: "team", ..Scenario::up("somewhere") };
    let elsewhere = plan(progress, helm, file, elsewhere)?;
    for manifest in &elsewhere.manifests {
        ensure!(
            manifest["metadata"]["namespace"] == "team",
            "not in the namespace: {}",
            manifest["metadata"]
        );
    }
    let mac = plan(progress, helm, file, Scenario { system: "Darwin", ..Scenario::up(KIND) })?;
    ensure!(!image(&mac)?.1.contains("--binary"), "a binary for Linux is not compiled on macOS");
    let observed = Scenario { arguments: &["--observability"], ..Scenario::up(KIND) };
    let observed = plan(progress, helm, file, observed)?;
    for part in ["prometheus", "grafana"] {
        ensure!(
            observed.unit(part).is_ok() && kind.unit(part).is_err(),
            "{part} is there unasked, or not at all"
        );
    }
    schemas(progress, &observed)?;
    for all in [&kind, &ci, &elsewhere, &mac, &observed] {
        commands(progress, all)?;
        order(all)?;
        dev_values_only(all)?;
    }
    progress.note(&format!("{} resources, {} objects", kind.resources.len(), kind.objects.len()));
    Ok(())
}

/// What is applied is what the API server takes.
fn schemas(progress: &Progress, all: &Plan) -> Result<()> {
    let list: Vec<String> = all.manifests.iter().map(ToString::to_string).collect();
    let file = places::target_dir()?.join("xtask/tilt-objects.yaml");
    // JSON is YAML.
    fs::write(&file, list.join("\n---\n"))?;
    chart::conform_to_kubernetes(progress, &file)
}

fn image(all: &Plan) -> Result<(bool, String)> {
    let [image] = all.images.as_slice() else { bail!("{} images, not one", all.images.len()) };
    ensure!(image.name == "chat-service", "the image is called {}", image.name);
    Ok((image.skips_local_docker, image.command.join(" ")))
}

/// Each program accepts its command, and the objects that it names exist.
fn commands(progress: &Progress, all: &Plan) -> Result<()> {
    let of_images = all.images.iter().map(|image| &image.command);
    let of_units = all.resources.iter().map(|unit| &unit.command).filter(|command| !command.is_empty());
    for command in of_images.chain(of_units) {
        for words in simple_commands(command) {
            one_command(progress, all, &words).with_context(|| command.join(" "))?;
        }
    }
    Ok(())
}

/// The commands of a script that joins them by `&&`; their words hold no spaces.
fn simple_commands(command: &[String]) -> Vec<Vec<String>> {
    let [shell, option, script] = command else { return vec![command.to_vec()] };
    if shell != "sh" || option != "-c" {
        return vec![command.to_vec()];
    }
    let word = |word: &str| word.trim_matches(['\'', '"']).to_owned();
    script.split(" && ").map(|one| one.split_whitespace().map(word).collect()).collect()
}

fn one_command(progress: &Progress, all: &Plan, words: &[String]) -> Result<()> {
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    match words.as_slice() {
        ["cargo", "xtask", rest @ ..] => {
            // clap reads from left to right: an unknown argument is an error before it reaches the help.
            let mut help = Command::new(std::env::current_exe()?);
            help.args(rest).arg("--help");
            let said = progress.run(help)?;
            let usage = format!("cargo xtask {}", rest.first().copied().unwrap_or_default());
            ensure!(said.contains(&usage), "no such command");
        }
        ["cargo", "check", "--package", package] => {
            ensure!(workspace::root().join("service/Cargo.toml").exists() && *package == "chat-service");
        }
        ["kubectl", "--context", _, "--namespace", _, rest @ ..] => {
            let is_object =
                |word: &&&str| word.starts_with("statefulset/") || word.starts_with("deployment/");
            let named: Vec<_> = rest.iter().filter(is_object).collect();
            ensure!(!named.is_empty(), "it names no object");
            for name in named {
                ensure!(all.objects.iter().any(|object| object == name), "there is no {name}");
            }
            if let Some(at) = rest.iter().position(|word| *word == "--") {
                subcommand_of_the_service(&rest[at + 1..])?;
            }
        }
        _ => bail!("there is no check for this kind of command"),
    }
    Ok(())
}

/// `/chat-service NAME ...`: README.md lists the subcommands with what they take.
fn subcommand_of_the_service(words: &[&str]) -> Result<()> {
    let ["/chat-service", name, options @ ..] = words else { bail!("{words:?} is not in the image") };
    let readme = fs::read_to_string(workspace::root().join("README.md"))?;
    let row = readme
        .lines()
        .find(|line| line.starts_with(&format!("| `{name} ")) || line.starts_with(&format!("| `{name}`")));
    let row = row.with_context(|| format!("README.md knows no subcommand {name}"))?;
    for option in options.iter().filter(|word| word.starts_with("--")) {
        let option = option.split('=').next().unwrap_or(option);
        ensure!(row.contains(option), "README.md knows no {option} of {name}");
    }
    Ok(())
}

/// Postgres, then the schema, then the service; and nothing before its image can be built.
fn order(all: &Plan) -> Result<()> {
    for (later, sooner) in [
        ("migrate", "postgres"),
        ("chat-service", "migrate"),
        ("migrate", "compile"),
        ("postgres", "accounts"),
    ] {
        let needs = &all.unit(later)?.needs;
        ensure!(
            needs.iter().any(|need| need == sooner),
            "{later} does not wait for {sooner}, but for {needs:?}"
        );
    }
    for unit in all.resources.iter().filter(|unit| unit.objects.is_empty() && unit.name != "compile") {
        ensure!(
            unit.needs.contains(&"chat-service".to_owned()),
            "{} can be pressed before all is there",
            unit.name
        );
    }
    Ok(())
}

/// The loop's own values and secret are for development, and nothing of them is in the chart.
fn dev_values_only(all: &Plan) -> Result<()> {
    let [one] = all.charts.as_slice() else { bail!("{} charts, not one", all.charts.len()) };
    ensure!(one.values == ["helm/chat-service/values-dev.yaml"], "it takes the values {:?}", one.values);
    let secret = all.manifests.iter().find(|manifest| manifest["kind"] == "Secret").context("no Secret")?;
    let name = secret["metadata"]["name"].as_str().context("a name")?;
    let chart = workspace::root().join(&one.path);
    for entry in fs::read_dir(&chart)? {
        let path = entry?.path();
        if path.is_file() {
            ensure!(
                !fs::read_to_string(&path)?.contains(name),
                "{} speaks of {name}",
                workspace::shown(&path)
            );
        }
    }
    let config =
        all.manifests.iter().find(|manifest| manifest["kind"] == "ConfigMap").context("no ConfigMap")?;
    // The service itself refuses a key that everybody knows in production.
    ensure!(
        config["data"]["APP_ENV"] == "development",
        "the known key is used in {}",
        config["data"]["APP_ENV"]
    );
    Ok(())
}

fn refusals(progress: &Progress, helm: &Path, file: &Path) -> Result<()> {
    let bogus = ["--bogus"];
    let other = ["--allow-context", "other"];
    for (scenario, reason) in [
        (Scenario::up("production"), "tilt up -- --allow-context production"),
        (Scenario::up("kind-other"), "--allow-context kind-other"),
        (Scenario::up(""), "No context"),
        (Scenario { arguments: &other, ..Scenario::up("production") }, "--allow-context production"),
        (Scenario { arguments: &bogus, ..Scenario::up(KIND) }, "bogus"),
    ] {
        refused(plan(progress, helm, file, scenario), reason).with_context(|| format!("{scenario:?}"))?;
    }
    Ok(())
}

fn broken(progress: &Progress, helm: &Path, file: &Path) -> Result<()> {
    let text = fs::read_to_string(file)?;
    let copy: PathBuf = places::target_dir()?.join("xtask/Tiltfile");
    for (part, instead, reason) in BROKEN {
        ensure!(text.contains(part), "the Tiltfile has no {part:?} to break");
        fs::write(&copy, text.replace(part, instead))?;
        refused(plan(progress, helm, &copy, Scenario::up(KIND)), reason)
            .with_context(|| format!("{instead:?} instead of {part:?}"))?;
    }
    // Only the comparison with the programs finds these.
    for (part, instead) in [
        ("'load', '--address'", "'load', '--adress'"),
        ("'seed', '--url'", "'sead', '--url'"),
        ("'smoke-test', '--url", "'smoke', '--url"),
    ] {
        ensure!(text.contains(part), "the Tiltfile has no {part:?} to break");
        fs::write(&copy, text.replace(part, instead))?;
        let all = plan(progress, helm, &copy, Scenario::up(KIND))?;
        ensure!(commands(progress, &all).is_err(), "{instead} was taken");
    }
    fs::remove_file(copy).context("remove the broken Tiltfile")
}

fn refused(outcome: Result<Plan>, reason: &str) -> Result<()> {
    match outcome {
        Ok(_) => bail!("it was taken"),
        Err(error) => ensure!(format!("{error:#}").contains(reason), "no word of {reason:?}:\n{error:#}"),
    }
    Ok(())
}
