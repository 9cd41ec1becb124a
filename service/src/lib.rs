//! A 1:1 chat back end. `README.md` has the bird's eye view; the modules stand in reading order.

pub mod app;
pub mod auth;
pub mod call;
pub mod config;
pub mod create_secret;
pub mod db;
pub mod doctor;
pub mod edge;
pub mod error;
pub mod health;
pub mod input;
pub mod limits;
pub mod log_format;
pub mod log_writer;
pub mod messages;
pub mod metrics;
pub mod openapi;

pub mod outbox;
pub mod passwords;
pub mod recent;
pub mod redis;
pub mod reply;
pub mod request_id;
pub mod routes;
pub mod sabotage;
pub mod serve;
pub mod smoke_test;
pub mod span_counter;
pub mod sweep;
pub mod telemetry;
pub mod trace;
pub mod users;
