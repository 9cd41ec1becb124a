//! One client's stream: its events in order, as fast as the client takes them.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use tokio::time::{Instant, Sleep, sleep_until};
use uuid::Uuid;

use super::catch_up::{self, Missed};
use super::mailbox::{Delivery, EndReason, Kind, Mail};
use super::position::{Position, Refused, Within};
use super::registry::{Registered, Streams, fraction};
use super::start::{self, ReadError, Seen};
use crate::failpoints::{self, Failpoint};
use crate::telemetry::metrics::{StreamEnd, StreamOpened};
use crate::workers::ConnectionHandle;

/// A comment goes out this often, so that proxies and clients see that the connection lives.
const HEARTBEAT: Duration = Duration::from_secs(14);

/// A stream ends after at least this part of its longest life, so that those that began together do not end together.
const SHORTEST_LIFE: f64 = 0.75;

/// The longest delay that a client is asked to wait before it comes back.
const RETRY_MAX: Duration = Duration::from_secs(3);

/// Before Postgres is asked again for what was missed.
const CATCH_UP_RETRY: Duration = Duration::from_secs(1);

/// Why a stream does not begin.
#[derive(thiserror::Error, Debug)]
pub(crate) enum StreamError {
    #[error("the user was deleted")]
    UserGone,
    #[error("Postgres is unavailable, or only reads")]
    Unavailable,
    #[error(transparent)]
    Database(#[from] sqlx::Error),
}

impl From<ReadError> for StreamError {
    fn from(error: ReadError) -> Self {
        match error {
            ReadError::Database(error) => Self::Database(error),
            ReadError::OnlyReads | ReadError::Unreadable => Self::Unavailable,
        }
    }
}

/// What a client asks for.
#[derive(Debug)]
pub(crate) struct Request {
    pub(crate) user: Uuid,
    pub(crate) session: Uuid,
    /// When its token expires.
    pub(crate) expires: Instant,
    /// Where it stands.
    pub(crate) position: Option<String>,
    /// To close when the client does not read.
    pub(crate) connection: Option<ConnectionHandle>,
}

/// What a client gets.
#[derive(Debug)]
pub(crate) enum Event {
    Ready {
        position: String,
        resumed: bool,
    },
    Reset {
        position: String,
        reason: &'static str,
    },
    Message {
        position: String,
        json: Vec<u8>,
    },
    /// Messages lost their content.
    Erased {
        position: String,
        json: Vec<u8>,
    },
    /// The stream lives.
    Heartbeat,
    /// The last one. The client may come back after `retry`.
    End {
        reason: &'static str,
        retry: Duration,
    },
}

type CatchUp = BoxFuture<'static, Result<Missed, ReadError>>;

pub(crate) struct Stream(State);

enum State {
    Refused(EndReason),
    Open(Box<Open>),
    Ended,
}

struct Open {
    mailbox: Registered,
    position: Position,
    /// Not told yet.
    first: Option<First>,
    mail: Mail,
    missed: Option<Missed>,
    catching_up: Option<CatchUp>,
    /// When Postgres may be asked again.
    retry_at: Option<Instant>,
    heartbeat_at: Instant,
    ends: (EndReason, Instant),
    timer: Pin<Box<Sleep>>,
    ended: Option<StreamEnd>,
}

/// What the first event says.
struct First {
    resumed: bool,
    refused: Option<Refused>,
}

impl Stream {
    /// Begins a stream. Its first event says where it stands, or why it ends at once.
    pub(crate) async fn open(streams: &Arc<Streams>, request: Request) -> Result<Self, StreamError> {
        let user = request.user;
        let mailbox = match streams.register(user, request.session, request.connection) {
            Ok(mailbox) => mailbox,
            Err(reason) => {
                streams.metrics.stream_opened(StreamOpened::Refused);
                return Ok(Self(State::Refused(reason)));
            }
        };
        let given = request.position.map(|text| Position::decode(&text, user));
        let position = given.as_ref().and_then(|given| given.as_ref().ok());
        let start = start::of_session(&streams.database, user, request.session, position).await?;
        if !start.user_exists {
            return Err(StreamError::UserGone);
        }
        let Seen { epoch, snapshot } = start.seen;
        let now = Position { user, epoch, seen: (*snapshot).clone(), within: None };
        let (opened, position, refused) = match given {
            None => (StreamOpened::New, now, None),
            Some(Err(refused)) => (StreamOpened::Reset, now, Some(refused)),
            Some(Ok(position)) if position.epoch != epoch => (StreamOpened::Reset, now, Some(Refused::Epoch)),
            Some(Ok(_)) if start.has_lost => (StreamOpened::Reset, now, Some(Refused::TooOld)),
            Some(Ok(position)) => (StreamOpened::Resumed, position, None),
        };
        streams.metrics.stream_opened(opened);
        Ok(Self::begin(mailbox, position, opened == StreamOpened::Resumed, refused, request.expires))
    }

    fn begin(
        mailbox: Registered,
        position: Position,
        resumed: bool,
        refused: Option<Refused>,
        expires: Instant,
    ) -> Self {
        let now = Instant::now();
        let life = mailbox.streams.lifetime.mul_f64(SHORTEST_LIFE + (1.0 - SHORTEST_LIFE) * fraction());
        let ends = match now + life {
            end if end < expires => (EndReason::Lifetime, end),
            _ => (EndReason::Expired, expires),
        };
        let mail = Mail { missed: resumed, ..Mail::default() };
        let heartbeat_at = now + HEARTBEAT.mul_f64(fraction());
        Self(State::Open(Box::new(Open {
            mailbox,
            position: if resumed { shifted(position) } else { position },
            first: Some(First { resumed, refused }),
            mail,
            missed: None,
            catching_up: None,
            retry_at: None,
            heartbeat_at,
            ends,
            timer: Box::pin(sleep_until(heartbeat_at.min(ends.1))),
            ended: None,
        })))
    }
}

impl futures_util::Stream for Stream {
    type Item = Event;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Event>> {
        let event = match &mut self.0 {
            State::Ended => None,
            State::Refused(reason) => Some(end(*reason)),
            State::Open(open) => Some(ready!(open.next(context))),
        };
        if matches!(event, Some(Event::End { .. })) {
            self.0 = State::Ended;
        }
        Poll::Ready(event)
    }
}

impl Open {
    fn next(&mut self, context: &mut Context<'_>) -> Poll<Event> {
        if let Some(First { resumed, refused }) = self.first.take() {
            let position = self.position.encode();
            return Poll::Ready(match refused {
                None => Event::Ready { position, resumed },
                Some(refused) => Event::Reset { position, reason: refused.into() },
            });
        }
        if let Some(end) = self.mailbox.mailbox.wait(context)
            && end.1 < self.ends.1
        {
            self.ends = end;
        }
        loop {
            if let Some(event) = self.missed_message() {
                return Poll::Ready(event);
            }
            if let Some(event) = self.delivered_message() {
                return Poll::Ready(event);
            }
            if let Some(event) = self.due(context) {
                return Poll::Ready(event);
            }
            if self.mail.missed || self.catching_up.is_some() {
                ready!(self.catch_up(context));
                continue;
            }
            self.mail = self.mailbox.mailbox.take();
            if self.mail.messages.is_empty() && !self.mail.missed {
                return Poll::Pending;
            }
        }
    }

    /// Of those that were read for this stream alone.
    fn missed_message(&mut self) -> Option<Event> {
        let missed = self.missed.as_mut()?;
        let Some((position, kind, json)) = (!missed.messages.is_empty()).then(|| missed.messages.remove(0))
        else {
            self.position = missed.position.clone();
            self.mail.missed = !missed.is_all;
            self.missed = None;
            return None;
        };
        self.position = position;
        Some(self.event(kind, json, None))
    }

    /// Of those that the tail has read.
    fn delivered_message(&mut self) -> Option<Event> {
        if self.mail.missed || self.catching_up.is_some() {
            return None;
        }
        while let Some(message) = self.mail.messages.pop_front() {
            if !self.is_new(&message) {
                continue;
            }
            let Delivery { conversation, seq, until, .. } = &*message;
            let until = (**until).clone();
            self.position.within = Some(Within { until, conversation: *conversation, seq: *seq });
            return Some(self.event(message.kind, message.json.clone(), Some(message.committed)));
        }
        None
    }

    /// What was committed at this time, unless the stream had missed it.
    fn event(&self, kind: Kind, json: Vec<u8>, committed: Option<Instant>) -> Event {
        let position = self.position.encode();
        match kind {
            Kind::Message => {
                self.mailbox.streams.metrics.stream_message(committed.map(|at| at.elapsed()));
                Event::Message { position, json }
            }
            Kind::Erased => Event::Erased { position, json },
        }
    }

    /// False for what this stream has delivered before. Moves the position to the step that the message belongs to.
    fn is_new(&mut self, message: &Delivery) -> bool {
        if let Some(within) = self.position.within.take_if(|within| within.until != *message.until) {
            if !within.until.includes(&message.until) {
                self.position.seen = within.until;
            } else {
                self.position.within = Some(within);
            }
        }
        if self.position.seen.sees(message.xact) {
            return false;
        }
        match &self.position.within {
            None => true,
            Some(within) => {
                !within.until.sees(message.xact)
                    || (within.conversation, within.seq) < (message.conversation, message.seq)
            }
        }
    }

    /// Asks Postgres for what was missed, unless that has just failed.
    fn catch_up(&mut self, context: &mut Context<'_>) -> Poll<()> {
        if self.retry_at.is_some() {
            return Poll::Pending;
        }
        let streams = &self.mailbox.streams;
        let reading = self.catching_up.get_or_insert_with(|| {
            // Before the statement: what is dropped from the mailbox from now on, it sees.
            self.mail = Mail::default();
            let (database, from) = (streams.database.clone(), self.position.clone());
            let permits = Arc::clone(&streams.catching_up);
            streams.metrics.stream_catches_up();
            async move {
                let _permit = permits.acquire_owned().await.ok();
                catch_up::read(&database, from).await
            }
            .boxed()
        });
        let outcome = ready!(reading.as_mut().poll(context));
        self.catching_up = None;
        match outcome {
            // The client comes back, and gets a reset: its position is too old.
            Ok(missed) if missed.has_lost => self.ends = (EndReason::Lifetime, Instant::now()),
            Ok(missed) => self.missed = Some(missed),
            Err(error) => {
                tracing::debug!(error = error.to_string(), "a stream could not read what it missed");
                self.mail.missed = true;
                self.retry_at = Some(Instant::now() + CATCH_UP_RETRY);
            }
        }
        Poll::Ready(())
    }

    /// What the clock demands. The task is woken at the next of these times.
    fn due(&mut self, context: &mut Context<'_>) -> Option<Event> {
        loop {
            let now = Instant::now();
            let (reason, ends_at) = self.ends;
            if ends_at <= now {
                return Some(self.end(reason));
            }
            if self.heartbeat_at <= now {
                self.heartbeat_at = now + HEARTBEAT;
                return Some(Event::Heartbeat);
            }
            self.retry_at = self.retry_at.filter(|at| *at > now);
            let next = ends_at.min(self.heartbeat_at);
            let next = self.retry_at.map_or(next, |at| at.min(next));
            if self.timer.deadline() != next {
                self.timer.as_mut().reset(next);
            }
            if self.timer.as_mut().poll(context).is_pending() {
                return None;
            }
        }
    }

    fn end(&mut self, reason: EndReason) -> Event {
        self.ended = Some(reason.into());
        end(reason)
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        let otherwise = if self.mailbox.mailbox.is_slow() { StreamEnd::Slow } else { StreamEnd::Client };
        self.mailbox.streams.metrics.stream_ended(self.ended.unwrap_or(otherwise));
    }
}

fn end(reason: EndReason) -> Event {
    Event::End { reason: reason.into(), retry: RETRY_MAX.mul_f64(fraction()) }
}

/// The position itself, unless a test asks for another.
fn shifted(mut position: Position) -> Position {
    if failpoints::is_on(Failpoint::ResumeTooLate) {
        position.seen.next += 3;
    }
    if failpoints::is_on(Failpoint::ResumeTooEarly) {
        position.seen.next = position.seen.next.saturating_sub(3);
        position.seen.running.retain(|xact| *xact < position.seen.next);
        position.within = None;
    }
    position
}

impl std::fmt::Debug for Stream {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Stream").finish_non_exhaustive()
    }
}
