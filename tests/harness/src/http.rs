//! The blocking HTTP/1.1 client of tests and commands: it keeps its connection alive, and every request has a timeout.

use std::fmt::{self, Display};
use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result as AnyResult, ensure};
use serde_json::Value;

/// Longer than the service's own request timeout.
pub const REQUEST_TIMEOUT: Duration = Duration::from_secs(20);

#[derive(Debug)]
pub struct Client {
    address: SocketAddr,
    stream: Option<TcpStream>,
}

#[derive(Debug)]
pub struct Response {
    pub status: u16,
    /// The status line and the headers.
    head: String,
    pub body: Vec<u8>,
}

/// Why there is no response. A request that was sent may have been carried out or not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RequestError {
    Refused,
    Broken,
    TimedOut,
}

impl RequestError {
    pub fn reason(self) -> &'static str {
        match self {
            Self::Refused => "no connection",
            Self::Broken => "the connection broke",
            Self::TimedOut => "no response in time",
        }
    }
}

impl Display for RequestError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.reason())
    }
}

impl std::error::Error for RequestError {}

/// Sends one GET on a new connection.
pub fn get(address: SocketAddr, path: &str, timeout: Duration) -> Result<Response, RequestError> {
    Client::new(address).request("GET", path, &[], "", timeout)
}

impl Response {
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        self.head.lines().find_map(|line| {
            let (found, value) = line.split_once(':')?;
            found.eq_ignore_ascii_case(name).then(|| value.trim())
        })
    }
}

impl Client {
    pub fn new(address: SocketAddr) -> Self {
        Self { address, stream: None }
    }

    /// Sends one request. After a failure the next one opens a new connection.
    pub fn request(
        &mut self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: &str,
        timeout: Duration,
    ) -> Result<Response, RequestError> {
        let mut text = format!("{method} {path} HTTP/1.1\r\nhost: {}\r\n", self.address);
        for (name, value) in headers {
            text += &format!("{name}: {value}\r\n");
        }
        if !body.is_empty() {
            text += &format!("content-type: application/json\r\ncontent-length: {}\r\n", body.len());
        }
        text = text + "\r\n" + body;
        let deadline = Instant::now() + timeout;
        let mut stream = match self.stream.take() {
            Some(stream) => stream,
            None => self.connect(timeout)?,
        };
        let response = exchange(&mut stream, text.as_bytes(), deadline)?;
        if response.header("connection").is_none_or(|value| !value.eq_ignore_ascii_case("close")) {
            self.stream = Some(stream);
        }
        Ok(response)
    }

    /// Follows the user's stream, and drops what comes, until it ends or `go_on` is false. That is asked each second.
    pub fn follow(&self, token: &str, go_on: impl Fn() -> bool) -> std::io::Result<()> {
        let mut stream = TcpStream::connect_timeout(&self.address, Duration::from_secs(2))?;
        stream.set_read_timeout(Some(Duration::from_secs(1)))?;
        // Or else a refusal would leave the connection open, and silent.
        let head = format!(
            "GET /stream HTTP/1.1\r\nhost: test\r\nconnection: close\r\nauthorization: Bearer {token}\r\n\r\n"
        );
        stream.write_all(head.as_bytes())?;
        let mut dropped = [0; 4096];
        while go_on() {
            match stream.read(&mut dropped) {
                Ok(0) => break,
                Ok(_) => {}
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// As [`Self::request`], with the caller's token.
    pub fn ask(&mut self, method: &str, path: &str, token: Option<&str>, body: &str) -> AnyResult<Response> {
        let bearer = format!("Bearer {}", token.unwrap_or_default());
        let headers: &[(&str, &str)] = if token.is_some() { &[("authorization", &bearer)] } else { &[] };
        self.request(method, path, headers, body, REQUEST_TIMEOUT).with_context(|| format!("{method} {path}"))
    }

    /// As [`Self::ask`]; the response must have this status and be JSON.
    pub fn expect(
        &mut self,
        status: u16,
        method: &str,
        path: &str,
        token: Option<&str>,
        body: &str,
    ) -> AnyResult<Value> {
        let response = self.ask(method, path, token, body)?;
        ensure!(response.status == status, "{method} {path}: {} {}", response.status, response.text());
        serde_json::from_slice(&response.body).with_context(|| format!("{method} {path} answers JSON"))
    }

    fn connect(&self, timeout: Duration) -> Result<TcpStream, RequestError> {
        let stream = TcpStream::connect_timeout(&self.address, timeout).map_err(|_| RequestError::Refused)?;
        stream.set_nodelay(true).map_err(|_| RequestError::Refused)?;
        Ok(stream)
    }
}

fn exchange(stream: &mut TcpStream, request: &[u8], deadline: Instant) -> Result<Response, RequestError> {
    stream.write_all(request).map_err(|_| RequestError::Broken)?;
    let mut buffer = Vec::with_capacity(4096);
    let mut chunk = [0; 16 * 1024];
    loop {
        if let Some(response) = parse(&buffer)? {
            return Ok(response);
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(RequestError::TimedOut);
        }
        stream.set_read_timeout(Some(left)).map_err(|_| RequestError::Broken)?;
        match stream.read(&mut chunk) {
            Ok(0) => return Err(RequestError::Broken),
            Ok(count) => buffer.extend_from_slice(&chunk[..count]),
            Err(error) => match error.kind() {
                std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut => {
                    return Err(RequestError::TimedOut);
                }
                std::io::ErrorKind::Interrupted => {}
                _ => return Err(RequestError::Broken),
            },
        }
    }
}

/// The response, once it has arrived completely.
fn parse(buffer: &[u8]) -> Result<Option<Response>, RequestError> {
    let Some((mut response, length)) = parse_head(buffer)? else { return Ok(None) };
    let body = &buffer[length..];
    if response.header("transfer-encoding").is_some_and(|coding| coding.eq_ignore_ascii_case("chunked")) {
        return Ok(unchunked(body)?.map(|body| Response { body, ..response }));
    }
    let length = response.header("content-length").and_then(|length| length.parse().ok()).unwrap_or(0);
    if body.len() < length {
        return Ok(None);
    }
    response.body = body[..length].to_vec();
    Ok(Some(response))
}

/// The response without its body, and the length of its head, once that has arrived.
pub(crate) fn parse_head(buffer: &[u8]) -> Result<Option<(Response, usize)>, RequestError> {
    let Some(end) = buffer.windows(4).position(|window| window == b"\r\n\r\n") else { return Ok(None) };
    let head = String::from_utf8_lossy(&buffer[..end]).into_owned();
    let status = head.get(9..12).and_then(|digits| digits.parse().ok()).ok_or(RequestError::Broken)?;
    Ok(Some((Response { status, head, body: Vec::new() }, end + 4)))
}

/// The body without its chunks' framing, once the last chunk has arrived.
fn unchunked(mut rest: &[u8]) -> Result<Option<Vec<u8>>, RequestError> {
    let mut body = Vec::new();
    while let Some(end) = rest.windows(2).position(|window| window == b"\r\n") {
        let digits = str::from_utf8(&rest[..end]).ok().and_then(|line| line.split(';').next());
        let length = digits
            .and_then(|digits| usize::from_str_radix(digits.trim(), 16).ok())
            .ok_or(RequestError::Broken)?;
        // Without trailers: no server here sends any.
        let Some(chunk) = rest.get(end + 2..end + 2 + length + 2) else { return Ok(None) };
        if length == 0 {
            return Ok(Some(body));
        }
        body.extend_from_slice(&chunk[..length]);
        rest = &rest[end + 2 + length + 2..];
    }
    Ok(None)
}
