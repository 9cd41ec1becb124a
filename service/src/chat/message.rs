//! A message, the pair of users that exchange it, and its one rendering as JSON.

use salvo_oapi::ToSchema;
use serde::Serialize;
use time::OffsetDateTime;
use uuid::Uuid;

use crate::timestamp;

/// The two users of a conversation, in an order that does not depend on who asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Pair {
    low: Uuid,
    high: Uuid,
}

impl Pair {
    pub(crate) fn new(one: Uuid, other: Uuid) -> Self {
        Self { low: one.min(other), high: one.max(other) }
    }

    pub(crate) fn low(self) -> Uuid {
        self.low
    }

    pub(crate) fn high(self) -> Uuid {
        self.high
    }
}

#[derive(Serialize, ToSchema, Debug)]
#[salvo(schema(name = "Message"))]
pub(crate) struct Message {
    #[salvo(schema(value_type = String, example = "01920b1e-9f6a-7c7e-8f4e-0f6c1f4f2a13"))]
    pub id: Uuid,
    /// 1, 2, 3... within the conversation, in commit order, without gaps.
    #[salvo(schema(example = 1))]
    pub seq: i64,
    #[salvo(schema(value_type = String, example = "01920b1e-9f6a-7c7e-8f4e-0f6c1f4f2a11"))]
    pub sender_id: Uuid,
    #[salvo(schema(value_type = String, example = "01920b1e-9f6a-7c7e-8f4e-0f6c1f4f2a12"))]
    pub recipient_id: Uuid,
    /// Empty once it was erased.
    #[salvo(schema(value_type = String, example = "Hello, Ben!"))]
    pub content: String,
    /// `true` where the sender was deleted and the content erased; otherwise it is not there.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    #[salvo(schema(required = false, example = true))]
    pub erased: bool,
    #[serde(serialize_with = "timestamp::serialize")]
    #[salvo(schema(value_type = String, format = DateTime, example = "2026-01-31T12:00:00.123456Z"))]
    pub created_at: OffsetDateTime,
}

/// A message as JSON: what clients get, and what the window keeps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RenderedMessage {
    pub seq: i64,
    pub json: Vec<u8>,
}

impl Message {
    /// No message is sent without a content, so an empty one was erased.
    pub(crate) fn new(
        id: Uuid,
        seq: i64,
        [sender_id, recipient_id]: [Uuid; 2],
        content: String,
        created_at: OffsetDateTime,
    ) -> Self {
        let erased = content.is_empty();
        Self { id, seq, sender_id, recipient_id, content, erased, created_at }
    }

    pub(crate) fn render(&self) -> RenderedMessage {
        RenderedMessage { seq: self.seq, json: serde_json::to_vec(self).unwrap_or_default() }
    }
}
