//! The HTTP API: routes, extractors, errors, and a file of handlers for each topic.

mod account;
mod blocks;
mod body;
mod caller;
mod client_ip;
mod conversations;
mod cors;
mod error;
mod export;
mod health;
mod messages;
mod middleware;
mod openapi;
mod page;
mod paths;
mod query;
mod rate_limit;
mod request_id;
mod response;
pub mod routes;
mod sessions;
mod stream;
mod users;
