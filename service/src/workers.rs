//! One single-threaded Tokio runtime per core. A connection stays with the worker that accepted it.
//!
//! A request is little work with two or three waits: for its bytes, for Redis, for the writer. A runtime that moves tasks
//! between threads pays at each of these waits, for waking another thread and for the queues that the threads share. A
//! single-threaded runtime runs all requests that can go on one after the other, and then sends their Redis commands in
//! one write, on the worker's own connection.
//!
//! The price is balance: a connection never moves. A new one goes to the worker with the fewest, so that the many similar
//! clients of a service spread evenly. All requests of one HTTP/2 connection are served by one core.

use std::cell::Cell;
use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use std::{io, net, thread};

use salvo::conn::tcp::TcpCoupler;
use salvo::conn::{Accepted, Acceptor, ConnCtrl, Holding, SocketAddr, StraightStream};
use salvo::fuse::{ArcFusePolicy, ConnObserver, FuseAction, FuseInfo, TransProto};
use salvo::http::Version;
use salvo::http::uri::Scheme;
use salvo::server::ServerHandle;
use salvo::{Server, Service};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::{Builder, Handle};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;

/// A read costs a worker some five times what it costs Redis, which has one thread: more workers would only wait for it.
/// On a machine with more cores, run more replicas.
const WORKERS_MAX: usize = 8;

/// Accepted connections that wait for one worker. Above that the worker gets no more.
const BACKLOG_MAX: usize = 1024;

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
    pub fn serve(&self, listener: TcpListener, service: &Service) -> io::Result<Port> {
        let address = SocketAddr::from(listener.local_addr()?);
        let (mut port, mut workers) = (Port::default(), Vec::new());
        for runtime in &self.runtimes {
            let (queue, accepted) = mpsc::channel(BACKLOG_MAX);
            let server = Server::new(WorkerAcceptor::new(accepted, address.clone()));
            port.handles.push(server.handle());
            port.servers.spawn_on(server.try_serve(copy(service)), runtime);
            workers.push(Backlog { queue, connections: Arc::default() });
        }
        port.accepting.spawn(distribute(listener, workers));
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
    servers: JoinSet<io::Result<()>>,
    handles: Vec<ServerHandle>,
}

impl Port {
    /// Accepts no more connections, and no more requests on the open ones. Closes what is left after `limit`.
    pub fn stop_graceful(&mut self, limit: Duration) {
        self.accepting.abort_all();
        self.handles.iter().for_each(|handle| handle.stop_graceful(limit));
    }

    pub fn stop_forceful(&self) {
        self.handles.iter().for_each(ServerHandle::stop_forceful);
    }

    /// Returns when all connections are closed, after a stop.
    pub async fn closed(&mut self) {
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

/// Gives each new connection to the worker with the fewest.
async fn distribute(listener: TcpListener, workers: Vec<Backlog>) {
    loop {
        let accepted = listener.accept().await.and_then(|(stream, remote)| {
            // A response in two segments must not wait until the client has acknowledged the first. This fails only if the
            // client has closed the connection, which is no reason to pause.
            stream.set_nodelay(true).ok();
            Ok((stream.into_std()?, remote))
        });
        let (socket, remote) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "a connection could not be accepted");
                tokio::time::sleep(ACCEPT_RETRY).await;
                continue;
            }
        };
        let worker = workers.iter().min_by_key(|worker| worker.connections.load(Ordering::Relaxed));
        let Some(Backlog { queue, connections }) = worker else { return };
        let accepted = AcceptedSocket { socket, remote, counted: CountedConnection::new(connections) };
        if queue.try_send(accepted).is_err() {
            tracing::warn!("a connection was closed: its worker has a full backlog");
        }
    }
}

/// Counts for its worker until the connection, which owns it as an observer, is closed.
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

impl ConnObserver for CountedConnection {}

/// Hands a worker's connections to salvo.
struct WorkerAcceptor {
    accepted: mpsc::Receiver<AcceptedSocket>,
    holding: Holding,
}

impl WorkerAcceptor {
    fn new(accepted: mpsc::Receiver<AcceptedSocket>, local_addr: SocketAddr) -> Self {
        let http_versions = vec![Version::HTTP_11, Version::HTTP_2];
        Self { accepted, holding: Holding { local_addr, http_versions, http_scheme: Scheme::HTTP } }
    }
}

impl Acceptor for WorkerAcceptor {
    type Coupler = TcpCoupler<Self::Stream>;
    type Stream = StraightStream<TcpStream>;

    fn holdings(&self) -> &[Holding] {
        std::slice::from_ref(&self.holding)
    }

    async fn accept(
        &mut self,
        policy: Option<ArcFusePolicy>,
    ) -> io::Result<Accepted<Self::Coupler, Self::Stream>> {
        loop {
            let Some(AcceptedSocket { socket, remote, counted }) = self.accepted.recv().await else {
                // The port accepts no more connections, and the server is about to be stopped.
                return std::future::pending().await;
            };
            let stream = TcpStream::from_std(socket)?;
            let (remote_addr, local_addr) = (remote.into(), self.holding.local_addr.clone());
            let info = FuseInfo { trans_proto: TransProto::Tcp, remote_addr, local_addr };
            let fuse_config = match &policy {
                None => None,
                Some(policy) => match policy.decide(&info).await {
                    FuseAction::Accept(config) => Some(config),
                    FuseAction::Reject => continue,
                },
            };
            let conn_ctrl = ConnCtrl::new();
            return Ok(Accepted {
                coupler: TcpCoupler::new(),
                stream: StraightStream::new(stream, fuse_config, conn_ctrl.clone(), Some(Arc::new(counted))),
                fuse_config,
                conn_ctrl,
                local_addr: info.local_addr,
                remote_addr: info.remote_addr,
                http_scheme: Scheme::HTTP,
            });
        }
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

    /// Three workers, each of which answers with its index.
    async fn served() -> (Workers, Port, net::SocketAddr) {
        let workers = Workers::start(3).expect("threads");
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address");
        let service = Service::new(Router::new().get(which));
        let port = workers.serve(listener, &service).expect("serves");
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

    #[tokio::test]
    async fn a_stopping_port_closes_idle_connections_and_refuses_new_ones() {
        let (_workers, mut port, address) = served().await;
        let (mut stream, _) = connect(address).await;
        port.stop_graceful(Duration::from_secs(5));
        let closed = tokio::time::timeout(Duration::from_secs(2), port.closed());
        assert!(closed.await.is_ok(), "the connection is idle");
        assert_eq!(stream.read(&mut [0; 8]).await.ok(), Some(0));
        assert!(TcpStream::connect(address).await.is_err());
    }
}
