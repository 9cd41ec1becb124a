//! The rules of sessions that end, of blocks, of users who are deleted, and of messages that are removed for their age.

use std::collections::HashMap;
use std::time::Duration;

use super::{
    AFTER_BLOCK, AFTER_END, CAME_BACK, Checker, ERASED_CONTENT, ERASED_EARLY, REFUSED, UNERASED, brief,
};
use crate::history_checker::{Action, MessageIndex, Operation, Outcome, Page};

/// For so long a window may answer after a session has ended.
const WINDOW: Duration = Duration::from_secs(1);

/// What was done to sessions and users.
#[derive(Default)]
struct Changes<'a> {
    ends: HashMap<u32, Vec<&'a Operation>>,
    /// By conversation.
    blocks: HashMap<usize, Vec<&'a Operation>>,
    deletions: HashMap<&'a str, Vec<&'a Operation>>,
}

fn is_done(operation: &Operation) -> bool {
    matches!(operation.outcome, Outcome::Done)
}

impl<'a> Changes<'a> {
    fn of(operations: &'a [Operation]) -> Self {
        let mut changes = Self::default();
        for operation in operations {
            match operation.action {
                Action::Leave => changes.ends.entry(operation.session).or_default().push(operation),
                Action::Block | Action::Unblock => {
                    changes.blocks.entry(operation.conversation).or_default().push(operation);
                }
                Action::Delete => changes.deletions.entry(&operation.user).or_default().push(operation),
                Action::Send { .. } | Action::Read(_) => {}
            }
        }
        changes
    }

    /// The end of its session, or the deletion of its user, that was answered so long before the operation began.
    fn ended(&self, operation: &Operation, before: Duration) -> Option<&'a Operation> {
        let ends = self.ends.get(&operation.session).into_iter().flatten();
        let mut ends = ends.chain(self.deletions.get(&*operation.user).into_iter().flatten());
        ends.find(|end| is_done(end) && end.end + before < operation.start).copied()
    }

    /// The block that was answered before this send began, and that nothing may have removed before it ended.
    fn blocked(&self, send: &Operation) -> Option<&'a Operation> {
        let all = self.blocks.get(&send.conversation)?;
        all.iter().copied().find(|block| {
            matches!(block.action, Action::Block)
                && block.user != send.user
                && is_done(block)
                && block.end < send.start
                && !all.iter().any(|other| {
                    // One without an answer may take effect at any time.
                    matches!(other.action, Action::Unblock)
                        && other.user == block.user
                        && other.start <= send.end
                        && (other.end >= block.start || !is_done(other))
                })
        })
    }

    /// Whether something may be the reason for a refusal with this status.
    fn explain(&self, refused: &Operation, status: u16) -> bool {
        let began = |change: &&Operation| change.start < refused.end;
        let mut deletions = self.deletions.iter();
        match status {
            401 => {
                self.ends.get(&refused.session).into_iter().flatten().any(began)
                    || self.deletions.get(&*refused.user).into_iter().flatten().any(began)
            }
            403 => {
                let all = self.blocks.get(&refused.conversation).into_iter().flatten();
                let is_lifted = |block: &Operation| {
                    is_done(block)
                        && all.clone().any(|other| {
                            matches!(other.action, Action::Unblock)
                                && other.user == block.user
                                && is_done(other)
                                && other.start > block.end
                                && other.end < refused.start
                        })
                };
                all.clone().any(|block| {
                    matches!(block.action, Action::Block)
                        && block.user != refused.user
                        && began(block)
                        && !is_lifted(block)
                })
            }
            404 => deletions.any(|(user, all)| **user != *refused.user && all.iter().any(began)),
            _ => false,
        }
    }

    /// Whether a deletion of this user had begun.
    fn may_be_erased(&self, sender: &str, at: Duration) -> bool {
        self.deletions.get(sender).into_iter().flatten().any(|deletion| deletion.start < at)
    }
}

impl<'a> Checker<'a> {
    pub(super) fn accounts(&mut self) {
        let changes = Changes::of(&self.history.operations);
        self.refusals(&changes);
        self.erasures(&changes);
    }

    /// After the answer to the end of a session, or to a block, nothing is taken; before it began, nothing is refused.
    fn refusals(&mut self, changes: &Changes<'a>) {
        for operation in &self.history.operations {
            let (rule, why) = match (&operation.action, &operation.outcome) {
                (Action::Send { .. }, Outcome::Acknowledged { replayed, .. }) => {
                    match (changes.ended(operation, Duration::ZERO), changes.blocked(operation)) {
                        (Some(end), _) => (AFTER_END, Some(end)),
                        // What was sent before the block may be repeated.
                        (None, Some(block)) if !replayed => (AFTER_BLOCK, Some(block)),
                        _ => continue,
                    }
                }
                (Action::Read(_), Outcome::Page { stale: false, .. }) => {
                    match changes.ended(operation, WINDOW) {
                        Some(end) => (AFTER_END, Some(end)),
                        None => continue,
                    }
                }
                (_, Outcome::Refused(status)) if !changes.explain(operation, *status) => (REFUSED, None),
                _ => continue,
            };
            let why = why.map(|why| self.describe(why) + "\n").unwrap_or_default();
            self.broken(rule, format!("{why}{}", self.describe(operation)));
        }
        // Nor is what had no answer stored, and then shown.
        let shown: HashMap<&str, MessageIndex> = self
            .history
            .messages
            .iter()
            .zip(0..)
            .map(|(message, index)| (&*message.content, index))
            .collect();
        for (content, sent) in self.sends() {
            let forbidden = |operation: &&'a Operation| {
                let end = changes.ended(operation, Duration::ZERO).map(|end| (AFTER_END, end));
                end.or_else(|| changes.blocked(operation).map(|block| (AFTER_BLOCK, block)))
            };
            let all: Vec<_> = sent.attempts.iter().map_while(forbidden).collect();
            if let (Some((rule, why)), Some(index)) = (all.first(), shown.get(content))
                && all.len() == sent.attempts.len()
                && sent.acknowledged().next().is_none()
            {
                let lines = [why, &sent.attempts[0]].map(|operation| self.describe(operation)).join("\n");
                self.broken(rule, format!("{lines}\n  {}", brief(self.history.message(*index))));
            }
        }
    }

    fn erasures(&mut self, changes: &Changes<'a>) {
        for message in &self.history.messages {
            if message.erased != message.content.is_empty() {
                self.broken(ERASED_CONTENT, format!("  {}", brief(message)));
            }
        }
        // From when on each message is known to be erased.
        let mut erased: HashMap<(usize, i64), &Operation> = HashMap::new();
        for (operation, shown) in self.pages() {
            let message = self.history.message(shown);
            if !message.erased {
                continue;
            }
            if !changes.may_be_erased(&message.sender, operation.end) {
                self.broken(ERASED_EARLY, format!("{}\n  {}", self.describe(operation), brief(message)));
            }
            let first = erased.entry((operation.conversation, message.seq)).or_insert(operation);
            if operation.end < first.end {
                *first = operation;
            }
        }
        for (operation, shown) in self.pages() {
            let message = self.history.message(shown);
            let known = erased.get(&(operation.conversation, message.seq));
            if let Some(known) = known.filter(|known| !message.erased && known.end < operation.start) {
                let lines = [*known, operation].map(|operation| self.describe(operation)).join("\n");
                self.broken(UNERASED, format!("{lines}\n  {}", brief(message)));
            }
        }
        for (follower, event, shown) in self.streamed() {
            let message = self.history.message(shown);
            if message.erased && !changes.may_be_erased(&message.sender, event.at) {
                self.broken(ERASED_EARLY, self.describe_event(follower, event));
            }
        }
        for shown in self.history.stored.iter().flatten().flatten() {
            let message = self.history.message(*shown);
            if message.erased && !changes.may_be_erased(&message.sender, Duration::MAX) {
                self.broken(ERASED_EARLY, format!("  stored: {}", brief(message)));
            }
        }
    }

    /// What pages show that are not marked as stale.
    fn pages(&self) -> impl Iterator<Item = (&'a Operation, MessageIndex)> + use<'a> {
        self.history.operations.iter().flat_map(|operation| {
            let shown: &[MessageIndex] = match &operation.outcome {
                Outcome::Page { messages, stale: false, .. } => messages,
                _ => &[],
            };
            shown.iter().map(move |shown| (operation, *shown))
        })
    }

    /// A conversation's beginning moves up only. What vanishes elsewhere breaks the rules of pages.
    pub(super) fn removals(&mut self) {
        if !self.history.removals {
            return;
        }
        // By conversation: where it began, as of which read.
        let mut known: HashMap<usize, Vec<(i64, &Operation)>> = HashMap::new();
        for operation in &self.history.operations {
            if let Some(beginning) = self.beginning(operation) {
                known.entry(operation.conversation).or_default().push((beginning, operation));
            }
        }
        for (operation, shown) in self.pages() {
            let message = self.history.message(shown);
            let of_this = known.get(&operation.conversation).into_iter().flatten();
            let mut later = of_this.filter(|(beginning, _)| *beginning > message.seq);
            if let Some((_, witness)) = later.find(|(_, read)| read.end < operation.start) {
                let lines = [*witness, operation].map(|operation| self.describe(operation)).join("\n");
                return self.broken(CAME_BACK, format!("{lines}\n  {}", brief(message)));
            }
        }
        for (conversation, stored) in self.history.stored.iter().flatten().enumerate() {
            let Some(first) = stored.first().map(|shown| self.history.message(*shown)) else { continue };
            let mut later = known.get(&conversation).into_iter().flatten();
            if let Some((_, witness)) = later.find(|(beginning, _)| *beginning > first.seq) {
                let witness = self.describe(witness);
                self.broken(CAME_BACK, format!("{witness}\n  stored: {}", brief(first)));
            }
        }
    }

    /// Where the conversation begins, if this read shows it: nothing is before it.
    fn beginning(&self, operation: &Operation) -> Option<i64> {
        let (Action::Read(page), Outcome::Page { messages, stale: false, next }) =
            (&operation.action, &operation.outcome)
        else {
            return None;
        };
        let oldest = messages.last().map(|shown| self.seq(*shown));
        match (page, oldest) {
            (Page::After { seq, .. }, Some(oldest)) => (oldest > seq + 1).then_some(oldest),
            (Page::Before { seq, .. }, None) => Some(*seq),
            (Page::Offset { .. } | Page::Before { .. }, Some(oldest)) => (!next).then_some(oldest),
            (Page::After { .. } | Page::Offset { .. }, None) => None,
        }
    }
}
