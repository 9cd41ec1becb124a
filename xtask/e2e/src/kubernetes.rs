//! A cluster's API for blocking code: every wait has a timeout and ends on Ctrl-C, and errors include what the cluster
//! reports.

mod forward;

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::future::Future;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use common::signals;
use harness::servers::daemon;
use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::api::apps::v1::{Deployment, StatefulSet};
use k8s_openapi::api::core::v1::{Event, Node, Pod, Secret};
use kube::api::{DeleteParams, EvictParams, ListParams, LogParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::runtime::wait::await_condition;
use kube::{Api, Client, Config, Resource, ResourceExt};
use serde_json::Value;
use tokio::runtime::Runtime;

pub(crate) use forward::Forward;

/// For one answer of an API server that works.
const ANSWER_LIMIT: Duration = Duration::from_secs(30);
const EVENTS_MAX: usize = 12;
const LOG_LINES: usize = 15;

/// One namespace of a cluster.
pub(crate) struct Kubernetes {
    runtime: Runtime,
    client: Client,
    namespace: String,
}

impl Kubernetes {
    pub(crate) fn connect(kubeconfig: &Path, namespace: &str) -> Result<Self> {
        // One provider for TLS; a second call changes nothing.
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let file = Kubeconfig::read_from(kubeconfig)
            .with_context(|| format!("read {}: is the cluster up?", kubeconfig.display()))?;
        let client = runtime.block_on(async {
            let mut config = Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await?;
            // It would retry evictions that a disruption budget forbids.
            config.default_retry = false;
            anyhow::Ok(Client::try_from(config)?)
        })?;
        Ok(Self { runtime, client, namespace: namespace.to_owned() })
    }

    /// Runs to the end, the limit or Ctrl-C.
    fn within<T>(&self, limit: Duration, what: &str, work: impl Future<Output = Result<T>>) -> Result<T> {
        self.runtime.block_on(async {
            let interrupted = async {
                while !signals::asked_to_end() {
                    tokio::time::sleep(Duration::from_millis(200)).await;
                }
            };
            tokio::select! {
                outcome = tokio::time::timeout(limit, work) => match outcome {
                    Ok(outcome) => outcome.with_context(|| what.to_owned()),
                    Err(_) => Err(anyhow!("{what}: not within {} s", limit.as_secs())),
                },
                () = interrupted => Err(anyhow!("interrupted")),
            }
        })
    }

    fn api<K>(&self) -> Api<K>
    where
        K: Resource<Scope = NamespaceResourceScope, DynamicType = ()>,
    {
        Api::namespaced(self.client.clone(), &self.namespace)
    }

    /// Waits until the object is as wanted; else the error has events and logs.
    fn wait<K>(&self, name: &str, what: &str, limit: Duration, wanted: fn(&K) -> bool) -> Result<()>
    where
        K: Resource<Scope = NamespaceResourceScope, DynamicType = ()>
            + Clone
            + Debug
            + Send
            + serde::de::DeserializeOwned
            + 'static,
    {
        let condition = move |object: Option<&K>| object.is_some_and(wanted);
        let waiting = async { Ok(await_condition(self.api::<K>(), name, condition).await?) };
        self.within(limit, &format!("{name} {what}"), waiting)
            .map(drop)
            .map_err(|error| self.explained(error))
    }

    /// Waits until all replicas of the Deployment's latest revision serve, and no others are left.
    pub(crate) fn rolled_out(&self, name: &str, limit: Duration) -> Result<()> {
        self.wait::<Deployment>(name, "rolled out", limit, |deployment| {
            let (Some(spec), Some(status)) = (&deployment.spec, &deployment.status) else { return false };
            let wanted = spec.replicas.unwrap_or(1);
            let all = [status.replicas, status.updated_replicas, status.available_replicas];
            status.observed_generation == deployment.metadata.generation
                && all.into_iter().all(|count| count.unwrap_or(0) == wanted)
        })
    }

    /// The same of a StatefulSet.
    pub(crate) fn set_rolled_out(&self, name: &str, limit: Duration) -> Result<()> {
        self.wait::<StatefulSet>(name, "rolled out", limit, |set| {
            let (Some(spec), Some(status)) = (&set.spec, &set.status) else { return false };
            let wanted = spec.replicas.unwrap_or(1);
            status.observed_generation == set.metadata.generation
                && status.ready_replicas.unwrap_or(0) == wanted
                && status.updated_replicas.unwrap_or(0) == wanted
        })
    }

    /// Waits until the number of ready replicas is as wanted.
    pub(crate) fn replicas(&self, name: &str, limit: Duration, wanted: fn(i32) -> bool) -> Result<()> {
        let ready = move |deployment: &Deployment| {
            wanted(deployment.status.as_ref().and_then(|status| status.ready_replicas).unwrap_or(0))
        };
        let condition = move |object: Option<&Deployment>| object.is_some_and(ready);
        let waiting = async { Ok(await_condition(self.api::<Deployment>(), name, condition).await?) };
        let what = format!("{name}: as many ready replicas as wanted");
        self.within(limit, &what, waiting).map(drop).map_err(|error| self.explained(error))
    }

    /// How many replicas the Deployment is to have.
    pub(crate) fn wanted_replicas(&self, name: &str) -> Result<i32> {
        let getting = async { Ok(self.api::<Deployment>().get(name).await?) };
        let deployment = self.within(ANSWER_LIMIT, &format!("read the Deployment {name}"), getting)?;
        Ok(deployment.spec.and_then(|spec| spec.replicas).unwrap_or(1))
    }

    /// The pods with these labels, without terminating ones.
    pub(crate) fn pods(&self, labels: &str) -> Result<Vec<Pod>> {
        let listing = async { Ok(self.api::<Pod>().list(&ListParams::default().labels(labels)).await?) };
        let pods = self.within(ANSWER_LIMIT, "list pods", listing)?;
        Ok(pods.items.into_iter().filter(|pod| pod.metadata.deletion_timestamp.is_none()).collect())
    }

    /// Deletes a pod, gracefully or at once.
    pub(crate) fn delete_pod(&self, name: &str, at_once: bool) -> Result<()> {
        let how = if at_once { DeleteParams::default().grace_period(0) } else { DeleteParams::default() };
        let deleting = async { Ok(self.api::<Pod>().delete(name, &how).await?) };
        self.within(ANSWER_LIMIT, &format!("delete {name}"), deleting).map(drop)
    }

    /// Asks for the pod's eviction, as a drain does; `false` when a disruption budget forbids it.
    pub(crate) fn evict(&self, name: &str) -> Result<bool> {
        let evicting = async {
            match self.api::<Pod>().evict(name, &EvictParams::default()).await {
                Ok(_) => Ok(true),
                Err(kube::Error::Api(status)) if status.code == 429 => Ok(false),
                Err(error) => Err(error.into()),
            }
        };
        self.within(ANSWER_LIMIT, &format!("evict {name}"), evicting)
    }

    /// Closes or opens every node for new pods.
    pub(crate) fn cordon(&self, closed: bool) -> Result<()> {
        let cordoning = async {
            let nodes: Api<Node> = Api::all(self.client.clone());
            for node in nodes.list(&ListParams::default()).await? {
                let name = node.name_any();
                if closed {
                    nodes.cordon(&name).await?
                } else {
                    nodes.uncordon(&name).await?
                };
            }
            Ok(())
        };
        self.within(ANSWER_LIMIT, "cordon", cordoning)
    }

    pub(crate) fn secret(&self, name: &str) -> Result<BTreeMap<String, Vec<u8>>> {
        let getting = async { Ok(self.api::<Secret>().get(name).await?) };
        let secret = self.within(ANSWER_LIMIT, &format!("read the Secret {name}"), getting)?;
        Ok(secret.data.unwrap_or_default().into_iter().map(|(key, value)| (key, value.0)).collect())
    }

    /// A port of a ready pod with these labels, as one of this machine for as long as the result lives.
    pub(crate) fn forward(&self, labels: &str, port: u16) -> Result<Forward> {
        let pod = self.pods(labels)?.into_iter().find(is_ready);
        let pod = pod.with_context(|| format!("no pod with {labels} is ready"))?;
        Forward::start(&self.runtime, self.api::<Pod>(), pod.name_any(), port)
    }

    /// The newest events of the namespace, oldest first.
    pub(crate) fn events(&self) -> Result<Vec<String>> {
        let listing = async { Ok(self.api::<Event>().list(&ListParams::default()).await?) };
        let mut events = self.within(ANSWER_LIMIT, "list events", listing)?.items;
        let time = |event: &Event| {
            let last = event.last_timestamp.as_ref().map(|time| time.0);
            last.or_else(|| event.event_time.as_ref().map(|time| time.0))
        };
        events.sort_by_key(time);
        Ok(events
            .iter()
            .filter(|event| event.type_.as_deref() != Some("Normal"))
            .map(|event| {
                let object = event.involved_object.name.as_deref().unwrap_or_default();
                let reason = event.reason.as_deref().unwrap_or_default();
                format!("{object}: {reason}: {}", event.message.as_deref().unwrap_or_default())
            })
            .collect())
    }

    /// The error with what the cluster knows: warnings, and the last lines of whatever is not ready.
    pub(crate) fn explained(&self, error: anyhow::Error) -> anyhow::Error {
        if signals::asked_to_end() {
            return error;
        }
        let report =
            self.report().unwrap_or_else(|why| format!("  and the cluster gives no reason: {why:#}"));
        anyhow!("{error:#}\n{report}")
    }

    fn report(&self) -> Result<String> {
        let events = self.events()?;
        let mut text = String::from("  warnings in the namespace:\n");
        for event in &events[events.len().saturating_sub(EVENTS_MAX)..] {
            text += &format!("    {event}\n");
        }
        Ok(text + &self.unready()?.into_values().collect::<String>())
    }

    /// What is not ready, by its name: why, and its last words.
    pub(crate) fn unready(&self) -> Result<BTreeMap<String, String>> {
        let pods = self.pods("")?;
        let unready = pods.iter().filter(|pod| !is_ready(pod) && !is_done(pod));
        Ok(unready
            .map(|pod| {
                let words = daemon::tail(&self.last_words(pod), LOG_LINES);
                let name = pod.name_any();
                let report = format!("  {name} is not ready: {}\n{words}\n", state(pod));
                (name, report)
            })
            .collect())
    }

    /// The end of the pod's log; of the container before, when this one has said nothing yet.
    fn last_words(&self, pod: &Pod) -> String {
        let name = pod.name_any();
        let words = |previous| {
            let lines = LogParams { tail_lines: Some(LOG_LINES as i64), previous, ..LogParams::default() };
            let log = async { Ok(self.api::<Pod>().logs(&name, &lines).await?) };
            self.within(ANSWER_LIMIT, "logs", log).unwrap_or_default()
        };
        let now = words(false);
        if now.trim().is_empty() && restarts(pod) > 0 { words(true) } else { now }
    }

    /// Waits until no pod with these labels is terminating.
    pub(crate) fn none_ending(&self, labels: &str, limit: Duration) -> Result<()> {
        let waiting = async {
            let pods = self.api::<Pod>();
            let labelled = ListParams::default().labels(labels);
            while pods
                .list(&labelled)
                .await?
                .items
                .iter()
                .any(|pod| pod.metadata.deletion_timestamp.is_some())
            {
                tokio::time::sleep(Duration::from_millis(300)).await;
            }
            Ok(())
        };
        self.within(limit, "old pods gone", waiting).map_err(|error| self.explained(error))
    }

    /// Reads any object, such as `/apis/autoscaling/v2/...`.
    pub(crate) fn get(&self, path: &str) -> Result<Value> {
        let request = http_get(path)?;
        self.within(ANSWER_LIMIT, path, async { Ok(self.client.request::<Value>(request).await?) })
    }
}

fn http_get(path: &str) -> Result<http::Request<Vec<u8>>> {
    Ok(http::Request::get(path).body(Vec::new())?)
}

pub(crate) fn is_ready(pod: &Pod) -> bool {
    let conditions = pod.status.as_ref().and_then(|status| status.conditions.as_ref());
    conditions.is_some_and(|all| all.iter().any(|one| one.type_ == "Ready" && one.status == "True"))
}

fn is_done(pod: &Pod) -> bool {
    pod.status.as_ref().and_then(|status| status.phase.as_deref()) == Some("Succeeded")
}

/// How often its containers were started again.
pub(crate) fn restarts(pod: &Pod) -> i32 {
    let containers = pod.status.as_ref().and_then(|status| status.container_statuses.as_ref());
    containers.map_or(0, |all| all.iter().map(|one| one.restart_count).sum())
}

/// What the first container that waits is waiting for, with its message; else the pod's phase.
fn state(pod: &Pod) -> String {
    let Some(status) = &pod.status else { return "no state yet".to_owned() };
    let containers = status.container_statuses.iter().flatten();
    let waiting = containers.filter_map(|one| one.state.as_ref()?.waiting.as_ref()).next();
    match waiting {
        Some(waiting) => {
            let reason = waiting.reason.as_deref().unwrap_or_default();
            format!("{reason}: {}", waiting.message.as_deref().unwrap_or_default())
        }
        None => status.phase.clone().unwrap_or_default(),
    }
}

/// Fails with the lines that speak of a warning, such as those of Pod Security admission.
pub(crate) fn no_warnings(output: &str) -> Result<()> {
    let warnings: Vec<&str> =
        output.lines().filter(|line| line.starts_with("Warning") || line.starts_with("W1")).collect();
    if !warnings.is_empty() {
        bail!("the API server warns:\n{}", warnings.join("\n"));
    }
    Ok(())
}
