//! The connection to Redis: one for each worker, multiplexed, shared by its requests, and watched over.
//!
//! deadpool-redis knows how to reach a single Redis, a cluster or the master that sentinels name. Its pool
//! pings at every checkout, which would cost a round trip per request; so each worker's connection is taken from it
//! for good and cloned, and the requests' commands pipeline by themselves. They stand and fall together: when a
//! command fails all are given up, everybody falls back at once, and a task reconnects.

use std::sync::{Arc, RwLock};
use std::time::Duration;

use deadpool_redis::redis::aio::{ConnectionLike, MultiplexedConnection};
use deadpool_redis::redis::cluster_async::ClusterConnection;
use deadpool_redis::redis::{
    Cmd, ConnectionAddr, ErrorKind, FromRedisValue, IntoConnectionInfo as _, Pipeline, RedisError,
    RedisFuture, Script, Value,
};
use deadpool_redis::{Runtime, cluster, sentinel};
use futures_util::future::try_join_all;
use secrecy::ExposeSecret as _;
use tokio::runtime::Handle;
use tokio::sync::{Notify, watch};
use tokio::time::Instant;

use crate::call::Call;
use crate::config::{Config, RedisMode};
use crate::metrics::Metrics;
use crate::trace::{self, Place};
use crate::workers;

/// How long one round trip may take before Redis counts as away. Far above a healthy one (well under 1 ms),
/// far below what a request may take.
const RESPONSE_TIMEOUT: Duration = Duration::from_millis(500);

/// How long connecting may take, TLS and the sentinels' answer included.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);

/// Between two attempts to reconnect, and between two probes of an idle connection.
const RETRY_INTERVAL: Duration = Duration::from_millis(250);
const PROBE_INTERVAL: Duration = Duration::from_secs(1);

/// Redis did not do what it was asked. The reason has been logged; the caller falls back.
#[derive(thiserror::Error, Debug, Clone, Copy)]
#[error("Redis is away")]
pub struct Away;

pub struct Redis {
    source: Arc<Source>,
    /// Each has a connection, whose work is done there.
    runtimes: Vec<Handle>,
    /// Present while Redis answers.
    live: RwLock<Option<Live>>,
    /// Wakes the task that reconnects.
    lost: Notify,
    /// True while Redis is away, for those who must act on the change.
    away: watch::Sender<bool>,
    /// Loaded at each connect, so that a call can name them by digest.
    scripts: Vec<Script>,
    place: Place,
    metrics: Arc<Metrics>,
}

/// Working connections, one for each worker.
#[derive(Clone)]
pub struct Live {
    connections: Arc<[Connection]>,
    generation: u64,
    /// When they were open: whoever trusts what earlier ones saw must wait; see `recent`.
    pub since: Instant,
}

#[derive(Clone)]
enum Connection {
    One(MultiplexedConnection),
    Cluster(ClusterConnection),
}

impl Live {
    /// True where keys live on several nodes.
    pub fn is_cluster(&self) -> bool {
        self.connections.iter().any(|connection| matches!(connection, Connection::Cluster(_)))
    }

    /// The connection of the worker that calls.
    fn here(&self) -> Connection {
        self.connections[workers::here() % self.connections.len()].clone()
    }
}

enum Source {
    Single(deadpool_redis::Pool),
    Cluster(cluster::Pool),
    Sentinel(sentinel::Pool),
}

impl Redis {
    /// Nothing is connected yet; the runtimes are those of the workers.
    pub fn new(
        config: &Config,
        scripts: Vec<Script>,
        runtimes: Vec<Handle>,
        metrics: Arc<Metrics>,
    ) -> anyhow::Result<Arc<Self>> {
        let source = Arc::new(Source::new(config)?);
        Ok(Arc::new(Self {
            source,
            runtimes,
            live: RwLock::default(),
            lost: Notify::new(),
            away: watch::Sender::new(true),
            scripts,
            place: place(config),
            metrics,
        }))
    }

    /// The connections, or nothing while Redis is away.
    pub fn live(&self) -> Option<Live> {
        self.live.read().unwrap_or_else(|poisoned| poisoned.into_inner()).clone()
    }

    /// Follows whether Redis is away.
    pub fn watch_away(&self) -> watch::Receiver<bool> {
        self.away.subscribe()
    }

    /// Runs the commands in one round trip. Any failure means that Redis is away: a time-out, a broken
    /// connection, but also an answer such as OOM, READONLY or LOADING, after which nothing can be relied on.
    pub async fn run<T: FromRedisValue>(
        &self,
        live: &Live,
        call: Call,
        pipeline: &Pipeline,
    ) -> Result<T, Away> {
        let _timer = self.metrics.call_started(call);
        let span = trace::call(call, &self.place);
        let mut connection = live.here();
        pipeline.query_async(&mut connection).await.map_err(|error| {
            if let Some(span) = span {
                span.call_failed(error.code(), if error.is_timeout() { "timeout" } else { "_OTHER" });
            }
            self.give_up(live, &error);
            Away
        })
    }

    /// Keeps the connections alive until the process ends.
    pub async fn supervise(self: Arc<Self>) {
        let mut generation = 0;
        loop {
            if let Some(live) = self.live() {
                if let Err(error) = self.probe(&live.connections).await {
                    self.give_up(&live, &error);
                }
                tokio::select! {
                    () = tokio::time::sleep(PROBE_INTERVAL) => {}
                    () = self.lost.notified() => {}
                }
                continue;
            }
            generation += 1;
            match self.connect(generation).await {
                Ok(live) => self.change(Some(live), None),
                Err(error) => {
                    // The first failure of all has no state change to be logged at.
                    if generation == 1 {
                        self.warn(&error);
                    }
                    tokio::time::sleep(RETRY_INTERVAL).await;
                }
            }
        }
    }

    /// One attempt, for `doctor`.
    pub async fn check(&self) -> Result<(), String> {
        self.connect(0).await.map(drop).map_err(|error| error.to_string())
    }

    /// Gives the connections up, unless newer ones have taken their place already.
    fn give_up(&self, live: &Live, error: &RedisError) {
        let current = self.live().is_some_and(|current| current.generation == live.generation);
        if current {
            self.change(None, Some(error));
            self.lost.notify_one();
        }
    }

    /// The one place where the state changes, so that each change is told once.
    fn change(&self, live: Option<Live>, error: Option<&RedisError>) {
        let away = live.is_none();
        *self.live.write().unwrap_or_else(|poisoned| poisoned.into_inner()) = live;
        let changed = self.away.send_replace(away) != away;
        match error {
            Some(error) if changed => self.warn(error),
            None if changed => tracing::info!("Redis answers"),
            _ => {}
        }
    }

    fn warn(&self, error: &RedisError) {
        tracing::warn!(%error, "Redis is away: history comes from Postgres, rate limits are counted per replica");
    }

    async fn connect(&self, generation: u64) -> Result<Live, RedisError> {
        let attempt = async {
            let connections =
                try_join_all(self.runtimes.iter().map(|runtime| self.connect_on(runtime))).await?;
            self.probe(&connections).await?;
            // What one connection has loaded, all know.
            let mut first = connections.first().cloned().ok_or_else(|| timed_out("there is no worker"))?;
            for script in &self.scripts {
                script.prepare_invoke().load_async(&mut first).await?;
            }
            Ok(connections.into())
        };
        let connections = tokio::time::timeout(CONNECT_TIMEOUT, attempt)
            .await
            .unwrap_or_else(|_| Err(timed_out("no connection in time")))?;
        Ok(Live { connections, generation, since: Instant::now() })
    }

    /// Opens a connection that the runtime serves.
    async fn connect_on(&self, runtime: &Handle) -> Result<Connection, RedisError> {
        let source = Arc::clone(&self.source);
        let connecting = runtime.spawn(async move { source.connect().await });
        connecting.await.unwrap_or_else(|_| Err(timed_out("the worker is gone")))
    }

    /// A write, because a Redis that only reads (a replica, or one out of memory) is of no use here.
    async fn probe(&self, connections: &[Connection]) -> Result<(), RedisError> {
        let probe = deadpool_redis::redis::cmd("SET").arg("chat:probe").arg(1).arg("PX").arg(1000).to_owned();
        let probes = connections.iter().map(|connection| {
            let (probe, mut connection) = (&probe, connection.clone());
            async move { probe.query_async::<()>(&mut connection).await }
        });
        tokio::time::timeout(RESPONSE_TIMEOUT, try_join_all(probes))
            .await
            .map(|outcome| outcome.map(drop))
            .unwrap_or_else(|_| Err(timed_out("no answer in time")))
    }
}

impl Source {
    fn new(config: &Config) -> anyhow::Result<Self> {
        let urls = urls(config);
        let runtime = Some(Runtime::Tokio1);
        Ok(match config.redis_mode {
            RedisMode::Single => {
                Self::Single(deadpool_redis::Config::from_url(urls.concat()).create_pool(runtime)?)
            }
            RedisMode::Cluster => Self::Cluster(cluster::Config::from_urls(urls).create_pool(runtime)?),
            RedisMode::Sentinel => {
                // The master is asked for with the same credentials and database as the sentinels' URLs name.
                let node = urls.first().map(String::as_str).and_then(|url| url.into_connection_info().ok());
                let node = node.map(|info| sentinel::SentinelNodeConnectionInfo {
                    tls_mode: None,
                    redis_connection_info: Some(info.redis_settings().clone().into()),
                });
                let master = config.redis_sentinel_master.clone();
                let config = sentinel::Config::from_urls(urls, master, sentinel::SentinelServerType::Master);
                Self::Sentinel(config.with_node_connection_info(node).create_pool(runtime)?)
            }
        })
    }

    async fn connect(&self) -> Result<Connection, RedisError> {
        fn reason<E: std::fmt::Display>(error: E) -> RedisError {
            RedisError::from((ErrorKind::Io, "connect", error.to_string()))
        }
        Ok(match self {
            Self::Single(pool) => {
                Connection::One(deadpool_redis::Connection::take(pool.get().await.map_err(reason)?))
            }
            Self::Cluster(pool) => {
                Connection::Cluster(cluster::Connection::take(pool.get().await.map_err(reason)?))
            }
            Self::Sentinel(pool) => {
                Connection::One(sentinel::Connection::take(pool.get().await.map_err(reason)?))
            }
        })
    }
}

impl ConnectionLike for Connection {
    fn req_packed_command<'a>(&'a mut self, cmd: &'a Cmd) -> RedisFuture<'a, Value> {
        match self {
            Self::One(connection) => connection.req_packed_command(cmd),
            Self::Cluster(connection) => connection.req_packed_command(cmd),
        }
    }

    fn req_packed_commands<'a>(
        &'a mut self,
        pipeline: &'a Pipeline,
        offset: usize,
        count: usize,
    ) -> RedisFuture<'a, Vec<Value>> {
        match self {
            Self::One(connection) => connection.req_packed_commands(pipeline, offset, count),
            // A cluster's keys live on several nodes, so each command goes its own way, all at once.
            Self::Cluster(connection) => Box::pin(each_on_its_node(connection.clone(), pipeline)),
        }
    }

    fn get_db(&self) -> i64 {
        0
    }
}

async fn each_on_its_node(
    connection: ClusterConnection,
    pipeline: &Pipeline,
) -> Result<Vec<Value>, RedisError> {
    let mut answers = Vec::with_capacity(pipeline.len());
    let commands: Vec<_> = pipeline
        .cmd_iter()
        .map(|command| {
            let (mut connection, command) = (connection.clone(), command.clone());
            let answer = async move { connection.req_packed_command(&command).await };
            tokio::spawn(tokio::time::timeout(RESPONSE_TIMEOUT, answer))
        })
        .collect();
    for command in commands {
        let answer = command.await.map_err(|_| timed_out("the command was cancelled"))?;
        answers.push(answer.map_err(|_| timed_out("no answer in time"))??);
    }
    Ok(answers)
}

/// The URLs of `REDIS_URL`; a single Redis may have commas in its password.
fn urls(config: &Config) -> Vec<String> {
    let text = config.redis_url.expose_secret();
    match config.redis_mode {
        RedisMode::Single => vec![text.to_owned()],
        RedisMode::Cluster | RedisMode::Sentinel => {
            text.split(',').map(|url| url.trim().to_owned()).collect()
        }
    }
}

/// What spans name: nothing where there are several servers.
fn place(config: &Config) -> Place {
    let urls = urls(config);
    match (config.redis_mode, urls.first().map(|url| url.as_str().into_connection_info())) {
        (RedisMode::Single, Some(Ok(info))) => match info.addr() {
            ConnectionAddr::Tcp(host, port) | ConnectionAddr::TcpTls { host, port, .. } => {
                Place::new(host, *port, &info.redis_settings().db().to_string())
            }
            _ => Place::default(),
        },
        _ => Place::default(),
    }
}

/// Names what is wrong with `REDIS_URL`, without quoting it: it may hold a password.
pub fn check_urls(config: &Config) -> Result<(), String> {
    for (index, url) in urls(config).iter().enumerate() {
        if !url.starts_with("redis://") && !url.starts_with("rediss://") {
            return Err(format!("URL {} does not begin with redis:// or rediss://", index + 1));
        }
        url.as_str().into_connection_info().map_err(|_| format!("URL {} does not parse", index + 1))?;
    }
    Ok(())
}

fn timed_out(what: &'static str) -> RedisError {
    RedisError::from(std::io::Error::new(std::io::ErrorKind::TimedOut, what))
}

impl std::fmt::Debug for Redis {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Redis").field("away", &*self.away.borrow()).finish_non_exhaustive()
    }
}

impl std::fmt::Debug for Live {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Live").field("generation", &self.generation).finish_non_exhaustive()
    }
}
