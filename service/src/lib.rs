//! A 1:1 chat back end. `ARCHITECTURE.md` shows the layers and walks through a send and a read.

pub mod app;
pub mod chat;
pub mod cli;
pub mod config;
pub mod failpoints;
pub mod http;
pub mod security;
pub mod serve;
pub mod store;
pub mod telemetry;
mod text;
mod timestamp;
pub mod workers;
