//! Reads as users make them: polling what may have news, opening a conversation and scrolling back, one read again and
//! again, and pages that no window has.

mod data;
mod wrk;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result};
use harness::http;
use load::{Call, Report, Requests, Script};

use super::cpu::Cpu;
use super::measures::CONNECTIONS;
use super::reference::{self, Figures};
use super::setup::Setup;
use super::{Bench, Goal, Row, median, scratch};
use data::{CONVERSATIONS, Data, LONG_CONVERSATIONS, LONG_MESSAGES};

/// Each polls a conversation of its own.
const POLLERS: usize = 2000;
const POLL_EVERY: Duration = Duration::from_secs(3);
/// One poll in so many is followed by a message.
const POLLS_PER_SEND: usize = 20;
/// The fewest polls of each user that are counted.
const POLLS: u32 = 4;

/// Pages that a reader scrolls back.
const OLDER: u32 = 3;

const HOT: usize = 100;

/// Messages that any window may have; a deep page lies below.
const WINDOW: usize = 50;
const PAGE: usize = 5;

/// Fewer than the 64 that keep redis-benchmark's one thread and Redis busy all the time: it has no option for a rate, and
/// with 64 its latencies are those of a queue.
const UNHURRIED: usize = 16;

/// Before a load is counted, windows are filled and tokens verified.
const WARM_UP: Duration = Duration::from_secs(1);

const METRICS_LIMIT: Duration = Duration::from_secs(5);

/// One load in one round.
#[derive(Clone, Copy, Default)]
struct Measured {
    rate: f64,
    /// In ms.
    p50: f64,
    p99: f64,
    p999: f64,
    cpu: Cpu,
    lookups: Lookups,
}

/// What was measured, round by round.
#[derive(Default)]
struct Rounds {
    poll: Vec<Measured>,
    open: Vec<Measured>,
    hot: Vec<Measured>,
    half: Vec<Measured>,
    deep: Vec<Measured>,
    wrk_hot: Vec<Measured>,
    wrk_deep: Vec<Measured>,
    redis: Vec<Measured>,
    unhurried: Vec<Measured>,
    select: Vec<Measured>,
}

pub(crate) fn reads(bench: &Bench, setup: &mut Setup) -> Result<Vec<Row>> {
    let program = wrk::find();
    let data = Data::create(setup)?;
    let mut rounds = Rounds::default();
    for _ in 0..bench.rounds {
        let load = Load { bench, setup, data: &data };
        rounds.poll.push(load.poll()?);
        rounds.open.push(load.open()?);
        rounds.redis.push(load.redis(CONNECTIONS)?);
        rounds.unhurried.push(load.redis(UNHURRIED)?);
        let hot = load.closed(&load.hot_requests())?;
        rounds.half.push(load.half(hot.rate / 2.0)?);
        rounds.hot.push(hot);
        rounds.select.push(load.select()?);
        rounds.deep.push(load.closed(&load.deep_requests())?);
        if let Some(program) = &program {
            rounds.wrk_hot.push(load.wrk(program, hot_reads())?);
            rounds.wrk_deep.push(load.wrk(program, deep_reads())?);
        }
    }
    let mut rows = rounds.rows();
    if program.is_some() {
        rows.extend(rounds.wrk_rows());
    } else {
        println!("  wrk is not installed: its rows are left out");
    }
    Ok(rows)
}

/// Conversation and query of each read.
fn hot_reads() -> impl Iterator<Item = (usize, String)> {
    (0..HOT).map(|n| (n, String::new()))
}

fn deep_reads() -> impl Iterator<Item = (usize, String)> {
    let offsets = (WINDOW..=LONG_MESSAGES - PAGE).step_by(PAGE);
    (0..LONG_CONVERSATIONS)
        .flat_map(move |n| offsets.clone().map(move |offset| (n, format!("&offset={offset}"))))
}

struct Load<'a> {
    bench: &'a Bench,
    setup: &'a Setup,
    data: &'a Data,
}

impl Load<'_> {
    /// 2,000 users poll at random times of their own, and send now and then.
    fn poll(&self) -> Result<Measured> {
        let address = self.setup.address(0);
        let mut users: Vec<(Duration, usize)> =
            (0..POLLERS).map(|n| (POLL_EVERY.mul_f64(fastrand::f64()), LONG_CONVERSATIONS + n)).collect();
        users.sort_unstable();
        let get = |n| Arc::<[u8]>::from(self.data.get(address, n, ""));
        let gets: Vec<_> = users.iter().map(|(_, n)| get(*n)).collect();
        let polls = |rounds: u32| -> Vec<Call> {
            let round = |round| {
                users.iter().zip(&gets).map(move |((phase, n), get)| {
                    let sends = fastrand::usize(..POLLS_PER_SEND) == 0;
                    let then = sends.then(|| self.data.post(address, *n));
                    Call { at: *phase + POLL_EVERY * round, request: Arc::clone(get), then }
                })
            };
            (0..rounds).flat_map(round).collect()
        };
        load::at_times(address, CONNECTIONS, polls(1))?.0.all(200)?;
        let duration = self.bench.duration.as_secs_f64() / POLL_EVERY.as_secs_f64();
        let calls = polls(POLLS.max(duration.ceil() as u32));
        self.measure(|| {
            let (reads, sends) = load::at_times(address, CONNECTIONS, calls)?;
            sends.all(201)?;
            reads.all(200)
        })
    }

    /// A random conversation is opened and scrolled back.
    fn open(&self) -> Result<Measured> {
        let address = self.setup.address(0);
        let newest = (0..CONVERSATIONS).map(|n| self.data.get(address, n, "")).collect();
        self.closed(&Requests::Scroll { newest, older: OLDER })
    }

    /// Hot reads that come at this rate, at times independent of one another.
    fn half(&self, rate: f64) -> Result<Measured> {
        let address = self.setup.address(0);
        let gets: Vec<Arc<[u8]>> =
            hot_reads().map(|(n, query)| self.data.get(address, n, &query).into()).collect();
        let calls = |duration: Duration| {
            let mut calls: Vec<Call> = (0..(rate * duration.as_secs_f64()) as usize)
                .map(|_| Call {
                    at: duration.mul_f64(fastrand::f64()),
                    request: Arc::clone(&gets[fastrand::usize(..gets.len())]),
                    then: None,
                })
                .collect();
            calls.sort_unstable_by_key(|call| call.at);
            calls
        };
        // Made before the warm-up, which must not be followed by a pause: leases would end.
        let counted = calls(self.bench.duration);
        load::at_times(address, CONNECTIONS, calls(WARM_UP))?.0.all(200)?;
        self.measure(|| load::at_times(address, CONNECTIONS, counted)?.0.all(200))
    }

    fn hot_requests(&self) -> Requests {
        self.at_random(hot_reads())
    }

    fn deep_requests(&self) -> Requests {
        self.at_random(deep_reads())
    }

    fn at_random(&self, reads: impl Iterator<Item = (usize, String)>) -> Requests {
        let address = self.setup.address(0);
        Requests::AtRandom(reads.map(|(n, query)| self.data.get(address, n, &query)).collect())
    }

    /// A closed loop of 64 connections.
    fn closed(&self, requests: &Requests) -> Result<Measured> {
        let address = self.setup.address(0);
        let scripts = || vec![Script { address, requests: requests.clone() }; CONNECTIONS];
        load::run(scripts(), WARM_UP)?.all(200)?;
        self.measure(|| load::run(scripts(), self.bench.duration)?.all(200))
    }

    fn wrk(&self, program: &Path, reads: impl Iterator<Item = (usize, String)>) -> Result<Measured> {
        let address = self.setup.address(0);
        let reads = reads.map(|(n, query)| self.data.read(n, &query));
        self.measure_other(|| {
            wrk::run(program, &self.bench.dir, address, CONNECTIONS, self.bench.duration, reads)
        })
    }

    fn redis(&self, connections: usize) -> Result<Measured> {
        self.measure_other(|| reference::redis_get(self.bench, self.setup, connections))
    }

    /// The range of a page as a statement alone, by 64 clients. pgbench prints only the mean latency.
    fn select(&self) -> Result<Measured> {
        let script = scratch(self.bench, "select.sql");
        let last = LONG_CONVERSATIONS - 1;
        let top = LONG_MESSAGES - WINDOW;
        std::fs::write(
            &script,
            format!(
                "\\set n random(0, {last})\n\\set top random({PAGE}, {top})\n\
                 SELECT id, seq, sender_id, content, created_at FROM messages \
                 WHERE conversation_id = {id} AND seq <= :top AND seq > :top - {PAGE} ORDER BY seq DESC;\n",
                id = data::conversation_sql(":n"),
            ),
        )?;
        self.measure_other(|| reference::pgbench(self.bench, self.setup, &script))
    }

    fn measure(&self, load: impl FnOnce() -> Result<Report>) -> Result<Measured> {
        let (lookups, before) = (Lookups::now(self.setup)?, Cpu::now(self.setup));
        let report = load()?;
        let cpu = before.per_answer(&Cpu::now(self.setup), report.latencies.len());
        let ms = |share| report.quantile(share).as_secs_f64() * 1e3;
        Ok(Measured {
            rate: report.rate(),
            p50: ms(0.5),
            p99: ms(0.99),
            p999: ms(0.999),
            cpu,
            lookups: lookups.until(&Lookups::now(self.setup)?),
        })
    }

    /// As `measure`, by another program, which says nothing of the 99.9th percentile.
    fn measure_other(&self, run: impl FnOnce() -> Result<Figures>) -> Result<Measured> {
        let (lookups, before) = (Lookups::now(self.setup)?, Cpu::now(self.setup));
        let Figures { answers, rate, p50, p99 } = run()?;
        let cpu = before.per_answer(&Cpu::now(self.setup), answers);
        let lookups = lookups.until(&Lookups::now(self.setup)?);
        Ok(Measured { rate, p50, p99, p999: f64::NAN, cpu, lookups })
    }
}

/// How the window answered.
#[derive(Clone, Copy, Default)]
struct Lookups {
    hit: f64,
    miss: f64,
    bypass: f64,
}

impl Lookups {
    fn now(setup: &Setup) -> Result<Self> {
        let text = http::get(setup.replicas[0].operations, "/metrics", METRICS_LIMIT)?.text();
        let count = |outcome| {
            let name = format!("chat_cache_lookups_total{{outcome=\"{outcome}\"}} ");
            let line = text.lines().find_map(|line| line.strip_prefix(&name));
            Ok::<_, anyhow::Error>(line.with_context(|| format!("/metrics lacks {name}"))?.parse()?)
        };
        Ok(Self { hit: count("hit")?, miss: count("miss")?, bypass: count("bypass")? })
    }

    fn until(&self, now: &Self) -> Self {
        Self { hit: now.hit - self.hit, miss: now.miss - self.miss, bypass: now.bypass - self.bypass }
    }

    fn hit_ratio(&self) -> f64 {
        self.hit / (self.hit + self.miss + self.bypass)
    }
}

type Figure = fn(&Measured) -> f64;

fn values(rounds: &[Measured], figure: Figure) -> Vec<f64> {
    rounds.iter().map(figure).collect()
}

/// The medians of all figures, as text.
fn text(rounds: &[Measured]) -> String {
    let middle = |figure| median(&values(rounds, figure));
    let [rate, p50, p99, p999] =
        [middle(|m| m.rate), middle(|m| m.p50), middle(|m| m.p99), middle(|m| m.p999)];
    let latencies = match (p99.is_nan(), p999.is_nan()) {
        (true, _) => format!("mean {p50:.2} ms"),
        (_, true) => format!("p50 {p50:.2} ms, p99 {p99:.2} ms"),
        _ => format!("p50 {p50:.2} ms, p99 {p99:.2} ms, p99.9 {p999:.2} ms"),
    };
    let cpu = Cpu {
        service: middle(|m| m.cpu.service),
        postgres: middle(|m| m.cpu.postgres),
        redis: middle(|m| m.cpu.redis),
        client: middle(|m| m.cpu.client),
    };
    format!("{rate:.0}/s, {latencies}; {cpu}")
}

fn window(rounds: &[Measured]) -> String {
    let middle = |figure| median(&values(rounds, figure));
    format!(
        "hit ratio {:.3} (hits {:.0}, misses {:.0}, bypassed {:.0})",
        middle(|m| m.lookups.hit_ratio()),
        middle(|m| m.lookups.hit),
        middle(|m| m.lookups.miss),
        middle(|m| m.lookups.bypass),
    )
}

impl Rounds {
    fn rows(&self) -> Vec<Row> {
        let Self { poll, open, hot, half, deep, redis, unhurried, select, .. } = self;
        let offered = POLLERS as f64 / POLL_EVERY.as_secs_f64();
        let pairs = half.iter().zip(unhurried);
        let to_redis = pairs.map(|(half, redis)| half.p99 / redis.p99).collect();
        let deep_detail = format!("{}; pgbench's select of the range: {}", text(deep), text(select));
        let row = |name, what: &str, values, unit, goal, detail| Row {
            name,
            what: what.to_owned(),
            values,
            unit,
            goal,
            detail,
        };
        let at_most = |floor, aim| Some(Goal::AtMost { floor, aim });
        vec![
            row(
                "reads/poll",
                "hit ratio of 2,000 users who each poll a conversation every 3 s, one poll in 20 followed by a send",
                values(poll, |m| m.lookups.hit_ratio()),
                "",
                Some(Goal::AtLeast { floor: 0.95, aim: 0.99 }),
                format!("offered {offered:.0}/s, reached {}, sends included; {}", text(poll), window(poll)),
            ),
            row(
                "reads/open",
                "a random conversation of 20,000 opened and scrolled back three pages, 64 connections",
                values(open, |m| m.rate),
                "/s",
                None,
                format!("{}; {}", text(open), window(open)),
            ),
            row(
                "reads/hot",
                "p99 to p50 of 100 conversations read again and again, 64 connections",
                values(hot, |m| m.p99 / m.p50),
                "x",
                at_most(8.0, 4.0),
                format!("{}; {}; redis-benchmark GET: {}", text(hot), window(hot), text(redis)),
            ),
            row(
                "reads/half",
                "p99 of the same at half that rate, at random times, to that of redis-benchmark with 16 connections",
                to_redis,
                "x",
                at_most(3.0, 1.5),
                format!("{}; {}; redis-benchmark GET: {}", text(half), window(half), text(unhurried)),
            ),
            row(
                "reads/deep",
                "Postgres's CPU for a page below the window, 64 connections",
                values(deep, |m| m.cpu.postgres),
                "us",
                at_most(120.0, 60.0),
                deep_detail,
            ),
            row(
                "reads/deep",
                "the service's CPU for the same",
                values(deep, |m| m.cpu.service),
                "us",
                at_most(140.0, 70.0),
                String::new(),
            ),
        ]
    }

    /// The same load by both generators. Both run beside the service, so the dearer one leaves it less.
    fn wrk_rows(&self) -> [Row; 2] {
        let row = |what: &str, ours: &[Measured], theirs: &[Measured]| Row {
            name: "reads/wrk",
            what: format!("{what}: wrk's rate to our generator's"),
            values: theirs.iter().zip(ours).map(|(theirs, ours)| theirs.rate / ours.rate).collect(),
            unit: "x",
            goal: None,
            detail: format!("wrk: {}; {}; ours: {}", text(theirs), window(theirs), text(ours)),
        };
        [row("reads/hot", &self.hot, &self.wrk_hot), row("reads/deep", &self.deep, &self.wrk_deep)]
    }
}
