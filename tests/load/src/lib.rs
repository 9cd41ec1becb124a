//! A cheap load generator: prepared requests over kept-alive HTTP/1.1 connections. Of a response it parses only the status
//! and the length, and where it scrolls the last `seq`. A closed loop sends the next request after the answer; an open one
//! at given times, as users do.

mod follow;
mod open;
mod requests;
mod response;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::timeout;

pub use follow::{Followers, Pair, Sent, Shown, Targets, write};
pub use open::{Call, at_times};
pub use requests::{Requests, get, post};

/// No response of a live service takes longer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);

/// What one connection sends repeatedly.
#[derive(Clone, Debug)]
pub struct Script {
    pub address: SocketAddr,
    pub requests: Requests,
}

/// The outcome of a run.
#[derive(Clone, Debug, Default)]
pub struct Report {
    pub elapsed: Duration,
    /// Responses by status; 0 counts connections that broke.
    pub statuses: BTreeMap<u16, u64>,
    /// Sorted.
    pub latencies: Vec<Duration>,
}

impl Script {
    /// `GET path` with a token.
    pub fn get(address: SocketAddr, path: &str, token: &str) -> Self {
        Self { address, requests: Requests::InTurn(vec![get(address, path, token)]) }
    }

    /// `POST path` with JSON bodies in turn.
    pub fn post(address: SocketAddr, path: &str, token: Option<&str>, bodies: &[String]) -> Self {
        let request = |body: &String| post(address, path, token, body);
        Self { address, requests: Requests::InTurn(bodies.iter().map(request).collect()) }
    }
}

impl Report {
    pub fn rate(&self) -> f64 {
        self.latencies.len() as f64 / self.elapsed.as_secs_f64()
    }

    /// Adds what one connection has seen.
    fn add(&mut self, statuses: BTreeMap<u16, u64>, latencies: Vec<Duration>) {
        for (status, count) in statuses {
            *self.statuses.entry(status).or_default() += count;
        }
        self.latencies.extend(latencies);
    }

    pub fn count(&self, status: u16) -> u64 {
        self.statuses.get(&status).copied().unwrap_or(0)
    }

    /// The latency that `share` of the responses did not exceed.
    pub fn quantile(&self, share: f64) -> Duration {
        let last = self.latencies.len().saturating_sub(1);
        let index = (last as f64 * share).round() as usize;
        self.latencies.get(index).copied().unwrap_or_default()
    }

    /// The report, if every response had this status.
    pub fn all(self, status: u16) -> Result<Self> {
        let others: Vec<_> = self.statuses.iter().filter(|(seen, _)| **seen != status).collect();
        if !others.is_empty() {
            bail!("not all responses were {status}: {:?}", self.statuses);
        }
        Ok(self)
    }
}

/// Runs each script on its own connection for `duration`, all on one thread.
pub fn run(scripts: Vec<Script>, duration: Duration) -> Result<Report> {
    let stop = Arc::new(AtomicBool::new(false));
    run_until(scripts, duration, &stop)
}

/// As `run`, but ends early when `stop` is set.
pub fn run_until(scripts: Vec<Script>, duration: Duration, stop: &Arc<AtomicBool>) -> Result<Report> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut connections = Vec::with_capacity(scripts.len());
        for script in scripts {
            let stream = TcpStream::connect(script.address).await.context("connect to the service")?;
            stream.set_nodelay(true)?;
            connections.push((script, stream));
        }
        let started = Instant::now();
        let deadline = started + duration;
        let tasks: Vec<_> = connections
            .into_iter()
            .map(|(script, stream)| tokio::spawn(drive(script, stream, deadline, Arc::clone(stop))))
            .collect();
        let mut report = Report::default();
        for task in tasks {
            let (statuses, latencies) = task.await?;
            report.add(statuses, latencies);
        }
        report.elapsed = started.elapsed();
        report.latencies.sort_unstable();
        Ok(report)
    })
}

async fn drive(
    script: Script,
    mut stream: TcpStream,
    deadline: Instant,
    stop: Arc<AtomicBool>,
) -> (BTreeMap<u16, u64>, Vec<Duration>) {
    let mut statuses = BTreeMap::new();
    let mut latencies = Vec::new();
    let mut buffer = Vec::with_capacity(64 * 1024);
    let mut requests = script.requests.start();
    loop {
        let request = requests.next(response::body(&buffer));
        let started = Instant::now();
        if started >= deadline || stop.load(Ordering::Relaxed) {
            break;
        }
        let answer = timeout(ANSWER_TIMEOUT, exchange(&mut stream, request, &mut buffer)).await;
        let Ok(Ok(status)) = answer else {
            *statuses.entry(0).or_default() += 1;
            break;
        };
        *statuses.entry(status).or_default() += 1;
        latencies.push(started.elapsed());
    }
    (statuses, latencies)
}

/// Sends a request and reads its response; returns the status.
async fn exchange(stream: &mut TcpStream, request: &[u8], buffer: &mut Vec<u8>) -> Result<u16> {
    stream.write_all(request).await?;
    buffer.clear();
    loop {
        if stream.read_buf(buffer).await? == 0 {
            bail!("the connection was closed");
        }
        if let Some(status) = response::status_if_complete(buffer)? {
            return Ok(status);
        }
    }
}
