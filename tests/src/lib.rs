//! The history checker, with all of the harness, for tests and for `cargo xtask`. It does not depend on the service.

pub mod history_checker;
pub mod proxy;

pub use harness::*;
