//! Where a request's time goes: processor time per answer, by process. Unlike rates it hardly depends on what
//! else the machine is doing.

use std::collections::BTreeMap;
use std::fs;

use harness::Replica;

use super::setup::Setup;

/// Ticks of /proc/PID/stat in a second: fixed by the kernel's interface to user space.
const TICKS_PER_SECOND: f64 = 100.0;

/// Processor seconds so far of each process of the setup; none where there is no /proc.
#[derive(Clone, Debug, Default)]
pub(crate) struct Cpu(BTreeMap<u32, (Part, f64)>);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    Service,
    Postgres,
    Redis,
    Client,
}

impl Cpu {
    pub(crate) fn now(setup: &Setup) -> Self {
        let postmaster = setup.postgres.pid().unwrap_or_default();
        let redis = setup.redis.pid().unwrap_or_default();
        let services: Vec<u32> = setup.replicas.iter().filter_map(Replica::pid).collect();
        let part = |pid, parent| match pid {
            pid if services.contains(&pid) => Some(Part::Service),
            pid if pid == postmaster || parent == postmaster => Some(Part::Postgres),
            pid if pid == redis => Some(Part::Redis),
            pid if pid == std::process::id() => Some(Part::Client),
            _ => None,
        };
        let processes = processes().into_iter();
        Self(
            processes
                .filter_map(|(pid, parent, seconds)| Some((pid, (part(pid, parent)?, seconds))))
                .collect(),
        )
    }

    /// Microseconds an answer since `self`, as text. Processes that came or went meanwhile do not count.
    pub(crate) fn per_answer(&self, now: &Self, answers: usize) -> String {
        let us = |wanted| {
            let seconds: f64 = now
                .0
                .iter()
                .filter(|(_, (part, _))| *part == wanted)
                .filter_map(|(pid, (_, after))| Some(after - self.0.get(pid)?.1))
                .sum();
            seconds * 1e6 / answers.max(1) as f64
        };
        format!(
            "CPU us each: service {:.1}, Postgres {:.1}, Redis {:.1}, client {:.1}",
            us(Part::Service),
            us(Part::Postgres),
            us(Part::Redis),
            us(Part::Client),
        )
    }
}

/// Pid, parent and processor seconds of every process.
fn processes() -> Vec<(u32, u32, f64)> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries
        .filter_map(|entry| {
            let pid = entry.file_name().to_str()?.parse().ok()?;
            let stat = fs::read_to_string(entry.path().join("stat")).ok()?;
            // The name, in parentheses, may hold anything; the fields follow the last one.
            let fields: Vec<&str> = stat.get(stat.rfind(')')? + 2..)?.split(' ').collect();
            let ticks: f64 = fields.get(11)?.parse::<f64>().ok()? + fields.get(12)?.parse::<f64>().ok()?;
            Some((pid, fields.get(1)?.parse().ok()?, ticks / TICKS_PER_SECOND))
        })
        .collect()
}
