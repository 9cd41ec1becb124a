//! An event stream over HTTP/1.1, which goes on without hyper once the head of its response is written.
//!
//! hyper keeps two buffers of 8 KiB for a connection, and what it needs for the next request. A stream mostly waits, and its
//! connection closes after it. So ten thousand idle streams would consist of buffers that nobody uses. What is left here is
//! the socket and the body.

use std::fmt::Write as _;
use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};

use salvo::http::ResBody;
use salvo::hyper::body::{Body as _, Bytes, Frame};
use salvo::hyper::header::{CONNECTION, CONTENT_TYPE, HeaderValue};
use salvo::hyper::{Method, Request, Response, Version};
use tokio::io::{AsyncRead as _, AsyncWriteExt as _, ReadBuf};
use tokio::net::TcpStream;

/// Events that are ready together are written together, up to about this many bytes.
const WRITTEN_AT_ONCE: usize = 16 * 1024;

/// Where the body of a connection's event stream waits until the head is written.
#[derive(Clone, Default)]
pub(super) struct Waiting(Arc<Mutex<Option<EventStream>>>);

impl Waiting {
    /// Takes the body of an event stream out of its response, which then ends with the connection.
    pub(super) fn take_body(&self, is_chunked: bool, response: &mut Response<ResBody>) {
        response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
        let body = std::mem::take(response.body_mut());
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(EventStream { body, is_chunked });
    }

    pub(super) fn take(&self) -> Option<EventStream> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// Whether the body of a response comes in chunks, if it may be an event stream that goes on without hyper: not over HTTP/2,
/// where it shares its connection.
pub(super) fn is_chunked<B>(request: &Request<B>) -> Option<bool> {
    match request.version() {
        _ if request.method() != Method::GET => None,
        Version::HTTP_11 => Some(true),
        Version::HTTP_10 => Some(false),
        _ => None,
    }
}

pub(super) fn is_event_stream(response: &Response<ResBody>) -> bool {
    response.headers().get(CONTENT_TYPE).is_some_and(|media_type| media_type == "text/event-stream")
}

/// The rest of a response.
pub(super) struct EventStream {
    body: ResBody,
    is_chunked: bool,
}

impl EventStream {
    /// Writes the body to its end, unless the client leaves before.
    pub(super) async fn write(mut self, socket: &mut TcpStream) -> io::Result<()> {
        loop {
            let (bytes, is_last) = poll_fn(|context| self.poll_bytes(socket, context)).await?;
            socket.write_all(&bytes).await?;
            if is_last {
                return Ok(());
            }
        }
    }

    /// What is to be written next, and whether it is the end.
    fn poll_bytes(
        &mut self,
        socket: &mut TcpStream,
        context: &mut Context<'_>,
    ) -> Poll<io::Result<(Vec<u8>, bool)>> {
        if let Poll::Ready(left) = poll_left(socket, context) {
            return Poll::Ready(Err(left));
        }
        let mut bytes = Vec::new();
        while bytes.len() < WRITTEN_AT_ONCE {
            match Pin::new(&mut self.body).poll_frame(context) {
                Poll::Ready(Some(frame)) => self.append(frame.map_err(io::Error::other)?, &mut bytes),
                Poll::Ready(None) => {
                    bytes.extend_from_slice(if self.is_chunked { b"0\r\n\r\n" } else { b"" });
                    return Poll::Ready(Ok((bytes, true)));
                }
                Poll::Pending if bytes.is_empty() => return Poll::Pending,
                Poll::Pending => break,
            }
        }
        Poll::Ready(Ok((bytes, false)))
    }

    fn append(&self, frame: Frame<Bytes>, bytes: &mut Vec<u8>) {
        // A chunk without data would be the end.
        let Some(data) = frame.into_data().ok().filter(|data| !data.is_empty()) else { return };
        if !self.is_chunked {
            return bytes.extend_from_slice(&data);
        }
        let mut length = String::new();
        // Writing to a String cannot fail.
        let _ = write!(length, "{:x}\r\n", data.len());
        bytes.extend_from_slice(length.as_bytes());
        bytes.extend_from_slice(&data);
        bytes.extend_from_slice(b"\r\n");
    }
}

/// Ready when the client has closed its end. There is no answer to what it sends.
fn poll_left(socket: &mut TcpStream, context: &mut Context<'_>) -> Poll<io::Error> {
    let mut discarded = [0; 512];
    loop {
        let mut buffer = ReadBuf::new(&mut discarded);
        match ready!(Pin::new(&mut *socket).poll_read(context, &mut buffer)) {
            Ok(()) if buffer.filled().is_empty() => return Poll::Ready(io::ErrorKind::UnexpectedEof.into()),
            Ok(()) => {}
            Err(error) => return Poll::Ready(error),
        }
    }
}
