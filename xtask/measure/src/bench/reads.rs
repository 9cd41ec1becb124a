//! Reads as people read: polling, opening and scrolling back, one hot loop, and pages beyond the window; beside what
//! Postgres and Redis need for the same bytes, and under a second load generator.

use std::fmt::Write as _;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result};
use harness::http;
use harness::servers::{daemon, programs};
use harness::{Replica, install};
use jsonwebtoken::{EncodingKey, Header};
use load::{Next, Report, Script, Timed, Timetable};

use super::cpu::{self, Cpu};
use super::measures::CONNECTIONS;
use super::setup::{CONTENT, DATABASE, Setup};
use super::{Bench, Goal, Row, median, scratch};

/// Two users each. Enough that no cache holds all of them by accident.
const CONVERSATIONS: usize = 20_000;
const HISTORY: usize = 60;

/// These have more messages, for pages beyond the window.
const HOT: usize = 100;
const HOT_HISTORY: usize = 200;

/// Users who poll, and how often.
const POLLERS: usize = 2000;
const POLL_EVERY: Duration = Duration::from_secs(3);
const POLLS: u32 = 6;

const SECRET_KEY: &str = "the key of the benchmark's replica, 32 bytes";

/// For a reference or another generator.
const LIMIT: Duration = Duration::from_secs(120);

pub(crate) fn reads(bench: &Bench, setup: &mut Setup) -> Result<Vec<Row>> {
    let key = [("SECRET_KEY", SECRET_KEY.to_owned())];
    let replica = setup.start_replica_with(&bench.dir, &bench.binary, &key)?;
    let others = std::mem::replace(&mut setup.replicas, vec![replica]);
    let rows = measure(bench, setup);
    setup.replicas = others;
    rows
}

fn measure(bench: &Bench, setup: &Setup) -> Result<Vec<Row>> {
    let world = World::fill(setup)?;
    let mut rows = vec![poll(setup, &world)?, open(bench, setup, &world)?];
    let mut hot = Figures::default();
    let [mut deep, mut hot_by_wrk, mut deep_by_wrk, mut half] = <[Figures; 4]>::default();
    let (mut select, mut get, mut get_p99) = (Figures::default(), Vec::new(), Vec::new());
    let wrk = wrk();
    for _ in 0..bench.rounds {
        select.add(setup, || pgbench(bench, setup))?;
        let (rate, p99) = redis_get(bench, setup)?;
        get.push(rate);
        get_p99.push(p99);
        hot.add(setup, || load::run(world.hot(""), bench.duration)?.all(200).map(Outcome::of))?;
        let rate = hot.rate.last().copied().unwrap_or_default() / 2.0;
        half.add(setup, || load::run_timed(world.steady(rate, bench.duration))?.all(200).map(Outcome::of))?;
        deep.add(setup, || load::run(world.hot("&offset=50"), bench.duration)?.all(200).map(Outcome::of))?;
        if let Some(wrk) = &wrk {
            hot_by_wrk.add(setup, || run_wrk(wrk, bench, setup, &world, ""))?;
            deep_by_wrk.add(setup, || run_wrk(wrk, bench, setup, &world, "&offset=50"))?;
        }
    }
    let get_text = format!("redis-benchmark GET {:.0}/s, p99 {:.2} ms", median(&get), median(&get_p99));
    let ratio =
        |ones: &[f64], others: &[f64]| ones.iter().zip(others).map(|(one, other)| one / other).collect();
    rows.push(row(
        "hot loop, to redis-benchmark GET",
        ratio(&hot.rate, &get),
        "x",
        None,
        format!("{}; {get_text}", hot.text()),
    ));
    let goal = Some(Goal::AtMost { floor: 16.0, aim: 8.0 });
    rows.push(row("hot loop: p99 to its median", ratio(&hot.p99, &hot.p50), "x", goal, String::new()));
    let goal = Some(Goal::AtMost { floor: 6.0, aim: 3.0 });
    rows.push(row(
        "half of the hot rate: p99 to redis-benchmark's",
        ratio(&half.p99, &get_p99),
        "x",
        goal,
        half.text(),
    ));
    rows.push(row(
        "five rows beyond the window, to the same prepared SELECT in pgbench",
        ratio(&deep.rate, &select.rate),
        "x",
        None,
        format!("{}; pgbench {}", deep.text(), select.text()),
    ));
    for (what, values, floor, aim) in [
        ("such a page: Postgres", &deep.cpu[1], 120.0, 60.0),
        ("such a page: service", &deep.cpu[0], 140.0, 70.0),
    ] {
        let goal = Some(Goal::AtMost { floor, aim });
        rows.push(row(what, values.clone(), "us", goal, String::new()));
    }
    if wrk.is_some() {
        let detail = format!(
            "wrk {}; client CPU us each: wrk {:.1}, ours {:.1}",
            hot_by_wrk.text(),
            median(&hot_by_wrk.client),
            median(&hot.client)
        );
        rows.push(row("hot loop under wrk, to ours", ratio(&hot_by_wrk.rate, &hot.rate), "x", None, detail));
        let detail = format!("wrk {}", deep_by_wrk.text());
        rows.push(row(
            "pages beyond the window under wrk, to ours",
            ratio(&deep_by_wrk.rate, &deep.rate),
            "x",
            None,
            detail,
        ));
    } else {
        println!("  wrk is not installed, and cannot be: its rows are left out");
    }
    Ok(rows)
}

fn row(what: &str, values: Vec<f64>, unit: &'static str, goal: Option<Goal>, detail: String) -> Row {
    Row { name: "reads", what: what.to_owned(), values, unit, goal, detail }
}

/// What one run of any generator found.
struct Outcome {
    rate: f64,
    p50: f64,
    p99: f64,
}

impl Outcome {
    fn of(report: Report) -> Self {
        let ms = |share| report.quantile(share).as_secs_f64() * 1e3;
        Self { rate: report.rate(), p50: ms(0.5), p99: ms(0.99) }
    }
}

/// The outcomes of a load, round by round. Times in milliseconds, processor time in microseconds an answer.
#[derive(Default)]
struct Figures {
    rate: Vec<f64>,
    p50: Vec<f64>,
    p99: Vec<f64>,
    /// Of service, Postgres and Redis.
    cpu: [Vec<f64>; 3],
    client: Vec<f64>,
}

impl Figures {
    /// Runs the load on another thread, and reads the processors' clocks while it runs: programs that have ended have none.
    fn add(&mut self, setup: &Setup, load: impl FnOnce() -> Result<Outcome> + Send) -> Result<()> {
        const EDGE: Duration = Duration::from_millis(500);
        let client = cpu::own();
        let started = Instant::now();
        let (outcome, spent, sampled) = std::thread::scope(|scope| -> Result<_> {
            let running = scope.spawn(load);
            std::thread::sleep(EDGE);
            let (from, began) = (Cpu::now(setup), Instant::now());
            let mut last = (Cpu::now(setup), Duration::ZERO);
            // The last clocks that were read at least so long before the end count.
            let mut readings = Vec::new();
            while !running.is_finished() {
                std::thread::sleep(Duration::from_millis(100));
                readings.push((Cpu::now(setup), began.elapsed()));
            }
            let end = began.elapsed();
            for reading in readings {
                if reading.1 + EDGE < end {
                    last = reading;
                }
            }
            let outcome = running.join().ok().context("the load panicked")??;
            Ok((outcome, from.seconds(&last.0), last.1.as_secs_f64()))
        })?;
        let answers = outcome.rate * started.elapsed().as_secs_f64();
        self.client.push((cpu::own() - client) * 1e6 / answers);
        for (values, seconds) in self.cpu.iter_mut().zip(spent) {
            values.push(seconds / sampled * 1e6 / outcome.rate);
        }
        self.rate.push(outcome.rate);
        self.p50.push(outcome.p50);
        self.p99.push(outcome.p99);
        Ok(())
    }

    fn text(&self) -> String {
        let [service, postgres, redis] = [0, 1, 2].map(|part| median(&self.cpu[part]));
        format!(
            "{:.0}/s, p50 {:.2} ms, p99 {:.2} ms, CPU us each: service {service:.1}, Postgres {postgres:.1}, Redis {redis:.1}",
            median(&self.rate),
            median(&self.p50),
            median(&self.p99),
        )
    }
}

/// Users, conversations and messages that SQL made: to register so many would take minutes.
struct World {
    address: std::net::SocketAddr,
    /// Of the first user of each conversation.
    tokens: Vec<String>,
}

fn user(number: usize) -> String {
    format!("{number:08x}-0000-7000-8000-000000000000")
}

impl World {
    fn fill(setup: &Setup) -> Result<Self> {
        let id = "lpad(to_hex(n), 8, '0') || '-0000-7000-8000-000000000000'";
        setup.postgres.query(
            DATABASE,
            &format!(
                "INSERT INTO users (id, username, username_key, email, email_key, password_hash)
                 SELECT ({id})::uuid, 'reader' || n, 'reader' || n, n || '@reader', n || '@reader', 'none'
                 FROM generate_series(0, {last}) n;
                 INSERT INTO conversations (low_user, high_user, id, last_seq, last_at)
                 SELECT ({id})::uuid, (lpad(to_hex(n + 1), 8, '0') || '-0000-7000-8000-000000000000')::uuid,
                        gen_random_uuid(), CASE WHEN n < 2 * {HOT} THEN {HOT_HISTORY} ELSE {HISTORY} END, now()
                 FROM generate_series(0, {last}, 2) n;
                 INSERT INTO messages (conversation_id, seq, id, sender_id, content, created_at)
                 SELECT c.id, seq, gen_random_uuid(), c.low_user, '{CONTENT}', now()
                 FROM conversations c, generate_series(1, c.last_seq) seq
                 WHERE c.low_user < '{end}'",
                last = 2 * CONVERSATIONS - 1,
                end = user(2 * CONVERSATIONS),
            ),
        )?;
        for statement in ["VACUUM ANALYZE", "CHECKPOINT"] {
            setup.postgres.query(DATABASE, statement)?;
        }
        let key = EncodingKey::from_secret(SECRET_KEY.as_bytes());
        let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
        let tokens = (0..CONVERSATIONS).map(|conversation| {
            let claims = serde_json::json!({"sub": user(2 * conversation), "iat": now, "exp": now + 3600});
            Ok(jsonwebtoken::encode(&Header::default(), &claims, &key)?)
        });
        Ok(Self { address: setup.address(0), tokens: tokens.collect::<Result<_>>()? })
    }

    fn path(conversation: usize, query: &str) -> String {
        format!("/messages?peer_id={}{query}", user(2 * conversation + 1))
    }

    fn read(&self, conversation: usize, query: &str) -> Vec<u8> {
        let script = Script::get(self.address, &Self::path(conversation, query), &self.tokens[conversation]);
        script.requests.concat()
    }

    fn send(&self, conversation: usize) -> Vec<u8> {
        let body = format!(r#"{{"recipient_id":"{}","content":"{CONTENT}"}}"#, user(2 * conversation + 1));
        let script = Script::post(self.address, "/send", Some(&self.tokens[conversation]), &[body]);
        script.requests.concat()
    }

    /// Each connection reads all of the hot conversations, beginning with another one.
    fn hot(&self, query: &str) -> Vec<Script> {
        (0..CONNECTIONS)
            .map(|connection| Script {
                address: self.address,
                requests: (0..HOT).map(|turn| self.read((connection + turn) % HOT, query)).collect(),
            })
            .collect()
    }

    /// The hot conversations at a constant rate.
    fn steady(&self, rate: f64, duration: Duration) -> Vec<Timetable> {
        let step = CONNECTIONS as f64 / rate;
        (0..CONNECTIONS)
            .map(|connection| {
                let count = (duration.as_secs_f64() / step) as usize;
                let first = step * connection as f64 / CONNECTIONS as f64;
                let request = |turn| Timed {
                    at: Duration::from_secs_f64(first + step * turn as f64),
                    request: self.read((connection + turn) % HOT, ""),
                    counts: true,
                };
                Timetable { address: self.address, requests: (0..count).map(request).collect() }
            })
            .collect()
    }

    /// Each user polls every [`POLL_EVERY`], from a moment of its own on; one read in twenty is followed by a message.
    fn polls(&self, polls: u32) -> Vec<Timetable> {
        let mut connections = vec![Vec::new(); CONNECTIONS];
        for poller in 0..POLLERS {
            let phase = POLL_EVERY.mul_f64(fastrand::f64());
            for poll in 0..polls {
                let at = phase + POLL_EVERY * poll;
                let timetable = &mut connections[poller % CONNECTIONS];
                timetable.push(Timed { at, request: self.read(poller, ""), counts: true });
                if fastrand::u8(..20) == 0 {
                    timetable.push(Timed { at, request: self.send(poller), counts: false });
                }
            }
        }
        let table = |mut requests: Vec<Timed>| {
            requests.sort_by_key(|timed| timed.at);
            Timetable { address: self.address, requests }
        };
        connections.into_iter().map(table).collect()
    }
}

/// Pages by how they were answered: hit, miss, bypass.
fn lookups(replica: &Replica) -> Result<[f64; 3]> {
    let text = http::get(replica.operations, "/metrics", Duration::from_secs(5))?;
    let text = String::from_utf8_lossy(&text.body).into_owned();
    Ok(["hit", "miss", "bypass"].map(|outcome| {
        let name = format!("chat_cache_lookups_total{{outcome=\"{outcome}\"}} ");
        let value = text.lines().find_map(|line| line.strip_prefix(&name)?.parse().ok());
        value.unwrap_or_default()
    }))
}

fn hit_ratio(before: [f64; 3], after: [f64; 3]) -> f64 {
    let [hits, misses, others] = [0, 1, 2].map(|outcome| after[outcome] - before[outcome]);
    hits / (hits + misses + others)
}

fn poll(setup: &Setup, world: &World) -> Result<Row> {
    let replica = &setup.replicas[0];
    load::run_timed(world.polls(1))?;
    let (before, clocks) = (lookups(replica)?, Cpu::now(setup));
    let report = load::run_timed(world.polls(POLLS))?;
    let ratio = hit_ratio(before, lookups(replica)?);
    let reads = report.latencies.len();
    let mut detail = format!(
        "{:.0} reads/s offered, {:.0}/s reached, {} messages",
        POLLERS as f64 / POLL_EVERY.as_secs_f64(),
        reads as f64 / (POLL_EVERY * POLLS).as_secs_f64(),
        report.count(201),
    );
    for (name, share) in [("p50", 0.5), ("p99", 0.99), ("p99.9", 0.999)] {
        let _ = write!(detail, ", {name} {:.2} ms", report.quantile(share).as_secs_f64() * 1e3);
    }
    let _ = write!(detail, "; with the messages, {}", clocks.per_answer(&Cpu::now(setup), reads));
    let what = format!("{POLLERS} users who poll every {} s: pages from windows", POLL_EVERY.as_secs());
    Ok(row(&what, vec![ratio], "", Some(Goal::AtLeast { floor: 0.95, aim: 0.98 }), detail))
}

/// A conversation is opened, and read three pages back.
fn open(bench: &Bench, setup: &Setup, world: &World) -> Result<Row> {
    const BACK: usize = 3;
    let tokens = Arc::new(world.tokens.clone());
    let connections = (0..CONNECTIONS)
        .map(|_| {
            let (address, tokens) = (world.address, Arc::clone(&tokens));
            let world = World { address, tokens: Vec::new() };
            let (mut conversation, mut turn) = (0, 0);
            let next: Next = Box::new(move |body| {
                let oldest = (turn > 0).then(|| oldest_seq(body)).flatten();
                turn = if oldest.is_some() && turn < 1 + BACK { turn + 1 } else { 1 };
                let query = match oldest {
                    Some(oldest) if turn > 1 => format!("&before={oldest}"),
                    _ => {
                        conversation = fastrand::usize(..CONVERSATIONS);
                        String::new()
                    }
                };
                let path = World::path(conversation, &query);
                Script::get(world.address, &path, &tokens[conversation]).requests.concat()
            });
            (address, next)
        })
        .collect();
    let before = lookups(&setup.replicas[0])?;
    let clocks = Cpu::now(setup);
    let report = load::run_next(connections, bench.duration)?.all(200)?;
    let cpu = clocks.per_answer(&Cpu::now(setup), report.latencies.len());
    let ratio = hit_ratio(before, lookups(&setup.replicas[0])?);
    let ms = |share| report.quantile(share).as_secs_f64() * 1e3;
    let detail = format!(
        "{:.0} pages/s, p50 {:.2} ms, p99 {:.2} ms, p99.9 {:.2} ms; {cpu}",
        report.rate(),
        ms(0.5),
        ms(0.99),
        ms(0.999)
    );
    let what = format!(
        "one of {CONVERSATIONS} conversations is opened, and read {BACK} pages back: pages from windows"
    );
    Ok(row(&what, vec![ratio], "", None, detail))
}

/// The last `seq` of a page.
fn oldest_seq(body: &[u8]) -> Option<u64> {
    const NAME: &[u8] = b"\"seq\":";
    let at = body.windows(NAME.len()).rposition(|window| window == NAME)? + NAME.len();
    let digits = body[at..].iter().take_while(|byte| byte.is_ascii_digit()).count();
    std::str::from_utf8(&body[at..at + digits]).ok()?.parse().ok()
}

/// The rows of such a page by a prepared SELECT, 64 clients.
fn pgbench(bench: &Bench, setup: &Setup) -> Result<Outcome> {
    let ids = setup
        .postgres
        .query(DATABASE, &format!("SELECT id FROM conversations WHERE low_user = '{}'", user(0)))?;
    let id = ids.into_iter().flatten().flatten().next().context("the first conversation")?;
    let script = scratch(bench, "select.sql");
    std::fs::write(
        &script,
        format!(
            "\\set top random(10, {HOT_HISTORY})\nSELECT id, seq, sender_id, content, created_at FROM messages \
             WHERE conversation_id = '{id}' AND seq <= :top AND seq > :top - 5 ORDER BY seq DESC;\n"
        ),
    )?;
    let mut pgbench = Command::new(setup.postgres.bin_dir().join("pgbench"));
    pgbench.args(["--no-vacuum", "--protocol=prepared", "--client=64", "--jobs=1"]);
    pgbench.arg(format!("--time={}", bench.duration.as_secs())).arg("--file").arg(&script);
    pgbench.arg(setup.postgres.url(DATABASE));
    let text = daemon::run_ok(pgbench, LIMIT)?;
    let number = |start: &str| -> Result<f64> {
        let line =
            text.lines().find_map(|line| line.strip_prefix(start)).with_context(|| format!("no {start}"))?;
        Ok(line.split_whitespace().next().context("no number")?.parse()?)
    };
    let (rate, mean) = (number("tps = ")?, number("latency average = ")?);
    // It prints no quantiles.
    Ok(Outcome { rate, p50: mean, p99: f64::NAN })
}

/// GETs a second and their 99th percentile in milliseconds.
fn redis_get(bench: &Bench, setup: &Setup) -> Result<(f64, f64)> {
    let benchmark =
        programs::in_path("redis-benchmark").context("redis-benchmark comes with redis-tools: install it")?;
    let mut get = Command::new(benchmark);
    get.args(["-h", "127.0.0.1", "-p", &setup.redis.port().to_string()]);
    get.args(["-t", "get", "-c", "64", "-n", &(50_000 * bench.duration.as_secs()).to_string(), "--csv"]);
    let text = daemon::run_ok(get, LIMIT)?;
    // "test","rps","avg_latency_ms","min_latency_ms","p50_latency_ms","p95_latency_ms","p99_latency_ms",...
    let line =
        text.lines().find(|line| line.starts_with("\"GET\"")).context("redis-benchmark printed no GET")?;
    let field = |index: usize| -> Result<f64> {
        let field = line.split(',').nth(index).context("redis-benchmark printed too little")?;
        Ok(field.trim_matches('"').parse()?)
    };
    Ok((field(1)?, field(6)?))
}

/// The second generator, where it is installed or can be.
fn wrk() -> Option<std::path::PathBuf> {
    let find = || programs::in_path("wrk");
    if find().is_none() && install::can_install() {
        println!("  installing wrk with apt-get");
        install::install(&["wrk"]).ok();
    }
    find()
}

/// The same load as [`World::hot`], by wrk.
fn run_wrk(
    wrk: &std::path::Path,
    bench: &Bench,
    setup: &Setup,
    world: &World,
    query: &str,
) -> Result<Outcome> {
    let mut script = String::from("local requests = {}\n");
    for conversation in 0..HOT {
        writeln!(
            script,
            "requests[{}] = wrk.format('GET', '{}', {{ ['Authorization'] = 'Bearer {}' }})",
            conversation + 1,
            World::path(conversation, query),
            world.tokens[conversation]
        )?;
    }
    writeln!(
        script,
        "local turn = 0
         function request() turn = turn % {HOT} + 1; return requests[turn] end
         function done(summary, latency)
           local errors = summary.errors
           print('outcome', summary.requests / summary.duration * 1e6, latency:percentile(50), latency:percentile(99),
                 errors.connect + errors.read + errors.write + errors.status + errors.timeout)
         end"
    )?;
    // `wrk.format` needs the host, which is known only in `init`.
    let script = script
        .replace("local requests = {}\n", "local requests = {}\nfunction init()\n")
        .replace("local turn", "end\nlocal turn");
    let file = scratch(bench, "reads.lua");
    std::fs::write(&file, script)?;
    let mut wrk = Command::new(wrk);
    wrk.args(["-t1", "-c", &CONNECTIONS.to_string(), &format!("-d{}s", bench.duration.as_secs()), "-s"]);
    wrk.arg(&file).arg(format!("http://{}", setup.address(0)));
    let text = daemon::run_ok(wrk, LIMIT)?;
    let line =
        text.lines().find_map(|line| line.strip_prefix("outcome")).context("wrk printed no outcome")?;
    let figures: Vec<f64> = line.split_whitespace().filter_map(|figure| figure.parse().ok()).collect();
    let [rate, p50, p99, errors] = figures[..] else { anyhow::bail!("wrk printed {line}") };
    anyhow::ensure!(errors == 0.0, "wrk saw {errors} errors");
    Ok(Outcome { rate, p50: p50 / 1e3, p99: p99 / 1e3 })
}
