//! The permission to use the recent windows: which of them a replica may use just now, learnt from Postgres.
//!
//! One row in Postgres says which Redis has the windows, under which *epoch*, and whether that has *settled*. Every replica
//! asks its Redis who it is and then reads that row, again and again. Windows of a settled epoch are *usable* for a replica
//! whose Redis is that one while its last answer is younger than [`PERMISSION`], counted from the question.
//!
//! Whoever must put the windows out of use raises the epoch: a replica that has lost Redis, or that is connected to another
//! one. The new epoch is *suspended* for a while, which is renewed, so that the epoch need not be raised for each message. A
//! replica may rely on the suspension, and acknowledge what is in no window, once it has known of it for [`SETTLING`], which
//! is longer than any permission: no replica uses windows of the epoch before. When the suspension is over, no replica
//! relies on it [`PERMISSION`] later. So a replica that has seen that it is over for [`SETTLING`] settles the epoch, and
//! from then on its windows are filled and used. A settled epoch is not suspended again; only the next one can be.
//!
//! All of this is measured with monotonic clocks. Postgres's wall clock only says when a suspension is over. If it is set, that
//! comes early, or [`SUSPENSION_MAX`] later at most, and the rest holds as before.
//!
//! The same question brings the users who were deleted and the sessions that have ended. [`Permission::is_deleted`] and
//! [`Permission::has_ended`] know of them before a permission that does not has expired.

use std::collections::HashMap;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use sqlx::PgConnection;
use tokio::sync::watch;
use tokio::time::Instant;
use tracing::Instrument as _;
use uuid::Uuid;

use crate::config::Config;
use crate::failpoints::{self, Failpoint};
use crate::store::health::Health;
use crate::store::operation::Operation;
use crate::store::pool::Session;
use crate::store::postgres::{Database, reason};
use crate::store::redis::{Live, Redis};
use crate::telemetry::trace;

/// How long an answer is relied on, from the moment of the question.
const PERMISSION: Duration = Duration::from_millis(450);

/// Between two questions: two in a row may fail or be late.
const INTERVAL: Duration = Duration::from_millis(150);

/// How long a change must be known before all that relies on the state before it has expired. The margin of 5 % is for clocks
/// that differ in speed: a hundred times the largest slew.
pub(super) const SETTLING: Duration = Duration::from_millis(475);

/// How long one question may take. Later answers would be too old in any case.
const ANSWER_LIMIT: Duration = Duration::from_millis(500);

/// How far ahead a suspension reaches, and how often it is renewed.
const SUSPENSION: Duration = Duration::from_secs(3);
const RENEWAL: Duration = Duration::from_secs(1);

/// A suspension that reaches further is not one: the clock was set back. Older releases suspended for 10 s.
const SUSPENSION_MAX: Duration = Duration::from_secs(15);

/// How long the first connection to Redis may take before Redis counts as unavailable.
const FIRST_CONNECTION: Duration = Duration::from_secs(1);

/// How long anything waits for the windows to settle: a loss of Redis takes a third of it.
const WAIT_LIMIT: Duration = Duration::from_secs(3);

/// A pool of at least this many connections can spare one for the questions, so that they never wait for requests.
const POOL_WITH_ONE_TO_SPARE: u32 = 8;

/// Whether windows are in use.
#[derive(Clone, Debug)]
pub(super) enum Windows {
    /// Those of this epoch may be used, and no other replica uses those of another.
    Usable(Live, Epoch),
    /// No replica uses any.
    Suspended,
    /// Not known, or not for long enough. If Redis answers, the epoch that was usable last.
    Unsettled(Option<(Live, Epoch)>),
}

/// Part of the keys of the windows that belong to it. It also changes with each start of Postgres, so that the windows do not
/// outlive what a failover of Postgres may have lost.
pub(super) type Epoch = Arc<str>;

/// The windows did not settle in time.
#[derive(thiserror::Error, Clone, Copy, Debug)]
#[error("it is not known which windows are in use")]
pub struct Unsettled;

/// What the last answer said.
#[derive(Clone, Debug)]
struct View {
    /// The beginning of the question.
    asked: Instant,
    /// The connections to Redis that were asked, too.
    generation: u64,
    state: State,
    /// From when on the state has certainly held without a break.
    since: Instant,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum State {
    Usable(Epoch),
    Suspended,
    /// The epoch is no longer suspended, and not settled yet.
    Settling(Epoch),
    /// Another Redis has the windows, or Postgres only reads.
    Neither,
}

/// The row, and the users deleted since the question before.
#[derive(Debug)]
struct Answer {
    read_only: bool,
    /// The epoch, with the start of Postgres.
    epoch: String,
    /// True if no Redis has ever had the windows.
    unclaimed: bool,
    /// True if the caller's Redis has them.
    ours: bool,
    suspended: bool,
    settled: bool,
    /// Every transaction before this one has ended.
    horizon: String,
    deleted: Vec<Uuid>,
    ended: Vec<Uuid>,
}

pub(crate) struct Permission {
    redis: Arc<Redis>,
    database: Database,
    health: Arc<Health>,
    keeps_connection: bool,
    view: watch::Sender<Option<View>>,
    /// Users who were deleted.
    deleted: Known,
    /// Sessions that have ended.
    ended: Known,
    /// Changes when one of the two has grown.
    refused: watch::Sender<()>,
}

/// What this replica has learnt of, and when. It is kept until nothing depends on it any more.
struct Known {
    learnt: RwLock<HashMap<Uuid, Instant>>,
    kept: Duration,
}

impl Known {
    fn new(kept: Duration) -> Self {
        Self { learnt: RwLock::default(), kept }
    }

    fn has(&self, id: Uuid) -> bool {
        let learnt = self.learnt.read().unwrap_or_else(PoisonError::into_inner);
        !learnt.is_empty() && learnt.contains_key(&id)
    }

    /// True if one of them is new.
    fn learn(&self, ids: &[Uuid]) -> bool {
        let now = Instant::now();
        let is_old = |learnt: &Instant| now - *learnt >= self.kept;
        let none_is_old = !self.learnt.read().unwrap_or_else(PoisonError::into_inner).values().any(is_old);
        if ids.is_empty() && none_is_old {
            return false;
        }
        let mut learnt = self.learnt.write().unwrap_or_else(PoisonError::into_inner);
        learnt.retain(|_, learnt| !is_old(learnt));
        let before = learnt.len();
        learnt.extend(ids.iter().map(|id| (*id, now)));
        learnt.len() > before
    }
}

/// What the task that asks keeps between its questions.
struct Asking {
    connection: Option<Session>,
    /// When this replica suspended the windows last.
    suspended: Option<Instant>,
    /// The oldest transaction whose deletions may be new.
    horizon: String,
}

impl Permission {
    pub(crate) fn new(
        config: &Config,
        redis: Arc<Redis>,
        database: Database,
        health: Arc<Health>,
    ) -> Arc<Self> {
        Arc::new(Self {
            redis,
            database,
            health,
            keeps_connection: config.db_pool_max >= POOL_WITH_ONE_TO_SPARE,
            view: watch::Sender::new(None),
            deleted: Known::new(Self::deletions_kept(config)),
            ended: Known::new(Self::endings_kept(config)),
            refused: watch::Sender::new(()),
        })
    }

    /// For how long deletions must be known: longer than a window can live after its last comparison with Postgres.
    pub(crate) fn deletions_kept(config: &Config) -> Duration {
        Duration::from_secs(3600) + Duration::from_secs(config.cache_ttl_seconds.into())
    }

    /// For how long the end of a session must be known: longer than its access tokens live.
    pub(crate) fn endings_kept(config: &Config) -> Duration {
        Duration::from_secs(3600) + config.access_token_lifetime()
    }

    /// Whether windows are in use as of now.
    pub(super) fn windows(&self) -> Windows {
        let live = self.redis.live();
        let view = self.view.borrow();
        let Some(view) = &*view else { return Windows::Unsettled(None) };
        let is_current = view.asked.elapsed() < PERMISSION
            || (failpoints::is_on(Failpoint::TrustExpiredPermission) && view.state != State::Suspended);
        match (&view.state, live) {
            (State::Suspended, _) if is_current && view.since.elapsed() >= SETTLING => Windows::Suspended,
            (State::Usable(epoch), Some(live)) => {
                let same = live.generation == view.generation
                    || failpoints::is_on(Failpoint::KeepPermissionOverReconnect);
                match is_current && same {
                    true => Windows::Usable(live, Arc::clone(epoch)),
                    false => Windows::Unsettled(Some((live, Arc::clone(epoch)))),
                }
            }
            _ => Windows::Unsettled(None),
        }
    }

    /// As [`Permission::windows`], once they are settled.
    pub(super) async fn settled(&self, deadline: Instant) -> Result<Windows, Unsettled> {
        let mut changes = self.view.subscribe();
        loop {
            match self.windows() {
                Windows::Unsettled(_) if failpoints::is_on(Failpoint::SkipWait) => {
                    return Ok(Windows::Suspended);
                }
                Windows::Unsettled(_) => {}
                windows => return Ok(windows),
            }
            // A suspension may be known for too short a time.
            let settles = changes.borrow_and_update().as_ref().map(|view| view.since + SETTLING);
            let settles = settles.filter(|at| *at > Instant::now()).unwrap_or(deadline);
            tokio::select! {
                changed = changes.changed() => changed.map_err(|_| Unsettled)?,
                () = tokio::time::sleep_until(settles.min(deadline)) => {}
            }
            if Instant::now() >= deadline {
                return Err(Unsettled);
            }
        }
    }

    /// Until when something that begins now may wait for the windows to settle.
    pub(super) fn deadline() -> Instant {
        Instant::now() + WAIT_LIMIT
    }

    /// True if the user was deleted, as of the last answer.
    pub(super) fn is_deleted(&self, user: Uuid) -> bool {
        self.deleted.has(user)
    }

    /// True if the session has ended, as of the last answer.
    pub(super) fn has_ended(&self, session: Uuid) -> bool {
        self.ended.has(session)
    }

    /// Changes when this replica has learnt of deleted users or ended sessions.
    pub(super) fn watch_refused(&self) -> watch::Receiver<()> {
        self.refused.subscribe()
    }

    /// Asks until the process ends, while Postgres has what is asked for.
    pub(crate) async fn supervise(self: Arc<Self>) {
        let mut unavailable = self.redis.watch_unavailable();
        // A process begins without a connection. That alone must not suspend the windows of all others.
        tokio::time::timeout(FIRST_CONNECTION, unavailable.wait_for(|unavailable| !*unavailable)).await.ok();
        let mut asking = Asking { connection: None, suspended: None, horizon: "0".to_owned() };
        loop {
            unavailable.mark_unchanged();
            if self.health.has_tables()
                && let Err(error) = self.ask(&mut asking, &mut unavailable.clone()).await
            {
                // The health task logs that Postgres is unavailable.
                tracing::debug!(error = reason(&error), "no permission to use the windows");
            }
            tokio::select! {
                _ = unavailable.changed() => {}
                () = tokio::time::sleep(INTERVAL) => {}
            }
        }
    }

    /// Asks once, and changes the row where it must be changed.
    async fn ask(
        &self,
        asking: &mut Asking,
        unavailable: &mut watch::Receiver<bool>,
    ) -> Result<(), sqlx::Error> {
        let asked = Instant::now();
        let live = self.redis.live();
        let identity = match &live {
            Some(live) => tokio::select! {
                identity = self.redis.identity(live) => identity.ok().flatten(),
                // A request has noticed first.
                _ = unavailable.wait_for(|unavailable| *unavailable) => None,
            },
            None => None,
        };
        let mut connection = match asking.connection.take() {
            Some(connection) => connection,
            None => self.database.acquire_within(ANSWER_LIMIT).await?,
        };
        let exchange = async {
            let mut answer = self.read(&mut connection, identity.as_deref(), &asking.horizon).await?;
            if self.change(&mut connection, asking, identity.as_deref(), &answer).await? {
                answer = self.read(&mut connection, identity.as_deref(), &asking.horizon).await?;
            }
            Ok(answer)
        };
        let answer = match tokio::time::timeout(ANSWER_LIMIT, exchange).await {
            Ok(Ok(answer)) => answer,
            outcome => {
                connection.close();
                return outcome.unwrap_or(Err(sqlx::Error::PoolTimedOut)).map(|_: Answer| ());
            }
        };
        // A session that only reads would go on to do so.
        if self.keeps_connection && !answer.read_only {
            asking.connection = Some(connection);
        }
        let has_new = [self.deleted.learn(&answer.deleted), self.ended.learn(&answer.ended)];
        if has_new.contains(&true) {
            self.refused.send_replace(());
        }
        asking.horizon.clone_from(&answer.horizon);
        self.publish(asked, live.map_or(0, |live| live.generation), answer);
        Ok(())
    }

    async fn read(
        &self,
        connection: &mut PgConnection,
        identity: Option<&str>,
        horizon: &str,
    ) -> Result<Answer, sqlx::Error> {
        let query = sqlx::query_as!(
            Answer,
            r#"SELECT current_setting('transaction_read_only')::boolean AS "read_only!",
                      server.epoch || '.' || coalesce(w.epoch, 0) AS "epoch!",
                      w.redis IS NULL AS "unclaimed!",
                      coalesce(w.redis = $1, false) AS "ours!",
                      coalesce(w.suspended_until > clock_timestamp()
                               AND w.suspended_until < clock_timestamp() + make_interval(secs => $2), false) AS "suspended!",
                      coalesce(w.settled = server.epoch || '.' || w.epoch, false) AS "settled!",
                      pg_snapshot_xmin(pg_current_snapshot())::text AS "horizon!",
                      ARRAY(SELECT user_id FROM deleted_users WHERE xact >= $3::text::xid8) AS "deleted!",
                      ARRAY(SELECT session_id FROM ended_sessions WHERE xact >= $3::text::xid8) AS "ended!"
               FROM (VALUES ((extract(epoch FROM pg_postmaster_start_time()) * 1000000)::bigint)) AS server (epoch)
               LEFT JOIN window_suspension w ON true"#,
            identity,
            SUSPENSION_MAX.as_secs_f64(),
            horizon,
        );
        let mut answer = self.database.run(Operation::ReadPermission, query.fetch_one(connection)).await?;
        answer.ours |= identity.is_some() && failpoints::is_on(Failpoint::IgnoreRedisIdentity);
        Ok(answer)
    }

    /// Changes the row if this replica must; true if it did.
    async fn change(
        &self,
        connection: &mut PgConnection,
        asking: &mut Asking,
        identity: Option<&str>,
        answer: &Answer,
    ) -> Result<bool, sqlx::Error> {
        let is_due = asking.suspended.is_none_or(|at| at.elapsed() >= RENEWAL);
        let changed = match identity {
            _ if answer.read_only => return Ok(false),
            // Nobody has ever had a permission.
            Some(identity) if answer.unclaimed => {
                let query = sqlx::query!(
                    "INSERT INTO window_suspension AS held (suspended_until, epoch, redis, settled)
                     VALUES ('-infinity', 1, $1, $2 || '.1')
                     ON CONFLICT (only_row) DO UPDATE
                     SET epoch = held.epoch + 1, redis = excluded.redis, settled = $2 || '.' || held.epoch + 1
                     WHERE held.redis IS NULL",
                    identity,
                    answer.epoch.split('.').next(),
                );
                self.database.run(Operation::ChangePermission, query.execute(connection)).await
            }
            Some(_) if answer.ours => {
                if answer.settled || answer.suspended || !self.is_over(&answer.epoch) {
                    return Ok(false);
                }
                let query = sqlx::query!(
                    "UPDATE window_suspension SET settled = $1 WHERE epoch = split_part($1, '.', 2)::bigint",
                    answer.epoch,
                );
                self.database.run(Operation::ChangePermission, query.execute(connection)).await
            }
            _ if answer.suspended && !is_due => return Ok(false),
            identity => {
                let query = sqlx::query!(
                    "INSERT INTO window_suspension AS held (suspended_until, epoch, redis)
                     VALUES (clock_timestamp() + make_interval(secs => $1), 1, $2)
                     ON CONFLICT (only_row) DO UPDATE
                     SET suspended_until = excluded.suspended_until,
                         epoch = held.epoch + 1,
                         redis = coalesce(excluded.redis, held.redis)",
                    SUSPENSION.as_secs_f64(),
                    identity,
                );
                asking.suspended = Some(Instant::now());
                let span = tracing::info_span!(target: trace::BACKGROUND, "suspend windows");
                self.database
                    .run(Operation::ChangePermission, query.execute(connection))
                    .instrument(span)
                    .await
            }
        };
        changed.map(|_| true)
    }

    /// True if this replica has seen for long enough that the epoch is no longer suspended.
    fn is_over(&self, epoch: &str) -> bool {
        self.view.borrow().as_ref().is_some_and(|view| {
            matches!(&view.state, State::Settling(known) if **known == *epoch)
                && view.since.elapsed() >= SETTLING
                && view.asked.elapsed() < PERMISSION
        })
    }

    /// Makes the answer the view that all requests see.
    fn publish(&self, asked: Instant, generation: u64, answer: Answer) {
        let is_usable = answer.settled || failpoints::is_on(Failpoint::IgnoreSuspension);
        let state = match () {
            () if answer.read_only => State::Neither,
            () if is_usable && answer.ours => {
                State::Usable(match failpoints::is_on(Failpoint::IgnoreEpoch) {
                    true => "any".into(),
                    false => answer.epoch.into(),
                })
            }
            () if answer.settled => State::Neither,
            () if answer.suspended => State::Suspended,
            () => State::Settling(answer.epoch.into()),
        };
        // What an answer says was true no later than when it came.
        let answered = Instant::now();
        self.view.send_modify(|view| {
            let since = match view {
                // Two answers that are further apart may hide a change and its opposite.
                Some(before) if before.state == state && asked - before.asked < PERMISSION => before.since,
                _ => answered,
            };
            *view = Some(View { asked, generation, state, since });
        });
    }
}

impl std::fmt::Debug for Permission {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Permission").field("view", &*self.view.borrow()).finish_non_exhaustive()
    }
}
