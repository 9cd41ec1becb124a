//! The open streams of this process, and what reaches all of them: new messages, the end of the process.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, Semaphore};
use tokio::time::Instant;
use uuid::Uuid;

use super::mailbox::{Delivery, EndReason, Kind, Mailbox};
use super::position::{Position, Snapshot};
use super::start::{self, Seen};
use crate::chat::permission::Permission;
use crate::config::Config;
use crate::store::postgres::Database;
use crate::store::wake_ups::WakeUps;
use crate::telemetry::metrics::Metrics;
use crate::workers::ConnectionHandle;

/// Streams that read at once what they missed, so that after an outage requests still find a connection to Postgres.
const CATCHING_UP_MAX: usize = 4;

/// How often clients are looked for that do not read.
const READERS_CHECKED: Duration = Duration::from_secs(1);

/// A message and its two users, or what concerns one of them.
pub(super) struct Read {
    pub(super) users: [Option<Uuid>; 2],
    pub(super) message: Arc<Delivery>,
}

/// What a step found.
pub(super) struct Found {
    pub(super) until: Arc<Snapshot>,
    /// By conversation and seq. `None` if there were too many.
    pub(super) messages: Option<Vec<Read>>,
}

/// All streams of this process.
pub struct Streams {
    state: Mutex<State>,
    /// Someone here has a new message.
    pub(super) announced: Notify,
    pub(super) wake_ups: Arc<WakeUps>,
    pub(super) catching_up: Arc<Semaphore>,
    pub(super) database: Database,
    pub(super) permission: Arc<Permission>,
    pub(super) metrics: Arc<Metrics>,
    per_user_max: usize,
    max: usize,
    pub(super) lifetime: Duration,
}

#[derive(Default)]
struct State {
    mailboxes: HashMap<Uuid, Vec<Arc<Mailbox>>>,
    open: usize,
    /// What the tail saw last; `None` until Postgres has answered.
    seen: Option<Seen>,
    /// The first since the tail asked.
    first_announcement: Option<Instant>,
    draining: bool,
}

impl Streams {
    pub(crate) fn new(
        config: &Config,
        database: Database,
        permission: Arc<Permission>,
        wake_ups: Arc<WakeUps>,
        metrics: Arc<Metrics>,
    ) -> Arc<Self> {
        Arc::new(Self {
            state: Mutex::default(),
            announced: Notify::new(),
            wake_ups,
            catching_up: Arc::new(Semaphore::new(CATCHING_UP_MAX)),
            database,
            permission,
            metrics,
            per_user_max: config.streams_per_user_max as usize,
            max: config.streams_max as usize,
            lifetime: Duration::from_secs(config.stream_max_seconds.into()),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells the streams that these users have new messages, here and on other replicas.
    pub(in crate::chat) fn announce(&self, users: Vec<Uuid>) {
        self.wake(&users);
        self.wake_ups.publish(users);
    }

    /// A position as of an answer of Postgres: texts of `position_epoch()` and `pg_current_snapshot()`.
    pub(in crate::chat) fn position(user: Uuid, epoch: &str, snapshot: &str) -> Option<String> {
        let Seen { epoch, snapshot } = start::seen(epoch, snapshot)?;
        Some(Position { user, epoch, seen: (*snapshot).clone(), within: None }.encode())
    }

    /// Follows what other replicas announce, until the process ends.
    pub(crate) async fn listen(self: Arc<Self>) {
        loop {
            let users = self.wake_ups.next().await;
            self.wake(&users);
        }
    }

    /// Closes the connections of clients that do not read, until the process ends.
    pub(crate) async fn watch_readers(self: Arc<Self>) {
        loop {
            tokio::time::sleep(READERS_CHECKED).await;
            let now = Instant::now();
            self.state().mailboxes.values().flatten().for_each(|mailbox| mailbox.close_if_slow(now));
        }
    }

    /// Ends the streams of users who were deleted and of sessions that have ended, until the process ends. A stream that begins
    /// asks Postgres after it was registered, so it misses nothing.
    pub(crate) async fn watch_refused(self: Arc<Self>) {
        let mut refused = self.permission.watch_refused();
        while refused.changed().await.is_ok() {
            let now = Instant::now();
            for (user, mailboxes) in &self.state().mailboxes {
                let is_deleted = self.permission.is_deleted(*user);
                for mailbox in mailboxes {
                    if is_deleted {
                        mailbox.end(EndReason::Deleted, now);
                    } else if self.permission.has_ended(mailbox.session) {
                        mailbox.end(EndReason::Revoked, now);
                    }
                }
            }
        }
    }

    /// Ends all streams, spread over this time, and refuses new ones.
    pub fn drain(&self, over: Duration) {
        let now = Instant::now();
        let mut state = self.state();
        state.draining = true;
        for mailbox in state.mailboxes.values().flatten() {
            mailbox.end(EndReason::Draining, now + over.mul_f64(fraction()));
        }
    }

    /// Streams that are open now.
    pub fn open_count(&self) -> usize {
        self.state().open
    }

    pub fn max(&self) -> usize {
        self.max
    }

    /// A mailbox that the tail fills from now on, unless there are too many.
    pub(super) fn register(
        self: &Arc<Self>,
        user: Uuid,
        session: Uuid,
        connection: Option<ConnectionHandle>,
    ) -> Result<Registered, EndReason> {
        let mut state = self.state();
        if state.draining {
            return Err(EndReason::Draining);
        }
        let of_user = state.mailboxes.get(&user).map_or(0, Vec::len);
        if state.open >= self.max || of_user >= self.per_user_max {
            return Err(EndReason::TooMany);
        }
        // Without a snapshot of the tail nothing says what will come into the mailbox.
        let mailbox = Arc::new(Mailbox::new(session, connection, state.seen.is_none()));
        state.open += 1;
        self.wake_ups.want();
        state.mailboxes.entry(user).or_default().push(Arc::clone(&mailbox));
        Ok(Registered { streams: Arc::clone(self), user, mailbox })
    }

    fn remove(&self, user: Uuid, mailbox: &Arc<Mailbox>) {
        let mut state = self.state();
        if let Some(of_user) = state.mailboxes.get_mut(&user) {
            let before = of_user.len();
            of_user.retain(|other| !Arc::ptr_eq(other, mailbox));
            let (removed, is_empty) = (before - of_user.len(), of_user.is_empty());
            if is_empty {
                state.mailboxes.remove(&user);
            }
            state.open -= removed;
        }
    }

    fn wake(&self, users: &[Uuid]) {
        let mut state = self.state();
        if !state.mailboxes.is_empty() && users.iter().any(|user| state.mailboxes.contains_key(user)) {
            state.first_announcement.get_or_insert_with(Instant::now);
            self.announced.notify_one();
        }
    }

    /// When someone here was first announced a message since this was asked last; now, if nobody was.
    pub(super) fn take_first_announcement(&self) -> Instant {
        self.state().first_announcement.take().unwrap_or_else(Instant::now)
    }

    pub(super) fn seen(&self) -> Option<Seen> {
        self.state().seen.clone()
    }

    pub(super) fn has_any(&self) -> bool {
        self.state().open > 0
    }

    /// The tail begins anew, on a server that it did not follow before.
    pub(super) fn begin(&self, now: Seen) {
        let mut state = self.state();
        let is_other = state.seen.as_ref().is_some_and(|seen| seen.epoch != now.epoch);
        state.seen = Some(now);
        for mailbox in state.mailboxes.values().flatten() {
            match is_other {
                // Its positions mean nothing any more.
                true => mailbox.end(EndReason::Lifetime, Instant::now()),
                false => mailbox.miss(),
            }
        }
    }

    /// There was no stream. One that has begun since reads from Postgres.
    pub(super) fn skip_to(&self, now: Seen) {
        let mut state = self.state();
        state.seen = Some(now);
        state.mailboxes.values().flatten().for_each(|mailbox| mailbox.miss());
    }

    /// Gives each stream what concerns it. Returns how many messages for streams here were committed before `missed_before`.
    pub(super) fn distribute(&self, found: Found, missed_before: Option<Instant>) -> u64 {
        let mut state = self.state();
        if let Some(seen) = &mut state.seen {
            seen.snapshot = found.until;
        }
        let Some(messages) = found.messages else {
            state.mailboxes.values().flatten().for_each(|mailbox| mailbox.miss());
            return 0;
        };
        let mut missed = 0;
        for read in messages {
            let mut is_wanted = false;
            for user in read.users.into_iter().flatten() {
                for mailbox in state.mailboxes.get(&user).into_iter().flatten() {
                    mailbox.deliver(&read.message);
                    is_wanted = true;
                }
            }
            let is_late = missed_before.is_some_and(|before| read.message.committed < before);
            missed += u64::from(is_wanted && is_late && read.message.kind == Kind::Message);
        }
        missed
    }

    pub(super) fn count_gaps(&self, messages: u64) {
        self.metrics.stream_gaps(messages);
    }
}

/// A mailbox that the tail fills, until this is dropped.
pub(super) struct Registered {
    pub(super) streams: Arc<Streams>,
    pub(super) user: Uuid,
    pub(super) mailbox: Arc<Mailbox>,
}

impl Drop for Registered {
    fn drop(&mut self) {
        self.streams.remove(self.user, &self.mailbox);
    }
}

/// A random number from 0 to 1.
pub(super) fn fraction() -> f64 {
    rand::random()
}

impl std::fmt::Debug for Streams {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Streams").field("open", &self.open_count()).finish_non_exhaustive()
    }
}
