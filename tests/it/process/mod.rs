//! The built binary as a process: its start, its end, its configuration, and what it does when something is away.

mod lifecycle;
mod support;
