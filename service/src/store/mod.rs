//! Postgres and Redis: connections, migrations, and whether they answer.

pub(crate) mod health;
pub mod migrations;
pub(crate) mod operation;
pub(crate) mod pooler;
pub mod postgres;
pub(crate) mod redis;
