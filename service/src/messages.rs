//! Messages: send one, read a conversation newest first.

use std::borrow::Cow;

use salvo::extract::{Extractible, Metadata};
use salvo::http::StatusCode;
use salvo::http::header::{HeaderName, HeaderValue, LINK, WARNING};
use salvo::{Depot, Request, Writer};
use salvo_oapi::{BasicType, Components, EndpointArgRegister, Object, Operation, ToSchema, endpoint};
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use uuid::Uuid;

use crate::app::App;
use crate::auth::Caller;
use crate::call::Call;
use crate::db::Database;
use crate::error::{self, Error, Problem, is_unavailable};
use crate::input::{Body, Faults, Text, app, document_query, query_number, query_text};
use crate::limits::SendPermit;
use crate::metrics::CacheOutcome;
use crate::outbox::{Accepted, Outgoing};
use crate::recent::{Element, Found, Lookup, Miss};
use crate::reply::Reply;
use crate::sabotage::{self, Sabotage};
use crate::users::GONE;

/// Unicode scalar values in a message, counted after its edges were trimmed.
const CONTENT_MAX_CHARS: usize = 4000;

const PAGE_DEFAULT: i64 = 5;
const PAGE_MAX: i64 = 100;

const IDEMPOTENCY_KEY_MAX: usize = 255;
const IDEMPOTENCY_REPLAYED: HeaderName = HeaderName::from_static("idempotency-replayed");

/// The two users of a conversation, whoever of them asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Pair {
    low: Uuid,
    high: Uuid,
}

#[derive(Deserialize, ToSchema, Debug)]
#[salvo(schema(name = "SendMessage"))]
pub struct SendMessage {
    #[serde(default)]
    #[salvo(schema(value_type = String, required = true, example = "01920b1e-9f6a-7c7e-8f4e-0f6c1f4f2a12"))]
    recipient_id: Text,
    /// White space at the edges is dropped; what remains is stored and returned exactly.
    #[serde(default)]
    #[salvo(schema(value_type = String, required = true, min_length = 1, max_length = 4000, example = "Hello, Ben!"))]
    content: Text,
}

#[derive(Serialize, ToSchema, Debug)]
#[salvo(schema(name = "Message"))]
pub struct Message {
    #[salvo(schema(value_type = String, example = "01920b1e-9f6a-7c7e-8f4e-0f6c1f4f2a13"))]
    pub id: Uuid,
    /// 1, 2, 3... within the conversation, in commit order, without gaps.
    #[salvo(schema(example = 1))]
    pub seq: i64,
    #[salvo(schema(value_type = String, example = "01920b1e-9f6a-7c7e-8f4e-0f6c1f4f2a11"))]
    pub sender_id: Uuid,
    #[salvo(schema(value_type = String, example = "01920b1e-9f6a-7c7e-8f4e-0f6c1f4f2a12"))]
    pub recipient_id: Uuid,
    #[salvo(schema(value_type = String, example = "Hello, Ben!"))]
    pub content: String,
    #[serde(with = "time::serde::rfc3339")]
    #[salvo(schema(value_type = String, example = "2026-01-31T12:00:00.123456Z"))]
    pub created_at: OffsetDateTime,
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
) -> Result<Reply, Error> {
    let app = app(depot)?;
    let outgoing = check(caller, body.0, req)?;
    let accepted = app.outbox.send(outgoing).await?;
    Ok(reply(accepted))
}

/// Read a conversation, newest first
#[endpoint(
    operation_id = "list_messages",
    tags("messages"),
    responses(
        (status_code = 200, description = "A page of messages, newest first", body = Vec<Message>, headers(
            ("link" = String, description = "`rel=\"next\"` names the next page, where there is one: back in time, or with `after` onward"),
            ("warning" = String, description = "`110` where Postgres is away and the page may lack the newest messages"),
        )),
        (status_code = 404, description = "No such peer", body = Problem, content_type = "application/problem+json"),
    )
)]
pub async fn history(caller: Caller, page: Page, depot: &mut Depot) -> Result<Reply, Error> {
    let app = app(depot)?;
    let answer = read(app, caller, &page).await?;
    let mut json =
        Vec::with_capacity(2 + answer.elements.iter().map(|element| element.json.len() + 1).sum::<usize>());
    json.push(b'[');
    for (index, element) in answer.elements.iter().enumerate() {
        if index > 0 {
            json.push(b',');
        }
        json.extend_from_slice(&element.json);
    }
    json.push(b']');
    let mut reply = Reply::raw(StatusCode::OK, json);
    if let Some(next) = page.next(&answer) {
        reply = reply.header(LINK, HeaderValue::from_str(&next).map_err(Error::internal)?);
    }
    if answer.stale {
        reply = reply.header(WARNING, HeaderValue::from_static("110 - \"Response is Stale\""));
    }
    Ok(reply)
}

/// Which messages a client asks for.
#[derive(Debug)]
pub struct Page {
    peer: Uuid,
    limit: i64,
    position: Position,
}

#[derive(Clone, Copy, Debug)]
enum Position {
    /// After the newest `n`.
    Offset(i64),
    /// Below a seq.
    Before(i64),
    /// Directly above a seq.
    After(i64),
}

struct Answer {
    elements: Vec<Element>,
    /// The conversation's last seq, where it is known: a window only knows of messages that it shows.
    last_seq: Option<i64>,
    stale: bool,
}

impl Pair {
    pub fn new(one: Uuid, other: Uuid) -> Self {
        Self { low: one.min(other), high: one.max(other) }
    }

    pub fn low(self) -> Uuid {
        self.low
    }

    pub fn high(self) -> Uuid {
        self.high
    }
}

impl Message {
    /// The message as it is answered, streamed and kept in the window: one rendering for all.
    pub fn element(&self) -> Element {
        Element { seq: self.seq, json: serde_json::to_vec(self).unwrap_or_default() }
    }
}

impl Page {
    /// The `Link` to the next page: back in time by `before`, so that messages that arrive meanwhile shift
    /// nothing, or onward with `after`.
    fn next(&self, answer: &Answer) -> Option<String> {
        let (newest, oldest) = (answer.elements.first()?.seq, answer.elements.last()?.seq);
        let position = match self.position {
            Position::After(_) if answer.last_seq.is_some_and(|last| newest < last) => {
                format!("after={newest}")
            }
            Position::Offset(_) | Position::Before(_) if oldest > 1 => format!("before={oldest}"),
            _ => return None,
        };
        Some(format!("</messages?peer_id={}&limit={}&{position}>; rel=\"next\"", self.peer, self.limit))
    }
}

impl<'ex> Extractible<'ex> for Page {
    fn metadata() -> &'static Metadata {
        static METADATA: Metadata = Metadata::new("Page");
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

impl EndpointArgRegister for Page {
    fn register(components: &mut Components, operation: &mut Operation, _arg: &str) {
        let number = |minimum: i64| Object::with_type(BasicType::Integer).minimum(minimum);
        let id = Object::with_type(BasicType::String).example("01920b1e-9f6a-7c7e-8f4e-0f6c1f4f2a12");
        document_query(operation, "peer_id", true, id, "The other user of the conversation");
        let limit = number(1).maximum(PAGE_MAX).default_value(PAGE_DEFAULT.into());
        document_query(operation, "limit", false, limit, "Messages in a page");
        document_query(operation, "offset", false, number(0).default_value(0.into()), "Skip the newest");
        document_query(operation, "before", false, number(0), "Only messages with a smaller seq");
        document_query(operation, "after", false, number(0), "The messages that follow this seq directly");
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

const NO_PEER: Error = Error::NotFound(Cow::Borrowed("there is no user with this peer_id"));
const NO_RECIPIENT: Error = Error::NotFound(Cow::Borrowed("there is no user with this recipient_id"));

/// Everything about a message that can be judged without the database.
fn check(caller: Caller, message: SendMessage, req: &Request) -> Result<Outgoing, Error> {
    let mut faults = Faults::default();
    let recipient = faults.take("recipient_id", message.recipient_id, Ok);
    let content = faults.take("content", message.content, valid_content);
    let recipient = Uuid::try_parse(&recipient);
    if recipient == Ok(caller.id) {
        faults.add("recipient_id", "is your own id: a message goes to somebody else");
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
    Ok(Outgoing { sender: caller.id, recipient: recipient.map_err(|_| NO_RECIPIENT)?, content, key })
}

fn reply(accepted: Accepted) -> Reply {
    let reply = Reply::raw(StatusCode::CREATED, accepted.json);
    if accepted.replayed {
        reply.header(IDEMPOTENCY_REPLAYED, HeaderValue::from_static("true"))
    } else {
        reply
    }
}

fn valid_content(content: String) -> Result<String, Cow<'static, str>> {
    let trimmed = content.trim();
    // A byte is at most one character, so most messages need no counting.
    let length = if trimmed.len() <= CONTENT_MAX_CHARS { trimmed.len() } else { trimmed.chars().count() };
    if trimmed.is_empty() {
        Err("is empty: send 1 to 4000 characters that are not all white space".into())
    } else if length > CONTENT_MAX_CHARS {
        Err(format!("has {length} characters: send at most {CONTENT_MAX_CHARS}").into())
    } else if trimmed.contains('\0') {
        Err("has a NUL character: leave it out".into())
    } else if trimmed.len() == content.len() {
        Ok(content)
    } else {
        Ok(trimmed.to_owned())
    }
}

fn is_valid_key(key: &[u8]) -> bool {
    (1..=IDEMPOTENCY_KEY_MAX).contains(&key.len()) && key.iter().all(u8::is_ascii_graphic)
}

/// The page, from the window where that is certain to be complete, else from Postgres.
async fn read(app: &App, caller: Caller, page: &Page) -> Result<Answer, Error> {
    let pair = Pair::new(caller.id, page.peer);
    let limit = usize::try_from(page.limit).unwrap_or_default();
    let miss = match page.position {
        Position::Offset(offset) => {
            // Beyond any window whatever the offset is, if it does not fit.
            let skip = usize::try_from(offset).unwrap_or(usize::MAX / 2);
            match app.recent.look_up(pair, skip, limit).await {
                Lookup::Hit(elements) => {
                    app.metrics.cache_lookup(CacheOutcome::Hit);
                    return Ok(Answer { elements, last_seq: None, stale: false });
                }
                Lookup::Miss(miss) => miss,
            }
        }
        Position::Before(_) | Position::After(_) => app.recent.pass_by(),
    };
    // In a box of its own: what talks to Postgres makes a large future, which otherwise every read, hit or not, would
    // allocate and move.
    Box::pin(read_in_postgres(app, caller, page, miss)).await
}

async fn read_in_postgres(app: &App, caller: Caller, page: &Page, miss: Miss) -> Result<Answer, Error> {
    let pair = Pair::new(caller.id, page.peer);
    app.metrics.cache_lookup(if miss.may_store() { CacheOutcome::Miss } else { CacheOutcome::Bypass });
    // A reader that may store reads the whole window instead of the page.
    let wanted = if miss.may_store() {
        Page { peer: page.peer, limit: app.recent.window() as i64, position: Position::Offset(0) }
    } else {
        Page { ..*page }
    };
    if app.health.postgres_is_away() {
        return stale(page, miss.unchecked);
    }
    let loaded = match load(&app.database, caller.id, &wanted, miss.known).await {
        Ok(loaded) => loaded,
        Err(error) if is_unavailable(&error) => return stale(page, miss.unchecked),
        Err(error) => return Err(error.into()),
    };
    if !loaded.caller_exists {
        return Err(GONE);
    }
    if !loaded.peer_exists {
        return Err(NO_PEER);
    }
    let may_store = miss.may_store();
    let same = miss.known == Some(loaded.last_seq);
    let elements = if same { miss.unchecked.clone() } else { loaded.elements };
    let suspended = loaded.suspended && !sabotage::is_on(Sabotage::IgnoreSuspension);
    let found = match (may_store && !suspended, same) {
        (false, _) => Found::Other,
        (true, true) => Found::Same,
        (true, false) => Found::Newest(&elements),
    };
    app.recent.settle(pair, miss, loaded.last_seq, found).await;
    let elements = if may_store { slice(page, elements) } else { elements };
    Ok(Answer { elements, last_seq: Some(loaded.last_seq), stale: false })
}

/// Postgres is away: the window as it was last seen, if it has the page.
fn stale(page: &Page, unchecked: Vec<Element>) -> Result<Answer, Error> {
    const AWAY: Error = Error::Unavailable("the database is away, and this page is not cached: try again");
    let head = unchecked.first().map_or(0, |element| element.seq);
    let elements = slice(page, unchecked);
    let Position::Offset(offset) = page.position else { return Err(AWAY) };
    let full = page.limit.min(head - offset);
    if full < 1 || elements.len() as i64 != full {
        return Err(AWAY);
    }
    Ok(Answer { elements, last_seq: None, stale: true })
}

/// The page out of the newest messages.
fn slice(page: &Page, mut newest: Vec<Element>) -> Vec<Element> {
    if let Position::Offset(offset) = page.position {
        newest.drain(..newest.len().min(usize::try_from(offset).unwrap_or(usize::MAX)));
        newest.truncate(usize::try_from(page.limit).unwrap_or_default());
    }
    newest
}

struct Loaded {
    caller_exists: bool,
    peer_exists: bool,
    suspended: bool,
    last_seq: i64,
    elements: Vec<Element>,
}

/// One statement, one snapshot: whether both users exist, whether windows are suspended, the conversation's
/// last seq, and the page, which is one range of the primary key whatever the offset. The messages are left
/// out where the last seq is `known`.
async fn load(
    database: &Database,
    caller: Uuid,
    page: &Page,
    known: Option<i64>,
) -> Result<Loaded, sqlx::Error> {
    let pair = Pair::new(caller, page.peer);
    // The range's top is at most `top` and what `offset` leaves of the last seq; its floor is given by `after`, or
    // lies `limit` below the top. No seq is near the largest number, so halving an offset keeps it beyond all.
    let (top, offset, floor) = match page.position {
        Position::Offset(offset) => (None, offset.min(i64::MAX / 2), None),
        Position::Before(seq) => (Some(seq - 1), 0, None),
        Position::After(seq) => (Some(seq.saturating_add(page.limit)), 0, Some(seq)),
    };
    let mut connection = database.acquire().await?;
    let query = sqlx::query!(
        r#"SELECT EXISTS (SELECT FROM users WHERE id = $1) AS "caller_exists!",
                  EXISTS (SELECT FROM users WHERE id = $2) AS "peer_exists!",
                  EXISTS (SELECT FROM window_suspension WHERE suspended_until > clock_timestamp()) AS "suspended!",
                  coalesce(c.last_seq, 0) AS "last_seq!",
                  m.id AS "id?", m.seq AS "seq?", m.sender_id AS "sender_id?", m.content AS "content?",
                  m.created_at AS "created_at?"
           FROM (VALUES (1)) AS one
           LEFT JOIN conversations c ON c.low_user = $3 AND c.high_user = $4
           LEFT JOIN LATERAL (
               SELECT id, seq, sender_id, content, created_at
               FROM messages
               WHERE conversation_id = c.id
                 AND c.last_seq IS DISTINCT FROM $9
                 AND seq <= least($5, c.last_seq - $6)
                 AND seq > coalesce($7, least($5, c.last_seq - $6) - $8)
               ORDER BY seq DESC
           ) m ON true
           ORDER BY m.seq DESC"#,
        caller,
        page.peer,
        pair.low,
        pair.high,
        top,
        offset,
        floor,
        page.limit,
        known,
    );
    let rows = database.run(Call::ReadMessages, query.fetch_all(&mut *connection)).await?;
    // Settling the window, which follows, needs none.
    drop(connection);
    let mut loaded = Loaded {
        caller_exists: false,
        peer_exists: false,
        suspended: true,
        last_seq: 0,
        elements: Vec::new(),
    };
    for row in rows {
        loaded.caller_exists = row.caller_exists;
        loaded.peer_exists = row.peer_exists;
        loaded.suspended = row.suspended;
        loaded.last_seq = row.last_seq;
        let (Some(id), Some(seq), Some(sender_id), Some(content), Some(created_at)) =
            (row.id, row.seq, row.sender_id, row.content, row.created_at)
        else {
            continue;
        };
        let recipient_id = if sender_id == caller { page.peer } else { caller };
        let message = Message { id, seq, sender_id, recipient_id, content, created_at };
        loaded.elements.push(message.element());
    }
    Ok(loaded)
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
        for bad in ["", " \u{2003}\n", "a\0b", &"x".repeat(4001), &"🦀".repeat(4001)] {
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
