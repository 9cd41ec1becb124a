//! `chat-service serve`: two listeners and a graceful shutdown.
//!
//! On the first signal the process becomes unready and goes on serving for a moment, until load balancers have noticed.
//! Then it accepts no more requests, finishes those in flight, commits queued messages, and exits. A second signal ends
//! it at once.

use std::io;
use std::net::SocketAddr;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::net::TcpListener;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::app::{App, Tasks};
use crate::config::{Config, EXIT_CONFIG};
use crate::http::routes::{self, public_api};
use crate::store::migrations::{self, MigrationError};
use crate::telemetry::causes::causes;
use crate::workers::{self, Limits, Port, Workers};

/// How long an unready process still accepts requests: a probe's period. Of a grace shorter than ten times this it takes a
/// tenth, and leaves the rest to the requests in flight.
const LAME_DUCK: Duration = Duration::from_secs(1);

/// How long the start waits for the first answers of Postgres and Redis, so that a healthy process is ready as soon as it
/// listens. It does not wait longer for a server that is unavailable, or for a long migration.
const FIRST_ANSWER: Duration = Duration::from_secs(2);
const FIRST_ANSWER_REDIS: Duration = Duration::from_millis(250);

/// Requests in flight are counted this often while the process stops.
const DRAIN_POLL: Duration = Duration::from_millis(10);

/// How long the last responses may take to reach the socket, and connections to close.
const LAST_BYTES: Duration = Duration::from_millis(250);

/// How much longer than its streams a process may take to stop.
const STREAMS_MARGIN: Duration = Duration::from_secs(1);

/// How long a client may take for a request's head, or to begin with one.
const HEAD_LIMIT: Duration = Duration::from_secs(30);

/// An HTTP/2 client is asked this often whether it is still there, and may take as long to answer.
const HTTP2_PING: Duration = Duration::from_secs(20);

/// Between two attempts to migrate a database that is unavailable.
const MIGRATE_RETRY: Duration = Duration::from_secs(1);

/// A running service; `main` waits for it, tests hold it.
#[derive(Debug)]
pub struct Running {
    pub app: Arc<App>,
    pub public: SocketAddr,
    pub operations: SocketAddr,
    tasks: Tasks,
    workers: Workers,
    public_port: Port,
    operations_port: Port,
    stop: watch::Sender<bool>,
    migration: JoinSet<MigrationError>,
}

/// Why a service ended.
#[derive(Debug)]
enum End {
    Signal,
    Fault(String),
}

/// Runs until a signal, or until something that it cannot run without has failed.
pub async fn run(config: Config) -> anyhow::Result<ExitCode> {
    // Before anything else, so that no signal is missed.
    let mut signals = Signals::new()?;
    raise_file_limit();
    let running = match start(config).await {
        Ok(running) => running,
        Err(error) => {
            tracing::error!("{}", causes(&*error));
            return Ok(ExitCode::from(if error.is::<AddressInUse>() { EXIT_CONFIG } else { 1 }));
        }
    };
    running.run(&mut signals).await
}

/// Each connection is an open file. The limit that a process begins with is often 1,024, and it may raise it itself.
fn raise_file_limit() {
    let limit = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }) {
        tracing::debug!(%error, "the limit of open files stays as it is");
    }
}

/// A port that cannot be listened on.
#[derive(thiserror::Error, Debug)]
#[error(
    "{variable}: cannot listen on {address}: {source}; for example choose a free port with {variable}=8080"
)]
pub struct AddressInUse {
    variable: &'static str,
    address: SocketAddr,
    source: io::Error,
}

/// Binds both ports and starts serving.
pub async fn start(config: Config) -> anyhow::Result<Running> {
    let public = bind("PORT", SocketAddr::new(config.host, config.port)).await?;
    let operations = bind("OPS_PORT", SocketAddr::new(config.host, config.ops_port)).await?;
    if config.secret_key_is_weak() {
        tracing::warn!("SECRET_KEY is the default or short: anyone can sign tokens; production refuses it");
    }
    let (stop, stopping) = watch::channel(false);
    let workers = Workers::start(workers::default_count())?;
    let limits = Limits { keep_alive: config.keep_alive(), head: HEAD_LIMIT, ping: HTTP2_PING };
    let api = public_api();
    let (app, mut tasks) = App::start(config, api.endpoints(), &workers, &stopping)?;
    let migration = first_answers(&app).await?;
    app.watch_postgres(&mut tasks);

    let (public_address, operations_address) = (public.local_addr()?, operations.local_addr()?);
    let public_port = workers.serve(public, &api.service(&app), limits)?;
    let operations_port = workers.serve(operations, &routes::operations(&app), limits)?;
    tracing::info!(public = %public_address, operations = %operations_address, version = env!("CARGO_PKG_VERSION"), "listening");
    Ok(Running {
        app,
        public: public_address,
        operations: operations_address,
        tasks,
        workers,
        public_port,
        operations_port,
        stop,
        migration,
    })
}

impl Running {
    async fn run(mut self, signals: &mut Signals) -> anyhow::Result<ExitCode> {
        let end = tokio::select! {
            () = signals.next() => End::Signal,
            fault = self.fault() => End::Fault(fault),
        };
        let grace = self.app.config.shutdown_grace();
        let code = match &end {
            End::Signal => {
                tracing::info!(grace_seconds = grace.as_secs(), "stopping: no longer ready");
                ExitCode::SUCCESS
            }
            End::Fault(fault) => {
                tracing::error!("stopping: {fault}");
                ExitCode::FAILURE
            }
        };
        tokio::select! {
            () = self.stop(matches!(end, End::Signal)) => {
                tracing::info!("stopped");
                Ok(code)
            }
            () = signals.next() => {
                tracing::warn!("a second signal: ending at once");
                Ok(ExitCode::FAILURE)
            }
        }
    }

    /// Shuts down gracefully within the grace, or the time that the streams have. Requests that are unfinished by then were not
    /// acknowledged.
    pub async fn stop(mut self, lame_duck: bool) {
        let grace = self.app.config.shutdown_grace();
        let streams = self.app.config.stream_drain();
        let deadline = Instant::now() + grace.max(streams + STREAMS_MARGIN);
        self.app.health.drain();
        self.app.streams.drain(streams);
        if lame_duck {
            tokio::time::sleep(LAME_DUCK.min(grace / 10)).await;
        }
        let drain = async {
            self.public_port.stop_graceful();
            // Not until all connections are closed: one that never sends a request would hold up the shutdown.
            loop {
                while self.is_busy() {
                    tokio::time::sleep(DRAIN_POLL).await;
                }
                let closed = tokio::time::timeout(LAST_BYTES, self.public_port.closed()).await.is_ok();
                if closed || !self.is_busy() {
                    break;
                }
            }
            self.public_port.stop_forceful();
            // The operations port goes on answering until the requests and the writers are done.
            self.stop.send_replace(true);
            while self.tasks.writers.join_next().await.is_some() {}
            self.operations_port.stop_graceful();
            tokio::time::timeout(LAST_BYTES, self.operations_port.closed()).await.ok();
        };
        if tokio::time::timeout_at(deadline, drain).await.is_err() {
            tracing::warn!("the grace is over: ending with requests in flight");
        }
        self.tasks.supervisors.shutdown().await;
        tokio::time::timeout(Duration::from_secs(1), self.app.database.close()).await.ok();
    }

    /// Whether a request is in flight, or a stream is open.
    fn is_busy(&self) -> bool {
        self.app.metrics.active_requests() > 0 || self.app.streams.open_count() > 0
    }

    /// Returns when something has failed from which this process cannot recover.
    async fn fault(&mut self) -> String {
        tokio::select! {
            Some(ended) = self.tasks.writers.join_next() => format!("a writer ended: {ended:?}"),
            Some(ended) = self.tasks.supervisors.join_next() => format!("a supervisor ended: {ended:?}"),
            ended = self.public_port.ended() => format!("the public port is no longer served: {ended}"),
            ended = self.operations_port.ended() => format!("the operations port is no longer served: {ended}"),
            number = self.workers.ended() => format!("worker {number} ended"),
            Some(Ok(error)) = self.migration.join_next() => error.to_string(),
        }
    }
}

async fn bind(variable: &'static str, address: SocketAddr) -> Result<TcpListener, AddressInUse> {
    TcpListener::bind(address).await.map_err(|source| AddressInUse { variable, address, source })
}

/// Migrates, if configured, and waits for the first answers of Postgres and Redis. What takes longer than a healthy start
/// continues in the background, while the process is live and unready. The returned task ends only with a fault that no
/// retry can fix.
async fn first_answers(app: &Arc<App>) -> anyhow::Result<JoinSet<MigrationError>> {
    let mut migration = JoinSet::new();
    let (first, first_outcome) = oneshot::channel();
    if app.config.migrate_on_start {
        migration.spawn(migrate(Arc::clone(app), first));
    } else {
        first.send(()).ok();
    }
    let postgres = async {
        first_outcome.await.ok();
        app.health.ask(&app.database).await;
    };
    let redis = async {
        while app.redis.live().is_none() && !*app.redis.watch_unavailable().borrow() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    let first_answers = async { tokio::join!(postgres, tokio::time::timeout(FIRST_ANSWER_REDIS, redis)) };
    tokio::time::timeout(FIRST_ANSWER, first_answers).await.ok();
    // Better fail before the ports are open.
    match migration.try_join_next() {
        Some(ended) => Err(ended?.into()),
        None => Ok(migration),
    }
}

/// Migrates, with a retry while Postgres is unavailable or only reads. Returns only with a fault; drops `first` after the
/// first attempt.
async fn migrate(app: Arc<App>, first: oneshot::Sender<()>) -> MigrationError {
    let mut first = Some(first);
    let mut reported = String::new();
    loop {
        let outcome = migrations::migrate(&app.connect_options).await;
        match outcome {
            Ok(_) => {
                drop(first);
                // The task does not end, because its end means a fault.
                return std::future::pending().await;
            }
            Err(error) if error.is_temporary() => {
                drop(first.take());
                let news = error.to_string();
                // The health task logs that Postgres is unavailable or only reads, and what the role lacks.
                let known = matches!(
                    error,
                    MigrationError::Unreachable(_) | MigrationError::ReadOnly(_) | MigrationError::Lacking(_)
                );
                if !known && news != reported {
                    tracing::warn!("{news}; trying again");
                    reported = news;
                }
                tokio::time::sleep(MIGRATE_RETRY).await;
            }
            Err(error) => return error,
        }
    }
}

/// SIGTERM and SIGINT.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    fn new() -> io::Result<Self> {
        Ok(Self { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}
