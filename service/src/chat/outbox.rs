//! Group commit: one statement commits a message together with all messages that gathered while the previous statement
//! ran.
//!
//! A commit costs a flush of the write-ahead log whether it carries one row or two hundred, so under load this is many
//! times faster than a statement per request. Nothing waits for a batch to fill, so a single message is committed as
//! fast as it would be without batches.
//!
//! A conversation always has the same writer, chosen by a hash of its users' ids. So within one process its messages
//! stay in order and never wait for one another's row lock. Between replicas the lock on the conversation's row decides
//! the order; every statement takes its locks in the same order, so none can deadlock.

use std::collections::{HashSet, VecDeque};
use std::hash::{BuildHasher as _, BuildHasherDefault, DefaultHasher};
use std::sync::Arc;
use std::time::Duration;

use sqlx::{Connection as _, PgConnection};
use time::OffsetDateTime;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;
use uuid::Uuid;

use super::message::{Message, Pair, RenderedMessage};
use super::recent::Recent;
use super::streams::Streams;
use crate::config::Config;
use crate::failpoints::{self, Failpoint};
use crate::store::operation::Operation;
use crate::store::pool::Session;
use crate::store::pooler;
use crate::store::postgres::{
    Database, STATEMENT_MARGIN, is_conflict, is_unavailable, is_untranslatable, reason, violated_constraint,
};
use crate::telemetry::metrics::{Metrics, SendOutcome};
use crate::telemetry::trace::{self, Span};

/// While one writer waits for its flush, or for Redis, the other works. More writers only make the batches smaller, and
/// a statement of few rows costs more per row: with four, a message took half as much again of Postgres's time.
const WRITERS_MAX: u32 = 2;

/// Messages in one statement. Above some 250 rows the statement's own time outweighs the flush that is saved.
const BATCH_MAX: usize = 256;

/// Messages waiting for one writer: 4 full batches. With content of 4000 characters of 4 bytes that is 16 MB at most.
/// A client whose message does not fit gets 503 at once instead of a wait.
const QUEUE_MAX: usize = 1024;

/// A statement that lost a deadlock, or a race for an idempotency key, is repeated this often.
const ATTEMPTS_MAX: u32 = 3;

/// The name of the limit of new conversations in the metrics.
pub(crate) const NEW_CONVERSATIONS: &str = "new_conversations";

/// Pairs of which a writer remembers that their conversation has begun, 2 MB at most; above that the set starts anew. What it
/// does not know, the statement looks up.
const BEGUN_MAX: usize = 30_000;

/// A connection that was idle for longer is tested before messages depend on it.
const IDLE_BEFORE_PING: Duration = Duration::from_secs(1);

/// A batch joins a few keys to large tables. The primary keys are always right, whatever the statistics say of tables that
/// were empty a minute ago, and planning anew for each batch finds nothing better.
const PLAN_OF_SESSION: &str =
    "SET enable_seqscan = off; SET plan_cache_mode = force_generic_plan; SET jit = off";
/// The same for one transaction, which takes two more round trips for each batch.
const PLAN_OF_TRANSACTION: &str = "BEGIN; SET LOCAL enable_seqscan = off; \
     SET LOCAL plan_cache_mode = force_generic_plan; SET LOCAL jit = off";

/// A valid message that is not stored yet.
#[derive(Debug)]
pub struct Outgoing {
    pub sender: Uuid,
    pub session: Uuid,
    pub recipient: Uuid,
    pub content: String,
    pub key: Option<String>,
}

/// A committed message.
#[derive(Debug)]
pub struct Accepted {
    pub json: Vec<u8>,
    /// True if the idempotency key was known: this is the message that was stored under it.
    pub replayed: bool,
}

/// Why a message was not acknowledged.
#[derive(thiserror::Error, Debug)]
pub enum SendError {
    #[error("the sender was deleted, or the session has ended")]
    SenderGone,
    #[error("no such recipient")]
    NoSuchRecipient,
    #[error("the recipient has blocked the sender")]
    Blocked,
    #[error("the sender began too many conversations in this hour")]
    TooManyNewConversations { retry_after: Duration },
    #[error("the idempotency key stands for another message")]
    KeyReused,
    #[error("the queue is full")]
    QueueFull,
    /// Postgres became unavailable before it confirmed the commit.
    #[error("the message may or may not be stored")]
    OutcomeUnknown,
    /// The writer ended before it answered.
    #[error("the writer ended: the message may or may not be stored")]
    WriterEnded,
    #[error(transparent)]
    Database(#[from] sqlx::Error),
    #[error("{0}")]
    Internal(&'static str),
}

#[derive(Debug)]
pub struct Outbox {
    queues: Vec<mpsc::Sender<Entry>>,
    metrics: Arc<Metrics>,
}

#[derive(Debug)]
struct Entry {
    message: Outgoing,
    reply: oneshot::Sender<Result<Accepted, SendError>>,
    /// The request's span, where it is sampled.
    span: Option<Span>,
}

struct Writer {
    queue: mpsc::Receiver<Entry>,
    /// Taken but not yet written, oldest first.
    pending: VecDeque<Entry>,
    database: Database,
    /// Kept between batches: the pool's own check would cost each batch a round trip.
    connection: Option<WriterConnection>,
    last_used: Instant,
    statement_timeout: Duration,
    /// Conversations that a user may begin in an hour; 0 for any number.
    new_conversations_max: u32,
    /// Conversations that have begun: none of them counts as new. They are never removed.
    begun: HashSet<Pair>,
    recent: Arc<Recent>,
    streams: Arc<Streams>,
    metrics: Arc<Metrics>,
}

struct WriterConnection {
    connection: Session,
    /// Otherwise a pooler gives each transaction any session, and what one is left with becomes another client's.
    owns_session: bool,
}

/// What the limit of new conversations needs to know of a batch.
struct First {
    limit: u32,
    /// For each message whether it may begin a conversation.
    may_begin: Vec<bool>,
}

/// What a statement did with one message.
struct Row {
    sender_exists: bool,
    stored: Option<Stored>,
    /// For a known key: whether it stands for this very message.
    replay: Option<bool>,
    /// The recipient has blocked the sender.
    blocked: bool,
    /// Seconds until the sender may begin another conversation, where it is not stored for that.
    retry_after: Option<i64>,
}

struct Stored {
    id: Uuid,
    seq: i64,
    created_at: OffsetDateTime,
}

impl Outbox {
    /// Starts the writers. They end when `stop` is set and everything queued is written. A writer that ends earlier has
    /// failed, and the process should end, too.
    pub fn start(
        config: &Config,
        database: &Database,
        recent: &Arc<Recent>,
        streams: &Arc<Streams>,
        metrics: &Arc<Metrics>,
        stop: &watch::Receiver<bool>,
    ) -> (Self, JoinSet<()>) {
        // Readers must find a connection, however few there are.
        let writers = (config.db_pool_max / 2).clamp(1, WRITERS_MAX);
        let mut tasks = JoinSet::new();
        let queues = (0..writers)
            .map(|_| {
                let (sender, queue) = mpsc::channel(QUEUE_MAX);
                let writer = Writer {
                    queue,
                    pending: VecDeque::new(),
                    database: database.clone(),
                    connection: None,
                    last_used: Instant::now(),
                    statement_timeout: config.statement_timeout() + STATEMENT_MARGIN,
                    new_conversations_max: config.new_conversations_per_hour,
                    begun: HashSet::new(),
                    recent: Arc::clone(recent),
                    streams: Arc::clone(streams),
                    metrics: Arc::clone(metrics),
                };
                tasks.spawn(writer.run(stop.clone()));
                sender
            })
            .collect();
        (Self { queues, metrics: Arc::clone(metrics) }, tasks)
    }

    /// Commits the message and returns it. The message is committed or not stored at all, also if the caller stops
    /// waiting. A caller that does not learn which of the two may repeat it under its key.
    pub async fn send(&self, message: Outgoing) -> Result<Accepted, SendError> {
        let pair = Pair::new(message.sender, message.recipient);
        let hash = BuildHasherDefault::<DefaultHasher>::default().hash_one(pair);
        let queue = &self.queues[hash as usize % self.queues.len()];
        let (reply, answer) = oneshot::channel();
        if queue.try_send(Entry { message, reply, span: trace::current() }).is_err() {
            self.metrics.message_sent(SendOutcome::Refused);
            return Err(SendError::QueueFull);
        }
        let answer = answer.await.unwrap_or(Err(SendError::WriterEnded));
        self.metrics.message_sent(match &answer {
            Ok(accepted) if accepted.replayed => SendOutcome::Replayed,
            Ok(_) => SendOutcome::Stored,
            Err(
                SendError::SenderGone
                | SendError::NoSuchRecipient
                | SendError::Blocked
                | SendError::TooManyNewConversations { .. }
                | SendError::KeyReused,
            ) => SendOutcome::Rejected,
            Err(_) => SendOutcome::Failed,
        });
        if let Err(SendError::TooManyNewConversations { .. }) = answer {
            self.metrics.rate_limited(NEW_CONVERSATIONS);
        }
        answer
    }

    /// Messages that may wait for a writer.
    pub fn capacity(&self) -> usize {
        self.queues.iter().map(mpsc::Sender::max_capacity).sum()
    }

    /// Messages waiting for a writer.
    pub fn depth(&self) -> usize {
        self.queues.iter().map(|queue| queue.max_capacity() - queue.capacity()).sum()
    }
}

impl Writer {
    async fn run(mut self, mut stop: watch::Receiver<bool>) {
        loop {
            let mut taken = Vec::new();
            if self.pending.is_empty() {
                tokio::select! {
                    biased;
                    _ = stop.wait_for(|stop| *stop), if !self.queue.is_closed() => {
                        // Queued messages are still written; new ones are refused.
                        self.queue.close();
                        continue;
                    }
                    count = self.queue.recv_many(&mut taken, BATCH_MAX) => {
                        if count == 0 {
                            return;
                        }
                    }
                }
            }
            self.pending.extend(taken);
            let batch = take_batch(&mut self.pending);
            if !batch.is_empty() {
                self.write(batch).await;
            }
        }
    }

    /// Writes a batch and answers its requests.
    async fn write(&mut self, batch: Vec<Entry>) {
        let span = trace::batch(batch.iter().filter_map(|entry| entry.span.as_ref()), batch.len());
        let (messages, replies): (Vec<_>, Vec<_>) =
            batch.into_iter().map(|entry| (entry.message, entry.reply)).unzip();
        self.metrics.batch_written(messages.len());
        let answers = trace::under(span.as_ref(), self.commit(messages)).await;
        // Before the answers, so that the batch's span ends before its requests' spans.
        drop(span);
        for (reply, answer) in replies.into_iter().zip(answers) {
            reply.send(answer).ok();
        }
        if failpoints::is_on(Failpoint::AckBeforeCommit)
            && let Some(connection) = &mut self.connection
        {
            tokio::time::sleep(Duration::from_millis(20)).await;
            sqlx::raw_sql("COMMIT").execute(&mut *connection.connection).await.ok();
        }
    }

    /// Stores a batch and adds it to the windows; the answers have the messages' order.
    async fn commit(&mut self, messages: Vec<Outgoing>) -> Vec<Result<Accepted, SendError>> {
        let users: Vec<Uuid> =
            messages.iter().flat_map(|message| [message.sender, message.recipient]).collect();
        if failpoints::is_on(Failpoint::PublishBeforeCommit) {
            self.streams.announce(users.clone());
        }
        let outcomes = self.store(&messages).await;
        if !failpoints::is_on(Failpoint::SkipWakeUp) && !failpoints::is_on(Failpoint::PublishBeforeCommit) {
            self.streams.announce(users);
        }
        let mut committed = Vec::with_capacity(messages.len());
        let mut answers = Vec::with_capacity(messages.len());
        for (message, outcome) in messages.into_iter().zip(outcomes) {
            let pair = Pair::new(message.sender, message.recipient);
            if outcome.as_ref().is_ok_and(|row| row.stored.is_some()) {
                self.note_begun(pair);
            }
            answers.push(outcome.and_then(|row| resolve(message, row)).map(|(message, replayed)| {
                // A replay, too: its writer may have died between the commit and the append.
                if !replayed || !failpoints::is_on(Failpoint::SkipReplay) {
                    committed.push((pair, message.clone()));
                }
                Accepted { json: message.json, replayed }
            }));
        }
        if !committed.is_empty() && self.recent.append(&runs(committed)).await.is_err() {
            // A window may be in use that lacks them.
            for answer in &mut answers {
                if answer.is_ok() {
                    *answer = Err(SendError::OutcomeUnknown);
                }
            }
        }
        answers
    }

    fn note_begun(&mut self, pair: Pair) {
        if self.new_conversations_max == 0 {
            return;
        }
        if self.begun.len() >= BEGUN_MAX {
            self.begun.clear();
        }
        self.begun.insert(pair);
    }

    /// One statement for all messages. If it fails and certainly committed nothing, one statement for each, so that one
    /// bad message does not fail the others.
    async fn store(&mut self, messages: &[Outgoing]) -> Vec<Result<Row, SendError>> {
        match self.store_together(messages).await {
            Ok(rows) => rows.into_iter().map(Ok).collect(),
            // A text that the database cannot hold fails only its own message.
            Err(error) if is_unavailable(&error) && (messages.len() == 1 || !is_untranslatable(&error)) => {
                tracing::debug!(
                    error = reason(&error),
                    messages = messages.len(),
                    "messages were not stored"
                );
                messages.iter().map(|_| Err(SendError::OutcomeUnknown)).collect()
            }
            Err(error) if messages.len() == 1 => {
                tracing::error!(error = reason(&error), "a message could not be stored");
                vec![Err(SendError::Internal("the message could not be stored"))]
            }
            Err(error) => {
                tracing::warn!(
                    error = reason(&error),
                    messages = messages.len(),
                    "a batch failed: storing it one by one"
                );
                let mut outcomes = Vec::with_capacity(messages.len());
                for message in messages {
                    let outcome = self.store_together(std::slice::from_ref(message)).await;
                    outcomes.push(outcome.map_err(SendError::from).and_then(|mut rows| {
                        rows.pop().ok_or(SendError::Internal("a statement lost a message"))
                    }));
                }
                outcomes
            }
        }
    }

    async fn store_together(&mut self, messages: &[Outgoing]) -> Result<Vec<Row>, sqlx::Error> {
        let mut attempt = 1;
        loop {
            let outcome = self.execute(messages).await;
            match outcome {
                Err(error) if attempt < ATTEMPTS_MAX && lost_a_race(&error) => attempt += 1,
                outcome => return outcome,
            }
        }
    }

    /// Runs the statement within its timeout. A connection that may be broken is closed.
    async fn execute(&mut self, messages: &[Outgoing]) -> Result<Vec<Row>, sqlx::Error> {
        let timeout = self.statement_timeout;
        let limit = self.new_conversations_max;
        let is_new = |message: &Outgoing| {
            limit > 0 && !self.begun.contains(&Pair::new(message.sender, message.recipient))
        };
        let first = First { limit, may_begin: messages.iter().map(is_new).collect() };
        let work = async {
            let database = self.database.clone();
            let connection = self.ready_connection().await?;
            database.run(Operation::StoreMessages, insert(connection, messages, &first)).await
        };
        let outcome = tokio::time::timeout(timeout, work).await.unwrap_or(Err(sqlx::Error::PoolTimedOut));
        self.last_used = Instant::now();
        if outcome.as_ref().is_err_and(is_unavailable)
            && let Some(writer) = self.connection.take()
        {
            writer.connection.close();
        }
        outcome
    }

    async fn ready_connection(&mut self) -> Result<&mut WriterConnection, sqlx::Error> {
        if let Some(writer) = &mut self.connection
            && self.last_used.elapsed() > IDLE_BEFORE_PING
            && writer.connection.ping().await.is_err()
            && let Some(writer) = self.connection.take()
        {
            writer.connection.close();
        }
        if self.connection.is_none() {
            let mut connection = self.database.acquire().await?;
            let owns_session = pooler::is_own_session(&mut connection).await?;
            if owns_session {
                sqlx::raw_sql(PLAN_OF_SESSION).execute(&mut *connection).await?;
            }
            self.connection = Some(WriterConnection { connection, owns_session });
        }
        self.connection.as_mut().ok_or(sqlx::Error::PoolClosed)
    }
}

/// The next batch: the oldest messages whose clients still wait. Of several under the same key only the first is taken,
/// because a statement cannot see the rows that it inserts itself.
fn take_batch(pending: &mut VecDeque<Entry>) -> Vec<Entry> {
    let mut keys = HashSet::new();
    let mut batch = Vec::with_capacity(pending.len());
    let mut deferred = VecDeque::new();
    for entry in pending.drain(..) {
        if entry.reply.is_closed() {
            continue;
        }
        let key = entry.message.key.clone().map(|key| (entry.message.sender, key));
        if key.is_none_or(|key| keys.insert(key)) {
            batch.push(entry);
        } else {
            deferred.push_back(entry);
        }
    }
    *pending = deferred;
    batch
}

/// The messages by conversation, in runs of consecutive seqs. The runs may have gaps between them: when a batch was
/// stored one by one, another replica may have stored messages in between, and a replay may be any earlier message.
fn runs(mut messages: Vec<(Pair, RenderedMessage)>) -> Vec<(Pair, Vec<RenderedMessage>)> {
    messages.sort_unstable_by_key(|(pair, message)| (pair.low(), pair.high(), message.seq));
    messages.dedup_by_key(|(pair, message)| (*pair, message.seq));
    let mut runs: Vec<(Pair, Vec<RenderedMessage>)> = Vec::new();
    for (pair, message) in messages {
        match runs.last_mut() {
            Some((last, run))
                if *last == pair && run.last().is_some_and(|end| end.seq + 1 == message.seq) =>
            {
                run.push(message);
            }
            _ => runs.push((pair, vec![message])),
        }
    }
    runs
}

/// The message that a statement's row stands for and whether it is a replay, or why there is none.
fn resolve(message: Outgoing, row: Row) -> Result<(RenderedMessage, bool), SendError> {
    match row {
        Row { sender_exists: false, .. } => Err(SendError::SenderGone),
        Row { stored: None, blocked: true, .. } => Err(SendError::Blocked),
        Row { stored: None, retry_after: Some(seconds), .. } => Err(SendError::TooManyNewConversations {
            retry_after: Duration::from_secs(seconds.unsigned_abs()),
        }),
        Row { stored: None, .. } => Err(SendError::NoSuchRecipient),
        Row { replay: Some(false), .. } => Err(SendError::KeyReused),
        Row { stored: Some(Stored { id, seq, created_at }), replay, .. } => {
            let Outgoing { sender: sender_id, recipient: recipient_id, content, .. } = message;
            let message = Message::new(id, seq, [sender_id, recipient_id], content, created_at);
            Ok((message.render(), replay.is_some()))
        }
    }
}

/// True if a repetition may succeed: after a deadlock, or when another request stores a message under the same key, which
/// the repetition then finds.
fn lost_a_race(error: &sqlx::Error) -> bool {
    is_conflict(error) || violated_constraint(error) == Some("idempotency_keys_in_use")
}

/// Stores the messages of a batch and returns one row for each, in their order.
async fn insert(
    writer: &mut WriterConnection,
    messages: &[Outgoing],
    first: &First,
) -> Result<Vec<Row>, sqlx::Error> {
    if writer.owns_session {
        return insert_batch(&mut writer.connection, messages, first).await;
    }
    let mut transaction = writer.connection.begin_with(PLAN_OF_TRANSACTION).await?;
    match insert_batch(&mut transaction, messages, first).await {
        Ok(rows) => transaction.commit().await.map(|()| rows),
        // At once: until then it holds its locks, and the pooler's session.
        Err(error) => transaction.rollback().await.and(Err(error)),
    }
}

/// The statement is one transaction, or all of one. It locks the conversations in the order of their key. `seq` continues
/// from the locked row, so it has no gaps; `last_at` is read under that lock, so times follow `seq`. If another statement is
/// just inserting the same key, this one fails and is repeated.
async fn insert_batch(
    connection: &mut PgConnection,
    messages: &[Outgoing],
    first: &First,
) -> Result<Vec<Row>, sqlx::Error> {
    let ids: Vec<Uuid> = messages.iter().map(|_| Uuid::now_v7()).collect();
    let senders: Vec<Uuid> = messages.iter().map(|message| message.sender).collect();
    let recipients: Vec<Uuid> = messages.iter().map(|message| message.recipient).collect();
    let sessions: Vec<Uuid> = messages.iter().map(|message| message.session).collect();
    let contents: Vec<&str> = messages.iter().map(|message| message.content.as_str()).collect();
    let keys_count = !failpoints::is_on(Failpoint::IgnoreKey);
    let keys: Vec<Option<&str>> =
        messages.iter().map(|message| message.key.as_deref().filter(|_| keys_count)).collect();
    if failpoints::is_on(Failpoint::AckBeforeCommit) {
        sqlx::raw_sql("ROLLBACK; BEGIN").execute(&mut *connection).await?;
    }
    let query = sqlx::query_file!(
        "src/chat/outbox.sql",
        &ids,
        &senders,
        &recipients,
        &contents as _,
        &keys as _,
        &sessions,
        &first.may_begin,
        i64::from(first.limit) as _,
    );
    let rows = query.fetch_all(&mut *connection).await?;
    if rows.len() != messages.len() {
        return Err(sqlx::Error::Protocol(format!("{} messages gave {} rows", messages.len(), rows.len())));
    }
    Ok(rows
        .into_iter()
        .map(|row| Row {
            sender_exists: row.sender_exists,
            stored: match (row.id, row.seq, row.created_at) {
                (Some(id), Some(seq), Some(created_at)) => Some(Stored { id, seq, created_at }),
                _ => None,
            },
            replay: row.replay,
            blocked: row.blocked,
            retry_after: row.retry_after,
        })
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gap_in_the_seqs_begins_a_new_run() {
        let pairs = [Uuid::from_u128(1), Uuid::from_u128(2)].map(|user| Pair::new(user, Uuid::from_u128(3)));
        let message = |seq| RenderedMessage { seq, json: Vec::new() };
        let batch = [(0, 8), (1, 5), (0, 3), (0, 7), (1, 5), (0, 10)];
        let runs = runs(batch.map(|(pair, seq)| (pairs[pair], message(seq))).into());
        let seqs: Vec<(Pair, Vec<i64>)> = runs
            .into_iter()
            .map(|(pair, run)| (pair, run.into_iter().map(|message| message.seq).collect()))
            .collect();
        let expected =
            [(pairs[0], vec![3]), (pairs[0], vec![7, 8]), (pairs[0], vec![10]), (pairs[1], vec![5])];
        assert_eq!(seqs, expected);
    }
}
