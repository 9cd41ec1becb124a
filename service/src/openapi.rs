//! The OpenAPI document, gathered from the endpoints themselves.

use salvo::Router;
use salvo_oapi::security::{Http, HttpAuthScheme};
use salvo_oapi::{Info, License, OpenApi, RefOr, Response, SecurityScheme, Tag};

use crate::auth::SECURITY_SCHEME;
use crate::error::{self, PROBLEM_JSON, Problem};
use crate::request_id::X_REQUEST_ID;

const DESCRIPTION: &str = "\
A 1:1 chat back end. Register two users, log in, find the other's id, send a message, read the conversation.

- Ids are opaque strings. Times are RFC 3339 in UTC.
- Every error, the framework's own included, is an RFC 9457 problem (`application/problem+json`).
- Every response carries `x-request-id`: yours if you sent a sane one, else a new one.
- An acknowledged message is committed. After a 201 every read shows it.";

/// The document of a router's endpoints.
pub fn document(router: &Router) -> OpenApi {
    let bearer = Http::new(HttpAuthScheme::Bearer)
        .bearer_format("JWT")
        .description("`access_token` from `POST /login`");
    let mut document = OpenApi::with_info(
        Info::new("chat-service", env!("CARGO_PKG_VERSION"))
            .description(DESCRIPTION)
            .license(License::new("Apache-2.0")),
    )
    .add_security_scheme(SECURITY_SCHEME, SecurityScheme::Http(bearer))
    .tags([
        Tag::new("users").description("Who is there"),
        Tag::new("messages").description("What they say"),
        Tag::new("operations").description("How the service is"),
    ])
    .merge_router(router);
    let operations = document.paths.values_mut().flat_map(|path| path.operations.values_mut());
    for (status, response) in operations.flat_map(|operation| operation.responses.iter_mut()) {
        if let RefOr::Type(response) = response {
            complete(status, response);
        }
    }
    document
}

/// What is true of every response is said once, here: it has an id, and an error has an example of its own.
fn complete(status: &str, response: &mut Response) {
    response.headers.insert(X_REQUEST_ID.to_string(), error::header("The request's id, as in the log"));
    if let Some(content) = response.contents.get_mut(PROBLEM_JSON) {
        content.example = Some(Problem::example(status, &response.description));
    }
}

/// The document as text; what `chat-service openapi` prints.
pub fn json() -> anyhow::Result<String> {
    Ok(serde_json::to_string_pretty(&document(&crate::routes::api()))?)
}
