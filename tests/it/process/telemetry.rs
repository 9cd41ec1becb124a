//! Traces reach a collector if one is configured. Logs have one line per request, and disclose nothing.

mod variables;

use std::io::{BufRead as _, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use rustix::process::Signal;
use serde_json::json;

use super::support::{
    Database, LIMIT, Response, Service, Start, closed_port, eventually, has_none_of, within,
};

/// A request to the collector: the path, the head in lower case, and the body.
#[derive(Clone, Debug)]
struct Export {
    path: String,
    head: String,
    body: Vec<u8>,
}

/// The least that an exporter accepts as an OTLP collector.
struct Collector {
    url: String,
    exports: Arc<Mutex<Vec<Export>>>,
}

impl Collector {
    fn start() -> Result<Self> {
        Self::with("http", Ok)
    }

    /// One that speaks over each connection as `wrap` makes it.
    fn with<S: Read + Write>(
        scheme: &str,
        wrap: impl Fn(TcpStream) -> Result<S> + Send + 'static,
    ) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let url = format!("{scheme}://{}", listener.local_addr()?);
        let exports = Arc::new(Mutex::new(Vec::new()));
        let kept = Arc::clone(&exports);
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                // When a connection breaks, the exporter notices it.
                let _ = stream.set_read_timeout(Some(Duration::from_secs(2)));
                let _ = wrap(stream).and_then(|stream| answer_all(stream, &kept));
            }
        });
        Ok(Self { url, exports })
    }

    fn exports(&self) -> Vec<Export> {
        self.exports.lock().expect("no panic").clone()
    }

    /// Waits for an export with all of these parts.
    fn receives(&self, parts: &[&[u8]]) -> Result<Export> {
        eventually("an export", || {
            let all = |export: &Export| parts.iter().all(|part| contains(&export.body, part));
            self.exports().into_iter().find(all)
        })
    }
}

fn answer_all(stream: impl Read + Write, exports: &Mutex<Vec<Export>>) -> Result<()> {
    let mut reader = BufReader::new(stream);
    loop {
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            ensure!(reader.read_line(&mut head)? > 0, "the connection ended");
        }
        let path = head.split(' ').nth(1).unwrap_or_default().to_owned();
        let head = head.to_lowercase();
        let length = head.lines().find_map(|line| line.strip_prefix("content-length:"));
        let mut body = vec![0; length.context("a length")?.trim().parse()?];
        reader.read_exact(&mut body)?;
        exports.lock().expect("no panic").push(Export { path, head, body });
        reader.get_mut().write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")?;
    }
}

fn contains(body: &[u8], part: &[u8]) -> bool {
    body.windows(part.len()).any(|window| window == part)
}

const TRACE_ID: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const PARENT_ID: &str = "00f067aa0ba902b7";

fn from_hex(text: &str) -> Result<Vec<u8>> {
    let pairs = (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16));
    Ok(pairs.collect::<Result<_, _>>()?)
}

/// A service that traces every request.
fn exporting(database: &Database, url: &str) -> Start {
    Start::on(database)
        .env("OTEL_EXPORTER_OTLP_ENDPOINT", url)
        .env("OTEL_TRACES_SAMPLER", "parentbased_always_on")
        .env("OTEL_BSP_SCHEDULE_DELAY", "100")
}

/// How many spans had this outcome.
fn spans(service: &Service, outcome: &str) -> Result<f64> {
    service.metric(&format!("chat_trace_spans_total{{outcome=\"{outcome}\"}}"))
}

/// Sends a request, in the caller's trace if one is given, and returns its log line.
fn ask(service: &Service, id: &str, traceparent: Option<&str>) -> Result<String> {
    let request = service.get("/me").bearer_auth("nonsense").header("x-request-id", id);
    let request =
        traceparent.into_iter().fold(request, |request, value| request.header("traceparent", value));
    Response::of(request)?.expect(401)?;
    Ok(service.process.logs(&[id])?.remove(0))
}

#[test]
fn a_tenth_of_the_requests_is_sampled_and_a_callers_trace_as_its_caller_decided() -> Result<()> {
    const REQUESTS: usize = 200;
    let database = Database::create()?;
    let collector = Collector::start()?;
    let service = exporting(&database, &collector.url).unset("OTEL_TRACES_SAMPLER").ready()?;
    for number in 0..REQUESTS {
        // Whether it is sampled or not, the line says which trace it is.
        let line = ask(&service, &format!("alone-{number}-"), None)?;
        ensure!(line.contains("trace_id="), "{line}");
    }
    let sampled = spans(&service, "ended")?;
    // Six standard deviations around a tenth.
    ensure!((1.0..=46.0).contains(&sampled), "{sampled} of {REQUESTS}");

    for (flag, counted) in [("00", 0.0), ("01", 20.0)] {
        let before = spans(&service, "ended")?;
        for number in 0..20 {
            let traceparent = format!("00-{TRACE_ID}-{PARENT_ID}-{flag}");
            let line = ask(&service, &format!("flag-{flag}-{number}-"), Some(&traceparent))?;
            ensure!(line.contains(TRACE_ID), "{line}");
        }
        let ended = spans(&service, "ended")? - before;
        ensure!(ended == counted, "{ended} with the flag {flag}");
    }
    // All sampled spans are exported, and no others.
    let all = sampled + 20.0;
    eventually("the export", || spans(&service, "exported").ok().filter(|exported| *exported == all))?;

    let always = exporting(&database, &collector.url).unset("OTEL_TRACES_SAMPLER");
    let service = always.env("OTEL_TRACES_SAMPLER_ARG", "1").ready()?;
    ask(&service, "always", None)?;
    ensure!(spans(&service, "ended")? == 1.0);
    Ok(())
}

#[test]
fn a_request_is_exported_under_its_route_and_continues_the_callers_trace() -> Result<()> {
    let database = Database::create()?;
    let collector = Collector::start()?;
    let service = exporting(&database, &collector.url).ready()?;
    let (ana, ben) = service.two_users()?;
    let traceparent = format!("00-{TRACE_ID}-{PARENT_ID}-01");
    let request = service.get("/users/BEN").bearer_auth(&ana.token).header("traceparent", &traceparent);
    Response::of(request.header("x-request-id", "a-traced-request"))?.expect(200)?;

    let export = collector.receives(&[b"GET /users/{username}", &from_hex(TRACE_ID)?])?;
    ensure!(export.path == "/v1/traces", "{}", export.path);
    ensure!(export.head.contains("content-type: application/x-protobuf"), "{}", export.head);
    for part in
        [&from_hex(PARENT_ID)?[..], b"http.route", b"http.request.method", b"http.response.status_code"]
    {
        ensure!(contains(&export.body, part), "{:?}", String::from_utf8_lossy(part));
    }
    ensure!(contains(&export.body, b"service.name") && contains(&export.body, b"chat-service"));
    let lines = service.process.logs(&["a-traced-request"])?;
    ensure!(lines.len() == 1 && lines[0].contains(TRACE_ID), "{lines:?}");

    // Without a caller's trace each request starts a new one.
    service.send(&ana, &ben, "a text for two")?.expect(201)?;
    let line = service.process.logs(&["route=\"/send\""])?.remove(0);
    let (_, id) = line.split_once("trace_id=").with_context(|| line.clone())?;
    let id = id.trim_start_matches('"').get(..32).context("an id")?;
    ensure!(id != TRACE_ID && id.bytes().any(|digit| digit != b'0'), "{line}");
    collector.receives(&[b"POST /send", &from_hex(id)?])?;

    // Traces have no text, name, token or raw path.
    for export in collector.exports() {
        for secret in ["a text for two", "/users/BEN", &ana.token, "ana@example.com", &*ben.id] {
            ensure!(!contains(&export.body, secret.as_bytes()), "{secret} was exported");
        }
    }
    Ok(())
}

#[test]
fn the_last_spans_are_exported_before_the_process_ends() -> Result<()> {
    let database = Database::create()?;
    let collector = Collector::start()?;
    // The next regular export is an hour away.
    let start = exporting(&database, &collector.url).env("OTEL_BSP_SCHEDULE_DELAY", "3600000");
    let service = start.ready()?;
    service.me("nonsense")?.expect(401)?;
    ensure!(collector.exports().is_empty());
    service.stop()?;
    collector.receives(&[b"GET /me"])?;
    Ok(())
}

#[test]
fn the_standard_variables_name_the_service_and_the_endpoint_for_traces() -> Result<()> {
    let database = Database::create()?;
    let collector = Collector::start()?;
    let start = Start::on(&database)
        .env("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", &format!("{}/of/mine", collector.url))
        .env("OTEL_TRACES_SAMPLER", "always_on")
        .env("OTEL_BSP_SCHEDULE_DELAY", "100")
        .env("OTEL_SERVICE_NAME", "chat-of-mine")
        .env("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=a-test")
        .env("OTEL_EXPORTER_OTLP_HEADERS", "x-of-mine=yes");
    let service = start.ready()?;
    service.me("nonsense")?.expect(401)?;
    let export =
        collector.receives(&[b"GET /me", b"chat-of-mine", b"deployment.environment.name", b"a-test"])?;
    ensure!(export.path == "/of/mine" && export.head.contains("x-of-mine: yes"), "{export:?}");
    Ok(())
}

#[test]
fn the_standard_variables_count_in_a_dotenv_file_too_and_the_environment_wins() -> Result<()> {
    let database = Database::create()?;
    let collector = Collector::start()?;
    let file = format!("OTEL_EXPORTER_OTLP_ENDPOINT={}\nOTEL_SERVICE_NAME=of-the-file\n", collector.url);
    let start = Start::on(&database)
        .file(".env", &file)
        .env("OTEL_TRACES_SAMPLER", "always_on")
        .env("OTEL_BSP_SCHEDULE_DELAY", "100");
    let service = start.clone().ready()?;
    service.me("nonsense")?.expect(401)?;
    collector.receives(&[b"GET /me", b"of-the-file"])?;
    let service = start.env("OTEL_SERVICE_NAME", "of-the-environment").ready()?;
    service.me("nonsense")?.expect(401)?;
    collector.receives(&[b"GET /me", b"of-the-environment"])?;
    Ok(())
}

#[test]
fn nothing_is_exported_when_the_sdk_is_disabled_or_no_endpoint_is_set() -> Result<()> {
    let database = Database::create()?;
    let collector = Collector::start()?;
    let disabled = exporting(&database, &collector.url).env("OTEL_SDK_DISABLED", "true");
    for start in [disabled, Start::on(&database)] {
        let service = start.ready()?;
        service.me("nonsense")?.expect(401)?;
        let said = service.stop()?;
        ensure!(!said.contains("trace_id"), "{said}");
    }
    ensure!(collector.exports().is_empty(), "{:?}", collector.exports());
    Ok(())
}

/// The service works, whatever the collector does.
fn works_despite(collector: &str) -> Result<()> {
    let database = Database::create()?;
    let start = exporting(&database, collector).env("OTEL_BSP_MAX_QUEUE_SIZE", "16");
    let mut service = start.env("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "8").ready()?;
    let (ana, ben) = service.two_users()?;
    for number in 0..60 {
        let content = number.to_string();
        within(Duration::from_secs(20), "a send", || service.send(&ana, &ben, &content))?.expect(201)?;
    }
    ensure!(service.contents(&ben, &ana, 1)? == ["59"]);
    ensure!(service.health()? == (200, "ok".to_owned()));
    // The loss is visible: more spans have ended than the queue holds, and none was exported.
    let [ended, exported] = [spans(&service, "ended")?, spans(&service, "exported")?];
    ensure!(ended >= 60.0 && exported == 0.0, "{ended} ended, {exported} exported");
    service.process.signal(Signal::TERM)?;
    ensure!(service.process.exit(LIMIT)? == 0, "{}", service.process.said());
    Ok(())
}

#[test]
fn background_work_has_a_trace_with_its_calls() -> Result<()> {
    let database = Database::create()?;
    let collector = Collector::start()?;
    // A replica without Redis suspends the windows of all replicas.
    let start = exporting(&database, &collector.url);
    let service = start.env("REDIS_URL", &format!("redis://127.0.0.1:{}", closed_port()?)).listen()?;
    service.becomes("degraded")?;
    collector.receives(&[b"suspend windows"])?;
    // A call has a span only as a child of another span.
    collector.receives(&[b"change_permission", b"postgresql"])?;
    Ok(())
}

#[test]
fn spans_that_were_exported_are_counted() -> Result<()> {
    let collector = Collector::start()?;
    let database = Database::create()?;
    let service = exporting(&database, &collector.url).ready()?;
    service.two_users()?;
    eventually("the export", || spans(&service, "exported").ok().filter(|exported| *exported > 0.0))?;
    ensure!(spans(&service, "failed")? == 0.0);
    Ok(())
}

#[test]
fn an_unavailable_collector_does_no_harm() -> Result<()> {
    works_despite(&format!("http://127.0.0.1:{}", closed_port()?))
}

#[test]
fn a_collector_that_never_answers_does_no_harm() -> Result<()> {
    // The kernel accepts the connections, but nothing reads from them.
    let listener = TcpListener::bind("127.0.0.1:0")?;
    works_despite(&format!("http://{}", listener.local_addr()?))
}

#[test]
fn every_request_has_one_log_line_with_its_id_method_route_status_and_duration() -> Result<()> {
    let database = Database::create()?;
    let service = Start::on(&database).ready()?;
    let (ana, ben) = service.two_users()?;
    let message = json!({"recipient_id": ben.id, "content": "a text for two"});
    let cases = [
        (service.post("/send", &message).bearer_auth(&ana.token), "POST", "/send", 201),
        (service.get("/users/bEn").bearer_auth(&ana.token), "GET", "/users/{username}", 200),
        (service.get("/users/eve-is-not-here").bearer_auth(&ana.token), "GET", "/users/{username}", 404),
        (
            service.get(&format!("/messages?peer_id={}", ben.id)).bearer_auth(&ana.token),
            "GET",
            "/messages",
            200,
        ),
        (service.get("/me").bearer_auth("not-a-token"), "GET", "/me", 401),
        (service.get("/raw/path?with=query"), "GET", "unmatched", 404),
        (service.post("/me", &json!({})), "POST", "unmatched", 405),
        (
            service.post("/register", &json!({"username": "a name?", "password": "battery"})),
            "POST",
            "/register",
            422,
        ),
    ];
    for (number, (request, method, route, status)) in cases.into_iter().enumerate() {
        let id = format!("request-{number}");
        Response::of(request.header("x-request-id", &id))?.expect(status)?;
        let lines = service.process.logs(&[&id])?;
        ensure!(lines.len() == 1, "{lines:#?}");
        let line = &lines[0];
        let words = [
            " INFO ".to_owned(),
            format!("request_id=\"{id}\""),
            format!("method=\"{method}\""),
            format!("route=\"{route}\""),
            format!("status={status}"),
            "duration_ms=".to_owned(),
        ];
        for word in words {
            ensure!(line.contains(&word), "no {word}: {line}");
        }
    }
    // Probes on the operations port are not logged.
    service.operations("/healthz")?;
    let said = service.stop()?;
    ensure!(!said.contains("/livez"), "{said}");
    let secrets = [
        &*ana.token,
        &*ben.id,
        "not-a-token",
        "a text for two",
        "bEn",
        "eve-is-not-here",
        "raw/path",
        "with=query",
        "a name?",
        "battery",
        "ana@example.com",
        "\"ana\"",
        "127.0.0.1:0",
    ];
    has_none_of(&said, secrets)
}

#[test]
fn a_request_that_its_client_gave_up_is_logged_with_status_499() -> Result<()> {
    let database = Database::create()?;
    let service = Start::on(&database).ready()?;
    let (ana, ben) = service.two_users()?;
    service.send(&ana, &ben, "first")?.expect(201)?;
    let _held = database.hold_conversations()?;
    let body = json!({"recipient_id": ben.id, "content": "given up"});
    let request = service.post("/send", &body).bearer_auth(&ana.token).header("x-request-id", "given-up");
    ensure!(request.timeout(Duration::from_millis(300)).send().is_err());
    let lines = service.process.logs(&["given-up"])?;
    ensure!(lines.len() == 1 && lines[0].contains("status=499"), "{lines:#?}");
    Ok(())
}
