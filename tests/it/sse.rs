//! The harness' client of Server-Sent Events, against a server that says what a test wants, however it is cut into pieces.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener};
use std::thread;
use std::time::Duration;

use tests::http::RequestError;
use tests::sse::{Event, EventStream, Next};

const LIMIT: Duration = Duration::from_secs(10);
const HEAD: &str = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n";

/// A server of one connection. It writes the pieces one after another, and then closes it.
fn serve(pieces: Vec<Vec<u8>>) -> (SocketAddr, thread::JoinHandle<String>) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("an address");
    let server = thread::spawn(move || {
        let (mut stream, _) = listener.accept().expect("a client");
        stream.set_nodelay(true).expect("an option");
        let mut request = Vec::new();
        let mut chunk = [0; 4096];
        while !request.ends_with(b"\r\n\r\n") {
            let count = stream.read(&mut chunk).expect("a request");
            request.extend_from_slice(&chunk[..count]);
        }
        for piece in pieces {
            stream.write_all(&piece).expect("the client reads");
            thread::sleep(Duration::from_millis(1));
        }
        String::from_utf8(request).expect("text")
    });
    (address, server)
}

fn open(pieces: Vec<Vec<u8>>) -> EventStream {
    EventStream::open(serve(pieces).0, "/stream", &[], LIMIT).expect("a response")
}

fn chunked(text: &str) -> String {
    format!("{:x}\r\n{text}\r\n", text.len())
}

fn event(id: Option<&str>, name: &str, data: &str) -> Next {
    Next::Event(Event { id: id.map(str::to_owned), name: name.to_owned(), data: data.to_owned() })
}

fn all(stream: &mut EventStream) -> Vec<Next> {
    let mut all = Vec::new();
    while let next @ Next::Event(_) = stream.next(LIMIT) {
        all.push(next);
    }
    all
}

#[test]
fn events_are_the_same_however_they_are_cut() {
    let body = [
        "id: 1\nevent: ready\ndata: {\"resumed\":true}\n\n",
        ":\n\n: a comment\n\n",
        "id: 2\nevent: message\ndata: grüße 🦀\n\nid: 3\r\nevent: message\r\ndata: a",
        "b\r\n\r\n",
        "data:no space\rdata:  two\r\r",
        "id: 4\n\nevent: nothing\n\nretry: 1234\n\nretry: soon\n\nevent: end\ndata: {}\n\n",
        "data: never complete\n",
    ];
    let chunks: String = body.iter().map(|part| chunked(part)).collect();
    let response = format!("{HEAD}transfer-encoding: chunked\r\n\r\n{chunks}0\r\n\r\n").into_bytes();
    for size in [1, 2, 3, 7, 50, 10_000] {
        let mut stream = open(response.chunks(size).map(<[u8]>::to_vec).collect());
        assert_eq!((stream.status(), stream.header("Content-Type")), (200, Some("text/event-stream")));
        let expected = [
            event(Some("1"), "ready", "{\"resumed\":true}"),
            event(Some("2"), "message", "grüße 🦀"),
            event(Some("3"), "message", "ab"),
            event(None, "message", "no space\n two"),
            event(None, "end", "{}"),
        ];
        assert_eq!(all(&mut stream), expected, "in pieces of {size}");
        assert_eq!(stream.next(LIMIT), Next::Ended);
        assert_eq!(stream.last_id(), "4");
        assert_eq!(stream.retry(), Some(Duration::from_millis(1234)));
        assert_eq!(stream.comments(), 2);
    }
}

#[test]
fn a_response_ends_as_its_head_says_and_breaks_otherwise() {
    let data = "data: x\n\n";
    let first = chunked(data);
    let cases = [
        (format!("transfer-encoding: chunked\r\n\r\n{first}0\r\n\r\n"), Next::Ended),
        (format!("transfer-encoding: chunked\r\n\r\n{first}"), Next::Broken),
        (format!("transfer-encoding: chunked\r\n\r\n{first}no size\r\n"), Next::Broken),
        (format!("content-length: {}\r\n\r\n{data}{data}", data.len()), Next::Ended),
        (format!("content-length: 100\r\n\r\n{data}"), Next::Broken),
        (format!("\r\n{data}"), Next::Ended),
    ];
    for (rest, end) in cases {
        let mut stream = open(vec![format!("{HEAD}{rest}").into_bytes()]);
        assert_eq!(stream.next(LIMIT), event(None, "message", "x"), "{rest:?}");
        assert_eq!(stream.next(LIMIT), end, "{rest:?}");
    }
}

#[test]
fn a_client_waits_only_as_long_as_it_was_told() {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("an address");
    let brief = Duration::from_millis(50);
    let silent = EventStream::open(address, "/stream", &[], brief).expect_err("nobody answers");
    assert_eq!(silent, RequestError::TimedOut);
    drop(listener);
    let refused = EventStream::open(address, "/stream", &[], brief).expect_err("nobody listens");
    assert_eq!(refused, RequestError::Refused);

    let head = format!("{HEAD}transfer-encoding: chunked\r\n\r\n").into_bytes();
    let later = chunked("data: x\n\n").into_bytes();
    // An empty piece takes a millisecond.
    let pieces = std::iter::once(head).chain(vec![Vec::new(); 300]).chain([later]).collect();
    let mut stream = open(pieces);
    assert_eq!(stream.next(brief), Next::Nothing);
    assert_eq!(stream.next(LIMIT), event(None, "message", "x"));
}

#[test]
fn a_request_has_its_headers() {
    let (address, server) = serve(vec![b"HTTP/1.1 204 No Content\r\ncontent-length: 0\r\n\r\n".to_vec()]);
    let headers = [("authorization", "Bearer token"), ("last-event-id", "AQ_-")];
    let mut stream = EventStream::open(address, "/stream?x=1", &headers, LIMIT).expect("a response");
    assert_eq!((stream.status(), stream.next(LIMIT)), (204, Next::Ended));
    let request = server.join().expect("no panic");
    assert!(request.starts_with("GET /stream?x=1 HTTP/1.1\r\n"), "{request}");
    for line in ["authorization: Bearer token\r\n", "last-event-id: AQ_-\r\n"] {
        assert!(request.contains(line), "{request}");
    }
}
