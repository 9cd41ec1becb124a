//! Requests and their responses. Every response is checked for what the contract says of all of them.

use std::net::SocketAddr;

use reqwest::header::{HeaderMap, HeaderName, HeaderValue};
use reqwest::{Method, RequestBuilder, StatusCode, Url};
use serde_json::Value;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use super::{User, document};

/// A request that is not sent yet.
#[derive(Debug)]
pub(crate) struct Request {
    builder: RequestBuilder,
    /// Its operation, unless it is not documented.
    operation: Option<(Method, String)>,
}

/// A whole response.
#[derive(Debug)]
pub(crate) struct Response {
    /// What was asked for. A raw request has none.
    url: Option<Url>,
    pub(crate) status: u16,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Vec<u8>,
}

impl Request {
    pub(super) fn new(builder: RequestBuilder, method: Method, path: &str) -> Self {
        let path = path.split('?').next().unwrap_or_default().to_owned();
        Self { builder, operation: Some((method, path)) }
    }

    pub(super) fn undocumented(builder: RequestBuilder) -> Self {
        Self { builder, operation: None }
    }

    pub(crate) fn by(self, user: &User) -> Self {
        let value = format!("Bearer {}", user.token);
        self.header("authorization", &value)
    }

    pub(crate) fn header(mut self, name: &str, value: &str) -> Self {
        self.builder = self.builder.header(name, value);
        self
    }

    pub(crate) fn json(mut self, body: &Value) -> Self {
        self.builder = self.builder.json(body);
        self
    }

    /// A body, without a `content-type`.
    pub(crate) fn body(mut self, body: impl Into<Vec<u8>>) -> Self {
        self.builder = self.builder.body(body.into());
        self
    }

    pub(crate) async fn response(self) -> Response {
        let response = self.builder.send().await.expect("the service answers");
        let (status, headers) = (response.status().as_u16(), response.headers().clone());
        let url = Some(response.url().clone());
        let mut response = response;
        // A stream has no end: its first event must do.
        let is_stream =
            response.headers().get("content-type").is_some_and(|kind| kind == "text/event-stream");
        let body = match is_stream {
            true => response.chunk().await.expect("an event").unwrap_or_default().to_vec(),
            false => response.bytes().await.expect("a whole body").to_vec(),
        };
        let answer = Response { url, status, headers, body };
        answer.check_request_id();
        if let Some((method, path)) = &self.operation {
            document::check(method, path, &answer);
        }
        answer
    }
}

impl Response {
    /// A header's value, if the response has it and it is text.
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
    }

    pub(crate) fn text(&self, status: u16) -> String {
        let text = String::from_utf8(self.body.clone()).expect("a body in UTF-8");
        assert_eq!(self.status, status, "{text}");
        text
    }

    /// The JSON body of a response that must have this status.
    pub(crate) fn json(&self, status: u16) -> Value {
        let text = self.text(status);
        assert_eq!(self.header("content-type"), Some("application/json"), "{text}");
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error} in {text}"))
    }

    /// The body of an error, which must be as RFC 9457 and the contract describe it.
    pub(crate) fn problem(&self, status: u16) -> Value {
        let text = self.text(status);
        assert_eq!(self.header("content-type"), Some("application/problem+json"), "{text}");
        let problem: Value = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error} in {text}"));
        let mut expected = vec!["detail", "request_id", "status", "title", "type"];
        if status == 422 {
            expected.insert(1, "errors");
        }
        assert_eq!(super::members(&problem), expected, "{text}");
        assert_eq!(problem["type"], "about:blank");
        assert_eq!(problem["status"], status);
        let title = StatusCode::from_u16(status).ok().and_then(|status| status.canonical_reason());
        assert_eq!(problem["title"].as_str(), title);
        assert!(problem["detail"].as_str().is_some_and(|detail| !detail.is_empty()), "{text}");
        assert_eq!(problem["request_id"].as_str(), self.header("x-request-id"));
        assert_eq!(self.header("www-authenticate"), (status == 401).then_some("Bearer"), "{text}");
        let wait = self.header("retry-after").map(|seconds| seconds.parse::<u64>().expect("whole seconds"));
        assert_eq!(wait.is_some(), status == 429 || status == 503, "Retry-After: {wait:?} with {text}");
        assert!(wait.is_none_or(|seconds| seconds >= 1), "Retry-After: {wait:?}");
        problem
    }

    /// The fields that a 422 names, in its order. Each has a message, and `detail` has all of them.
    pub(crate) fn invalid_fields(&self) -> Vec<String> {
        let problem = self.problem(422);
        let errors = problem["errors"].as_array().expect("a list of errors");
        assert!(!errors.is_empty(), "{problem}");
        let detail = super::text(&problem, "detail");
        errors
            .iter()
            .map(|error| {
                assert_eq!(error.as_object().map(serde_json::Map::len), Some(2), "{error}");
                assert!(detail.contains(&super::text(error, "message")), "{problem}");
                super::text(error, "field")
            })
            .collect()
    }

    /// Where a reference in this response leads: it is relative to the request's URL, as a client sees it.
    pub(crate) fn resolve(&self, reference: &str) -> Url {
        let url = self.url.as_ref().expect("a request with a URL");
        url.join(reference).unwrap_or_else(|error| panic!("{error} in {reference}"))
    }

    /// Where `Link: rel="next"` leads.
    pub(crate) fn next_url(&self) -> Option<Url> {
        let link = self.header("link")?;
        let target = link.strip_prefix('<').and_then(|link| link.strip_suffix(">; rel=\"next\""));
        Some(self.resolve(target.unwrap_or_else(|| panic!("an unexpected Link: {link}"))))
    }

    /// The path and query of where `Link: rel="next"` leads.
    pub(crate) fn next(&self) -> Option<String> {
        let url = self.next_url()?;
        Some(format!("{}?{}", url.path(), url.query().expect("a query")))
    }

    /// The `seq`s of a page.
    pub(crate) fn seqs(&self) -> Vec<i64> {
        let page = self.json(200);
        let page = page.as_array().unwrap_or_else(|| panic!("no array: {page}"));
        page.iter().map(|message| message["seq"].as_i64().expect("a seq")).collect()
    }

    fn check_request_id(&self) {
        let id = self.header("x-request-id").unwrap_or_else(|| panic!("no x-request-id: {self:?}"));
        let sane = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
        assert!((1..=64).contains(&id.len()) && id.bytes().all(sane), "x-request-id: {id}");
    }
}

/// Sends the bytes and reads until the service closes the connection.
pub(super) async fn raw(address: SocketAddr, request: &[u8]) -> Response {
    let mut stream = TcpStream::connect(address).await.expect("the service listens");
    // A service that answers before it has read everything may close early; its response still counts.
    stream.write_all(request).await.ok();
    let mut bytes = Vec::new();
    let reading = stream.read_to_end(&mut bytes);
    let outcome = tokio::time::timeout(std::time::Duration::from_secs(20), reading).await;
    outcome.expect("a response, and the end of the connection").ok();
    parse(&bytes)
}

fn parse(bytes: &[u8]) -> Response {
    let lossy = String::from_utf8_lossy(bytes);
    let end = bytes.windows(4).position(|window| window == b"\r\n\r\n");
    let end = end.unwrap_or_else(|| panic!("no HTTP response: {lossy}"));
    let head = std::str::from_utf8(&bytes[..end]).expect("a head in ASCII");
    let mut lines = head.lines();
    let status = lines.next().and_then(|line| line.split(' ').nth(1)).and_then(|status| status.parse().ok());
    let headers = lines
        .filter_map(|line| line.split_once(": "))
        .map(|(name, value)| {
            let name = HeaderName::from_bytes(name.as_bytes()).expect("a header's name");
            (name, HeaderValue::from_str(value).expect("a header's value"))
        })
        .collect();
    let body = bytes[end + 4..].to_vec();
    let status = status.unwrap_or_else(|| panic!("no status: {head}"));
    let answer = Response { url: None, status, headers, body };
    answer.check_request_id();
    answer
}
