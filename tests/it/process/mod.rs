//! The built binary as a process: its start, its end, its configuration, and what it does when something is away.

mod commands;
mod configuration;
mod faults;
mod lifecycle;
mod readme;
mod support;
