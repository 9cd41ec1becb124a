//! What one stream has yet to write: a few messages that were just read, or the note that it must read them itself.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Waker};
use std::time::Duration;

use tokio::time::Instant;
use uuid::Uuid;

use super::position::Snapshot;
use crate::telemetry::metrics::StreamEnd;
use crate::workers::ConnectionHandle;

/// A stream that is further behind reads from Postgres what it lacks, at its own pace. So its memory does not grow.
const MESSAGES_MAX: usize = 16;

/// How long a client may leave messages unread.
const WRITE_LIMIT: Duration = Duration::from_secs(5);

/// Why a stream ends. Its name is the `reason` of the event `end`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, strum::IntoStaticStr)]
#[strum(serialize_all = "snake_case")]
pub enum EndReason {
    /// The token has expired.
    Expired,
    /// The session has ended.
    Revoked,
    /// The user was deleted.
    Deleted,
    /// The process stops.
    Draining,
    /// The stream has lived for long enough, or a failover has ended its positions.
    Lifetime,
    /// The user, or the process, has too many.
    TooMany,
}

impl From<EndReason> for StreamEnd {
    fn from(reason: EndReason) -> Self {
        match reason {
            EndReason::Expired => Self::Expired,
            EndReason::Revoked => Self::Revoked,
            EndReason::Deleted => Self::Deleted,
            EndReason::Draining => Self::Draining,
            EndReason::Lifetime | EndReason::TooMany => Self::Lifetime,
        }
    }
}

/// What a client gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Message,
    /// Messages were erased.
    Erased,
}

/// A message that the tail has read, or the news that messages were erased.
#[derive(Debug)]
pub(super) struct Delivery {
    pub(super) kind: Kind,
    pub(super) conversation: Uuid,
    /// Its order in the conversation.
    pub(super) seq: i64,
    pub(super) json: Vec<u8>,
    /// The transaction that stored it.
    pub(super) xact: u64,
    /// What the statement saw that read it.
    pub(super) until: Arc<Snapshot>,
    /// When it was committed, by this process's clock.
    pub(super) committed: Instant,
}

/// What a stream does next.
#[derive(Debug, Default)]
pub(super) struct Mail {
    pub(super) messages: VecDeque<Arc<Delivery>>,
    /// There were others: read from Postgres.
    pub(super) missed: bool,
}

#[derive(Debug, Default)]
struct State {
    mail: Mail,
    /// The stream is to end, and when.
    end: Option<(EndReason, Instant)>,
    waker: Option<Waker>,
    /// Since when there has been mail that the stream did not take.
    waiting: Option<Instant>,
    /// The client did not read for [`WRITE_LIMIT`].
    is_slow: bool,
}

#[derive(Debug)]
pub(super) struct Mailbox {
    /// Of the token that opened the stream.
    pub(super) session: Uuid,
    state: Mutex<State>,
    /// To close it when the client does not read.
    connection: Option<ConnectionHandle>,
}

impl Mailbox {
    pub(super) fn new(session: Uuid, connection: Option<ConnectionHandle>, missed: bool) -> Self {
        let mail = Mail { missed, ..Mail::default() };
        Self { session, state: Mutex::new(State { mail, ..State::default() }), connection }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn deliver(&self, message: &Arc<Delivery>) {
        let mut state = self.state();
        if !state.mail.missed && state.mail.messages.len() < MESSAGES_MAX {
            state.mail.messages.push_back(Arc::clone(message));
        } else {
            state.mail.messages = VecDeque::new();
            state.mail.missed = true;
        }
        state.notify();
    }

    /// Has the stream read from Postgres.
    pub(super) fn miss(&self) {
        let mut state = self.state();
        state.mail.messages = VecDeque::new();
        state.mail.missed = true;
        state.notify();
    }

    /// Has the stream end at this time, unless it is to end earlier.
    pub(super) fn end(&self, reason: EndReason, at: Instant) {
        let mut state = self.state();
        if state.end.is_none_or(|(_, earlier)| at < earlier) {
            state.end = Some((reason, at));
            state.notify();
        }
    }

    /// Has the task woken when there is more. Says whether and when the stream is to end.
    ///
    /// The client reads: hyper asks for no more of a body while its buffer is full.
    pub(super) fn wait(&self, context: &Context<'_>) -> Option<(EndReason, Instant)> {
        let mut state = self.state();
        state.waiting = None;
        if !state.waker.as_ref().is_some_and(|waker| waker.will_wake(context.waker())) {
            state.waker = Some(context.waker().clone());
        }
        state.end
    }

    /// What there is.
    pub(super) fn take(&self) -> Mail {
        std::mem::take(&mut self.state().mail)
    }

    /// Closes the connection of a client that does not read.
    pub(super) fn close_if_slow(&self, now: Instant) {
        let mut state = self.state();
        if !state.is_slow && state.waiting.is_some_and(|since| now - since >= WRITE_LIMIT) {
            state.is_slow = true;
            if let Some(connection) = &self.connection {
                connection.close();
            }
        }
    }

    pub(super) fn is_slow(&self) -> bool {
        self.state().is_slow
    }
}

impl State {
    fn notify(&mut self) {
        self.waiting.get_or_insert_with(Instant::now);
        if let Some(waker) = &self.waker {
            waker.wake_by_ref();
        }
    }
}
