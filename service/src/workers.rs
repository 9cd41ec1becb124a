//! A thread per core, each with a runtime of its own, and connections that stay where they began.
//!
//! A request is little work with two or three waits in it: for its bytes, for Redis, for the writer. A runtime that
//! moves tasks between its threads pays at each of them, for waking another thread and for the queues that they share.
//! On a runtime of one thread all requests that can go on do so one after the other, and then what they asked of Redis
//! leaves in one write, on a connection that belongs to the thread.
//!
//! The price is balance: a connection does not move. A new one goes to the worker with the fewest, so that the clients
//! of one service, which are many and much alike, spread by themselves. What comes over one connection, as HTTP/2 can
//! carry the requests of many, is served by one core.

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

/// A read costs a worker some five times what it costs Redis, which is one thread: more workers than these would only
/// wait for it. On a machine of many cores it is replicas that go further.
const WORKERS_MAX: usize = 8;

/// Connections that wait for one worker. One that is so far behind gets no more of them.
const ARRIVALS_MAX: usize = 1024;

/// After a connection could not be accepted, mostly for want of file descriptors.
const ACCEPT_RETRY: Duration = Duration::from_millis(10);

thread_local! {
    static HERE: Cell<usize> = const { Cell::new(0) };
}

/// The index of the worker on whose thread this is called; any other thread counts as the first.
pub fn here() -> usize {
    HERE.get()
}

/// A worker per core, of those that this process may use: a container's limit of processor time counts as well.
pub fn suitable() -> usize {
    thread::available_parallelism().map_or(1, usize::from).min(WORKERS_MAX)
}

/// The threads that serve. The first is the runtime that started them; the others end with this value.
#[derive(Debug)]
pub struct Workers {
    runtimes: Vec<Handle>,
    ended: mpsc::UnboundedReceiver<usize>,
    _until_dropped: Vec<oneshot::Sender<Infallible>>,
}

impl Workers {
    /// The calling runtime is the first of `count`.
    pub fn start(count: usize) -> io::Result<Self> {
        let (farewell, ended) = mpsc::unbounded_channel();
        let (mut runtimes, mut until_dropped) = (vec![Handle::current()], Vec::new());
        for number in 1..count {
            let (kept, end) = oneshot::channel::<Infallible>();
            let farewell = Farewell(farewell.clone(), number);
            let runtime = Builder::new_current_thread().enable_all().build()?;
            runtimes.push(runtime.handle().clone());
            until_dropped.push(kept);
            thread::Builder::new().name(format!("worker-{number}")).spawn(move || {
                let _farewell = farewell;
                HERE.set(number);
                // Ends when `kept` is dropped: there is nothing that could be sent.
                runtime.block_on(end).ok();
            })?;
        }
        Ok(Self { runtimes, ended, _until_dropped: until_dropped })
    }

    /// The workers' runtimes, by index.
    pub fn runtimes(&self) -> &[Handle] {
        &self.runtimes
    }

    /// Serves what connects to the listener, each connection on one worker.
    pub fn serve(&self, listener: TcpListener, service: &Service) -> io::Result<Serving> {
        let address = SocketAddr::from(listener.local_addr()?);
        let (mut serving, mut queues) = (Serving::default(), Vec::new());
        for runtime in &self.runtimes {
            let (queue, arrivals) = mpsc::channel(ARRIVALS_MAX);
            let server = Server::new(Share::new(arrivals, address.clone()));
            serving.handles.push(server.handle());
            serving.servers.spawn_on(server.try_serve(copy(service)), runtime);
            queues.push(Queue { queue, connections: Arc::default() });
        }
        serving.accepting.spawn(spread(listener, queues));
        Ok(serving)
    }

    /// Returns when a worker has ended, which only a fault can bring about.
    pub async fn ended(&mut self) -> usize {
        match self.ended.recv().await {
            Some(number) => number,
            // There is only the first, on which this runs.
            None => std::future::pending().await,
        }
    }
}

/// Salvo's service cannot be cloned, but all that is in it is shared.
fn copy(service: &Service) -> Service {
    let mut copy = Service::new(Arc::clone(&service.router));
    copy.catcher.clone_from(&service.catcher);
    copy.hoops.clone_from(&service.hoops);
    copy.allowed_media_types = Arc::clone(&service.allowed_media_types);
    copy
}

/// Tells of a thread's end, whatever brought it about.
struct Farewell(mpsc::UnboundedSender<usize>, usize);

impl Drop for Farewell {
    fn drop(&mut self) {
        self.0.send(self.1).ok();
    }
}

/// A port that is served.
#[derive(Default)]
pub struct Serving {
    accepting: JoinSet<()>,
    servers: JoinSet<io::Result<()>>,
    handles: Vec<ServerHandle>,
}

impl Serving {
    /// Takes no more connections, and of those that there are no more requests. What has not ended after `limit` is cut.
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

impl std::fmt::Debug for Serving {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Serving").field("workers", &self.servers.len()).finish_non_exhaustive()
    }
}

/// The way to a worker.
struct Queue {
    queue: mpsc::Sender<Arrival>,
    connections: Arc<AtomicUsize>,
}

/// A connection that was accepted and is not yet served.
struct Arrival {
    /// Without a runtime, so that the worker's can take it.
    socket: net::TcpStream,
    remote: net::SocketAddr,
    place: Place,
}

/// Gives each new connection to the worker with the fewest.
async fn spread(listener: TcpListener, workers: Vec<Queue>) {
    loop {
        let arrived = listener.accept().await.and_then(|(stream, remote)| {
            // An answer in two segments must not wait until the client has acknowledged the first. A socket that refuses
            // is one that its client has closed, which is no reason to pause.
            stream.set_nodelay(true).ok();
            Ok((stream.into_std()?, remote))
        });
        let (socket, remote) = match arrived {
            Ok(arrived) => arrived,
            Err(error) => {
                tracing::warn!(%error, "a connection could not be accepted");
                tokio::time::sleep(ACCEPT_RETRY).await;
                continue;
            }
        };
        let worker = workers.iter().min_by_key(|worker| worker.connections.load(Ordering::Relaxed));
        let Some(Queue { queue, connections }) = worker else { return };
        let arrival = Arrival { socket, remote, place: Place::taken(connections) };
        if queue.try_send(arrival).is_err() {
            tracing::warn!("a connection was refused: its worker is too far behind");
        }
    }
}

/// Counts for its worker as long as the connection lasts, which has it as an observer.
struct Place(Arc<AtomicUsize>);

impl Place {
    fn taken(connections: &Arc<AtomicUsize>) -> Self {
        connections.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(connections))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl ConnObserver for Place {}

/// A worker's share of the connections, as salvo takes them.
struct Share {
    arrivals: mpsc::Receiver<Arrival>,
    holding: Holding,
}

impl Share {
    fn new(arrivals: mpsc::Receiver<Arrival>, local_addr: SocketAddr) -> Self {
        let http_versions = vec![Version::HTTP_11, Version::HTTP_2];
        Self { arrivals, holding: Holding { local_addr, http_versions, http_scheme: Scheme::HTTP } }
    }
}

impl Acceptor for Share {
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
            let Some(Arrival { socket, remote, place }) = self.arrivals.recv().await else {
                // Nothing is accepted any more, and the server is about to be told.
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
                stream: StraightStream::new(stream, fuse_config, conn_ctrl.clone(), Some(Arc::new(place))),
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
        here().to_string()
    }

    /// Three workers, each of which tells its index.
    async fn served() -> (Workers, Serving, net::SocketAddr) {
        let workers = Workers::start(3).expect("threads");
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address");
        let service = Service::new(Router::new().get(which));
        let serving = workers.serve(listener, &service).expect("serves");
        (workers, serving, address)
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
        let (_workers, _serving, address) = served().await;
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
        // The next two go where two have left, once that was noticed.
        connections.retain(|(_, index)| *index != 1);
        tokio::time::sleep(Duration::from_millis(200)).await;
        for _ in 0..2 {
            connections.push(connect(address).await);
        }
        assert_eq!(of(&connections, 1), 2);
    }

    #[tokio::test]
    async fn a_port_that_stops_closes_what_is_idle_and_refuses_what_is_new() {
        let (_workers, mut serving, address) = served().await;
        let (mut stream, _) = connect(address).await;
        serving.stop_graceful(Duration::from_secs(5));
        let closed = tokio::time::timeout(Duration::from_secs(2), serving.closed());
        assert!(closed.await.is_ok(), "the connection is idle");
        assert_eq!(stream.read(&mut [0; 8]).await.ok(), Some(0));
        assert!(TcpStream::connect(address).await.is_err());
    }
}
