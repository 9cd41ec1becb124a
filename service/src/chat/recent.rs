//! The recent window: a conversation's newest messages in Redis, ready to be sent, and never stale.
//!
//! Two keys per conversation, in one slot of a cluster. Both carry an epoch; [`super::permission`] says which epoch's
//! windows a replica may use, if any.
//!
//! - `list`: the newest messages as `SEQ JSON`, newest first, without a gap; of a conversation without messages `0 `. Where
//!   all before a message were removed, it is `SEQ! JSON`: the list ends there although it is short. It expires
//!   `CACHE_TTL_SECONDS` after it was last compared with Postgres;
//! - `token`: held by the reader that is about to fill the list.
//!
//! # Why a read is never stale, and never goes back in time
//!
//! *What is acknowledged is in the list.* After the commit, a writer waits until it knows which windows are in use. If none
//! is, no list can hide the message: the epoch has been raised. Else it runs [`APPEND`] before it acknowledges. In one
//! atomic step that adds the message, or drops a list that it does not continue, and deletes the token: a reader that asked
//! Postgres before the commit may no longer fill the list with what it read. The order of two writers' appends does not
//! matter, for the same reason.
//!
//! *What was shown is in the list.* A reader can see a message in Postgres before its writer has appended it. So before it
//! returns what it read, it does the same: it waits until it knows which windows are in use, and runs [`SETTLE`], which
//! fills the list if the reader holds the token, and else drops a list that ends before what was read, with any token.
//!
//! *An epoch has all of those before.* Say the epoch is raised at R. A permission for the old one was asked for before R, so
//! it ends within `PERMISSION` of R. Whatever came into an old list was committed while such a permission held, and what was
//! acknowledged because no list was in use was committed before the new epoch settled. A list of the new epoch is filled by a
//! reader that asks Postgres after that, at least `SETTLING` after R. So it sees all of both.
//!
//! It suffices that a permission held at any moment after the read began, or after the commit. A replica that is frozen
//! thereafter and goes on much later shows an old list: with all that was acknowledged before it was asked, and nothing that
//! the windows of today lack. Neither does it harm that Redis executes a command late: an append or a fill of an old epoch
//! changes lists that nobody uses, and one of this epoch is ordered by the token.
//!
//! *Redis may lose everything, and may come back with what it had before*: a snapshot, a replica that lagged behind and was
//! promoted, an append-only file without its last second. Each makes it another Redis than the one that Postgres names, so
//! the replica that connects to it raises the epoch. So does one that is connected to another Redis than the others.
//!
//! *A writer may die between commit and append.* Its message was not acknowledged. The list shows it once it is compared
//! with Postgres, [`CHECK_AFTER`] later at most while it is read: `check.rs`. A client that repeats the message under
//! its idempotency key gets it acknowledged after [`APPEND`], like any other.
//!
//! *What was removed is in no list.* After the commit, [`Recent::drop_removed`] drops each list that reaches back to what was
//! removed, and the token. Until then a list may show a message that another reader already misses in Postgres. So [`SETTLE`]
//! drops such a list, too, before that reader returns. If the process that removes messages dies before it has dropped the
//! lists, `check.rs` finds them.
//! *What was erased is in no list.* The past of a conversation changes only when one of its users was deleted. From then on no
//! replica uses its list, for an hour; nothing is erased before all know it, and the hour begins anew while it goes on:
//! `erasure.rs`.
//!
//! # What remains
//!
//! A cluster's client reconnects to single nodes by itself. If a node comes back with older data, or a live master is
//! replaced by force, a replica may for the rest of a permission (`PERMISSION`) show a list that lacks messages. The same
//! holds if a replica's whole machine stands still, monotonic clock included.
//!
//! While Postgres is unavailable, a replica answers from a list without a permission and marks it: `Warning: 110`.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use deadpool_redis::redis::{Pipeline, Script};
use tokio::sync::Notify;
use uuid::Uuid;
use uuid::fmt::Simple;

use super::message::{Pair, RenderedMessage};
use super::permission::{Epoch, Permission, Unsettled, Windows};
use crate::config::Config;
use crate::failpoints::{self, Failpoint};
use crate::store::operation::Operation;
use crate::store::redis::{Live, Redis, Unavailable};

/// A list that was compared with Postgres this long ago is compared again when it is read. It answers meanwhile.
const CHECK_AFTER: Duration = Duration::from_secs(5);

/// Lists that wait to be compared, at most. One that finds no room is added by a later reader.
const DUE_MAX: usize = 1000;

/// For how long no other reader may fill the list. Far above the time that Postgres takes; a reader that dies delays the others.
const TOKEN_TTL: Duration = Duration::from_secs(1);

/// Puts the function that both scripts need before the script.
macro_rules! script {
    ($body:literal) => {
        concat!(
            "local function newest(list)\n\
               local head = redis.call('LINDEX', list, 0)\n\
               return head and tonumber(string.match(head, '^%d+'))\n\
             end\n",
            $body
        )
    };
}

/// The writer's step, after the commit, for any number of conversations. KEYS: list and token of each. ARGV: CACHE_WINDOW,
/// then for each conversation the first new seq, the number of new elements, and the elements, oldest first.
const APPEND: &str = script!(
    "local window, at = tonumber(ARGV[1]), 2
     for key = 1, #KEYS, 2 do
       local list, token = KEYS[key], KEYS[key + 1]
       local first, count = tonumber(ARGV[at]), tonumber(ARGV[at + 1])
       redis.call('DEL', token)
       local head = newest(list)
       if head == first - 1 and window > 0 then
         redis.call('LPUSH', list, unpack(ARGV, at + 2, at + 1 + count))
         redis.call('LTRIM', list, 0, window - 1)
       elseif head and head < first + count - 1 then
         redis.call('DEL', list)
       end
       at = at + 2 + count
     end"
);

/// The reader's step, before it returns what it read in Postgres. KEYS: list, token. ARGV: the newest seq that it read, up to
/// which seq messages were removed, its token or nothing, the list's expiry in ms, then the elements to fill the list with,
/// newest first.
const SETTLE: &str = script!(
    "local list, token = KEYS[1], KEYS[2]
     local held = redis.call('GET', token)
     if held then redis.call('DEL', token) end
     if ARGV[3] ~= '' and held == ARGV[3] then
       redis.call('DEL', list)
       redis.call('RPUSH', list, unpack(ARGV, 5))
       redis.call('PEXPIRE', list, ARGV[4])
     else
       local head, removed = newest(list), tonumber(ARGV[2])
       if head and head < tonumber(ARGV[1]) then
         redis.call('DEL', list)
       elseif head and head > 0 and removed > 0 then
         local oldest, mark = string.match(redis.call('LINDEX', list, -1), '^(%d+)(!?)')
         oldest = tonumber(oldest)
         if oldest <= removed or (oldest == removed + 1 and mark == '') then redis.call('DEL', list) end
       end
     end"
);

/// The newest messages of a conversation.
#[derive(Debug, Default)]
pub(crate) struct Newest {
    /// Newest first.
    pub(super) messages: Vec<RenderedMessage>,
    /// All messages up to this seq were removed. From a list it is 0 unless the messages reach back that far.
    pub(super) removed: i64,
}

#[derive(Debug)]
pub(crate) enum Lookup {
    /// As many messages as were asked for or all there are.
    Hit(Newest),
    Miss(Miss),
}

/// What a reader knows after a miss.
#[derive(Debug, Default)]
pub(crate) struct Miss {
    /// Present if this reader may fill the window; to be passed to [`Recent::fill`].
    pub(super) claim: Option<Claim>,
    /// True if another reader is about to fill the window.
    pub(super) is_being_filled: bool,
    /// The list as it was found, without a permission. It may be shown only while Postgres is unavailable.
    pub(super) unchecked: Newest,
}

/// Lists that are to be compared with Postgres.
#[derive(Default)]
struct Due {
    lists: Mutex<HashMap<Pair, i64>>,
    wake: Notify,
}

impl Due {
    fn add(&self, pair: Pair, newest: i64) {
        let mut lists = self.lists.lock().unwrap_or_else(PoisonError::into_inner);
        if lists.len() < DUE_MAX {
            lists.insert(pair, newest);
            self.wake.notify_one();
        }
    }
}

/// The right to fill a window.
#[derive(Debug)]
pub(crate) struct Claim {
    epoch: Epoch,
    token: String,
}

pub struct Recent {
    redis: Arc<Redis>,
    permission: Arc<Permission>,
    due: Due,
    window: usize,
    ttl: Duration,
    append: Script,
    settle: Script,
}

impl Recent {
    pub(crate) fn new(config: &Config, redis: Arc<Redis>, permission: Arc<Permission>) -> Arc<Self> {
        Arc::new(Self {
            redis,
            permission,
            due: Due::default(),
            window: config.cache_window as usize,
            ttl: Duration::from_secs(config.cache_ttl_seconds.into()),
            append: Script::new(APPEND),
            settle: Script::new(SETTLE),
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

    /// Waits until lists are to be compared with Postgres.
    pub(super) async fn due(&self) {
        self.due.wake.notified().await;
    }

    /// The conversations whose lists are to be compared with Postgres, with the newest seq that their readers saw.
    pub(super) fn take_due(&self) -> HashMap<Pair, i64> {
        std::mem::take(&mut self.due.lists.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Looks for the `wanted` newest messages, for this session. After a miss the caller asks Postgres.
    pub(super) async fn look_up(&self, pair: Pair, session: Uuid, wanted: usize) -> Lookup {
        if wanted > self.window {
            return Lookup::Miss(Miss::default());
        }
        let (live, epoch, is_permitted) = match self.permission.windows() {
            Windows::Usable(live, epoch) => (live, epoch, true),
            Windows::Unsettled(Some((live, epoch))) => (live, epoch, false),
            Windows::Unsettled(None) | Windows::Suspended => return Lookup::Miss(Miss::default()),
        };
        // After the permission: what came with it counts, too.
        let is_deleted = [pair.low(), pair.high()].into_iter().any(|user| self.permission.is_deleted(user));
        if is_deleted || self.permission.has_ended(session) {
            return Lookup::Miss(Miss::default());
        }
        let [list, token] = keys(&epoch, pair);
        let mut pipeline = Pipeline::with_capacity(2);
        pipeline.cmd("PTTL").arg(&list);
        pipeline.cmd("LRANGE").arg(&list).arg(0).arg(wanted.saturating_sub(1));
        let Ok((expires_in, found)) =
            self.redis.run::<(i64, Vec<Vec<u8>>)>(&live, Operation::LookUpWindow, &pipeline).await
        else {
            return Lookup::Miss(Miss::default());
        };
        let exists = !found.is_empty();
        let newest = Newest::of(found);
        let head = newest.seq();
        let reaches_back = newest.removed > 0;
        let all = wanted.min(usize::try_from(head).unwrap_or(0));
        let is_complete = exists && (newest.messages.len() == all || reaches_back);
        if !is_permitted {
            return Lookup::Miss(Miss { unchecked: newest, ..Miss::default() });
        }
        if is_complete {
            if self.is_due(expires_in) {
                self.due.add(pair, head);
            }
            return Lookup::Hit(newest);
        }
        Lookup::Miss(match self.claim(&live, epoch, &token, (!exists).then_some(&list)).await {
            Ok(Some(claim)) => Miss { claim: Some(claim), unchecked: newest, ..Miss::default() },
            Ok(None) => Miss { is_being_filled: true, unchecked: newest, ..Miss::default() },
            Err(Unavailable) => Miss { unchecked: newest, ..Miss::default() },
        })
    }

    /// Whether a list that expires in so many milliseconds is to be compared with Postgres.
    fn is_due(&self, expires_in: i64) -> bool {
        let left = Duration::from_millis(u64::try_from(expires_in).unwrap_or(0));
        // It expires later than it can where the clock of Redis was set back.
        left > self.ttl || self.ttl - left >= CHECK_AFTER.min(self.ttl / 2)
    }

    /// Asks for the right to fill the window with what the caller is about to read. Without success if another reader has it,
    /// or has just filled the list that was missing.
    async fn claim(
        &self,
        live: &Live,
        epoch: Epoch,
        key: &str,
        missing: Option<&String>,
    ) -> Result<Option<Claim>, Unavailable> {
        let token = Uuid::new_v4().simple().to_string();
        let mut pipeline = Pipeline::with_capacity(2);
        pipeline.cmd("SET").arg(key).arg(&token).arg("NX").arg("PX").arg(TOKEN_TTL.as_millis() as u64);
        pipeline.cmd("EXISTS").arg(missing.map_or(key, String::as_str));
        let (taken, exists): (Option<String>, bool) =
            self.redis.run(live, Operation::ClaimWindow, &pipeline).await?;
        let is_filled = missing.is_some() && exists;
        Ok(taken.filter(|_| !is_filled).map(|_| Claim { epoch, token }))
    }

    /// Fills the window with the newest messages, which the caller read in Postgres after it got the claim. If the claim was
    /// withdrawn, it does as [`Recent::settle`].
    pub(super) async fn fill(&self, pair: Pair, claim: Claim, newest: &Newest) -> Result<(), Unsettled> {
        let Newest { messages, removed } = newest;
        if let Windows::Usable(live, epoch) = self.permission.settled(Permission::deadline()).await?
            && epoch == claim.epoch
        {
            let [list, token] = keys(&epoch, pair);
            let mut pipeline = Pipeline::with_capacity(1);
            if failpoints::is_on(Failpoint::IgnoreToken) {
                pipeline.cmd("SET").arg(&token).arg(&claim.token).ignore();
            }
            call(&mut pipeline, &self.settle, [list, token]);
            pipeline.arg(newest.seq()).arg(removed).arg(claim.token).arg(self.ttl.as_millis() as u64);
            if messages.is_empty() {
                pipeline.arg("0 ");
            }
            for element in messages {
                pipeline.arg(encode(element, *removed > 0 && element.seq == removed + 1));
            }
            if self.redis.run::<()>(&live, Operation::SettleWindow, pipeline.ignore()).await.is_ok() {
                return Ok(());
            }
        }
        self.settle(pair, newest).await
    }

    /// Makes sure that no window shows less than what was just read in Postgres, or what was removed there.
    pub(super) async fn settle(&self, pair: Pair, read: &Newest) -> Result<(), Unsettled> {
        if (read.seq() == 0 && read.removed == 0) || failpoints::is_on(Failpoint::SkipSettle) {
            return Ok(());
        }
        let deadline = Permission::deadline();
        loop {
            let Windows::Usable(live, epoch) = self.permission.settled(deadline).await? else {
                return Ok(());
            };
            // After a failure Redis is unavailable: the windows are soon suspended.
            if self.settle_under(&live, &epoch, pair, read.seq(), read.removed).await.is_ok() {
                return Ok(());
            }
        }
    }

    /// Mostly there is nothing to do, which three cheap commands tell.
    pub(super) async fn settle_under(
        &self,
        live: &Live,
        epoch: &Epoch,
        pair: Pair,
        shown: i64,
        removed: i64,
    ) -> Result<(), Unavailable> {
        let [list, token] = keys(epoch, pair);
        let mut pipeline = Pipeline::with_capacity(3);
        pipeline.cmd("LINDEX").arg(&list).arg(0);
        pipeline.cmd("LINDEX").arg(&list).arg(-1);
        pipeline.cmd("EXISTS").arg(&token);
        let (head, oldest, is_being_filled): (Option<Vec<u8>>, Option<Vec<u8>>, bool) =
            self.redis.run(live, Operation::SettleWindow, &pipeline).await?;
        let is_settled = match (head.and_then(decode), oldest.and_then(decode)) {
            (Some((head, _)), Some((oldest, is_first))) => {
                let shows_removed = head.seq > 0 && oldest.seq <= removed + i64::from(!is_first);
                // A reader that is about to fill the list may have read what was removed since.
                head.seq >= shown && (removed == 0 || !(shows_removed || is_being_filled))
            }
            _ => !is_being_filled,
        };
        if is_settled {
            return Ok(());
        }
        let mut pipeline = Pipeline::with_capacity(1);
        call(&mut pipeline, &self.settle, [list, token]);
        pipeline.arg(shown).arg(removed).arg("");
        self.redis.run(live, Operation::SettleWindow, pipeline.ignore()).await
    }

    /// Makes sure that no window shows what was removed from these conversations, all up to a seq of each. The removal is
    /// committed.
    pub(super) async fn drop_removed(&self, removed: &[(Pair, i64)]) -> Result<(), Unsettled> {
        let deadline = Permission::deadline();
        loop {
            let Windows::Usable(live, epoch) = self.permission.settled(deadline).await? else {
                return Ok(());
            };
            if removed.is_empty() {
                return Ok(());
            }
            let mut pipeline = Pipeline::with_capacity(removed.len());
            for (pair, seq) in removed {
                call(&mut pipeline, &self.settle, keys(&epoch, *pair));
                pipeline.arg(0).arg(seq).arg("").ignore();
            }
            // After a failure Redis is unavailable: the windows are soon suspended.
            if self.redis.run::<()>(&live, Operation::SettleWindow, &pipeline).await.is_ok() {
                return Ok(());
            }
        }
    }

    /// Deletes the list of a conversation, and withdraws the right to fill it. No replica uses it any more: it would expire. A
    /// Redis that does not answer therefore does no harm.
    pub(super) async fn forget(&self, pair: Pair) {
        let (Windows::Usable(live, epoch) | Windows::Unsettled(Some((live, epoch)))) =
            self.permission.windows()
        else {
            return;
        };
        let mut pipeline = Pipeline::with_capacity(1);
        pipeline.cmd("DEL").arg(&keys(&epoch, pair)).ignore();
        self.redis.run::<()>(&live, Operation::ForgetWindow, &pipeline).await.ok();
    }

    /// Lets the lists of these conversations live on, which lack nothing.
    pub(super) async fn extend(&self, live: &Live, epoch: &Epoch, pairs: &[Pair]) -> Result<(), Unavailable> {
        // The client takes an empty pipeline for an error.
        if pairs.is_empty() {
            return Ok(());
        }
        let mut pipeline = Pipeline::with_capacity(pairs.len());
        for pair in pairs {
            let [list, _] = keys(epoch, *pair);
            pipeline.cmd("PEXPIRE").arg(list).arg(self.ttl.as_millis() as u64).ignore();
        }
        self.redis.run(live, Operation::ExtendWindow, &pipeline).await
    }

    /// Adds a committed batch to the windows, or makes sure that no window lacks it. Each item is a run of messages whose
    /// seqs follow one another. Only after this may a batch be acknowledged.
    pub(super) async fn append(&self, batch: &[(Pair, Vec<RenderedMessage>)]) -> Result<(), Unsettled> {
        if failpoints::is_on(Failpoint::SkipInvalidation) {
            return Ok(());
        }
        let deadline = Permission::deadline();
        loop {
            let Windows::Usable(live, epoch) = self.permission.settled(deadline).await? else {
                return Ok(());
            };
            // After a failure Redis is unavailable: the windows are soon suspended.
            if self.append_under(&live, &epoch, batch).await.is_ok() {
                return Ok(());
            }
        }
    }

    async fn append_under(
        &self,
        live: &Live,
        epoch: &Epoch,
        batch: &[(Pair, Vec<RenderedMessage>)],
    ) -> Result<(), Unavailable> {
        let mut pipeline = Pipeline::with_capacity(1);
        // A cluster runs a script where all its keys are, so there each conversation needs its own call.
        let together = if live.is_cluster() { 1 } else { batch.len().max(1) };
        for conversations in batch.chunks(together) {
            call(&mut pipeline, &self.append, conversations.iter().flat_map(|(pair, _)| keys(epoch, *pair)));
            pipeline.arg(self.window);
            for (_, elements) in conversations {
                pipeline.arg(elements.first().map_or(0, |element| element.seq)).arg(elements.len());
                for element in elements {
                    pipeline.arg(encode(element, false));
                }
            }
            pipeline.ignore();
        }
        self.redis.run(live, Operation::AppendWindow, &pipeline).await
    }
}

impl Newest {
    /// From the elements of a list.
    fn of(elements: Vec<Vec<u8>>) -> Self {
        let mut newest = Self { messages: Vec::with_capacity(elements.len()), removed: 0 };
        for (message, is_first) in elements.into_iter().filter_map(decode) {
            if is_first {
                newest.removed = message.seq - 1;
            }
            if message.seq > 0 {
                newest.messages.push(message);
            }
        }
        newest
    }

    /// Of the newest message, or 0.
    pub(super) fn seq(&self) -> i64 {
        self.messages.first().map_or(0, |message| message.seq)
    }
}

/// A list's element: `SEQ JSON`, or `SEQ! JSON` where all before it were removed.
fn encode(message: &RenderedMessage, is_first: bool) -> Vec<u8> {
    let mut element = message.seq.to_string().into_bytes();
    element.extend_from_slice(if is_first { b"! " } else { b" " });
    element.extend_from_slice(&message.json);
    element
}

/// The message, and whether all before it were removed.
fn decode(mut element: Vec<u8>) -> Option<(RenderedMessage, bool)> {
    let space = element.iter().position(|byte| *byte == b' ')?;
    let (seq, is_first) = match element[..space].strip_suffix(b"!") {
        Some(seq) => (seq, true),
        None => (&element[..space], false),
    };
    let seq = std::str::from_utf8(seq).ok()?.parse().ok()?;
    element.drain(..=space);
    Some((RenderedMessage { seq, json: element }, is_first))
}

/// Starts a call of a script by its digest, on these keys. The caller adds the arguments.
fn call(pipeline: &mut Pipeline, script: &Script, keys: impl IntoIterator<Item = String>) {
    let keys: Vec<String> = keys.into_iter().collect();
    pipeline.cmd("EVALSHA").arg(script.get_hash()).arg(keys.len()).arg(keys);
}

/// The braces put a conversation's keys into one slot of a cluster. Joined rather than formatted, because every read needs
/// them.
fn keys(epoch: &Epoch, pair: Pair) -> [String; 2] {
    let (mut low, mut high) = ([0; Simple::LENGTH], [0; Simple::LENGTH]);
    let low: &str = pair.low().simple().encode_lower(&mut low);
    let high: &str = pair.high().simple().encode_lower(&mut high);
    ["list", "token"].map(|part| ["chat:recent:", epoch, ":{", low, ".", high, "}:", part].concat())
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
        let keys = keys(&"17.2".into(), Pair::new(Uuid::from_u128(0xab), Uuid::from_u128(1)));
        let name = "{00000000000000000000000000000001.000000000000000000000000000000ab}";
        assert_eq!(keys, ["list", "token"].map(|part| format!("chat:recent:17.2:{name}:{part}")));
    }

    #[test]
    fn an_element_is_decoded_as_it_was_encoded() {
        for is_first in [false, true] {
            assert_eq!(decode(encode(&element(42), is_first)), Some((element(42), is_first)));
        }
        assert_eq!(decode(b"no".to_vec()), None);
    }
}
