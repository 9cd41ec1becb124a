//! The harness: private Postgres and Redis instances, replicas of the built service, and a client for them.
//! Blocking std code on purpose: it depends on neither the service nor a runtime, so that xtask builds quickly.

pub mod http;
pub mod install;
pub mod places;
pub mod replica;
pub mod servers;
pub mod sse;
pub mod users;

pub use places::{Scratch, service_binary};
pub use replica::Replica;
pub use servers::pgbouncer::PgBouncer;
pub use servers::postgres::{Durability, Postgres, PostgresOptions};
pub use servers::redis::{Redis, RedisOptions};
pub use users::{PASSWORD, User};
