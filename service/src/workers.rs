//! One single-threaded Tokio runtime per core. A connection stays with the worker that accepted it.
//!
//! A request is little work with two or three waits: for its bytes, for Redis, for the writer. A runtime that moves tasks
//! between threads pays at each of these waits, for waking another thread and for the queues that the threads share. A
//! single-threaded runtime runs all requests that can go on one after the other, and then sends their Redis commands in
//! one write, on the worker's own connection.
//!
//! The price is balance: a connection never moves. A new one goes to the worker with the fewest, so that the many similar
//! clients of a service spread evenly. All requests of one HTTP/2 connection are served by one core.

mod connection;
mod event_stream;

use std::cell::Cell;
use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use std::{io, net, thread};

use salvo::Service;
use salvo::conn::{ConnCtrl, SocketAddr};
use salvo::http::uri::Scheme;
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::{Builder, Handle};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use self::connection::Protocols;
pub use self::connection::{ConnectionHandle, Limits};

/// A read costs a worker some five times what it costs Redis, which has one thread: more workers would only wait for it.
/// On a machine with more cores, run more replicas.
const WORKERS_MAX: usize = 8;

/// Accepted connections that wait for one worker. Above that the worker gets no more.
const BACKLOG_MAX: usize = 1024;

/// Connections that the kernel may have taken before a listener is closed: Linux keeps at most this many, unless told otherwise.
const KERNEL_BACKLOG_MAX: usize = 4096;

/// The pause after a failed accept, which mostly means that no file descriptors are left.
const ACCEPT_RETRY: Duration = Duration::from_millis(10);

thread_local! {
    static CURRENT: Cell<usize> = const { Cell::new(0) };
}

/// The index of the worker that calls; any other thread counts as the first.
pub fn current() -> usize {
    CURRENT.get()
}

/// One worker for each core that this process may use; a container's CPU limit counts, too.
pub fn default_count() -> usize {
    thread::available_parallelism().map_or(1, usize::from).min(WORKERS_MAX)
}

/// The workers. The first is the runtime that started them; the others end when this is dropped.
#[derive(Debug)]
pub struct Workers {
    runtimes: Vec<Handle>,
    ended: mpsc::Receiver<usize>,
    _until_dropped: Vec<oneshot::Sender<Infallible>>,
}

impl Workers {
    /// The calling runtime is the first of `count`.
    pub fn start(count: usize) -> io::Result<Self> {
        let (end_reporter, ended) = mpsc::channel(count);
        let (mut runtimes, mut until_dropped) = (vec![Handle::current()], Vec::new());
        for number in 1..count {
            let (kept, end) = oneshot::channel::<Infallible>();
            let reporter = EndReporter(end_reporter.clone(), number);
            let runtime = Builder::new_current_thread().enable_all().build()?;
            runtimes.push(runtime.handle().clone());
            until_dropped.push(kept);
            thread::Builder::new().name(format!("worker-{number}")).spawn(move || {
                let _reporter = reporter;
                CURRENT.set(number);
                // Ends when `kept` is dropped; nothing can be sent.
                runtime.block_on(end).ok();
            })?;
        }
        Ok(Self { runtimes, ended, _until_dropped: until_dropped })
    }

    /// The workers' runtimes, by index.
    pub fn runtimes(&self) -> &[Handle] {
        &self.runtimes
    }

    /// Serves the listener's connections, each on one worker.
    pub fn serve(&self, listener: TcpListener, service: &Service, limits: Limits) -> io::Result<Port> {
        let address = listener.local_addr()?;
        let (mut port, mut workers) = (Port::default(), Vec::new());
        for runtime in &self.runtimes {
            let (queue, accepted) = mpsc::channel(BACKLOG_MAX);
            let server =
                Server { service: copy(service), address, limits, accepted, stop: port.stop.clone() };
            port.servers.spawn_on(server.run(), runtime);
            workers.push(Backlog { queue, connections: Arc::default() });
        }
        port.accepting.spawn(distribute(listener, workers, port.stop.clone()));
        Ok(port)
    }

    /// Returns when a worker has ended, which only a fault can cause.
    pub async fn ended(&mut self) -> usize {
        match self.ended.recv().await {
            Some(number) => number,
            // The only worker is the first, on which this runs.
            None => std::future::pending().await,
        }
    }
}

/// Salvo's service is not `Clone`, but its parts are shared.
fn copy(service: &Service) -> Service {
    let mut copy = Service::new(Arc::clone(&service.router));
    copy.catcher.clone_from(&service.catcher);
    copy.hoops.clone_from(&service.hoops);
    copy.allowed_media_types = Arc::clone(&service.allowed_media_types);
    copy
}

/// Reports the end of its thread, also after a panic.
struct EndReporter(mpsc::Sender<usize>, usize);

impl Drop for EndReporter {
    fn drop(&mut self) {
        // Never full: it has room for every worker.
        self.0.try_send(self.1).ok();
    }
}

/// A port that the workers serve.
#[derive(Default)]
pub struct Port {
    accepting: JoinSet<()>,
    servers: JoinSet<()>,
    stop: CancellationToken,
}

impl Port {
    /// Accepts no more connections than the kernel has taken already, and no more requests on the open ones, except the
    /// first of a connection and one that has begun to arrive.
    pub fn stop_graceful(&self) {
        self.stop.cancel();
    }

    /// Closes all connections.
    pub fn stop_forceful(&mut self) {
        self.accepting.abort_all();
        self.servers.abort_all();
    }

    /// Returns when all connections are closed, after a stop.
    pub async fn closed(&mut self) {
        while self.accepting.join_next().await.is_some() {}
        while self.servers.join_next().await.is_some() {}
    }

    /// Returns when the port is no longer served, with the reason.
    pub async fn ended(&mut self) -> String {
        tokio::select! {
            Some(ended) = self.accepting.join_next() => format!("{ended:?}"),
            Some(ended) = self.servers.join_next() => format!("{ended:?}"),
        }
    }
}

impl std::fmt::Debug for Port {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Port").field("workers", &self.servers.len()).finish_non_exhaustive()
    }
}

/// The connections that wait for a worker, and the number of all that it has.
struct Backlog {
    queue: mpsc::Sender<AcceptedSocket>,
    connections: Arc<AtomicUsize>,
}

/// A connection that was accepted and is not yet served.
struct AcceptedSocket {
    /// Not registered with a runtime yet: the worker's registers it.
    socket: net::TcpStream,
    remote: net::SocketAddr,
    counted: CountedConnection,
}

/// Gives each new connection to the worker with the fewest. On `stop` those, too, that the kernel has taken, because their
/// clients believe that they are connected.
async fn distribute(listener: TcpListener, workers: Vec<Backlog>, stop: CancellationToken) {
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = stop.cancelled() => break,
        };
        match accepted.and_then(|(stream, remote)| Ok((stream.into_std()?, remote))) {
            Ok((socket, remote)) => hand_over(&workers, socket, remote),
            Err(error) => {
                tracing::warn!(%error, "a connection could not be accepted");
                tokio::time::sleep(ACCEPT_RETRY).await;
            }
        }
    }
    // Not tokio's listener: it may not know yet what the kernel has.
    let Ok(listener) = listener.into_std() else { return };
    for _ in 0..KERNEL_BACKLOG_MAX {
        match listener.accept() {
            Ok((socket, remote)) if socket.set_nonblocking(true).is_ok() => {
                hand_over(&workers, socket, remote);
            }
            // The client has closed it.
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
            Err(error) => return tracing::warn!(%error, "connections that wait could not be accepted"),
        }
    }
}

fn hand_over(workers: &[Backlog], socket: net::TcpStream, remote: net::SocketAddr) {
    // A response in two segments must not wait until the client has acknowledged the first. This fails only if the client
    // has closed the connection.
    socket.set_nodelay(true).ok();
    let worker = workers.iter().min_by_key(|worker| worker.connections.load(Ordering::Relaxed));
    let Some(Backlog { queue, connections }) = worker else { return };
    let accepted = AcceptedSocket { socket, remote, counted: CountedConnection::new(connections) };
    if queue.try_send(accepted).is_err() {
        tracing::warn!("a connection was closed: its worker has a full backlog");
    }
}

/// Counts for its worker until the connection, which owns it, is closed.
struct CountedConnection(Arc<AtomicUsize>);

impl CountedConnection {
    fn new(connections: &Arc<AtomicUsize>) -> Self {
        connections.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(connections))
    }
}

impl Drop for CountedConnection {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Serves one worker's connections of one port.
struct Server {
    service: Service,
    address: net::SocketAddr,
    limits: Limits,
    accepted: mpsc::Receiver<AcceptedSocket>,
    stop: CancellationToken,
}

impl Server {
    /// Returns when the port accepts no more connections and all are closed.
    async fn run(mut self) {
        let protocols = Arc::new(Protocols::new(self.limits));
        let mut connections = JoinSet::new();
        loop {
            tokio::select! {
                accepted = self.accepted.recv() => match accepted {
                    Some(accepted) => self.serve(&protocols, accepted, &mut connections),
                    None => break,
                },
                Some(ended) = connections.join_next() => log_panic(ended),
            }
        }
        while let Some(ended) = connections.join_next().await {
            log_panic(ended);
        }
    }

    fn serve(&self, protocols: &Arc<Protocols>, accepted: AcceptedSocket, connections: &mut JoinSet<()>) {
        let AcceptedSocket { socket, remote, counted } = accepted;
        let stream = match TcpStream::from_std(socket) {
            Ok(stream) => stream,
            Err(error) => return tracing::warn!(%error, "a connection could not be served"),
        };
        // Salvo's documentation hides this: it is how its own server makes a service for hyper.
        let service = self.service.hyper_handler(
            SocketAddr::from(self.address),
            SocketAddr::from(remote),
            Scheme::HTTP,
            None,
            ConnCtrl::new(),
            None,
        );
        let (protocols, stop) = (Arc::clone(protocols), self.stop.clone());
        connections.spawn(async move {
            protocols.serve(stream, service, stop).await;
            drop(counted);
        });
    }
}

/// A panic of a handler is caught by the middleware. One beyond it ends its connection only.
fn log_panic(ended: Result<(), tokio::task::JoinError>) {
    if let Err(error) = ended {
        tracing::error!(%error, "a connection's task failed");
    }
}

#[cfg(test)]
mod tests {
    use salvo::{Router, handler};
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    #[handler]
    async fn which() -> String {
        current().to_string()
    }

    const PATIENT: Limits = Limits {
        keep_alive: Duration::from_secs(60),
        head: Duration::from_secs(60),
        ping: Duration::from_secs(60),
    };

    /// Three workers, each of which answers with its index.
    async fn served() -> (Workers, Port, net::SocketAddr) {
        served_within(PATIENT).await
    }

    async fn served_within(limits: Limits) -> (Workers, Port, net::SocketAddr) {
        let workers = Workers::start(3).expect("threads");
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address");
        let service = Service::new(Router::new().get(which));
        let port = workers.serve(listener, &service, limits).expect("serves");
        (workers, port, address)
    }

    /// Connects, and returns the connection and the worker that answers on it.
    async fn connect(address: net::SocketAddr) -> (TcpStream, usize) {
        let mut stream = TcpStream::connect(address).await.expect("connects");
        let index = ask(&mut stream).await;
        (stream, index)
    }

    async fn ask(stream: &mut TcpStream) -> usize {
        stream.write_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n").await.expect("asks");
        let mut answer = Vec::new();
        while !answer.windows(4).any(|end| end == b"\r\n\r\n")
            || !answer.last().is_some_and(u8::is_ascii_digit)
        {
            assert_ne!(stream.read_buf(&mut answer).await.expect("reads"), 0, "closed");
        }
        usize::from(answer[answer.len() - 1] - b'0')
    }

    #[tokio::test]
    async fn a_connection_stays_with_the_worker_that_had_the_fewest() {
        let (_workers, _port, address) = served().await;
        let mut connections = Vec::new();
        for _ in 0..6 {
            connections.push(connect(address).await);
        }
        let of = |connections: &[(TcpStream, usize)], worker| {
            connections.iter().filter(|(_, index)| *index == worker).count()
        };
        assert_eq!([0, 1, 2].map(|worker| of(&connections, worker)), [2, 2, 2]);
        for (stream, index) in &mut connections {
            assert_eq!(ask(stream).await, *index);
        }
        // Two connections of one worker close; the next two go to it.
        connections.retain(|(_, index)| *index != 1);
        tokio::time::sleep(Duration::from_millis(200)).await;
        for _ in 0..2 {
            connections.push(connect(address).await);
        }
        assert_eq!(of(&connections, 1), 2);
    }

    /// Waits until the service closes the connection, and returns how long that took.
    async fn until_closed(mut stream: TcpStream) -> Duration {
        let started = std::time::Instant::now();
        let mut rest = Vec::new();
        let closed = tokio::time::timeout(Duration::from_secs(20), stream.read_to_end(&mut rest));
        closed.await.expect("closed").expect("no reset");
        started.elapsed()
    }

    /// An idle connection is kept longer than a silent or slow client.
    const SHORT: Limits = Limits {
        keep_alive: Duration::from_secs(3),
        head: Duration::from_secs(1),
        ping: Duration::from_millis(500),
    };

    #[tokio::test]
    async fn an_idle_connection_is_kept_for_longer_than_a_head_may_take_and_not_for_ever() {
        let (_workers, _port, address) = served_within(SHORT).await;
        let (mut stream, index) = connect(address).await;
        tokio::time::sleep(Duration::from_secs(2)).await;
        assert_eq!(ask(&mut stream).await, index);
        let taken = until_closed(stream).await;
        assert!((2..6).contains(&taken.as_secs()), "closed after {taken:?}");
    }

    #[tokio::test]
    async fn a_head_that_never_ends_is_cut_wherever_it_begins() {
        let (_workers, _port, address) = served_within(SHORT).await;
        let silent = TcpStream::connect(address).await.expect("connects");
        let mut first = TcpStream::connect(address).await.expect("connects");
        first.write_all(b"GET / HT").await.expect("writes");
        let (mut second, _) = connect(address).await;
        second.write_all(b"GET / HTTP/1.1\r\nhost").await.expect("writes");
        let preface = &b"PRI * HTTP/2.0\r\n\r\nS"[..];
        let mut http2 = TcpStream::connect(address).await.expect("connects");
        http2.write_all(preface).await.expect("writes");
        let taken = futures_util::join!(
            until_closed(silent),
            until_closed(first),
            until_closed(second),
            until_closed(http2)
        );
        for taken in [taken.0, taken.1, taken.2, taken.3] {
            assert!((800..2500).contains(&taken.as_millis()), "closed after {taken:?}");
        }
    }

    #[tokio::test]
    async fn an_http2_peer_that_answers_no_pings_is_noticed() {
        let limits = Limits { ping: SHORT.ping, ..PATIENT };
        let (_workers, _port, address) = served_within(limits).await;
        let mut stream = TcpStream::connect(address).await.expect("connects");
        let empty_settings = [0, 0, 0, 4, 0, 0, 0, 0, 0];
        stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await.expect("writes");
        stream.write_all(&empty_settings).await.expect("writes");
        let taken = until_closed(stream).await;
        assert!((800..5000).contains(&taken.as_millis()), "closed after {taken:?}");
    }

    #[tokio::test]
    async fn connections_that_have_just_come_are_served_once_more_when_the_port_stops() {
        let (_workers, mut port, address) = served().await;
        let (mut used, _) = connect(address).await;
        let mut streams = Vec::new();
        // The blocking way, so that no other task runs meanwhile: they are in the kernel's queue.
        for number in 0..60 {
            let stream = net::TcpStream::connect(address).expect("connects");
            stream.set_nonblocking(true).expect("a socket");
            let mut stream = TcpStream::from_std(stream).expect("a socket");
            match number % 3 {
                0 => stream.write_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n").await.expect("asks"),
                1 => stream.write_all(b"GET / HT").await.expect("asks"),
                _ => {}
            }
            streams.push(stream);
        }
        used.write_all(b"GET / HT").await.expect("asks");
        streams.push(used);
        port.stop_graceful();
        tokio::time::sleep(Duration::from_millis(50)).await;
        for (number, mut stream) in streams.into_iter().enumerate() {
            match if number == 60 { 1 } else { number % 3 } {
                0 => {}
                1 => stream.write_all(b"TP/1.1\r\nhost: x\r\n\r\n").await.expect("asks"),
                _ => stream.write_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n").await.expect("asks"),
            }
            let mut answer = String::new();
            stream.read_to_string(&mut answer).await.unwrap_or_else(|error| panic!("{number}: {error}"));
            assert!(answer.starts_with("HTTP/1.1 200"), "{number}: {answer:?}");
        }
        let closed = tokio::time::timeout(Duration::from_secs(2), port.closed());
        assert!(closed.await.is_ok(), "all connections are closed");
    }

    #[tokio::test]
    async fn a_stopping_port_closes_idle_connections_and_refuses_new_ones() {
        let (_workers, mut port, address) = served().await;
        let (mut stream, _) = connect(address).await;
        port.stop_graceful();
        let closed = tokio::time::timeout(Duration::from_secs(2), port.closed());
        assert!(closed.await.is_ok(), "the connection is idle");
        assert_eq!(stream.read(&mut [0; 8]).await.ok(), Some(0));
        assert!(TcpStream::connect(address).await.is_err());
    }
}
