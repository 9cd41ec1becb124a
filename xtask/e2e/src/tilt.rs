//! Does what Tilt would do with the Tiltfile: the image's command, the objects in their order, the buttons.

use anyhow::{Context, Result, ensure};
use common::steps::Progress;
use common::tiltfile::{Plan, Scenario, plan};
use common::{kind, workspace};
use serde_json::{Value, json};

use crate::kubernetes::no_warnings;
use crate::stage::Stage;

/// Beside the release that the other checks look at.
const NAMESPACE: &str = "chat-tilt-e2e";

struct Loop<'a> {
    stage: &'a Stage,
    progress: &'a Progress,
    plan: Plan,
}

pub(super) fn tilt_loop(stage: &mut Stage, progress: &Progress) -> Result<()> {
    let scenario = Scenario { namespace: NAMESPACE, subcommand: "ci", ..Scenario::up(kind::CONTEXT) };
    let plan = plan(progress, &stage.helm, &workspace::root().join("Tiltfile"), scenario)?;
    let tilt = Loop { stage, progress, plan };
    tilt.shell(&format!(
        "kubectl delete namespace --ignore-not-found --timeout=120s {NAMESPACE}\n\
         kubectl create namespace {NAMESPACE}\n\
         kubectl label namespace {NAMESPACE} pod-security.kubernetes.io/enforce=restricted"
    ))?;
    let outcome = tilt.play();
    let outcome = outcome.map_err(|error| {
        let words =
            tilt.shell(&format!("kubectl --namespace {NAMESPACE} get pods,events --sort-by=.lastTimestamp"));
        error.context(words.unwrap_or_default())
    });
    tilt.shell(&format!("kubectl delete namespace --timeout=120s {NAMESPACE}"))?;
    outcome
}

impl Loop<'_> {
    fn play(&self) -> Result<()> {
        self.compile()?;
        let first = self.image("tilt-build-1")?;
        for unit in self.in_order()? {
            self.deploy(&unit, &first).with_context(|| unit.clone())?;
        }
        self.press("smoke-test")?;
        // Another image: the same Job again, and new pods.
        let second = self.image("tilt-build-2")?;
        for unit in ["migrate", "chat-service"] {
            self.deploy(unit, &second).with_context(|| format!("{unit} again"))?;
        }
        let running = self.kubectl("get pods --output jsonpath='{.items[*].spec.containers[*].image}'")?;
        ensure!(running.contains(&second), "the new image does not run: {running}");
        self.press("smoke-test")?;
        self.load()?;
        self.press("reset-database")?;
        self.press("smoke-test")
    }

    /// The Tiltfile's command, but in the profile that the stage's own image has been compiled in: to compile in another
    /// takes minutes from nothing.
    fn compile(&self) -> Result<()> {
        let command = self.plan.unit("compile")?.command.join(" ");
        ensure!(command.contains("dev-fast"), "no profile dev-fast in {command}");
        self.shell(&command.replace("dev-fast", "release")).map(drop)
    }

    /// The names of what starts by itself in the cluster, each after what it needs.
    fn in_order(&self) -> Result<Vec<String>> {
        let mut left: Vec<_> = self.plan.resources.iter().filter(|unit| !unit.objects.is_empty()).collect();
        let mut done: Vec<String> = vec!["compile".to_owned()];
        while !left.is_empty() {
            let next = left.iter().position(|unit| unit.needs.iter().all(|need| done.contains(need)));
            done.push(left.remove(next.context("resources wait for one another")?).name.clone());
        }
        Ok(done.split_off(1))
    }

    /// Builds the image under the name that Tilt would expect, and brings it to where the cluster finds it.
    fn image(&self, tag: &str) -> Result<String> {
        let [image] = self.plan.images.as_slice() else { anyhow::bail!("not one image") };
        // By a push if the cluster names a registry, else by loading it into the node.
        let announced = self.shell("kubectl --namespace kube-public get configmap local-registry-hosting");
        let name = match announced {
            Ok(_) => format!("{}/{}:{tag}", kind::REGISTRY_HOST, image.name),
            Err(_) => format!("{}:{tag}", image.name),
        };
        let script = image.command.last().context("a script")?;
        self.shell(&format!("export EXPECTED_REF={name}\n{script}"))?;
        match announced {
            Ok(_) => self.shell(&format!("docker push {name}"))?,
            Err(_) => kind::load_from_engine(self.progress, &name)?,
        };
        Ok(name)
    }

    /// Applies a resource's objects, and waits until Tilt would take it for ready.
    fn deploy(&self, unit: &str, image: &str) -> Result<()> {
        let unit = self.plan.unit(unit)?;
        let mut items = Vec::new();
        for name in &unit.objects {
            let (kind, name) = name.split_once('/').context("Kind/name")?;
            let is = |manifest: &&Value| manifest["kind"] == kind && manifest["metadata"]["name"] == name;
            let manifest = self.plan.manifests.iter().find(is).context("an object of the plan")?;
            items.extend(self.services_of(manifest));
            items.push(with_image(manifest.clone(), image));
            if kind == "Job" {
                self.kubectl(&format!("delete --ignore-not-found job/{name}"))?;
            }
        }
        let list = json!({"apiVersion": "v1", "kind": "List", "items": items}).to_string();
        let file = Stage::scratch_file("tilt-objects.json", &list)?;
        no_warnings(&self.kubectl(&format!("apply --filename '{}'", file.display()))?)?;
        for name in &unit.objects {
            match name.split_once('/').context("Kind/name")? {
                ("Job", name) => {
                    self.kubectl(&format!("wait --for=condition=complete --timeout=120s job/{name}"))?
                }
                ("Deployment" | "StatefulSet", _) => {
                    self.kubectl(&format!("rollout status --timeout=120s {}", name.to_lowercase()))?
                }
                _ => String::new(),
            };
        }
        Ok(())
    }

    /// Tilt finds the Services of a workload by what they select.
    fn services_of(&self, workload: &Value) -> Vec<Value> {
        let labels = &workload["spec"]["template"]["metadata"]["labels"];
        let selects = |service: &&Value| {
            let selector = service["spec"]["selector"].as_object();
            service["kind"] == "Service"
                && selector.is_some_and(|all| all.iter().all(|(name, value)| labels[name] == *value))
        };
        self.plan.manifests.iter().filter(selects).cloned().collect()
    }

    /// A button's command, as it stands in the Tiltfile.
    fn press(&self, button: &str) -> Result<()> {
        let command = &self.plan.unit(button)?.command;
        let script = match command.as_slice() {
            [shell, option, script] if shell == "sh" && option == "-c" => script.clone(),
            words => words.iter().map(|word| format!("'{word}'")).collect::<Vec<_>>().join(" "),
        };
        self.shell(&script).map(drop).with_context(|| format!("the button {button}"))
    }

    /// The button `load`, but with a port of our own, and shorter.
    fn load(&self) -> Result<()> {
        let command = &self.plan.unit("load")?.command;
        let words = command.iter().map(String::as_str).take_while(|word| *word != "--address");
        let words: Vec<_> = words.collect();
        let forward =
            format!("kubectl --namespace {NAMESPACE} port-forward deployment/chat-chat-service 18000:8000");
        let tried = format!(
            "{forward} & trap 'kill %1' EXIT\n\
             for _ in $(seq 50); do (: > /dev/tcp/127.0.0.1/18000) 2>/dev/null && break; sleep 0.2; done\n\
             {} --address 127.0.0.1:18000 --seconds 3",
            words.join(" ")
        );
        let said = self.shell(&tried)?;
        ensure!(said.contains("none failed"), "{said}");
        Ok(())
    }

    fn kubectl(&self, arguments: &str) -> Result<String> {
        self.shell(&format!("kubectl --namespace {NAMESPACE} {arguments}"))
    }

    fn shell(&self, script: &str) -> Result<String> {
        self.stage.shell(self.progress, script)
    }
}

/// As Tilt writes the name of the image that it built into what it applies.
fn with_image(mut manifest: Value, name: &str) -> Value {
    let containers = manifest.pointer_mut("/spec/template/spec/containers").and_then(Value::as_array_mut);
    for container in containers.into_iter().flatten() {
        if container["image"].as_str().is_some_and(|image| image.starts_with("chat-service:")) {
            container["image"] = json!(name);
        }
    }
    manifest
}
