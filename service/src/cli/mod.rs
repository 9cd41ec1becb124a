//! The subcommands that do their work and exit.

pub mod admin;
pub mod create_secret;
pub mod doctor;
pub mod healthcheck;
pub mod migrate;
pub mod smoke_test;
