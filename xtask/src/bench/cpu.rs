//! Where a request's time goes: processor time per answer, by process. Unlike rates it hardly depends on what
//! else the machine is doing.

use std::fs;

use super::rig::Rig;

/// Ticks of /proc/PID/stat in a second: fixed by the kernel's interface to user space.
const TICKS_PER_SECOND: f64 = 100.0;

/// Processor seconds so far; all 0 where there is no /proc.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Cpu {
    service: f64,
    postgres: f64,
    redis: f64,
    client: f64,
}

impl Cpu {
    pub(crate) fn now(rig: &Rig) -> Self {
        let postmaster = rig.postgres.pid().unwrap_or_default();
        let redis = rig.redis.pid().unwrap_or_default();
        let services: Vec<u32> = rig.replicas.iter().map(|replica| replica.pid()).collect();
        let mut cpu = Self::default();
        for (pid, parent, seconds) in processes() {
            if services.contains(&pid) {
                cpu.service += seconds;
            } else if pid == postmaster || parent == postmaster {
                cpu.postgres += seconds;
            } else if pid == redis {
                cpu.redis += seconds;
            } else if pid == std::process::id() {
                cpu.client += seconds;
            }
        }
        cpu
    }

    /// Microseconds an answer since `self`, as text.
    pub(crate) fn per_answer(self, now: Self, answers: usize) -> String {
        let us = |before: f64, after: f64| (after - before) * 1e6 / answers.max(1) as f64;
        format!(
            "CPU us each: service {:.1}, Postgres {:.1}, Redis {:.1}, client {:.1}",
            us(self.service, now.service),
            us(self.postgres, now.postgres),
            us(self.redis, now.redis),
            us(self.client, now.client),
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
