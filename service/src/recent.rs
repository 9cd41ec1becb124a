//! The recent window: a conversation's newest messages in Redis, ready to be sent, and never stale.
//!
//! Three keys per conversation, in one slot of a cluster:
//!
//! - `list`: the newest messages as `SEQ JSON`, newest first; lives `CACHE_TTL_SECONDS` from the last check of it,
//!   so that a conversation that is written but not read costs nothing;
//! - `lease`: "the list is all there is"; holds the newest `seq` and expires [`LEASE`] after the Redis time at
//!   which a reader *began* to check the list against Postgres;
//! - `token`: held by the reader that is checking just now.
//!
//! # Why a read is never stale
//!
//! A hit needs a lease. So, for a message M of a committed batch, ask how long a lease may outlive the commit
//! over a list without M.
//!
//! *Its writer reaches Redis.* Before the acknowledgement it runs [`APPEND`], which in one atomic step deletes
//! the token and adds M to the list, or drops list and lease if M does not continue the list. A reader that
//! asked Postgres before the commit and comes to store afterwards finds its token gone and may not. One that
//! stored before is corrected by the append. The order of two writers' appends does not matter: what does not
//! continue the list drops it.
//!
//! *Its writer does not reach Redis* (a time-out, a cut line), or its answer is lost. Then the writer waits
//! [`LEASE_WAIT`] after the commit before it acknowledges. A lease granted by a check that began before the
//! commit has expired by then, since a lease ends [`LEASE`] after the check began, by the clock of the one
//! Redis that granted it; a check that began later has seen M. A command that a paused Redis executes late
//! does no harm: a lease inherits what is left of its token's life, none.
//!
//! *Its writer died between commit and append*, or is still at it. Nothing was acknowledged. The list shows M
//! after at most one lease, because the next check sees it. Whoever sends M again under its idempotency key gets
//! the stored M; and that acknowledgement, too, comes only after [`APPEND`], which for an M that the list already
//! has does nothing.
//!
//! # Why reads never go back in time
//!
//! M can be seen in Postgres before its writer has appended it. So whoever shows what it read in Postgres
//! first makes sure that no window shows less: [`SETTLE`] stores what was read, or drops a list that ends
//! before it, and the token of any reader that may be about to store such a list. A replica that does not
//! reach Redis waits [`LEASE_WAIT`] after the read instead, for the reason given above.
//!
//! A second per request would be a poor service while Redis is away for good. So a replica that has lost Redis
//! *suspends* the windows of all replicas: it keeps `window_suspension` in Postgres in the future. The check
//! that grants a lease reads that row in the same statement, so [`LEASE_WAIT`] after the suspension's commit no
//! lease is left anywhere, none can be granted, and nobody needs to wait any more. It is renewed well before
//! it ends, and after Redis is back it runs out by itself.
//!
//! # What Redis may lose
//!
//! Everything, at any time: without its lease a list is not used, without its token nothing is stored. A Redis
//! that comes back with an older state (a snapshot, a replica that was promoted, an append-only file without
//! its last second) could bring back a lease that was dropped. All of these break the connection; and for
//! [`LEASE`] after connecting a replica trusts no lease that it finds. Leases expire by the wall clock, so one
//! that is older than that is gone.
//!
//! What remains, stated precisely: if one Redis splits into two masters that both go on answering, whoever asks
//! the old one, a replica or a worker of it, may show a window that lacks messages acknowledged within the last
//! [`LEASE`], and no older: each lease there is checked against Postgres anew. The same bound holds
//!
//! - while Redis's wall clock is set back, for as long as it was set back;
//! - after a cluster's node was replaced by force within one lease: a cluster's client reconnects by itself;
//! - while a replica is without Redis, after Postgres's clock jumped ahead or the replica's machine was frozen:
//!   either ends a suspension unnoticed.
//!
//! With Postgres out of reach a replica answers from a list without a lease, and says so: `Warning: 110`.

use std::sync::Arc;
use std::time::Duration;

use deadpool_redis::redis::{Pipeline, Script};
use tokio::sync::watch;
use tokio::time::Instant;
use tracing::Instrument as _;
use uuid::Uuid;
use uuid::fmt::Simple;

use crate::call::Call;
use crate::config::Config;
use crate::db::Database;
use crate::messages::Pair;
use crate::redis::{Away, Live, Redis};
use crate::sabotage::{self, Sabotage};
use crate::trace;

/// How long a window may be shown after the check that found it complete began.
pub const LEASE: Duration = Duration::from_millis(900);

/// What is waited for a lease to be over. The rest is for rounding to milliseconds, and for two clocks that
/// measure the same second: 5 % is a hundred times what a clock that is being slewed may be off.
pub const LEASE_WAIT: Duration = Duration::from_millis(950);

/// How far ahead a suspension reaches. A replica that hangs for longer than this finds it run out, notices by
/// its own clock, and waits again.
const SUSPENSION: Duration = Duration::from_secs(10);
const SUSPENSION_RENEWAL: Duration = Duration::from_secs(3);

/// How long the first connection to Redis may take before it counts as away. Until then each request outwaits
/// the leases by itself.
const FIRST_CONNECTION: Duration = Duration::from_secs(1);

/// The time between asking Postgres for a suspension and trusting it must not count as covered by it.
const SUSPENSION_MARGIN: Duration = Duration::from_secs(1);

/// What both scripts begin with.
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

/// The writer's step, after the commit, for any number of conversations. KEYS: three for each. ARGV:
/// CACHE_WINDOW, the life of a new list in ms, then for each conversation the first new seq, the number of new
/// elements, and these, oldest first.
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

/// The reader's step, before it shows what it read in Postgres. ARGV: its token or nothing, the newest seq that
/// it saw, what to do with the list (`fill`, `keep` or `none`), the list's life in ms, then for `fill` the
/// elements, newest first. The lease gets what is left of the token's life.
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

/// A message of the window: its `seq` and the JSON that clients get.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Element {
    pub seq: i64,
    pub json: Vec<u8>,
}

#[derive(Debug)]
pub enum Lookup {
    /// The newest messages after `skip`, complete.
    Hit(Vec<Element>),
    Miss(Miss),
}

/// What a reader knows after a miss, to be given back to `settle`.
#[derive(Debug, Default)]
pub struct Miss {
    live: Option<Live>,
    /// Present where this reader may store what it reads.
    token: Option<String>,
    /// The list as it was found, without a lease: good enough only when Postgres is away, or when Postgres
    /// says that `known` is the last seq.
    pub unchecked: Vec<Element>,
    /// The newest seq of `unchecked`, if that would be the answer with a lease up to there.
    pub known: Option<i64>,
}

/// What a reader found in Postgres.
#[derive(Debug)]
pub enum Found<'a> {
    /// The list that was found is complete.
    Same,
    /// These are the newest `CACHE_WINDOW` messages, newest first.
    Newest(&'a [Element]),
    /// Something else than the newest messages, or windows are suspended: there is nothing to store.
    Other,
}

impl Miss {
    /// True where what is read now may become the window.
    pub fn may_store(&self) -> bool {
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

/// No window is trusted by anyone between these two.
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

    /// The scripts that a connection must know.
    pub fn scripts() -> Vec<Script> {
        vec![Script::new(APPEND), Script::new(SETTLE)]
    }

    /// How many of the newest messages a window holds.
    pub fn window(&self) -> usize {
        self.window
    }

    /// Looks for the `limit` messages after the `skip` newest. On a miss the caller asks Postgres, and must call
    /// `settle` before it shows the answer.
    pub async fn look_up(&self, pair: Pair, skip: usize, limit: usize) -> Lookup {
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
            self.redis.run::<(Option<i64>, Vec<Vec<u8>>)>(&live, Call::LookUpWindow, &pipeline).await
        else {
            return Lookup::Miss(Miss::default());
        };
        let mut elements: Vec<Element> = found.into_iter().filter_map(Element::parse).collect();
        let trusted = live.since.elapsed() > LEASE;
        let lease = lease.or_else(|| sabotage::is_on(Sabotage::TrustExpiredLease).then_some(1));
        if trusted && lease.is_some_and(|newest| is_complete(&elements, newest, wanted)) {
            elements.drain(..skip.min(elements.len()));
            return Lookup::Hit(elements);
        }
        let token = self.take_token(&live, &token).await;
        let head = elements.first().map_or(0, |element| element.seq);
        let known = (token.is_some() && is_complete(&elements, head, wanted)).then_some(head);
        Lookup::Miss(Miss { live: Some(live), token, unchecked: elements, known })
    }

    /// For a read that no window can answer.
    pub fn pass_by(&self) -> Miss {
        Miss { live: self.redis.live(), ..Miss::default() }
    }

    /// Makes sure that no window shows less than what was just read in Postgres, where `newest` was the
    /// conversation's last seq.
    pub async fn settle(&self, pair: Pair, miss: Miss, newest: i64, found: Found<'_>) {
        if miss.token.is_none() && sabotage::is_on(Sabotage::SkipSettle) {
            return;
        }
        let read_at = Instant::now();
        let Some(live) = miss.live.or_else(|| self.redis.live()) else {
            return self.outwait_leases(read_at).await;
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
            pipeline.arg(element.render());
        }
        if self.redis.run::<()>(&live, Call::SettleWindow, pipeline.ignore()).await.is_err() {
            self.outwait_leases(read_at).await;
        }
    }

    /// Brings a committed batch into the windows, or makes sure that none is left without it. Each element
    /// is a run of messages whose seqs follow one another. Only after this may a batch be acknowledged.
    pub async fn append(&self, batch: &[(Pair, Vec<Element>)]) {
        if sabotage::is_on(Sabotage::SkipInvalidation) {
            return;
        }
        let committed_at = Instant::now();
        let Some(live) = self.redis.live() else {
            return self.outwait_leases(committed_at).await;
        };
        let mut pipeline = Pipeline::with_capacity(1);
        // A cluster runs a script where all its keys are, so there each conversation has a call of its own.
        let together = if live.is_cluster() { 1 } else { batch.len().max(1) };
        for conversations in batch.chunks(together) {
            call(&mut pipeline, &self.append, conversations.iter().map(|(pair, _)| *pair));
            pipeline.arg(self.window).arg(self.ttl_ms);
            for (_, elements) in conversations {
                pipeline.arg(elements.first().map_or(0, |element| element.seq)).arg(elements.len());
                for element in elements {
                    pipeline.arg(element.render());
                }
            }
            pipeline.ignore();
        }
        let outcome: Result<(), Away> = self.redis.run(&live, Call::AppendWindow, &pipeline).await;
        if outcome.is_err() {
            self.outwait_leases(committed_at).await;
        }
    }

    /// Returns when no lease can be left that was checked before `since`: at once under a suspension.
    async fn outwait_leases(&self, since: Instant) {
        if sabotage::is_on(Sabotage::SkipWait) {
            return;
        }
        let mut suspension = self.suspension.subscribe();
        let in_force = suspension.wait_for(|suspension| suspension.is_some_and(Suspension::is_in_force));
        // Either way no lease from before `since` is left; an error means that the process is ending.
        tokio::select! {
            _ = in_force => {}
            () = tokio::time::sleep_until(since + LEASE_WAIT) => {}
        }
    }

    /// Asks for the right to store what is about to be read.
    async fn take_token(&self, live: &Live, key: &str) -> Option<String> {
        let token = Uuid::new_v4().simple().to_string();
        let mut pipeline = Pipeline::with_capacity(1);
        pipeline.cmd("SET").arg(key).arg(&token).arg("NX").arg("PX").arg(LEASE.as_millis() as u64);
        let (taken,): (Option<String>,) = self.redis.run(live, Call::ClaimWindow, &pipeline).await.ok()?;
        taken.map(|_| token)
    }

    /// Suspends the windows while Redis is away. Runs until the process ends.
    pub async fn supervise(self: Arc<Self>) {
        let mut away = self.redis.watch_away();
        // A process begins without a connection. That alone must not suspend the windows of all others.
        tokio::time::timeout(FIRST_CONNECTION, away.wait_for(|away| !*away)).await.ok();
        loop {
            if away.wait_for(|away| *away).await.is_err() {
                return;
            }
            let span = tracing::info_span!(target: trace::BACKGROUND, "suspend windows");
            let pause = self.suspend().instrument(span).await;
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                _ = away.wait_for(|away| !*away) => {}
            }
        }
    }

    /// Writes the suspension into Postgres; returns when to do so again.
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
                self.database.run(Call::SuspendWindows, query.execute(&mut *connection)).await
            }
            Err(error) => Err(error),
        };
        if let Err(error) = written {
            tracing::debug!(%error, "the windows could not be suspended");
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
        // Those who wait for it are woken when it is in force, not when it was written.
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

impl Element {
    fn render(&self) -> Vec<u8> {
        let mut text = self.seq.to_string().into_bytes();
        text.push(b' ');
        text.extend_from_slice(&self.json);
        text
    }

    fn parse(mut text: Vec<u8>) -> Option<Self> {
        let space = text.iter().position(|byte| *byte == b' ')?;
        let seq = std::str::from_utf8(&text[..space]).ok()?.parse().ok()?;
        text.drain(..=space);
        Some(Self { seq, json: text })
    }
}

/// True when the elements are the `wanted` newest messages of a conversation whose last seq is, at least,
/// `newest`: an append may have come between the two reads of one round trip.
fn is_complete(elements: &[Element], newest: i64, wanted: usize) -> bool {
    let head = elements.first().map_or(0, |element| element.seq);
    head >= newest && elements.len() == wanted.min(usize::try_from(head).unwrap_or(0))
}

/// Begins a call of a script by its digest, on the keys of these conversations; its arguments follow.
fn call(pipeline: &mut Pipeline, script: &Script, pairs: impl ExactSizeIterator<Item = Pair>) {
    pipeline.cmd("EVALSHA").arg(script.get_hash()).arg(3 * pairs.len());
    for pair in pairs {
        for key in keys(pair) {
            pipeline.arg(key);
        }
    }
}

/// The braces put a conversation's keys into one slot of a cluster. Joined rather than formatted: every read needs them.
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

    fn element(seq: i64) -> Element {
        Element { seq, json: br#"{"content":"1 2 3"}"#.to_vec() }
    }

    #[test]
    fn the_keys_of_a_conversation_share_a_slot() {
        let keys = keys(Pair::new(Uuid::from_u128(0xab), Uuid::from_u128(1)));
        let name = "{00000000000000000000000000000001.000000000000000000000000000000ab}";
        assert_eq!(keys, ["lease", "list", "token"].map(|part| format!("chat:recent:{name}:{part}")));
    }

    #[test]
    fn an_element_survives_the_way_through_redis() {
        assert_eq!(Element::parse(element(42).render()), Some(element(42)));
        assert_eq!(Element::parse(b"no".to_vec()), None);
    }

    #[test]
    fn a_list_is_complete_only_up_to_its_lease_and_its_length() {
        let list: Vec<Element> = (1..=5).rev().map(element).collect();
        assert!(is_complete(&list, 5, 5));
        assert!(is_complete(&list[..3], 5, 3));
        assert!(is_complete(&list, 4, 5), "an append came in between");
        assert!(!is_complete(&list, 6, 5), "the list ends before the lease");
        assert!(!is_complete(&list[..3], 5, 5), "the list is too short");
        assert!(is_complete(&[], 0, 5), "a conversation without messages");
        assert!(!is_complete(&[], 1, 5));
    }
}
