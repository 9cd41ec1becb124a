//! The event that messages of a conversation were erased, because their sender was deleted.

use serde::Serialize;
use uuid::Uuid;

/// Its place among the messages of its conversation that come with it: after all of them.
pub(super) const AFTER_MESSAGES: i64 = i64::MAX;

#[derive(Serialize)]
pub(super) struct Erased {
    pub(super) peer_id: Uuid,
    /// The highest of them.
    pub(super) seq: i64,
}

impl Erased {
    pub(super) fn render(&self) -> Vec<u8> {
        serde_json::to_vec(self).unwrap_or_default()
    }
}
