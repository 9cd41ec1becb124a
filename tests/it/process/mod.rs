//! The built binary as a process: its start, its end, its configuration, and what it does when something is away.

mod commands;
mod configuration;
mod faults;
mod jobs;
mod lifecycle;
mod metrics;
mod postgres_away;
mod readme;
mod redis_away;
mod redis_modes;
mod support;
mod telemetry;
mod tls;
mod traces;
