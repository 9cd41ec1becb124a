//! The chat page at `/`.

mod browser;
mod chat;
mod files;
mod module;
mod outages;
