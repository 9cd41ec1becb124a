//! Drives a history: clients, faults, and the judge's look at what came of it.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow};
use rustix::process::Signal;
use serde_json::Value;

use super::check::{self, Violation};
use super::plan::{self, CONVERSATIONS, Fault, Look, PATIENT, READERS, REPLICAS, WRITERS};
use super::proxy::Line;
use super::rig::{Rig, lock, mend, window_hits};
use super::{Action, History, Message, Operation, Outcome, Page};
use crate::User;
use crate::http::{Client, Lost};

/// Without faults, before the end: everything has to work again.
const CALM: Duration = Duration::from_secs(3);

/// After a failed request, so that clients of a replica that is down do not spin.
const BACK_OFF: Duration = Duration::from_millis(20);

/// The longest that a client goes on repeating a message.
const RETRY_LIMIT: Duration = Duration::from_secs(20);

const JUDGE_INTERVAL: Duration = Duration::from_secs(2);
const TICK: Duration = Duration::from_millis(200);

#[derive(Clone, Debug)]
pub struct Options {
    pub seed: u64,
    pub duration: Duration,
    pub binary: PathBuf,
    /// More variables for the replicas.
    pub environment: Vec<(String, String)>,
}

/// What a run is at.
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
    /// By reason.
    pub unanswered: BTreeMap<&'static str, u64>,
    /// Reads that a window answered, as the replicas count them.
    pub window_hits: u64,
    pub faults: BTreeMap<&'static str, u64>,
    /// The greatest of every ten seconds, of either replica.
    pub resident_kib: Vec<u64>,
    pub violations: Vec<Violation>,
}

struct Run<'a> {
    options: &'a Options,
    rig: &'a Rig,
    began: Instant,
    history: Mutex<History>,
    faults: Mutex<Vec<Fault>>,
    /// The newest seq that anybody has seen of each conversation, for pages relative to it.
    newest: [AtomicI64; CONVERSATIONS.len()],
    faults_end: AtomicBool,
    end: AtomicBool,
}

/// Runs to the end, or to the first violation, or until `go_on` says no.
pub fn run(options: &Options, mut go_on: impl FnMut(&Progress) -> bool) -> Result<Report> {
    let rig = Rig::start(&options.binary, &options.environment)?;
    let run = Run {
        options,
        rig: &rig,
        began: Instant::now(),
        history: Mutex::default(),
        faults: Mutex::default(),
        newest: Default::default(),
        faults_end: AtomicBool::new(false),
        end: AtomicBool::new(false),
    };
    let mut report = Report::default();
    thread::scope(|scope| -> Result<()> {
        let faults = [
            scope.spawn(|| run.break_things(plan::line_fault)),
            scope.spawn(|| run.break_things(plan::process_fault)),
        ];
        for client in 0..WRITERS {
            let run = &run;
            scope.spawn(move || run.write(client));
        }
        for client in WRITERS..WRITERS + READERS {
            let run = &run;
            scope.spawn(move || run.read(client));
        }
        report.violations = run.watch(&mut report, &mut go_on);
        run.faults_end.store(true, Ordering::Relaxed);
        let broken: Result<Vec<()>> =
            faults.into_iter().map(|fault| fault.join().map_err(|_| anyhow!("a panic"))?).collect();
        if report.violations.is_empty() && broken.is_ok() {
            thread::sleep(CALM);
        }
        run.end.store(true, Ordering::Relaxed);
        broken.map(drop)
    })?;
    if report.violations.is_empty() {
        rig.await_ready()?;
        run.audit()?;
        report.violations = check::judge(&lock(&run.history));
    }
    run.count(&mut report);
    Ok(report)
}

impl Run<'_> {
    fn now(&self) -> Duration {
        self.began.elapsed()
    }

    /// Reports, samples, and judges what is there from time to time, until the time is over or a rule is broken.
    fn watch(&self, report: &mut Report, go_on: &mut impl FnMut(&Progress) -> bool) -> Vec<Violation> {
        let mut judge_at = JUDGE_INTERVAL;
        let mut sample_at = Duration::ZERO;
        let mut hits = [0; REPLICAS];
        while self.now() < self.options.duration {
            thread::sleep(TICK);
            if self.now() >= sample_at {
                self.sample(report, &mut hits);
                sample_at = self.now() + Duration::from_secs(1);
            }
            if self.now() >= judge_at {
                let asked = Instant::now();
                let violations = check::judge(&lock(&self.history));
                if !violations.is_empty() {
                    return violations;
                }
                judge_at = self.now() + JUDGE_INTERVAL.max(10 * asked.elapsed());
            }
            let last_fault = lock(&self.faults).last().map_or("", |fault| fault.name()).to_owned();
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
        for (replica, seen) in self.rig.replicas.iter().zip(hits) {
            let resident = replica.resident_kib().unwrap_or(0);
            report.resident_kib[slot] = report.resident_kib[slot].max(resident);
            if let Some(now) = window_hits(replica) {
                // A new process counts from nothing.
                report.window_hits += if now >= *seen { now - *seen } else { now };
                *seen = now;
            }
        }
    }

    fn count(&self, report: &mut Report) {
        report.elapsed = self.now();
        for operation in &lock(&self.history).operations {
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
                Outcome::Wrong(_) => {}
            }
        }
        for fault in &*lock(&self.faults) {
            *report.faults.entry(fault.name()).or_default() += 1;
        }
    }

    fn write(&self, client: u32) {
        let conversation = client as usize / 2;
        let [sender, recipient] = self.users(conversation, client as usize % 2);
        let mut hands = Hands::new(self, client, sender, recipient, conversation);
        for index in 0.. {
            if self.end.load(Ordering::Relaxed) {
                return;
            }
            let step = plan::send(self.options.seed, client, index);
            thread::sleep(step.pause);
            let content = format!("{client}.{index} {}", "x".repeat(step.length)).trim_end().to_owned();
            let keyed = step.retries.is_some();
            let mut acknowledged = hands.send(step.replica, &content, keyed, step.patience);
            let deadline = Instant::now() + RETRY_LIMIT;
            for replica in step.retries.iter().flatten().cycle() {
                if acknowledged || Instant::now() >= deadline {
                    break;
                }
                acknowledged = hands.send(*replica, &content, keyed, PATIENT);
            }
            if !acknowledged {
                continue;
            }
            for replica in step.looks {
                // What came of it is in the history.
                let _ = hands.look(replica, Page::Offset { offset: 0, limit: 5 });
            }
            if let Some(replica) = step.repeated_on {
                hands.send(replica, &content, keyed, PATIENT);
            }
        }
    }

    fn read(&self, client: u32) {
        let mut all: Vec<[Hands<'_>; 2]> = (0..CONVERSATIONS.len())
            .map(|conversation| {
                [0, 1].map(|side| {
                    let [reader, peer] = self.users(conversation, side);
                    Hands::new(self, client, reader, peer, conversation)
                })
            })
            .collect();
        for index in 0.. {
            if self.end.load(Ordering::Relaxed) {
                return;
            }
            let step = plan::reads(self.options.seed, client, index);
            thread::sleep(step.pause);
            let hands = &mut all[step.conversation][step.side];
            for (replica, look) in step.reads {
                let newest = self.newest[step.conversation].load(Ordering::Relaxed);
                let page = match look {
                    Look::Newest { offset, limit } => Page::Offset { offset, limit },
                    Look::Before { back, limit } => Page::Before { seq: (newest - back).max(1), limit },
                    Look::After { back, limit } => Page::After { seq: (newest - back).max(0), limit },
                };
                let _ = hands.look(replica, page);
            }
        }
    }

    fn users(&self, conversation: usize, side: usize) -> [&User; 2] {
        let [one, other] = CONVERSATIONS[conversation].map(|user| &self.rig.users[user]);
        if side == 0 { [one, other] } else { [other, one] }
    }

    /// Applies one fault after another until the time for that is over, and mends what it broke.
    fn break_things(&self, next: impl Fn(u64, u64) -> (Duration, Fault)) -> Result<()> {
        let mut outcome = Ok(());
        for index in 0.. {
            let (pause, fault) = next(self.options.seed, index);
            self.wait(pause);
            if self.faults_end.load(Ordering::Relaxed) || self.now() >= self.options.duration {
                break;
            }
            lock(&self.faults).push(fault);
            outcome = self.apply(fault).with_context(|| fault.name());
            if outcome.is_err() {
                break;
            }
        }
        mend(self.rig);
        outcome
    }

    fn apply(&self, fault: Fault) -> Result<()> {
        let rig = self.rig;
        match fault {
            Fault::RedisFlush => rig.tell_redis("FLUSHALL")?,
            Fault::RedisDropsClients => rig.tell_redis("CLIENT KILL TYPE normal")?,
            Fault::RedisPause(time) => {
                lock(&rig.redis).pause();
                self.wait(time);
                lock(&rig.redis).resume();
            }
            Fault::RedisKill { down } => {
                lock(&rig.redis).kill()?;
                self.wait(down);
                lock(&rig.redis).restart()?;
            }
            Fault::RedisRollback { age } => {
                rig.tell_redis("SAVE")?;
                self.wait(age);
                let mut redis = lock(&rig.redis);
                redis.kill()?;
                redis.restart()?;
            }
            Fault::Line { server, replica, line, time } => {
                rig.line(server, replica).set(line);
                self.wait(time);
                rig.line(server, replica).set(Line::Open);
            }
            Fault::PostgresPause(time) => {
                if let Some(postgres) = &mut *lock(&rig.postgres) {
                    postgres.pause();
                    self.wait(time);
                    postgres.resume();
                }
            }
            Fault::PostgresRestart => lock(&rig.postgres).as_mut().map_or(Ok(()), |it| it.restart())?,
            Fault::PostgresKill { down } => {
                if let Some(postgres) = &mut *lock(&rig.postgres) {
                    postgres.kill()?;
                    self.wait(down);
                    postgres.restart()?;
                }
            }
            Fault::ReplicaKill { replica, down } => {
                rig.replicas[replica].kill();
                self.wait(down);
                rig.replicas[replica].launch()?;
            }
            Fault::ReplicaPause { replica, time } => {
                rig.replicas[replica].signal(Signal::STOP);
                self.wait(time);
                rig.replicas[replica].signal(Signal::CONT);
            }
            Fault::ReplicaStop { replica } => {
                rig.replicas[replica].stop()?;
                rig.replicas[replica].launch()?;
            }
        }
        for (number, replica) in rig.replicas.iter().enumerate() {
            anyhow::ensure!(!replica.has_died(), "replica {number} has ended:\n{}", replica.last_words());
        }
        Ok(())
    }

    /// Shorter when the faults are over.
    fn wait(&self, time: Duration) {
        let until = Instant::now() + time;
        while Instant::now() < until && !self.faults_end.load(Ordering::Relaxed) {
            thread::sleep(until.saturating_duration_since(Instant::now()).min(Duration::from_millis(20)));
        }
    }

    /// Reads everything: through each replica, page by page, and from Postgres itself.
    fn audit(&self) -> Result<()> {
        const LIMIT: i64 = 100;
        let mut stored = Vec::new();
        for conversation in 0..CONVERSATIONS.len() {
            let [one, other] = self.users(conversation, 0);
            for replica in 0..REPLICAS {
                let mut hands = Hands::new(self, WRITERS + READERS, one, other, conversation);
                let mut page = Page::Offset { offset: 0, limit: LIMIT };
                while let Some(oldest) = hands.look(replica, page).map_err(|why| anyhow!("audit: {why}"))? {
                    page = Page::Before { seq: oldest, limit: LIMIT };
                }
            }
            let rows = self.rig.stored(one, other)?;
            let mut history = lock(&self.history);
            let messages = rows.into_iter().map(|row| {
                let mut fields = row.into_iter().flatten();
                let mut field = || fields.next().context("a column is NULL");
                let (id, seq, sender) = (field()?, field()?.parse()?, field()?);
                let recipient = if sender == one.id { &other.id } else { &one.id }.clone();
                let message = Message { id, seq, sender, recipient, content: field()?, created_at: field()? };
                Ok(history.shown(message))
            });
            let messages = messages.collect::<Result<Vec<_>>>()?;
            drop(history);
            stored.push(messages);
        }
        lock(&self.history).stored = Some(stored);
        Ok(())
    }
}

/// One user of a conversation at work: a connection to each replica.
struct Hands<'a> {
    run: &'a Run<'a>,
    client: u32,
    user: &'a User,
    peer: &'a User,
    conversation: usize,
    connections: Vec<Client>,
}

impl<'a> Hands<'a> {
    fn new(run: &'a Run<'a>, client: u32, user: &'a User, peer: &'a User, conversation: usize) -> Self {
        let connections = run.rig.replicas.iter().map(|replica| Client::new(replica.public)).collect();
        Self { run, client, user, peer, conversation, connections }
    }

    /// True when it was acknowledged.
    fn send(&mut self, replica: usize, content: &str, keyed: bool, patience: Duration) -> bool {
        let body = format!(r#"{{"recipient_id":"{}","content":"{content}"}}"#, self.peer.id);
        let key = content.split(' ').next().unwrap_or(content);
        let authorization = format!("Bearer {}", self.user.token);
        let mut headers = vec![("authorization", &*authorization)];
        if keyed {
            headers.push(("idempotency-key", key));
        }
        let start = self.run.now();
        let answer = self.connections[replica].request("POST", "/send", &headers, &body, patience);
        let end = self.run.now();
        let mut history = lock(&self.run.history);
        let outcome = match answer {
            Ok(answer) if answer.status == 201 => {
                let replayed = answer.header("idempotency-replayed") == Some("true");
                match serde_json::from_slice(&answer.body).ok().as_ref().and_then(message) {
                    Some(message) => {
                        self.run.newest[self.conversation].fetch_max(message.seq, Ordering::Relaxed);
                        Outcome::Acknowledged { message: history.shown(message), replayed }
                    }
                    None => wrong(201, &answer.body),
                }
            }
            Ok(answer) if answer.status == 503 => Outcome::Unknown("503"),
            Ok(answer) => wrong(answer.status, &answer.body),
            Err(lost) => Outcome::Unknown(lost.reason()),
        };
        let acknowledged = matches!(outcome, Outcome::Acknowledged { .. });
        let lost = matches!(outcome, Outcome::Unknown(_));
        let action = Action::Send { content: content.to_owned(), keyed };
        history.operations.push(self.operation(replica, start, end, action, outcome));
        drop(history);
        if lost {
            thread::sleep(BACK_OFF);
        }
        acknowledged
    }

    /// The oldest seq of the page, if there is any; an error tells why there is no page.
    fn look(&mut self, replica: usize, page: Page) -> Result<Option<i64>, &'static str> {
        let query = match page {
            Page::Offset { offset: 0, limit } => format!("limit={limit}"),
            Page::Offset { offset, limit } => format!("limit={limit}&offset={offset}"),
            Page::Before { seq, limit } => format!("limit={limit}&before={seq}"),
            Page::After { seq, limit } => format!("limit={limit}&after={seq}"),
        };
        let path = format!("/messages?peer_id={}&{query}", self.peer.id);
        let authorization = format!("Bearer {}", self.user.token);
        let headers = [("authorization", &*authorization)];
        let start = self.run.now();
        let answer = self.connections[replica].request("GET", &path, &headers, "", PATIENT);
        let end = self.run.now();
        let (outcome, oldest) = self.page(answer);
        let lost = if let Outcome::Unknown(reason) = outcome { Some(reason) } else { None };
        let operation = self.operation(replica, start, end, Action::Read(page), outcome);
        lock(&self.run.history).operations.push(operation);
        if let Some(reason) = lost {
            thread::sleep(BACK_OFF);
            return Err(reason);
        }
        Ok(oldest)
    }

    fn page(&self, answer: Result<crate::http::Answer, Lost>) -> (Outcome, Option<i64>) {
        let answer = match answer {
            Ok(answer) if answer.status == 200 => answer,
            Ok(answer) if answer.status == 503 => return (Outcome::Unknown("503"), None),
            Ok(answer) => return (wrong(answer.status, &answer.body), None),
            Err(lost) => return (Outcome::Unknown(lost.reason()), None),
        };
        let stale = answer.header("warning").is_some_and(|warning| warning.starts_with("110"));
        let next = answer.header("link").is_some_and(|link| link.contains("rel=\"next\""));
        let parsed: Option<Vec<Message>> = serde_json::from_slice::<Value>(&answer.body)
            .ok()
            .and_then(|page| page.as_array()?.iter().map(message).collect());
        let Some(parsed) = parsed else { return (wrong(200, &answer.body), None) };
        let oldest = parsed.last().map(|message| message.seq);
        if let Some(newest) = parsed.first() {
            self.run.newest[self.conversation].fetch_max(newest.seq, Ordering::Relaxed);
        }
        let mut history = lock(&self.run.history);
        let messages = parsed.into_iter().map(|message| history.shown(message)).collect();
        (Outcome::Page { messages, stale, next }, oldest)
    }

    fn operation(
        &self,
        replica: usize,
        start: Duration,
        end: Duration,
        action: Action,
        outcome: Outcome,
    ) -> Operation {
        Operation {
            client: self.client,
            replica,
            conversation: self.conversation,
            start,
            end,
            action,
            outcome,
        }
    }
}

fn wrong(status: u16, body: &[u8]) -> Outcome {
    Outcome::Wrong(format!("{status} {}", String::from_utf8_lossy(&body[..body.len().min(300)])))
}

/// A message of an answer, if it has all that a message has.
fn message(value: &Value) -> Option<Message> {
    let text = |name: &str| value[name].as_str().map(str::to_owned);
    let created_at = text("created_at")?;
    let (seconds, fraction) =
        created_at.strip_suffix('Z')?.split_once('.').unwrap_or((created_at.strip_suffix('Z')?, ""));
    Some(Message {
        id: text("id")?,
        seq: value["seq"].as_i64()?,
        sender: text("sender_id")?,
        recipient: text("recipient_id")?,
        content: text("content")?,
        created_at: format!("{seconds}.{fraction:0<6}"),
    })
}
