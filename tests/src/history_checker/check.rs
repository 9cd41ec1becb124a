//! The rules: which histories the contract allows. They do not know how a history was recorded, so tests can check them on
//! histories that were made up.

mod accounts;
mod streams;

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fmt::{self, Display};
use std::time::Duration;

use super::{Action, History, Message, MessageIndex, Operation, Outcome, Page};

/// A rule that was broken, and by what.
#[derive(Clone, Debug)]
pub struct Violation {
    pub rule: &'static str,
    pub evidence: String,
}

impl Display for Violation {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}\n{}", self.rule, self.evidence)
    }
}

pub const WRONG_ANSWER: &str = "an answer that no client should get";
pub const TORN_PAGE: &str = "a page is whole: newest first, seq without gaps, as long as it can be";
pub const TWO_VERSIONS: &str = "a seq belongs to one message, which is the same wherever it is shown";
pub const LOST_ACK: &str = "an acknowledged message is stored, once and where it was acknowledged";
pub const DOUBLED: &str = "no message is stored twice";
pub const UNSENT: &str = "only what was sent is stored, from whom it was";
pub const GAP: &str = "seq counts 1, 2, 3 without gaps";
pub const UNSTORED: &str = "only what is stored is shown";
pub const MISSED_ACK: &str = "a read that begins after an acknowledgement shows the message";
pub const WENT_BACK: &str = "a read shows no older history than one that ended before it";
pub const SEND_ORDER: &str = "a message sent after an acknowledgement has the greater seq";
pub const TIME_ORDER: &str = "created_at does not decrease along seq";
pub const TWO_ANSWERS: &str = "an Idempotency-Key always answers with its first message";
pub const AFTER_END: &str = "a session that has ended stores nothing, and reads nothing a second later";
pub const AFTER_BLOCK: &str = "what a blocked user sends after the block's answer is not stored";
pub const REFUSED: &str =
    "a request is refused only where a session has ended, or a user is blocked or deleted";
pub const ERASED_CONTENT: &str = "an erased message has no content, and every other has some";
pub const ERASED_EARLY: &str = "a message is erased only after the deletion of its sender began";
pub const UNERASED: &str = "a read shows no content that one that ended before it showed as erased";
pub const CAME_BACK: &str = "a message that was removed does not come back";
pub const STREAM_EVENTS: &str =
    "a stream begins with its position, has one with each message, and ends with a reason";
pub const STREAM_RESET: &str = "a stream takes up the position that it is given, and no other";
pub const STREAM_FOREIGN: &str = "a stream shows messages of its user alone";
pub const STREAM_DOUBLED: &str = "a stream shows a message once, over all its resumes";
pub const STREAM_GAP: &str =
    "a stream shows a conversation in the order of seq, without gaps, over all its resumes";
pub const STREAM_MISSED: &str = "a stream shows every message that is sent after it began";
pub const STREAM_LATE: &str = "an open stream shows an acknowledged message in time";

/// Checks every rule on all operations so far; those about stored messages once `stored` is set.
pub fn violations(history: &History) -> Vec<Violation> {
    let mut checker = Checker { history, found: Vec::new() };
    checker.answers();
    checker.versions();
    checker.freshness();
    checker.streams();
    checker.accounts();
    checker.removals();
    if let Some(stored) = &history.stored {
        let messages = checker.sends();
        for (conversation, stored) in stored.iter().enumerate() {
            checker.stored_is_in_order(conversation, stored);
        }
        checker.exactly_once(&messages, stored);
        checker.sent_in_order(&messages, stored);
    }
    checker.found
}

/// Whether a follower still lacks something that is stored.
pub fn streams_lack_messages(history: &History) -> bool {
    let mut checker = Checker { history, found: Vec::new() };
    checker.streams();
    checker.found.iter().any(|violation| violation.rule == STREAM_MISSED)
}

struct Checker<'a> {
    history: &'a History,
    found: Vec<Violation>,
}

/// The attempts to send one message.
struct Sent<'a> {
    conversation: usize,
    first_start: Duration,
    attempts: Vec<&'a Operation>,
}

impl<'a> Sent<'a> {
    fn acknowledged(&self) -> impl Iterator<Item = (&'a Operation, MessageIndex, bool)> {
        self.attempts.iter().filter_map(|operation| match operation.outcome {
            Outcome::Acknowledged { message, replayed } => Some((*operation, message, replayed)),
            _ => None,
        })
    }
}

impl<'a> Checker<'a> {
    fn broken(&mut self, rule: &'static str, evidence: String) {
        self.found.push(Violation { rule, evidence });
    }

    fn seq(&self, shown: MessageIndex) -> i64 {
        self.history.message(shown).seq
    }

    /// Each answer on its own.
    fn answers(&mut self) {
        for operation in &self.history.operations {
            match (&operation.action, &operation.outcome) {
                (_, Outcome::Wrong(_)) => self.broken(WRONG_ANSWER, self.describe(operation)),
                (Action::Read(page), Outcome::Page { messages, next, .. }) => {
                    let seqs: Vec<i64> = messages.iter().map(|shown| self.seq(*shown)).collect();
                    if let Some(fault) = page_fault(*page, &seqs, *next, self.history.removals) {
                        let seqs = format!("  seq {seqs:?}, next page: {next}");
                        self.broken(TORN_PAGE, format!("{}\n{seqs}\n  {fault}", self.describe(operation)));
                    }
                }
                _ => {}
            }
        }
    }

    /// A seq has one version, and a message has one seq.
    fn versions(&mut self) {
        let mut by_seq: HashMap<(usize, i64), (MessageIndex, &Operation)> = HashMap::new();
        let mut by_content: HashMap<&str, MessageIndex> = HashMap::new();
        let mut seen = vec![false; self.history.messages.len()];
        for operation in &self.history.operations {
            let shown: &[MessageIndex] = match &operation.outcome {
                Outcome::Page { messages, .. } => messages,
                Outcome::Acknowledged { message, .. } => std::slice::from_ref(message),
                _ => continue,
            };
            for &shown in shown {
                if std::mem::replace(&mut seen[shown as usize], true) {
                    continue;
                }
                let message = self.history.message(shown);
                match by_seq.entry((operation.conversation, message.seq)) {
                    Entry::Vacant(entry) => _ = entry.insert((shown, operation)),
                    Entry::Occupied(entry) => {
                        let (first, by) = *entry.get();
                        if self.is_erased_form(first, shown) {
                            continue;
                        }
                        self.broken(
                            TWO_VERSIONS,
                            format!(
                                "{}\n  {}\n{}\n  {}",
                                self.describe(by),
                                brief(self.history.message(first)),
                                self.describe(operation),
                                brief(message)
                            ),
                        );
                    }
                }
                if !message.erased
                    && let Some(first) = by_content.insert(&message.content, shown)
                {
                    let first = brief(self.history.message(first));
                    self.broken(DOUBLED, format!("  {first}\n  {}", brief(message)));
                }
            }
        }
        // A stream shows the same versions.
        for (follower, event, shown) in self.streamed() {
            let message = self.history.message(shown);
            if !std::mem::replace(&mut seen[shown as usize], true)
                && !message.erased
                && let Some(first) = by_content.insert(&message.content, shown)
            {
                let first = brief(self.history.message(first));
                let event = self.describe_event(follower, event);
                self.broken(TWO_VERSIONS, format!("{event}\n  {}\n  elsewhere {first}", brief(message)));
            }
        }
    }

    /// Whether both are one message, which one of them shows as erased.
    fn is_erased_form(&self, one: MessageIndex, other: MessageIndex) -> bool {
        let [one, other] = [one, other].map(|shown| self.history.message(shown));
        let erased = |message: &Message| Message { content: String::new(), erased: true, ..message.clone() };
        one.erased != other.erased && erased(one) == erased(other)
    }

    /// In real time and across replicas: what was acknowledged or shown is in every read that begins later.
    fn freshness(&mut self) {
        let conversations = self.history.operations.iter().map(|operation| operation.conversation + 1).max();
        for conversation in 0..conversations.unwrap_or(0) {
            let of_this = || {
                self.history.operations.iter().filter(move |operation| operation.conversation == conversation)
            };
            // What is known: from when on, up to which seq, and by which operation.
            let mut known: Vec<(Duration, i64, &Operation)> = of_this()
                .filter_map(|operation| {
                    let newest = match &operation.outcome {
                        Outcome::Acknowledged { message, .. } => *message,
                        Outcome::Page { messages, .. } => *messages.first()?,
                        _ => return None,
                    };
                    Some((operation.end, self.seq(newest), operation))
                })
                .collect();
            known.sort_unstable_by_key(|(end, ..)| *end);
            let mut reads: Vec<&Operation> = of_this()
                .filter(|operation| matches!(operation.outcome, Outcome::Page { stale: false, .. }))
                .collect();
            reads.sort_unstable_by_key(|operation| operation.start);
            let mut known = known.into_iter().peekable();
            let mut bound: Option<(i64, &Operation)> = None;
            for read in reads {
                while let Some((_, seq, operation)) = known.next_if(|(end, ..)| *end < read.start) {
                    if bound.is_none_or(|(newest, _)| seq > newest) {
                        bound = Some((seq, operation));
                    }
                }
                if let Some((newest, witness)) = bound
                    && let Some(lacking) = self.lacks(read, newest)
                {
                    let acknowledged = matches!(witness.outcome, Outcome::Acknowledged { .. });
                    self.broken(
                        if acknowledged { MISSED_ACK } else { WENT_BACK },
                        format!(
                            "{}\n{}\n  lacks seq {lacking}, known {:.1} ms before it began",
                            self.describe(witness),
                            self.describe(read),
                            (read.start - witness.end).as_secs_f64() * 1000.0
                        ),
                    );
                }
            }
        }
    }

    /// A seq that this read should show, but does not, in a conversation whose newest seq is at least `newest`.
    fn lacks(&self, read: &Operation, newest: i64) -> Option<i64> {
        let (Action::Read(page), Outcome::Page { messages, .. }) = (&read.action, &read.outcome) else {
            return None;
        };
        let first = messages.first().map_or(0, |shown| self.seq(*shown));
        let expected = match page {
            Page::Offset { offset, .. } => newest - offset,
            Page::Before { seq, .. } => newest.min(seq - 1),
            Page::After { seq, limit } if newest > *seq => {
                // What follows may begin further up.
                let oldest = messages.last().filter(|_| self.history.removals);
                newest.min(oldest.map_or(*seq, |shown| self.seq(*shown) - 1) + limit)
            }
            Page::After { .. } => 0,
        };
        // All of it was removed.
        if self.history.removals && messages.is_empty() {
            return None;
        }
        (first < expected).then_some(expected)
    }

    /// The attempts to send, by content.
    fn sends(&mut self) -> HashMap<&'a str, Sent<'a>> {
        let mut messages: HashMap<&str, Sent<'_>> = HashMap::new();
        for operation in &self.history.operations {
            let Action::Send { content, .. } = &operation.action else { continue };
            let sent = messages.entry(content).or_insert(Sent {
                conversation: operation.conversation,
                first_start: operation.start,
                attempts: Vec::new(),
            });
            sent.first_start = sent.first_start.min(operation.start);
            sent.attempts.push(operation);
        }
        messages
    }

    fn stored_is_in_order(&mut self, conversation: usize, stored: &[MessageIndex]) {
        let first = stored.first().filter(|_| self.history.removals).map_or(1, |shown| self.seq(*shown));
        for (index, shown) in stored.iter().enumerate() {
            let message = self.history.message(*shown);
            if message.seq != index as i64 + first {
                return self.broken(
                    GAP,
                    format!("  conversation {conversation}: number {} is {}", index + 1, brief(message)),
                );
            }
        }
        for pair in stored.windows(2) {
            let [earlier, later] = [pair[0], pair[1]].map(|shown| self.history.message(shown));
            if earlier.created_at > later.created_at {
                self.broken(
                    TIME_ORDER,
                    format!("  conversation {conversation}: {}\n  {}", brief(earlier), brief(later)),
                );
            }
        }
    }

    fn exactly_once(&mut self, messages: &HashMap<&str, Sent<'a>>, stored: &[Vec<MessageIndex>]) {
        let mut stored_at: HashMap<&str, (usize, MessageIndex)> = HashMap::new();
        let mut is_stored = vec![false; self.history.messages.len()];
        let mut erased: HashMap<&str, MessageIndex> = HashMap::new();
        for (conversation, stored) in stored.iter().enumerate() {
            for &shown in stored {
                is_stored[shown as usize] = true;
                let message = self.history.message(shown);
                if message.erased {
                    erased.insert(&message.id, shown);
                    continue;
                }
                if let Some((_, first)) = stored_at.insert(&message.content, (conversation, shown)) {
                    let first = brief(self.history.message(first));
                    self.broken(
                        DOUBLED,
                        format!("  conversation {conversation}: {first}\n  {}", brief(message)),
                    );
                }
                if messages.get(&*message.content).is_none_or(|sent| sent.conversation != conversation) {
                    self.broken(UNSENT, format!("  conversation {conversation}: {}", brief(message)));
                }
            }
        }
        for (content, sent) in messages {
            let mut first: Option<(&Operation, MessageIndex)> = None;
            for (operation, shown, replayed) in sent.acknowledged() {
                if stored_at.get(content) != Some(&(sent.conversation, shown))
                    && !self.is_gone(shown, &erased, &stored[sent.conversation..=sent.conversation])
                {
                    let found = stored_at.get(content).map(|(_, shown)| brief(self.history.message(*shown)));
                    let found = found.unwrap_or_else(|| "nothing".to_owned());
                    self.broken(LOST_ACK, format!("{}\n  stored: {found}", self.describe(operation)));
                }
                if let Some((earlier, _)) = first
                    && earlier.end < operation.start
                    && !replayed
                {
                    self.broken(
                        TWO_ANSWERS,
                        format!("{}\n{}", self.describe(earlier), self.describe(operation)),
                    );
                }
                first = first.or(Some((operation, shown)));
            }
        }
        for operation in &self.history.operations {
            let Outcome::Page { messages, .. } = &operation.outcome else { continue };
            for &shown in messages {
                // Reported once, for the first read that showed it.
                let of_this = operation.conversation..=operation.conversation;
                if !std::mem::replace(&mut is_stored[shown as usize], true)
                    && !self.is_gone(shown, &erased, &stored[of_this])
                {
                    let message = brief(self.history.message(shown));
                    self.broken(UNSTORED, format!("{}\n  shows {message}", self.describe(operation)));
                }
            }
        }
        for (follower, event, shown) in self.streamed() {
            if !std::mem::replace(&mut is_stored[shown as usize], true)
                && !self.is_gone(shown, &erased, stored)
            {
                self.broken(UNSTORED, self.describe_event(follower, event));
            }
        }
    }

    /// Whether it is stored as erased, or was removed from one of these conversations.
    fn is_gone(
        &self,
        shown: MessageIndex,
        erased: &HashMap<&str, MessageIndex>,
        stored: &[Vec<MessageIndex>],
    ) -> bool {
        let message = self.history.message(shown);
        let begins = |stored: &Vec<MessageIndex>| stored.first().map_or(i64::MAX, |shown| self.seq(*shown));
        erased.get(&*message.id).is_some_and(|stored| self.is_erased_form(shown, *stored))
            || (self.history.removals && stored.iter().any(|stored| message.seq < begins(stored)))
    }

    /// A message that was acknowledged before another was first sent has the smaller seq.
    fn sent_in_order(&mut self, messages: &HashMap<&str, Sent<'a>>, stored: &[Vec<MessageIndex>]) {
        for stored in stored {
            let mut latest: Option<&Sent<'_>> = None;
            for &shown in stored {
                let Some(sent) = messages.get(&*self.history.message(shown).content) else { continue };
                let acknowledged = sent
                    .acknowledged()
                    .map(|(operation, ..)| operation)
                    .min_by_key(|operation| operation.end);
                if let (Some(latest), Some(acknowledged)) = (latest, acknowledged)
                    && acknowledged.end < latest.first_start
                {
                    let behind = latest.attempts.first().map(|operation| self.describe(operation));
                    self.broken(
                        SEND_ORDER,
                        format!("{}\n{}", self.describe(acknowledged), behind.unwrap_or_default()),
                    );
                }
                if latest.is_none_or(|latest| sent.first_start > latest.first_start) {
                    latest = Some(sent);
                }
            }
        }
    }

    /// An operation on one line.
    fn describe(&self, operation: &Operation) -> String {
        let Operation { client, user, session, replica, conversation, start, end, action, outcome } =
            operation;
        let action = match action {
            Action::Send { content, keyed } => {
                // Without its padding.
                let name = content.split(' ').next().unwrap_or(content);
                format!("sends {name}{}", if *keyed { " under a key" } else { "" })
            }
            Action::Read(Page::Offset { offset, limit }) => format!("reads offset={offset} limit={limit}"),
            Action::Read(Page::Before { seq, limit }) => format!("reads before={seq} limit={limit}"),
            Action::Read(Page::After { seq, limit }) => format!("reads after={seq} limit={limit}"),
            action => format!("{action:?}"),
        };
        let outcome = match outcome {
            Outcome::Acknowledged { message, replayed } => {
                let replayed = if *replayed { ", replayed" } else { "" };
                format!("201 seq {}{replayed}", self.seq(*message))
            }
            Outcome::Page { messages, stale, .. } => {
                let seqs = match (messages.first(), messages.last()) {
                    (Some(first), Some(last)) => format!("seq {}..{}", self.seq(*first), self.seq(*last)),
                    _ => "nothing".to_owned(),
                };
                format!("200 {seqs}{}", if *stale { ", marked as stale" } else { "" })
            }
            Outcome::Unknown(why) => (*why).to_owned(),
            Outcome::Wrong(answer) => answer.clone(),
            outcome => format!("{outcome:?}"),
        };
        format!(
            "  {:.4}..{:.4} s  client {client}, user {user}, session {session}, replica {replica}, conversation {conversation}: {action} -> {outcome}",
            start.as_secs_f64(),
            end.as_secs_f64()
        )
    }
}

/// What is wrong with a page on its own. With removals a conversation may begin at any seq.
fn page_fault(page: Page, seqs: &[i64], next: bool, removals: bool) -> Option<&'static str> {
    if seqs.windows(2).any(|pair| pair[0] != pair[1] + 1) {
        return Some("its seqs do not follow one another");
    }
    let (Page::Offset { limit, .. } | Page::Before { limit, .. } | Page::After { limit, .. }) = page;
    let length = seqs.len() as i64;
    if length > limit {
        return Some("it is longer than its limit");
    }
    let (Some(&newest), Some(&oldest)) = (seqs.first(), seqs.last()) else {
        return next.then_some("it is empty and names a next page");
    };
    match page {
        Page::After { seq, .. } if oldest != seq + 1 && !(removals && oldest > seq) => {
            Some("it does not follow its seq directly")
        }
        Page::After { .. } if length < limit && next => Some("it is not full and names a next page"),
        Page::After { .. } => None,
        Page::Before { seq, .. } if newest >= seq => Some("it does not end below its seq"),
        _ if removals && (length == limit || !next) && !(next && oldest == 1) => None,
        _ if length < limit && oldest != 1 => Some("it is not full and does not begin at 1"),
        _ if next != (oldest > 1) => Some("its link does not say whether there is more"),
        _ => None,
    }
}

fn brief(message: &Message) -> String {
    let Message { id, seq, sender, content, created_at, .. } = message;
    let start: String = content.chars().take(20).collect();
    format!("seq {seq} id {id} from {sender} at {created_at}: {start:?}")
}
