//! The integration tests: one binary, a module per topic.

mod authentication;
mod harness;
mod idempotency;
mod login;
mod messages;
mod process;
mod probe;
mod send;
mod support;
mod users;
