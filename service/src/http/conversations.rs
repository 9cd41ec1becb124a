//! A user's conversations.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use salvo::extract::{Extractible, Metadata};
use salvo::http::StatusCode;
use salvo::http::header::{HeaderName, HeaderValue, LINK};
use salvo::{Depot, Request, Writer};
use salvo_oapi::{BasicType, Components, EndpointArgRegister, Object, Operation, ToSchema, endpoint};
use serde::Serialize;
use serde_json::value::RawValue;
use time::OffsetDateTime;
use uuid::Uuid;

use super::body::Faults;
use super::caller::Caller;
use super::error::{self, Error};
use super::middleware::app;
use super::query::{document_query, query_integer, query_number, query_text};
use super::response::JsonResponse;
use crate::chat::conversations::{self, Conversations, Cursor};
use crate::chat::message::Message;

const PAGE_DEFAULT: i64 = 20;
const PAGE_MAX: i64 = 100;

/// From where a stream has everything that a list lacks.
pub(super) const STREAM_POSITION: HeaderName = HeaderName::from_static("stream-position");

#[derive(Serialize, ToSchema, Debug)]
#[salvo(schema(name = "Peer"))]
struct Peer {
    #[salvo(schema(value_type = String, example = "01920b1e-9f6a-7c7e-8f4e-0f6c1f4f2a12"))]
    id: Uuid,
    /// `null` once the user was deleted.
    #[salvo(schema(value_type = Option<String>, required = true, example = "ben"))]
    username: Option<String>,
}

#[derive(Serialize, ToSchema, Debug)]
#[salvo(schema(name = "Conversation"))]
struct Conversation {
    peer: Peer,
    #[salvo(schema(value_type = Message))]
    last_message: Box<RawValue>,
    /// The `seq` of the last message.
    #[salvo(schema(example = 1))]
    last_seq: i64,
}

/// List the caller's conversations, most recently active first
///
/// A conversation that becomes active while a client pages through the list moves to its top, before the pages that are
/// still to come: a stream from `Stream-Position` on has its message.
#[endpoint(
    operation_id = "list_conversations",
    tags("messages"),
    responses(
        (status_code = 200, description = "A page of conversations", body = Vec<Conversation>, headers(
            ("link" = String, description = "`rel=\"next\"` names the next page, relative to the request's URL, where there is one"),
            ("stream-position" = String, description = "A position taken with the list: `GET /stream?after=` it misses nothing that the list lacks"),
        )),
    )
)]
pub async fn list(caller: Caller, query: ListQuery, depot: &mut Depot) -> Result<JsonResponse, Error> {
    let ListQuery { limit, before } = query;
    let app = app(depot)?;
    let Conversations { conversations, next, position } =
        conversations::list(&app.database, caller.id, caller.session, before, limit).await?;
    let listed: Result<Vec<Conversation>, Error> = conversations
        .into_iter()
        .map(|conversation| {
            let last_seq = conversation.last_message.seq;
            let json = String::from_utf8(conversation.last_message.json).map_err(Error::internal)?;
            Ok(Conversation {
                peer: Peer { id: conversation.peer, username: conversation.peer_username },
                last_message: RawValue::from_string(json).map_err(Error::internal)?,
                last_seq,
            })
        })
        .collect();
    let position = HeaderValue::from_str(&position).map_err(Error::internal)?;
    let mut response = JsonResponse::json(StatusCode::OK, &listed?)?.header(STREAM_POSITION, position);
    if let Some(next) = next {
        let link = format!("<conversations?limit={limit}&before={}>; rel=\"next\"", encode(next));
        response = response.header(LINK, HeaderValue::from_str(&link).map_err(Error::internal)?);
    }
    Ok(response)
}

/// The query of `GET /conversations`.
#[derive(Debug)]
pub(super) struct ListQuery {
    limit: i64,
    before: Option<Cursor>,
}

impl<'ex> Extractible<'ex> for ListQuery {
    fn metadata() -> &'static Metadata {
        static METADATA: Metadata = Metadata::new("ListQuery");
        &METADATA
    }

    #[expect(refining_impl_trait, reason = "the concrete error is the more useful promise")]
    async fn extract(req: &'ex mut Request, _depot: &'ex mut Depot) -> Result<Self, Error> {
        let limit = query_number(req, "limit")?.unwrap_or(PAGE_DEFAULT);
        let before = query_text(req, "before")?;
        let mut faults = Faults::default();
        if !(1..=PAGE_MAX).contains(&limit) {
            faults.add("limit", format!("is {limit}: use 1 to {PAGE_MAX}"));
        }
        let cursor = before.and_then(decode);
        if before.is_some() && cursor.is_none() {
            faults.add("before", "is no cursor: take the one in the Link of the page before");
        }
        faults.check()?;
        Ok(Self { limit, before: cursor })
    }
}

impl EndpointArgRegister for ListQuery {
    fn register(components: &mut Components, operation: &mut Operation, _arg: &str) {
        let limit = query_integer(1).maximum(PAGE_MAX).default_value(PAGE_DEFAULT.into());
        document_query(operation, "limit", false, limit, "Conversations in a page");
        let cursor = Object::with_type(BasicType::String);
        document_query(operation, "before", false, cursor, "The cursor in the `Link` of the page before");
        for (status, description) in [
            (StatusCode::BAD_REQUEST, "A query parameter does not parse"),
            (StatusCode::UNPROCESSABLE_ENTITY, "A query parameter is out of range, or no cursor"),
        ] {
            error::document(components, operation, status, description, &[]);
        }
    }
}

/// Microseconds since 1970, as Postgres has them, and the conversation.
fn encode(cursor: Cursor) -> String {
    let micros = (cursor.last_at.unix_timestamp_nanos() / 1000) as i64;
    URL_SAFE_NO_PAD.encode([&micros.to_be_bytes()[..], cursor.conversation.as_bytes()].concat())
}

fn decode(text: &str) -> Option<Cursor> {
    let bytes: [u8; 24] = URL_SAFE_NO_PAD.decode(text).ok()?.try_into().ok()?;
    let (micros, conversation) = bytes.split_first_chunk::<8>()?;
    let nanos = i128::from(i64::from_be_bytes(*micros)) * 1000;
    Some(Cursor {
        last_at: OffsetDateTime::from_unix_timestamp_nanos(nanos).ok()?,
        conversation: Uuid::from_slice(conversation).ok()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cursor_is_read_as_it_was_written() {
        let last_at = OffsetDateTime::from_unix_timestamp_nanos(1_767_000_000_123_456_000).expect("a time");
        let cursor = Cursor { last_at, conversation: Uuid::from_u128(9) };
        assert_eq!(decode(&encode(cursor)), Some(cursor));
        let far = URL_SAFE_NO_PAD.encode([0x7f; 24]);
        for bad in ["", "x", "AAAA", "%", &format!("{}A", encode(cursor)), &far] {
            assert_eq!(decode(bad), None, "{bad}");
        }
    }
}
