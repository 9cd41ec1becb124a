//! Checks of the chart that need no cluster: what it renders, and what it refuses.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use common::chart::{CHART, HELM, MODULE, SCHEMA_SOURCES, at_top, module_folder, values_files};
use common::go_tools::{self, GoTool};
use common::steps::{Progress, Tally};
use common::workspace;
use harness::places;
use serde_json::Value;

/// The version to render for and check against. Helm, built as a module, assumes 1.20 when it has no cluster to ask.
const KUBERNETES: &str = "1.34.4";

const HELM_UNITTEST: GoTool =
    plain("helm-unittest", "github.com/helm-unittest/helm-unittest/cmd/helm-unittest");
const HELM_DOCS: GoTool = plain("helm-docs", "github.com/norwoodj/helm-docs/cmd/helm-docs");
const KUBECONFORM: GoTool = plain("kubeconform", "github.com/yannh/kubeconform/cmd/kubeconform");
const KUBE_LINTER: GoTool = plain("kube-linter", "golang.stackrox.io/kube-linter/cmd/kube-linter");
const NETPOLICY: GoTool = plain("netpolicy", "github.com/np-guard/netpol-analyzer/cmd/netpolicy");
const SCHEMAS: GoTool = plain("schemas", "./schemas");

const fn plain(name: &'static str, package: &'static str) -> GoTool {
    GoTool { name, module: MODULE, package, settings: &[] }
}

/// Values that the chart must refuse, and a word of the refusal.
const REFUSED: [(&str, &str); 22] = [
    ("replicaCuont=1", "replicaCuont"),
    ("image.tga=1", "tga"),
    ("postgres.persistence.sise=1Gi", "sise"),
    ("networkPolicy.metricFrom[0].ipBlock.cidr=10.0.0.0/8", "metricFrom"),
    ("ingress.hosts[0].hots=a", "hots"),
    ("config.PORT=80", "PORT"),
    ("config.LOG_LEVEL=debug", "LOG_LEVEL"),
    ("config.APP_ENV=staging", "production"),
    ("config.SHUTDOWN_GRACE_SECONDS=0", "minimum"),
    ("config.KEEP_ALIVE_SECONDS=4", "minimum"),
    ("config.STREAM_MAX_SECONDS=5", "minimum"),
    ("ingress.enabled=yes", "boolean"),
    ("image.digest=latest", "digest"),
    ("image.pullPolicy=Sometimes", "pullPolicy"),
    ("ingress.enabled=true,httpRoute.enabled=true", "exclude one another"),
    ("serviceMonitor.enabled=true,podMonitor.enabled=true", "twice"),
    ("postgres.enabled=false", "externalPostgres.existingSecret"),
    ("externalPostgres.host=db", "postgres.enabled=false"),
    ("redis.enabled=false", "externalRedis.host"),
    ("externalRedis.host=cache", "redis.enabled=false"),
    ("replicaCount=20", "max_connections"),
    ("terminationGracePeriodSeconds=40", "45"),
];

/// Variables that the chart sets from other values.
const CHARTS_OWN: [&str; 16] = [
    "SECRET_KEY",
    "SECRET_KEY_PREVIOUS",
    "DB_USER",
    "DB_PASSWORD",
    "DB_HOST",
    "DB_PORT",
    "DB_NAME",
    "DATABASE_URL",
    "REDIS_URL",
    "REDIS_MODE",
    "REDIS_SENTINEL_MASTER",
    "REDIS_MASTER_URL",
    "PORT",
    "OPS_PORT",
    "MIGRATE_ON_START",
    "OTEL_*",
];

/// Other pods, to evaluate the NetworkPolicies for.
const OTHERS: &str = "
apiVersion: v1
kind: Namespace
metadata: {name: monitoring, labels: {kubernetes.io/metadata.name: monitoring}}
---
apiVersion: v1
kind: Pod
metadata: {name: prometheus, namespace: monitoring}
spec: {containers: [{name: c, image: c}]}
---
apiVersion: v1
kind: Namespace
metadata: {name: elsewhere, labels: {kubernetes.io/metadata.name: elsewhere}}
---
apiVersion: v1
kind: Pod
metadata: {name: stranger, namespace: elsewhere}
spec: {containers: [{name: c, image: c}]}
---
apiVersion: v1
kind: Pod
metadata: {name: neighbour, namespace: chat}
spec: {containers: [{name: c, image: c}]}
";

/// Exactly what the policies allow to or from the chart's pods. `any` is any address.
const REACHABLE: [&str; 12] = [
    "any => server : TCP 8000",
    "create-secret => any : TCP 53,443,6443,UDP 53",
    "elsewhere/stranger => server : TCP 8000",
    "migrate => any : TCP 53,UDP 53",
    "migrate => postgres : TCP 5432",
    "monitoring/prometheus => server : TCP 8000,9000",
    "neighbour => server : TCP 8000",
    "server => any : TCP 53,UDP 53",
    "server => postgres : TCP 5432",
    "server => redis : TCP 6379",
    "test => any : TCP 53,UDP 53",
    "test => server : TCP 8000",
];

/// An agent on each node as the collector, which is no pod; and what that allows.
const NODE_AGENT: &str =
    "extraEnv[0].name=OTEL_EXPORTER_OTLP_ENDPOINT,extraEnv[0].value=http://$(HOST_IP):4318";
const TO_NODE_AGENT: (&str, &str) = ("server => any : TCP 53,UDP 53", "server => any : TCP 53,4318,UDP 53");

struct Tools {
    helm: PathBuf,
    unittest: PathBuf,
    docs: PathBuf,
    kubeconform: PathBuf,
    linter: PathBuf,
    netpolicy: PathBuf,
    schemas: PathBuf,
    /// Where the steps leave renderings, schemas and the package.
    out: PathBuf,
}

pub(super) fn check(tally: &mut Tally) {
    if !go_tools::can_use("chart") {
        return;
    }
    let Some(tools) = tally.check("chart: tools", "", build) else { return };
    tally.check("chart: lint", "", |progress| tools.lint(progress));
    tally.check("chart: unit tests", "", |progress| tools.unit_tests(progress));
    let rendered = tally.check("chart: rendering", "", |progress| tools.render_all(progress));
    tally.check("chart: migration Job", "", |progress| tools.migration(progress));
    tally.check("chart: refusals", "", |progress| tools.refuse(progress));
    tally.check("chart: as a sub-chart", "", |progress| tools.umbrella(progress));
    tally.check("chart: packaged files", "", |progress| tools.packaged_files(progress));
    tally.check("chart: variables", "name it in config of values.schema.json, or in CHARTS_OWN", |_| {
        variables()
    });
    tally.check("chart: README", "cargo xtask test leaves the right one in target/chart", |progress| {
        tools.readme(progress)
    });
    if let Some(files) = rendered {
        tally.check("chart: API schemas", "", |progress| tools.conform(progress, &files));
        tally.check("chart: who reaches whom", "", |progress| tools.reach(progress));
        let fix = "fix it, or explain the exception in deploy/lint/kube-linter.yaml";
        tally.check("chart: kube-linter", fix, |progress| {
            let mut lint = Command::new(&tools.linter);
            lint.args(["lint", "--config", "deploy/lint/kube-linter.yaml"]).args(&files);
            progress.run(at_top(&mut lint))
        });
    }
}

/// A minute or two the first time; see `deploy/lint`.
fn build(progress: &Progress) -> Result<Tools> {
    let out = places::target_dir()?.join("chart");
    fs::create_dir_all(&out).with_context(|| format!("create {}", out.display()))?;
    Ok(Tools {
        helm: HELM.build(progress)?,
        unittest: HELM_UNITTEST.build(progress)?,
        docs: HELM_DOCS.build(progress)?,
        kubeconform: KUBECONFORM.build(progress)?,
        linter: KUBE_LINTER.build(progress)?,
        netpolicy: NETPOLICY.build(progress)?,
        schemas: SCHEMAS.build(progress)?,
        out,
    })
}

impl Tools {
    fn helm(&self, progress: &Progress, args: &[&str], values: &[PathBuf]) -> Result<String> {
        let mut helm = Command::new(&self.helm);
        helm.args(args);
        for file in values {
            helm.arg("--values").arg(file);
        }
        progress.run(at_top(&mut helm))
    }

    fn template(
        &self,
        progress: &Progress,
        chart: &str,
        values: &[PathBuf],
        sets: &[&str],
    ) -> Result<String> {
        let mut args = vec!["template", "chat", chart, "--namespace", "chat", "--kube-version", KUBERNETES];
        for set in sets {
            args.extend(["--set", set]);
        }
        self.helm(progress, &args, values)
    }

    fn lint(&self, progress: &Progress) -> Result<()> {
        for (_, values) in values_files()? {
            self.helm(
                progress,
                &["lint", "--strict", "--quiet", CHART, "--kube-version", KUBERNETES],
                &values,
            )?;
        }
        Ok(())
    }

    fn unit_tests(&self, progress: &Progress) -> Result<()> {
        let mut tests = Command::new(&self.unittest);
        let said = progress.run(at_top(tests.args(["--strict", "--color=false", CHART])))?;
        let ran = said.lines().any(|line| line.starts_with("Tests:") && !line.ends_with(" 0 total"));
        ensure!(ran, "no unit test ran:\n{said}");
        Ok(())
    }

    /// The chart as users get it: without its tests.
    fn package(&self, progress: &Progress, chart: &str) -> Result<String> {
        let folder = self.out.to_string_lossy().into_owned();
        let said = self.helm(progress, &["package", chart, "--destination", &folder], &[])?;
        let (_, path) = said.split_once("saved it to: ").context("helm package names no file")?;
        Ok(path.trim().to_owned())
    }

    /// Renders twice, from the folder and from the package: both have to be the same.
    fn render_all(&self, progress: &Progress) -> Result<Vec<PathBuf>> {
        let package = self.package(progress, CHART)?;
        let mut files = Vec::new();
        for (name, values) in values_files()? {
            let first = self.template(progress, CHART, &values, &[])?;
            let second = self.template(progress, &package, &values, &[])?;
            let file = self.out.join(format!("{name}.yaml"));
            fs::write(&file, &first)?;
            if first != second {
                let other = self.out.join(format!("{name}-again.yaml"));
                fs::write(&other, second)?;
                bail!(
                    "rendered twice, {name} differs: diff {} {}",
                    workspace::shown(&file),
                    workspace::shown(&other)
                );
            }
            ensure!(
                !first.contains("kind: Secret\n"),
                "{name} renders a Secret: it would be in every manifest"
            );
            files.push(file);
        }
        let mut list = Command::new("tar");
        let listed = progress.run(at_top(list.args(["tzf", &package])))?;
        for unwanted in ["/chat-service/tests/", "chat-service/tests/", "chat-service/ci/", ".gotmpl"] {
            ensure!(
                !listed.lines().any(|line| line.starts_with(unwanted)),
                "{unwanted} is packaged: see .helmignore"
            );
        }
        Ok(files)
    }

    /// An unchanged Job keeps its name. A changed Job cannot be applied over the old one, and so has another name.
    fn migration(&self, progress: &Progress) -> Result<()> {
        let name = |set: &str| -> Result<String> {
            let rendered = self.template(progress, CHART, &[], &[set])?;
            let mut names =
                rendered.lines().filter_map(|line| line.strip_prefix("  name: chat-chat-service-migrate-"));
            names.next().map(str::to_owned).with_context(|| format!("no migration Job with {set}"))
        };
        let usual = name("replicaCount=2")?;
        for same in
            ["replicaCount=3", "service.port=80", "config.CACHE_WINDOW=9", "migration.annotations.a=b"]
        {
            ensure!(
                name(same)? == usual,
                "--set {same} makes a new migration Job, and changes nothing in it"
            );
        }
        let mut seen = BTreeSet::from([usual]);
        for other in [
            "image.tag=other",
            "config.RUST_LOG=debug",
            "migration.waitSeconds=1",
            "migration.resources.limits.memory=1Gi",
            "postgres.auth.existingSecret=mine",
            "nodeSelector.disk=ssd",
            "podLabels.a=b",
        ] {
            ensure!(
                seen.insert(name(other)?),
                "--set {other} changes the migration Job under the name it had"
            );
        }
        Ok(())
    }

    fn refuse(&self, progress: &Progress) -> Result<()> {
        for (set, reason) in REFUSED {
            match self.template(progress, CHART, &[], &[set]) {
                Ok(_) => bail!("--set {set} was taken"),
                Err(error) if format!("{error:#}").contains(reason) => {}
                Err(error) => bail!("--set {set} is refused without a word of {reason}:\n{error:#}"),
            }
        }
        Ok(())
    }

    /// As a sub-chart it gets shared `global` values and the condition `enabled`; typos are still refused.
    fn umbrella(&self, progress: &Progress) -> Result<()> {
        let folder = self.out.join("umbrella");
        let _ = fs::remove_dir_all(&folder);
        fs::create_dir_all(folder.join("charts"))?;
        let package = self.package(progress, CHART)?;
        fs::copy(&package, folder.join("charts/chat-service.tgz"))?;
        fs::write(
            folder.join("Chart.yaml"),
            "apiVersion: v2\nname: umbrella\nversion: 1.0.0\ndependencies:\n  - name: chat-service\n    \
             version: '*'\n    condition: chat-service.enabled\n",
        )?;
        let chart = folder.to_string_lossy().into_owned();
        let shared = "global.imageRegistry=mirror.example.com,global.others.size=3,chat-service.enabled=true";
        let rendered = self.template(progress, &chart, &[], &[shared])?;
        ensure!(
            rendered.contains("\"mirror.example.com/chat-service:"),
            "global.imageRegistry has no effect"
        );
        let without = self.template(progress, &chart, &[], &["chat-service.enabled=false"])?;
        ensure!(!without.contains("kind:"), "chat-service.enabled=false still renders something");
        match self.template(progress, &chart, &[], &["chat-service.redis.maxmemroy=1mb"]) {
            Ok(_) => bail!("a typo in the sub-chart's values was taken"),
            Err(error) => ensure!(format!("{error:#}").contains("maxmemroy"), "{error:#}"),
        }
        Ok(())
    }

    /// Rules and dashboards have braces of their own, which Helm must not touch.
    fn packaged_files(&self, progress: &Progress) -> Result<()> {
        let package = self.package(progress, CHART)?;
        let folder = self.out.join("with-files");
        let _ = fs::remove_dir_all(&folder);
        fs::create_dir_all(&folder)?;
        let mut unpack = Command::new("tar");
        progress.run(at_top(unpack.args(["xzf", &package, "-C"]).arg(&folder)))?;
        let chart = folder.join("chat-service");
        for (file, text) in [
            (
                "files/rules/probe.yaml",
                "groups:\n  - name: probe\n    rules:\n      - alert: Probe\n        expr: up == 0\n        \
                 annotations:\n          summary: 'down: {{ $labels.instance }}'\n",
            ),
            ("files/dashboards/probe.json", "{\"title\": \"probe\", \"legendFormat\": \"{{pod}}\"}\n"),
        ] {
            let path = chart.join(file);
            fs::create_dir_all(path.parent().unwrap_or(&chart))?;
            fs::write(&path, text)?;
        }
        let sets = [
            "prometheusRule.enabled=true,prometheusRule.labels.release=prometheus",
            "dashboards.enabled=true,dashboards.annotations.folder=chat",
        ];
        let rendered = self.template(progress, &chart.to_string_lossy(), &[], &sets)?;
        for expected in [
            "kind: PrometheusRule",
            "release: prometheus",
            "summary: 'down: {{ $labels.instance }}'",
            "-dashboard-probe",
            "grafana_dashboard: \"1\"",
            "folder: chat",
            "\"legendFormat\": \"{{pod}}\"",
        ] {
            ensure!(rendered.contains(expected), "not rendered: {expected}");
        }
        Ok(())
    }

    fn reach(&self, progress: &Progress) -> Result<()> {
        let mut expected = BTreeSet::from(REACHABLE.map(str::to_owned));
        self.reaches(progress, &self.template(progress, CHART, &[], &[])?, &expected)?;
        let (before, after) = TO_NODE_AGENT;
        expected.remove(before);
        expected.insert(after.to_owned());
        self.reaches(progress, &self.template(progress, CHART, &[], &[NODE_AGENT])?, &expected)
            .context("with an agent on the node")
    }

    /// Evaluates the policies as an enforcing cluster would.
    fn reaches(&self, progress: &Progress, rendered: &str, expected: &BTreeSet<String>) -> Result<()> {
        let folder = self.out.join("reach");
        fs::create_dir_all(&folder)?;
        fs::write(folder.join("chart.yaml"), rendered)?;
        fs::write(folder.join("others.yaml"), OTHERS)?;
        let mut list = Command::new(&self.netpolicy);
        let said = progress.run(at_top(list.args(["list", "--quiet", "--dirpath"]).arg(&folder)))?;
        let allowed: BTreeSet<String> = said.lines().filter_map(reachable).collect();
        let more: Vec<_> = allowed.difference(expected).collect();
        let less: Vec<_> = expected.difference(&allowed).collect();
        ensure!(
            more.is_empty() && less.is_empty(),
            "allowed and not wanted: {more:?}; wanted and not allowed: {less:?}"
        );
        Ok(())
    }

    fn readme(&self, progress: &Progress) -> Result<()> {
        let mut docs = Command::new(&self.docs);
        let committed = workspace::root().join(CHART).join("README.md");
        let generated = progress.run(at_top(docs.args([
            "--chart-search-root",
            CHART,
            "--dry-run",
            "--sort-values-order=file",
            "--log-level=warning",
        ])))?;
        let right = self.out.join("README.md");
        fs::write(&right, format!("{}\n", generated.trim()))?;
        ensure!(
            fs::read_to_string(&committed)?.trim() == generated.trim(),
            "it is not what values.yaml and README.md.gotmpl say: cp {} {}",
            workspace::shown(&right),
            workspace::shown(&committed)
        );
        Ok(())
    }

    /// Against the API server's own schemas.
    fn conform(&self, progress: &Progress, files: &[PathBuf]) -> Result<()> {
        let location = schemas(progress, &self.schemas, &self.out)?;
        let conform = |files: &[PathBuf]| {
            let mut conform = Command::new(&self.kubeconform);
            conform.args(["-strict", "-summary", "-schema-location", &location]).args(files);
            progress.run(at_top(&mut conform))
        };
        conform(files)?;
        // Schemas that accept everything would look the same.
        let default = fs::read_to_string(self.out.join("default.yaml"))?;
        let broken = self.out.join("broken.yaml");
        fs::write(&broken, default.replacen("terminationGracePeriodSeconds", "terminationGraceSeconds", 1))?;
        match conform(&[broken]) {
            Ok(_) => bail!("a field that does not exist went through"),
            Err(error) => ensure!(format!("{error:#}").contains("terminationGraceSeconds"), "{error:#}"),
        }
        Ok(())
    }
}

/// The API server's schemas in files, as kubeconform finds them.
fn schemas(progress: &Progress, program: &Path, out: &Path) -> Result<String> {
    let schemas = out.join("schemas");
    let _ = fs::remove_dir_all(&schemas);
    let mut make = Command::new(program);
    make.arg(&schemas);
    for (module, paths) in SCHEMA_SOURCES {
        let folder = module_folder(progress, module)?;
        make.args(paths.iter().map(|path| folder.join(path)));
    }
    progress.run(at_top(&mut make))?;
    Ok(format!("{}/{{{{.Group}}}}/{{{{.ResourceAPIVersion}}}}/{{{{.ResourceKind}}}}.json", schemas.display()))
}

/// Other objects, against the same schemas.
pub(super) fn conform_to_kubernetes(progress: &Progress, file: &Path) -> Result<()> {
    let out = places::target_dir()?.join("chart");
    let location = schemas(progress, &SCHEMAS.build(progress)?, &out)?;
    let mut conform = Command::new(KUBECONFORM.build(progress)?);
    conform.args(["-strict", "-summary", "-schema-location", &location]).arg(file);
    progress.run(at_top(&mut conform)).map(drop)
}

/// `chat/chat-chat-service-test[Pod] => chat/chat-chat-service[Deployment] : TCP 8000` as `test => server : TCP 8000`.
/// Nothing for lines that concern other pods only, or repeat for one of them what is allowed for any address.
fn reachable(line: &str) -> Option<String> {
    const OURS: &str = "chat/chat-chat-service";
    let (from, rest) = line.split_once(" => ")?;
    let (to, ports) = rest.split_once(" : ")?;
    if !(to.starts_with(OURS) || from.starts_with(OURS) && to.starts_with("0.0.0.0")) {
        return None;
    }
    let short = |end: &str| {
        let name = end.split('[').next().unwrap_or(end);
        let name = name.replace("chat/chat-chat-service-", "").replace(OURS, "server").replace("chat/", "");
        match name.split_once("migrate-") {
            Some(_) => "migrate".to_owned(),
            None => name.replace("0.0.0.0-255.255.255.255", "any"),
        }
    };
    Some(format!("{} => {} : {ports}", short(from), short(to)))
}

/// Every variable of the service can be set through the chart, and nothing else can.
fn variables() -> Result<()> {
    let root = workspace::root();
    let readme = fs::read_to_string(root.join("README.md"))?;
    let mut documented: BTreeSet<String> = readme
        .lines()
        .filter_map(|line| line.strip_prefix("| `")?.split_once("` | ").map(|(n, _)| n.to_owned()))
        .collect();
    documented.retain(|name| name.chars().all(|c| c.is_ascii_uppercase() || "_*".contains(c)));
    let schema: Value =
        serde_json::from_str(&fs::read_to_string(root.join(CHART).join("values.schema.json"))?)?;
    let config =
        schema["properties"]["config"]["properties"].as_object().context("config in values.schema.json")?;
    let mut known: BTreeSet<String> = config.keys().cloned().collect();
    known.extend(CHARTS_OWN.map(str::to_owned));
    let differences: Vec<&String> = documented.symmetric_difference(&known).collect();
    ensure!(differences.is_empty(), "the service's variables and the chart's differ in {differences:?}");
    Ok(())
}
