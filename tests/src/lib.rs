//! The harness: private Postgres and Redis servers, processes of the built service, and the history checker, for tests and
//! for `cargo xtask`. It must not depend on the service, so that xtask builds quickly. Its API is blocking.

pub mod history_checker;
pub mod http;
pub mod install;
pub mod places;
pub mod proxy;
pub mod replica;
pub mod servers;

pub use places::{Scratch, service_binary};
pub use replica::Replica;
pub use servers::postgres::{Durability, Postgres, PostgresOptions};
pub use servers::redis::{Redis, RedisOptions};
