//! Streams through real proxies, with the configurations of `deploy/examples`. For what each setting does, a test shows that
//! it fails without.

mod front;
mod haproxy;
mod nginx;
mod streams;
