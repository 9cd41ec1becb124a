//! The chat page at `/`. `cargo xtask test` finds or installs the browser, and runs these tests; a single one:
//! `cargo xtask test -- --test it -- --ignored page::NAME`.

mod browser;
mod chat;
mod files;
mod module;
mod outages;
mod sessions;
