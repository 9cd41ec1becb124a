//! Where a request's time goes: processor time per answer, by process. Unlike rates it hardly depends on what
//! else the machine is doing.

use std::fmt::{self, Display};
use std::fs;

use harness::Replica;

use super::setup::Setup;

/// Ticks of /proc/PID/stat in a second: fixed by the kernel's interface to user space.
const TICKS_PER_SECOND: f64 = 100.0;

/// Processor seconds so far of the setup's processes, or microseconds an answer; nothing where there is no /proc.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Cpu {
    pub(crate) service: f64,
    pub(crate) postgres: f64,
    pub(crate) redis: f64,
    /// This process and the programs that it ran.
    pub(crate) client: f64,
}

impl Cpu {
    pub(crate) fn now(setup: &Setup) -> Self {
        let postmaster = setup.postgres.pid().unwrap_or_default();
        let redis = setup.redis.pid().unwrap_or_default();
        let services: Vec<u32> = setup.replicas.iter().filter_map(Replica::pid).collect();
        let mut sum = Self::default();
        for process in processes() {
            match process.pid {
                pid if services.contains(&pid) => sum.service += process.own,
                // What ended, such as a session, counts through its parent.
                pid if pid == postmaster => sum.postgres += process.own + process.ended_children,
                _ if process.parent == postmaster => sum.postgres += process.own,
                pid if pid == redis => sum.redis += process.own,
                pid if pid == std::process::id() => sum.client += process.own + process.ended_children,
                _ => {}
            }
        }
        sum
    }

    /// Microseconds an answer since `self`.
    pub(crate) fn per_answer(&self, now: &Self, answers: usize) -> Self {
        let us = |before: f64, after: f64| (after - before) * 1e6 / answers.max(1) as f64;
        Self {
            service: us(self.service, now.service),
            postgres: us(self.postgres, now.postgres),
            redis: us(self.redis, now.redis),
            client: us(self.client, now.client),
        }
    }
}

impl Display for Cpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { service, postgres, redis, client } = self;
        write!(
            f,
            "CPU us each: service {service:.1}, Postgres {postgres:.1}, Redis {redis:.1}, client {client:.1}"
        )
    }
}

struct Process {
    pid: u32,
    parent: u32,
    /// Processor seconds.
    own: f64,
    ended_children: f64,
}

fn processes() -> Vec<Process> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries
        .filter_map(|entry| {
            let pid = entry.file_name().to_str()?.parse().ok()?;
            let stat = fs::read_to_string(entry.path().join("stat")).ok()?;
            // The name, in parentheses, may hold anything; the fields follow the last one.
            let fields: Vec<&str> = stat.get(stat.rfind(')')? + 2..)?.split(' ').collect();
            let seconds = |at: usize| Some(fields.get(at)?.parse::<f64>().ok()? / TICKS_PER_SECOND);
            Some(Process {
                pid,
                parent: fields.get(1)?.parse().ok()?,
                own: seconds(11)? + seconds(12)?,
                ended_children: seconds(13)? + seconds(14)?,
            })
        })
        .collect()
}
