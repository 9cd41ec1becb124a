//! Everything that the service has of a user, as lines of JSON.
//!
//! A task reads it page by page, each in a statement of its own, and waits for the client after every few lines. So an export
//! takes little memory and holds neither a connection nor a snapshot, however large it is and however slow its client. It is
//! no snapshot: what is sent meanwhile may be in it. Each line has a cursor, with which another export goes on behind it.
//!
//! The response of an export that does not come to its end is broken off, so that no client takes it for the whole.

mod cursor;
mod lease;
mod lines;

use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::{Instant, timeout, timeout_at};
use uuid::Uuid;

pub(crate) use self::cursor::Place;
use self::lease::{Lease, Taken};
use self::lines::PAGE_ROWS;
use super::message::Pair;
use super::pages::{self, PageRequest, Position};
use super::permission::Permission;
use crate::store::health::Health;
use crate::store::postgres::{Database, is_unavailable, reason};
use crate::telemetry::metrics::{ExportOutcome, Metrics};

/// Exports in one process. Each takes a page of messages, which is 5 MB at the very most.
const RUNNING_MAX: usize = 4;

/// Lines are sent when there are so many bytes of them.
const CHUNK_BYTES: usize = 32 * 1024;

/// A client that does not take a chunk for so long is gone, or too slow to be worth a place.
const CLIENT_LIMIT: Duration = Duration::from_secs(30);

/// A page of messages.
const PAGE_LIMIT: Duration = Duration::from_secs(10);

/// An export ends after so long, and can be resumed.
const EXPORT_LIMIT: Duration = Duration::from_secs(900);

pub(crate) struct Exports {
    database: Database,
    health: Arc<Health>,
    permission: Arc<Permission>,
    metrics: Arc<Metrics>,
    places: Arc<Semaphore>,
}

/// Why an export did not begin.
#[derive(thiserror::Error, Debug)]
pub(crate) enum ExportError {
    #[error("the user was deleted, or the session has ended")]
    UserGone,
    #[error("another export of this user runs")]
    Running { retry_after: Duration },
    #[error("this process runs as many exports as it may")]
    TooMany,
    #[error(transparent)]
    Database(#[from] sqlx::Error),
}

/// Why an export ended before its time.
#[derive(thiserror::Error, Debug)]
pub(crate) enum Interrupted {
    #[error("the client is gone")]
    Client,
    #[error("the client takes nothing")]
    Slow,
    #[error("the export takes too long")]
    TooLong,
    #[error("the session has ended, or the user is gone")]
    Revoked,
    #[error("the process is about to end")]
    Draining,
    #[error("another export of this user runs")]
    LeaseLost,
    #[error("Postgres only reads")]
    OnlyReads,
    #[error("a line cannot be written")]
    Unwritable(#[from] serde_json::Error),
    #[error(transparent)]
    Database(#[from] sqlx::Error),
}

/// Lines of an export, or an error, with which it ends.
pub(crate) type Chunk = Result<Vec<u8>, Interrupted>;

impl Exports {
    pub(crate) fn new(
        database: Database,
        health: Arc<Health>,
        permission: Arc<Permission>,
        metrics: Arc<Metrics>,
    ) -> Self {
        Self { database, health, permission, metrics, places: Arc::new(Semaphore::new(RUNNING_MAX)) }
    }

    /// Begins an export behind `after`. It runs for as long as its chunks are taken.
    pub(crate) async fn start(
        &self,
        user: Uuid,
        session: Uuid,
        after: Option<Place>,
    ) -> Result<mpsc::Receiver<Chunk>, ExportError> {
        let begun = self.begin(user, session).await;
        let (place, lease) = begun.inspect_err(|error| match error {
            ExportError::UserGone | ExportError::Running { .. } | ExportError::TooMany => {
                self.metrics.export_ended(ExportOutcome::Refused);
            }
            ExportError::Database(_) => self.metrics.export_ended(ExportOutcome::Failed),
        })?;
        let (chunks, taken) = mpsc::channel(1);
        let export = Export {
            database: self.database.clone(),
            health: Arc::clone(&self.health),
            permission: Arc::clone(&self.permission),
            user,
            session,
            lease,
            lines: Vec::new(),
            chunks,
        };
        tokio::spawn(export.run(after, place, Arc::clone(&self.metrics)));
        Ok(taken)
    }

    async fn begin(&self, user: Uuid, session: Uuid) -> Result<(OwnedSemaphorePermit, Lease), ExportError> {
        let place = Arc::clone(&self.places).try_acquire_owned().map_err(|_| ExportError::TooMany)?;
        match Lease::take(&self.database, user, session).await? {
            Taken::Ours(lease) => Ok((place, lease)),
            Taken::Other { left } => Err(ExportError::Running { retry_after: left }),
            Taken::UserGone => Err(ExportError::UserGone),
        }
    }
}

struct Export {
    database: Database,
    health: Arc<Health>,
    permission: Arc<Permission>,
    user: Uuid,
    session: Uuid,
    lease: Lease,
    /// Not sent yet.
    lines: Vec<u8>,
    chunks: mpsc::Sender<Chunk>,
}

impl Export {
    async fn run(mut self, after: Option<Place>, place: OwnedSemaphorePermit, metrics: Arc<Metrics>) {
        let deadline = Instant::now() + EXPORT_LIMIT;
        let written = timeout_at(deadline, self.write(after)).await.unwrap_or(Err(Interrupted::TooLong));
        // Before the end of the response: then its client may begin another. Else the lease expires.
        if let Err(error) = self.lease.release(&self.database).await {
            tracing::debug!(error = reason(&error), "the lease of an export is left to expire");
        }
        let ended = match written {
            Ok(()) => self.flush().await,
            ended => ended,
        };
        metrics.export_ended(match &ended {
            Ok(()) => ExportOutcome::Complete,
            Err(Interrupted::Client) => ExportOutcome::Client,
            Err(Interrupted::Slow) => ExportOutcome::Slow,
            Err(Interrupted::TooLong) => ExportOutcome::TooLong,
            Err(Interrupted::Revoked) => ExportOutcome::Revoked,
            Err(Interrupted::Draining) => ExportOutcome::Draining,
            Err(
                Interrupted::LeaseLost
                | Interrupted::OnlyReads
                | Interrupted::Unwritable(_)
                | Interrupted::Database(_),
            ) => ExportOutcome::Failed,
        });
        if let Err(interrupted) = ended {
            match &interrupted {
                Interrupted::Database(error) if !is_unavailable(error) => {
                    tracing::error!(error = reason(error), "an export failed");
                }
                interrupted => tracing::debug!(%interrupted, "an export was interrupted"),
            }
            // Who takes nothing learns of it from the connection.
            timeout(CLIENT_LIMIT, self.chunks.send(Err(interrupted))).await.ok();
        }
        drop(place);
    }

    /// The sections, from the one that has the place on.
    async fn write(&mut self, after: Option<Place>) -> Result<(), Interrupted> {
        let start = Uuid::nil();
        if after.is_none() {
            let user = lines::user(&self.database, self.user).await?.ok_or(Interrupted::Revoked)?;
            self.line("user", Place::User, &user).await?;
        }
        if let None | Some(Place::User | Place::Session(_)) = after {
            let id = if let Some(Place::Session(id)) = after { id } else { start };
            self.sessions(id).await?;
        }
        let peer = match after {
            Some(Place::Conversation { peer, seq }) => {
                self.messages(peer, seq, None).await?;
                peer
            }
            after => {
                let id = if let Some(Place::Block(id)) = after { id } else { start };
                self.blocks(id).await?;
                start
            }
        };
        self.conversations(peer).await
    }

    async fn sessions(&mut self, mut after: Uuid) -> Result<(), Interrupted> {
        loop {
            let page = lines::sessions(&self.database, self.user, after).await?;
            for session in &page {
                after = session.id;
                self.line("session", Place::Session(after), session).await?;
            }
            if page.len() < PAGE_ROWS as usize {
                return Ok(());
            }
        }
    }

    async fn blocks(&mut self, mut after: Uuid) -> Result<(), Interrupted> {
        loop {
            let page = lines::blocks(&self.database, self.user, after).await?;
            for block in &page {
                after = block.id;
                self.line("block", Place::Block(after), block).await?;
            }
            if page.len() < PAGE_ROWS as usize {
                return Ok(());
            }
        }
    }

    /// Each conversation and its messages.
    async fn conversations(&mut self, mut after: Uuid) -> Result<(), Interrupted> {
        loop {
            let page = lines::conversations(&self.database, self.user, after).await?;
            for conversation in &page {
                after = conversation.peer_id;
                self.messages(after, 0, Some(conversation)).await?;
            }
            if page.len() < PAGE_ROWS as usize {
                return Ok(());
            }
        }
    }

    /// The messages behind a seq. If there are any, the line of the conversation goes before them.
    async fn messages(
        &mut self,
        peer: Uuid,
        mut seq: i64,
        mut conversation: Option<&lines::Conversation>,
    ) -> Result<(), Interrupted> {
        loop {
            if !self.lease.extend(&self.database).await? {
                return Err(Interrupted::LeaseLost);
            }
            let request = PageRequest {
                reader: self.user,
                session: self.session,
                peer,
                limit: PAGE_ROWS,
                position: Position::After(seq),
            };
            let page = pages::load(&self.database, &request, Pair::new(self.user, peer), PAGE_LIMIT).await?;
            // It may be an old primary, which lags behind.
            if page.read_only {
                return Err(Interrupted::OnlyReads);
            }
            if !page.reader_exists {
                return Err(Interrupted::Revoked);
            }
            let is_last = page.newest.messages.len() < PAGE_ROWS as usize;
            // They are newest first.
            for message in page.newest.messages.iter().rev() {
                if let Some(conversation) = conversation.take() {
                    self.line("conversation", Place::Conversation { peer, seq: 0 }, conversation).await?;
                }
                seq = message.seq;
                self.object("message", Place::Conversation { peer, seq }, &message.json).await?;
            }
            if is_last {
                return Ok(());
            }
        }
    }

    async fn line(&mut self, kind: &str, place: Place, thing: &impl Serialize) -> Result<(), Interrupted> {
        let json = serde_json::to_vec(thing)?;
        self.object(kind, place, &json).await
    }

    /// A line: the members of the object behind its type and cursor.
    async fn object(&mut self, kind: &str, place: Place, json: &[u8]) -> Result<(), Interrupted> {
        let head = format!("{{\"type\":\"{kind}\",\"cursor\":\"{}\",", place.encode(self.user));
        self.lines.extend_from_slice(head.as_bytes());
        self.lines.extend_from_slice(json.get(1..).unwrap_or_default());
        self.lines.push(b'\n');
        if self.lines.len() < CHUNK_BYTES { Ok(()) } else { self.flush().await }
    }

    /// Sends what there is, unless the caller may not have it any more.
    async fn flush(&mut self) -> Result<(), Interrupted> {
        if self.permission.is_deleted(self.user) || self.permission.has_ended(self.session) {
            return Err(Interrupted::Revoked);
        }
        if self.health.is_draining() {
            return Err(Interrupted::Draining);
        }
        let chunk = std::mem::take(&mut self.lines);
        match timeout(CLIENT_LIMIT, self.chunks.send(Ok(chunk))).await {
            Ok(sent) => sent.map_err(|_| Interrupted::Client),
            Err(_) => Err(Interrupted::Slow),
        }
    }
}

impl std::fmt::Debug for Exports {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Exports").field("places", &self.places).finish_non_exhaustive()
    }
}
