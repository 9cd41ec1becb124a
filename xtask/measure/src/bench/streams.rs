//! Streams: how soon a message is on one, what a delivery and an idle stream cost, and what a restart does to many.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use harness::{Replica, User};
use load::{Followers, Pair, Sent, Shown, Targets};
use rustix::process::{Resource, Rlimit, Signal, getrlimit, setrlimit};

use super::cpu::Cpu;
use super::measures::{CONNECTIONS, resident_kib};
use super::setup::{Setup, create_users};
use super::{Bench, Goal, Row, median};

/// Each follows its stream; they write to each other in pairs.
const TALKERS: usize = 128;

/// Messages a second, far from what the service can do: then a delay is not a queue's.
const RATE: f64 = 200.0;

const IDLE: [usize; 2] = [10_000, 50_000];

/// Sockets of this process, and of the service, that are no streams.
const OTHER_FILES: usize = 1000;

/// Over how long a stopping replica ends its streams: the default.
const DRAIN: Duration = Duration::from_secs(30);

const RECONNECTING: usize = 10_000;

/// Messages a second while streams reconnect.
const RECONNECTING_RATE: f64 = 100.0;

const OPEN_LIMIT: Duration = Duration::from_secs(120);
const DELIVERY_LIMIT: Duration = Duration::from_secs(10);

/// No server listens there.
const NO_REDIS: &str = "redis://127.0.0.1:1/0";

pub(crate) fn stream(bench: &Bench, setup: &mut Setup) -> Result<Vec<Row>> {
    let files = raise_file_limit()?;
    let users = create_users(setup, IDLE[IDLE.len() - 1].min(files))?;
    let mut rows = Vec::new();
    for (replicas, redis) in [(1, true), (2, true), (1, false), (2, false)] {
        rows.push(delay(bench, setup, &users[..TALKERS], replicas, redis)?);
    }
    rows.push(throughput(bench, setup, &users[..TALKERS])?);
    for wanted in IDLE {
        let streams = wanted.min(files);
        rows.push(idle(bench, setup, &users[..streams], wanted)?);
    }
    Ok(rows)
}

/// Raises the limit of open files, which the replicas inherit, as far as it goes. Returns how many streams it allows.
fn raise_file_limit() -> Result<usize> {
    let limit = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum })?;
    let files = limit.maximum.and_then(|files| files.try_into().ok()).unwrap_or(usize::MAX);
    Ok(files.saturating_sub(OTHER_FILES))
}

fn start_replicas(bench: &Bench, setup: &Setup, count: usize, redis: bool) -> Result<Vec<Replica>> {
    let mut variables = vec![
        ("STREAM_MAX_SECONDS", "86400".to_owned()),
        ("STREAMS_MAX", "100000".to_owned()),
        ("STREAM_DRAIN_SECONDS", DRAIN.as_secs().to_string()),
    ];
    if !redis {
        variables.push(("REDIS_URL", NO_REDIS.to_owned()));
    }
    (0..count).map(|_| setup.start_replica_with(&bench.dir, &bench.binary, &variables)).collect()
}

fn targets(replicas: &[Replica]) -> Targets {
    Targets::new(replicas.iter().map(|replica| replica.public).collect())
}

fn tokens(users: &[User]) -> Vec<String> {
    users.iter().map(|user| user.token.clone()).collect()
}

fn pairs(users: &[User]) -> Vec<Pair> {
    let pair = |(number, two): (usize, &[User])| Pair {
        conversation: number as u32,
        token: two[0].token.clone(),
        recipient: two[1].id.clone(),
    };
    users.chunks_exact(2).enumerate().map(pair).collect()
}

fn write_for(duration: Duration, targets: &Targets, users: &[User], rate: Option<f64>) -> Result<Sent> {
    let stop = Arc::new(AtomicBool::new(false));
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| load::write(targets, pairs(users), CONNECTIONS, rate, &stop));
        std::thread::sleep(duration);
        stop.store(true, Ordering::Relaxed);
        writer.join().ok().context("the writers panicked")?
    })
}

/// From before a message is sent until it is on the recipient's stream, which with two replicas is on the other one.
fn delay(bench: &Bench, setup: &Setup, users: &[User], replicas: usize, redis: bool) -> Result<Row> {
    let (mut p50, mut p99, mut answered) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..bench.rounds {
        let replicas = start_replicas(bench, setup, replicas, redis)?;
        let targets = targets(&replicas);
        let followers = Followers::start(&targets, tokens(users), OPEN_LIMIT)?;
        // All sends go to the first replica; each second stream is on the other one, if there is one.
        targets.set(vec![replicas[0].public]);
        // A new replica's first second is not what is measured.
        let warm_up = write_for(Duration::from_secs(1), &targets, users, Some(RATE))?.report.latencies.len();
        followers.await_shown(2 * warm_up, DELIVERY_LIMIT);
        let before = followers.shown();
        let sent = write_for(bench.duration, &targets, users, Some(RATE))?;
        sent.report.clone().all(201)?;
        followers.await_shown(before + 2 * sent.report.latencies.len(), DELIVERY_LIMIT);
        let (shown, _) = followers.stop()?;
        let of_recipients = shown[before..].iter().filter(|shown| shown.stream % 2 == 1);
        let mut delays: Vec<Duration> = of_recipients.map(|shown| shown.after).collect();
        ensure!(delays.len() >= sent.report.latencies.len(), "a message was not delivered");
        delays.sort_unstable();
        let ms = |share: f64| delays[((delays.len() - 1) as f64 * share) as usize].as_secs_f64() * 1e3;
        p50.push(ms(0.5));
        p99.push(ms(0.99));
        answered.push(sent.report.quantile(0.99).as_secs_f64() * 1e3);
    }
    let (count, with) =
        (if replicas == 1 { "1 replica" } else { "the other of 2 replicas" }, if redis { "" } else { "out" });
    let floor = if redis { 1000.0 } else { 2000.0 };
    Ok(Row {
        name: "stream",
        what: format!("p99 from before a send to the recipient's stream, {count}, with{with} Redis"),
        detail: format!(
            "p50 {:.2} ms; POST /send p99 {:.2} ms; {RATE} messages/s",
            median(&p50),
            median(&answered)
        ),
        values: p99,
        unit: "ms",
        goal: Some(Goal::AtMost { floor, aim: if redis { 100.0 } else { 1100.0 } }),
    })
}

/// Deliveries a second while clients send as fast as they are answered, and what one costs.
fn throughput(bench: &Bench, setup: &mut Setup, users: &[User]) -> Result<Row> {
    let (mut rates, mut costs, mut details) = (Vec::new(), Vec::new(), String::new());
    for _ in 0..bench.rounds {
        let replicas = start_replicas(bench, setup, 1, true)?;
        let others = std::mem::replace(&mut setup.replicas, replicas);
        let targets = targets(&setup.replicas);
        write_for(Duration::from_secs(1), &targets, users, None)?;
        let before = Cpu::now(setup);
        let without = write_for(bench.duration, &targets, users, None)?.report.all(201)?;
        let alone = before.per_answer(&Cpu::now(setup), without.latencies.len());
        let followers = Followers::start(&targets, tokens(users), OPEN_LIMIT)?;
        let before = Cpu::now(setup);
        let sent = write_for(bench.duration, &targets, users, None)?.report.all(201)?;
        let deliveries = 2 * sent.latencies.len();
        followers.await_shown(deliveries, DELIVERY_LIMIT);
        let followed = before.per_answer(&Cpu::now(setup), sent.latencies.len());
        ensure!(followers.shown() == deliveries, "{} of {deliveries} were delivered", followers.shown());
        followers.stop()?;
        setup.replicas = others;
        rates.push(2.0 * sent.rate());
        costs.push((followed.service - alone.service) / 2.0);
        details = format!(
            "{:.1} us of the service's processor each, {:.1} of Postgres'; sends {:.0}/s, without streams {:.0}/s",
            median(&costs),
            (followed.postgres - alone.postgres) / 2.0,
            sent.rate(),
            without.rate()
        );
    }
    let what = "deliveries, 64 connections send in a closed loop to 128 streams".to_owned();
    Ok(Row { name: "stream", what, values: rates, unit: "/s", goal: None, detail: details })
}

/// Memory of an idle stream: the process's own, and of the kernel's half of what all sockets took.
fn idle(bench: &Bench, setup: &Setup, users: &[User], wanted: usize) -> Result<Row> {
    let replicas = start_replicas(bench, setup, 1, true)?;
    std::thread::sleep(Duration::from_secs(2));
    let (before, slab_before) = (resident_kib(&replicas[0])?, slab_kib()?);
    let began = Instant::now();
    let followers = Followers::start(&targets(&replicas), tokens(users), OPEN_LIMIT)?;
    let opening = began.elapsed();
    // Every stream has shown its first comment.
    std::thread::sleep(Duration::from_secs(16));
    let resident = (resident_kib(&replicas[0])? as f64 - before as f64) / users.len() as f64;
    let kernel = (slab_kib()? as f64 - slab_before as f64) / 2.0 / users.len() as f64;
    ensure!(followers.open() == users.len(), "streams have ended: {} are open", followers.open());
    followers.stop()?;
    let limit =
        if users.len() < wanted { format!(" (of {wanted}: the limit of open files)") } else { String::new() };
    Ok(Row {
        name: "stream",
        what: format!("memory of an idle stream, the kernel's included, {} streams{limit}", users.len()),
        values: vec![resident + kernel],
        unit: "KiB",
        goal: Some(Goal::AtMost { floor: 12.0, aim: 6.0 }),
        detail: format!(
            "process {resident:.2} KiB, kernel {kernel:.2} KiB; opened {:.0}/s",
            users.len() as f64 / opening.as_secs_f64()
        ),
    })
}

/// What the kernel's objects take, sockets among them.
fn slab_kib() -> Result<u64> {
    let info = std::fs::read_to_string("/proc/meminfo").context("the kernel's memory is read from /proc")?;
    let line = info.lines().find(|line| line.starts_with("Slab:")).context("a line Slab")?;
    Ok(line.split_whitespace().nth(1).context("a number")?.parse()?)
}

/// One of two replicas is replaced under load, as a rolling update does it.
pub(crate) fn reconnect(bench: &Bench, setup: &mut Setup) -> Result<Vec<Row>> {
    let streams = RECONNECTING.min(raise_file_limit()?);
    let users = create_users(setup, streams)?;
    let mut rounds = Vec::new();
    for _ in 0..bench.rounds {
        rounds.push(replace_one(bench, setup, &users)?);
    }
    let row = |what: &str, value: fn(&Replaced) -> f64, unit, goal, detail: String| Row {
        name: "reconnect",
        what: format!("{streams} streams, one of two replicas replaced: {what}"),
        values: rounds.iter().map(value).collect(),
        unit,
        goal,
        detail,
    };
    let last = rounds.last().context("a round")?;
    let at_most = |floor| Some(Goal::AtMost { floor, aim: floor });
    Ok(vec![
        row(
            "reconnects a second at the peak to those planned",
            |round| round.peak / round.planned,
            "x",
            at_most(2.0),
            format!("peak {:.0}/s, planned {:.0}/s", last.peak, last.planned),
        ),
        row("sends that failed", |round| round.failed, "", at_most(0.0), format!("of {}", last.sent)),
        row(
            "p99 of POST /send meanwhile",
            |round| round.p99,
            "ms",
            None,
            format!("before {:.2} ms; {RECONNECTING_RATE} messages/s", last.p99_before),
        ),
        row(
            "messages lost or doubled",
            |round| round.wrong,
            "",
            at_most(0.0),
            format!("of {} shown", last.shown),
        ),
    ])
}

struct Replaced {
    peak: f64,
    planned: f64,
    failed: f64,
    sent: usize,
    p99: f64,
    p99_before: f64,
    wrong: f64,
    shown: usize,
}

fn replace_one(bench: &Bench, setup: &Setup, users: &[User]) -> Result<Replaced> {
    let mut replicas = start_replicas(bench, setup, 2, true)?;
    let targets = targets(&replicas);
    let followers = Followers::start(&targets, tokens(users), OPEN_LIMIT)?;
    let stop = Arc::new(AtomicBool::new(false));
    let (sent, stopped, ended) = std::thread::scope(|scope| {
        let began = Instant::now();
        let writer =
            scope.spawn(|| load::write(&targets, pairs(users), CONNECTIONS, Some(RECONNECTING_RATE), &stop));
        let replaced = (|| {
            std::thread::sleep(bench.duration.max(Duration::from_secs(10)));
            replicas.extend(start_replicas(bench, setup, 1, true)?);
            targets.set(replicas[1..].iter().map(|replica| replica.public).collect());
            let stopped = began.elapsed();
            replicas[0].signal(Signal::TERM);
            let deadline = Instant::now() + 2 * DRAIN;
            while !replicas[0].has_died() {
                ensure!(Instant::now() < deadline, "the replica did not end");
                std::thread::sleep(Duration::from_millis(100));
            }
            let ended = began.elapsed();
            followers.await_open(users.len(), OPEN_LIMIT)?;
            std::thread::sleep(Duration::from_secs(2));
            Ok((stopped, ended))
        })();
        stop.store(true, Ordering::Relaxed);
        let sent = writer.join().ok().context("the writers panicked")??;
        let (stopped, ended) = replaced?;
        Ok::<_, anyhow::Error>((sent, stopped, ended))
    })?;
    let acknowledged = sent.report.count(201) as usize;
    followers.await_shown(2 * acknowledged, DELIVERY_LIMIT);
    let (shown, opened) = followers.stop()?;
    let during = |(at, _): &&(Duration, Duration)| (stopped..ended).contains(at);
    let before = |(at, _): &&(Duration, Duration)| *at < stopped;
    Ok(Replaced {
        peak: peak(&opened[users.len()..]),
        planned: users.len() as f64 / 2.0 / DRAIN.as_secs_f64(),
        failed: (sent.report.latencies.len() - acknowledged) as f64,
        sent: sent.report.latencies.len(),
        p99: p99(sent.at.iter().filter(during)),
        p99_before: p99(sent.at.iter().filter(before)),
        wrong: wrong(&shown, &sent) as f64,
        shown: shown.len(),
    })
}

/// The most within one second.
fn peak(opened: &[Instant]) -> f64 {
    let mut first = 0;
    let within = |(last, at): (usize, &Instant)| {
        while *at - opened[first] > Duration::from_secs(1) {
            first += 1;
        }
        last + 1 - first
    };
    opened.iter().enumerate().map(within).max().unwrap_or_default() as f64
}

/// In ms.
fn p99<'a>(sends: impl Iterator<Item = &'a (Duration, Duration)>) -> f64 {
    let mut latencies: Vec<Duration> = sends.map(|(_, latency)| *latency).collect();
    latencies.sort_unstable();
    let index = (latencies.len().saturating_sub(1) as f64 * 0.99) as usize;
    latencies.get(index).map_or(f64::NAN, Duration::as_secs_f64) * 1e3
}

/// Each acknowledged message is once, in order, on the sender's stream and on the recipient's. Returns how many are not.
fn wrong(shown: &[Shown], sent: &Sent) -> usize {
    let mut next = std::collections::BTreeMap::new();
    let mut out_of_order = 0;
    let mut count = std::collections::BTreeMap::new();
    for message in shown {
        let key = (message.stream, message.conversation);
        let expected = next.entry(key).or_insert(message.seq);
        out_of_order += usize::from(*expected != message.seq);
        *expected = message.seq + 1;
        *count.entry(key).or_insert(0_u32) += 1;
    }
    let lacking = sent.acknowledged.iter().flat_map(|(conversation, acknowledged)| {
        let of = |stream| count.get(&(stream, *conversation)).copied().unwrap_or(0);
        [2 * conversation, 2 * conversation + 1].map(|stream| acknowledged.abs_diff(of(stream)) as usize)
    });
    out_of_order + lacking.sum::<usize>()
}
