//! Postgres and Redis: connections, migrations, and whether they answer.

pub mod access;
pub(crate) mod barrier;
mod email_keys;
pub(crate) mod health;
pub mod migrations;
pub(crate) mod operation;
pub(crate) mod pool;
pub(crate) mod pooler;
mod position_server;
pub mod postgres;
pub(crate) mod redis;
pub(crate) mod wake_ups;
