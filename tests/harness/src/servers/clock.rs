//! The clock of one server, which can be set while the machine's own stays as it is. `libfaketime` does that.

use std::fs;
use std::process::Command;

use anyhow::{Context as _, Result};

use super::home::Home;
use super::programs;

const FILE: &str = "clock";

/// Makes the server's clock one that [`set`] can set. Timers that count intervals stay as they are.
pub(super) fn equip(command: &mut Command, home: &Home) -> Result<()> {
    let library = programs::libfaketime().context("libfaketime is not installed")?;
    set(home, 0)?;
    // Redis's allocator asks for the time before the library is ready; the C library's own does not.
    command.env("LD_PRELOAD", format!("{}:libc.so.6", library.display()));
    command.env("FAKETIME_TIMESTAMP_FILE", home.path().join(FILE));
    // All processes of Postgres see the new time at once.
    command.env("FAKETIME_NO_CACHE", "1");
    command.env("FAKETIME_DONT_FAKE_MONOTONIC", "1");
    Ok(())
}

/// Sets the clock ahead of the machine's by this many seconds, or behind it.
pub(super) fn set(home: &Home, seconds: i64) -> Result<()> {
    // Renamed, so that no reader finds an empty file.
    let new = home.write("clock.new", &format!("{seconds:+}\n"))?;
    fs::rename(new, home.path().join(FILE)).context("set a server's clock")
}
