//! The HTTP client of tests and commands: a kept-alive connection, blocking, with a time limit for each request.

use std::fmt::{self, Display};
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result as AnyResult, ensure};
use serde_json::Value;

/// More than the service gives a request.
pub const PATIENCE: Duration = Duration::from_secs(20);

#[derive(Debug)]
pub struct Client {
    address: SocketAddr,
    stream: Option<TcpStream>,
}

#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    /// The status line and the headers.
    head: String,
    pub body: Vec<u8>,
}

/// Why there is no answer. Of a request that was sent nobody knows what became of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lost {
    Refused,
    Broken,
    TimedOut,
}

impl Lost {
    pub fn reason(self) -> &'static str {
        match self {
            Self::Refused => "no connection",
            Self::Broken => "the connection broke",
            Self::TimedOut => "no answer in time",
        }
    }
}

impl Display for Lost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.reason())
    }
}

impl std::error::Error for Lost {}

/// One GET over a connection of its own.
pub fn get(address: SocketAddr, path: &str, patience: Duration) -> Result<Answer, Lost> {
    Client::new(address).request("GET", path, &[], "", patience)
}

impl Answer {
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

    /// One request. After a failure the next one has a new connection.
    pub fn request(
        &mut self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: &str,
        patience: Duration,
    ) -> Result<Answer, Lost> {
        let mut text = format!("{method} {path} HTTP/1.1\r\nhost: {}\r\n", self.address);
        for (name, value) in headers {
            text += &format!("{name}: {value}\r\n");
        }
        if !body.is_empty() {
            text += &format!("content-type: application/json\r\ncontent-length: {}\r\n", body.len());
        }
        text = text + "\r\n" + body;
        let deadline = Instant::now() + patience;
        let mut stream = match self.stream.take() {
            Some(stream) => stream,
            None => self.connect(patience)?,
        };
        let answer = exchange(&mut stream, text.as_bytes(), deadline)?;
        if answer.header("connection").is_none_or(|value| !value.eq_ignore_ascii_case("close")) {
            self.stream = Some(stream);
        }
        Ok(answer)
    }

    /// As [`Self::request`], with the token of who asks.
    pub fn ask(&mut self, method: &str, path: &str, token: Option<&str>, body: &str) -> AnyResult<Answer> {
        let bearer = format!("Bearer {}", token.unwrap_or_default());
        let headers: &[(&str, &str)] = if token.is_some() { &[("authorization", &bearer)] } else { &[] };
        self.request(method, path, headers, body, PATIENCE).with_context(|| format!("{method} {path}"))
    }

    /// As [`Self::ask`]; the answer has to have this status, and is JSON.
    pub fn expect(
        &mut self,
        status: u16,
        method: &str,
        path: &str,
        token: Option<&str>,
        body: &str,
    ) -> AnyResult<Value> {
        let answer = self.ask(method, path, token, body)?;
        ensure!(answer.status == status, "{method} {path}: {} {}", answer.status, answer.text());
        serde_json::from_slice(&answer.body).with_context(|| format!("{method} {path} answers JSON"))
    }

    fn connect(&self, patience: Duration) -> Result<TcpStream, Lost> {
        let stream = TcpStream::connect_timeout(&self.address, patience).map_err(|_| Lost::Refused)?;
        stream.set_nodelay(true).map_err(|_| Lost::Refused)?;
        Ok(stream)
    }
}

fn exchange(stream: &mut TcpStream, request: &[u8], deadline: Instant) -> Result<Answer, Lost> {
    stream.write_all(request).map_err(|_| Lost::Broken)?;
    let mut buffer = Vec::with_capacity(4096);
    let mut chunk = [0; 16 * 1024];
    loop {
        if let Some(answer) = parse(&buffer)? {
            return Ok(answer);
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(Lost::TimedOut);
        }
        stream.set_read_timeout(Some(left)).map_err(|_| Lost::Broken)?;
        match stream.read(&mut chunk) {
            Ok(0) => return Err(Lost::Broken),
            Ok(count) => buffer.extend_from_slice(&chunk[..count]),
            Err(error) => match error.kind() {
                std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut => return Err(Lost::TimedOut),
                std::io::ErrorKind::Interrupted => {}
                _ => return Err(Lost::Broken),
            },
        }
    }
}

/// The answer, once all of it is there.
fn parse(buffer: &[u8]) -> Result<Option<Answer>, Lost> {
    let Some(end) = buffer.windows(4).position(|window| window == b"\r\n\r\n") else { return Ok(None) };
    let head = String::from_utf8_lossy(&buffer[..end]).into_owned();
    let status = head.get(9..12).and_then(|digits| digits.parse().ok()).ok_or(Lost::Broken)?;
    let mut answer = Answer { status, head, body: Vec::new() };
    let body = &buffer[end + 4..];
    if answer.header("transfer-encoding").is_some_and(|coding| coding.eq_ignore_ascii_case("chunked")) {
        return Ok(unchunked(body)?.map(|body| Answer { body, ..answer }));
    }
    let length = answer.header("content-length").and_then(|length| length.parse().ok()).unwrap_or(0);
    if body.len() < length {
        return Ok(None);
    }
    answer.body = body[..length].to_vec();
    Ok(Some(answer))
}

/// The body out of its chunks, once the last of them is there.
fn unchunked(mut rest: &[u8]) -> Result<Option<Vec<u8>>, Lost> {
    let mut body = Vec::new();
    while let Some(end) = rest.windows(2).position(|window| window == b"\r\n") {
        let digits = str::from_utf8(&rest[..end]).ok().and_then(|line| line.split(';').next());
        let length =
            digits.and_then(|digits| usize::from_str_radix(digits.trim(), 16).ok()).ok_or(Lost::Broken)?;
        // No trailers: what answers here sends none.
        let Some(chunk) = rest.get(end + 2..end + 2 + length + 2) else { return Ok(None) };
        if length == 0 {
            return Ok(Some(body));
        }
        body.extend_from_slice(&chunk[..length]);
        rest = &rest[end + 2 + length + 2..];
    }
    Ok(None)
}
