//! Injects the scheduled faults into the system under test.

use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use rustix::process::Signal;

use super::Disturbance;
use super::run::Run;
use super::schedule::{Fault, REPLICAS, RedisFault, Server};
use super::system::{has_clocks, lock};
use crate::Postgres;
use crate::proxy::Link;

impl Run<'_> {
    /// Injects one fault after another until the time for faults is over, and opens the links again.
    pub(super) fn inject_faults(&self, next: impl Fn(u64, u64) -> (Duration, Fault)) -> Result<()> {
        let mut outcome = Ok(());
        for index in 0.. {
            let (pause, fault) = next(self.options.seed, index);
            self.wait(pause);
            if self.faults_end.load(Ordering::Relaxed) || self.now() >= self.options.duration {
                break;
            }
            if fault.sets_a_clock() && !has_clocks() {
                continue;
            }
            lock(&self.faults).push((self.now(), fault));
            let disturbance = self.begin_disturbance(fault);
            outcome = self.apply(fault).with_context(|| fault.name());
            lock(&self.history).disturbances[disturbance].end = Some(self.now());
            if outcome.is_err() {
                break;
            }
        }
        self.system.open_links();
        outcome
    }

    /// The disturbance's index in the history.
    fn begin_disturbance(&self, fault: Fault) -> usize {
        let disturbances = &mut lock(&self.history).disturbances;
        let (start, redis_only) = (self.now(), fault.is_of_redis_only());
        disturbances.push(Disturbance { start, end: None, redis_only });
        disturbances.len() - 1
    }

    fn apply(&self, fault: Fault) -> Result<()> {
        let system = self.system;
        match fault {
            Fault::Redis { fault, shard } => {
                lock(&system.redis).apply(fault, shard, |time| self.wait(time))?;
            }
            Fault::Link { server, replica, link, time } => {
                system.set_link(server, replica, link);
                self.wait(time);
                system.set_link(server, replica, Link::Open);
            }
            Fault::Split { replica, time } => {
                system.split(replica, true);
                self.wait(time);
                system.split(replica, false);
            }
            Fault::Apart { uninformed, link, lead, time } => {
                let other = (uninformed + 1) % REPLICAS;
                system.set_link(Server::Postgres, uninformed, link);
                self.wait(lead);
                system.set_link(Server::Redis, other, Link::Cut);
                self.wait(time);
                system.set_link(Server::Redis, other, Link::Open);
                self.wait(lead);
                system.set_link(Server::Postgres, uninformed, Link::Open);
            }
            Fault::Frozen { replica, lead, time } => {
                system.set_link(Server::Redis, replica, Link::Cut);
                self.wait(lead);
                system.replicas[replica].signal(Signal::STOP);
                self.wait(time);
                system.replicas[replica].signal(Signal::CONT);
                self.wait(lead);
                system.set_link(Server::Redis, replica, Link::Open);
            }
            Fault::UnseenRollback { replica, delay, age } => {
                system.set_link(Server::Postgres, replica, Link::Slow(delay));
                let rollback = RedisFault::Rollback { age };
                lock(&system.redis).apply(rollback, 0, |time| self.wait(time))?;
                self.wait(Duration::from_millis(500));
                system.set_link(Server::Postgres, replica, Link::Open);
            }
            Fault::PostgresPause(_)
            | Fault::PostgresClock { .. }
            | Fault::PostgresRestart
            | Fault::PostgresKill { .. } => {
                if let Some(postgres) = &mut *lock(&system.postgres) {
                    self.apply_to_postgres(postgres, fault)?;
                }
            }
            Fault::ReplicaKill { replica, down } => {
                system.replicas[replica].kill();
                self.wait(down);
                system.replicas[replica].launch()?;
            }
            Fault::ReplicaPause { replica, time } => {
                system.replicas[replica].signal(Signal::STOP);
                self.wait(time);
                system.replicas[replica].signal(Signal::CONT);
            }
            Fault::ReplicaStop { replica } => {
                system.replicas[replica].stop()?;
                system.replicas[replica].launch()?;
            }
        }
        for (number, replica) in system.replicas.iter().enumerate() {
            ensure!(!replica.has_died(), "replica {number} has ended:\n{}", replica.last_words());
        }
        Ok(())
    }

    fn apply_to_postgres(&self, postgres: &mut Postgres, fault: Fault) -> Result<()> {
        match fault {
            Fault::PostgresPause(time) => {
                postgres.pause();
                self.wait(time);
                postgres.resume();
            }
            Fault::PostgresClock { seconds, time } => {
                postgres.set_clock(seconds)?;
                self.wait(time);
                postgres.set_clock(0)?;
            }
            Fault::PostgresRestart => postgres.restart()?,
            Fault::PostgresKill { down } => {
                postgres.kill()?;
                self.wait(down);
                postgres.restart()?;
            }
            _ => {}
        }
        Ok(())
    }

    /// Returns early once the time for faults is over.
    fn wait(&self, time: Duration) {
        let until = Instant::now() + time;
        while Instant::now() < until && !self.faults_end.load(Ordering::Relaxed) {
            thread::sleep(until.saturating_duration_since(Instant::now()).min(Duration::from_millis(20)));
        }
    }
}
