//! Successful responses: a status, rendered JSON and a few headers, or nothing.

use salvo::http::header::{CONTENT_TYPE, HeaderName, HeaderValue};
use salvo::http::{ResBody, StatusCode};
use salvo::{Depot, Request, Response, Writer, async_trait};
use salvo_oapi::{Components, EndpointOutRegister, Operation};
use serde::Serialize;

use super::error::Error;

#[derive(Debug)]
pub(super) struct JsonResponse {
    status: StatusCode,
    json: Vec<u8>,
    headers: Vec<(HeaderName, HeaderValue)>,
}

impl JsonResponse {
    pub(super) fn json(status: StatusCode, body: &impl Serialize) -> Result<Self, Error> {
        Ok(Self::raw(status, serde_json::to_vec(body).map_err(Error::internal)?))
    }

    /// From a body that is JSON already.
    pub(super) fn raw(status: StatusCode, json: Vec<u8>) -> Self {
        Self { status, json, headers: Vec::new() }
    }

    pub(super) fn header(mut self, name: HeaderName, value: HeaderValue) -> Self {
        self.headers.push((name, value));
        self
    }
}

#[async_trait]
impl Writer for JsonResponse {
    async fn write(self, _req: &mut Request, _depot: &mut Depot, res: &mut Response) {
        res.status_code(self.status);
        res.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        for (name, value) in self.headers {
            res.headers_mut().insert(name, value);
        }
        res.replace_body(ResBody::Once(self.json.into()));
    }
}

impl EndpointOutRegister for JsonResponse {
    /// The endpoint declares its success itself, with its schema and example.
    fn register(_components: &mut Components, _operation: &mut Operation) {}
}

/// 204.
#[derive(Debug)]
pub(super) struct NoContent;

#[async_trait]
impl Writer for NoContent {
    async fn write(self, _req: &mut Request, _depot: &mut Depot, res: &mut Response) {
        res.status_code(StatusCode::NO_CONTENT);
    }
}

impl EndpointOutRegister for NoContent {
    /// The endpoint declares its success itself.
    fn register(_components: &mut Components, _operation: &mut Operation) {}
}

/// 202, without a body.
#[derive(Debug)]
pub(super) struct Accepted;

#[async_trait]
impl Writer for Accepted {
    async fn write(self, _req: &mut Request, _depot: &mut Depot, res: &mut Response) {
        res.status_code(StatusCode::ACCEPTED);
    }
}

impl EndpointOutRegister for Accepted {
    /// The endpoint declares its success itself.
    fn register(_components: &mut Components, _operation: &mut Operation) {}
}
