//! What the service is compared with: pgbench, redis-benchmark, and argon2id itself.

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
    let mut pgbench = Command::new(setup.postgres.bin_dir().join("pgbench"));
    pgbench.args(["--no-vacuum", "--protocol=prepared", "--client=64", "--jobs=1"]);
    pgbench.arg(format!("--time={}", bench.duration.as_secs())).arg("--file").arg(&script);
    pgbench.arg(setup.postgres.url(DATABASE));
    let text = daemon::run_ok(pgbench, LIMIT)?;
    let line = text.lines().find(|line| line.starts_with("tps = ")).context("pgbench printed no tps")?;
    Ok(line.split_whitespace().nth(2).context("pgbench printed no rate")?.parse()?)
}

/// GETs a second by 64 connections without pipelining.
pub(crate) fn redis_get(bench: &Bench, setup: &Setup) -> Result<f64> {
    let benchmark =
        programs::in_path("redis-benchmark").context("redis-benchmark comes with redis-tools: install it")?;
    // As many requests as take about the wanted time at a rate that most machines reach.
    let requests = 50_000 * bench.duration.as_secs();
    let mut get = Command::new(benchmark);
    get.args(["-h", "127.0.0.1", "-p", &setup.redis.port().to_string()]);
    get.args(["-t", "get", "-c", "64", "-n", &requests.to_string(), "--csv"]);
    let text = daemon::run_ok(get, LIMIT)?;
    let line =
        text.lines().find(|line| line.starts_with("\"GET\"")).context("redis-benchmark printed no GET")?;
    let rate = line.split(',').nth(1).context("redis-benchmark printed no rate")?;
    Ok(rate.trim_matches('"').parse()?)
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
