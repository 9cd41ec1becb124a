//! Streams: every message that a user sends or receives, as it is committed, exactly once, on any replica.
//!
//! # Positions
//!
//! A position is a snapshot of Postgres: the set of transactions that had committed at one moment. Each message carries the
//! transaction that stored it (`messages.xact`). What a client lacks is what its position does not see and Postgres shows
//! now. Nothing has to be locked or counted for it when a message is sent, and it does not matter in which order
//! transactions commit: one that was running when the position was taken is named in it.
//!
//! In one conversation the messages that a snapshot does not see are always the newest ones, because the statement that
//! stores a message waits for the lock of the conversation's row, and so begins to store only when the one before has
//! committed. So what is delivered in the order of seq leaves no gap, across any number of snapshots.
//!
//! A position can lie between two snapshots: then it names both, and the last message delivered in the order of
//! conversation and seq. So a client that breaks off anywhere resumes behind the last message that it got.
//!
//! Transaction numbers mean something only to the server that counts them. A position names the server and its timeline,
//! which changes with a failover. After that, and in a database that was restored elsewhere, it is refused, and the client
//! reloads.
//!
//! # Delivery
//!
//! One task per replica, the [`tail`], keeps a snapshot. It asks Postgres for what the snapshot does not see, gives that to
//! the [`mailbox`] of each stream that it concerns, and keeps the newer snapshot. It asks when something was announced: by
//! this replica's writers, directly, or by others', through Redis. An announcement says only whose messages there are, so
//! nothing depends on it but the delay. The tail asks every few seconds anyway.
//!
//! *Why no message is missed or doubled.* A stream first opens its mailbox, and then takes its snapshot, or reads what it
//! missed, in a statement that begins later. So its own snapshot sees all that the tail's saw when the mailbox was opened,
//! and whatever it does not see comes into the mailbox. Of that it drops what its own snapshot sees. A mailbox holds few
//! messages; when there are more, or the tail cannot tell, it is emptied and marked, and the stream reads from Postgres from
//! its own position on.
//!
//! *Rejected*: a number per user, counted in the statement that stores a message (two more rows to lock and write for each
//! message, and senders to one user wait for one another); a sequence (its numbers commit out of order); the write-ahead log
//! (a slot that holds it back when nobody reads).

mod catch_up;
mod mailbox;
mod position;
mod start;
mod stream;
mod tail;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, Semaphore};
use tokio::time::Instant;
use uuid::Uuid;

use self::mailbox::Mailbox;
use self::position::Position;
pub(crate) use self::stream::{Event, Stream};
pub(crate) use self::tail::follow;
use self::tail::{Found, Seen, TailError};
use super::permission::Permission;
use crate::config::Config;
use crate::store::postgres::Database;
use crate::store::wake_ups::WakeUps;
use crate::telemetry::metrics::{Metrics, StreamEnd, StreamOpened};
use crate::workers::ConnectionHandle;

/// Streams that read at once what they missed, so that after an outage requests still find a connection to Postgres.
const CATCHING_UP_MAX: usize = 4;

/// How often clients are looked for that do not read.
const READERS_CHECKED: Duration = Duration::from_secs(1);

/// Why a stream ends. Its name is the `reason` of the event `end`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, strum::IntoStaticStr)]
#[strum(serialize_all = "snake_case")]
pub enum EndReason {
    /// The token has expired.
    Expired,
    /// The user was deleted.
    Deleted,
    /// The process stops.
    Draining,
    /// The stream has lived for long enough, or a failover has ended its positions.
    Lifetime,
    /// The user, or the process, has too many.
    TooMany,
}

/// Why a stream does not begin.
#[derive(thiserror::Error, Debug)]
pub enum StreamError {
    #[error("the user was deleted")]
    UserGone,
    #[error("Postgres is unavailable, or only reads")]
    Unavailable,
    #[error(transparent)]
    Database(#[from] sqlx::Error),
}

impl From<TailError> for StreamError {
    fn from(error: TailError) -> Self {
        match error {
            TailError::Database(error) => Self::Database(error),
            TailError::OnlyReads | TailError::Unreadable => Self::Unavailable,
        }
    }
}

/// What a client asks for.
#[derive(Debug)]
pub struct Request {
    pub user: Uuid,
    /// When its token expires.
    pub expires: Instant,
    /// Where it stands.
    pub position: Option<String>,
    /// To close when the client does not read.
    pub connection: Option<ConnectionHandle>,
}

/// All streams of this process.
pub struct Streams {
    state: Mutex<State>,
    /// Someone here has a new message.
    announced: Notify,
    wake_ups: Arc<WakeUps>,
    catching_up: Arc<Semaphore>,
    database: Database,
    permission: Arc<Permission>,
    metrics: Arc<Metrics>,
    per_user_max: usize,
    max: usize,
    lifetime: Duration,
}

#[derive(Default)]
struct State {
    mailboxes: HashMap<Uuid, Vec<Arc<Mailbox>>>,
    open: usize,
    /// What the tail saw last; `None` until Postgres has answered.
    seen: Option<Seen>,
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

    /// Begins a stream. Its first event says where it stands, or why it ends at once.
    pub async fn open(self: &Arc<Self>, request: Request) -> Result<Stream, StreamError> {
        let user = request.user;
        let mailbox = match self.register(user, request.connection) {
            Ok(mailbox) => Registered { streams: Arc::clone(self), user, mailbox },
            Err(reason) => {
                self.metrics.stream_opened(StreamOpened::Refused);
                return Ok(Stream::refused(reason));
            }
        };
        let start = start::of_user(&self.database, user).await?;
        if !start.user_exists {
            return Err(StreamError::UserGone);
        }
        let Seen { epoch, snapshot } = start.seen;
        let now = Position { user, epoch, seen: (*snapshot).clone(), within: None };
        let (opened, position, refused) = match request.position {
            None => (StreamOpened::New, now, None),
            Some(text) => match Position::decode(&text, user, epoch) {
                Ok(position) => (StreamOpened::Resumed, position, None),
                Err(refused) => (StreamOpened::Reset, now, Some(refused)),
            },
        };
        self.metrics.stream_opened(opened);
        Ok(Stream::begin(mailbox, position, opened == StreamOpened::Resumed, refused, request.expires))
    }

    /// Tells the streams that these users have new messages, here and on other replicas.
    pub(super) fn announce(&self, users: Vec<Uuid>) {
        self.wake(&users);
        self.wake_ups.publish(users);
    }

    /// A position as of an answer of Postgres: texts of `position_epoch()` and `pg_current_snapshot()`.
    pub(super) fn position(user: Uuid, epoch: &str, snapshot: &str) -> Option<String> {
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

    fn register(&self, user: Uuid, connection: Option<ConnectionHandle>) -> Result<Arc<Mailbox>, EndReason> {
        let mut state = self.state();
        if state.draining {
            return Err(EndReason::Draining);
        }
        let of_user = state.mailboxes.get(&user).map_or(0, Vec::len);
        if state.open >= self.max || of_user >= self.per_user_max {
            return Err(EndReason::TooMany);
        }
        // Without a snapshot of the tail nothing says what will come into the mailbox.
        let mailbox = Arc::new(Mailbox::new(connection, state.seen.is_none()));
        state.open += 1;
        self.wake_ups.want();
        state.mailboxes.entry(user).or_default().push(Arc::clone(&mailbox));
        Ok(mailbox)
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
        let state = self.state();
        if !state.mailboxes.is_empty() && users.iter().any(|user| state.mailboxes.contains_key(user)) {
            self.announced.notify_one();
        }
    }

    fn seen(&self) -> Option<Seen> {
        self.state().seen.clone()
    }

    fn has_any(&self) -> bool {
        self.state().open > 0
    }

    /// The tail begins anew, on a server that it did not follow before.
    fn begin(&self, now: Seen) {
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
    fn skip_to(&self, now: Seen) {
        let mut state = self.state();
        state.seen = Some(now);
        state.mailboxes.values().flatten().for_each(|mailbox| mailbox.miss());
    }

    /// Gives each stream what concerns it. Returns how many messages for streams here are older than `announced_within`.
    fn distribute(&self, found: Found, announced_within: Duration) -> u64 {
        let mut state = self.state();
        if let Some(seen) = &mut state.seen {
            seen.snapshot = found.until;
        }
        let Some(messages) = found.messages else {
            state.mailboxes.values().flatten().for_each(|mailbox| mailbox.miss());
            return 0;
        };
        let mut late = 0;
        for read in messages {
            let mut is_wanted = false;
            for user in [read.pair.low(), read.pair.high()] {
                for mailbox in state.mailboxes.get(&user).into_iter().flatten() {
                    mailbox.deliver(&read.message);
                    is_wanted = true;
                }
            }
            late += u64::from(is_wanted && read.message.committed.elapsed() > announced_within);
        }
        late
    }

    fn count_gaps(&self, messages: u64) {
        self.metrics.stream_gaps(messages);
    }
}

/// A mailbox that the tail fills, until this is dropped.
struct Registered {
    streams: Arc<Streams>,
    user: Uuid,
    mailbox: Arc<Mailbox>,
}

impl Drop for Registered {
    fn drop(&mut self) {
        self.streams.remove(self.user, &self.mailbox);
    }
}

/// A random number from 0 to 1.
fn fraction() -> f64 {
    rand::random()
}

impl From<EndReason> for StreamEnd {
    fn from(reason: EndReason) -> Self {
        match reason {
            EndReason::Expired => Self::Expired,
            EndReason::Deleted => Self::Deleted,
            EndReason::Draining => Self::Draining,
            EndReason::Lifetime | EndReason::TooMany => Self::Lifetime,
        }
    }
}

impl std::fmt::Debug for Streams {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Streams").field("open", &self.open_count()).finish_non_exhaustive()
    }
}
