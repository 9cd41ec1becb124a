//! Who a client is, and how much it may do.

pub(crate) mod limits;
pub(crate) mod passwords;
pub(crate) mod tokens;
