//! An open loop: requests at given times, whether or not earlier ones were answered. A latency counts from the time at
//! which its request was due, so a service that falls behind does not hide it.
//!
//! A thread per connection: a sleeping thread wakes within a tenth of a millisecond, Tokio's timers within one.

use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

use crate::{ANSWER_TIMEOUT, Report, response};

/// One request of an open loop.
#[derive(Clone, Debug)]
pub struct Call {
    /// When it is due, from the start on.
    pub at: Duration,
    pub request: Arc<[u8]>,
    /// Sent over the same connection once the answer has arrived.
    pub then: Option<Arc<[u8]>>,
}

/// Makes the calls, which are in the order of their times, over this many connections: any that is free takes the next
/// one. Reports the calls, and what followed them.
pub fn at_times(address: SocketAddr, connections: usize, calls: Vec<Call>) -> Result<(Report, Report)> {
    let calls: Arc<[Call]> = calls.into();
    let next = Arc::new(AtomicUsize::new(0));
    let streams: Vec<_> = (0..connections).map(|_| connect(address)).collect::<Result<_>>()?;
    let started = Instant::now();
    let threads: Vec<_> = streams
        .into_iter()
        .map(|stream| {
            let (calls, next) = (Arc::clone(&calls), Arc::clone(&next));
            thread::spawn(move || make_calls(stream, &calls, &next, started))
        })
        .collect();
    let (mut first, mut second) = (Report::default(), Report::default());
    for thread in threads {
        let (calls, followers) = thread.join().ok().context("a connection's thread panicked")?;
        first.add(calls.statuses, calls.latencies);
        second.add(followers.statuses, followers.latencies);
    }
    for report in [&mut first, &mut second] {
        report.elapsed = started.elapsed();
        report.latencies.sort_unstable();
    }
    Ok((first, second))
}

#[derive(Default)]
struct Seen {
    statuses: BTreeMap<u16, u64>,
    latencies: Vec<Duration>,
}

fn make_calls(mut stream: TcpStream, calls: &[Call], next: &AtomicUsize, started: Instant) -> (Seen, Seen) {
    let (mut first, mut second) = (Seen::default(), Seen::default());
    let mut buffer = Vec::with_capacity(64 * 1024);
    while let Some(call) = calls.get(next.fetch_add(1, Ordering::Relaxed)) {
        let due = started + call.at;
        thread::sleep(due.saturating_duration_since(Instant::now()));
        if !first.exchange(&mut stream, &call.request, due, &mut buffer) {
            break;
        }
        if let Some(then) = &call.then
            && !second.exchange(&mut stream, then, Instant::now(), &mut buffer)
        {
            break;
        }
    }
    (first, second)
}

impl Seen {
    /// False if the connection broke, which counts as status 0.
    fn exchange(
        &mut self,
        stream: &mut TcpStream,
        request: &[u8],
        due: Instant,
        buffer: &mut Vec<u8>,
    ) -> bool {
        let status = exchange(stream, request, buffer).unwrap_or(0);
        *self.statuses.entry(status).or_default() += 1;
        if status != 0 {
            self.latencies.push(due.elapsed());
        }
        status != 0
    }
}

fn connect(address: SocketAddr) -> Result<TcpStream> {
    let stream = TcpStream::connect(address).context("connect to the service")?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(ANSWER_TIMEOUT))?;
    stream.set_write_timeout(Some(ANSWER_TIMEOUT))?;
    Ok(stream)
}

fn exchange(stream: &mut TcpStream, request: &[u8], buffer: &mut Vec<u8>) -> Result<u16> {
    stream.write_all(request)?;
    buffer.clear();
    let mut chunk = [0; 16 * 1024];
    loop {
        let count = stream.read(&mut chunk)?;
        if count == 0 {
            bail!("the connection was closed");
        }
        buffer.extend_from_slice(&chunk[..count]);
        if let Some(status) = response::status_if_complete(buffer)? {
            return Ok(status);
        }
    }
}
