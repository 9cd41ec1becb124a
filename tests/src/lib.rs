//! The harness: private Postgres and Redis instances for tests and for `cargo xtask`.
