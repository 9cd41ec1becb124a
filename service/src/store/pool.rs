//! The pool of Postgres connections.
//!
//! sqlx's own pool asks Postgres whether a connection still works, before and after each use. A page of messages would take
//! three round trips instead of one. This one asks only after a pause, and after a use that may not be over.
//!
//! It is several pools, where there are connections enough: a connection belongs to the worker that opened it, whose thread
//! hears of Postgres' answers. No worker has to wake another.

use std::ops::{Deref, DerefMut};
use std::sync::Arc;
use std::time::Duration;

use deadpool::managed::{self, Metrics, Object, PoolError, RecycleError, RecycleResult};
use futures_util::future::join_all;
use sqlx::postgres::PgConnectOptions;
use sqlx::{ConnectOptions as _, Connection as _, PgConnection};
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio::time::Instant;

use crate::workers;

/// A connection that was not used for longer is tested first, and for how long.
const IDLE_BEFORE_PING: Duration = Duration::from_secs(1);
const PING_LIMIT: Duration = Duration::from_secs(1);

/// When an idle connection is closed, and when any is, so that the memory of its server process is freed.
const IDLE_MAX: Duration = Duration::from_secs(600);
const AGE_MAX: Duration = Duration::from_secs(1800);

/// How long Postgres may take to hear of it.
const CLOSE_LIMIT: Duration = Duration::from_millis(500);

/// Between two attempts to connect to a server that starts, or has no connection to spare.
const CONNECT_RETRY: Duration = Duration::from_millis(50);

/// A worker's pool has at least this many connections.
const POOL_MIN: u32 = 4;

#[derive(Debug)]
pub(super) struct Pools(Vec<managed::Pool<Manager>>);

/// A connection that returns to its pool when it is dropped.
pub(super) type Pooled = Object<Manager>;

#[derive(Debug)]
pub(super) struct Manager {
    options: PgConnectOptions,
    replacement: Replacement,
    /// How long an attempt is repeated.
    connect_limit: Duration,
}

/// A connection of the pool, to which it returns when it is dropped.
///
/// The last statement may not have ended: it may have been cancelled, with its answer still to come. So the connection first
/// waits for it, within a limit: a server whose machine has died never answers, and its connections would fill the pool until
/// TCP gives them up. [`Session::give_back`] returns it at once.
#[derive(Debug)]
pub struct Session {
    /// Taken when it is dropped.
    connection: Option<Pooled>,
    return_limit: Duration,
}

impl Session {
    pub(super) fn new(connection: Pooled, return_limit: Duration) -> Self {
        Self { connection: Some(connection), return_limit }
    }

    /// Returns the connection to the pool. The answer of its last statement was read, and no transaction is open.
    pub fn give_back(mut self) {
        self.connection = None;
    }

    /// Closes the connection instead of returning it to the pool.
    pub fn close(mut self) {
        self.connection.take().map(Object::take);
    }
}

impl Deref for Session {
    type Target = PgConnection;

    fn deref(&self) -> &PgConnection {
        self.connection.as_deref().expect("taken only when the session is dropped")
    }
}

impl DerefMut for Session {
    fn deref_mut(&mut self) -> &mut PgConnection {
        self.connection.as_deref_mut().expect("taken only when the session is dropped")
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        let Some(mut connection) = self.connection.take() else { return };
        let Ok(runtime) = Handle::try_current() else { return drop(Object::take(connection)) };
        let limit = self.return_limit;
        runtime.spawn(async move {
            if !matches!(tokio::time::timeout(limit, connection.ping()).await, Ok(Ok(()))) {
                drop(Object::take(connection));
            }
        });
    }
}

/// The sessions that the pool still uses: those that were opened since the last replacement. A session keeps the settings
/// that its database and its user had when it was opened, so one that only reads would go on to do so.
#[derive(Clone, Debug)]
pub(super) struct Replacement(Arc<watch::Sender<Instant>>);

impl Replacement {
    pub(super) fn new() -> Self {
        Self(Arc::new(watch::Sender::new(Instant::now())))
    }

    /// Every session of now is closed instead of used again.
    pub(super) fn replace(&self) {
        self.0.send_replace(Instant::now());
    }

    pub(super) fn elapsed(&self) -> Duration {
        self.0.borrow().elapsed()
    }
}

/// How many connections there are, and how many of them are idle.
#[derive(Clone, Copy, Debug)]
pub struct PoolSize {
    pub open: usize,
    pub idle: usize,
}

impl Pools {
    /// Nothing is connected yet.
    pub(super) fn new(
        options: &PgConnectOptions,
        connections: u32,
        connect_limit: Duration,
        replacement: &Replacement,
    ) -> Self {
        let count = (connections / POOL_MIN).clamp(1, workers::default_count() as u32);
        let pool = |number| {
            let manager =
                Manager { options: options.clone(), replacement: replacement.clone(), connect_limit };
            // Together exactly as many as may be open.
            let size = connections / count + u32::from(number < connections % count);
            managed::Pool::builder(manager)
                .max_size(size as usize)
                .queue_mode(managed::QueueMode::Lifo)
                .build()
                .expect("only a time limit needs a runtime")
        };
        Self((0..count).map(pool).collect())
    }

    /// A connection of the worker that calls.
    pub(super) async fn get(&self) -> Result<Pooled, sqlx::Error> {
        let got = self.0[workers::current() % self.0.len()].get().await;
        got.map_err(|error| match error {
            PoolError::Backend(error) => error,
            PoolError::Closed => sqlx::Error::PoolClosed,
            _ => sqlx::Error::PoolTimedOut,
        })
    }

    pub(super) fn size(&self) -> PoolSize {
        let all = self.0.iter().map(managed::Pool::status);
        let sum = |(open, idle), status: managed::Status| (open + status.size, idle + status.available);
        let (open, idle) = all.fold((0, 0), sum);
        // What waits for a connection counts as well.
        PoolSize { open, idle: idle.min(open) }
    }

    /// Closes connections that were not used for long.
    pub(super) async fn close_idle(&self) {
        self.close_unless(|metrics| metrics.last_used() < IDLE_MAX).await;
    }

    /// Closes all connections, as they become idle.
    pub(super) async fn close(&self) {
        self.close_unless(|_| false).await;
        self.0.iter().for_each(managed::Pool::close);
    }

    async fn close_unless(&self, stays: impl Fn(Metrics) -> bool) {
        let removed = self.0.iter().flat_map(|pool| pool.retain(|_, metrics| stays(metrics)).removed);
        tokio::time::timeout(CLOSE_LIMIT, join_all(removed.map(PgConnection::close))).await.ok();
    }
}

impl managed::Manager for Manager {
    type Type = PgConnection;
    type Error = sqlx::Error;

    async fn create(&self) -> Result<PgConnection, sqlx::Error> {
        let deadline = Instant::now() + self.connect_limit;
        loop {
            match self.options.connect().await {
                Err(error) if is_starting(&error) && Instant::now() + CONNECT_RETRY < deadline => {
                    tokio::time::sleep(CONNECT_RETRY).await;
                }
                outcome => return outcome,
            }
        }
    }

    async fn recycle(&self, connection: &mut PgConnection, metrics: &Metrics) -> RecycleResult<sqlx::Error> {
        if metrics.age() >= AGE_MAX.min(self.replacement.elapsed()) {
            return Err(RecycleError::message("it is too old"));
        }
        if metrics.last_used() > IDLE_BEFORE_PING {
            tokio::time::timeout(PING_LIMIT, connection.ping())
                .await
                .unwrap_or(Err(sqlx::Error::PoolTimedOut))?;
        }
        Ok(())
    }
}

/// True where another attempt may soon succeed: nothing listens yet, or Postgres says so.
fn is_starting(error: &sqlx::Error) -> bool {
    match error {
        sqlx::Error::Io(error) => error.kind() == std::io::ErrorKind::ConnectionRefused,
        sqlx::Error::Database(error) => error.is_transient_in_connect_phase(),
        _ => false,
    }
}
