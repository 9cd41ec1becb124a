//! An open loop: requests at given times, whether or not earlier ones were answered. A latency counts from the time at
//! which its request was due, so a service that falls behind does not hide it.
//!
//! One thread that polls its sockets: Tokio's timers are a millisecond coarse, and a thread per connection costs the
//! cores that it shares with the service three times as much.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;

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
    let mut free: Vec<_> = (0..connections).map(|_| connect(address)).collect::<Result<_>>()?;
    let mut busy: Vec<Exchange> = Vec::with_capacity(connections);
    let mut calls = calls.into_iter().peekable();
    let (mut reports, started) = ([Report::default(), Report::default()], Instant::now());
    loop {
        while !free.is_empty()
            && let Some(Call { at, request, then }) = calls.next_if(|call| call.at <= started.elapsed())
        {
            let stream = free.pop().context("a free connection")?;
            busy.push(Exchange::start(stream, &request, 0, started + at, then)?);
        }
        // Without a free connection only an answer lets the next call be made.
        let next = calls.peek().filter(|_| !free.is_empty()).map(|call| started + call.at);
        if next.is_none() && busy.is_empty() {
            break;
        }
        let is_ready = wait(&busy, next)?;
        for index in (0..busy.len()).rev().filter(|index| is_ready[*index]) {
            let Some(status) = busy[index].read()? else { continue };
            let Exchange { stream, due, report, then, .. } = busy.swap_remove(index);
            *reports[report].statuses.entry(status).or_default() += 1;
            reports[report].latencies.push(due.elapsed());
            match then {
                Some(request) => busy.push(Exchange::start(stream, &request, 1, Instant::now(), None)?),
                None => free.push(stream),
            }
        }
    }
    for report in &mut reports {
        report.elapsed = started.elapsed();
        report.latencies.sort_unstable();
    }
    let [calls, followers] = reports;
    Ok((calls, followers))
}

/// A request that was sent.
struct Exchange {
    stream: TcpStream,
    due: Instant,
    /// Which report it belongs to.
    report: usize,
    answer: Vec<u8>,
    then: Option<Arc<[u8]>>,
}

impl Exchange {
    fn start(
        mut stream: TcpStream,
        request: &[u8],
        report: usize,
        due: Instant,
        then: Option<Arc<[u8]>>,
    ) -> Result<Self> {
        stream.write_all(request)?;
        Ok(Self { stream, due, report, answer: Vec::new(), then })
    }

    /// Reads what has arrived; returns the status once that is all.
    fn read(&mut self) -> Result<Option<u16>> {
        let mut chunk = [0; 16 * 1024];
        let count = self.stream.read(&mut chunk)?;
        if count == 0 {
            bail!("the connection was closed");
        }
        self.answer.extend_from_slice(&chunk[..count]);
        response::status_if_complete(&self.answer)
    }
}

/// Waits until an answer arrives, or until then. Returns which can be read.
fn wait(busy: &[Exchange], until: Option<Instant>) -> Result<Vec<bool>> {
    let left = until.map(|until| until.saturating_duration_since(Instant::now()));
    let limit = left.unwrap_or(ANSWER_TIMEOUT).try_into()?;
    let mut sockets: Vec<_> = busy.iter().map(|call| PollFd::new(&call.stream, PollFlags::IN)).collect();
    match poll(&mut sockets, Some(&limit)) {
        Ok(0) if until.is_none() => bail!("no answer within {} s", ANSWER_TIMEOUT.as_secs()),
        Ok(_) | Err(Errno::INTR) => {}
        Err(error) => return Err(error.into()),
    }
    Ok(sockets.iter().map(|socket| !socket.revents().is_empty()).collect())
}

fn connect(address: SocketAddr) -> Result<TcpStream> {
    let stream = TcpStream::connect(address).context("connect to the service")?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(ANSWER_TIMEOUT))?;
    stream.set_write_timeout(Some(ANSWER_TIMEOUT))?;
    Ok(stream)
}
