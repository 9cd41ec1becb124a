//! Ctrl-C and SIGTERM start a graceful shutdown; the second signal ends the process at once.

use std::process;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

/// `timeout` and terminals may send one signal twice, to the process and to its group.
const SAME_SIGNAL: Duration = Duration::from_secs(1);

static ASKED: AtomicBool = AtomicBool::new(false);

/// After this call the first signal no longer ends the process.
pub fn listen() -> Result<()> {
    let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP])?;
    thread::spawn(move || {
        let mut first = None;
        for _ in signals.forever() {
            ASKED.store(true, Ordering::Relaxed);
            if first.get_or_insert_with(Instant::now).elapsed() > SAME_SIGNAL {
                process::exit(130);
            }
        }
    });
    Ok(())
}

pub fn asked_to_end() -> bool {
    ASKED.load(Ordering::Relaxed)
}

/// To be called between two steps.
pub fn check() -> Result<()> {
    if asked_to_end() {
        bail!("interrupted");
    }
    Ok(())
}
