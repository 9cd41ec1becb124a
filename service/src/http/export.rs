//! A user's data as a file.

use futures_util::stream;
use salvo::extract::{Extractible, Metadata};
use salvo::http::header::{CONTENT_TYPE, HeaderValue, RETRY_AFTER};
use salvo::http::{Method, ResBody, StatusCode};
use salvo::{Depot, Request, Response, Writer, async_trait};
use salvo_oapi::{
    BasicType, Components, EndpointArgRegister, EndpointOutRegister, Object, Operation, endpoint,
};
use tokio::sync::mpsc;

use super::body::Faults;
use super::caller::Caller;
use super::error::{self, Error};
use super::middleware::app;
use super::query::{document_query, query_text};
use crate::chat::export::{Chunk, Place};

/// Everything that the service has of the caller
///
/// Lines of JSON, each a flat object with a `type` and a `cursor`: the `user`, each `session`, each `block`, and each
/// `conversation` followed by its messages. A `message` has the members that it has everywhere. What is not whole is broken off:
/// `after` with the cursor of the last whole line goes on behind it. One export of a user runs at a time.
#[endpoint(
    operation_id = "export",
    tags("users"),
    responses(
        (status_code = 200, description = "The lines", body = String, content_type = "application/x-ndjson",
            example = json!("{\"type\":\"conversation\",\"cursor\":\"AZILHp9qfH6PTg9sH08qEQ\",\"peer_id\":\"01920b1e-9f6a-7c7e-8f4e-0f6c1f4f2a12\",\"peer_username\":\"ben\",\"last_seq\":1}\n")),
    )
)]
pub async fn export(
    caller: Caller,
    cursor: CursorQuery,
    req: &mut Request,
    depot: &mut Depot,
) -> Result<Lines, Error> {
    // A HEAD has no use for them.
    if req.method() == Method::HEAD {
        return Ok(Lines(mpsc::channel(1).1));
    }
    Ok(Lines(app(depot)?.exports.start(caller.id, caller.session, cursor.0).await?))
}

/// An export as a response.
#[derive(Debug)]
pub(super) struct Lines(mpsc::Receiver<Chunk>);

#[async_trait]
impl Writer for Lines {
    async fn write(mut self, _req: &mut Request, _depot: &mut Depot, res: &mut Response) {
        res.status_code(StatusCode::OK);
        res.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/x-ndjson"));
        res.replace_body(ResBody::stream(stream::poll_fn(move |context| self.0.poll_recv(context))));
    }
}

impl EndpointOutRegister for Lines {
    /// The endpoint declares its success itself.
    fn register(_components: &mut Components, _operation: &mut Operation) {}
}

/// Behind which line the client goes on.
#[derive(Debug)]
pub(super) struct CursorQuery(Option<Place>);

impl<'ex> Extractible<'ex> for CursorQuery {
    fn metadata() -> &'static Metadata {
        static METADATA: Metadata = Metadata::new("CursorQuery");
        &METADATA
    }

    #[expect(refining_impl_trait, reason = "the concrete error is the more useful promise")]
    async fn extract(req: &'ex mut Request, depot: &'ex mut Depot) -> Result<Self, Error> {
        let Some(after) = query_text(req, "after")? else { return Ok(Self(None)) };
        let place = Caller::of(depot).and_then(|caller| Place::decode(after, caller.id));
        let mut faults = Faults::default();
        if place.is_none() {
            faults.add("after", "is no cursor of your export: take the one of its last whole line");
        }
        faults.check()?;
        Ok(Self(place))
    }
}

impl EndpointArgRegister for CursorQuery {
    fn register(components: &mut Components, operation: &mut Operation, _arg: &str) {
        let cursor = Object::with_type(BasicType::String);
        document_query(operation, "after", false, cursor, "The cursor of the line to go on behind");
        for (status, description, headers) in [
            (StatusCode::BAD_REQUEST, "A query parameter is given twice", &[][..]),
            (StatusCode::UNPROCESSABLE_ENTITY, "`after` is no cursor, or another user's", &[][..]),
            (StatusCode::TOO_MANY_REQUESTS, "Another export of this user runs", &[RETRY_AFTER][..]),
        ] {
            error::document(components, operation, status, description, headers);
        }
    }
}
