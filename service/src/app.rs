//! The application: everything that a handler may touch.

use std::sync::Arc;

use sqlx::postgres::PgConnectOptions;
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::chat::check;
use crate::chat::erasure::Erasures;
use crate::chat::export::Exports;
use crate::chat::history::History;
use crate::chat::outbox::{self, Outbox};
use crate::chat::permission::Permission;
use crate::chat::recent::Recent;
use crate::chat::retention;
use crate::chat::streams::{self, Streams};
use crate::chat::sweep;
use crate::config::Config;
use crate::security::deletion::Deletion;
use crate::security::limits::{Limit, Limits};
use crate::security::passwords::Passwords;
use crate::security::sessions::Sessions;
use crate::security::tokens::Tokens;
use crate::store::health::Health;
use crate::store::migrations;
use crate::store::operation::Operation;
use crate::store::postgres::Database;
use crate::store::redis::Redis;
use crate::store::wake_ups::WakeUps;
use crate::telemetry::metrics::{EndpointName, Gauges, Known, Metrics};
use crate::workers::Workers;

#[derive(Debug)]
pub struct App {
    /// As read at the start; nothing reads the environment later.
    pub config: Config,
    /// For migrations, which need a connection without the pool's timeouts.
    pub connect_options: PgConnectOptions,
    /// Postgres, the only source of truth.
    pub database: Database,
    /// Redis, for data that may be lost.
    pub redis: Arc<Redis>,
    /// Stores every message.
    pub outbox: Outbox,
    /// The newest messages of conversations, in Redis.
    pub(crate) recent: Arc<Recent>,
    /// Reads every page of messages.
    pub history: History,
    /// Reads everything about a user.
    pub(crate) exports: Exports,
    /// Follows new messages live.
    pub(crate) streams: Arc<Streams>,
    /// Whether the recent windows may be used, and which users were deleted.
    pub(crate) permission: Arc<Permission>,
    /// The rate limits.
    pub limits: Limits,
    /// Signs and verifies access tokens.
    pub tokens: Tokens,
    /// Begins and ends sessions.
    pub sessions: Sessions,
    /// Deletes accounts.
    pub deletion: Deletion,
    /// Removes in the background what is left of them.
    pub(crate) erasures: Arc<Erasures>,
    /// Hashes passwords, on dedicated threads.
    pub passwords: Passwords,
    /// Whether Postgres answers and its schema is current.
    pub health: Arc<Health>,
    /// What Prometheus scrapes.
    pub metrics: Arc<Metrics>,
}

/// The tasks behind an application.
#[derive(Debug)]
pub struct Tasks {
    /// They end on `stop`, after they have written what was queued. One that ends earlier has failed.
    pub writers: JoinSet<()>,
    /// They are aborted with the process: the next process continues their work.
    pub supervisors: JoinSet<()>,
}

impl App {
    /// Builds the application and starts its tasks. Postgres and Redis may be unavailable.
    pub fn start(
        config: Config,
        endpoints: Vec<EndpointName>,
        workers: &Workers,
        stop: &watch::Receiver<bool>,
    ) -> anyhow::Result<(Arc<Self>, Tasks)> {
        let connect_options = config.connect_options()?;
        let metrics = Metrics::new(Known {
            endpoints,
            operations: Operation::names().collect(),
            limits: Limit::names().into_iter().chain([outbox::NEW_CONVERSATIONS]).collect(),
            schema_version: migrations::known_version(),
        })?;
        let database = Database::new(&config, connect_options.clone(), Arc::clone(&metrics));
        let redis =
            Redis::new(&config, Recent::scripts(), workers.runtimes().to_vec(), Arc::clone(&metrics))?;
        let health = Health::new();
        let permission = Permission::new(&config, Arc::clone(&redis), database.clone(), Arc::clone(&health));
        let recent = Recent::new(&config, Arc::clone(&redis), Arc::clone(&permission));
        let wake_ups = WakeUps::new(Arc::clone(&redis));
        let streams = Streams::new(
            &config,
            database.clone(),
            Arc::clone(&permission),
            Arc::clone(&wake_ups),
            Arc::clone(&metrics),
        );
        let (outbox, writers) = Outbox::start(&config, &database, &recent, &streams, &metrics, stop);

        let mut supervisors = JoinSet::new();
        supervisors.spawn(Arc::clone(&redis).supervise());
        supervisors.spawn(Arc::clone(&wake_ups).send());
        supervisors.spawn(wake_ups.listen());
        supervisors.spawn(Arc::clone(&streams).listen());
        supervisors.spawn(Arc::clone(&streams).watch_readers());
        supervisors.spawn(Arc::clone(&streams).watch_refused());
        supervisors.spawn(check::windows(Arc::clone(&recent), Arc::clone(&permission), database.clone()));

        let app = Arc::new(Self {
            limits: Limits::new(&config, Arc::clone(&redis), Arc::clone(&metrics)),
            tokens: Tokens::new(&config),
            sessions: Sessions::new(&config, database.clone()),
            deletion: Deletion::new(&config, database.clone()),
            erasures: Erasures::new(
                &config,
                database.clone(),
                Arc::clone(&recent),
                Arc::clone(&streams),
                Arc::clone(&metrics),
            ),
            passwords: Passwords::start(Arc::clone(&metrics))?,
            history: History::new(
                &config,
                database.clone(),
                Arc::clone(&recent),
                Arc::clone(&health),
                Arc::clone(&metrics),
            ),
            exports: Exports::new(
                database.clone(),
                Arc::clone(&health),
                Arc::clone(&permission),
                Arc::clone(&metrics),
            ),
            recent,
            streams,
            permission,
            connect_options,
            database,
            redis,
            outbox,
            health,
            metrics,
            config,
        });
        Ok((app, Tasks { writers, supervisors }))
    }

    /// Starts the tasks that need Postgres, once it was migrated or found to be unavailable.
    pub fn watch_postgres(&self, tasks: &mut Tasks) {
        tasks.supervisors.spawn(Arc::clone(&self.health).supervise(self.database.clone()));
        tasks.supervisors.spawn(Arc::clone(&self.permission).supervise());
        tasks.supervisors.spawn(streams::follow(
            Arc::clone(&self.streams),
            self.database.clone(),
            Arc::clone(&self.health),
        ));
        tasks.supervisors.spawn(sweep::sweep(self.config.clone(), self.database.clone()));
        if let Some(age) = self.config.message_retention() {
            tasks.supervisors.spawn(retention::old_messages(
                self.database.clone(),
                Arc::clone(&self.recent),
                Arc::clone(&self.metrics),
                age,
            ));
        }
        tasks.supervisors.spawn(Arc::clone(&self.erasures).work());
    }

    /// Numbers that the metrics read at each scrape.
    pub fn gauges(&self) -> Gauges {
        let pool = self.database.pool_size();
        Gauges {
            outbox_depth: self.outbox.depth(),
            outbox_capacity: self.outbox.capacity(),
            password_capacity: self.passwords.capacity(),
            streams_open: self.streams.open_count(),
            streams_max: self.streams.max(),
            pool_idle: pool.idle,
            pool_used: pool.open - pool.idle,
            pool_max: self.config.db_pool_max,
            postgres_up: self.health.postgres_answers(),
            redis_up: self.redis.live().is_some(),
            ready: self.health.is_ready(),
            schema_version: self.health.schema_version(),
        }
    }
}
