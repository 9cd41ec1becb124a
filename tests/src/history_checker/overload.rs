//! Checks that the queues are bounded: far more requests than they hold, with the largest messages, on a Postgres that is
//! slow and at times does not answer at all. The excess must be refused with 503, and must not use up memory.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};
use load::Script;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use super::redis::RedisMode;
use super::schedule::{CONVERSATIONS, REPLICAS, Server};
use super::system::System;
use crate::proxy::Link;

/// Per replica, more than its writers' queues hold, which is two times 1024.
const CONNECTIONS: usize = 2500 * REPLICAS;

/// The largest message: 4000 characters of four bytes.
const CONTENT: &str = "🦀";
const CONTENT_CHARS: usize = 4000;

const SAMPLE: Duration = Duration::from_secs(1);

#[derive(Debug, Default)]
pub struct Overload {
    pub elapsed: Duration,
    pub stored: u64,
    pub refused: u64,
    /// Other answers, and connections that broke.
    pub others: u64,
    /// Of the largest replica, once a second.
    pub resident_kib: Vec<u64>,
}

impl Overload {
    /// How much the greatest value of the last third exceeds that of the middle third; 1.0 is twice as much. Every queue
    /// has been full by then.
    pub fn growth(&self) -> f64 {
        let third = self.resident_kib.len() / 3;
        let most = |values: &[u64]| values.iter().max().copied().unwrap_or(0) as f64;
        let [_, middle, last] = [0, 1, 2].map(|part| {
            let end = if part == 2 { self.resident_kib.len() } else { (part + 1) * third };
            most(&self.resident_kib[part * third..end])
        });
        last / middle - 1.0
    }
}

/// Runs for `duration`, or until `go_on`, which gets the elapsed time and the latest value, returns false.
pub fn overload(
    binary: &Path,
    duration: Duration,
    mut go_on: impl FnMut(Duration, u64) -> bool,
) -> Result<Overload> {
    allow_connections()?;
    let system = System::start(RedisMode::Single, binary, &[])?;
    let scripts = (0..CONNECTIONS).map(|connection| {
        let [sender, recipient] =
            CONVERSATIONS[connection % CONVERSATIONS.len()].map(|user| &system.users[user]);
        let content = CONTENT.repeat(CONTENT_CHARS);
        let body = format!(r#"{{"recipient_id":"{}","content":"{content}"}}"#, recipient.id);
        let address = system.replicas[connection % REPLICAS].public;
        Script::post(address, "/send", Some(&sender.token), &[body])
    });
    let scripts: Vec<_> = scripts.collect();
    let stop = Arc::new(AtomicBool::new(false));
    let mut overload = Overload::default();
    let report = thread::scope(|scope| {
        let load = scope.spawn(|| load::run_until(scripts, duration, &stop));
        let began = Instant::now();
        while !load.is_finished() {
            // Slow for ten seconds, then stalled for five.
            let link = match began.elapsed().as_secs() % 15 {
                _ if began.elapsed() >= duration => Link::Open,
                0..10 => Link::Slow(Duration::from_millis(200)),
                _ => Link::Stalled,
            };
            for replica in 0..REPLICAS {
                system.set_link(Server::Postgres, replica, link);
            }
            thread::sleep(SAMPLE);
            let resident = system.replicas.iter().filter_map(|replica| replica.resident_kib()).max();
            overload.resident_kib.push(resident.unwrap_or(0));
            if !go_on(began.elapsed(), resident.unwrap_or(0)) {
                stop.store(true, Ordering::Relaxed);
            }
        }
        load.join().map_err(|_| anyhow!("the load generator panicked"))?
    })?;
    overload.elapsed = report.elapsed;
    overload.stored = report.count(201);
    overload.refused = report.count(503);
    overload.others = report.statuses.values().sum::<u64>() - overload.stored - overload.refused;
    Ok(overload)
}

/// Raises the limit of open files, which the replicas inherit, as far as it goes.
fn allow_connections() -> Result<()> {
    let limit = getrlimit(Resource::Nofile);
    let wanted = Some(CONNECTIONS as u64 + 1000);
    if limit.current.is_some() && limit.current < wanted {
        let current = limit.maximum.map_or(wanted, |maximum| wanted.min(Some(maximum)));
        setrlimit(Resource::Nofile, Rlimit { current, maximum: limit.maximum })?;
    }
    Ok(())
}
