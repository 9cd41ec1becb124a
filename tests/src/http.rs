//! A blocking HTTP/1.1 client for one replica: it keeps its connection alive, and every request has a timeout.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

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
            Self::TimedOut => "no answer in time",
        }
    }
}

impl Response {
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
    let Some(end) = buffer.windows(4).position(|window| window == b"\r\n\r\n") else { return Ok(None) };
    let head = String::from_utf8_lossy(&buffer[..end]).into_owned();
    let status = head.get(9..12).and_then(|digits| digits.parse().ok()).ok_or(RequestError::Broken)?;
    let mut response = Response { status, head, body: Vec::new() };
    let length = response.header("content-length").and_then(|length| length.parse().ok()).unwrap_or(0);
    let body = &buffer[end + 4..];
    if body.len() < length {
        return Ok(None);
    }
    response.body = body[..length].to_vec();
    Ok(Some(response))
}
