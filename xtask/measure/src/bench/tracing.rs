//! What traces cost: the same load on a service that makes none, one in ten as it is by default, and all of them.

use anyhow::{Context as _, Result};
use harness::Replica;
use harness::http::Client;
use harness::servers::collector::{Collector, Spans};

use super::measures::{CONNECTIONS, fill_conversations};
use super::setup::Setup;
use super::{Bench, Goal, Row, median, scratch};

/// One way to trace, and what was measured of it.
struct Side {
    /// Its one replica, in a form that is swapped with the setup's.
    replicas: Vec<Replica>,
    send: Vec<f64>,
    messages: Vec<f64>,
}

/// Metrics are kept by all three; the collector runs on the same cores and takes its share.
pub(crate) fn tracing(bench: &Bench, setup: &mut Setup) -> Result<Vec<Row>> {
    let Some(program) = &bench.collector else { return Ok(Vec::new()) };
    let collector = Collector::start(program, &scratch(bench, "collector"), None, Spans::Dropped)?;
    let endpoint = ("OTEL_EXPORTER_OTLP_ENDPOINT", collector.endpoint());
    let every = ("OTEL_TRACES_SAMPLER", "parentbased_always_on".to_owned());
    let mut sides = [
        Side::start(bench, setup, &[])?,
        Side::start(bench, setup, std::slice::from_ref(&endpoint))?,
        Side::start(bench, setup, &[endpoint, every])?,
    ];
    for round in 0..bench.rounds as usize {
        // Each is the first by turns: what the machine does meanwhile favours none.
        for turn in 0..sides.len() {
            sides[(round + turn) % 3].measure(bench, setup)?;
        }
    }
    let [off, tenth, all] = &sides;
    let goal = Some(Goal::AtLeast { floor: 0.9, aim: 0.97 });
    let mut rows = Vec::new();
    for (side, traced, goal) in [(tenth, "a tenth traced, as by default", goal), (all, "all traced", None)] {
        for (what, with, without) in [
            ("POST /send", &side.send, &off.send),
            ("GET /messages from the window", &side.messages, &off.messages),
        ] {
            rows.push(Row {
                name: "tracing",
                what: format!("{what}, {traced}, to none"),
                values: with.iter().zip(without).map(|(with, without)| with / without).collect(),
                unit: "x",
                goal,
                detail: format!(
                    "with {:.0}/s, without {:.0}/s; {}",
                    median(with),
                    median(without),
                    side.exported()?
                ),
            });
        }
    }
    Ok(rows)
}

impl Side {
    fn start(bench: &Bench, setup: &Setup, variables: &[(&str, String)]) -> Result<Self> {
        let replica = setup.start_replica_with(&bench.dir, &bench.binary, variables)?;
        Ok(Self { replicas: vec![replica], send: Vec::new(), messages: Vec::new() })
    }

    fn measure(&mut self, bench: &Bench, setup: &mut Setup) -> Result<()> {
        std::mem::swap(&mut setup.replicas, &mut self.replicas);
        self.send.push(load::run(setup.send_scripts(CONNECTIONS, false), bench.duration)?.all(201)?.rate());
        fill_conversations(setup)?;
        self.messages.push(load::run(setup.read_scripts(CONNECTIONS, ""), bench.duration)?.all(200)?.rate());
        std::mem::swap(&mut setup.replicas, &mut self.replicas);
        Ok(())
    }

    /// How much of what was made arrived: what the queue had no room for was dropped.
    fn exported(&self) -> Result<String> {
        let operations = self.replicas.first().context("no replica")?.operations;
        let text = Client::new(operations).ask("GET", "/metrics", None, "")?.text();
        let spans = |outcome: &str| -> Result<f64> {
            let name = format!("chat_trace_spans_total{{outcome=\"{outcome}\"}} ");
            let value = text.lines().find_map(|line| line.strip_prefix(&name));
            value.with_context(|| format!("no {name}"))?.trim().parse().context("a number")
        };
        let (ended, exported) = (spans("ended")?, spans("exported")?);
        Ok(format!("{:.0} % of {ended:.0} spans were exported", 100.0 * exported / ended.max(1.0)))
    }
}
