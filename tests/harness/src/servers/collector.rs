//! An OpenTelemetry Collector on a loopback port, and the spans that it received.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::Value;

use super::daemon::{Daemon, dies_with_us};
use super::ports;

const READY_LIMIT: Duration = Duration::from_secs(30);

/// What happens with received spans.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Spans {
    /// Written to a file, one export per line.
    Kept,
    /// Dropped: for measuring what it costs to send them.
    Dropped,
}

/// The collector of `deploy/observability`; dropping it ends it.
#[derive(Debug)]
pub struct Collector {
    daemon: Daemon,
    port: u16,
    file: PathBuf,
}

impl Collector {
    /// Starts the built program on this port, or any free one; its files are in `dir`.
    pub fn start(program: &Path, dir: &Path, port: Option<u16>, spans: Spans) -> Result<Self> {
        fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))?;
        let config = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../deploy/observability/collector.yaml");
        let port = port.map_or_else(ports::free, Ok)?;
        let file = dir.join("traces.jsonl");
        let mut command = dies_with_us(program, "KILL");
        command.arg("--config").arg(format!("file:{}", config.display()));
        command.env("OTLP_ADDRESS", format!("127.0.0.1:{port}")).env("TRACES_FILE", &file);
        command.env("EXPORTER", if spans == Spans::Kept { "file" } else { "debug" });
        let daemon = Daemon::start(command, &dir.join("collector.log"))?;
        let mut collector = Self { daemon, port, file };
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        let ready = || TcpStream::connect_timeout(&address, Duration::from_secs(1)).is_ok();
        collector.daemon.await_ready(READY_LIMIT, ready).context("the collector")?;
        Ok(collector)
    }

    /// The value for `OTEL_EXPORTER_OTLP_ENDPOINT`.
    pub fn endpoint(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// Where spans are kept, as OTLP's JSON.
    pub fn file(&self) -> &Path {
        &self.file
    }

    /// Every span received so far.
    pub fn spans(&self) -> Result<Vec<Value>> {
        let text = fs::read_to_string(&self.file).unwrap_or_default();
        // The last line may be half written.
        let whole = text.rfind('\n').map_or("", |end| &text[..end]);
        let mut spans = Vec::new();
        for line in whole.lines() {
            let export: Value = serde_json::from_str(line).context("an export")?;
            for resource in items(&export, "resourceSpans") {
                for scope in items(resource, "scopeSpans") {
                    spans.extend(items(scope, "spans").iter().cloned());
                }
            }
        }
        Ok(spans)
    }

    pub fn stop(&mut self) -> Result<()> {
        self.daemon.stop(Duration::from_secs(10))
    }
}

fn items<'a>(value: &'a Value, name: &str) -> &'a [Value] {
    value[name].as_array().map_or(&[], Vec::as_slice)
}
