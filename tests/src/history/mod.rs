//! The history checker: writers and readers over two replicas of the real service, while servers, lines and
//! replicas fail by a schedule; then a judge looks for an order of events that the contract does not allow.
//!
//! Everything that is chosen follows from the seed: what each client does next, and which fault comes when. How
//! the operations interleave does not, because the processes are real; so a seed that failed is likely, not
//! certain, to fail again.

pub mod check;
mod memory;
mod plan;
pub mod proxy;
mod rig;
mod run;

use std::collections::HashMap;
use std::fmt::Write as _;
use std::time::Duration;

pub use memory::{Memory, memory};
pub use run::{Options, Progress, Report, run};

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
    /// `content` is unique to a message: attempts with the same content are one message under one key.
    Send {
        content: String,
        keyed: bool,
    },
    Read(Page),
}

/// Where a message stands in [`History::messages`].
pub type Shown = u32;

#[derive(Clone, Debug)]
pub enum Outcome {
    Acknowledged {
        message: Shown,
        replayed: bool,
    },
    /// `stale` where the replica said so, `next` where it named a next page.
    Page {
        messages: Vec<Shown>,
        stale: bool,
        next: bool,
    },
    /// A 503, a connection that broke or was never made, or no answer in time: a send may have been stored.
    Unknown(&'static str),
    /// An answer that no client should have got.
    Wrong(String),
}

/// One request of one client. Times are since the run's start, by one clock.
#[derive(Clone, Debug)]
pub struct Operation {
    pub client: u32,
    pub replica: usize,
    pub conversation: usize,
    pub start: Duration,
    pub end: Duration,
    pub action: Action,
    pub outcome: Outcome,
}

/// All that was seen.
#[derive(Clone, Debug, Default)]
pub struct History {
    pub operations: Vec<Operation>,
    /// Every message that was shown, each version of it once.
    pub messages: Vec<Message>,
    /// What Postgres holds in the end, by conversation, in the order of `seq`.
    pub stored: Option<Vec<Vec<Shown>>>,
    known: HashMap<Message, Shown>,
}

impl History {
    /// Where this message stands, which is new or was shown before.
    pub fn shown(&mut self, message: Message) -> Shown {
        if let Some(known) = self.known.get(&message) {
            return *known;
        }
        // A run of days would not show that many.
        let index = Shown::try_from(self.messages.len()).unwrap_or(Shown::MAX);
        self.messages.push(message.clone());
        self.known.insert(message, index);
        index
    }

    pub fn message(&self, shown: Shown) -> &Message {
        &self.messages[shown as usize]
    }
}

/// A seed for a run that should be like no other.
pub fn random_seed() -> u64 {
    fastrand::u64(..1_000_000_000)
}

/// What to tell whoever has to find the cause; nothing when all is well.
pub fn verdict(seed: u64, report: &Report) -> String {
    const SHOWN_MAX: usize = 5;
    let violations = &report.violations;
    if violations.is_empty() {
        return String::new();
    }
    let mut text = format!("\nseed {seed}: {} violations, the first of them:\n", violations.len());
    for violation in violations.iter().take(SHOWN_MAX) {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{violation}");
    }
    let _ = writeln!(text, "the same choices again: cargo xtask soak --seed {seed}");
    text
}
