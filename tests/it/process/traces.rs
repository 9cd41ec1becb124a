//! The spans of a request, as a real OpenTelemetry Collector receives them. `cargo xtask test` builds the collector where Go
//! is installed, and runs these tests; a single one: `cargo xtask test -- --test it -- --ignored NAME`.

use std::path::Path;
use std::thread;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use tests::Scratch;
use tests::servers::collector::{Collector, Spans};

use super::support::{Database, PASSWORD, Response, Service, Start, User, eventually};

const TRACE_ID: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const PARENT_ID: &str = "00f067aa0ba902b7";

// Kinds of spans, as OTLP numbers them.
const INTERNAL: i64 = 1;
const SERVER: i64 = 2;
const CLIENT: i64 = 3;

struct Traced {
    service: Service,
    collector: Collector,
    database: Database,
    _scratch: Scratch,
}

/// A span as OTLP's JSON.
#[derive(Clone, Debug)]
struct Span(Value);

impl Span {
    fn text(&self, field: &str) -> &str {
        self.0[field].as_str().unwrap_or_default()
    }

    fn name(&self) -> &str {
        self.text("name")
    }

    /// An attribute's value, whatever its type.
    fn attribute(&self, name: &str) -> Option<String> {
        let all = self.0["attributes"].as_array()?;
        let value = all.iter().find(|attribute| attribute["key"] == name)?["value"].as_object()?;
        let value = value.values().next()?;
        Some(value.as_str().map_or_else(|| value.to_string(), str::to_owned))
    }

    /// The ids of the linked spans.
    fn links(&self) -> Vec<&str> {
        let links = self.0["links"].as_array().map_or(&[][..], Vec::as_slice);
        links.iter().filter_map(|link| link["spanId"].as_str()).collect()
    }

    fn has(&self, kind: i64, attributes: &[(&str, &str)]) -> Result<()> {
        ensure!(self.0["kind"] == kind, "{self:?}");
        for (name, value) in attributes {
            ensure!(self.attribute(name).as_deref() == Some(value), "no {name}={value} in {self:?}");
        }
        Ok(())
    }

    /// It started and ended while the other was open.
    fn is_within(&self, outer: &Self) -> bool {
        let time = |span: &Self, field| span.text(field).parse::<u64>().unwrap_or_default();
        let [start, end] = ["startTimeUnixNano", "endTimeUnixNano"];
        time(outer, start) <= time(self, start)
            && time(self, start) <= time(self, end)
            && time(self, end) <= time(outer, end)
    }
}

impl Traced {
    fn start(variables: &[(&str, &str)]) -> Result<Self> {
        let program = std::env::var("TEST_COLLECTOR").context("TEST_COLLECTOR: run by `cargo xtask test`")?;
        let scratch = Scratch::new("collector")?;
        let collector = Collector::start(Path::new(&program), scratch.path(), None, Spans::Kept)?;
        let database = Database::create()?;
        let start = Start::on(&database)
            .env("OTEL_EXPORTER_OTLP_ENDPOINT", &collector.endpoint())
            .env("OTEL_BSP_SCHEDULE_DELAY", "100")
            .env("SEND_RATE_LIMIT_PER_MINUTE", "1000");
        let start = variables.iter().fold(start, |start, (name, value)| start.env(name, value));
        Ok(Self { service: start.ready()?, collector, database, _scratch: scratch })
    }

    /// The spans of a trace, once the request's own span has arrived: it ends last.
    fn trace(&self, id: &str) -> Result<Vec<Span>> {
        let mut found = Vec::new();
        let complete = eventually("the request's span", || {
            let spans = self.collector.spans().ok()?.into_iter().filter(|span| span["traceId"] == id);
            found = spans.map(Span).collect::<Vec<_>>();
            found.iter().any(|span| span.0["kind"] == SERVER).then_some(())
        });
        complete.with_context(|| format!("{id} in {found:#?}"))?;
        Ok(found)
    }

    fn post(&self, path: &str, body: &Value, by: Option<&User>, traceparent: &str) -> Result<Response> {
        let request = self.service.post(path, body).header("traceparent", traceparent);
        let request = request.header("tracestate", "vendor=opaque");
        Response::of(match by {
            Some(user) => request.bearer_auth(&user.token),
            None => request,
        })
    }
}

fn traceparent(sampled: bool) -> String {
    format!("00-{TRACE_ID}-{PARENT_ID}-0{}", u8::from(sampled))
}

/// The only child span of this name.
fn child<'a>(spans: &'a [Span], parent: &Span, name: &str) -> Result<&'a Span> {
    let below = |span: &&Span| span.text("parentSpanId") == parent.text("spanId") && span.name() == name;
    let found: Vec<_> = spans.iter().filter(below).collect();
    ensure!(found.len() == 1, "{} child spans {name} of {} in {spans:#?}", found.len(), parent.name());
    ensure!(found[0].is_within(parent), "{name} is not within {}: {spans:#?}", parent.name());
    Ok(found[0])
}

#[test]
#[ignore = "needs a collector: cargo xtask test"]
fn one_send_is_one_tree_from_the_request_to_the_commit() -> Result<()> {
    let traced = Traced::start(&[])?;
    let (ana, ben) = traced.service.two_users()?;
    let body = json!({"recipient_id": ben.id, "content": "hello"});
    let answer = traced.post("/send", &body, Some(&ana), &traceparent(true))?.expect(201)?;

    let spans = traced.trace(TRACE_ID)?;
    let roots: Vec<_> = spans.iter().filter(|span| span.text("parentSpanId") == PARENT_ID).collect();
    ensure!(roots.len() == 1 && spans.len() == 5, "{spans:#?}");
    let server = roots[0];
    ensure!(server.name() == "POST /send" && server.text("traceState") == "vendor=opaque", "{server:?}");
    server.has(
        SERVER,
        &[
            ("http.request.method", "POST"),
            ("http.route", "/send"),
            ("http.response.status_code", "201"),
            ("url.scheme", "http"),
            ("network.protocol.version", "1.1"),
        ],
    )?;
    let header = format!("00-{TRACE_ID}-{}-01", server.text("spanId"));
    ensure!(answer.header("traceresponse") == header, "{answer:?}");

    child(&spans, server, "count_attempt")?.has(
        CLIENT,
        &[
            ("db.system.name", "redis"),
            ("db.operation.name", "count_attempt"),
            ("server.address", "127.0.0.1"),
        ],
    )?;

    let batch = child(&spans, server, "write batch")?;
    batch.has(INTERNAL, &[("chat.outbox.batch.rows", "1")])?;
    ensure!(batch.links() == [server.text("spanId")], "{batch:?}");
    let port = traced.database.port.to_string();
    let database = traced.database.value("SELECT current_database()")?;
    child(&spans, batch, "store_messages")?.has(
        CLIENT,
        &[
            ("db.system.name", "postgresql"),
            ("db.operation.name", "store_messages"),
            ("db.namespace", &database),
            ("server.port", &port),
        ],
    )?;
    child(&spans, batch, "append_window")?.has(CLIENT, &[("db.system.name", "redis")])?;
    Ok(())
}

#[test]
#[ignore = "needs a collector: cargo xtask test"]
fn a_batch_and_its_sends_are_linked_with_one_another() -> Result<()> {
    let traced = Traced::start(&[("DB_POOL_MAX", "4"), ("OTEL_TRACES_SAMPLER", "always_on")])?;
    let (ana, ben) = traced.service.two_users()?;
    traced.service.send(&ana, &ben, "first")?.expect(201)?;
    // While the conversation is locked, one send is being written; those that wait become one batch.
    let held = traced.database.hold_conversations()?;
    thread::scope(|scope| -> Result<()> {
        let send = |content: &'static str| traced.service.send(&ana, &ben, content);
        let mut sends = vec![scope.spawn(move || send("second"))];
        traced.database.blocks(1)?;
        sends.extend(["third", "fourth"].map(|content| scope.spawn(move || send(content))));
        eventually("two queued sends", || {
            traced.service.metric("chat_outbox_queue_depth").ok().filter(|depth| *depth == 2.0)
        })?;
        drop(held);
        for send in sends {
            send.join().ok().context("a panic")??.expect(201)?;
        }
        Ok(())
    })?;
    let batch = eventually("the batch of two", || {
        let spans = traced.collector.spans().ok()?.into_iter().map(Span);
        spans.into_iter().find(|span| span.attribute("chat.outbox.batch.rows").as_deref() == Some("2"))
    })?;
    let sends = eventually("the sends of the batch", || {
        let spans = traced.collector.spans().ok()?.into_iter().map(Span);
        let linked = spans.filter(|span| batch.links().contains(&span.text("spanId"))).collect::<Vec<_>>();
        (linked.len() == 2).then_some(linked)
    })?;
    ensure!(sends.iter().all(|send| send.name() == "POST /send"), "{sends:#?}");
    let [parent, other] = if sends[0].text("spanId") == batch.text("parentSpanId") {
        [&sends[0], &sends[1]]
    } else {
        [&sends[1], &sends[0]]
    };
    ensure!(parent.text("traceId") == batch.text("traceId"), "{sends:#?}");
    ensure!(other.text("traceId") != batch.text("traceId"), "{sends:#?}");
    ensure!(other.links() == [batch.text("spanId")], "{other:?}");
    Ok(())
}

#[test]
#[ignore = "needs a collector: cargo xtask test"]
fn password_hashing_and_database_errors_are_in_the_trace() -> Result<()> {
    let traced = Traced::start(&[("DB_STATEMENT_TIMEOUT_MS", "300")])?;
    let body = json!({"username": "ana", "email": "ana@example.com", "password": PASSWORD});
    traced.post("/register", &body, None, &traceparent(true))?.expect(201)?;
    let spans = traced.trace(TRACE_ID)?;
    let server = spans.iter().find(|span| span.name() == "POST /register").context("the request")?;
    for name in ["check_taken", "insert_user"] {
        child(&spans, server, name)?.has(CLIENT, &[("db.system.name", "postgresql")])?;
    }
    let hash = child(&spans, server, "hash password")?;
    hash.has(INTERNAL, &[])?;
    ensure!(hash.0["events"][0]["name"] == "taken from the queue", "{hash:?}");

    let token = traced.service.log_in("ana")?;
    let held = traced.database.hold("LOCK TABLE users")?;
    let id = "0af7651916cd43dd8448eb211c80319c";
    let request = traced.service.get("/me").bearer_auth(token);
    Response::of(request.header("traceparent", format!("00-{id}-{PARENT_ID}-01")))?.is_unavailable()?;
    drop(held);
    let spans = traced.trace(id)?;
    let server = spans.iter().find(|span| span.name() == "GET /me").context("the request")?;
    server.has(SERVER, &[("http.response.status_code", "503"), ("error.type", "503")])?;
    let call = child(&spans, server, "find_user")?;
    // query_canceled
    call.has(CLIENT, &[("db.response.status_code", "57014"), ("error.type", "57014")])?;
    ensure!(call.0["status"]["code"] == 2 && server.0["status"]["code"] == 2, "{spans:#?}");
    Ok(())
}

#[test]
#[ignore = "needs a collector: cargo xtask test"]
fn a_trace_that_the_caller_does_not_sample_is_not_exported() -> Result<()> {
    let traced = Traced::start(&[])?;
    let (ana, ben) = traced.service.two_users()?;
    let body = json!({"recipient_id": ben.id, "content": "hello"});
    let answer = traced.post("/send", &body, Some(&ana), &traceparent(false))?.expect(201)?;
    ensure!(answer.header("traceresponse").is_empty(), "{answer:?}");
    // Its log line still has the caller's trace id.
    traced.service.process.logs(&["route=\"/send\"", TRACE_ID])?;
    let later = "0af7651916cd43dd8448eb211c80319c";
    traced.post("/send", &body, Some(&ana), &format!("00-{later}-{PARENT_ID}-01"))?.expect(201)?;
    traced.trace(later)?;
    let spans = traced.collector.spans()?;
    ensure!(spans.iter().all(|span| span["traceId"] != TRACE_ID), "{spans:#?}");
    Ok(())
}
