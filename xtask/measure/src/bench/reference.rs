//! What the service is compared with: pgbench, redis-benchmark, and argon2id itself.

use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use argon2::{Algorithm, Argon2, Params, Version};
use harness::servers::{daemon, programs};

use super::setup::{CONTENT, DATABASE, Setup};
use super::{Bench, scratch};

/// For one run of a reference, which takes two minutes at most.
const LIMIT: Duration = Duration::from_secs(300);

/// Rows a second of single-row INSERTs by 64 clients: the very row that the service inserts, into a table with
/// the same columns and key, prepared, durable, on the same server.
pub(crate) fn pgbench_insert(bench: &Bench, setup: &Setup) -> Result<f64> {
    setup.postgres.query(
        DATABASE,
        "CREATE TABLE IF NOT EXISTS reference (LIKE messages INCLUDING ALL);
         CREATE SEQUENCE IF NOT EXISTS reference_seq CACHE 100",
    )?;
    let script = scratch(bench, "insert.sql");
    std::fs::write(
        &script,
        format!(
            "INSERT INTO reference (conversation_id, seq, id, sender_id, content, created_at) VALUES \
             (md5(:client_id::text)::uuid, nextval('reference_seq'), gen_random_uuid(), \
             md5(:client_id::text)::uuid, '{CONTENT}', clock_timestamp());\n"
        ),
    )?;
    Ok(pgbench(bench, setup, &script)?.rate)
}

/// What another program's run printed.
pub(crate) struct Figures {
    pub(crate) answers: usize,
    pub(crate) rate: f64,
    /// In ms, as `p99`. Of pgbench the mean: it prints no more.
    pub(crate) p50: f64,
    pub(crate) p99: f64,
}

/// Runs this script by 64 clients, prepared.
pub(crate) fn pgbench(bench: &Bench, setup: &Setup, script: &Path) -> Result<Figures> {
    let mut pgbench = Command::new(setup.postgres.bin_dir().join("pgbench"));
    pgbench.args(["--no-vacuum", "--protocol=prepared", "--client=64", "--jobs=1"]);
    pgbench.arg(format!("--time={}", bench.duration.as_secs())).arg("--file").arg(script);
    pgbench.arg(setup.postgres.url(DATABASE));
    let text = daemon::run_ok(pgbench, LIMIT)?;
    let number = |label: &str| -> Result<f64> {
        let line = text.lines().find_map(|line| line.strip_prefix(label));
        let number = line.and_then(|line| line.split_whitespace().next());
        Ok(number.with_context(|| format!("pgbench printed no {label}"))?.parse::<f64>()?)
    };
    let answers = number("number of transactions actually processed: ")? as usize;
    Ok(Figures { answers, rate: number("tps = ")?, p50: number("latency average = ")?, p99: f64::NAN })
}

/// GETs by so many connections without pipelining.
pub(crate) fn redis_get(bench: &Bench, setup: &Setup, connections: usize) -> Result<Figures> {
    let benchmark =
        programs::in_path("redis-benchmark").context("redis-benchmark comes with redis-tools: install it")?;
    // As many requests as take about the wanted time at a rate that most machines reach.
    let requests = 50_000 * bench.duration.as_secs();
    let mut get = Command::new(benchmark);
    get.args(["-h", "127.0.0.1", "-p", &setup.redis.port().to_string()]);
    get.args(["-t", "get", "-c", &connections.to_string(), "-n", &requests.to_string(), "--csv"]);
    let text = daemon::run_ok(get, LIMIT)?;
    let line =
        text.lines().find(|line| line.starts_with("\"GET\"")).context("redis-benchmark printed no GET")?;
    let fields: Vec<_> = line.split(',').map(|field| field.trim_matches('"')).collect();
    let rate = fields.get(1).context("redis-benchmark printed no rate")?.parse()?;
    // Before 6.2 it prints no latencies.
    let latency = |at: usize| fields.get(at).and_then(|field| field.parse().ok()).unwrap_or(f64::NAN);
    Ok(Figures { answers: requests as usize, rate, p50: latency(4), p99: latency(6) })
}

/// argon2id hashes a second, by one thread per core, with the parameters of the service.
pub(crate) fn argon2_rate(duration: Duration) -> Result<f64> {
    let params = Params::new(19_456, 2, 1, None).map_err(|error| anyhow::anyhow!("{error}"))?;
    let argon2 = Argon2::new(Algorithm::Argon2id, Version::V0x13, params);
    let (stop, count) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let started = Instant::now();
    let threads: Vec<_> = (0..std::thread::available_parallelism()?.get())
        .map(|_| {
            let (argon2, stop, count) = (argon2.clone(), Arc::clone(&stop), Arc::clone(&count));
            std::thread::spawn(move || {
                let mut hash = [0; 32];
                while !stop.load(Ordering::Relaxed) {
                    if argon2
                        .hash_password_into(b"correct horse battery", b"a salt of 16 by.", &mut hash)
                        .is_ok()
                    {
                        count.fetch_add(1, Ordering::Relaxed);
                    }
                }
            })
        })
        .collect();
    std::thread::sleep(duration);
    stop.store(true, Ordering::Relaxed);
    for thread in threads {
        thread.join().ok();
    }
    Ok(count.load(Ordering::Relaxed) as f64 / started.elapsed().as_secs_f64())
}
