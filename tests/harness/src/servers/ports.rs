//! Loopback ports for private servers.

use std::net::{Ipv4Addr, TcpListener};
use std::sync::atomic::{AtomicU16, Ordering};

use anyhow::{Result, anyhow};

/// Below the range that Linux and macOS give to outgoing connections: a client's socket could otherwise take the
/// port of a server that is down for a moment, and its restart would fail.
const FIRST: u16 = 20_000;
const COUNT: u16 = 12_000;

/// Whether nothing listens there at this moment.
pub fn is_free(port: u16) -> bool {
    TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok()
}

/// As [`is_free`], for a server that will listen on every address.
pub fn is_free_everywhere(port: u16) -> bool {
    TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).is_ok()
}

/// This port if it is free, else another one.
pub fn prefer(wanted: u16) -> Result<u16> {
    if is_free(wanted) { Ok(wanted) } else { free() }
}

/// A port on which nothing listens, and which this process has not handed out recently.
pub fn free() -> Result<u16> {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    // Each process starts at another port, so that two of them rarely race for one.
    let start = (std::process::id().wrapping_mul(97) % u32::from(COUNT)) as u16;
    (0..COUNT)
        .map(|_| FIRST + (start.wrapping_add(NEXT.fetch_add(1, Ordering::Relaxed))) % COUNT)
        .find(|&port| is_free_everywhere(port))
        .ok_or_else(|| anyhow!("no free loopback port between {FIRST} and {}", FIRST + COUNT))
}
