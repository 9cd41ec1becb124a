//! A blocking client of Server-Sent Events. What has arrived waits in it until it is asked for, so a caller can break off
//! behind any event.

use std::collections::VecDeque;
use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use crate::http::{self, RequestError, Response};

/// One event, with the fields that its own lines had.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Event {
    pub id: Option<String>,
    pub name: String,
    pub data: String,
}

/// What came next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Next {
    Event(Event),
    /// No event in the given time.
    Nothing,
    /// The response is complete.
    Ended,
    /// The connection broke, or what came is not HTTP.
    Broken,
}

/// A response that is read event by event.
#[derive(Debug)]
pub struct EventStream {
    stream: TcpStream,
    head: Response,
    body: Body,
    events: Parser,
    is_broken: bool,
}

impl EventStream {
    /// Sends a GET on a new connection, and waits for the head of the response, whatever its status.
    pub fn open(
        address: SocketAddr,
        path: &str,
        headers: &[(&str, &str)],
        timeout: Duration,
    ) -> Result<Self, RequestError> {
        let deadline = Instant::now() + timeout;
        let mut stream = TcpStream::connect_timeout(&address, timeout).map_err(|_| RequestError::Refused)?;
        let mut request = format!("GET {path} HTTP/1.1\r\nhost: test\r\naccept: text/event-stream\r\n");
        for (name, value) in headers {
            request += &format!("{name}: {value}\r\n");
        }
        request += "\r\n";
        stream.write_all(request.as_bytes()).map_err(|_| RequestError::Broken)?;
        let mut received = Vec::new();
        let (head, length) = loop {
            if let Some(parsed) = http::parse_head(&received)? {
                break parsed;
            }
            match read(&mut stream, deadline, &mut received) {
                Arrived::Bytes => {}
                Arrived::Nothing => return Err(RequestError::TimedOut),
                Arrived::Closed | Arrived::Failed => return Err(RequestError::Broken),
            }
        };
        let body = Body::of(&head);
        let mut opened = Self { stream, head, body, events: Parser::default(), is_broken: false };
        opened.take_in(&received[length..]);
        Ok(opened)
    }

    pub fn status(&self) -> u16 {
        self.head.status
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        self.head.header(name)
    }

    /// The next event, if one comes in this time.
    pub fn next(&mut self, timeout: Duration) -> Next {
        let deadline = Instant::now() + timeout;
        let mut received = Vec::new();
        loop {
            if let Some(event) = self.events.events.pop_front() {
                return Next::Event(event);
            }
            if self.is_broken {
                return Next::Broken;
            }
            if self.body.has_ended() {
                return Next::Ended;
            }
            match read(&mut self.stream, deadline, &mut received) {
                Arrived::Bytes => self.take_in(&received),
                Arrived::Nothing => return Next::Nothing,
                Arrived::Closed if matches!(self.body, Body::UntilClose) => self.body = Body::Rest(0),
                Arrived::Closed | Arrived::Failed => self.is_broken = true,
            }
            received.clear();
        }
    }

    /// What the next request sends as `Last-Event-ID`, once every event that has arrived was handled.
    pub fn last_id(&self) -> &str {
        &self.events.last_id
    }

    /// The delay before the next request that the server has asked for.
    pub fn retry(&self) -> Option<Duration> {
        self.events.retry
    }

    /// How many comments have arrived.
    pub fn comments(&self) -> u64 {
        self.events.comments
    }

    fn take_in(&mut self, received: &[u8]) {
        let mut bytes = Vec::new();
        self.is_broken |= self.body.decode(received, &mut bytes).is_err();
        self.events.feed(&bytes);
    }
}

enum Arrived {
    Bytes,
    Nothing,
    Closed,
    Failed,
}

/// Waits until something arrives, and appends it.
fn read(stream: &mut TcpStream, deadline: Instant, received: &mut Vec<u8>) -> Arrived {
    let mut chunk = [0; 16 * 1024];
    loop {
        // A time-out of zero would be none. What is there already is read in any case.
        let left = deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
        if stream.set_read_timeout(Some(left)).is_err() {
            return Arrived::Failed;
        }
        match stream.read(&mut chunk) {
            Ok(0) => return Arrived::Closed,
            Ok(count) => {
                received.extend_from_slice(&chunk[..count]);
                return Arrived::Bytes;
            }
            Err(error) => match error.kind() {
                ErrorKind::Interrupted => {}
                ErrorKind::WouldBlock | ErrorKind::TimedOut => return Arrived::Nothing,
                _ => return Arrived::Failed,
            },
        }
    }
}

/// What the body of a response still has, as its head says.
#[derive(Debug)]
enum Body {
    Chunked(Chunks),
    /// Bytes that are still to come.
    Rest(usize),
    UntilClose,
}

impl Body {
    fn of(head: &Response) -> Self {
        if head.header("transfer-encoding").is_some_and(|coding| coding.eq_ignore_ascii_case("chunked")) {
            return Self::Chunked(Chunks::Size(Vec::new()));
        }
        let length = head.header("content-length").and_then(|length| length.parse().ok());
        length.map_or(Self::UntilClose, Self::Rest)
    }

    fn has_ended(&self) -> bool {
        matches!(self, Self::Rest(0) | Self::Chunked(Chunks::Ended))
    }

    /// Appends what the body has, also what comes before a fault.
    fn decode(&mut self, received: &[u8], bytes: &mut Vec<u8>) -> Result<(), RequestError> {
        match self {
            Self::Chunked(chunks) => return chunks.decode(received, bytes),
            Self::Rest(left) => {
                let taken = received.len().min(*left);
                bytes.extend_from_slice(&received[..taken]);
                *left -= taken;
            }
            Self::UntilClose => bytes.extend_from_slice(received),
        }
        Ok(())
    }
}

/// Where in its chunks a body stands.
#[derive(Debug)]
enum Chunks {
    /// In the line with a chunk's size.
    Size(Vec<u8>),
    /// So many bytes of a chunk are still to come, and so many of the line's end after it.
    Data { left: usize, line_end: usize },
    /// Without trailers: no server here sends any.
    Ended,
}

impl Chunks {
    fn decode(&mut self, mut received: &[u8], bytes: &mut Vec<u8>) -> Result<(), RequestError> {
        while let [first, ..] = received {
            match self {
                Self::Size(line) => {
                    line.push(*first);
                    received = &received[1..];
                    if line.ends_with(b"\r\n") {
                        *self = Self::begin(line)?;
                    }
                }
                Self::Data { left, line_end } => {
                    let data = received.len().min(*left);
                    bytes.extend_from_slice(&received[..data]);
                    *left -= data;
                    let end = (received.len() - data).min(*line_end);
                    *line_end -= end;
                    received = &received[data + end..];
                    if *line_end == 0 {
                        *self = Self::Size(Vec::new());
                    }
                }
                Self::Ended => break,
            }
        }
        Ok(())
    }

    fn begin(line: &[u8]) -> Result<Self, RequestError> {
        let digits = str::from_utf8(line).ok().and_then(|line| line.split(';').next());
        let size = digits.and_then(|digits| usize::from_str_radix(digits.trim(), 16).ok());
        match size.ok_or(RequestError::Broken)? {
            0 => Ok(Self::Ended),
            left => Ok(Self::Data { left, line_end: 2 }),
        }
    }
}

/// Makes events of bytes, as the HTML standard has it.
#[derive(Debug, Default)]
struct Parser {
    line: Vec<u8>,
    /// A line feed that follows belongs to the same line end.
    after_return: bool,
    id: Option<String>,
    name: String,
    data: Option<String>,
    events: VecDeque<Event>,
    last_id: String,
    retry: Option<Duration>,
    comments: u64,
}

impl Parser {
    fn feed(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            match byte {
                b'\n' if self.after_return => self.after_return = false,
                b'\n' | b'\r' => {
                    self.after_return = byte == b'\r';
                    let line = std::mem::take(&mut self.line);
                    self.take_line(&String::from_utf8_lossy(&line));
                }
                _ => {
                    self.after_return = false;
                    self.line.push(byte);
                }
            }
        }
    }

    fn take_line(&mut self, line: &str) {
        if line.is_empty() {
            return self.dispatch();
        }
        let (field, value) = line.split_once(':').unwrap_or((line, ""));
        let value = value.strip_prefix(' ').unwrap_or(value);
        match field {
            "" => self.comments += 1,
            "id" if !value.contains('\0') => self.id = Some(value.to_owned()),
            "event" => value.clone_into(&mut self.name),
            "data" => match &mut self.data {
                Some(data) => *data = format!("{data}\n{value}"),
                None => self.data = Some(value.to_owned()),
            },
            "retry" if value.bytes().all(|byte| byte.is_ascii_digit()) => {
                self.retry = value.parse().ok().map(Duration::from_millis).or(self.retry);
            }
            _ => {}
        }
    }

    fn dispatch(&mut self) {
        let (id, mut name) = (self.id.take(), std::mem::take(&mut self.name));
        if let Some(id) = &id {
            self.last_id.clone_from(id);
        }
        if let Some(data) = self.data.take() {
            if name.is_empty() {
                "message".clone_into(&mut name);
            }
            self.events.push_back(Event { id, name, data });
        }
    }
}
