//! The integration tests: one binary, a module per topic.

mod authentication;
mod harness;
mod login;
mod support;
mod users;
