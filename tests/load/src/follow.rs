//! Users who follow their streams and write to each other. A broken or ended stream is opened again where it was, after the
//! delay that the service asked for; what it shows is kept, so that a lost or a doubled message is found.
//!
//! The content of a message says when it was sent and in which conversation. Each side has a thread of its own.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, bail};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::{sleep, sleep_until, timeout};

use crate::{ANSWER_TIMEOUT, Report, post, response};

/// Streams that one local address may have: it has 28,000 ports, and the kernel finds the last ones slowly.
const STREAMS_PER_ADDRESS: usize = 10_000;

/// Streams that are opened at a time in the beginning.
const OPENING: usize = 64;

/// A stream shows a comment every 15 s.
const SILENCE_MAX: Duration = Duration::from_secs(40);

/// Before a client comes back whose connection broke; half of it at least.
const BACKOFF: Duration = Duration::from_secs(1);

const TICK: Duration = Duration::from_millis(50);

/// Where clients connect to: as behind a load balancer, any of the replicas that are ready.
#[derive(Clone, Debug, Default)]
pub struct Targets(Arc<Mutex<Vec<SocketAddr>>>);

impl Targets {
    pub fn new(addresses: Vec<SocketAddr>) -> Self {
        Self(Arc::new(Mutex::new(addresses)))
    }

    pub fn set(&self, addresses: Vec<SocketAddr>) {
        *lock(&self.0) = addresses;
    }

    /// In turn, so that each gets its share.
    fn at(&self, index: usize) -> Option<SocketAddr> {
        let addresses = lock(&self.0);
        addresses.get(index % addresses.len().max(1)).copied()
    }
}

/// A message as a stream showed it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Shown {
    pub stream: u32,
    pub conversation: u32,
    pub seq: u32,
    /// From before it was sent.
    pub after: Duration,
}

#[derive(Debug, Default)]
struct Seen {
    shown: Mutex<Vec<Shown>>,
    /// When streams began.
    opened: Mutex<Vec<Instant>>,
    open: AtomicUsize,
    stop: AtomicBool,
}

/// Open streams.
#[derive(Debug)]
pub struct Followers {
    seen: Arc<Seen>,
    thread: JoinHandle<Result<()>>,
}

impl Followers {
    /// Opens a stream with each of these tokens, and waits until all are open.
    pub fn start(targets: &Targets, tokens: Vec<String>, limit: Duration) -> Result<Self> {
        let seen = Arc::new(Seen::default());
        let wanted = tokens.len();
        let thread = std::thread::spawn({
            let (seen, targets) = (Arc::clone(&seen), targets.clone());
            move || follow_all(tokens, &targets, &seen)
        });
        let followers = Self { seen, thread };
        followers.await_open(wanted, limit)?;
        Ok(followers)
    }

    pub fn await_open(&self, wanted: usize, limit: Duration) -> Result<()> {
        let deadline = Instant::now() + limit;
        while self.open() < wanted {
            if self.thread.is_finished() || Instant::now() > deadline {
                bail!("{} of {wanted} streams are open after {} s", self.open(), limit.as_secs());
            }
            std::thread::sleep(TICK);
        }
        Ok(())
    }

    pub fn open(&self) -> usize {
        self.seen.open.load(Ordering::Relaxed)
    }

    pub fn shown(&self) -> usize {
        lock(&self.seen.shown).len()
    }

    /// Waits until this many messages were shown, or the time is over.
    pub fn await_shown(&self, wanted: usize, limit: Duration) {
        let deadline = Instant::now() + limit;
        while self.shown() < wanted && Instant::now() < deadline {
            std::thread::sleep(TICK);
        }
    }

    /// Closes the streams. Returns what they showed, and when they began.
    pub fn stop(self) -> Result<(Vec<Shown>, Vec<Instant>)> {
        self.seen.stop.store(true, Ordering::Relaxed);
        self.thread.join().ok().context("the followers panicked")??;
        let (mut shown, mut opened) = (lock(&self.seen.shown), lock(&self.seen.opened));
        Ok((std::mem::take(&mut shown), std::mem::take(&mut opened)))
    }
}

fn follow_all(tokens: Vec<String>, targets: &Targets, seen: &Arc<Seen>) -> Result<()> {
    runtime()?.block_on(async {
        for (index, token) in tokens.into_iter().enumerate() {
            let (targets, seen) = (targets.clone(), Arc::clone(seen));
            while index >= seen.open.load(Ordering::Relaxed) + OPENING && !seen.stop.load(Ordering::Relaxed) {
                sleep(Duration::from_millis(1)).await;
            }
            tokio::spawn(async move { Follower { index, token, targets, seen, position: None }.run().await });
        }
        while !seen.stop.load(Ordering::Relaxed) {
            sleep(TICK).await;
        }
        // The tasks end with the runtime.
    });
    Ok(())
}

struct Follower {
    index: usize,
    token: String,
    targets: Targets,
    seen: Arc<Seen>,
    /// Behind the last event.
    position: Option<String>,
}

impl Follower {
    async fn run(mut self) {
        for attempt in 0.. {
            let mut is_open = false;
            let retry = self.follow(attempt, &mut is_open).await.ok().flatten();
            if is_open {
                self.seen.open.fetch_sub(1, Ordering::Relaxed);
            }
            sleep(retry.unwrap_or_else(|| BACKOFF.mul_f64(0.5 + fastrand::f64() / 2.0))).await;
        }
    }

    /// One stream, to its end. Returns the delay that the service asked for.
    async fn follow(&mut self, attempt: usize, is_open: &mut bool) -> Result<Option<Duration>> {
        let address = self.targets.at(self.index + attempt).context("a replica")?;
        let socket = TcpSocket::new_v4()?;
        let local = Ipv4Addr::new(127, 0, 0, 1 + (self.index / STREAMS_PER_ADDRESS) as u8);
        socket.bind((IpAddr::from(local), 0).into())?;
        let mut stream = timeout(ANSWER_TIMEOUT, socket.connect(address)).await??;
        let position = self.position.as_ref().map(|id| format!("last-event-id: {id}\r\n"));
        let request = format!(
            "GET /stream HTTP/1.1\r\nhost: {address}\r\nauthorization: Bearer {}\r\n{}\r\n",
            self.token,
            position.unwrap_or_default()
        );
        stream.write_all(request.as_bytes()).await?;
        let (mut received, mut retry) = (Vec::new(), None);
        loop {
            let read = timeout(SILENCE_MAX, stream.read_buf(&mut received)).await??;
            if read == 0 {
                return Ok(retry);
            }
            let mut taken = 0;
            while let Some(length) = received[taken..].iter().position(|byte| *byte == b'\n') {
                self.line(&received[taken..taken + length], is_open, &mut retry)?;
                taken += length + 1;
            }
            received.drain(..taken);
            if received.is_empty() {
                // Idle streams are many.
                received = Vec::new();
            }
        }
    }

    /// The head's and the chunks' own lines mean nothing here: the service puts whole events into a chunk.
    fn line(&mut self, line: &[u8], is_open: &mut bool, retry: &mut Option<Duration>) -> Result<()> {
        let line = std::str::from_utf8(line)?;
        if let Some(status) = line.strip_prefix("HTTP/1.1 ")
            && !status.starts_with("200")
        {
            bail!("a stream was answered {status}");
        }
        if let Some(id) = line.strip_prefix("id: ") {
            self.position = Some(id.to_owned());
        } else if let Some(delay) = line.strip_prefix("retry: ") {
            *retry = Some(Duration::from_millis(delay.parse()?));
        } else if line == "event: ready" {
            *is_open = true;
            self.seen.open.fetch_add(1, Ordering::Relaxed);
            lock(&self.seen.opened).push(Instant::now());
        } else if line == "event: reset" {
            bail!("a position was not taken up");
        } else if let Some(data) = line.strip_prefix("data: {\"id\"") {
            let message = self.message(data).context("a message of other clients")?;
            lock(&self.seen.shown).push(message);
        }
        Ok(())
    }

    fn message(&self, data: &str) -> Option<Shown> {
        let after = |name: &str| Some(&data[data.find(name)? + name.len()..]);
        let seq = response::leading_number(after("\"seq\":")?.as_bytes())?;
        let (sent_at, rest) = after("\"content\":\"")?.split_once(' ')?;
        let conversation = response::leading_number(rest.as_bytes())?;
        let after = Duration::from_micros(micros().saturating_sub(sent_at.parse().ok()?));
        let stream = self.index.try_into().ok()?;
        Some(Shown { stream, conversation: conversation.try_into().ok()?, seq: seq.try_into().ok()?, after })
    }
}

/// Who writes to whom.
#[derive(Clone, Debug)]
pub struct Pair {
    pub conversation: u32,
    pub token: String,
    pub recipient: String,
}

/// What was acknowledged.
#[derive(Clone, Debug, Default)]
pub struct Sent {
    pub report: Report,
    /// Messages by conversation.
    pub acknowledged: BTreeMap<u32, u32>,
    /// Since the start, and how long each took.
    pub at: Vec<(Duration, Duration)>,
}

/// Sends messages of these pairs in turn, over so many connections, until `stop`: together at this rate, or with none as
/// fast as they are answered.
pub fn write(
    targets: &Targets,
    pairs: Vec<Pair>,
    connections: usize,
    rate: Option<f64>,
    stop: &Arc<AtomicBool>,
) -> Result<Sent> {
    let started = Instant::now();
    let pairs: Arc<[Pair]> = pairs.into();
    let interval = rate.map(|rate| Duration::from_secs_f64(connections as f64 / rate));
    let mut all = Sent::default();
    runtime()?.block_on(async {
        let writers: Vec<_> = (0..connections)
            .map(|index| {
                let (targets, pairs) = (targets.clone(), Arc::clone(&pairs));
                let writer = Writer { index, connections, targets, pairs, interval, connection: None };
                tokio::spawn(writer.run(started, Arc::clone(stop)))
            })
            .collect();
        for writer in writers {
            let one = writer.await?;
            for (conversation, count) in one.acknowledged {
                *all.acknowledged.entry(conversation).or_default() += count;
            }
            all.report.add(one.report.statuses, one.report.latencies);
            all.at.extend(one.at);
        }
        anyhow::Ok(())
    })?;
    all.report.elapsed = started.elapsed();
    all.report.latencies.sort_unstable();
    Ok(all)
}

struct Writer {
    index: usize,
    connections: usize,
    targets: Targets,
    pairs: Arc<[Pair]>,
    interval: Option<Duration>,
    connection: Option<TcpStream>,
}

impl Writer {
    async fn run(mut self, started: Instant, stop: Arc<AtomicBool>) -> Sent {
        let mut sent = Sent::default();
        for number in 0.. {
            if let Some(interval) = self.interval {
                let phase = interval.mul_f64(self.index as f64 / self.connections as f64);
                sleep_until((started + phase + interval * number).into()).await;
            }
            if stop.load(Ordering::Relaxed) {
                break;
            }
            let pair = &Arc::clone(&self.pairs)
                [(self.index + number as usize * self.connections) % self.pairs.len()];
            let began = Instant::now();
            let status = self.send(pair).await.unwrap_or(0);
            *sent.report.statuses.entry(status).or_default() += 1;
            sent.report.latencies.push(began.elapsed());
            sent.at.push((began - started, began.elapsed()));
            if status == 201 {
                *sent.acknowledged.entry(pair.conversation).or_default() += 1;
            }
        }
        sent
    }

    async fn send(&mut self, pair: &Pair) -> Result<u16> {
        let content = format!("{} {} shall we meet at the station at seven?", micros(), pair.conversation);
        let body = format!(r#"{{"recipient_id":"{}","content":"{content}"}}"#, pair.recipient);
        let kept = self.connection.take();
        let address = self.targets.at(self.index).context("a replica")?;
        if let Some(connection) = kept.filter(|kept| kept.peer_addr().is_ok_and(|peer| peer == address))
            && let Some(status) = self.exchange(connection, pair, &body).await?
        {
            return Ok(status);
        }
        let connection = timeout(ANSWER_TIMEOUT, TcpStream::connect(address)).await??;
        connection.set_nodelay(true)?;
        self.exchange(connection, pair, &body).await?.context("a new connection was closed at once")
    }

    /// `None` when the connection had been closed before the request: then it was not read.
    async fn exchange(&mut self, mut connection: TcpStream, pair: &Pair, body: &str) -> Result<Option<u16>> {
        let request = post(connection.peer_addr()?, "/send", Some(&pair.token), body);
        if connection.write_all(&request).await.is_err() {
            return Ok(None);
        }
        let mut answer = Vec::with_capacity(1024);
        loop {
            match timeout(ANSWER_TIMEOUT, connection.read_buf(&mut answer)).await? {
                Ok(0) | Err(_) if answer.is_empty() => return Ok(None),
                Ok(0) => bail!("the connection was closed"),
                read => read?,
            };
            if let Some(status) = response::status_if_complete(&answer)? {
                if !response::closes(&answer) {
                    self.connection = Some(connection);
                }
                return Ok(Some(status));
            }
        }
    }
}

fn runtime() -> Result<tokio::runtime::Runtime> {
    Ok(tokio::runtime::Builder::new_current_thread().enable_all().build()?)
}

/// Since 1970.
fn micros() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    now.as_micros().try_into().unwrap_or(u64::MAX)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
