//! The application: everything that a handler may touch.

use std::sync::Arc;

use sqlx::postgres::PgConnectOptions;
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::auth::Tokens;
use crate::config::Config;
use crate::db::Database;
use crate::health::Health;
use crate::limits::Limits;
use crate::metrics::Metrics;
use crate::outbox::Outbox;
use crate::passwords::Passwords;
use crate::recent::Recent;
use crate::redis::Redis;
use crate::workers::Workers;
use crate::{db, sweep};

#[derive(Debug)]
pub struct App {
    /// As it was at the start; nothing reads the environment later.
    pub config: Config,
    /// For migrations, which need a connection without the pool's limits.
    pub connect_options: PgConnectOptions,
    /// Postgres, the only source of truth.
    pub database: Database,
    /// Redis, for what may be lost.
    pub redis: Arc<Redis>,
    /// The way of every message into Postgres.
    pub outbox: Outbox,
    /// The newest messages, ready to be sent.
    pub recent: Arc<Recent>,
    /// Who may do how much.
    pub limits: Limits,
    pub tokens: Tokens,
    /// Hashing, on threads of its own.
    pub passwords: Passwords,
    pub health: Arc<Health>,
    pub metrics: Arc<Metrics>,
}

/// The tasks behind an application.
#[derive(Debug)]
pub struct Tasks {
    /// They end when told to stop, having written what was queued. One that ends earlier has failed.
    pub writers: JoinSet<()>,
    /// They are ended with the process: what they do, the next process does again.
    pub supervisors: JoinSet<()>,
}

impl App {
    /// Builds the application and starts its tasks. Neither Postgres nor Redis needs to be there.
    pub fn start(
        config: Config,
        workers: &Workers,
        stop: &watch::Receiver<bool>,
    ) -> anyhow::Result<(Arc<Self>, Tasks)> {
        let connect_options = db::connect_options(&config).map_err(anyhow::Error::msg)?;
        let metrics = Metrics::new()?;
        let pool = db::pool(&config, connect_options.clone());
        let database = Database::new(pool, Arc::clone(&metrics));
        let redis =
            Redis::new(&config, Recent::scripts(), workers.runtimes().to_vec(), Arc::clone(&metrics))?;
        let recent = Recent::new(&config, Arc::clone(&redis), database.clone());
        let health = Health::new();
        let (outbox, writers) = Outbox::start(&config, &database, &recent, &metrics, stop);

        let mut supervisors = JoinSet::new();
        supervisors.spawn(Arc::clone(&redis).supervise());
        supervisors.spawn(Arc::clone(&recent).supervise());

        let app = Arc::new(Self {
            limits: Limits::new(&config, Arc::clone(&redis), Arc::clone(&metrics)),
            tokens: Tokens::new(&config),
            passwords: Passwords::start(Arc::clone(&metrics))?,
            connect_options,
            database,
            redis,
            outbox,
            recent,
            health,
            metrics,
            config,
        });
        Ok((app, Tasks { writers, supervisors }))
    }

    /// Starts the tasks that make sense once Postgres was migrated, or found away.
    pub fn watch_postgres(&self, tasks: &mut Tasks) {
        tasks.supervisors.spawn(Arc::clone(&self.health).supervise(self.database.clone()));
        tasks.supervisors.spawn(sweep::expired_idempotency_keys(self.database.clone()));
    }
}
