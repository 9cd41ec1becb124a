//! The live stream of a user's messages, as Server-Sent Events.

use std::convert::Infallible;
use std::fmt::Write as _;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use futures_util::{StreamExt as _, stream};
use salvo::extract::{Extractible, Metadata};
use salvo::http::header::{CACHE_CONTROL, CONTENT_TYPE, HeaderName, HeaderValue};
use salvo::http::{Method, ResBody, StatusCode};
use salvo::{Depot, Request, Response, Writer, async_trait};
use salvo_oapi::{
    BasicType, Components, EndpointArgRegister, EndpointOutRegister, Object, Operation, Parameter,
    ParameterIn, endpoint,
};
use serde_json::json;
use tokio::time::Instant;

use super::caller::Caller;
use super::error::{self, Error};
use super::middleware::app;
use super::query::{document_query, query_text};
use crate::chat::streams::{self, Event, Stream};
use crate::workers::ConnectionHandle;

const X_ACCEL_BUFFERING: HeaderName = HeaderName::from_static("x-accel-buffering");

/// Follow the caller's messages live
///
/// Server-Sent Events, for as long as the client wants them. The events are `ready` or `reset` (first), `message`, `erased`
/// (messages of a deleted user have lost their content, up to this `seq`) and `end` (last); each `data` is one line of JSON. Every event with an `id` carries a position: opaque, the caller's own, valid on
/// every replica. A stream that is opened with it goes on exactly behind it. After `reset` the client reloads, because the
/// position could not be taken up. A comment goes out every 15 s at the latest.
#[endpoint(
    operation_id = "stream",
    tags("messages"),
    responses(
        (status_code = 200, description = "The events", body = String, content_type = "text/event-stream",
            example = json!("id: AQAAAAE\nevent: ready\ndata: {\"position\":\"AQAAAAE\",\"resumed\":false}\n\n")),
    )
)]
pub async fn follow(
    caller: Caller,
    position: PositionQuery,
    req: &mut Request,
    depot: &mut Depot,
) -> Result<EventStream, Error> {
    // A HEAD has no use for a stream.
    if req.method() == Method::HEAD {
        return Ok(EventStream(None));
    }
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    // A token is valid to the end of its last second.
    let left = Duration::from_secs(caller.expires + 1).saturating_sub(now);
    let request = streams::Request {
        user: caller.id,
        session: caller.session,
        expires: Instant::now() + left,
        position: position.0,
        connection: req.extensions().get::<ConnectionHandle>().cloned(),
    };
    Ok(EventStream(Some(Stream::open(&app(depot)?.streams, request).await?)))
}

/// A stream as a response; none for its head alone.
#[derive(Debug)]
pub(super) struct EventStream(Option<Stream>);

#[async_trait]
impl Writer for EventStream {
    async fn write(self, _req: &mut Request, _depot: &mut Depot, res: &mut Response) {
        res.status_code(StatusCode::OK);
        let headers = res.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
        headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store, no-transform"));
        headers.insert(X_ACCEL_BUFFERING, HeaderValue::from_static("no"));
        let events = stream::iter(self.0).flatten().map(|event| Ok::<_, Infallible>(render(event)));
        res.replace_body(ResBody::stream(events));
    }
}

impl EndpointOutRegister for EventStream {
    /// The endpoint declares its success itself.
    fn register(_components: &mut Components, _operation: &mut Operation) {}
}

/// As the HTML standard has it: fields in lines, and an empty line at the end.
fn render(event: Event) -> Vec<u8> {
    match event {
        Event::Ready { position, resumed } => {
            let data = json!({ "position": position, "resumed": resumed });
            format!("id: {position}\nevent: ready\ndata: {data}\n\n").into_bytes()
        }
        Event::Reset { position, reason } => {
            let data = json!({ "position": position, "reason": reason });
            format!("id: {position}\nevent: reset\ndata: {data}\n\n").into_bytes()
        }
        Event::Message { position, json } => render_json("message", &position, &json),
        Event::Erased { position, json } => render_json("erased", &position, &json),
        Event::Heartbeat => b":\n\n".to_vec(),
        Event::End { reason, retry } => {
            let mut text = String::new();
            let data = json!({ "reason": reason });
            // Writing to a String cannot fail.
            let _ = write!(text, "retry: {}\n\nevent: end\ndata: {data}\n\n", retry.as_millis());
            text.into_bytes()
        }
    }
}

fn render_json(name: &str, position: &str, json: &[u8]) -> Vec<u8> {
    let mut text = Vec::with_capacity(json.len() + position.len() + 32);
    for part in [b"id: ", position.as_bytes(), b"\nevent: ", name.as_bytes(), b"\ndata: ", json, b"\n\n"] {
        text.extend_from_slice(part);
    }
    text
}

/// Where the client stands: `Last-Event-ID`, as browsers send it, or else the query's `after`.
#[derive(Debug)]
pub(super) struct PositionQuery(Option<String>);

impl<'ex> Extractible<'ex> for PositionQuery {
    fn metadata() -> &'static Metadata {
        static METADATA: Metadata = Metadata::new("PositionQuery");
        &METADATA
    }

    #[expect(refining_impl_trait, reason = "the concrete error is the more useful promise")]
    async fn extract(req: &'ex mut Request, _depot: &'ex mut Depot) -> Result<Self, Error> {
        let after = query_text(req, "after")?;
        // A text that is no position leads to a reset, whatever it is.
        let last = req.headers().get("last-event-id").map(|id| String::from_utf8_lossy(id.as_bytes()));
        let position = last.or_else(|| after.map(Into::into)).filter(|position| !position.is_empty());
        Ok(Self(position.map(std::borrow::Cow::into_owned)))
    }
}

impl EndpointArgRegister for PositionQuery {
    fn register(components: &mut Components, operation: &mut Operation, _arg: &str) {
        let position = || Object::with_type(BasicType::String);
        document_query(operation, "after", false, position(), "The position to go on behind");
        operation.parameters.insert(
            Parameter::new("Last-Event-ID")
                .location(ParameterIn::Header)
                .required(false)
                .description("The same, as browsers send it when they reconnect; it wins")
                .schema(position()),
        );
        let description = "A query parameter is given twice";
        error::document(components, operation, StatusCode::BAD_REQUEST, description, &[]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(event: Event) -> String {
        String::from_utf8(render(event)).expect("UTF-8")
    }

    #[test]
    fn events_are_rendered_as_clients_parse_them() {
        let position = "AQ_-".to_owned();
        assert_eq!(
            text(Event::Ready { position: position.clone(), resumed: true }),
            "id: AQ_-\nevent: ready\ndata: {\"position\":\"AQ_-\",\"resumed\":true}\n\n"
        );
        assert_eq!(
            text(Event::Reset { position: position.clone(), reason: "too_old" }),
            "id: AQ_-\nevent: reset\ndata: {\"position\":\"AQ_-\",\"reason\":\"too_old\"}\n\n"
        );
        assert_eq!(
            text(Event::Message { position, json: b"{\"seq\":1}".to_vec() }),
            "id: AQ_-\nevent: message\ndata: {\"seq\":1}\n\n"
        );
        assert_eq!(text(Event::Heartbeat), ":\n\n");
        assert_eq!(
            text(Event::End { reason: "draining", retry: Duration::from_millis(1234) }),
            "retry: 1234\n\nevent: end\ndata: {\"reason\":\"draining\"}\n\n"
        );
    }
}
