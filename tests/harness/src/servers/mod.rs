//! Private servers as child processes on loopback ports. Every wait has a limit, a server dies with the process that
//! started it, and the leftovers of a killed run are cleared before the next start.

pub mod collector;
pub mod daemon;
pub mod pgbouncer;
pub mod ports;
pub mod postgres;
pub mod programs;
pub mod redis;
pub mod sql;

mod clock;
mod home;

use std::path::Path;

use anyhow::Result;

/// Ends the server that a killed run left in `dir`, if one runs, and removes its files wherever they are.
pub fn clear(dir: &Path) -> Result<()> {
    for place in home::places(dir) {
        postgres::stop_earlier(&place)?;
        redis::stop_earlier(&place)?;
    }
    home::remove(dir)
}
