//! `chat-service create-secret`: random passwords and keys, created once and inside the cluster. A chart that rendered
//! them would put them into every manifest, with new values in each rendering.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use rand::distr::{Alphanumeric, SampleString as _};
use reqwest::blocking::{Client, RequestBuilder};
use reqwest::{Certificate, StatusCode};
use serde_json::{Map, Value, json};

/// How long the API server may be unavailable, or not know the permissions that this pod was given a moment ago.
const PATIENCE: Duration = Duration::from_secs(60);
const RETRY: Duration = Duration::from_secs(1);
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);

#[derive(clap::Args, Clone, Debug)]
pub struct Args {
    /// The Secret's name, in the pod's namespace
    #[arg(long)]
    name: String,
    /// A key and the length of the random value that it gets where it is missing; repeatable
    #[arg(long = "key", required = true, value_name = "KEY=CHARACTERS")]
    keys: Vec<Key>,
    /// A label for a Secret that is created; repeatable
    #[arg(long = "label", value_name = "NAME=VALUE", value_parser = label)]
    labels: Vec<(String, String)>,
    /// The folder with the service account's token, its authority and the namespace
    #[arg(long, default_value = "/var/run/secrets/kubernetes.io/serviceaccount", value_name = "DIR")]
    service_account: PathBuf,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Key {
    name: String,
    characters: usize,
}

impl FromStr for Key {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        // 16 alphanumeric characters are 95 bits; 1024 are more than enough for any use.
        const CHARACTERS: std::ops::RangeInclusive<usize> = 16..=1024;
        let example = "for example password=32";
        let (name, characters) = text.split_once('=').ok_or_else(|| format!("it has no '='; {example}"))?;
        let allowed = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        if name.is_empty() || !name.chars().all(allowed) {
            return Err(format!("a key is made of letters, digits, '-', '_' and '.'; {example}"));
        }
        let characters = characters.parse().ok().filter(|count| CHARACTERS.contains(count));
        let characters = characters.ok_or_else(|| format!("the length is 16 to 1024; {example}"))?;
        Ok(Self { name: name.to_owned(), characters })
    }
}

fn label(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once('=').ok_or("it has no '='; for example app=chat")?;
    Ok((name.to_owned(), value.to_owned()))
}

/// The outcome of one attempt.
enum Attempt {
    Done(String),
    /// A retry may help: the API server is unavailable, or another client wrote at the same time.
    Again(anyhow::Error),
}

/// Creates the Secret, or adds the keys that it lacks. Existing values never change, and no value is printed.
pub fn run(args: &Args) -> Result<()> {
    let api = Api::of_the_pod(&args.service_account)?;
    let deadline = Instant::now() + PATIENCE;
    let mut reported = String::new();
    loop {
        let error = match api.attempt(args)? {
            Attempt::Done(outcome) => {
                println!("{outcome}");
                return Ok(());
            }
            Attempt::Again(error) => error,
        };
        if Instant::now() + RETRY >= deadline {
            return Err(error.context(format!("given up after {} s", PATIENCE.as_secs())));
        }
        let news = format!("{error:#}");
        if news != reported {
            eprintln!("{news}; trying again for {} s", (deadline - Instant::now()).as_secs());
            reported = news;
        }
        thread::sleep(RETRY);
    }
}

/// The Kubernetes API as a pod reaches it.
struct Api {
    client: Client,
    /// `https://host:port/api/v1/namespaces/NAMESPACE/secrets`
    secrets: String,
    namespace: String,
    token: String,
}

impl Api {
    fn of_the_pod(service_account: &Path) -> Result<Self> {
        const FIX: &str =
            "this runs in a pod with a service account; elsewhere use `kubectl create secret generic`";
        let variable = |name: &str| {
            std::env::var(name)
                .ok()
                .filter(|value| !value.is_empty())
                .with_context(|| format!("{name} is not set: {FIX}"))
        };
        let host = variable("KUBERNETES_SERVICE_HOST")?;
        let port = variable("KUBERNETES_SERVICE_PORT")?;
        let host = match host.parse() {
            Ok(IpAddr::V6(address)) => format!("[{address}]"),
            _ => host,
        };
        let file = |name: &str| {
            let path = service_account.join(name);
            std::fs::read_to_string(&path)
                .with_context(|| format!("{}: {FIX}, and automountServiceAccountToken: true", path.display()))
        };
        let namespace = file("namespace")?.trim().to_owned();
        let authorities = Certificate::from_pem_bundle(file("ca.crt")?.as_bytes()).ok();
        let authorities = authorities.filter(|found| !found.is_empty()).with_context(|| {
            format!("{}: no certificates in PEM: {FIX}", service_account.join("ca.crt").display())
        })?;
        let client = Client::builder().tls_certs_only(authorities).timeout(REQUEST_TIMEOUT).no_proxy();
        let client = client.build()?;
        let secrets = format!("https://{host}:{port}/api/v1/namespaces/{namespace}/secrets");
        Ok(Self { client, secrets, namespace, token: file("token")?.trim().to_owned() })
    }

    fn attempt(&self, args: &Args) -> Result<Attempt> {
        let shown = format!("Secret {}/{}", self.namespace, args.name);
        let found = match self.ask(self.client.get(format!("{}/{}", self.secrets, args.name)))? {
            Ok((StatusCode::NOT_FOUND, _)) => None,
            Ok((StatusCode::OK, secret)) => Some(secret),
            Ok((status, answer)) => return refused(&format!("read {shown}"), status, &answer),
            Err(unavailable) => return Ok(Attempt::Again(unavailable)),
        };
        let missing = missing(&args.keys, found.as_ref());
        if missing.is_empty() {
            return Ok(Attempt::Done(format!("{shown} has all of {}: nothing to do", names(&args.keys))));
        }
        let (request, verb) = match &found {
            None => (self.client.post(&self.secrets).json(&creation(args, &missing)), "created"),
            Some(secret) => {
                let url = format!("{}/{}", self.secrets, args.name);
                let patch = addition(secret, &missing);
                let request = self.client.patch(url).header("content-type", "application/merge-patch+json");
                (request.body(patch.to_string()), "kept what was there, added to")
            }
        };
        match self.ask(request)? {
            Ok((StatusCode::OK | StatusCode::CREATED, _)) => {
                Ok(Attempt::Done(format!("{verb} {shown}: {}", names(&missing))))
            }
            // Another client was faster: the next attempt reads what it wrote.
            Ok((StatusCode::CONFLICT, answer)) => {
                Ok(Attempt::Again(anyhow::anyhow!("{shown}: {}", message(&answer))))
            }
            Ok((status, answer)) => refused(&format!("write {shown}"), status, &answer),
            Err(unavailable) => Ok(Attempt::Again(unavailable)),
        }
    }

    /// An answer, or in the inner error why there was none.
    fn ask(&self, request: RequestBuilder) -> Result<Result<(StatusCode, Value), anyhow::Error>> {
        let unavailable = |error: reqwest::Error| {
            anyhow::Error::new(error.without_url())
                .context(format!("the Kubernetes API does not answer at {}", self.secrets))
        };
        let response = match request.bearer_auth(&self.token).send() {
            Ok(response) => response,
            Err(error) if error.is_builder() => return Err(unavailable(error)),
            Err(error) => return Ok(Err(unavailable(error))),
        };
        let status = response.status();
        Ok(response
            .text()
            .map_err(unavailable)
            .map(|body| (status, serde_json::from_str(&body).unwrap_or_default())))
    }
}

/// A refusal that may be temporary leads to a retry: an API server that starts has no users yet, and new permissions take
/// a moment to reach it.
fn refused(what: &str, status: StatusCode, answer: &Value) -> Result<Attempt> {
    let error = anyhow::anyhow!("cannot {what}: {status}: {}", message(answer));
    match status {
        StatusCode::UNAUTHORIZED => Ok(Attempt::Again(error)),
        StatusCode::FORBIDDEN => Ok(Attempt::Again(
            error.context("the service account needs a Role with get, create and patch on secrets"),
        )),
        StatusCode::TOO_MANY_REQUESTS => Ok(Attempt::Again(error)),
        _ if status.is_server_error() => Ok(Attempt::Again(error)),
        _ => bail!(error),
    }
}

/// The message of a Kubernetes `Status`. It contains names and fields, never values.
fn message(answer: &Value) -> &str {
    answer["message"].as_str().unwrap_or("no reason given")
}

fn missing(keys: &[Key], secret: Option<&Value>) -> Vec<Key> {
    let there = |key: &&Key| secret.is_some_and(|secret| secret["data"].get(&key.name).is_some());
    keys.iter().filter(|key| !there(key)).cloned().collect()
}

fn creation(args: &Args, missing: &[Key]) -> Value {
    let labels: BTreeMap<_, _> = args.labels.iter().cloned().collect();
    json!({
        "apiVersion": "v1",
        "kind": "Secret",
        "type": "Opaque",
        "metadata": {"name": args.name, "labels": labels},
        "stringData": random_values(missing),
    })
}

/// A merge patch. The version makes it fail if another client has written since the read.
fn addition(secret: &Value, missing: &[Key]) -> Value {
    json!({
        "metadata": {"resourceVersion": secret["metadata"]["resourceVersion"]},
        "stringData": random_values(missing),
    })
}

fn random_values(keys: &[Key]) -> Map<String, Value> {
    let value = |key: &Key| Alphanumeric.sample_string(&mut rand::rng(), key.characters);
    keys.iter().map(|key| (key.name.clone(), value(key).into())).collect()
}

fn names(keys: &[Key]) -> String {
    keys.iter().map(|key| key.name.as_str()).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys(texts: &[&str]) -> Vec<Key> {
        texts.iter().map(|text| text.parse().expect("a key")).collect()
    }

    #[test]
    fn a_key_that_is_there_is_never_written_not_even_an_empty_one() {
        let wanted = keys(&["secret-key=48", "postgres-password=32", "redis-password=32"]);
        let secret =
            json!({"metadata": {"resourceVersion": "7"}, "data": {"postgres-password": "", "other": "eA=="}});
        let missing = missing(&wanted, Some(&secret));
        assert_eq!(names(&missing), "secret-key, redis-password");
        let patch = addition(&secret, &missing);
        assert_eq!(patch["metadata"], json!({"resourceVersion": "7"}));
        let written: Vec<_> = patch["stringData"].as_object().expect("an object").keys().collect();
        assert_eq!(written, ["redis-password", "secret-key"]);
    }

    #[test]
    fn a_secret_without_data_lacks_everything() {
        let wanted = keys(&["a=16", "b=16"]);
        assert_eq!(missing(&wanted, Some(&json!({"metadata": {}}))), wanted);
        assert_eq!(missing(&wanted, None), wanted);
    }

    #[test]
    fn values_have_the_length_asked_for_need_no_quoting_and_never_repeat() {
        let wanted = keys(&["a=48", "b=48"]);
        let first = random_values(&wanted);
        let second = random_values(&wanted);
        let all: std::collections::BTreeSet<_> =
            first.values().chain(second.values()).map(Value::to_string).collect();
        assert_eq!(all.len(), 4);
        for value in first.values().filter_map(Value::as_str) {
            assert!(value.len() == 48 && value.chars().all(|c| c.is_ascii_alphanumeric()), "{value}");
        }
    }

    #[test]
    fn a_key_that_cannot_be_used_is_refused_with_an_example() {
        for text in ["password", "=32", "pass word=32", "password=15", "password=1025", "password=long"] {
            let error = text.parse::<Key>().expect_err(text);
            assert!(error.contains("for example password=32"), "{error}");
        }
    }

    #[test]
    fn only_a_refusal_that_may_pass_is_tried_again() {
        let answer = json!({"message": "it says why"});
        for (status, again) in
            [(401, true), (403, true), (429, true), (503, true), (404, false), (422, false)]
        {
            let status = StatusCode::from_u16(status).expect("a status");
            let outcome = refused("write", status, &answer);
            assert_eq!(matches!(outcome, Ok(Attempt::Again(_))), again, "{status}");
        }
    }
}
