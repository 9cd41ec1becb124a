//! A blocking client of `GET /stream`: Server-Sent Events over HTTP/1.1.

use std::io::{self, ErrorKind, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

const CONNECT_LIMIT: Duration = Duration::from_secs(2);

/// An event, with the fields that the service uses.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Event {
    pub id: String,
    pub name: String,
    pub data: String,
}

/// An open stream.
#[derive(Debug)]
pub struct Events {
    connection: TcpStream,
    pub status: u16,
    /// As it came, in chunks.
    received: Vec<u8>,
    /// Without the chunks' lengths.
    text: Vec<u8>,
    ended: bool,
}

impl Events {
    /// Waits for the head of the response.
    pub fn open(
        address: SocketAddr,
        token: &str,
        position: Option<&str>,
        limit: Duration,
    ) -> io::Result<Self> {
        let connection = TcpStream::connect_timeout(&address, CONNECT_LIMIT)?;
        let mut events = Self { connection, status: 0, received: Vec::new(), text: Vec::new(), ended: false };
        let position = position.map(|id| format!("last-event-id: {id}\r\n")).unwrap_or_default();
        let head =
            format!("GET /stream HTTP/1.1\r\nhost: test\r\nauthorization: Bearer {token}\r\n{position}\r\n");
        events.connection.write_all(head.as_bytes())?;
        let deadline = Instant::now() + limit;
        loop {
            if let Some(end) = find(&events.received, b"\r\n\r\n") {
                let head = String::from_utf8_lossy(&events.received[..end]).into_owned();
                events.received.drain(..end + 4);
                let status = head.split(' ').nth(1).and_then(|status| status.parse().ok());
                events.status = status.ok_or(ErrorKind::InvalidData)?;
                return Ok(events);
            }
            if !events.read(deadline)? {
                return Err(ErrorKind::TimedOut.into());
            }
        }
    }

    /// The next event, unless none comes within the limit. An error is the end of the stream.
    pub fn next(&mut self, limit: Duration) -> io::Result<Option<Event>> {
        let deadline = Instant::now() + limit;
        loop {
            while let Some(end) = find(&self.text, b"\n\n") {
                let block: Vec<u8> = self.text.drain(..end + 2).collect();
                let event = parse(&String::from_utf8_lossy(&block));
                if !event.name.is_empty() {
                    return Ok(Some(event));
                }
            }
            if self.ended {
                return Err(ErrorKind::UnexpectedEof.into());
            }
            if !self.read(deadline)? {
                return Ok(None);
            }
            self.take_chunks()?;
        }
    }

    /// False when the time is over.
    fn read(&mut self, deadline: Instant) -> io::Result<bool> {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(false);
        }
        self.connection.set_read_timeout(Some(left))?;
        let mut buffer = [0; 16 * 1024];
        match self.connection.read(&mut buffer) {
            Ok(0) => Err(ErrorKind::UnexpectedEof.into()),
            Ok(length) => {
                self.received.extend_from_slice(&buffer[..length]);
                Ok(true)
            }
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn take_chunks(&mut self) -> io::Result<()> {
        while let Some(end) = find(&self.received, b"\r\n") {
            let length = std::str::from_utf8(&self.received[..end]).ok();
            let length = length.and_then(|length| usize::from_str_radix(length, 16).ok());
            let length = length.ok_or(ErrorKind::InvalidData)?;
            if self.received.len() < end + 2 + length + 2 {
                break;
            }
            self.text.extend_from_slice(&self.received[end + 2..end + 2 + length]);
            self.received.drain(..end + 2 + length + 2);
            self.ended |= length == 0;
        }
        Ok(())
    }
}

fn find(bytes: &[u8], wanted: &[u8]) -> Option<usize> {
    bytes.windows(wanted.len()).position(|window| window == wanted)
}

fn parse(block: &str) -> Event {
    let mut event = Event::default();
    for line in block.lines() {
        match line.split_once(": ") {
            Some(("id", id)) => id.clone_into(&mut event.id),
            Some(("event", name)) => name.clone_into(&mut event.name),
            Some(("data", data)) => data.clone_into(&mut event.data),
            _ => {}
        }
    }
    event
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    #[test]
    fn events_are_read_whatever_the_chunks() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("an address");
        let server = std::thread::spawn(move || {
            let (mut connection, _) = listener.accept().expect("a client");
            let mut request = [0; 1000];
            let length = connection.read(&mut request).expect("a request");
            for part in [
                "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n",
                "c\r\nid: 1\nevent:\r\n3\r\n a\n\r\n9\r\ndata: x\n\n\r\n3\r\n:\n\n\r\n0\r\n\r\n",
            ] {
                connection.write_all(part.as_bytes()).expect("written");
            }
            String::from_utf8_lossy(&request[..length]).into_owned()
        });
        let limit = Duration::from_secs(5);
        let mut events = Events::open(address, "t", Some("9"), limit).expect("a stream");
        let event = events.next(limit).expect("no end").expect("an event");
        assert_eq!(event, Event { id: "1".into(), name: "a".into(), data: "x".into() });
        assert!(events.next(limit).is_err(), "it has ended");
        assert!(server.join().expect("no panic").contains("last-event-id: 9\r\n"));
    }
}
