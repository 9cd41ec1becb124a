//! The private servers that a run of checks works on.

use anyhow::Result;
use harness::{Postgres, PostgresOptions, Redis, RedisOptions, Scratch, install};

use crate::steps::Progress;

/// Gone when it is dropped.
#[derive(Debug)]
pub struct Servers {
    pub postgres: Postgres,
    pub redis: Redis,
    // Dropped last: the servers' directories are in it.
    _scratch: Scratch,
}

impl Servers {
    /// Installs what is missing, and starts both.
    pub fn start(progress: &Progress) -> Result<Self> {
        install::ensure_programs(|line| progress.note(line))?;
        let scratch = Scratch::new("servers")?;
        let postgres = Postgres::start(&scratch.path().join("postgres"), PostgresOptions::fast())?;
        let redis = Redis::start(&scratch.path().join("redis"), RedisOptions::default())?;
        Ok(Self { postgres, redis, _scratch: scratch })
    }
}
