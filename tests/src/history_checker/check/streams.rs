//! The rules of streams. What a follower has handled, from its first `ready` on and over all its resumes, is one sequence of
//! messages. A resume behind an earlier event takes back what followed that event.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use super::{
    Checker, STREAM_DOUBLED, STREAM_EVENTS, STREAM_FOREIGN, STREAM_GAP, STREAM_LATE, STREAM_MISSED,
    STREAM_RESET, Sent, WRONG_ANSWER, brief,
};
use crate::history_checker::{Follower, History, Message, MessageIndex, StreamEvent, Told};

/// How late a message may be while nothing fails. The contract says a second; the rest is for a busy machine.
const LATE_MAX: Duration = Duration::from_secs(3);

/// The same while only Redis fails. Every stream is compared with Postgres at least every ten seconds.
const LATE_MAX_WITHOUT_REDIS: Duration = Duration::from_secs(12);

/// After a disturbance.
const SETTLED_AFTER: Duration = Duration::from_secs(3);

/// Why a stream of a user that stays logged in may end.
const REASONS: [&str; 4] = ["draining", "lifetime", "slow", "too_many"];

/// The two users of a conversation, in the order of their ids.
type Pair<'a> = (&'a str, &'a str);

fn pair(message: &Message) -> Pair<'_> {
    let (sender, recipient) = (&*message.sender, &*message.recipient);
    (sender.min(recipient), sender.max(recipient))
}

/// What a follower has shown since it last began without a position.
struct Chain<'a> {
    began: Duration,
    shown: Vec<MessageIndex>,
    is_shown: HashSet<MessageIndex>,
    /// The first and the last seq of each conversation.
    seqs: HashMap<Pair<'a>, (i64, i64)>,
    /// How many messages were shown at each position.
    positions: Vec<(&'a str, usize)>,
}

impl<'a> Chain<'a> {
    fn new(began: Duration) -> Self {
        Self {
            began,
            shown: Vec::new(),
            is_shown: HashSet::new(),
            seqs: HashMap::new(),
            positions: Vec::new(),
        }
    }

    /// Back to where it was at this position.
    fn go_back(&mut self, position: &str, history: &'a History) {
        let Some(index) = self.positions.iter().rposition(|(known, _)| *known == position) else { return };
        self.positions.truncate(index + 1);
        while self.shown.len() > self.positions[index].1 {
            let Some(last) = self.shown.pop() else { return };
            self.is_shown.remove(&last);
            let message = history.message(last);
            if let Some((first, last)) = self.seqs.get_mut(&pair(message)) {
                *last = message.seq - 1;
                if *last < *first {
                    self.seqs.remove(&pair(message));
                }
            }
        }
    }

    /// The rule that this message breaks, if any.
    fn show(&mut self, index: MessageIndex, message: &'a Message) -> Option<&'static str> {
        if !self.is_shown.insert(index) {
            return Some(STREAM_DOUBLED);
        }
        self.shown.push(index);
        let (_, last) = self.seqs.entry(pair(message)).or_insert((message.seq, message.seq - 1));
        let follows = message.seq == *last + 1;
        *last = message.seq;
        (!follows).then_some(STREAM_GAP)
    }
}

/// One stream from its first event to its end.
struct Session {
    replica: usize,
    chain_began: Duration,
    began: Duration,
    /// `None` while it is open.
    ended: Option<Duration>,
}

/// What the events of a follower come to.
#[derive(Default)]
struct Replay<'a> {
    chain: Option<Chain<'a>>,
    sessions: Vec<Session>,
    /// When each message was shown first.
    shown_at: HashMap<MessageIndex, Duration>,
    /// The position that the current stream was given.
    asked: Option<&'a str>,
    is_begun: bool,
}

/// A rule that an event breaks, and what else is to be known.
type Broken = (&'static str, String);

impl<'a> Replay<'a> {
    fn take(&mut self, event: &'a StreamEvent, user: &str, history: &'a History) -> Result<(), Broken> {
        let events = |what: &str| Err((STREAM_EVENTS, what.to_owned()));
        match &event.told {
            Told::Asked { position } => {
                self.asked = position.as_deref();
                self.is_begun = false;
            }
            Told::Ready { .. } | Told::Reset { .. } if self.is_begun => return events("it began before"),
            Told::Reset { reason, .. } => return Err((STREAM_RESET, format!("reset: {reason}"))),
            Told::Ready { position, resumed } => return self.begin(event, position, *resumed, history),
            Told::Message { position, message } => {
                let (Some(chain), true) = (&mut self.chain, self.is_begun) else {
                    return events("a message before the stream began");
                };
                if position.is_empty() {
                    return events("a message without a position");
                }
                let index = *message;
                let message = history.message(index);
                if message.sender != user && message.recipient != user {
                    return Err((STREAM_FOREIGN, String::new()));
                }
                if let Some(rule) = chain.show(index, message) {
                    return Err((rule, String::new()));
                }
                chain.positions.push((position, chain.shown.len()));
                self.shown_at.entry(index).or_insert(event.at);
            }
            Told::End { reason } if !REASONS.contains(&&**reason) => return events("no reason to end"),
            Told::End { .. } | Told::Closed(_) => {
                if let Some(session) = self.sessions.last_mut() {
                    session.ended.get_or_insert(event.at);
                }
                self.is_begun = false;
            }
            Told::Wrong(_) => return Err((WRONG_ANSWER, String::new())),
        }
        Ok(())
    }

    fn begin(
        &mut self,
        event: &StreamEvent,
        position: &'a str,
        resumed: bool,
        history: &'a History,
    ) -> Result<(), Broken> {
        if resumed != self.asked.is_some() {
            return Err((STREAM_RESET, format!("resumed: {resumed}")));
        }
        if position.is_empty() {
            return Err((STREAM_EVENTS, "no position".to_owned()));
        }
        self.is_begun = true;
        let chain = match (self.asked, &mut self.chain) {
            (Some(asked), Some(chain)) => {
                chain.go_back(asked, history);
                chain
            }
            (_, chain) => chain.insert(Chain::new(event.at)),
        };
        chain.positions.push((position, chain.shown.len()));
        let (replica, began) = (event.replica, event.at);
        self.sessions.push(Session { replica, chain_began: chain.began, began, ended: None });
        Ok(())
    }
}

/// When a message was sent first, and acknowledged first.
struct Acknowledged {
    message: MessageIndex,
    sent: Duration,
    at: Duration,
}

impl<'a> Checker<'a> {
    /// What streams have shown, with the follower's number.
    pub(super) fn streamed(&self) -> impl Iterator<Item = (usize, &'a StreamEvent, MessageIndex)> + use<'a> {
        self.history.followers.iter().enumerate().flat_map(|(number, follower)| {
            follower.events.iter().filter_map(move |event| match event.told {
                Told::Message { message, .. } => Some((number, event, message)),
                _ => None,
            })
        })
    }

    pub(super) fn streams(&mut self) {
        let history = self.history;
        let sends = self.sends();
        let mut acknowledged: Vec<Acknowledged> = sends
            .values()
            .filter_map(|sent| {
                let (first, message, _) = sent.acknowledged().min_by_key(|(operation, ..)| operation.end)?;
                Some(Acknowledged { message, sent: sent.first_start, at: first.end })
            })
            .collect();
        acknowledged.sort_unstable_by_key(|acknowledged| acknowledged.at);
        let until = self.end();
        for (number, follower) in history.followers.iter().enumerate() {
            let mut replay = Replay::default();
            let broken = follower.events.iter().find_map(|event| {
                let (rule, why) = replay.take(event, &follower.user, history).err()?;
                let why = if why.is_empty() { why } else { format!("\n  {why}") };
                Some((rule, format!("{}{why}", self.describe_event(number, event))))
            });
            match broken {
                Some((rule, evidence)) => self.broken(rule, evidence),
                None => {
                    self.in_time(number, follower, &replay, &acknowledged, until);
                    self.complete(number, follower, &replay, &sends);
                }
            }
        }
    }

    /// The last moment of which the history tells.
    fn end(&self) -> Duration {
        let events = self.history.followers.iter().filter_map(|follower| follower.events.last());
        let operations = self.history.operations.iter().map(|operation| operation.end);
        operations.chain(events.map(|event| event.at)).max().unwrap_or_default()
    }

    /// What was acknowledged while a stream was open, that stream shows soon.
    fn in_time(
        &mut self,
        number: usize,
        follower: &Follower,
        replay: &Replay<'_>,
        acknowledged: &[Acknowledged],
        until: Duration,
    ) {
        for Acknowledged { message, sent, at } in acknowledged {
            let after = replay.sessions.partition_point(|session| session.began <= *at);
            let Some(session) = after.checked_sub(1).map(|before| &replay.sessions[before]) else { continue };
            let shown = self.history.message(*message);
            if *sent <= session.chain_began
                || (shown.sender != follower.user && shown.recipient != follower.user)
            {
                continue;
            }
            let is_late = |limit: Duration| {
                let due = *at + limit;
                let is_shown = replay.shown_at.get(message).is_some_and(|shown| *shown <= due);
                !is_shown && due < session.ended.unwrap_or(until)
            };
            let undisturbed = is_late(LATE_MAX) && self.is_calm(*at, LATE_MAX, false);
            if undisturbed
                || (is_late(LATE_MAX_WITHOUT_REDIS) && self.is_calm(*at, LATE_MAX_WITHOUT_REDIS, true))
            {
                let when = replay.shown_at.get(message).map_or("not yet".to_owned(), |shown| {
                    format!("{:.1} s after its acknowledgement", shown.saturating_sub(*at).as_secs_f64())
                });
                self.broken(
                    STREAM_LATE,
                    format!(
                        "  {}, acknowledged at {:.4} s\n  follower {number} of {}, open on replica {} since {:.4} s, shows it {when}",
                        brief(shown),
                        at.as_secs_f64(),
                        follower.user,
                        session.replica,
                        session.began.as_secs_f64(),
                    ),
                );
                return;
            }
        }
    }

    /// Nothing failed from a while before `at` until `limit` after it, or nothing but Redis.
    fn is_calm(&self, at: Duration, limit: Duration, even_without_redis: bool) -> bool {
        let from = at.saturating_sub(SETTLED_AFTER);
        !self.history.disturbances.iter().any(|disturbance| {
            disturbance.start <= at + limit
                && disturbance.end.is_none_or(|end| end >= from)
                && !(even_without_redis && disturbance.redis_only)
        })
    }

    /// In the end a follower has shown all that was sent after its `ready`.
    fn complete(
        &mut self,
        number: usize,
        follower: &Follower,
        replay: &Replay<'_>,
        sends: &HashMap<&'a str, Sent<'a>>,
    ) {
        let (Some(stored), Some(chain)) = (&self.history.stored, &replay.chain) else { return };
        let lacking = stored.iter().flatten().find(|index| {
            let message = self.history.message(**index);
            (message.sender == follower.user || message.recipient == follower.user)
                && !chain.is_shown.contains(*index)
                && sends.get(&*message.content).is_some_and(|sent| sent.first_start > chain.began)
        });
        if let Some(lacking) = lacking {
            let last = follower.events.last().map(|event| self.describe_event(number, event));
            let (lacking, began) = (brief(self.history.message(*lacking)), chain.began.as_secs_f64());
            let evidence =
                format!("{}\n  began at {began:.4} s and lacks {lacking}", last.unwrap_or_default());
            self.broken(STREAM_MISSED, evidence);
        }
    }

    /// An event on one line.
    pub(super) fn describe_event(&self, number: usize, event: &StreamEvent) -> String {
        let told = match &event.told {
            Told::Message { message, position } => {
                format!("message {} at {position:?}", brief(self.history.message(*message)))
            }
            told => format!("{told:?}"),
        };
        format!("  {:.4} s  follower {number}, replica {}: {told}", event.at.as_secs_f64(), event.replica)
    }
}
