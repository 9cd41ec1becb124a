//! Messages: how they are committed, and how a conversation is read without ever being stale.

pub(crate) mod check;
pub(crate) mod conversations;
pub(crate) mod erasure;
pub(crate) mod export;
pub(crate) mod history;
pub(crate) mod message;
pub(crate) mod outbox;
pub(crate) mod pages;
pub(crate) mod permission;
pub(crate) mod recent;
pub(crate) mod retention;
pub(crate) mod streams;
pub(crate) mod sweep;
