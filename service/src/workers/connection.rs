//! One client's connection: how long it may be silent, and how it is closed so that no request and no response is lost.
//!
//! hyper has one limit for the time between two requests and for the time that a request's head takes. They need to differ: a
//! proxy expects an idle connection to be there for longer than it keeps it itself, while nobody needs half a minute for
//! a head. And hyper closes a new connection at once when the server stops, also when its first request is on the way. So
//! this module notes what happens on a connection, and decides when it ends.

use std::io;
use std::pin::{Pin, pin};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use salvo::http::ResBody;
use salvo::hyper;
use salvo::hyper::body::{Body, Frame, Incoming, SizeHint};
use salvo::hyper::server::conn::{http1, http2};
use salvo::hyper::{Request, Response};
use salvo::rt::tokio::{TokioExecutor, TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, ReadBuf};
use tokio::net::TcpStream;
use tokio::sync::Notify;
use tokio::time::{Instant, Sleep, sleep, sleep_until, timeout};
use tokio_util::sync::CancellationToken;

use super::event_stream::{self, EventStream, Waiting};

/// What an HTTP/2 client sends first.
const HTTP2_PREFACE: [u8; 24] = *b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// How long the client of a closed connection may go on sending. Bytes that arrive at a closed socket make the kernel reset
/// the connection, and the reset may overtake the response.
const LINGER: Duration = Duration::from_secs(2);

/// How long an idle HTTP/2 connection may take to close, once the client was told.
const GOAWAY: Duration = Duration::from_secs(5);

/// How long a connection may be silent.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Between two requests.
    pub keep_alive: Duration,
    /// Before the first byte, and then until a request's head is complete.
    pub head: Duration,
    /// On HTTP/2: until the client is sent a ping, and then until it must have answered.
    pub ping: Duration,
}

/// What has happened on a connection.
struct Activity {
    state: Mutex<State>,
    /// A request has begun.
    begun: Notify,
    /// The connection is to be closed at once.
    abort: Notify,
    /// The head of an event stream is written.
    head_written: Notify,
}

/// A request's connection, for what has to close it. Requests carry it as an extension.
#[derive(Clone)]
pub struct ConnectionHandle(Arc<Activity>);

impl ConnectionHandle {
    /// Closes the connection without its last bytes: its client does not read.
    pub fn close(&self) {
        self.0.abort.notify_one();
    }
}

impl std::fmt::Debug for ConnectionHandle {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("ConnectionHandle").finish_non_exhaustive()
    }
}

struct State {
    phase: Phase,
    since: Instant,
    /// Requests whose responses are not written yet.
    in_flight: usize,
    /// The client may still be sending when the connection is closed.
    lingers: bool,
    /// hyper has the whole head of an event stream, and may not have written it yet.
    writes_head: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// A request's head is awaited, or a part of it has arrived.
    Head,
    /// Between two requests, or in one.
    Idle,
    /// As `Idle`. With HTTP/2 bytes arrive also without requests.
    Http2,
}

impl Activity {
    fn new() -> Self {
        let state = State {
            phase: Phase::Head,
            since: Instant::now(),
            in_flight: 0,
            lingers: false,
            writes_head: false,
        };
        let (begun, abort, head_written) = (Notify::new(), Notify::new(), Notify::new());
        Self { state: Mutex::new(state), begun, abort, head_written }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn read(&self) {
        let mut state = self.state();
        if state.in_flight == 0 && state.phase == Phase::Idle {
            state.enter(Phase::Head);
        }
    }

    fn written(&self) {
        let mut state = self.state();
        if state.in_flight > 0 || state.phase == Phase::Http2 {
            return;
        }
        // Without a request this is hyper's response to a head that it does not understand, and more of it may follow.
        state.lingers |= state.phase == Phase::Head;
        state.enter(Phase::Idle);
    }

    fn is_http2(&self) {
        self.state().enter(Phase::Http2);
    }

    fn begun(&self, has_body: bool) {
        let mut state = self.state();
        state.in_flight += 1;
        if state.phase != Phase::Http2 {
            state.phase = Phase::Idle;
            state.lingers = has_body;
        }
        drop(state);
        self.begun.notify_one();
    }

    fn answered(&self) {
        let mut state = self.state();
        state.in_flight = state.in_flight.saturating_sub(1);
        state.since = Instant::now();
    }

    fn writes_head(&self) {
        self.state().writes_head = true;
    }

    fn flushed(&self) {
        if std::mem::take(&mut self.state().writes_head) {
            self.head_written.notify_one();
        }
    }

    fn lingers(&self) -> bool {
        self.state().lingers
    }

    /// Whether a request is about to arrive.
    fn awaits_request(&self) -> bool {
        let mut state = self.state();
        if state.in_flight == 0 && state.phase == Phase::Idle {
            // The last request was read to its end.
            state.lingers = false;
        }
        state.in_flight == 0 && state.phase == Phase::Head
    }

    /// When the connection has been silent for too long, unless a request is in flight.
    fn deadline(&self, limits: Limits) -> Option<Instant> {
        let state = self.state();
        let limit = match state.phase {
            Phase::Head => limits.head,
            Phase::Idle | Phase::Http2 => limits.keep_alive,
        };
        (state.in_flight == 0).then(|| state.since + limit)
    }

    /// Returns when the connection has been silent for too long.
    async fn expired(&self, limits: Limits) {
        loop {
            let now = Instant::now();
            let deadline = self.deadline(limits);
            if deadline.is_some_and(|deadline| deadline <= now) {
                return;
            }
            // Whatever happens from now on, the connection may be silent for this long.
            let next = now + limits.keep_alive.min(limits.head);
            sleep_until(deadline.map_or(next, |deadline| deadline.min(next))).await;
        }
    }
}

impl State {
    fn enter(&mut self, phase: Phase) {
        self.phase = phase;
        self.since = Instant::now();
    }
}

/// The client's socket.
struct Socket {
    stream: TcpStream,
    activity: Arc<Activity>,
    /// Was read to find the version, and is read again by hyper.
    first: [u8; HTTP2_PREFACE.len()],
    first_read: usize,
    first_taken: usize,
    lingering: Option<Pin<Box<Sleep>>>,
}

impl Socket {
    fn new(stream: TcpStream, activity: Arc<Activity>) -> Self {
        let first = [0; HTTP2_PREFACE.len()];
        Self { stream, activity, first, first_read: 0, first_taken: 0, lingering: None }
    }

    /// Reads until it is clear whether the client speaks HTTP/2.
    async fn is_http2(&mut self) -> io::Result<bool> {
        while self.first[..self.first_read] == HTTP2_PREFACE[..self.first_read] {
            if self.first_read == HTTP2_PREFACE.len() {
                return Ok(true);
            }
            match self.stream.read(&mut self.first[self.first_read..]).await? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                read => self.first_read += read,
            }
        }
        Ok(false)
    }

    fn note_written(&self, written: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        if matches!(written, Poll::Ready(Ok(1..))) {
            self.activity.written();
        }
        written
    }
}

impl AsyncRead for Socket {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.first_taken < self.first_read {
            let length = buffer.remaining().min(self.first_read - self.first_taken);
            buffer.put_slice(&self.first[self.first_taken..self.first_taken + length]);
            self.first_taken += length;
            return Poll::Ready(Ok(()));
        }
        let before = buffer.filled().len();
        ready!(Pin::new(&mut self.stream).poll_read(context, buffer))?;
        if buffer.filled().len() > before {
            self.activity.read();
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Socket {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(context, bytes);
        self.note_written(written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(context, slices);
        self.note_written(written)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    /// hyper calls this when it has written all that it has.
    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(Pin::new(&mut self.stream).poll_flush(context))?;
        self.activity.flushed();
        Poll::Ready(Ok(()))
    }

    /// Ends the responses, and reads on where the client may still be sending, so that it is not reset before it has read
    /// the last one.
    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let Self { stream, activity, lingering, .. } = &mut *self;
        if lingering.is_none() {
            ready!(Pin::new(&mut *stream).poll_shutdown(context))?;
            if !activity.lingers() {
                return Poll::Ready(Ok(()));
            }
        }
        let limit = lingering.get_or_insert_with(|| Box::pin(sleep(LINGER)));
        let mut discarded = [0; 4096];
        while limit.as_mut().poll(context).is_pending() {
            let mut buffer = ReadBuf::new(&mut discarded);
            let read = ready!(Pin::new(&mut *stream).poll_read(context, &mut buffer));
            if read.is_err() || buffer.filled().is_empty() {
                break;
            }
        }
        Poll::Ready(Ok(()))
    }
}

/// hyper, as this service uses it.
#[derive(Debug)]
pub(super) struct Protocols {
    http1: http1::Builder,
    http2: http2::Builder<TokioExecutor>,
    limits: Limits,
}

impl Protocols {
    pub(super) fn new(limits: Limits) -> Self {
        let (mut http1, mut http2) = (http1::Builder::new(), http2::Builder::new(TokioExecutor::new()));
        // The limits of `Activity` count, not hyper's.
        http1.header_read_timeout(None);
        http2.timer(TokioTimer::new());
        http2.keep_alive_interval(limits.ping).keep_alive_timeout(limits.ping);
        Self { http1, http2, limits }
    }

    /// Serves a connection until it is closed. After `stop` it answers what the client has sent already, and at least one
    /// request.
    pub(super) async fn serve<S>(&self, stream: TcpStream, service: S, stop: CancellationToken)
    where
        S: hyper::service::Service<Request<Incoming>, Response = Response<ResBody>>,
        S::Future: Unpin + Send + 'static,
        S::Error: std::error::Error + Send + Sync + 'static,
    {
        let activity = Arc::new(Activity::new());
        let mut socket = Socket::new(stream, Arc::clone(&activity));
        let is_http2 = tokio::select! {
            biased;
            found = socket.is_http2() => found,
            () = activity.expired(self.limits) => return,
        };
        let service = Watched { service, activity: Arc::clone(&activity), waiting: Waiting::default() };
        // In a box, so that nothing of it is left when an event stream goes on.
        let requests = Box::pin(self.serve_requests(is_http2, socket, service, &activity, stop));
        let left = tokio::select! {
            biased;
            () = activity.abort.notified() => return,
            left = requests => left,
        };
        let Some((mut socket, stream)) = left else { return };
        tokio::select! {
            biased;
            () = activity.abort.notified() => {}
            written = stream.write(&mut socket.stream) => match written {
                Ok(()) => drop(socket.shutdown().await),
                Err(error) => tracing::debug!(%error, "a stream's client has left"),
            },
        }
    }

    /// Returns an event stream that goes on when its head is written, with its socket.
    async fn serve_requests<S>(
        &self,
        is_http2: io::Result<bool>,
        socket: Socket,
        service: Watched<S>,
        activity: &Activity,
        stop: CancellationToken,
    ) -> Option<(Socket, EventStream)>
    where
        S: hyper::service::Service<Request<Incoming>, Response = Response<ResBody>>,
        S::Future: Unpin + Send + 'static,
        S::Error: std::error::Error + Send + Sync + 'static,
    {
        match is_http2 {
            Ok(true) => {
                activity.is_http2();
                let serving = pin!(self.http2.serve_connection(TokioIo::new(socket), service));
                let close = http2::Connection::graceful_shutdown;
                let expired = self.drive(serving, activity, stop, close).await;
                if let Some(mut serving) = expired {
                    serving.as_mut().graceful_shutdown();
                    timeout(GOAWAY, serving).await.ok();
                }
            }
            Ok(false) => {
                let waiting = service.waiting.clone();
                let mut serving = self.http1.serve_connection(TokioIo::new(socket), service);
                let close = http1::Connection::graceful_shutdown;
                tokio::select! {
                    biased;
                    _ = self.drive(Pin::new(&mut serving), activity, stop, close) => {}
                    () = activity.head_written.notified() => {
                        let socket = serving.into_parts().io.into_inner();
                        return waiting.take().map(|stream| (socket, stream));
                    }
                }
            }
            Err(error) => tracing::debug!(%error, "a connection was closed before its first request"),
        }
        None
    }

    /// Returns when the connection is closed, or, with it, when it has been silent for too long.
    async fn drive<'a, F, E>(
        &self,
        mut serving: Pin<&'a mut F>,
        activity: &Activity,
        stop: CancellationToken,
        close: impl Fn(Pin<&mut F>),
    ) -> Option<Pin<&'a mut F>>
    where
        F: Future<Output = Result<(), E>>,
        E: std::error::Error,
    {
        tokio::select! {
            biased;
            ended = &mut serving => return log(ended),
            () = activity.expired(self.limits) => return Some(serving),
            () = stop.cancelled() => {}
        }
        // Once around the runtime, to read what the client has sent already.
        tokio::select! {
            biased;
            ended = &mut serving => return log(ended),
            () = tokio::task::yield_now() => {}
        }
        // hyper would close a connection that has not begun a request, although its client has just sent one.
        while activity.awaits_request() {
            tokio::select! {
                biased;
                ended = &mut serving => return log(ended),
                () = activity.begun.notified() => {}
                () = activity.expired(self.limits) => return Some(serving),
            }
        }
        close(serving.as_mut());
        tokio::select! {
            biased;
            ended = &mut serving => log(ended),
            () = activity.expired(self.limits) => Some(serving),
        }
    }
}

fn log<T>(ended: Result<(), impl std::error::Error>) -> Option<T> {
    if let Err(error) = ended {
        tracing::debug!(%error, "a connection ended");
    }
    None
}

/// A connection's service, which notes when requests begin and when their responses are written.
struct Watched<S> {
    service: S,
    activity: Arc<Activity>,
    waiting: Waiting,
}

impl<S> hyper::service::Service<Request<Incoming>> for Watched<S>
where
    S: hyper::service::Service<Request<Incoming>, Response = Response<ResBody>>,
    S::Future: Unpin,
{
    type Response = Response<WatchedBody>;
    type Error = S::Error;
    type Future = Answering<S::Future>;

    fn call(&self, mut request: Request<Incoming>) -> Self::Future {
        request.extensions_mut().insert(ConnectionHandle(Arc::clone(&self.activity)));
        self.activity.begun(!request.body().is_end_stream());
        let in_flight = Some(InFlight(Arc::clone(&self.activity)));
        let leaves = event_stream::is_chunked(&request).map(|is_chunked| (is_chunked, self.waiting.clone()));
        Answering { answer: self.service.call(request), in_flight, leaves }
    }
}

/// In flight until it is dropped.
struct InFlight(Arc<Activity>);

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.answered();
    }
}

struct Answering<F> {
    answer: F,
    in_flight: Option<InFlight>,
    /// Where the body goes if this is an event stream, and whether it is chunked.
    leaves: Option<(bool, Waiting)>,
}

impl<F: Future<Output = Result<Response<ResBody>, E>> + Unpin, E> Future for Answering<F> {
    type Output = Result<Response<WatchedBody>, E>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let mut response = ready!(Pin::new(&mut self.answer).poll(context))?;
        let in_flight = self.in_flight.take();
        let body = match self.leaves.take().filter(|_| event_stream::is_event_stream(&response)) {
            Some((is_chunked, waiting)) => {
                waiting.take_body(is_chunked, &mut response);
                None
            }
            None => Some(std::mem::take(response.body_mut())),
        };
        Poll::Ready(Ok(response.map(|_| WatchedBody { body, in_flight })))
    }
}

/// hyper drops it when it has taken the last byte.
struct WatchedBody {
    /// `None` is an event stream's, which is written without hyper.
    body: Option<ResBody>,
    in_flight: Option<InFlight>,
}

impl Body for WatchedBody {
    type Data = <ResBody as Body>::Data;
    type Error = <ResBody as Body>::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Self::Data>, Self::Error>>> {
        if let Some(body) = &mut self.body {
            return Pin::new(body).poll_frame(context);
        }
        // hyper asks when it has taken the head.
        if let Some(InFlight(activity)) = &self.in_flight {
            activity.writes_head();
        }
        Poll::Pending
    }

    fn is_end_stream(&self) -> bool {
        self.body.as_ref().is_some_and(Body::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.body.as_ref().map(Body::size_hint).unwrap_or_default()
    }
}
