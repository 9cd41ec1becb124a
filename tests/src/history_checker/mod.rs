//! The history checker. Writers, readers and followers of streams use two replicas of the real service while servers, links
//! and replicas fail on a schedule. Then the rules are checked: the history must be one that the contract allows.
//!
//! Every choice follows from the seed: what each client does next, and which fault comes when. How the operations interleave
//! does not, because the processes are real. So a seed that failed is likely, not certain, to fail again.

pub mod check;
mod clients;
mod faults;
mod followers;
mod overload;
mod redis;
mod run;
mod schedule;
mod system;

use std::collections::HashMap;
use std::fmt::Write as _;
use std::sync::Arc;
use std::time::Duration;

pub use overload::{Overload, overload};
pub use redis::RedisMode;
pub use run::{Options, Progress, Report, run};
pub use schedule::Plan;

/// A message as it was shown. Equal when all of it is equal.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Message {
    pub id: String,
    pub seq: i64,
    pub sender: String,
    pub recipient: String,
    pub content: String,
    /// With exactly six digits of a second's fraction, so that the order of the texts is the order in time.
    pub created_at: String,
    /// The content is gone, because the sender was deleted.
    pub erased: bool,
}

/// Which messages a read asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Page {
    Offset { offset: i64, limit: i64 },
    Before { seq: i64, limit: i64 },
    After { seq: i64, limit: i64 },
}

#[derive(Clone, Debug)]
pub enum Action {
    /// `content` is unique to a message: attempts with the same content are one message, under one key.
    Send {
        content: String,
        keyed: bool,
    },
    Read(Page),
    /// The session ends.
    Leave,
    /// The user does not want to hear from the other one of the conversation.
    Block,
    Unblock,
    /// The user is deleted, and the content of all the user's messages.
    Delete,
}

/// A message's index in [`History::messages`].
pub type MessageIndex = u32;

#[derive(Clone, Debug)]
pub enum Outcome {
    Acknowledged {
        message: MessageIndex,
        replayed: bool,
    },
    /// `stale` if the replica marked it so, `next` if it linked to a next page.
    Page {
        messages: Vec<MessageIndex>,
        stale: bool,
        next: bool,
    },
    /// A session has ended, a block is there or gone, a user is deleted.
    Done,
    /// With this status, because a session has ended, or of a block.
    Refused(u16),
    /// A 503, a connection that broke or could not be opened, or a timeout: a send may have been stored.
    Unknown(&'static str),
    /// An answer that no client should get.
    Wrong(String),
}

/// One request of one client. Times count from the run's start, on one clock.
#[derive(Clone, Debug)]
pub struct Operation {
    pub client: u32,
    /// The id of the user who asks.
    pub user: Arc<str>,
    /// Of the token. Each session of a run has a number of its own.
    pub session: u32,
    pub replica: usize,
    pub conversation: usize,
    pub start: Duration,
    pub end: Duration,
    pub action: Action,
    pub outcome: Outcome,
}

/// What happened on a follower's stream.
#[derive(Clone, Debug)]
pub enum Told {
    /// The follower asked for a stream, behind a position that an event had before, or from now on.
    Asked {
        position: Option<String>,
    },
    Ready {
        position: String,
        resumed: bool,
    },
    Reset {
        position: String,
        reason: String,
    },
    Message {
        position: String,
        message: MessageIndex,
    },
    End {
        reason: String,
    },
    /// The stream is over: the follower left, there was none, or the connection ended.
    Closed(&'static str),
    /// An answer or an event that no client should get.
    Wrong(String),
}

#[derive(Clone, Debug)]
pub struct StreamEvent {
    pub at: Duration,
    pub replica: usize,
    pub told: Told,
}

/// A client that keeps a stream of one user, one connection after another.
#[derive(Clone, Debug, Default)]
pub struct Follower {
    /// The user's id.
    pub user: String,
    /// In the order in which the follower handled them.
    pub events: Vec<StreamEvent>,
}

/// A time in which something failed on purpose.
#[derive(Clone, Copy, Debug)]
pub struct Disturbance {
    pub start: Duration,
    /// `None` while it lasts.
    pub end: Option<Duration>,
    /// True if nothing but Redis, or the way to it, fails.
    pub redis_only: bool,
}

/// Everything that the clients saw.
#[derive(Clone, Debug, Default)]
pub struct History {
    pub operations: Vec<Operation>,
    pub followers: Vec<Follower>,
    pub disturbances: Vec<Disturbance>,
    /// Every message that was shown, each version of it once.
    pub messages: Vec<Message>,
    /// What Postgres holds in the end, by conversation, in the order of `seq`.
    pub stored: Option<Vec<Vec<MessageIndex>>>,
    /// Whether retention removes old messages.
    pub removals: bool,
    known: HashMap<Message, MessageIndex>,
}

impl History {
    /// The index of this message, which is added when it is new.
    pub fn intern(&mut self, message: Message) -> MessageIndex {
        if let Some(known) = self.known.get(&message) {
            return *known;
        }
        // A run of days does not show that many.
        let index = MessageIndex::try_from(self.messages.len()).unwrap_or(MessageIndex::MAX);
        self.messages.push(message.clone());
        self.known.insert(message, index);
        index
    }

    pub fn message(&self, index: MessageIndex) -> &Message {
        &self.messages[index as usize]
    }
}

/// A seed for a new run.
pub fn random_seed() -> u64 {
    fastrand::u64(..1_000_000_000)
}

/// The names of the first `count` faults of each of the two series, in order.
pub fn planned_faults(redis: RedisMode, seed: u64, count: u64) -> [Vec<&'static str>; 2] {
    let links = (0..count).map(|index| schedule::link_fault(redis, seed, index).1.name());
    let processes = (0..count).map(|index| schedule::process_fault(seed, index).1.name());
    [links.collect(), processes.collect()]
}

/// A text on the first violations and the seed, to find the cause with; empty when there are none.
pub fn describe_violations(options: &Options, report: &Report) -> String {
    const SHOWN_MAX: usize = 5;
    let (redis, seed) = (options.redis.name(), options.seed);
    let violations = &report.violations;
    if violations.is_empty() {
        return String::new();
    }
    let mut text = format!("\nseed {seed}: {} violations, the first of them:\n", violations.len());
    for violation in violations.iter().take(SHOWN_MAX) {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{violation}");
    }
    let _ = writeln!(text, "the last faults:\n{}", report.last_faults.join("\n"));
    let _ = writeln!(text, "the same choices again: cargo xtask soak --redis {redis} --seed {seed}");
    text
}
