//! The group-commit writer: every message is committed by one statement together with all that gathered while
//! the previous statement ran.
//!
//! A commit costs a flush of the write-ahead log whether it carries one row or two hundred, so under load this
//! is many times faster than a statement per request; and because nothing waits for a batch to fill, a lone
//! message is committed as fast as it would be by itself.
//!
//! Conversations are spread over a few writers by their users' ids. Within one process a conversation's
//! messages so stay in order, and never wait for one another's row lock. Between replicas the lock on the
//! conversation's row decides; every statement takes its locks in the same order, so none can deadlock.

use std::collections::{HashSet, VecDeque};
use std::hash::{BuildHasher as _, BuildHasherDefault, DefaultHasher};
use std::sync::Arc;
use std::time::Duration;

use sqlx::pool::PoolConnection;
use sqlx::{Connection as _, Postgres};
use time::OffsetDateTime;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;
use uuid::Uuid;

use crate::call::Call;
use crate::config::Config;
use crate::db::Database;
use crate::error::{Error, is_unavailable};
use crate::messages::{Message, Pair};
use crate::metrics::{Metrics, SendOutcome};
use crate::recent::{Element, Recent};
use crate::sabotage::{self, Sabotage};
use crate::trace::{self, Span};
use crate::users::GONE;

/// While one writer waits for its flush, or tells the windows, the other works. More only make the batches smaller,
/// and a statement of few rows costs more for each: with four, a message took half as much again of Postgres's time.
const WRITERS_MAX: u32 = 2;

/// Messages in one statement. Past some 250 rows the statement's own time outweighs the flush that is saved.
const BATCH_MAX: usize = 256;

/// Messages waiting for one writer: at least 4 full batches. With content of 4000 characters of 4 bytes that is
/// 16 MB at the very most, and past it the client is told at once instead of being kept waiting.
const QUEUE_MAX: usize = 1024;

/// A statement that lost a deadlock, or a race for an idempotency key, is repeated this often.
const ATTEMPTS_MAX: u32 = 3;

/// A connection that has rested for longer is asked whether it still stands, before messages depend on it.
const IDLE_BEFORE_PING: Duration = Duration::from_secs(1);

const UNKNOWN_FATE: &str = "the database is away: the message may not have been stored, try again";

/// How much longer than Postgres itself the writer waits for a statement: for a Postgres that cannot answer.
const STATEMENT_MARGIN: Duration = Duration::from_secs(1);

/// A message that was checked, on its way into the database.
#[derive(Debug)]
pub struct Outgoing {
    pub sender: Uuid,
    pub recipient: Uuid,
    pub content: String,
    pub key: Option<String>,
}

/// A committed message.
#[derive(Debug)]
pub struct Accepted {
    pub json: Vec<u8>,
    /// True when the idempotency key was known, and this is the message that it stands for.
    pub replayed: bool,
}

#[derive(Debug)]
pub struct Outbox {
    queues: Vec<mpsc::Sender<Entry>>,
    metrics: Arc<Metrics>,
}

#[derive(Debug)]
struct Entry {
    message: Outgoing,
    reply: oneshot::Sender<Result<Accepted, Error>>,
    /// Of the request, where it is traced.
    span: Option<Span>,
}

struct Writer {
    queue: mpsc::Receiver<Entry>,
    /// Taken but not yet written, oldest first.
    pending: VecDeque<Entry>,
    database: Database,
    /// Kept between batches: the pool's own check would cost each batch a round trip.
    connection: Option<PoolConnection<Postgres>>,
    last_used: Instant,
    statement_timeout: Duration,
    recent: Arc<Recent>,
    metrics: Arc<Metrics>,
}

/// What a statement did with one message.
struct Row {
    sender_exists: bool,
    stored: Option<Stored>,
    /// For a known key: whether it stands for this very message.
    replay: Option<bool>,
}

struct Stored {
    id: Uuid,
    seq: i64,
    created_at: OffsetDateTime,
}

impl Outbox {
    /// Starts the writers. They end when `stop` is set and everything queued is written; one that ends earlier
    /// has failed, and the process should too.
    pub fn start(
        config: &Config,
        database: &Database,
        recent: &Arc<Recent>,
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
                    recent: Arc::clone(recent),
                    metrics: Arc::clone(metrics),
                };
                tasks.spawn(writer.run(stop.clone()));
                sender
            })
            .collect();
        (Self { queues, metrics: Arc::clone(metrics) }, tasks)
    }

    /// Commits the message and returns it. Once this was called the message is committed, or not at all,
    /// whatever becomes of the caller; a caller that does not learn which may repeat it under its key.
    pub async fn send(&self, message: Outgoing) -> Result<Accepted, Error> {
        let pair = Pair::new(message.sender, message.recipient);
        let hash = BuildHasherDefault::<DefaultHasher>::default().hash_one(pair);
        let queue = &self.queues[hash as usize % self.queues.len()];
        let (reply, answer) = oneshot::channel();
        if queue.try_send(Entry { message, reply, span: trace::current() }).is_err() {
            self.metrics.message_sent(SendOutcome::Refused);
            return Err(Error::Unavailable("too many messages are waiting to be stored: try again"));
        }
        let answer = answer.await.unwrap_or(Err(Error::Unavailable("the message was not stored: try again")));
        self.metrics.message_sent(match &answer {
            Ok(accepted) if accepted.replayed => SendOutcome::Replayed,
            Ok(_) => SendOutcome::Stored,
            Err(error) if error.status().is_server_error() => SendOutcome::Failed,
            Err(_) => SendOutcome::Rejected,
        });
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
                        // What is queued is still written; nothing new gets in.
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

    /// Writes a batch and answers everyone in it.
    async fn write(&mut self, batch: Vec<Entry>) {
        let span = trace::batch(batch.iter().filter_map(|entry| entry.span.as_ref()), batch.len());
        let (messages, replies): (Vec<_>, Vec<_>) =
            batch.into_iter().map(|entry| (entry.message, entry.reply)).unzip();
        self.metrics.batch_written(messages.len());
        let answers = trace::under(span.as_ref(), self.commit(messages)).await;
        // Before the answers, so that no batch outlives the requests that it belongs to.
        drop(span);
        for (reply, answer) in replies.into_iter().zip(answers) {
            reply.send(answer).ok();
        }
        if sabotage::is_on(Sabotage::AckBeforeCommit)
            && let Some(connection) = &mut self.connection
        {
            tokio::time::sleep(Duration::from_millis(20)).await;
            sqlx::raw_sql("COMMIT").execute(&mut **connection).await.ok();
        }
    }

    /// Stores a batch and brings it into the windows; the answers come in the messages' order.
    async fn commit(&mut self, messages: Vec<Outgoing>) -> Vec<Result<Accepted, Error>> {
        let outcomes = self.store(&messages).await;
        let mut shown = Vec::with_capacity(messages.len());
        let mut answers = Vec::with_capacity(messages.len());
        for (message, outcome) in messages.into_iter().zip(outcomes) {
            let pair = Pair::new(message.sender, message.recipient);
            answers.push(outcome.and_then(|row| judge(message, row)).map(|(element, replayed)| {
                // A replay, too: whoever committed it may have died before it told the window.
                if !replayed || !sabotage::is_on(Sabotage::SkipReplay) {
                    shown.push((pair, element.clone()));
                }
                Accepted { json: element.json, replayed }
            }));
        }
        if !shown.is_empty() {
            self.recent.append(&runs(shown)).await;
        }
        answers
    }

    /// One statement for all; when it fails without a doubt that nothing was committed, one for each, so that a
    /// message that cannot be stored does not take its neighbours with it.
    async fn store(&mut self, messages: &[Outgoing]) -> Vec<Result<Row, Error>> {
        match self.store_together(messages).await {
            Ok(rows) => rows.into_iter().map(Ok).collect(),
            Err(error) if is_unavailable(&error) => {
                tracing::debug!(%error, messages = messages.len(), "messages were not stored");
                messages.iter().map(|_| Err(Error::Unavailable(UNKNOWN_FATE))).collect()
            }
            Err(error) if messages.len() == 1 => {
                tracing::error!(%error, "a message could not be stored");
                vec![Err(Error::internal("the message could not be stored"))]
            }
            Err(error) => {
                tracing::warn!(%error, messages = messages.len(), "a batch failed: storing it one by one");
                let mut outcomes = Vec::with_capacity(messages.len());
                for message in messages {
                    let outcome = self.store_together(std::slice::from_ref(message)).await;
                    outcomes.push(outcome.map_err(Error::from).and_then(|mut rows| {
                        rows.pop().ok_or_else(|| Error::internal("a statement lost a message"))
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

    /// Runs the statement within its limit. After any doubt about the connection it is given up.
    async fn execute(&mut self, messages: &[Outgoing]) -> Result<Vec<Row>, sqlx::Error> {
        let timeout = self.statement_timeout;
        let work = async {
            let database = self.database.clone();
            let connection = self.ready_connection().await?;
            database.run(Call::StoreMessages, insert(connection, messages)).await
        };
        let outcome = tokio::time::timeout(timeout, work).await.unwrap_or(Err(sqlx::Error::PoolTimedOut));
        self.last_used = Instant::now();
        if outcome.as_ref().is_err_and(is_unavailable)
            && let Some(mut connection) = self.connection.take()
        {
            connection.close_on_drop();
        }
        outcome
    }

    async fn ready_connection(&mut self) -> Result<&mut PoolConnection<Postgres>, sqlx::Error> {
        if let Some(connection) = &mut self.connection
            && self.last_used.elapsed() > IDLE_BEFORE_PING
            && connection.ping().await.is_err()
            && let Some(mut connection) = self.connection.take()
        {
            connection.close_on_drop();
        }
        if self.connection.is_none() {
            let mut connection = self.database.acquire().await?;
            // A batch joins a few keys to large tables. Whatever the statistics say of tables that were empty
            // a minute ago, the primary keys are the way, and planning anew for each batch finds nothing else.
            sqlx::raw_sql(
                "SET enable_seqscan = off; SET plan_cache_mode = force_generic_plan; SET jit = off",
            )
            .execute(&mut *connection)
            .await?;
            self.connection = Some(connection);
        }
        self.connection.as_mut().ok_or(sqlx::Error::PoolClosed)
    }
}

/// The next batch: the oldest messages whose clients still wait, and of those under the same key only the first,
/// because one statement cannot see what it inserts itself.
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

/// The messages by conversation, in runs of consecutive seqs: a batch that was stored one by one may have the
/// messages of another replica between its own, and a replay may be any earlier message.
fn runs(mut messages: Vec<(Pair, Element)>) -> Vec<(Pair, Vec<Element>)> {
    messages.sort_unstable_by_key(|(pair, element)| (pair.low(), pair.high(), element.seq));
    messages.dedup_by_key(|(pair, element)| (*pair, element.seq));
    let mut runs: Vec<(Pair, Vec<Element>)> = Vec::new();
    for (pair, element) in messages {
        match runs.last_mut() {
            Some((last, run))
                if *last == pair && run.last().is_some_and(|end| end.seq + 1 == element.seq) =>
            {
                run.push(element);
            }
            _ => runs.push((pair, vec![element])),
        }
    }
    runs
}

/// What a statement's row means for its message: the message and whether it is a replay, or why there is none.
fn judge(message: Outgoing, row: Row) -> Result<(Element, bool), Error> {
    match row {
        Row { sender_exists: false, .. } => Err(GONE),
        Row { stored: None, .. } => Err(Error::NotFound("there is no user with this recipient_id".into())),
        Row { replay: Some(false), .. } => {
            Err(Error::Conflict("this Idempotency-Key stands for another message: use a new key"))
        }
        Row { stored: Some(Stored { id, seq, created_at }), replay, .. } => {
            let Outgoing { sender: sender_id, recipient: recipient_id, content, .. } = message;
            let message = Message { id, seq, sender_id, recipient_id, content, created_at };
            Ok((message.element(), replay.is_some()))
        }
    }
}

/// True for what is gone when it is tried again: a deadlock or serialization failure, and two requests under
/// one key, of which the second then finds the first.
fn lost_a_race(error: &sqlx::Error) -> bool {
    let sqlx::Error::Database(error) = error else { return false };
    error.constraint() == Some("idempotency_keys_in_use")
        || error.code().is_some_and(|code| code.starts_with("40"))
}

/// Stores the messages of a batch; one row each comes back, in their order.
///
/// The statement is its own transaction. Conversations are locked in the order of their key. `seq` counts on
/// from the locked row, so it has no gaps; `last_at` is read under that lock, so times follow `seq`. A key that
/// another statement is inserting just now makes this one fail and be repeated.
async fn insert(
    connection: &mut PoolConnection<Postgres>,
    messages: &[Outgoing],
) -> Result<Vec<Row>, sqlx::Error> {
    let ids: Vec<Uuid> = messages.iter().map(|_| Uuid::now_v7()).collect();
    let senders: Vec<Uuid> = messages.iter().map(|message| message.sender).collect();
    let recipients: Vec<Uuid> = messages.iter().map(|message| message.recipient).collect();
    let contents: Vec<&str> = messages.iter().map(|message| message.content.as_str()).collect();
    let heeded = !sabotage::is_on(Sabotage::IgnoreKey);
    let keys: Vec<Option<&str>> =
        messages.iter().map(|message| message.key.as_deref().filter(|_| heeded)).collect();
    if sabotage::is_on(Sabotage::AckBeforeCommit) {
        sqlx::raw_sql("ROLLBACK; BEGIN").execute(&mut **connection).await?;
    }
    let rows = sqlx::query_file!("src/outbox.sql", &ids, &senders, &recipients, &contents as _, &keys as _)
        .fetch_all(&mut **connection)
        .await?;
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
        })
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_does_not_follow_directly_begins_a_run_of_its_own() {
        let pairs = [Uuid::from_u128(1), Uuid::from_u128(2)].map(|user| Pair::new(user, Uuid::from_u128(3)));
        let element = |seq| Element { seq, json: Vec::new() };
        let batch = [(0, 8), (1, 5), (0, 3), (0, 7), (1, 5), (0, 10)];
        let runs = runs(batch.map(|(pair, seq)| (pairs[pair], element(seq))).into());
        let seqs: Vec<(Pair, Vec<i64>)> = runs
            .into_iter()
            .map(|(pair, run)| (pair, run.into_iter().map(|element| element.seq).collect()))
            .collect();
        let expected =
            [(pairs[0], vec![3]), (pairs[0], vec![7, 8]), (pairs[0], vec![10]), (pairs[1], vec![5])];
        assert_eq!(seqs, expected);
    }
}
