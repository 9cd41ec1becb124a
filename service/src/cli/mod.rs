//! The subcommands that do their work and exit, and the canary, which runs until it is stopped.

pub mod admin;
mod answer;
pub mod canary;
pub mod create_secret;
pub mod doctor;
pub mod healthcheck;
pub mod migrate;
pub mod smoke_test;
