//! `chat-client.js`, which authors of clients copy: against a server that says what a test wants.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

use super::browser::Person;

const MODULE: &str = include_str!("../../../deploy/examples/chat-client.js");

/// What a stream answers: a status, and pieces of its body. The last one ends it, or else it stays open.
struct Answer {
    status: &'static str,
    pieces: Vec<Vec<u8>>,
    stays_open: bool,
}

fn answer(status: &'static str, pieces: Vec<Vec<u8>>) -> Answer {
    Answer { status, pieces, stays_open: false }
}

/// A stream that asks the client to come back at once.
fn text(events: &str) -> Answer {
    answer("200 OK", vec![format!("retry: 1\n\n{events}").into_bytes()])
}

/// The module on an empty page, and answers for its streams, one after the other.
struct Server {
    address: SocketAddr,
    /// The heads of the requests for streams.
    asked: Arc<Mutex<Vec<String>>>,
    _accepting: JoinSet<()>,
}

impl Server {
    async fn start(answers: Vec<Answer>) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("a port");
        let address = listener.local_addr().expect("an address");
        let asked = Arc::new(Mutex::new(Vec::new()));
        let answers = Arc::new(Mutex::new(answers.into_iter()));
        let mut accepting = JoinSet::new();
        let heads = Arc::clone(&asked);
        accepting.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                let (answers, heads) = (Arc::clone(&answers), Arc::clone(&heads));
                connections.spawn(async move {
                    // A browser may leave at any time.
                    let _ = serve(stream, &heads, || {
                        answers.lock().unwrap_or_else(PoisonError::into_inner).next()
                    })
                    .await;
                });
            }
        });
        Self { address, asked, _accepting: accepting }
    }

    /// The `Last-Event-ID` of each request for a stream.
    fn positions(&self) -> Vec<Option<String>> {
        let asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
        let position = |head: &String| {
            let line = head.lines().find(|line| line.to_lowercase().starts_with("last-event-id:"))?;
            Some(line.split_once(':')?.1.trim().to_owned())
        };
        asked.iter().map(position).collect()
    }
}

async fn serve(
    mut stream: TcpStream,
    heads: &Mutex<Vec<String>>,
    next: impl FnOnce() -> Option<Answer>,
) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await?);
    }
    let head = String::from_utf8_lossy(&head).into_owned();
    let file = |kind: &str, text: &str| {
        let length = text.len();
        format!(
            "HTTP/1.1 200 OK\r\ncontent-type: {kind}\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n{text}"
        )
    };
    if !head.starts_with("GET /stream ") {
        let file = match head.starts_with("GET /chat-client.js ") {
            true => file("text/javascript; charset=utf-8", MODULE),
            false => file("text/html", "<!doctype html><title>Empty</title>"),
        };
        return stream.write_all(file.as_bytes()).await;
    }
    assert!(head.to_lowercase().contains("authorization: bearer a-token\r\n"), "{head}");
    heads.lock().unwrap_or_else(PoisonError::into_inner).push(head);
    let answer = next().unwrap_or_else(|| answer("500 Nothing left to say", Vec::new()));
    let head =
        format!("HTTP/1.1 {}\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n", answer.status);
    stream.write_all(head.as_bytes()).await?;
    for piece in answer.pieces {
        stream.write_all(&piece).await?;
        // So that the browser gets each piece alone.
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    if answer.stays_open {
        std::future::pending::<()>().await;
    }
    Ok(())
}

/// Follows until it is refused, or has seen as many messages as wanted, and returns all that it has seen.
const FOLLOW: &str = "
    const { ChatClient } = await import('./chat-client.js');
    const chat = new ChatClient(location.origin + '/', { silence: 700 });
    chat.tokens = { access: 'a-token' };
    const leaving = new AbortController();
    const seen = [];
    let refused = null;
    let throwOn = arguments[0].throwOn;
    await chat.follow({
        position: arguments[0].position,
        signal: leaving.signal,
        onMessage: async (message) => {
            await new Promise((go) => setTimeout(go, 1));
            if (message === throwOn) { throwOn = null; seen.push('thrown'); throw new Error('of a callback'); }
            seen.push(message);
            if (message === arguments[0].last) leaving.abort();
        },
        onReset: (reason) => seen.push('reset ' + reason),
        onEnd: (reason) => seen.push('end ' + reason),
    }).catch((error) => { refused = error.status ?? String(error); });
    return { seen, refused };
";

async fn follow(answers: Vec<Answer>, options: Value) -> (Value, Vec<Option<String>>) {
    let server = Server::start(answers).await;
    let person = Person::at(server.address).await;
    let seen = person.runs_async(FOLLOW, options).await;
    (seen, server.positions())
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a browser: cargo xtask test"]
async fn the_module_reads_events_however_their_bytes_are_cut() {
    let events = "\u{feff}:\n\n\
        id: AQ_-\nevent: ready\ndata: {\"resumed\":false}\n\n\
        id: BQ\r\nevent: message\r\ndata: {\"a\":\r\ndata:1}\r\nunknown: x\r\n\r\n\
        data:\"👋 مرحبا\"\r\r\
        : a comment\nid: CQ\n\nevent: other\ndata\n\n\
        retry: 1\nretry: soon\n\nevent: end\ndata: {\"reason\":\"draining\"}\n\n";
    let bytes = events.as_bytes();
    let all = |size: usize| answer("200 OK", bytes.chunks(size).map(<[u8]>::to_vec).collect());
    let last = text("data: \"last\"\n\n");
    let (seen, positions) =
        follow(vec![all(1), all(2), all(3), all(5), all(bytes.len()), last], json!({"last": "last"})).await;
    let mut expected = Vec::new();
    for _ in 0..5 {
        expected.extend([json!({"a": 1}), json!("👋 مرحبا"), json!("end draining")]);
    }
    expected.push(json!("last"));
    assert_eq!(seen, json!({"seen": expected, "refused": null}));
    // An id counts although its event has no data, and comes with the next one that has.
    let after = Some("CQ".to_owned());
    assert_eq!(positions, [None, after.clone(), after.clone(), after.clone(), after.clone(), after]);
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a browser: cargo xtask test"]
async fn the_module_goes_on_behind_what_it_has_handled_whatever_ends_a_stream() {
    let silent = Answer { stays_open: true, ..text("id: 3\ndata: 3\n\n:\n\n") };
    let answers = vec![
        // Cut off in an event, which does not count.
        text("id: 1\ndata: 1\n\nid: 2\ndata: 2"),
        // A callback throws: the event comes again.
        text("id: 2\ndata: 2\n\n"),
        text("id: 2\ndata: 2\n\n"),
        silent,
        answer("503 Service Unavailable\r\nretry-after: 0", Vec::new()),
        text("id: 9\nevent: reset\ndata: {\"reason\":\"epoch\"}\n\n"),
        text("id: 10\ndata: 10\n\n"),
    ];
    let (seen, positions) = follow(answers, json!({"position": "0", "throwOn": 2, "last": 10})).await;
    assert_eq!(seen, json!({"seen": [1, "thrown", 2, 3, "reset epoch", 10], "refused": null}));
    let positions: Vec<_> = positions.iter().map(|position| position.as_deref().unwrap_or("")).collect();
    assert_eq!(positions, ["0", "1", "1", "2", "3", "3", "9"]);
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a browser: cargo xtask test"]
async fn the_module_does_not_come_back_where_that_is_of_no_use() {
    let person = Person::at(Server::start(Vec::new()).await.address).await;
    let expired = "retry: 60000\n\nevent: end\ndata: {\"reason\":\"expired\"}\n\n";
    for (last, refused, said) in [
        (answer("401 Unauthorized", Vec::new()), 401, json!([1])),
        (answer("204 No Content", Vec::new()), 204, json!([1])),
        (answer("403 Forbidden", Vec::new()), 403, json!([1])),
        (text(expired), 401, json!([1, "end expired"])),
    ] {
        let server = Server::start(vec![text("id: 1\ndata: 1\n\n"), last]).await;
        person.goes_to(server.address).await;
        let seen = person.runs_async(FOLLOW, json!({})).await;
        assert_eq!(seen, json!({"seen": said, "refused": refused}));
        assert_eq!(server.positions(), [None, Some("1".to_owned())]);
    }
}
