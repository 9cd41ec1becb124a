//! What followers do: each keeps a stream of one user on either replica, breaks off at any place, and resumes behind the
//! last event that it has handled, or behind an earlier one.

use std::collections::VecDeque;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::clients::{BACK_OFF, message};
use super::run::Run;
use super::schedule::{self, BACK_MAX, FollowStep};
use super::system::lock;
use super::{StreamEvent, Told};
use crate::http::RequestError;
use crate::sse::{Event, EventStream, Next};

/// For the head of the response, and for the first event.
const BEGIN_LIMIT: Duration = Duration::from_secs(5);

/// How long a follower waits for an event before it looks whether it is to leave.
const SLICE: Duration = Duration::from_millis(50);

impl Run<'_> {
    pub(super) fn follow(&self, number: u32) {
        let mut positions = VecDeque::new();
        for index in 0.. {
            if self.followers_end.load(Ordering::Relaxed) {
                return;
            }
            let step = schedule::follow_step(self.options.seed, number, index);
            thread::sleep(step.pause);
            // In the end each one shows everything since its first stream.
            if step.anew && !self.end.load(Ordering::Relaxed) {
                positions.clear();
            }
            // Behind an earlier event all later ones come again.
            positions.truncate(positions.len().saturating_sub(step.back).max(1));
            Session { run: self, number, step, positions: &mut positions, index }.run();
        }
    }
}

/// One stream of a follower.
struct Session<'a> {
    run: &'a Run<'a>,
    number: u32,
    index: u64,
    step: FollowStep,
    /// Of the events that the follower has handled last.
    positions: &'a mut VecDeque<String>,
}

impl Session<'_> {
    fn run(&mut self) {
        let position = self.positions.back().cloned();
        self.tell(Told::Asked { position: position.clone() });
        let why = match self.open(position) {
            Ok(stream) => match stream.status() {
                200 => self.read(stream),
                503 => {
                    thread::sleep(BACK_OFF);
                    "503"
                }
                _ => return self.wrong(stream),
            },
            Err(error) => {
                thread::sleep(BACK_OFF);
                error.reason()
            }
        };
        self.tell(Told::Closed(why));
    }

    fn open(&self, position: Option<String>) -> Result<EventStream, RequestError> {
        let run = self.run;
        let user = &run.system.users[self.number as usize % run.system.users.len()];
        let authorization = format!("Bearer {}", user.token);
        let mut headers = vec![("authorization", &*authorization)];
        let mut path = "/stream".to_owned();
        match &position {
            Some(position) if self.step.in_query => path += &format!("?after={position}"),
            Some(position) => headers.push(("last-event-id", position)),
            None => {}
        }
        EventStream::open(run.system.replicas[self.step.replica].public, &path, &headers, BEGIN_LIMIT)
    }

    /// Handles events until the stream ends or the follower leaves. Says why it is over.
    fn read(&mut self, mut stream: EventStream) -> &'static str {
        let began = Instant::now();
        let (mut has_begun, mut messages) = (false, 0);
        loop {
            let stays = self.run.end.load(Ordering::Relaxed);
            let is_over = began.elapsed() >= self.step.time || messages >= self.step.messages;
            if (has_begun && is_over && !stays) || self.run.followers_end.load(Ordering::Relaxed) {
                return "the follower left";
            }
            match stream.next(SLICE) {
                Next::Event(event) => {
                    has_begun = true;
                    messages += usize::from(event.name == "message");
                    self.handle(&event);
                }
                Next::Nothing if !has_begun && began.elapsed() >= BEGIN_LIMIT => return "no event in time",
                Next::Nothing => {}
                Next::Ended => return "the stream ended",
                Next::Broken => return RequestError::Broken.reason(),
            }
        }
    }

    fn handle(&mut self, event: &Event) {
        let told = self.told(event);
        if let Told::Ready { position, .. } | Told::Message { position, .. } = &told {
            self.positions.push_back(position.clone());
            if self.positions.len() > BACK_MAX {
                self.positions.pop_front();
            }
        }
        self.tell(told);
    }

    fn told(&self, event: &Event) -> Told {
        let data: Value = serde_json::from_str(&event.data).unwrap_or_default();
        let text = |name: &str| data[name].as_str().unwrap_or_default().to_owned();
        let position = event.id.clone().unwrap_or_default();
        match &*event.name {
            "ready" if text("position") == position => match data["resumed"].as_bool() {
                Some(resumed) => Told::Ready { position, resumed },
                None => Told::Wrong(format!("{event:?}")),
            },
            "reset" => Told::Reset { position, reason: text("reason") },
            "message" => match message(&data) {
                Some(message) => Told::Message { position, message: lock(&self.run.history).intern(message) },
                None => Told::Wrong(format!("{event:?}")),
            },
            "end" => Told::End { reason: text("reason") },
            _ => Told::Wrong(format!("{event:?}")),
        }
    }

    fn wrong(&self, mut stream: EventStream) {
        let answer = format!("stream {}: {} {:?}", self.index, stream.status(), stream.next(BEGIN_LIMIT));
        self.tell(Told::Wrong(answer));
        self.tell(Told::Closed("refused"));
    }

    fn tell(&self, told: Told) {
        let (at, replica) = (self.run.now(), self.step.replica);
        lock(&self.run.history).followers[self.number as usize].events.push(StreamEvent {
            at,
            replica,
            told,
        });
    }
}
