//! The OpenAPI document, made from the endpoints' declarations, and the list of endpoints, made from the document.

use salvo::Router;
use salvo::http::StatusCode;
use salvo::http::header::{HeaderName, RETRY_AFTER, WWW_AUTHENTICATE};
use salvo_oapi::security::{Http, HttpAuthScheme};
use salvo_oapi::{
    Header, Info, License, OpenApi, PathItemType, RefOr, Response, SecurityScheme, Server, Tag,
};

use super::caller::SECURITY_SCHEME;
use super::conversations::STREAM_POSITION;
use super::error::{PROBLEM_JSON, Problem};
use super::request_id::X_REQUEST_ID;
use crate::telemetry::metrics::EndpointName;

const DESCRIPTION: &str = "\
A 1:1 chat back end. Register two users, log in, find the other's id, send a message, read the conversation.

- Ids are opaque strings. Times are RFC 3339 in UTC, with six digits after the second.
- `HEAD` answers wherever `GET` does: with the same status and headers, without the body.
- Each path has one spelling: another one, such as `/me/`, is 404.
- References in responses (`Link`, `Location`, this document's server) are relative, so that a proxy may strip a prefix.
- Every error, the framework's own included, is an RFC 9457 problem (`application/problem+json`).
- Every response carries `x-request-id`: yours if you sent a sane one, else a new one.
- Only a request that is no HTTP has neither: what does not parse (400), has too long a target (414), or too many or too long
  headers (431) never reaches the API. The response is a status alone, and the connection is closed.
- An acknowledged message is committed. After a 201 every read shows it.";

/// The document of a router's endpoints.
pub(super) fn document(router: &Router) -> OpenApi {
    let bearer = Http::new(HttpAuthScheme::Bearer)
        .bearer_format("JWT")
        .description("`access_token` from `POST /login`");
    let mut document = OpenApi::with_info(
        Info::new("chat-service", env!("CARGO_PKG_VERSION"))
            .description(DESCRIPTION)
            .license(License::new("Apache-2.0")),
    )
    .servers([Server::new(".")])
    .add_security_scheme(SECURITY_SCHEME, SecurityScheme::Http(bearer))
    .tags([
        Tag::new("users").description("Accounts"),
        Tag::new("sessions").description("Logging in and out, and the tokens of a session"),
        Tag::new("blocks").description("Whose messages a user does not want"),
        Tag::new("messages").description("Sending and reading messages"),
        Tag::new("operations").description("Health of the service"),
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

/// Where a response declares one of these, it has it: a generated client need not ask whether it is there.
const ALWAYS_SENT: [HeaderName; 4] = [X_REQUEST_ID, STREAM_POSITION, RETRY_AFTER, WWW_AUTHENTICATE];

/// Adds what every response has: the id's header, which headers are always there, and an example to an error.
fn complete(status: &str, response: &mut Response) {
    let id = Header::default().description("The request's id, as in the log");
    response.headers.insert(X_REQUEST_ID.to_string(), id);
    for name in ALWAYS_SENT {
        if let Some(header) = response.headers.get_mut(name.as_str()) {
            header.required = Some(true);
        }
    }
    if let Some(content) = response.contents.get_mut(PROBLEM_JSON) {
        content.example = Some(Problem::example(status, &response.description));
    }
}

/// Every operation of the document, with its status of success.
pub(super) fn endpoints(document: &OpenApi) -> Vec<EndpointName> {
    let operations = document.paths.iter().flat_map(|(path, item)| {
        item.operations.iter().map(move |(method, operation)| (path, method, operation))
    });
    operations
        .map(|(path, method, operation)| {
            let statuses = operation.responses.keys().filter_map(|status| status.parse::<StatusCode>().ok());
            EndpointName {
                method: match method {
                    PathItemType::Get => "GET",
                    PathItemType::Post => "POST",
                    PathItemType::Put => "PUT",
                    PathItemType::Delete => "DELETE",
                    PathItemType::Patch => "PATCH",
                    _ => "_OTHER",
                },
                route: path.clone().into(),
                success: statuses.min().unwrap_or(StatusCode::OK),
            }
        })
        .collect()
}
