//! Reading a conversation. [`History::page`] is the only way to a page of messages, so that no caller can show one
//! that is stale.

use std::sync::Arc;
use std::time::Duration;

use super::message::{Pair, RenderedMessage};
use super::pages::{self, PageRequest, Position};
use super::permission::Unsettled;
use super::recent::{Lookup, Miss, Newest, Recent};
use crate::config::Config;
use crate::store::health::Health;
use crate::store::postgres::{Database, is_unavailable};
use crate::telemetry::metrics::{CacheOutcome, Metrics};

/// How long a read waits for Postgres, a connection and the statement together, while the window could answer it marked as
/// stale: far above a healthy read, far below a client's patience. Of a short `REQUEST_TIMEOUT_MS` it takes a third, which
/// leaves the rest to Redis and the answer.
const FALLBACK_WAIT: Duration = Duration::from_millis(750);

/// While another reader fills the window: the first pause before it is looked at again, and the last, each twice the one
/// before. Together 62 ms, many times what a fill takes. Then the reader asks Postgres itself.
const FIRST_PAUSE: Duration = Duration::from_millis(2);
const LAST_PAUSE: Duration = Duration::from_millis(32);

/// A page, newest message first.
#[derive(Debug)]
pub struct Page {
    pub messages: Vec<RenderedMessage>,
    /// Where the next page begins: further back in time, or after `After` further forward.
    pub next: Option<Position>,
    /// True if Postgres is unavailable or only reads: the newest messages may be missing.
    pub stale: bool,
}

#[derive(thiserror::Error, Debug)]
pub enum HistoryError {
    #[error("the reader was deleted")]
    ReaderGone,
    #[error("no such peer")]
    NoSuchPeer,
    #[error("Postgres is unavailable, and no window has the page")]
    NotCached,
    #[error("Postgres only reads, and lacks one of the users")]
    MayBeMissing,
    #[error(transparent)]
    Unsettled(#[from] Unsettled),
    #[error(transparent)]
    Database(#[from] sqlx::Error),
}

#[derive(Debug)]
pub struct History {
    database: Database,
    recent: Arc<Recent>,
    health: Arc<Health>,
    metrics: Arc<Metrics>,
    request_timeout: Duration,
    /// How long Postgres may take while the window has the page.
    fallback_wait: Duration,
}

impl History {
    pub fn new(
        config: &Config,
        database: Database,
        recent: Arc<Recent>,
        health: Arc<Health>,
        metrics: Arc<Metrics>,
    ) -> Self {
        let request_timeout = config.request_timeout();
        let fallback_wait = FALLBACK_WAIT.min(request_timeout / 3);
        Self { database, recent, health, metrics, request_timeout, fallback_wait }
    }

    /// The page that was asked for.
    ///
    /// It has every message of its range that was acknowledged before the call, and every message that an earlier
    /// call on any replica returned, unless it is marked `stale`. Three rules ensure that:
    ///
    /// - A window answers only under a permission to use it.
    /// - What was read in Postgres is returned only once no window in use lacks it: [`Recent::settle`].
    /// - What a Postgres that only reads answers is marked, and fills no window: after a failover the old primary lags behind.
    ///
    /// `recent` argues why this suffices, also when Redis fails.
    pub async fn page(&self, request: &PageRequest) -> Result<Page, HistoryError> {
        let pair = Pair::new(request.reader, request.peer);
        let miss = match self.page_from_window(request, pair).await {
            Ok(page) => {
                self.metrics.cache_lookup(CacheOutcome::Hit);
                return Ok(page);
            }
            Err(miss) => miss,
        };
        let outcome = if miss.claim.is_some() { CacheOutcome::Miss } else { CacheOutcome::Bypass };
        self.metrics.cache_lookup(outcome);
        // Boxed: the future of a query is large, and every read, hit or not, would otherwise allocate and move it.
        Box::pin(self.page_from_postgres(request, pair, miss)).await
    }

    /// The page, if the window has all of it. While another reader fills the window, this one waits for it: when a window is
    /// lost that many read, one of them asks Postgres.
    async fn page_from_window(&self, request: &PageRequest, pair: Pair) -> Result<Page, Miss> {
        let Some(wanted) = request.newest_needed() else { return Err(Miss::default()) };
        let mut pause = FIRST_PAUSE;
        loop {
            match self.recent.look_up(pair, request.session, wanted).await {
                Lookup::Hit(newest) => {
                    return request.page_of_newest(newest, false).ok_or_else(Miss::default);
                }
                Lookup::Miss(miss) if miss.is_being_filled && pause <= LAST_PAUSE => {
                    tokio::time::sleep(pause).await;
                    pause *= 2;
                }
                Lookup::Miss(miss) => return Err(miss),
            }
        }
    }

    async fn page_from_postgres(
        &self,
        request: &PageRequest,
        pair: Pair,
        miss: Miss,
    ) -> Result<Page, HistoryError> {
        let Miss { claim, unchecked, .. } = miss;
        if self.health.postgres_is_unavailable() {
            return request.stale_page(unchecked);
        }
        // A reader that may fill the window reads all of it instead of the page.
        let fills = claim.is_some();
        let wanted = match fills {
            true => {
                PageRequest { limit: self.recent.window() as i64, position: Position::Offset(0), ..*request }
            }
            false => *request,
        };
        let limit = match !unchecked.messages.is_empty() && request.is_in(&unchecked) {
            true => self.fallback_wait,
            false => self.request_timeout,
        };
        let loaded = match pages::load(&self.database, &wanted, pair, limit).await {
            Ok(loaded) => loaded,
            Err(error) if is_unavailable(&error) => return request.stale_page(unchecked),
            Err(error) => return Err(error.into()),
        };
        if loaded.read_only && !(loaded.reader_exists && loaded.peer_exists) {
            return Err(HistoryError::MayBeMissing);
        }
        if !loaded.reader_exists {
            return Err(HistoryError::ReaderGone);
        }
        if !loaded.peer_exists {
            return Err(HistoryError::NoSuchPeer);
        }
        if loaded.read_only {
            // The window may have what a Postgres that lags behind lacks.
            let is_newer = !unchecked.messages.is_empty() && unchecked.seq() >= loaded.last_seq;
            if is_newer && request.is_in(&unchecked) {
                return request.stale_page(unchecked);
            }
        } else {
            match claim {
                Some(claim) => self.recent.fill(pair, claim, &loaded.newest).await?,
                None => self.recent.settle(pair, &loaded.newest).await?,
            }
        }
        if !fills {
            return Ok(request.page(loaded.newest, Some(loaded.last_seq), loaded.read_only));
        }
        match request.page_of_newest(loaded.newest, loaded.read_only) {
            Some(page) => Ok(page),
            // It goes back further than the window.
            None => Box::pin(self.page_from_postgres(request, pair, Miss::default())).await,
        }
    }
}

impl PageRequest {
    /// `last_seq` is the conversation's as of the page.
    fn page(&self, newest: Newest, last_seq: Option<i64>, stale: bool) -> Page {
        let Newest { messages, removed } = newest;
        let ends = messages.first().zip(messages.last()).map(|(newest, oldest)| (newest.seq, oldest.seq));
        let next = ends.and_then(|(newest, oldest)| match self.position {
            Position::After(_) => {
                last_seq.is_some_and(|last| newest < last).then_some(Position::After(newest))
            }
            // By `before`, so that messages that arrive meanwhile shift nothing.
            Position::Offset(_) | Position::Before(_) => {
                (oldest > removed + 1).then_some(Position::Before(oldest))
            }
        });
        Page { messages, next, stale }
    }

    /// How many of the newest messages suffice for the page, as a rule.
    fn newest_needed(&self) -> Option<usize> {
        let needed = match self.position {
            // An offset that does not fit lies beyond any window.
            Position::Offset(offset) => offset.saturating_add(self.limit),
            Position::After(_) => self.limit,
            Position::Before(_) => return None,
        };
        usize::try_from(needed).ok()
    }

    /// True if these newest messages of the conversation have all of the page.
    fn is_in(&self, newest: &Newest) -> bool {
        let (head, oldest) = (newest.seq(), newest.messages.last().map_or(0, |message| message.seq));
        let first = newest.removed + 1;
        let lowest = match self.position {
            Position::Offset(offset) => (head - offset - self.limit).saturating_add(1),
            Position::After(seq) if head - seq.max(newest.removed) <= self.limit => seq + 1,
            Position::After(_) | Position::Before(_) => return false,
        };
        oldest <= lowest.clamp(first, head.max(first))
    }

    /// The page out of the newest messages of the conversation, if they have all of it.
    fn page_of_newest(&self, mut newest: Newest, stale: bool) -> Option<Page> {
        if !self.is_in(&newest) {
            return None;
        }
        let last_seq = newest.messages.first().map(|message| message.seq);
        let messages = &mut newest.messages;
        match self.position {
            Position::Offset(offset) => {
                messages.drain(..messages.len().min(usize::try_from(offset).unwrap_or(usize::MAX)));
                messages.truncate(usize::try_from(self.limit).unwrap_or_default());
            }
            Position::After(seq) => messages.retain(|message| message.seq > seq),
            Position::Before(_) => return None,
        }
        Some(self.page(newest, last_seq, stale))
    }

    /// The page out of the window as it was found, if that has all of it.
    fn stale_page(&self, unchecked: Newest) -> Result<Page, HistoryError> {
        // Of a conversation without messages the window says nothing.
        let page = if unchecked.messages.is_empty() { None } else { self.page_of_newest(unchecked, true) };
        page.ok_or(HistoryError::NotCached)
    }
}
