//! Messages: send one, read a conversation newest first.

use std::borrow::Cow;

use salvo::extract::{Extractible, Metadata};
use salvo::http::StatusCode;
use salvo::http::header::{HeaderName, HeaderValue, LINK, WARNING};
use salvo::{Depot, Request, Writer};
use salvo_oapi::{BasicType, Components, EndpointArgRegister, Object, Operation, ToSchema, endpoint};
use serde::Deserialize;
use uuid::Uuid;

use super::body::{Body, Faults, Text};
use super::caller::Caller;
use super::error::{self, Error, NO_PEER, NO_RECIPIENT, Problem};
use super::middleware::app;
use super::query::{document_query, query_integer, query_number, query_text};
use super::rate_limit::SendPermit;
use super::response::JsonResponse;
use crate::chat::history::Page;
use crate::chat::message::{Message, RenderedMessage};
use crate::chat::outbox::{Accepted, Outgoing};
use crate::chat::pages::{PageRequest, Position};
use crate::text;

/// Unicode scalar values in a message, counted after its edges were trimmed.
const CONTENT_MAX_CHARS: usize = 4000;

const PAGE_DEFAULT: i64 = 5;
const PAGE_MAX: i64 = 100;

const IDEMPOTENCY_KEY_MAX: usize = 255;
pub(super) const IDEMPOTENCY_REPLAYED: HeaderName = HeaderName::from_static("idempotency-replayed");

#[derive(Deserialize, ToSchema, Debug)]
#[salvo(schema(name = "SendMessage"))]
pub(super) struct SendMessage {
    #[serde(default)]
    #[salvo(schema(value_type = String, required = true, example = "01920b1e-9f6a-7c7e-8f4e-0f6c1f4f2a12"))]
    recipient_id: Text,
    /// White space at the edges is dropped; what remains is stored and returned exactly. It has a visible character, and no
    /// control characters below U+0020 but tab, line feed and carriage return.
    #[serde(default)]
    #[salvo(schema(value_type = String, required = true, min_length = 1, max_length = 4000, example = "Hello, Ben!"))]
    content: Text,
}

/// Send a message
///
/// Answered once the message is committed. With an `Idempotency-Key` the request may be repeated for 24 hours:
/// it answers with the first message.
#[endpoint(
    operation_id = "send_message",
    tags("messages"),
    parameters(("Idempotency-Key" = Option<String>, Header, description = "The sender's own name for this message: 1 to 255 visible ASCII characters", example = json!("6b1f6f3a-1"))),
    responses(
        (status_code = 201, description = "The committed message", body = Message, headers(("idempotency-replayed" = String, description = "`true` where the key was known and this is the first message"))),
        (status_code = 403, description = "The caller cannot write to this user", body = Problem, content_type = "application/problem+json"),
        (status_code = 404, description = "No such recipient", body = Problem, content_type = "application/problem+json"),
        (status_code = 409, description = "The Idempotency-Key stands for another message", body = Problem, content_type = "application/problem+json"),
    )
)]
pub async fn send(
    caller: Caller,
    _permit: SendPermit,
    body: Body<SendMessage>,
    req: &mut Request,
    depot: &mut Depot,
) -> Result<JsonResponse, Error> {
    let outgoing = check(caller, body.0, req)?;
    let Accepted { json, replayed } = app(depot)?.outbox.send(outgoing).await?;
    let response = JsonResponse::raw(StatusCode::CREATED, json);
    Ok(if replayed {
        response.header(IDEMPOTENCY_REPLAYED, HeaderValue::from_static("true"))
    } else {
        response
    })
}

/// Read a conversation, newest first
#[endpoint(
    operation_id = "list_messages",
    tags("messages"),
    responses(
        (status_code = 200, description = "A page of messages, newest first", body = Vec<Message>, headers(
            ("link" = String, description = "`rel=\"next\"` names the next page, relative to the request's URL, where there is one: back in time, or with `after` forward"),
            ("warning" = String, description = "`110` where Postgres is unavailable and the page may lack the newest messages"),
        )),
        (status_code = 404, description = "No such peer", body = Problem, content_type = "application/problem+json"),
    )
)]
pub async fn list(caller: Caller, query: PageQuery, depot: &mut Depot) -> Result<JsonResponse, Error> {
    let PageQuery { peer, limit, position } = query;
    let request = PageRequest { reader: caller.id, session: caller.session, peer, limit, position };
    let Page { messages, next, stale } = app(depot)?.history.page(&request).await?;
    let mut response = JsonResponse::raw(StatusCode::OK, json_array(&messages));
    if let Some(position) = next {
        let link = link(peer, limit, position);
        response = response.header(LINK, HeaderValue::from_str(&link).map_err(Error::internal)?);
    }
    if stale {
        response = response.header(WARNING, HeaderValue::from_static("110 - \"Response is Stale\""));
    }
    Ok(response)
}

/// The messages are JSON already: they are joined, not rendered again.
fn json_array(messages: &[RenderedMessage]) -> Vec<u8> {
    let length: usize = messages.iter().map(|message| message.json.len() + 1).sum();
    let mut json = Vec::with_capacity(2 + length);
    json.push(b'[');
    for (index, message) in messages.iter().enumerate() {
        if index > 0 {
            json.push(b',');
        }
        json.extend_from_slice(&message.json);
    }
    json.push(b']');
    json
}

/// A relative reference, so that it holds below any prefix that a proxy strips. With the path's last segment: a lone query is
/// one, too, but parsers of RFC 2396, such as Java's `URI.resolve`, take it for the path's folder.
fn link(peer: Uuid, limit: i64, next: Position) -> String {
    let (name, value) = match next {
        Position::Offset(offset) => ("offset", offset),
        Position::Before(seq) => ("before", seq),
        Position::After(seq) => ("after", seq),
    };
    format!("<messages?peer_id={peer}&limit={limit}&{name}={value}>; rel=\"next\"")
}

/// The query of `GET /messages`.
#[derive(Debug)]
pub(super) struct PageQuery {
    peer: Uuid,
    limit: i64,
    position: Position,
}

impl<'ex> Extractible<'ex> for PageQuery {
    fn metadata() -> &'static Metadata {
        static METADATA: Metadata = Metadata::new("PageQuery");
        &METADATA
    }

    #[expect(refining_impl_trait, reason = "the concrete error is the more useful promise")]
    async fn extract(req: &'ex mut Request, _depot: &'ex mut Depot) -> Result<Self, Error> {
        let peer = query_text(req, "peer_id")?;
        let limit = query_number(req, "limit")?.unwrap_or(PAGE_DEFAULT);
        let [offset, before, after] =
            [query_number(req, "offset")?, query_number(req, "before")?, query_number(req, "after")?];
        let mut faults = Faults::default();
        if peer.is_none() {
            faults.add("peer_id", "is missing: give the other user's id");
        }
        if !(1..=PAGE_MAX).contains(&limit) {
            faults.add("limit", format!("is {limit}: use 1 to {PAGE_MAX}"));
        }
        for (name, value) in [("offset", offset), ("before", before), ("after", after)] {
            if let Some(value) = value.filter(|value| *value < 0) {
                faults.add(name, format!("is {value}: use 0 or more"));
            }
        }
        let position = match (offset, before, after) {
            (offset, None, None) => Position::Offset(offset.unwrap_or(0)),
            (None, Some(before), None) => Position::Before(before),
            (None, None, Some(after)) => Position::After(after),
            _ => {
                let extra = if before.is_some() && after.is_some() { "before" } else { "offset" };
                faults.add(extra, "offset, before and after exclude one another: give one of them");
                Position::Offset(0)
            }
        };
        faults.check()?;
        let peer = peer.and_then(|peer| Uuid::try_parse(peer).ok()).ok_or(NO_PEER)?;
        Ok(Self { peer, limit, position })
    }
}

impl EndpointArgRegister for PageQuery {
    fn register(components: &mut Components, operation: &mut Operation, _arg: &str) {
        let id = Object::with_type(BasicType::String).example("01920b1e-9f6a-7c7e-8f4e-0f6c1f4f2a12");
        document_query(operation, "peer_id", true, id, "The other user of the conversation");
        let limit = query_integer(1).maximum(PAGE_MAX).default_value(PAGE_DEFAULT.into());
        document_query(operation, "limit", false, limit, "Messages in a page");
        // Without a default, which some generated clients would send: the three exclude one another.
        for (name, description) in [
            ("offset", "Skip this many of the newest; not together with `before` or `after`"),
            ("before", "Only messages with a smaller seq"),
            ("after", "The messages that follow this seq directly; not together with `before`"),
        ] {
            document_query(operation, name, false, query_integer(0), description);
        }
        for (status, description) in [
            (StatusCode::BAD_REQUEST, "A query parameter does not parse"),
            (
                StatusCode::UNPROCESSABLE_ENTITY,
                "A query parameter is missing, out of range, or excludes another",
            ),
        ] {
            error::document(components, operation, status, description, &[]);
        }
    }
}

/// Checks everything about a message that needs no database.
fn check(caller: Caller, message: SendMessage, req: &Request) -> Result<Outgoing, Error> {
    let mut faults = Faults::default();
    let recipient = faults.take("recipient_id", message.recipient_id, Ok);
    let content = faults.take("content", message.content, valid_content);
    let recipient = Uuid::try_parse(&recipient);
    if recipient == Ok(caller.id) {
        faults.add("recipient_id", "is your own id: a message goes to another user");
    }
    let key = match req.headers().get("idempotency-key").map(HeaderValue::as_bytes) {
        None => None,
        Some(key) if is_valid_key(key) => Some(String::from_utf8_lossy(key).into_owned()),
        Some(_) => {
            faults.add("Idempotency-Key", "is not usable: send 1 to 255 visible ASCII characters");
            None
        }
    };
    faults.check()?;
    Ok(Outgoing {
        sender: caller.id,
        session: caller.session,
        recipient: recipient.map_err(|_| NO_RECIPIENT)?,
        content,
        key,
    })
}

fn valid_content(content: String) -> Result<String, Cow<'static, str>> {
    let trimmed = content.trim();
    let is_refused = |byte: u8| byte < b' ' && !matches!(byte, b'\t' | b'\r' | b'\n');
    // A byte is at most one character, so most messages need no counting.
    let length = if trimmed.len() <= CONTENT_MAX_CHARS { trimmed.len() } else { trimmed.chars().count() };
    // In ordinary text the first character is visible.
    if !trimmed.chars().any(text::is_visible) {
        Err("is empty: send 1 to 4000 characters of which one is visible".into())
    } else if length > CONTENT_MAX_CHARS {
        Err(format!("has {length} characters: send at most {CONTENT_MAX_CHARS}").into())
    // Every byte is looked at, without an early end, so that the compiler takes many at once.
    } else if trimmed.bytes().fold(false, |found, byte| found | is_refused(byte)) {
        let control = trimmed.bytes().find(|byte| is_refused(*byte)).unwrap_or_default();
        Err(format!("has the control character U+{control:04X}: of those send only tab and line ends").into())
    } else if trimmed.len() == content.len() {
        Ok(content)
    } else {
        Ok(trimmed.to_owned())
    }
}

fn is_valid_key(key: &[u8]) -> bool {
    (1..=IDEMPOTENCY_KEY_MAX).contains(&key.len()) && key.iter().all(u8::is_ascii_graphic)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_loses_its_edges_and_nothing_else() {
        let kept = |content: &str| valid_content(content.to_owned()).expect("valid");
        assert_eq!(kept(" \u{3000}\n a  b\t\u{2003} "), "a  b");
        assert_eq!(kept("<b>שלום</b> 👩‍👩‍👧"), "<b>שלום</b> 👩‍👩‍👧");
        assert_eq!(kept(&"🦀".repeat(4000)), "🦀".repeat(4000));
        assert_eq!(kept(&format!(" {} ", "x".repeat(4000))), "x".repeat(4000));
        assert_eq!(kept("a\tb\r\nc\u{7f}\u{85}d"), "a\tb\r\nc\u{7f}\u{85}d");
        assert_eq!(kept("\u{200d}\u{2800}.\u{fe0f}"), "\u{200d}\u{2800}.\u{fe0f}");
        for bad in [
            "",
            " \u{2003}\n",
            "a\0b",
            "a\u{1b}[1m",
            "\u{7}",
            "\u{2800}",
            "\u{3164} \u{200b}",
            &"x".repeat(4001),
            &"🦀".repeat(4001),
        ] {
            assert!(valid_content(bad.to_owned()).is_err());
        }
    }

    #[test]
    fn idempotency_keys_are_visible_ascii() {
        for good in [&b"a"[..], b"~!", &[b'x'; 255]] {
            assert!(is_valid_key(good));
        }
        for bad in [&b""[..], b"a b", b"\xc3\xa4", b"a\x7f", &[b'x'; 256]] {
            assert!(!is_valid_key(bad));
        }
    }
}
