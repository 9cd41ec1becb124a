//! The built binary as a process: how it starts and ends, its configuration, and what it does when a dependency is
//! unavailable.

mod commands;
mod configuration;
mod connections;
mod deletion;
mod dotenv;
mod examples;
mod faults;
mod generated_client;
mod installation;
mod jobs;
mod lifecycle;
mod many_streams;
mod metrics;
mod pooler;
mod postgres_read_only;
mod postgres_unavailable;
mod proxies;
mod readme;
mod redis_modes;
mod redis_unavailable;
mod support;
mod telemetry;
mod tls;
mod traces;
