//! The figures that have a goal.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use harness::{PASSWORD, Replica};
use load::{Report, Script};

use super::cpu::Cpu;
use super::setup::Setup;
use super::{Bench, Goal, Row, figures, median, reference};

pub(super) const CONNECTIONS: usize = 64;

/// A connection more would only wait longer: two hashes run at a time on two cores.
const LOGIN_CONNECTIONS: usize = 8;

/// Messages of a conversation that is read: more than a page.
const HISTORY: u64 = 10;

pub(crate) fn send(bench: &Bench, setup: &mut Setup) -> Result<Vec<Row>> {
    let (mut ours, mut theirs, mut ratios, mut client) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let mut cpu = Cpu::default();
    for _ in 0..bench.rounds {
        let pgbench = reference::pgbench_insert(bench, setup)?;
        let before = Cpu::now(setup);
        let report = load::run(setup.send_scripts(CONNECTIONS, false), bench.duration)?.all(201)?;
        cpu = before.per_answer(&Cpu::now(setup), report.latencies.len());
        ratios.push(report.rate() / pgbench);
        ours.push(report.rate());
        theirs.push(pgbench);
        client.push(client_share(setup, bench)?);
    }
    let what = "POST /send, limits on, durable, to pgbench's single-row INSERT, both 64 clients";
    let detail = format!(
        "{}; {cpu}; the same client gets {:.0} answers/s from GET /me's 401",
        figures(("send", &ours), ("pgbench", &theirs)),
        median(&client)
    );
    let goal = Some(Goal::AtLeast { floor: 1.0, aim: 2.0 });
    Ok(vec![Row { name: "send", what: what.to_owned(), values: ratios, unit: "x", goal, detail }])
}

pub(crate) fn messages(bench: &Bench, setup: &mut Setup) -> Result<Vec<Row>> {
    fill_conversations(setup)?;
    let (mut ours, mut theirs, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
    let mut cpu = Cpu::default();
    for _ in 0..bench.rounds {
        let redis = reference::redis_get(bench, setup, CONNECTIONS)?.rate;
        let before = Cpu::now(setup);
        let report = load::run(setup.read_scripts(CONNECTIONS, ""), bench.duration)?.all(200)?;
        cpu = before.per_answer(&Cpu::now(setup), report.latencies.len());
        ratios.push(report.rate() / redis);
        ours.push(report.rate());
        theirs.push(redis);
    }
    let what = "GET /messages from the window, to redis-benchmark GET, both 64 connections, unpipelined";
    let detail = format!("{}; {cpu}", figures(("messages", &ours), ("redis-benchmark", &theirs)));
    let goal = Some(Goal::AtLeast { floor: 0.5, aim: 0.9 });
    Ok(vec![Row { name: "messages", what: what.to_owned(), values: ratios, unit: "x", goal, detail }])
}

pub(crate) fn login(bench: &Bench, setup: &mut Setup) -> Result<Vec<Row>> {
    let (mut ours, mut theirs, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..bench.rounds {
        let argon2 = reference::argon2_rate(bench.duration)?;
        let report = load::run(login_scripts(setup), bench.duration)?.all(200)?;
        ratios.push(report.rate() / argon2);
        ours.push(report.rate());
        theirs.push(argon2);
    }
    let what = "POST /login to the raw argon2id rate of all cores";
    let detail = figures(("login", &ours), ("argon2id", &theirs));
    let goal = Some(Goal::AtLeast { floor: 0.9, aim: 0.98 });
    Ok(vec![Row { name: "login", what: what.to_owned(), values: ratios, unit: "x", goal, detail }])
}

/// The 99th percentile of reads at a moderate rate, with and without everybody logging in at once.
pub(crate) fn storm(bench: &Bench, setup: &mut Setup) -> Result<Vec<Row>> {
    fill_conversations(setup)?;
    let (mut calm, mut stormy, mut ratios) = (Figures::default(), Figures::default(), Vec::new());
    for _ in 0..bench.rounds {
        let without = load::run(setup.read_scripts(4, ""), bench.duration)?.all(200)?;
        let stop = Arc::new(AtomicBool::new(false));
        let storm = {
            let (scripts, stop) = (login_scripts(setup), Arc::clone(&stop));
            std::thread::spawn(move || load::run_until(scripts, Duration::from_secs(600), &stop))
        };
        std::thread::sleep(Duration::from_millis(200));
        let during = load::run(setup.read_scripts(4, ""), bench.duration)?.all(200)?;
        stop.store(true, Ordering::Relaxed);
        storm.join().ok().context("the storm panicked")??.all(200)?;
        ratios.push(stormy.add(&during) / calm.add(&without));
    }
    let what = "p99 of GET /messages during a login storm, to without";
    let detail = format!("without: {}; during: {}", calm.text(), stormy.text());
    let goal = Some(Goal::AtMost { floor: 3.0, aim: 1.5 });
    Ok(vec![Row { name: "storm", what: what.to_owned(), values: ratios, unit: "x", goal, detail }])
}

/// Latencies of one side of a comparison, round by round.
#[derive(Default)]
struct Figures {
    p50: Vec<f64>,
    p99: Vec<f64>,
    rate: Vec<f64>,
}

impl Figures {
    /// Returns the 99th percentile, in ms.
    fn add(&mut self, report: &Report) -> f64 {
        let p99 = report.quantile(0.99).as_secs_f64() * 1e3;
        self.p50.push(report.quantile(0.5).as_secs_f64() * 1e3);
        self.p99.push(p99);
        self.rate.push(report.rate());
        p99
    }

    fn text(&self) -> String {
        let (p50, p99, rate) = (median(&self.p50), median(&self.p99), median(&self.rate));
        format!("p50 {p50:.2} ms, p99 {p99:.2} ms, {rate:.0}/s")
    }
}

pub(crate) fn startup(bench: &Bench, setup: &mut Setup) -> Result<Vec<Row>> {
    let mut values = Vec::new();
    for _ in 0..bench.rounds.max(5) {
        let started = Instant::now();
        let _replica = setup.start_replica(&bench.dir, &bench.binary)?;
        values.push(started.elapsed().as_secs_f64() * 1e3);
    }
    let what = "exec to the first 200 on /healthz, migrated database".to_owned();
    let goal = Some(Goal::AtMost { floor: 300.0, aim: 50.0 });
    Ok(vec![Row { name: "startup", what, values, unit: "ms", goal, detail: String::new() }])
}

pub(crate) fn memory(bench: &Bench, setup: &mut Setup) -> Result<Vec<Row>> {
    let replica = setup.start_replica(&bench.dir, &bench.binary)?;
    std::thread::sleep(Duration::from_secs(2));
    let idle = resident_kib(&replica)? as f64 / 1024.0;
    // Reads, sends and logins by turns on this one replica.
    let others = std::mem::replace(&mut setup.replicas, vec![replica]);
    let mut peak: f64 = 0.0;
    for scripts in
        [setup.send_scripts(CONNECTIONS, false), setup.read_scripts(CONNECTIONS, ""), login_scripts(setup)]
    {
        load::run(scripts, bench.duration)?;
        peak = peak.max(resident_kib(&setup.replicas[0])? as f64 / 1024.0);
    }
    setup.replicas = others;
    let row = |what: &str, value, floor, aim| Row {
        name: "memory",
        what: what.to_owned(),
        values: vec![value],
        unit: "MiB",
        goal: Some(Goal::AtMost { floor, aim }),
        detail: String::new(),
    };
    Ok(vec![
        row("resident, idle", idle, 40.0, 15.0),
        row("resident, after sends, reads and logins under load", peak, 120.0, 50.0),
    ])
}

pub(super) fn resident_kib(replica: &Replica) -> Result<u64> {
    replica.resident_kib().context("resident memory is read from /proc, which is only on Linux")
}

/// What the load generator can do at all: answers that cost the service next to nothing.
fn client_share(setup: &Setup, bench: &Bench) -> Result<f64> {
    let scripts = (0..CONNECTIONS).map(|i| Script::get(setup.address(i), "/me", "none")).collect();
    Ok(load::run(scripts, bench.duration.min(Duration::from_secs(2)))?.all(401)?.rate())
}

fn login_scripts(setup: &Setup) -> Vec<Script> {
    (0..LOGIN_CONNECTIONS)
        .map(|connection| {
            let (user, _) = setup.pair(connection);
            let body = format!(r#"{{"username":"{}","password":"{PASSWORD}"}}"#, user.name);
            Script::post(setup.address(connection), "/login", None, &[body])
        })
        .collect()
}

/// Gives every conversation that is read its messages.
pub(super) fn fill_conversations(setup: &Setup) -> Result<()> {
    let scripts = setup.send_scripts(CONNECTIONS, false);
    let mut sent = 0;
    while sent < HISTORY * CONNECTIONS as u64 {
        sent += load::run(scripts.clone(), Duration::from_millis(200))?.all(201)?.count(201);
    }
    Ok(())
}
