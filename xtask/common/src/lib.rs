//! What the commands of `cargo xtask` share, with few dependencies: the front door is built on it.

pub mod args;
pub mod chart;
pub mod conversation;
pub mod dry_run;
pub mod git;
pub mod go_tools;
pub mod image;
pub mod kind;
pub mod migrations;
pub mod prometheus;
pub mod servers;
pub mod signals;
pub mod steps;
pub mod tiltfile;
pub mod workspace;
