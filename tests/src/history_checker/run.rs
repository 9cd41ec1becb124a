//! Runs the clients and the faults, and checks the history meanwhile and at the end.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow};

use super::check::{self, Violation};
use super::clients::UserClient;
use super::redis::RedisMode;
use super::schedule::{self, CONVERSATIONS, FOLLOWERS, Fault, Plan, READERS, REPLICAS, USERS, WRITERS};
use super::system::{System, lock, window_hits};
use super::{Follower, History, Message, Outcome, Page, Told};
use crate::User;

/// Before the end, without faults: everything has to work again.
const CALM: Duration = Duration::from_secs(6);

/// The longest that followers get afterwards, until they have shown everything.
const FOLLOWERS_LIMIT: Duration = Duration::from_secs(8);

const CHECK_INTERVAL: Duration = Duration::from_secs(2);
const TICK: Duration = Duration::from_millis(200);

#[derive(Clone, Debug)]
pub struct Options {
    pub redis: RedisMode,
    pub plan: Plan,
    pub seed: u64,
    pub duration: Duration,
    pub binary: PathBuf,
    /// Additional variables for the replicas.
    pub environment: Vec<(String, String)>,
}

/// How far a run has come.
#[derive(Debug)]
pub struct Progress {
    pub elapsed: Duration,
    pub operations: usize,
    pub last_fault: String,
}

#[derive(Debug, Default)]
pub struct Report {
    pub elapsed: Duration,
    pub acknowledged: u64,
    pub replayed: u64,
    pub reads: u64,
    pub stale_reads: u64,
    /// Streams that began, those of them that took up a position, and the messages that all of them showed.
    pub streams: u64,
    pub resumed_streams: u64,
    pub streamed: u64,
    /// By reason.
    pub unanswered: BTreeMap<&'static str, u64>,
    /// Reads that were answered from a window, as the replicas count them.
    pub window_hits: u64,
    pub faults: BTreeMap<&'static str, u64>,
    /// The last ones, each as a line with the time at which it began.
    pub last_faults: Vec<String>,
    /// The greatest value of either replica, for every ten seconds.
    pub resident_kib: Vec<u64>,
    pub violations: Vec<Violation>,
}

pub(super) struct Run<'a> {
    pub(super) options: &'a Options,
    pub(super) system: &'a System,
    began: Instant,
    pub(super) history: Mutex<History>,
    /// With the time at which each began.
    pub(super) faults: Mutex<Vec<(Duration, Fault)>>,
    /// The newest seq of each conversation that any client has seen, for pages relative to it.
    pub(super) newest: [AtomicI64; CONVERSATIONS.len()],
    pub(super) faults_end: AtomicBool,
    pub(super) end: AtomicBool,
    pub(super) followers_end: AtomicBool,
}

/// Runs to the end, or to the first violation, or until `go_on` returns false.
pub fn run(options: &Options, mut go_on: impl FnMut(&Progress) -> bool) -> Result<Report> {
    let system = System::start(options.redis, &options.binary, &options.environment)?;
    let user = |number: u32| system.users[number as usize % USERS].id.clone();
    let followers =
        (0..FOLLOWERS).map(|number| Follower { user: user(number), events: Vec::new() }).collect();
    let run = Run {
        options,
        system: &system,
        began: Instant::now(),
        history: Mutex::new(History { followers, ..History::default() }),
        faults: Mutex::default(),
        newest: Default::default(),
        faults_end: AtomicBool::new(false),
        end: AtomicBool::new(false),
        followers_end: AtomicBool::new(false),
    };
    let mut report = Report::default();
    thread::scope(|scope| -> Result<()> {
        let faults = match options.plan {
            Plan::Mixed => vec![
                scope.spawn(|| {
                    run.inject_faults(|seed, index| schedule::link_fault(options.redis, seed, index))
                }),
                scope.spawn(|| run.inject_faults(schedule::process_fault)),
            ],
            plan => vec![scope.spawn({
                let run = &run;
                move || run.inject_faults(|seed, index| schedule::aimed_fault(plan, seed, index))
            })],
        };
        let mut clients = Vec::new();
        for client in 0..WRITERS + READERS {
            let run = &run;
            clients.push(
                scope.spawn(move || if client < WRITERS { run.write(client) } else { run.read(client) }),
            );
        }
        for number in 0..FOLLOWERS {
            let run = &run;
            scope.spawn(move || run.follow(number));
        }
        report.violations = run.watch(&mut report, &mut go_on);
        run.faults_end.store(true, Ordering::Relaxed);
        let broken: Result<Vec<()>> =
            faults.into_iter().map(|fault| fault.join().map_err(|_| anyhow!("a panic"))?).collect();
        let is_sound = report.violations.is_empty() && broken.is_ok();
        if is_sound {
            thread::sleep(CALM);
        }
        run.end.store(true, Ordering::Relaxed);
        let clients: Result<Vec<()>> =
            clients.into_iter().map(|client| client.join().map_err(|_| anyhow!("a panic"))).collect();
        let closed = if is_sound { run.close() } else { Ok(()) };
        run.followers_end.store(true, Ordering::Relaxed);
        broken.and(clients).and(closed)
    })?;
    if report.violations.is_empty() {
        report.violations = check::violations(&lock(&run.history));
    }
    run.count(&mut report);
    Ok(report)
}

impl Run<'_> {
    pub(super) fn now(&self) -> Duration {
        self.began.elapsed()
    }

    /// Reads everything once more, and waits until the followers have shown it.
    fn close(&self) -> Result<()> {
        self.system.await_ready()?;
        self.audit()?;
        let until = Instant::now() + FOLLOWERS_LIMIT;
        while check::streams_lack_messages(&lock(&self.history)) && Instant::now() < until {
            thread::sleep(TICK);
        }
        Ok(())
    }

    /// Reports progress, samples memory, and checks the history from time to time, until the time is over or a rule is
    /// broken.
    fn watch(&self, report: &mut Report, go_on: &mut impl FnMut(&Progress) -> bool) -> Vec<Violation> {
        let mut check_at = CHECK_INTERVAL;
        let mut sample_at = Duration::ZERO;
        let mut hits = [0; REPLICAS];
        while self.now() < self.options.duration {
            thread::sleep(TICK);
            if self.now() >= sample_at {
                self.sample(report, &mut hits);
                sample_at = self.now() + Duration::from_secs(1);
            }
            if self.now() >= check_at {
                let started = Instant::now();
                let violations = check::violations(&lock(&self.history));
                if !violations.is_empty() {
                    return violations;
                }
                check_at = self.now() + CHECK_INTERVAL.max(10 * started.elapsed());
            }
            let last_fault = lock(&self.faults).last().map_or("", |(_, fault)| fault.name()).to_owned();
            let operations = lock(&self.history).operations.len();
            if !go_on(&Progress { elapsed: self.now(), operations, last_fault }) {
                break;
            }
        }
        Vec::new()
    }

    fn sample(&self, report: &mut Report, hits: &mut [u64; REPLICAS]) {
        let slot = (self.now().as_secs() / 10) as usize;
        if report.resident_kib.len() <= slot {
            report.resident_kib.resize(slot + 1, 0);
        }
        for (replica, seen) in self.system.replicas.iter().zip(hits) {
            let resident = replica.resident_kib().unwrap_or(0);
            report.resident_kib[slot] = report.resident_kib[slot].max(resident);
            if let Some(now) = window_hits(replica) {
                // A new process counts from zero.
                report.window_hits += if now >= *seen { now - *seen } else { now };
                *seen = now;
            }
        }
    }

    fn count(&self, report: &mut Report) {
        report.elapsed = self.now();
        let history = lock(&self.history);
        for event in history.followers.iter().flat_map(|follower| &follower.events) {
            match event.told {
                Told::Ready { resumed, .. } => {
                    report.streams += 1;
                    report.resumed_streams += u64::from(resumed);
                }
                Told::Message { .. } => report.streamed += 1,
                _ => {}
            }
        }
        for operation in &history.operations {
            match &operation.outcome {
                Outcome::Acknowledged { replayed, .. } => {
                    report.acknowledged += 1;
                    report.replayed += u64::from(*replayed);
                }
                Outcome::Page { stale, .. } => {
                    report.reads += 1;
                    report.stale_reads += u64::from(*stale);
                }
                Outcome::Unknown(reason) => *report.unanswered.entry(reason).or_default() += 1,
                Outcome::Done | Outcome::Refused(_) | Outcome::Wrong(_) => {}
            }
        }
        const LAST: usize = 8;
        let faults = lock(&self.faults);
        for (_, fault) in &*faults {
            *report.faults.entry(fault.name()).or_default() += 1;
        }
        let last = &faults[faults.len().saturating_sub(LAST)..];
        report.last_faults =
            last.iter().map(|(began, fault)| format!("  {:.4} s  {fault:?}", began.as_secs_f64())).collect();
    }

    pub(super) fn users(&self, conversation: usize, side: usize) -> [&User; 2] {
        let [one, other] = CONVERSATIONS[conversation].map(|user| &self.system.users[user]);
        if side == 0 { [one, other] } else { [other, one] }
    }

    /// Reads every message: through each replica, page by page, and from Postgres itself.
    fn audit(&self) -> Result<()> {
        const LIMIT: i64 = 100;
        let mut stored = Vec::new();
        for conversation in 0..CONVERSATIONS.len() {
            let [one, other] = self.users(conversation, 0);
            for replica in 0..REPLICAS {
                let mut client = UserClient::new(self, WRITERS + READERS, one, other, conversation);
                let mut page = Page::Offset { offset: 0, limit: LIMIT };
                while let Some(oldest) = client.read(replica, page).map_err(|why| anyhow!("audit: {why}"))? {
                    page = Page::Before { seq: oldest, limit: LIMIT };
                }
            }
            let rows = self.system.stored(one, other)?;
            let mut history = lock(&self.history);
            let messages = rows.into_iter().map(|row| {
                let mut fields = row.into_iter().flatten();
                let mut field = || fields.next().context("a column is NULL");
                let (id, seq, sender) = (field()?, field()?.parse()?, field()?);
                let recipient = if sender == one.id { &other.id } else { &one.id }.clone();
                let (content, created_at) = (field()?, field()?);
                let erased = content.is_empty();
                let message = Message { id, seq, sender, recipient, content, created_at, erased };
                Ok(history.intern(message))
            });
            let messages = messages.collect::<Result<Vec<_>>>()?;
            drop(history);
            stored.push(messages);
        }
        lock(&self.history).stored = Some(stored);
        Ok(())
    }
}
