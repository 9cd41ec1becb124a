//! OpenTelemetry's standard variables for traces. Each has its effect, here or in the SDK, or it is refused: the SDK
//! itself would silently take another value, or none.

use std::collections::HashMap;
use std::ops::RangeInclusive;
use std::path::Path;
use std::time::Duration;

use opentelemetry::KeyValue;
use percent_encoding::percent_decode_str;
use reqwest::header::{HeaderName, HeaderValue};
use reqwest::{Certificate, Identity, Url};

/// An `OTEL_*` variable that cannot be used: one line with its name, its fault and what to do.
#[derive(thiserror::Error, Debug)]
#[error("{variable}: {fault}; for example {remedy}")]
pub struct BadVariable {
    variable: String,
    fault: String,
    remedy: String,
}

/// What the SDK does not read itself, or not as the specification says.
pub(super) struct Settings {
    pub endpoint: Url,
    /// Still encoded, as the exporter takes them.
    pub headers: HashMap<String, String>,
    pub timeout: Duration,
    /// The only authorities to trust, if any are given.
    pub authorities: Option<Vec<Certificate>>,
    pub identity: Option<Identity>,
    pub resource: Vec<KeyValue>,
    pub attributes_per_span: Option<u32>,
    pub attributes_per_event: Option<u32>,
    pub attributes_per_link: Option<u32>,
}

#[derive(Clone, Copy)]
enum Accepts {
    OneOf(&'static [&'static str]),
    Flag,
    Number((u64, u64)),
    Share,
    Propagators,
    /// Pairs whose values are percent-encoded.
    Attributes,
    Headers,
    Url,
    File,
    Text,
    /// No value at all, for this reason.
    Nothing(&'static str),
}

const MILLISECONDS: Accepts = Accepts::Number((1, 86_400_000));
/// The SDK reserves the queue's memory when it starts.
const SPANS: Accepts = Accepts::Number((1, 100_000));
const LIMIT: Accepts = Accepts::Number((0, u32::MAX as u64));
const UNSUPPORTED: &str = "not supported: the SDK has no such limit, and these spans hold no text";

pub(super) const SAMPLER: &str = "OTEL_TRACES_SAMPLER";
pub(super) const SAMPLER_ARG: &str = "OTEL_TRACES_SAMPLER_ARG";
/// A list. Only `tracecontext` has an effect: nothing here reads baggage.
const PROPAGATORS: &str = "OTEL_PROPAGATORS";
const RESOURCE: &str = "OTEL_RESOURCE_ATTRIBUTES";
const QUEUE: &str = "OTEL_BSP_MAX_QUEUE_SIZE";
const BATCH: &str = "OTEL_BSP_MAX_EXPORT_BATCH_SIZE";
const BATCH_TIMEOUT: &str = "OTEL_BSP_EXPORT_TIMEOUT";
const PER_SPAN: &str = "OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT";
const PER_EVENT: &str = "OTEL_EVENT_ATTRIBUTE_COUNT_LIMIT";
const PER_LINK: &str = "OTEL_LINK_ATTRIBUTE_COUNT_LIMIT";
const ATTRIBUTES: &str = "OTEL_ATTRIBUTE_COUNT_LIMIT";

/// Each variable, what it accepts, and a good value.
const STANDARD: [(&str, Accepts, &str); 22] = [
    ("OTEL_SDK_DISABLED", Accepts::Flag, "true"),
    ("OTEL_TRACES_EXPORTER", Accepts::OneOf(&["otlp", "none"]), "otlp"),
    (
        SAMPLER,
        Accepts::OneOf(&[
            "parentbased_traceidratio",
            "parentbased_always_on",
            "parentbased_always_off",
            "traceidratio",
            "always_on",
            "always_off",
        ]),
        "parentbased_traceidratio",
    ),
    (SAMPLER_ARG, Accepts::Share, "0.1"),
    (PROPAGATORS, Accepts::Propagators, "tracecontext,baggage"),
    ("OTEL_SERVICE_NAME", Accepts::Text, "chat-service"),
    (RESOURCE, Accepts::Attributes, "deployment.environment.name=production,team=a%20team"),
    ("OTEL_BSP_SCHEDULE_DELAY", MILLISECONDS, "5000"),
    (BATCH_TIMEOUT, MILLISECONDS, "30000"),
    (QUEUE, SPANS, "2048"),
    (BATCH, SPANS, "512"),
    (ATTRIBUTES, LIMIT, "128"),
    (PER_SPAN, LIMIT, "128"),
    (PER_EVENT, LIMIT, "128"),
    (PER_LINK, LIMIT, "128"),
    ("OTEL_SPAN_EVENT_COUNT_LIMIT", LIMIT, "128"),
    ("OTEL_SPAN_LINK_COUNT_LIMIT", LIMIT, "128"),
    ("OTEL_ATTRIBUTE_VALUE_LENGTH_LIMIT", Accepts::Nothing(UNSUPPORTED), ""),
    ("OTEL_SPAN_ATTRIBUTE_VALUE_LENGTH_LIMIT", Accepts::Nothing(UNSUPPORTED), ""),
    ("OTEL_LOG_LEVEL", Accepts::Nothing("not supported: RUST_LOG sets the level of all logs"), ""),
    ("OTEL_CONFIG_FILE", Accepts::Nothing("not supported: variables are the only configuration"), ""),
    ("OTEL_ENTITIES", Accepts::Nothing("not supported: OTEL_RESOURCE_ATTRIBUTES describes the service"), ""),
];

/// The same for the exporter's, each of which exists for all signals and, which wins, for traces.
const EXPORTER: [(&str, Accepts, &str); 9] = [
    ("ENDPOINT", Accepts::Url, "http://otel-collector:4318"),
    ("PROTOCOL", Accepts::OneOf(&["http/protobuf"]), "http/protobuf"),
    ("HEADERS", Accepts::Headers, "api-key=a%20key,x-tenant=chat"),
    ("COMPRESSION", Accepts::OneOf(&["gzip", "none"]), "gzip"),
    ("TIMEOUT", MILLISECONDS, "10000"),
    ("CERTIFICATE", Accepts::File, "/etc/otel/ca.crt"),
    ("CLIENT_CERTIFICATE", Accepts::File, "/etc/otel/tls.crt"),
    ("CLIENT_KEY", Accepts::File, "/etc/otel/tls.key"),
    // As the specification says it has no effect where the endpoint is a URL, whose scheme decides.
    ("INSECURE", Accepts::Flag, "false"),
];
const ALL_SIGNALS: &str = "OTEL_EXPORTER_OTLP_";
const TRACES: &str = "OTEL_EXPORTER_OTLP_TRACES_";

/// Variables of traces begin with one of these, so an unknown one is a mistake.
const OF_TRACES: [&str; 7] =
    [ALL_SIGNALS, "OTEL_BSP_", "OTEL_TRACES_", "OTEL_SPAN_", "OTEL_ATTRIBUTE_", "OTEL_EVENT_", "OTEL_LINK_"];
/// And these do not belong to traces.
const OF_OTHERS: [&str; 3] =
    ["OTEL_EXPORTER_OTLP_METRICS_", "OTEL_EXPORTER_OTLP_LOGS_", "OTEL_EXPORTER_OTLP_PROFILES_"];

/// A variable's value; one that is empty counts as unset.
pub(super) fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

/// Whether the trace of a caller is continued: always, unless other propagators are asked for.
pub(super) fn propagates() -> bool {
    variable(PROPAGATORS).is_none_or(|names| names.split(',').any(|name| name.trim() == "tracecontext"))
}

/// Nothing where no traces are exported: then other variables do not matter, which some platforms set for every process.
pub(super) fn settings() -> Result<Option<Settings>, BadVariable> {
    let is = |name, value: &str| variable(name).is_some_and(|found| found.eq_ignore_ascii_case(value));
    if of_exporter("ENDPOINT").is_none()
        || is("OTEL_SDK_DISABLED", "true")
        || is("OTEL_TRACES_EXPORTER", "none")
    {
        return Ok(None);
    }
    check_all()?;
    let endpoint = endpoint()?;
    let (authorities, identity) = (authorities()?, identity()?);
    Ok(Some(Settings {
        endpoint,
        headers: of_exporter("HEADERS").map(|(_, headers)| pairs(&headers)).unwrap_or_default(),
        timeout: timeout(),
        authorities,
        identity,
        resource: variable(RESOURCE).map(|text| attributes(&text)).unwrap_or_default(),
        attributes_per_span: number(PER_SPAN).or_else(|| number(ATTRIBUTES)),
        attributes_per_event: number(PER_EVENT),
        attributes_per_link: number(PER_LINK),
    }))
}

fn bad(variable: &str, fault: impl Into<String>, example: &str) -> BadVariable {
    let remedy = format!("{variable}={example}");
    BadVariable { variable: variable.to_owned(), fault: fault.into(), remedy }
}

/// Names the client's certificate, whose key a client cannot be made of.
pub(super) fn bad_identity(error: &reqwest::Error) -> BadVariable {
    let cause = std::error::Error::source(error).map(ToString::to_string).unwrap_or_default();
    let (name, _) = of_exporter("CLIENT_CERTIFICATE").unwrap_or_default();
    bad(&name, format!("the certificates cannot be used: {error}: {cause}"), "/etc/otel/tls.crt")
}

fn check_all() -> Result<(), BadVariable> {
    for (name, accepts, example) in STANDARD {
        check(name, accepts, example)?;
    }
    for (end, accepts, example) in EXPORTER {
        for begin in [ALL_SIGNALS, TRACES] {
            check(&format!("{begin}{end}"), accepts, example)?;
        }
    }
    if let (Some(batch), queue) = (number::<u64>(BATCH), number(QUEUE).unwrap_or(2048))
        && batch > queue
    {
        return Err(bad(BATCH, format!("{batch} is more than {QUEUE}, which is {queue}"), "512"));
    }
    let mut names = std::env::vars_os().filter_map(|(name, _)| name.into_string().ok());
    match names.find(|name| variable(name).is_some() && !is_known(name)) {
        Some(name) => {
            let fault = "not a variable that has an effect here".to_owned();
            Err(BadVariable { variable: name, fault, remedy: "leave it unset".to_owned() })
        }
        None => Ok(()),
    }
}

/// Also true for what has nothing to do with traces.
fn is_known(name: &str) -> bool {
    let begins = |parts: &[&str]| parts.iter().any(|part| name.starts_with(part));
    if !begins(&OF_TRACES) || begins(&OF_OTHERS) || STANDARD.iter().any(|(known, ..)| *known == name) {
        return true;
    }
    let end = name.strip_prefix(TRACES).or_else(|| name.strip_prefix(ALL_SIGNALS));
    EXPORTER.iter().any(|(known, ..)| end == Some(known))
}

/// Values that may be secret are not part of the error.
fn check(name: &str, accepts: Accepts, example: &str) -> Result<(), BadVariable> {
    let Some(value) = variable(name) else { return Ok(()) };
    let fault = match accepts {
        Accepts::OneOf(known) if !known.contains(&&*value) => {
            format!("'{value}' is none of {}", known.join(", "))
        }
        Accepts::Flag if !["true", "false"].iter().any(|flag| value.eq_ignore_ascii_case(flag)) => {
            format!("'{value}' is neither true nor false")
        }
        Accepts::Number((least, most)) if !in_range(&value, least..=most) => {
            format!("'{value}' is not a whole number from {least} to {most}")
        }
        Accepts::Share if !value.parse().is_ok_and(|share: f64| (0.0..=1.0).contains(&share)) => {
            format!("'{value}' is not a share from 0 to 1")
        }
        Accepts::Propagators if !value.split(',').all(is_propagator) => {
            format!("'{value}' names an unknown propagator")
        }
        Accepts::Attributes if !entries(&value).all(|entry| attribute(entry).is_some()) => {
            "not a list of NAME=VALUE, in which a comma, a blank or % is percent-encoded".to_owned()
        }
        Accepts::Headers if !entries(&value).all(is_header) => {
            "not a list of NAME=VALUE, in which a comma, a blank or % is percent-encoded".to_owned()
        }
        Accepts::Url if !is_web_url(&value) => {
            "not a URL that begins with http:// or https:// and has no fragment".to_owned()
        }
        Accepts::Nothing(reason) => {
            let remedy = "leave it unset".to_owned();
            return Err(BadVariable { variable: name.to_owned(), fault: reason.to_owned(), remedy });
        }
        _ => return Ok(()),
    };
    Err(bad(name, fault, example))
}

fn in_range(value: &str, range: RangeInclusive<u64>) -> bool {
    value.parse().is_ok_and(|number| range.contains(&number))
}

fn is_propagator(name: &str) -> bool {
    ["tracecontext", "baggage", "none"].contains(&name.trim())
}

fn is_web_url(text: &str) -> bool {
    Url::parse(text).is_ok_and(|url| matches!(url.scheme(), "http" | "https") && url.fragment().is_none())
}

/// The entries of a list; a comma may end it.
fn entries(list: &str) -> impl Iterator<Item = &str> {
    list.trim().split_terminator(',').map(str::trim)
}

fn attribute(entry: &str) -> Option<(String, String)> {
    let (name, value) = entry.split_once('=')?;
    Some((decoded(name.trim()).filter(|name| !name.is_empty())?, decoded(value.trim())?))
}

fn is_header(entry: &str) -> bool {
    entry.split_once('=').is_some_and(|(name, value)| {
        let value = decoded(value.trim()).filter(|value| !value.is_empty());
        HeaderName::from_bytes(name.trim().as_bytes()).is_ok()
            && value.is_some_and(|value| HeaderValue::from_str(&value).is_ok())
    })
}

/// `None` where the encoding is wrong.
fn decoded(text: &str) -> Option<String> {
    let encoded =
        |part: &str| part.get(..2).is_some_and(|digits| digits.chars().all(|c| c.is_ascii_hexdigit()));
    if !text.split('%').skip(1).all(encoded) {
        return None;
    }
    percent_decode_str(text).decode_utf8().ok().map(Into::into)
}

fn attributes(list: &str) -> Vec<KeyValue> {
    entries(list).filter_map(attribute).map(|(name, value)| KeyValue::new(name, value)).collect()
}

fn pairs(list: &str) -> HashMap<String, String> {
    let pair = |(name, value): (&str, &str)| (name.trim().to_owned(), value.trim().to_owned());
    entries(list).filter_map(|entry| entry.split_once('=')).map(pair).collect()
}

fn number<N: std::str::FromStr>(name: &str) -> Option<N> {
    variable(name)?.parse().ok()
}

/// The exporter's variable, for traces or else for all signals, with its name.
fn of_exporter(end: &str) -> Option<(String, String)> {
    [TRACES, ALL_SIGNALS].iter().find_map(|begin| {
        let name = format!("{begin}{end}");
        let value = variable(&name)?;
        Some((name, value))
    })
}

/// The endpoint for all signals is where their paths begin.
fn endpoint() -> Result<Url, BadVariable> {
    let (name, value) = of_exporter("ENDPOINT").unwrap_or_default();
    let mut url = Url::parse(&value).map_err(|_| bad(&name, "not a URL", "http://otel-collector:4318"))?;
    if !name.starts_with(TRACES) {
        url.set_path(&format!("{}/v1/traces", url.path().trim_end_matches('/')));
    }
    if let Some((insecure, value)) = of_exporter("INSECURE")
        && value.eq_ignore_ascii_case("true")
        && url.scheme() == "https"
    {
        return Err(bad(&insecure, format!("{name} begins with https://, which is encrypted"), "false"));
    }
    Ok(url)
}

/// For the SDK's batches there is a limit of their own, which the SDK ignores.
fn timeout() -> Duration {
    let of_request = of_exporter("TIMEOUT").and_then(|(_, value)| value.parse().ok()).unwrap_or(10_000);
    Duration::from_millis(number(BATCH_TIMEOUT).unwrap_or(30_000).min(of_request))
}

fn read(name: &str, path: &str) -> Result<Vec<u8>, BadVariable> {
    let example = if name.ends_with("KEY") { "/etc/otel/tls.key" } else { "/etc/otel/tls.crt" };
    std::fs::read(Path::new(path))
        .map_err(|error| bad(name, format!("'{path}' cannot be read: {error}"), example))
}

fn authorities() -> Result<Option<Vec<Certificate>>, BadVariable> {
    let Some((name, path)) = of_exporter("CERTIFICATE") else { return Ok(None) };
    let found = Certificate::from_pem_bundle(&read(&name, &path)?).ok().filter(|found| !found.is_empty());
    let none = || bad(&name, format!("'{path}' has no certificates in PEM"), "/etc/otel/ca.crt");
    found.map(Some).ok_or_else(none)
}

fn identity() -> Result<Option<Identity>, BadVariable> {
    let alone = |name: &str, missing: &str, example| {
        let begin = if name.starts_with(TRACES) { TRACES } else { ALL_SIGNALS };
        let missing = format!("{begin}{missing}");
        let fault = format!("it needs {missing}, too");
        BadVariable { variable: name.to_owned(), fault, remedy: format!("{missing}={example}") }
    };
    let ((certificate, certificate_path), (key, key_path)) =
        match (of_exporter("CLIENT_CERTIFICATE"), of_exporter("CLIENT_KEY")) {
            (Some(certificate), Some(key)) => (certificate, key),
            (Some((name, _)), None) => return Err(alone(&name, "CLIENT_KEY", "/etc/otel/tls.key")),
            (None, Some((name, _))) => return Err(alone(&name, "CLIENT_CERTIFICATE", "/etc/otel/tls.crt")),
            (None, None) => return Ok(None),
        };
    let mut pem = read(&key, &key_path)?;
    pem.push(b'\n');
    pem.extend(read(&certificate, &certificate_path)?);
    let fault = format!("'{certificate_path}' and '{key_path}' have no certificate and key in PEM");
    Identity::from_pem(&pem).map(Some).map_err(|_| bad(&certificate, fault, "/etc/otel/tls.crt"))
}
