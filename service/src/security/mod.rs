//! Who a client is, and how much it may do.

pub(crate) mod accounts;
pub(crate) mod deletion;
pub(crate) mod limits;
pub(crate) mod passwords;
mod refresh;
pub(crate) mod sessions;
pub(crate) mod tokens;
