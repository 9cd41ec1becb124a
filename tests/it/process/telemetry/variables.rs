//! OpenTelemetry's standard variables: each of them has its effect, or stops the start.

use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig, ServerConnection, StreamOwned};
use tests::Scratch;
use tests::servers::{daemon, programs};

use super::*;

const EX_CONFIG: i32 = 78;

/// Values that cannot be used, and the example in the line that says so.
const REFUSED: &[(&str, &str, &str)] = &[
    // Zero keeps a core busy, or drops every span, or fails every export.
    ("OTEL_BSP_SCHEDULE_DELAY", "0", "OTEL_BSP_SCHEDULE_DELAY=5000"),
    ("OTEL_BSP_SCHEDULE_DELAY", "-1", "OTEL_BSP_SCHEDULE_DELAY=5000"),
    ("OTEL_BSP_MAX_QUEUE_SIZE", "0", "OTEL_BSP_MAX_QUEUE_SIZE=2048"),
    ("OTEL_BSP_MAX_QUEUE_SIZE", "99999999999", "OTEL_BSP_MAX_QUEUE_SIZE=2048"),
    ("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "0", "OTEL_BSP_MAX_EXPORT_BATCH_SIZE=512"),
    ("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "2049", "OTEL_BSP_MAX_EXPORT_BATCH_SIZE=512"),
    ("OTEL_BSP_EXPORT_TIMEOUT", "0", "OTEL_BSP_EXPORT_TIMEOUT=30000"),
    ("OTEL_EXPORTER_OTLP_TIMEOUT", "0", "OTEL_EXPORTER_OTLP_TIMEOUT=10000"),
    ("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "10s", "OTEL_EXPORTER_OTLP_TRACES_TIMEOUT=10000"),
    ("OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT", "4294967296", "OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT=128"),
    ("OTEL_ATTRIBUTE_COUNT_LIMIT", "-1", "OTEL_ATTRIBUTE_COUNT_LIMIT=128"),
    ("OTEL_EVENT_ATTRIBUTE_COUNT_LIMIT", "many", "OTEL_EVENT_ATTRIBUTE_COUNT_LIMIT=128"),
    ("OTEL_LINK_ATTRIBUTE_COUNT_LIMIT", "1.5", "OTEL_LINK_ATTRIBUTE_COUNT_LIMIT=128"),
    // What would be skipped.
    ("OTEL_EXPORTER_OTLP_HEADERS", "s3cret", "OTEL_EXPORTER_OTLP_HEADERS="),
    ("OTEL_EXPORTER_OTLP_HEADERS", "a=1,=s3cret", "OTEL_EXPORTER_OTLP_HEADERS="),
    ("OTEL_EXPORTER_OTLP_HEADERS", "a b=s3cret", "OTEL_EXPORTER_OTLP_HEADERS="),
    ("OTEL_EXPORTER_OTLP_HEADERS", "a=", "OTEL_EXPORTER_OTLP_HEADERS="),
    ("OTEL_EXPORTER_OTLP_HEADERS", "a=s3cret%0A", "OTEL_EXPORTER_OTLP_HEADERS="),
    ("OTEL_EXPORTER_OTLP_TRACES_HEADERS", "a=s3cret%2", "OTEL_EXPORTER_OTLP_TRACES_HEADERS="),
    ("OTEL_EXPORTER_OTLP_TRACES_HEADERS", "a=s3cret%zz", "OTEL_EXPORTER_OTLP_TRACES_HEADERS="),
    ("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name", "OTEL_RESOURCE_ATTRIBUTES="),
    ("OTEL_RESOURCE_ATTRIBUTES", "share=100%", "OTEL_RESOURCE_ATTRIBUTES="),
    ("OTEL_RESOURCE_ATTRIBUTES", "=a", "OTEL_RESOURCE_ATTRIBUTES="),
    // What the exporter cannot do, or does only with another value.
    ("OTEL_EXPORTER_OTLP_COMPRESSION", "zstd", "OTEL_EXPORTER_OTLP_COMPRESSION=gzip"),
    ("OTEL_EXPORTER_OTLP_TRACES_COMPRESSION", "best", "OTEL_EXPORTER_OTLP_TRACES_COMPRESSION=gzip"),
    ("OTEL_EXPORTER_OTLP_INSECURE", "yes", "OTEL_EXPORTER_OTLP_INSECURE=false"),
    ("OTEL_EXPORTER_OTLP_CERTIFICATE", "/nowhere.pem", "OTEL_EXPORTER_OTLP_CERTIFICATE=/"),
    ("OTEL_EXPORTER_OTLP_TRACES_CERTIFICATE", "/dev/null", "OTEL_EXPORTER_OTLP_TRACES_CERTIFICATE=/"),
    ("OTEL_EXPORTER_OTLP_CLIENT_KEY", "/dev/null", "OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE=/"),
    ("OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE", "/dev/null", "OTEL_EXPORTER_OTLP_CLIENT_KEY=/"),
    ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4318#there", "OTEL_EXPORTER_OTLP_ENDPOINT=http://"),
    ("OTEL_SPAN_ATTRIBUTE_VALUE_LENGTH_LIMIT", "99", "leave it unset"),
    ("OTEL_ATTRIBUTE_VALUE_LENGTH_LIMIT", "99", "leave it unset"),
    ("OTEL_CONFIG_FILE", "otel.yaml", "leave it unset"),
    ("OTEL_LOG_LEVEL", "debug", "RUST_LOG"),
    // No standard variables, but such as somebody might expect an effect on traces from.
    ("OTEL_EXPORTER_OTLP_TRACE_ENDPOINT", "http://127.0.0.1:4318", "leave it unset"),
    ("OTEL_TRACES_SAMPLERS", "always_on", "leave it unset"),
    ("OTEL_BSP_MAX_CONCURRENT_EXPORTS", "2", "leave it unset"),
];

#[test]
fn a_variable_that_would_have_no_effect_or_a_bad_one_stops_the_start() -> Result<()> {
    let closed = format!("postgres://chat@127.0.0.1:{}/chat", closed_port()?);
    let start = Start::bare().env("DATABASE_URL", &closed).args(&["migrate"]);
    let traced = start.clone().env("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4318");
    let mut faults = Vec::new();
    for (variable, value, example) in REFUSED {
        let ended = traced.clone().env(variable, value).run()?;
        let one_line = ended.stderr.lines().count() == 1 && ended.stdout.is_empty();
        let named = ended.stderr.contains("OTEL_") && ended.stderr.contains(&**variable);
        let fixed = ended.stderr.contains("; for example ") && ended.stderr.contains(example);
        let hidden = !ended.said().contains("s3cret");
        if ended.code != EX_CONFIG || !one_line || !named || !fixed || !hidden {
            faults.push(format!("{variable}={value}: exit code {}: {}", ended.code, ended.said()));
        }
    }
    ensure!(faults.is_empty(), "{}", faults.join("\n"));
    // Encryption that the URL does not have, or cannot do without.
    let insecure = start.env("OTEL_EXPORTER_OTLP_ENDPOINT", "https://127.0.0.1:4318");
    let ended = insecure.env("OTEL_EXPORTER_OTLP_INSECURE", "true").run()?;
    ensure!(ended.code == EX_CONFIG && ended.stderr.contains("https://"), "{}", ended.said());
    // Variables of metrics, of logs and of other languages' SDKs have nothing to do with traces.
    let others = traced
        .env("OTEL_METRICS_EXPORTER", "none")
        .env("OTEL_LOGS_EXPORTER", "otlp")
        .env("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT", "collector")
        .env("OTEL_EXPORTER_OTLP_LOGS_HEADERS", "none")
        .env("OTEL_BLRP_MAX_QUEUE_SIZE", "0")
        .env("OTEL_METRIC_EXPORT_INTERVAL", "0")
        .env("OTEL_LOGRECORD_ATTRIBUTE_COUNT_LIMIT", "0")
        .env("OTEL_JAVAAGENT_ENABLED", "perhaps");
    let ended = others.run()?;
    ensure!(ended.code == 1 && !ended.said().contains("OTEL_"), "{}: {}", ended.code, ended.said());
    Ok(())
}

#[test]
fn exports_are_compressed_and_have_their_headers() -> Result<()> {
    let database = Database::create()?;
    let collector = Collector::start()?;
    let start = exporting(&database, &format!("{}/base/?token=a", collector.url))
        .env("OTEL_EXPORTER_OTLP_COMPRESSION", "gzip")
        // Empty, so it is as good as unset.
        .env("OTEL_EXPORTER_OTLP_TRACES_HEADERS", "")
        .env("OTEL_EXPORTER_OTLP_HEADERS", "x-first=a%20b, x-second=c=d,");
    let service = start.ready()?;
    service.me("nonsense")?.expect(401)?;
    let export = collector.receives(&[&[0x1f, 0x8b]])?;
    for line in ["content-encoding: gzip\r\n", "x-first: a b\r\n", "x-second: c=d\r\n"] {
        ensure!(export.head.contains(line), "no {line:?}: {}", export.head);
    }
    ensure!(export.path == "/base/v1/traces?token=a", "{}", export.path);
    Ok(())
}

#[test]
fn resource_attributes_are_decoded_and_may_name_the_service() -> Result<()> {
    let database = Database::create()?;
    let collector = Collector::start()?;
    let start = exporting(&database, &collector.url)
        .env("OTEL_RESOURCE_ATTRIBUTES", "service.name=chat-of-theirs, team=caf%C3%A9%2C%20bar ,");
    let service = start.clone().ready()?;
    service.me("nonsense")?.expect(401)?;
    let export = collector.receives(&["chat-of-theirs".as_bytes(), "café, bar".as_bytes()])?;
    ensure!(!contains(&export.body, b"%2C"));
    let service = start.env("OTEL_SERVICE_NAME", "chat-of-mine").ready()?;
    service.me("nonsense")?.expect(401)?;
    collector.receives(&[b"chat-of-mine", "café, bar".as_bytes()])?;
    Ok(())
}

#[test]
fn the_general_limit_of_attributes_counts_where_spans_have_none_of_their_own() -> Result<()> {
    let database = Database::create()?;
    let collector = Collector::start()?;
    let start = exporting(&database, &collector.url).env("OTEL_ATTRIBUTE_COUNT_LIMIT", "1");
    let service = start.clone().ready()?;
    service.me("nonsense")?.expect(401)?;
    let export = collector.receives(&[b"GET /me"])?;
    ensure!(!contains(&export.body, b"url.scheme"), "more than one attribute");
    let service = start.env("OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT", "128").ready()?;
    service.me("nonsense")?.expect(401)?;
    collector.receives(&[b"GET /me", b"url.scheme"])?;
    Ok(())
}

/// A collector that takes a connection and never answers.
#[test]
fn the_shorter_of_both_timeouts_ends_an_export() -> Result<()> {
    let silent = TcpListener::bind("127.0.0.1:0")?;
    let url = format!("http://{}", silent.local_addr()?);
    let database = Database::create()?;
    for timeout in ["OTEL_BSP_EXPORT_TIMEOUT", "OTEL_EXPORTER_OTLP_TRACES_TIMEOUT"] {
        let service = exporting(&database, &url).env(timeout, "200").ready()?;
        service.me("nonsense")?.expect(401)?;
        // Well below the default, which is ten seconds.
        within(Duration::from_secs(5), timeout, || {
            eventually("a failure", || spans(&service, "failed").ok().filter(|failed| *failed > 0.0))
        })?;
    }
    Ok(())
}

/// A certificate for the loopback address that is its own authority, in files.
fn certificate(folder: &Path, name: &str) -> Result<[String; 2]> {
    let openssl = programs::in_path("openssl").context("openssl makes the certificates: install it")?;
    let [certificate, key] =
        ["crt", "key"].map(|end| folder.join(format!("{name}.{end}")).to_string_lossy().into_owned());
    let mut command = Command::new(openssl);
    command.args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]);
    command.args(["-days", "2", "-subj", "/CN=a test", "-addext", "subjectAltName=IP:127.0.0.1"]);
    command.args(["-addext", "basicConstraints=critical,CA:FALSE", "-out", &certificate, "-keyout", &key]);
    daemon::run_ok(command, Duration::from_secs(30))?;
    Ok([certificate, key])
}

/// A collector behind TLS that wants this certificate from its clients.
fn collector_with_tls([certificate, key]: &[String; 2], client: &str) -> Result<Collector> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(client)?)?;
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let verifier =
        WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider)).build()?;
    let config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_client_cert_verifier(verifier)
        .with_single_cert(
            vec![CertificateDer::from_pem_file(certificate)?],
            PrivateKeyDer::from_pem_file(key)?,
        )?;
    let config = Arc::new(config);
    Collector::with("https", move |stream| {
        Ok(StreamOwned::new(ServerConnection::new(Arc::clone(&config))?, stream))
    })
}

#[test]
fn a_collector_behind_tls_is_verified_and_gets_the_clients_certificate() -> Result<()> {
    let scratch = Scratch::new("otel-tls")?;
    let server = certificate(scratch.path(), "server")?;
    let client = certificate(scratch.path(), "client")?;
    let collector = collector_with_tls(&server, &client[0])?;
    let database = Database::create()?;
    let certified = exporting(&database, &collector.url)
        .env("OTEL_EXPORTER_OTLP_TRACES_CERTIFICATE", &server[0])
        .env("OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE", &client[0])
        .env("OTEL_EXPORTER_OTLP_CLIENT_KEY", &client[1]);
    let service = certified.ready()?;
    service.me("nonsense")?.expect(401)?;
    collector.receives(&[b"GET /me"])?;
    // Without the authority, and without the client's certificate, nothing is exported.
    for variable in ["OTEL_EXPORTER_OTLP_TRACES_", "OTEL_EXPORTER_OTLP_CLIENT_"] {
        let mut start = certified.clone();
        for end in ["CERTIFICATE", "KEY"] {
            start = start.unset(&format!("{variable}{end}"));
        }
        let service = start.env("OTEL_EXPORTER_OTLP_TIMEOUT", "1000").ready()?;
        service.me("nonsense")?.expect(401)?;
        eventually("a failure", || spans(&service, "failed").ok().filter(|failed| *failed > 0.0))?;
    }
    // A certificate that is not the key's.
    let ended = certified.env("OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE", &server[0]).run()?;
    ensure!(ended.code == EX_CONFIG, "{}: {}", ended.code, ended.said());
    ensure!(ended.stderr.contains("OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE: "), "{}", ended.stderr);
    Ok(())
}
