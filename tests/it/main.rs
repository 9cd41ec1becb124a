//! The integration tests: one binary, a module per topic.

mod architecture;
mod authentication;
mod conversations;
mod cors;
mod docs;
mod errors;
mod harness;
mod head;
mod health;
mod history_checker;
mod idempotency;
mod limits;
mod login;
mod messages;
mod metrics;
mod migrations;
mod operations;
mod paths;
mod process;
mod properties;
mod recent_window;
mod send;
mod streams;
mod support;
mod times;
mod users;
