//! The harness: private Postgres and Redis instances, and the built service, for tests and for `cargo xtask`.
//! Blocking std code on purpose: it depends on neither the service nor a runtime, so that xtask builds quickly.

pub mod history_checker;
pub mod http;
pub mod install;
pub mod places;
pub mod proxy;
pub mod replica;
pub mod servers;

pub use history_checker as history;
pub use places::{Scratch, service_binary};
pub use replica::Replica;
pub use servers::postgres::{Durability, Postgres, PostgresOptions};
pub use servers::redis::{Redis, RedisOptions};
