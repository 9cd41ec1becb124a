//! A client of one replica: a kept-alive connection, blocking, with a limit of time for each request.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

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

impl Answer {
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
    let length = answer.header("content-length").and_then(|length| length.parse().ok()).unwrap_or(0);
    let body = &buffer[end + 4..];
    if body.len() < length {
        return Ok(None);
    }
    answer.body = body[..length].to_vec();
    Ok(Some(answer))
}
