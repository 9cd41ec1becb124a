//! The recent window: a conversation's newest messages in Redis, ready to be sent, and never stale.
//!
//! Three keys per conversation, in one slot of a cluster:
//!
//! - `list`: the newest messages as `SEQ JSON`, newest first. It expires `CACHE_TTL_SECONDS` after it was last checked,
//!   so that a conversation that is written but not read costs nothing;
//! - `lease`: "the list is complete". It holds the newest `seq` and expires [`LEASE`] after the Redis time at which a
//!   reader *began* to check the list against Postgres;
//! - `token`: held by the reader that checks the list just now.
//!
//! # Why a read is never stale
//!
//! A hit needs a lease. So the question for each message M of a committed batch is how long a lease can outlive the
//! commit over a list without M.
//!
//! *Its writer reaches Redis.* Before it acknowledges M, it runs [`APPEND`]. In one atomic step, that deletes the token
//! and adds M to the list, or drops list and lease if M does not continue the list. A reader that asked Postgres before
//! the commit and wants to fill the list afterwards finds its token deleted and may not. The append corrects the list of
//! a reader that filled it before. The order of two writers' appends does not matter: a message that does not continue
//! the list drops it.
//!
//! *Its writer does not reach Redis* (a timeout, a broken connection), or the answer is lost. Then the writer waits
//! [`LEASE_WAIT`] after the commit before it acknowledges M. A lease granted by a check that began before the commit has
//! expired by then: a lease ends [`LEASE`] after the check began, by the clock of the one Redis that granted it. A check
//! that began later has seen M. A command that a paused Redis executes late does no harm: a lease inherits what is left
//! of its token's life, which is nothing.
//!
//! *Its writer died between commit and append*, or has not appended yet. M was not acknowledged. The list shows M after
//! at most one lease, because the next check sees it. A client that repeats M under its idempotency key gets the stored
//! M, and that acknowledgement, too, comes only after [`APPEND`], which changes nothing if the list already has M.
//!
//! # Why reads never go back in time
//!
//! A reader can see M in Postgres before M's writer has appended it. So a reader that returns what it read in Postgres
//! first makes sure that no window shows less: [`SETTLE`] fills the list, or drops a list that ends earlier, and the
//! token of any reader that may be about to fill such a list. A replica that cannot reach Redis waits [`LEASE_WAIT`]
//! after the read instead, for the reason given above.
//!
//! Such a wait in each request would be too slow while Redis is unavailable for long. So a replica that has lost Redis
//! *suspends* the windows of all replicas: it keeps `window_suspension` in Postgres in the future. The check that grants
//! a lease reads that row in the same statement. [`LEASE_WAIT`] after the suspension's commit, therefore, all leases have
//! expired, none can be granted, and no request has to wait. The replica renews the suspension well before it ends; once
//! Redis is back, it expires.
//!
//! # What Redis may lose
//!
//! Redis may lose everything, at any time: a list without its lease is not used, and without its token no list is
//! filled. A Redis that comes back with an older state (a snapshot, a promoted replica, an append-only file without its
//! last second) could bring back a lease that was dropped. Each of these breaks the connection, and for [`LEASE`] after
//! connecting a replica trusts no lease. Leases expire by the wall clock, so an older one has expired by then.
//!
//! This remains: if one Redis splits into two masters that both go on answering, a replica or a worker that asks the old
//! one may show a window that lacks messages acknowledged within the last [`LEASE`], and no older ones, because each
//! lease there is checked against Postgres anew. The same bound holds
//!
//! - while Redis's wall clock is set back, for as long as it was set back;
//! - after a cluster's node was replaced by force within one lease: a cluster's client reconnects by itself;
//! - while a replica is without Redis, after Postgres's clock jumped ahead or the replica's machine was frozen:
//!   either ends a suspension unnoticed.
//!
//! While Postgres is unavailable, a replica answers from a list without a lease and marks it: `Warning: 110`.

use std::sync::Arc;
use std::time::Duration;

use deadpool_redis::redis::{Pipeline, Script};
use tokio::sync::watch;
use tokio::time::Instant;
use tracing::Instrument as _;
use uuid::Uuid;
use uuid::fmt::Simple;

use super::message::{Pair, RenderedMessage};
use crate::config::Config;
use crate::failpoints::{self, Failpoint};
use crate::store::operation::Operation;
use crate::store::postgres::{Database, reason};
use crate::store::redis::{Live, Redis, Unavailable};
use crate::telemetry::trace;

/// How long a window may answer after the start of the check that found it complete.
const LEASE: Duration = Duration::from_millis(900);

/// How long to wait until a lease has expired. The margin covers rounding to milliseconds and two clocks that differ in
/// speed: 5 % is a hundred times the largest slew of a clock.
const LEASE_WAIT: Duration = Duration::from_millis(950);

/// How far ahead a suspension reaches. A replica that hangs for longer than this finds it expired, by its own clock, and
/// waits again.
const SUSPENSION: Duration = Duration::from_secs(10);
const SUSPENSION_RENEWAL: Duration = Duration::from_secs(3);

/// How long the first connection to Redis may take before Redis counts as unavailable. Until then each request waits for
/// the leases to expire.
const FIRST_CONNECTION: Duration = Duration::from_secs(1);

/// Between asking Postgres for a suspension and relying on it some time passes, which the suspension must not cover.
const SUSPENSION_MARGIN: Duration = Duration::from_secs(1);

/// Puts the function that both scripts need before the script.
macro_rules! script {
    ($body:literal) => {
        concat!(
            "local function newest(list)\n\
               local head = redis.call('LINDEX', list, 0)\n\
               return head and tonumber(string.match(head, '^%d+')) or 0\n\
             end\n",
            $body
        )
    };
}

/// The writer's step, after the commit, for any number of conversations. KEYS: three for each. ARGV: CACHE_WINDOW, the
/// expiry of a new list in ms, then for each conversation the first new seq, the number of new elements, and the
/// elements, oldest first.
const APPEND: &str = script!(
    "local window, ttl, at = tonumber(ARGV[1]), ARGV[2], 3
     for key = 1, #KEYS, 3 do
       local lease, list, token = KEYS[key], KEYS[key + 1], KEYS[key + 2]
       local first, count = tonumber(ARGV[at]), tonumber(ARGV[at + 1])
       local last = first + count - 1
       redis.call('DEL', token)
       if redis.call('EXISTS', list, lease) > 0 then
         local head = newest(list)
         local granted = redis.call('GET', lease)
         if head >= last then
           -- A reader stored it since the commit.
         elseif window > 0 and head == first - 1 and (head > 0 or granted) then
           redis.call('LPUSH', list, unpack(ARGV, at + 2, at + 1 + count))
           redis.call('LTRIM', list, 0, window - 1)
           if head == 0 then redis.call('PEXPIRE', list, ttl) end
           if granted then redis.call('SET', lease, last, 'KEEPTTL') end
         else
           redis.call('DEL', lease, list)
         end
       end
       at = at + 2 + count
     end"
);

/// The reader's step, before it returns what it read in Postgres. ARGV: its token or nothing, the newest seq that it saw,
/// what to do with the list (`fill`, `keep` or `none`), the list's expiry in ms, then for `fill` the elements, newest
/// first. The lease gets what is left of the token's life.
const SETTLE: &str = script!(
    "local lease, list, token = KEYS[1], KEYS[2], KEYS[3]
     local seen = tonumber(ARGV[2])
     if ARGV[1] ~= '' and redis.call('GET', token) == ARGV[1] then
       local left = redis.call('PTTL', token)
       redis.call('DEL', token)
       if left > 0 and ARGV[3] ~= 'none' then
         if ARGV[3] == 'fill' then
           redis.call('DEL', list)
           if #ARGV > 4 then redis.call('RPUSH', list, unpack(ARGV, 5)) end
         end
         redis.call('PEXPIRE', list, ARGV[4])
         if newest(list) == seen then
           redis.call('SET', lease, seen, 'PX', left)
           return
         end
       end
     end
     redis.call('DEL', token)
     if newest(list) < seen then redis.call('DEL', lease, list) end"
);

#[derive(Debug)]
pub(crate) enum Lookup {
    /// The messages after the `skip` newest ones, complete.
    Hit(Vec<RenderedMessage>),
    Miss(Miss),
}

/// What a reader knows after a miss, and passes back to [`Recent::settle`].
#[derive(Debug, Default)]
pub(crate) struct Miss {
    live: Option<Live>,
    /// Present if this reader may fill the window.
    token: Option<String>,
    /// The list as it was found, without a lease. It may be shown only while Postgres is unavailable, or once Postgres
    /// says that `known` is the last seq.
    pub unchecked: Vec<RenderedMessage>,
    /// The newest seq of `unchecked`, if the list would be complete under a lease up to there.
    pub known: Option<i64>,
}

/// What a reader found in Postgres.
#[derive(Debug)]
pub(crate) enum Found<'a> {
    /// The list that the look-up found is complete.
    Same,
    /// These are the newest `CACHE_WINDOW` messages, newest first.
    Newest(&'a [RenderedMessage]),
    /// Anything else than the newest messages, or windows are suspended: nothing may be filled.
    Other,
}

impl Miss {
    /// True if this reader may fill the window.
    pub(crate) fn may_fill(&self) -> bool {
        self.token.is_some()
    }
}

pub struct Recent {
    redis: Arc<Redis>,
    database: Database,
    window: usize,
    ttl_ms: u64,
    append: Script,
    settle: Script,
    suspension: watch::Sender<Option<Suspension>>,
}

/// The time in which no replica trusts any window.
#[derive(Clone, Copy, Debug)]
struct Suspension {
    from: Instant,
    until: Instant,
}

impl Recent {
    pub fn new(config: &Config, redis: Arc<Redis>, database: Database) -> Arc<Self> {
        Arc::new(Self {
            redis,
            database,
            window: config.cache_window as usize,
            ttl_ms: u64::from(config.cache_ttl_seconds) * 1000,
            append: Script::new(APPEND),
            settle: Script::new(SETTLE),
            suspension: watch::Sender::new(None),
        })
    }

    /// The scripts that Redis must have loaded.
    pub fn scripts() -> Vec<Script> {
        vec![Script::new(APPEND), Script::new(SETTLE)]
    }

    /// How many of the newest messages a window holds.
    pub(super) fn window(&self) -> usize {
        self.window
    }

    /// Looks for the `limit` messages after the `skip` newest ones. After a miss the caller asks Postgres, and must call
    /// [`Recent::settle`] before it returns the answer.
    pub(super) async fn look_up(&self, pair: Pair, skip: usize, limit: usize) -> Lookup {
        let Some(live) = self.redis.live() else { return Lookup::Miss(Miss::default()) };
        let wanted = skip + limit;
        if wanted > self.window {
            return Lookup::Miss(Miss { live: Some(live), ..Miss::default() });
        }
        let [lease, list, token] = keys(pair);
        let mut pipeline = Pipeline::with_capacity(2);
        pipeline.cmd("GET").arg(&lease);
        pipeline.cmd("LRANGE").arg(&list).arg(0).arg(wanted.saturating_sub(1));
        let Ok((lease, found)) =
            self.redis.run::<(Option<i64>, Vec<Vec<u8>>)>(&live, Operation::LookUpWindow, &pipeline).await
        else {
            return Lookup::Miss(Miss::default());
        };
        let mut elements: Vec<RenderedMessage> = found.into_iter().filter_map(decode).collect();
        let trusted = live.since.elapsed() > LEASE;
        let lease = lease.or_else(|| failpoints::is_on(Failpoint::TrustExpiredLease).then_some(1));
        if trusted && lease.is_some_and(|newest| is_complete(&elements, newest, wanted)) {
            elements.drain(..skip.min(elements.len()));
            return Lookup::Hit(elements);
        }
        let token = self.take_token(&live, &token).await;
        let head = elements.first().map_or(0, |element| element.seq);
        let known = (token.is_some() && is_complete(&elements, head, wanted)).then_some(head);
        Lookup::Miss(Miss { live: Some(live), token, unchecked: elements, known })
    }

    /// A miss without a look-up, for a read that no window can answer.
    pub(super) fn bypass(&self) -> Miss {
        Miss { live: self.redis.live(), ..Miss::default() }
    }

    /// Makes sure that no window shows less than what was just read in Postgres, where `newest` was the conversation's
    /// last seq.
    pub(super) async fn settle(&self, pair: Pair, miss: Miss, newest: i64, found: Found<'_>) {
        if miss.token.is_none() && failpoints::is_on(Failpoint::SkipSettle) {
            return;
        }
        let read_at = Instant::now();
        let Some(live) = miss.live.or_else(|| self.redis.live()) else {
            return self.wait_for_leases(read_at).await;
        };
        let (what, elements) = match found {
            Found::Same => ("keep", &[][..]),
            Found::Other => ("none", &[][..]),
            Found::Newest(elements) => ("fill", elements),
        };
        let mut pipeline = Pipeline::with_capacity(1);
        call(&mut pipeline, &self.settle, std::iter::once(pair));
        pipeline.arg(miss.token.unwrap_or_default()).arg(newest).arg(what).arg(self.ttl_ms);
        for element in elements {
            pipeline.arg(encode(element));
        }
        if self.redis.run::<()>(&live, Operation::SettleWindow, pipeline.ignore()).await.is_err() {
            self.wait_for_leases(read_at).await;
        }
    }

    /// Adds a committed batch to the windows, or makes sure that no window lacks it. Each item is a run of messages whose
    /// seqs follow one another. Only after this may a batch be acknowledged.
    pub(super) async fn append(&self, batch: &[(Pair, Vec<RenderedMessage>)]) {
        if failpoints::is_on(Failpoint::SkipInvalidation) {
            return;
        }
        let committed_at = Instant::now();
        let Some(live) = self.redis.live() else {
            return self.wait_for_leases(committed_at).await;
        };
        let mut pipeline = Pipeline::with_capacity(1);
        // A cluster runs a script where all its keys are, so there each conversation needs its own call.
        let together = if live.is_cluster() { 1 } else { batch.len().max(1) };
        for conversations in batch.chunks(together) {
            call(&mut pipeline, &self.append, conversations.iter().map(|(pair, _)| *pair));
            pipeline.arg(self.window).arg(self.ttl_ms);
            for (_, elements) in conversations {
                pipeline.arg(elements.first().map_or(0, |element| element.seq)).arg(elements.len());
                for element in elements {
                    pipeline.arg(encode(element));
                }
            }
            pipeline.ignore();
        }
        let outcome: Result<(), Unavailable> =
            self.redis.run(&live, Operation::AppendWindow, &pipeline).await;
        if outcome.is_err() {
            self.wait_for_leases(committed_at).await;
        }
    }

    /// Returns when every lease whose check began before `since` has expired: at once under a suspension.
    async fn wait_for_leases(&self, since: Instant) {
        if failpoints::is_on(Failpoint::SkipWait) {
            return;
        }
        let mut suspension = self.suspension.subscribe();
        let in_force = suspension.wait_for(|suspension| suspension.is_some_and(Suspension::is_in_force));
        // Either way those leases have expired; an error means that the process is ending.
        tokio::select! {
            _ = in_force => {}
            () = tokio::time::sleep_until(since + LEASE_WAIT) => {}
        }
    }

    /// Asks for the right to fill the window with what the caller is about to read.
    async fn take_token(&self, live: &Live, key: &str) -> Option<String> {
        let token = Uuid::new_v4().simple().to_string();
        let mut pipeline = Pipeline::with_capacity(1);
        pipeline.cmd("SET").arg(key).arg(&token).arg("NX").arg("PX").arg(LEASE.as_millis() as u64);
        let (taken,): (Option<String>,) =
            self.redis.run(live, Operation::ClaimWindow, &pipeline).await.ok()?;
        taken.map(|_| token)
    }

    /// Suspends the windows while Redis is unavailable. Runs until the process ends.
    pub async fn supervise(self: Arc<Self>) {
        let mut unavailable = self.redis.watch_unavailable();
        // A process begins without a connection. That alone must not suspend the windows of all others.
        tokio::time::timeout(FIRST_CONNECTION, unavailable.wait_for(|unavailable| !*unavailable)).await.ok();
        loop {
            if unavailable.wait_for(|unavailable| *unavailable).await.is_err() {
                return;
            }
            let span = tracing::info_span!(target: trace::BACKGROUND, "suspend windows");
            let pause = self.suspend().instrument(span).await;
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                _ = unavailable.wait_for(|unavailable| !*unavailable) => {}
            }
        }
    }

    /// Writes the suspension to Postgres; returns when to renew it.
    async fn suspend(&self) -> Duration {
        let asked = Instant::now();
        let query = sqlx::query!(
            "INSERT INTO window_suspension AS held (suspended_until)
             VALUES (clock_timestamp() + make_interval(secs => $1))
             ON CONFLICT (only_row) DO UPDATE
             SET suspended_until = greatest(held.suspended_until, excluded.suspended_until)",
            SUSPENSION.as_secs_f64(),
        );
        let written = match self.database.acquire().await {
            Ok(mut connection) => {
                self.database.run(Operation::SuspendWindows, query.execute(&mut *connection)).await
            }
            Err(error) => Err(error),
        };
        if let Err(error) = written {
            tracing::debug!(error = reason(&error), "the windows could not be suspended");
            return Duration::from_millis(500);
        }
        let committed = Instant::now();
        let held = *self.suspension.borrow();
        let from = match held {
            Some(held) if held.until > committed => held.from,
            _ => committed + LEASE_WAIT,
        };
        let until = asked + SUSPENSION - SUSPENSION_MARGIN;
        self.suspension.send_replace(Some(Suspension { from, until }));
        if from <= committed {
            return SUSPENSION_RENEWAL;
        }
        // Wakes the requests that wait for it when it takes effect, not when it was written.
        tokio::time::sleep_until(from).await;
        self.suspension.send_modify(|_| {});
        SUSPENSION_RENEWAL
    }
}

impl Suspension {
    fn is_in_force(self) -> bool {
        let now = Instant::now();
        self.from <= now && now < self.until
    }
}

/// A list's element: `SEQ JSON`.
fn encode(message: &RenderedMessage) -> Vec<u8> {
    let mut element = message.seq.to_string().into_bytes();
    element.push(b' ');
    element.extend_from_slice(&message.json);
    element
}

fn decode(mut element: Vec<u8>) -> Option<RenderedMessage> {
    let space = element.iter().position(|byte| *byte == b' ')?;
    let seq = std::str::from_utf8(&element[..space]).ok()?.parse().ok()?;
    element.drain(..=space);
    Some(RenderedMessage { seq, json: element })
}

/// True if the elements are the `wanted` newest messages of a conversation whose last seq is at least `newest`: an append
/// may have come between the two reads of one round trip.
fn is_complete(elements: &[RenderedMessage], newest: i64, wanted: usize) -> bool {
    let head = elements.first().map_or(0, |element| element.seq);
    head >= newest && elements.len() == wanted.min(usize::try_from(head).unwrap_or(0))
}

/// Starts a call of a script by its digest, on the keys of these conversations. The caller adds the arguments.
fn call(pipeline: &mut Pipeline, script: &Script, pairs: impl ExactSizeIterator<Item = Pair>) {
    pipeline.cmd("EVALSHA").arg(script.get_hash()).arg(3 * pairs.len());
    for pair in pairs {
        for key in keys(pair) {
            pipeline.arg(key);
        }
    }
}

/// The braces put a conversation's keys into one slot of a cluster. Joined rather than formatted, because every read needs
/// them.
fn keys(pair: Pair) -> [String; 3] {
    let (mut low, mut high) = ([0; Simple::LENGTH], [0; Simple::LENGTH]);
    let low: &str = pair.low().simple().encode_lower(&mut low);
    let high: &str = pair.high().simple().encode_lower(&mut high);
    ["lease", "list", "token"].map(|part| ["chat:recent:{", low, ".", high, "}:", part].concat())
}

impl std::fmt::Debug for Recent {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Recent").field("window", &self.window).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn element(seq: i64) -> RenderedMessage {
        RenderedMessage { seq, json: br#"{"content":"1 2 3"}"#.to_vec() }
    }

    #[test]
    fn the_keys_of_a_conversation_share_a_slot() {
        let keys = keys(Pair::new(Uuid::from_u128(0xab), Uuid::from_u128(1)));
        let name = "{00000000000000000000000000000001.000000000000000000000000000000ab}";
        assert_eq!(keys, ["lease", "list", "token"].map(|part| format!("chat:recent:{name}:{part}")));
    }

    #[test]
    fn an_element_is_decoded_as_it_was_encoded() {
        assert_eq!(decode(encode(&element(42))), Some(element(42)));
        assert_eq!(decode(b"no".to_vec()), None);
    }

    #[test]
    fn a_list_is_complete_only_up_to_its_lease_and_its_length() {
        let list: Vec<RenderedMessage> = (1..=5).rev().map(element).collect();
        assert!(is_complete(&list, 5, 5));
        assert!(is_complete(&list[..3], 5, 3));
        assert!(is_complete(&list, 4, 5), "an append came in between");
        assert!(!is_complete(&list, 6, 5), "the list ends before the lease");
        assert!(!is_complete(&list[..3], 5, 5), "the list is too short");
        assert!(is_complete(&[], 0, 5), "a conversation without messages");
        assert!(!is_complete(&[], 1, 5));
    }
}
