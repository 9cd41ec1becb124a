//! Redis: one multiplexed connection for each worker, which its requests share, and a task that reconnects.
//!
//! deadpool-redis knows how to reach a single Redis, a cluster or the master that sentinels name. Its pool pings at
//! every checkout, which would cost a round trip per request. So each worker takes one connection out of the pool for
//! good and clones it, and the requests' commands are pipelined. When a command fails, all workers' connections are
//! dropped together: every request falls back at once, and the task reconnects.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, RwLock};
use std::time::Duration;

use deadpool_redis::redis::aio::{AsyncPushSender, ConnectionLike, MultiplexedConnection, SendError};
use deadpool_redis::redis::cluster::ClusterClientBuilder;
use deadpool_redis::redis::cluster_async::ClusterConnection;
use deadpool_redis::redis::sentinel::{SentinelClient, SentinelNodeConnectionInfo, SentinelServerType};
use deadpool_redis::redis::{
    AsyncConnectionConfig, Client, Cmd, ConnectionAddr, ConnectionInfo, ErrorKind, FromRedisValue,
    IntoConnectionInfo as _, Pipeline, ProtocolVersion, PushInfo, RedisError, RedisFuture, Script, TlsMode,
    Value,
};
use deadpool_redis::{PoolError, Runtime, cluster, sentinel};
use futures_util::future::{join_all, try_join_all};
use tokio::runtime::Handle;
use tokio::sync::{Notify, mpsc, watch};

use super::operation::Operation;
use crate::config::{Config, RedisMode};
use crate::telemetry::metrics::Metrics;
use crate::telemetry::trace::{self, ServerAttributes};
use crate::workers;

/// How long one round trip may take before Redis counts as unavailable: far above a healthy one (well under 1 ms), far
/// below a request's timeout. Of a short `REQUEST_TIMEOUT_MS` it is a quarter: a read waits for Redis twice before it asks
/// Postgres.
const RESPONSE_TIMEOUT: Duration = Duration::from_millis(500);

/// How long connecting may take, TLS and the sentinels' answer included.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);

/// Between two attempts to reconnect, and between two probes of an idle connection.
const RETRY_INTERVAL: Duration = Duration::from_millis(250);
const PROBE_INTERVAL: Duration = Duration::from_secs(1);

/// Written by each probe, and by those of releases before the windows had epochs.
const PROBE_KEY: &str = "chat:answers";
const OLDER_PROBE_KEY: &str = "chat:probe";

/// Where replicas announce messages. In a cluster it is a sharded channel, on one node.
const CHANNEL: &str = "chat:new";

/// Why Redis cannot be used, and what to do.
#[derive(Debug)]
pub struct Fault {
    pub reason: String,
    pub fix: &'static str,
}

/// Redis did not execute a command. The reason has been logged; the caller falls back.
#[derive(thiserror::Error, Debug, Clone, Copy)]
#[error("Redis is unavailable")]
pub struct Unavailable;

pub struct Redis {
    source: Arc<Source>,
    /// The workers' runtimes. Each has a connection, which it drives.
    runtimes: Vec<Handle>,
    /// Present while Redis answers.
    live: RwLock<Option<Live>>,
    /// Wakes the task that reconnects.
    lost: Notify,
    /// True while Redis is unavailable.
    unavailable: watch::Sender<bool>,
    /// Loaded at each connect, so that `EVALSHA` finds them.
    scripts: Vec<Script>,
    response_timeout: Duration,
    subscriber: Subscriber,
    /// So that it is logged once.
    may_not_publish: AtomicBool,
    server: ServerAttributes,
    metrics: Arc<Metrics>,
}

/// Working connections, one for each worker.
#[derive(Clone)]
pub struct Live {
    connections: Arc<[Connection]>,
    /// Tells them from those that were opened before and after.
    pub generation: u64,
}

#[derive(Clone)]
enum Connection {
    One(MultiplexedConnection),
    /// With its response timeout.
    Cluster(ClusterConnection, Duration),
}

impl Live {
    /// True where keys live on several nodes.
    pub fn is_cluster(&self) -> bool {
        self.connections.iter().any(|connection| matches!(connection, Connection::Cluster(..)))
    }

    /// The connection of the worker that calls.
    fn of_current_worker(&self) -> Connection {
        self.connections[workers::current() % self.connections.len()].clone()
    }
}

enum Source {
    Single(deadpool_redis::Pool),
    Cluster(cluster::Pool),
    Sentinel(sentinel::Pool, Sentinels),
}

/// What it takes to find out which of them refuses.
struct Sentinels {
    all: Vec<ConnectionInfo>,
    master: String,
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
            unavailable: watch::Sender::new(true),
            scripts,
            response_timeout: RESPONSE_TIMEOUT.min(config.request_timeout() / 4),
            subscriber: Subscriber::new(config)?,
            may_not_publish: AtomicBool::new(false),
            server: server_attributes(config),
            metrics,
        }))
    }

    /// The connections; `None` while Redis is unavailable.
    pub fn live(&self) -> Option<Live> {
        self.live.read().unwrap_or_else(|poisoned| poisoned.into_inner()).clone()
    }

    /// Follows whether Redis is unavailable.
    pub fn watch_unavailable(&self) -> watch::Receiver<bool> {
        self.unavailable.subscribe()
    }

    /// Runs the commands in one round trip. After any failure Redis counts as unavailable: a timeout, a broken
    /// connection, but also an answer such as OOM, READONLY or LOADING, after which nothing can be relied on.
    pub async fn run<T: FromRedisValue>(
        &self,
        live: &Live,
        operation: Operation,
        pipeline: &Pipeline,
    ) -> Result<T, Unavailable> {
        let _timer = self.metrics.operation_started(operation.name());
        let span = trace::operation(operation.name(), &self.server);
        let mut connection = live.of_current_worker();
        pipeline.query_async(&mut connection).await.map_err(|error| {
            if let Some(span) = span {
                span.operation_failed(error.code(), if error.is_timeout() { "timeout" } else { "_OTHER" });
            }
            self.drop_connections(live, &error);
            Unavailable
        })
    }

    /// Which Redis it is: another after each start and each promotion to master. In a cluster all its masters together.
    /// `None` while a replica of an older release uses it, too, whose windows are others.
    pub async fn identity(&self, live: &Live) -> Result<Option<String>, Unavailable> {
        let mut pipeline = identify();
        pipeline.cmd("EXISTS").arg(OLDER_PROBE_KEY);
        let mut answers: Vec<Value> = self.run(live, Operation::IdentifyRedis, &pipeline).await?;
        let older = answers.pop() != Some(Value::Int(0));
        Ok(Some(identity(&answers)).filter(|identity| !older && !identity.is_empty()))
    }

    /// Publishes an announcement. Where the user may not, Redis is as good as before for everything else.
    pub async fn publish(&self, live: &Live, payload: &[u8]) {
        let command = if live.is_cluster() { "SPUBLISH" } else { "PUBLISH" };
        let command = deadpool_redis::redis::cmd(command).arg(CHANNEL).arg(payload).to_owned();
        let _timer = self.metrics.operation_started(Operation::Announce.name());
        let outcome = command.query_async::<()>(&mut live.of_current_worker()).await;
        match outcome {
            Ok(()) => {}
            Err(error) if error.code() == Some("NOPERM") => {
                if !self.may_not_publish.swap(true, Ordering::Relaxed) {
                    tracing::warn!(
                        error = said(&error),
                        fix = "allow PUBLISH, SUBSCRIBE, SPUBLISH and SSUBSCRIBE, and the channel: ACL SETUSER ... &chat:*",
                        "Redis refuses announcements: streams show other replicas' messages seconds late"
                    );
                }
            }
            Err(error) => self.drop_connections(live, &error),
        }
    }

    /// A connection of its own that hears announcements, until it is dropped.
    pub(crate) async fn subscribe(&self, pushed: Pushes) -> Result<Subscription, RedisError> {
        tokio::time::timeout(CONNECT_TIMEOUT, self.subscriber.subscribe(pushed))
            .await
            .unwrap_or_else(|_| Err(timed_out("no connection in time")))
    }

    /// Keeps the connections alive until the process ends.
    pub async fn supervise(self: Arc<Self>) {
        let mut generation = 0;
        loop {
            if let Some(live) = self.live() {
                if let Err(error) = self.probe(&live.connections).await {
                    self.drop_connections(&live, &error);
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
                        self.warn(&self.source.fault(&error).await.reason);
                    }
                    tokio::time::sleep(RETRY_INTERVAL).await;
                }
            }
        }
    }

    /// One attempt, for `doctor`.
    pub async fn check(&self) -> Result<(), Fault> {
        match self.connect(0).await {
            Ok(_) => Ok(()),
            Err(error) => Err(self.source.fault(&error).await),
        }
    }

    /// Drops the connections, unless newer ones have replaced them already.
    fn drop_connections(&self, live: &Live, error: &RedisError) {
        let current = self.live().is_some_and(|current| current.generation == live.generation);
        if current {
            self.change(None, Some(error));
            self.lost.notify_one();
        }
    }

    /// The only function that changes the state, so that each change is logged once.
    fn change(&self, live: Option<Live>, error: Option<&RedisError>) {
        let unavailable = live.is_none();
        *self.live.write().unwrap_or_else(|poisoned| poisoned.into_inner()) = live;
        let changed = self.unavailable.send_replace(unavailable) != unavailable;
        match error {
            Some(error) if changed => self.warn(&said(error)),
            None if changed => tracing::info!("Redis answers"),
            _ => {}
        }
    }

    fn warn(&self, error: &str) {
        tracing::warn!(
            error,
            "Redis is unavailable: history comes from Postgres, rate limits are counted per replica"
        );
    }

    async fn connect(&self, generation: u64) -> Result<Live, RedisError> {
        let attempt = async {
            let connections =
                try_join_all(self.runtimes.iter().map(|runtime| self.connect_on(runtime))).await?;
            self.probe(&connections).await?;
            // Scripts that one connection has loaded are known on all.
            let mut first = connections.first().cloned().ok_or_else(|| timed_out("no worker runs"))?;
            if identity(&identify().query_async::<Vec<Value>>(&mut first).await?).is_empty() {
                return Err(RedisError::from((ErrorKind::Client, "INFO does not say which Redis it is")));
            }
            for script in &self.scripts {
                script.prepare_invoke().load_async(&mut first).await?;
            }
            Ok(connections.into())
        };
        let connections = tokio::time::timeout(CONNECT_TIMEOUT, attempt)
            .await
            .unwrap_or_else(|_| Err(timed_out("no connection in time")))?;
        Ok(Live { connections, generation })
    }

    /// Opens a connection that the runtime drives.
    async fn connect_on(&self, runtime: &Handle) -> Result<Connection, RedisError> {
        let (source, timeout) = (Arc::clone(&self.source), self.response_timeout);
        let connecting = runtime.spawn(async move { source.connect(timeout).await });
        connecting.await.unwrap_or_else(|_| Err(timed_out("the worker has ended")))
    }

    /// Writes, because a read-only Redis (a replica, or one out of memory) is of no use here.
    async fn probe(&self, connections: &[Connection]) -> Result<(), RedisError> {
        let probe = deadpool_redis::redis::cmd("SET").arg(PROBE_KEY).arg(1).arg("PX").arg(1000).to_owned();
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

/// How to open a connection that hears announcements. Its protocol is RESP3, in which they come beside answers.
enum Subscriber {
    Single(Box<Client>),
    Cluster(Vec<ConnectionInfo>),
    Sentinel { sentinels: Vec<ConnectionInfo>, master: String, node: Box<ConnectionInfo> },
}

/// Where a connection puts what it hears. What does not fit is lost: nothing but a delay depends on it.
#[derive(Clone, Debug)]
pub(crate) struct Pushes(pub(crate) mpsc::Sender<PushInfo>);

impl AsyncPushSender for Pushes {
    fn send(&self, push: PushInfo) -> Result<(), SendError> {
        match self.0.try_send(push) {
            Ok(()) | Err(mpsc::error::TrySendError::Full(_)) => Ok(()),
            Err(mpsc::error::TrySendError::Closed(_)) => Err(SendError),
        }
    }
}

/// Held for as long as announcements are to be heard.
pub(crate) struct Subscription(#[expect(dead_code, reason = "it is held, not used")] Connection);

impl std::fmt::Debug for Subscription {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Subscription").finish_non_exhaustive()
    }
}

impl Subscriber {
    fn new(config: &Config) -> Result<Self, RedisError> {
        let urls = config.redis_urls();
        let all = || urls.iter().map(|url| Ok(resp3(url.as_str().into_connection_info()?)));
        Ok(match config.redis_mode {
            RedisMode::Single => {
                Self::Single(Box::new(Client::open(resp3(urls.concat().into_connection_info()?))?))
            }
            RedisMode::Cluster => Self::Cluster(all().collect::<Result<_, RedisError>>()?),
            RedisMode::Sentinel => Self::Sentinel {
                sentinels: Sentinels::new(&urls, String::new())?.all,
                master: config.redis_sentinel_master.clone(),
                node: Box::new(resp3(config.redis_master_url().into_connection_info()?)),
            },
        })
    }

    async fn subscribe(&self, pushed: Pushes) -> Result<Subscription, RedisError> {
        let options = AsyncConnectionConfig::new().set_push_sender(pushed.clone());
        let mut connection = match self {
            Self::Single(client) => client.get_multiplexed_async_connection_with_config(&options).await?,
            Self::Sentinel { sentinels, master, node } => {
                let mut info = SentinelNodeConnectionInfo::default()
                    .set_redis_connection_info(node.redis_settings().clone());
                info = match node.addr() {
                    ConnectionAddr::TcpTls { insecure: true, .. } => info.set_tls_mode(TlsMode::Insecure),
                    ConnectionAddr::TcpTls { .. } => info.set_tls_mode(TlsMode::Secure),
                    _ => info,
                };
                let mut client = SentinelClient::build(
                    sentinels.clone(),
                    master.clone(),
                    Some(info),
                    SentinelServerType::Master,
                )?;
                client.get_async_connection_with_config(&options).await?
            }
            Self::Cluster(nodes) => {
                let client = ClusterClientBuilder::new(nodes.clone())
                    .use_protocol(ProtocolVersion::RESP3)
                    .push_sender(pushed)
                    .build()?;
                let mut connection = client.get_async_connection().await?;
                connection.ssubscribe(CHANNEL).await?;
                return Ok(Subscription(Connection::Cluster(connection, RESPONSE_TIMEOUT)));
            }
        };
        connection.subscribe(CHANNEL).await?;
        Ok(Subscription(Connection::One(connection)))
    }
}

fn resp3(info: ConnectionInfo) -> ConnectionInfo {
    let settings = info.redis_settings().clone().set_protocol(ProtocolVersion::RESP3);
    info.set_redis_settings(settings)
}

impl Source {
    fn new(config: &Config) -> anyhow::Result<Self> {
        let urls = config.redis_urls();
        let runtime = Some(Runtime::Tokio1);
        Ok(match config.redis_mode {
            RedisMode::Single => {
                Self::Single(deadpool_redis::Config::from_url(urls.concat()).create_pool(runtime)?)
            }
            RedisMode::Cluster => Self::Cluster(cluster::Config::from_urls(urls).create_pool(runtime)?),
            RedisMode::Sentinel => {
                let info = config.redis_master_url().into_connection_info()?;
                let node = sentinel::SentinelNodeConnectionInfo {
                    tls_mode: match info.addr() {
                        ConnectionAddr::TcpTls { insecure: true, .. } => Some(sentinel::TlsMode::Insecure),
                        ConnectionAddr::TcpTls { .. } => Some(sentinel::TlsMode::Secure),
                        _ => None,
                    },
                    redis_connection_info: Some(info.redis_settings().clone().into()),
                };
                let master = config.redis_sentinel_master.clone();
                let sentinels = Sentinels::new(&urls, master.clone())?;
                let config = sentinel::Config {
                    urls: None,
                    server_type: sentinel::SentinelServerType::Master,
                    master_name: master,
                    connections: Some(sentinels.all.iter().cloned().map(Into::into).collect()),
                    node_connection_info: Some(node),
                    pool: None,
                };
                Self::Sentinel(config.create_pool(runtime)?, sentinels)
            }
        })
    }

    async fn connect(&self, response_timeout: Duration) -> Result<Connection, RedisError> {
        fn reason(error: PoolError) -> RedisError {
            match error {
                PoolError::Backend(error) => error,
                error => RedisError::from((ErrorKind::Io, "connect", error.to_string())),
            }
        }
        let one = |mut connection: MultiplexedConnection| {
            connection.set_response_timeout(response_timeout);
            Connection::One(connection)
        };
        Ok(match self {
            Self::Single(pool) => one(deadpool_redis::Connection::take(pool.get().await.map_err(reason)?)),
            Self::Cluster(pool) => {
                let connection = cluster::Connection::take(pool.get().await.map_err(reason)?);
                Connection::Cluster(connection, response_timeout)
            }
            Self::Sentinel(pool, _) => one(sentinel::Connection::take(pool.get().await.map_err(reason)?)),
        })
    }

    /// What the error of an attempt to connect means.
    async fn fault(&self, error: &RedisError) -> Fault {
        match self {
            Self::Sentinel(_, sentinels) => sentinels.fault(error).await,
            _ if is_refusal(error) => {
                Fault { reason: said(error), fix: "correct the user and the password in REDIS_URL" }
            }
            _ => Fault { reason: said(error), fix: "start Redis, or correct REDIS_URL and REDIS_MODE" },
        }
    }
}

impl Sentinels {
    fn new(urls: &[String], master: String) -> Result<Self, RedisError> {
        let info = |url: &String| {
            let info = url.as_str().into_connection_info()?;
            // The database is the master's: a sentinel has none to select.
            let settings = info.redis_settings().clone().set_db(0);
            Ok::<_, RedisError>(info.set_redis_settings(settings))
        };
        Ok(Self { all: urls.iter().map(info).collect::<Result<_, _>>()?, master })
    }

    /// If any sentinel says where the master is, the error is the master's; else it is the sentinels'.
    async fn fault(&self, error: &RedisError) -> Fault {
        let mut first = None;
        for (sentinel, answer) in
            self.all.iter().zip(join_all(self.all.iter().map(|info| self.ask(info))).await)
        {
            let (reason, fix) = match answer {
                Ok(Some((host, port))) => {
                    return Fault {
                        reason: format!("master {} at {host}:{port}: {}", self.master, said(error)),
                        fix: if is_refusal(error) {
                            "correct the user and the password in REDIS_MASTER_URL; if it is unset, REDIS_URL's count"
                        } else {
                            "start the master, or correct REDIS_MASTER_URL, rediss:// for TLS"
                        },
                    };
                }
                Ok(None) => (format!("it knows no master {}", self.master), "correct REDIS_SENTINEL_MASTER"),
                Err(error) if is_refusal(&error) => (
                    said(&error),
                    "correct the user and the password in REDIS_URL; the master's are REDIS_MASTER_URL's",
                ),
                Err(error) => (said(&error), "start the sentinels, or correct REDIS_URL, rediss:// for TLS"),
            };
            first.get_or_insert_with(|| Fault {
                reason: format!("sentinel {}: {reason}", sentinel.addr()),
                fix,
            });
        }
        first.unwrap_or_else(|| Fault { reason: said(error), fix: "set REDIS_URL" })
    }

    /// Where the master is, `None` if this sentinel does not know it.
    async fn ask(&self, sentinel: &ConnectionInfo) -> Result<Option<(String, u16)>, RedisError> {
        let limits = AsyncConnectionConfig::new()
            .set_connection_timeout(Some(CONNECT_TIMEOUT))
            .set_response_timeout(Some(RESPONSE_TIMEOUT));
        let client = Client::open(sentinel.clone())?;
        let mut connection = client.get_multiplexed_async_connection_with_config(&limits).await?;
        let question = ["GET-MASTER-ADDR-BY-NAME", self.master.as_str()];
        deadpool_redis::redis::cmd("SENTINEL").arg(&question).query_async(&mut connection).await
    }
}

/// Whether it is the credentials that are refused, or missing.
fn is_refusal(error: &RedisError) -> bool {
    error.kind() == ErrorKind::AuthenticationFailed || matches!(error.code(), Some("NOAUTH" | "WRONGPASS"))
}

fn said(error: &RedisError) -> String {
    match error.code() {
        Some("NOAUTH") => "it needs a password".to_owned(),
        _ if is_refusal(error) => "wrong user or password, or it has none".to_owned(),
        _ => error.to_string(),
    }
}

impl ConnectionLike for Connection {
    fn req_packed_command<'a>(&'a mut self, cmd: &'a Cmd) -> RedisFuture<'a, Value> {
        match self {
            Self::One(connection) => connection.req_packed_command(cmd),
            Self::Cluster(connection, _) => connection.req_packed_command(cmd),
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
            // A cluster's keys live on several nodes: each command goes to its node, all of them at once.
            Self::Cluster(connection, timeout) => {
                Box::pin(each_on_its_node(connection.clone(), pipeline, *timeout))
            }
        }
    }

    fn get_db(&self) -> i64 {
        0
    }
}

async fn each_on_its_node(
    connection: ClusterConnection,
    pipeline: &Pipeline,
    timeout: Duration,
) -> Result<Vec<Value>, RedisError> {
    let mut answers = Vec::with_capacity(pipeline.len());
    let commands: Vec<_> = pipeline
        .cmd_iter()
        .map(|command| {
            let (mut connection, command) = (connection.clone(), command.clone());
            let answer = async move { connection.req_packed_command(&command).await };
            tokio::spawn(tokio::time::timeout(timeout, answer))
        })
        .collect();
    for command in commands {
        let answer = command.await.map_err(|_| timed_out("the command was cancelled"))?;
        answers.push(answer.map_err(|_| timed_out("no answer in time"))??);
    }
    Ok(answers)
}

/// Asks which Redis it is.
fn identify() -> Pipeline {
    let mut pipeline = Pipeline::with_capacity(3);
    pipeline.cmd("INFO").arg("server");
    pipeline.cmd("INFO").arg("replication");
    pipeline
}

/// What tells a server from every other, and from itself before it was a replica. Empty if a server does not say.
fn identity(answers: &[Value]) -> String {
    fn texts<'a>(value: &'a Value, found: &mut Vec<&'a str>) {
        match value {
            Value::BulkString(text) => found.extend(std::str::from_utf8(text)),
            Value::SimpleString(text) | Value::VerbatimString { text, .. } => found.push(text),
            Value::Array(values) => values.iter().for_each(|value| texts(value, found)),
            // A cluster's answer, by node.
            Value::Map(nodes) => nodes.iter().for_each(|(_, value)| texts(value, found)),
            _ => {}
        }
    }
    let mut found = Vec::new();
    answers.iter().for_each(|answer| texts(answer, &mut found));
    let lines = found.iter().flat_map(|text| text.lines());
    let mut ids: Vec<&str> = lines
        .filter_map(|line| line.strip_prefix("run_id:").or_else(|| line.strip_prefix("master_replid:")))
        .collect();
    ids.sort_unstable();
    ids.join(" ")
}

/// The server's attributes in spans: none where there are several servers.
fn server_attributes(config: &Config) -> ServerAttributes {
    let urls = config.redis_urls();
    match (config.redis_mode, urls.first().map(|url| url.as_str().into_connection_info())) {
        (RedisMode::Single, Some(Ok(info))) => match info.addr() {
            ConnectionAddr::Tcp(host, port) | ConnectionAddr::TcpTls { host, port, .. } => {
                ServerAttributes::new(host, *port, &info.redis_settings().db().to_string())
            }
            _ => ServerAttributes::default(),
        },
        _ => ServerAttributes::default(),
    }
}

fn timed_out(what: &'static str) -> RedisError {
    RedisError::from(std::io::Error::new(std::io::ErrorKind::TimedOut, what))
}

impl std::fmt::Debug for Redis {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("Redis")
            .field("unavailable", &*self.unavailable.borrow())
            .finish_non_exhaustive()
    }
}

impl std::fmt::Debug for Live {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Live").field("generation", &self.generation).finish_non_exhaustive()
    }
}
