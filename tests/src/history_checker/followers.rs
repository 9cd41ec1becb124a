//! Clients that follow streams: they break off at any place, and resume on either replica.

use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::clients::message;
use super::run::Run;
use super::schedule::{self, FollowStep};
use super::system::lock;
use crate::sse::Events;

/// How long the first event may take: a replica that is frozen is left.
const OPEN_LIMIT: Duration = Duration::from_secs(5);

const TICK: Duration = Duration::from_millis(200);

/// After the last send: longer than an attempt to open a stream, and then what the service takes to find what was not announced.
const LAST_MESSAGES: Duration = Duration::from_secs(12);

impl Run<'_> {
    /// Follows one user. What it sees is in the history, at this index.
    pub(super) fn follow(&self, follower: usize) {
        let user = &self.system.users[follower];
        let mut position: Option<String> = None;
        let mut over = None;
        for index in 0.. {
            let step = schedule::follow_step(self.options.seed, follower as u64, index);
            if over.is_some_and(|over| Instant::now() >= over) {
                return;
            }
            thread::sleep(step.pause);
            let address = self.system.replicas[step.replica].public;
            let Ok(events) = Events::open(address, &user.token, position.as_deref(), OPEN_LIMIT) else {
                self.note_end(&mut over);
                continue;
            };
            match events.status {
                200 => self.read_events(follower, events, &step, &mut position, &mut over),
                503 => {}
                status => self.wrong(follower, format!("status {status}")),
            }
            self.note_end(&mut over);
        }
    }

    /// Reads until the stream ends, or, while there are faults, the step.
    fn read_events(
        &self,
        follower: usize,
        mut events: Events,
        step: &FollowStep,
        position: &mut Option<String>,
        over: &mut Option<Instant>,
    ) {
        let ends = Instant::now() + step.time;
        let mut left = step.messages;
        while left > 0 && over.is_none_or(|over| Instant::now() < over) {
            self.note_end(over);
            let is_calm = self.faults_end.load(Ordering::Relaxed);
            if !is_calm && Instant::now() >= ends {
                return;
            }
            let Ok(event) = events.next(TICK) else { return };
            let Some(event) = event else { continue };
            let now = self.now();
            match (event.name.as_str(), serde_json::from_str::<Value>(&event.data)) {
                ("message", Ok(value)) => {
                    let Some(message) = message(&value) else {
                        self.wrong(follower, format!("a message without its fields: {value}"));
                        return;
                    };
                    let mut history = lock(&self.history);
                    let message = history.intern(message);
                    history.followed[follower].shown.push((now, message));
                    *position = Some(event.id);
                    left -= u32::from(!is_calm);
                }
                ("ready", Ok(value)) => {
                    if position.is_some() && value["resumed"] != true {
                        self.wrong(follower, format!("a position was not taken up: {value}"));
                    }
                    lock(&self.history).followed[follower].ready.get_or_insert(now);
                    *position = Some(event.id);
                }
                ("end", Ok(_)) => return,
                (name, data) => self.wrong(follower, format!("the event {name}: {data:?}")),
            }
        }
    }

    fn wrong(&self, follower: usize, what: String) {
        lock(&self.history).followed[follower].wrong.push(what);
    }

    /// Once nobody sends any more, the rest has a while to come.
    fn note_end(&self, over: &mut Option<Instant>) {
        if self.end.load(Ordering::Relaxed) {
            let wait = if self.is_broken.load(Ordering::Relaxed) { Duration::ZERO } else { LAST_MESSAGES };
            over.get_or_insert_with(|| Instant::now() + wait);
        }
    }
}
