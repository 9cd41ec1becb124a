//! The rules for streams: each message once, in order, and all that were acknowledged.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use super::check::{UNSTORED, Violation};
use super::{Action, Followed, History, Operation, Outcome};

pub const STREAM_ANSWER: &str =
    "a stream goes on where it was, and answers nothing that no client should get";
pub const STREAM_ORDER: &str =
    "a stream shows each message once, and those of a conversation in the order of seq";
pub const STREAM_MISSED: &str =
    "a stream shows every message that was sent after it was ready, and acknowledged";
pub const STREAM_LATE: &str = "a stream shows a message soon after its acknowledgement";

/// As [`super::check::violations`], of what the followers saw.
pub(super) fn violations(history: &History) -> Vec<Violation> {
    history.followed.iter().flat_map(|followed| of_follower(history, followed)).collect()
}

fn of_follower(history: &History, followed: &Followed) -> Vec<Violation> {
    let mut found = Vec::new();
    let user = &followed.user;
    let mut broken = |rule, evidence: String| {
        found.push(Violation { rule, evidence: format!("  user {user}: {evidence}") })
    };
    if let Some(wrong) = followed.wrong.first() {
        broken(STREAM_ANSWER, wrong.clone());
    }
    let mut last: HashMap<&str, i64> = HashMap::new();
    for (at, shown) in &followed.shown {
        let message = history.message(*shown);
        let peer = if message.sender == *user { &message.recipient } else { &message.sender };
        let before = last.insert(peer, message.seq);
        if before.is_some_and(|before| before + 1 != message.seq) {
            let at = at.as_secs_f64();
            broken(
                STREAM_ORDER,
                format!("with {peer} seq {before:?} is followed by {} at {at:.4} s", message.seq),
            );
            break;
        }
    }
    if let Some(stored) = &history.stored {
        let stored: HashSet<_> = stored.iter().flatten().collect();
        let unknown = followed.shown.iter().find(|(_, shown)| !stored.contains(shown));
        if let Some((_, shown)) = unknown {
            broken(UNSTORED, format!("a stream showed {:?}", history.message(*shown)));
        }
    }
    let Some(ready) = followed.ready else { return found };
    let shown: HashMap<u32, Duration> = followed.shown.iter().map(|(at, shown)| (*shown, *at)).collect();
    let now = history.operations.iter().map(|operation| operation.end).max().unwrap_or_default();
    for (operation, message) in acknowledged(history, user).filter(|(operation, _)| operation.start > ready) {
        let at = shown.get(&message);
        let acknowledged = operation.end.as_secs_f64();
        let seq = history.message(message).seq;
        if at.is_none() && history.stored.is_some() {
            broken(STREAM_MISSED, format!("seq {seq}, acknowledged at {acknowledged:.4} s, was not shown"));
            break;
        }
        let delay = at.unwrap_or(&now).saturating_sub(operation.end);
        if history.prompt.is_some_and(|limit| delay > limit) {
            let delay = delay.as_secs_f64();
            broken(
                STREAM_LATE,
                format!("seq {seq}, acknowledged at {acknowledged:.4} s, took {delay:.1} s or more"),
            );
            break;
        }
    }
    found
}

/// What was sent by or to the user.
fn acknowledged<'a>(history: &'a History, user: &'a str) -> impl Iterator<Item = (&'a Operation, u32)> {
    history.operations.iter().filter_map(move |operation| match (&operation.action, &operation.outcome) {
        (Action::Send { .. }, Outcome::Acknowledged { message, replayed: false }) => {
            let shown = history.message(*message);
            (shown.sender == user || shown.recipient == user).then_some((operation, *message))
        }
        _ => None,
    })
}
