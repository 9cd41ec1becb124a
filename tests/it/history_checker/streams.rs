//! The rules on what streams show.

use super::*;

/// Follows Ben on a made-up stream.
impl MadeUp {
    pub(super) fn told(&mut self, told: Told) {
        self.now += 1;
        if self.history.followers.is_empty() {
            self.history.followers.push(Follower { user: "ben".to_owned(), events: Vec::new() });
        }
        let at = Duration::from_millis(self.now);
        self.history.followers[0].events.push(StreamEvent { at, replica: 0, told });
    }

    fn asked(&mut self, position: Option<&str>) {
        self.told(Told::Asked { position: position.map(str::to_owned) });
    }

    /// A stream from now on.
    pub(super) fn ready(&mut self, position: &str) {
        self.asked(None);
        self.told(Told::Ready { position: position.to_owned(), resumed: false });
    }

    fn resumed(&mut self, position: &str) {
        self.told(Told::Closed("the follower left"));
        self.asked(Some(position));
        self.told(Told::Ready { position: position.to_owned(), resumed: true });
    }

    /// Its position has the name of its content.
    fn shows(&mut self, shown: Message) {
        let position = shown.content.clone();
        let message = self.history.intern(shown);
        self.told(Told::Message { position, message });
    }

    pub(super) fn wait(&mut self, seconds: u64) {
        self.now += 1000 * seconds;
    }

    /// From so many seconds ago on.
    fn disturbed(&mut self, seconds: u64, redis_only: bool, is_over: bool) {
        let now = Duration::from_millis(self.now);
        let (start, end) = (now.saturating_sub(Duration::from_secs(seconds)), is_over.then_some(now));
        self.history.disturbances.push(Disturbance { start, end, redis_only });
    }
}

/// The same, from another user to Ben.
fn from_cleo(content: &str) -> Message {
    Message { sender: "cleo".to_owned(), ..message(1, content) }
}

#[test]
fn a_stream_that_shows_everything_once_and_in_order_is_accepted() {
    let mut made = MadeUp::default();
    made.acknowledged(1, "before");
    made.ready("begin");
    made.acknowledged(2, "a");
    made.acknowledged(3, "b");
    made.shows(message(2, "a"));
    // Conversations are independent of one another.
    let index = made.history.intern(from_cleo("from cleo"));
    let sent = Outcome::Acknowledged { message: index, replayed: false };
    made.send("from cleo", sent).conversation = 1;
    made.shows(from_cleo("from cleo"));
    made.shows(message(3, "b"));
    // Not handled: behind an earlier event it comes again.
    made.resumed("a");
    made.shows(message(3, "b"));
    made.shows(from_cleo("from cleo"));
    made.told(Told::End { reason: "draining".to_owned() });
    made.told(Told::Closed("the stream ended"));
    made.asked(Some("from cleo"));
    made.told(Told::Closed("503"));
    made.resumed("from cleo");
    made.acknowledged(4, "c");
    made.shows(message(4, "c"));
    // Nothing before the first event is to come again.
    made.resumed("begin");
    for shown in [message(2, "a"), message(3, "b"), from_cleo("from cleo"), message(4, "c")] {
        made.shows(shown);
    }
    made.stored(&[(1, "before"), (2, "a"), (3, "b"), (4, "c")]);
    made.history.stored.as_mut().expect("it was just set").push(vec![index]);
    assert_eq!(made.broken(), [""; 0]);
}

#[test]
fn a_stream_that_doubles_skips_or_reorders_is_found_also_over_resumes() {
    type Shown = &'static [(i64, &'static str)];
    let cases: [(Shown, &str); 5] = [
        (&[(1, "a"), (1, "a")], check::STREAM_DOUBLED),
        (&[(1, "a"), (3, "c")], check::STREAM_GAP),
        (&[(2, "b"), (1, "a")], check::STREAM_GAP),
        (&[(1, "a"), (2, "b"), (1, "a")], check::STREAM_DOUBLED),
        (&[(1, "a"), (2, "b"), (4, "d")], check::STREAM_GAP),
    ];
    for (shown, rule) in cases {
        for resumes in [false, true] {
            let mut made = MadeUp::default();
            made.ready("begin");
            for (index, (seq, content)) in shown.iter().enumerate() {
                if resumes && index > 0 {
                    made.resumed(shown[index - 1].1);
                }
                made.shows(message(*seq, content));
            }
            assert_eq!(made.broken(), [rule], "{shown:?}, resumed: {resumes}");
        }
    }
    // Behind an earlier event it begins with what followed that event.
    for (again, rule) in [(message(1, "a"), check::STREAM_DOUBLED), (message(3, "c"), check::STREAM_GAP)] {
        let mut made = MadeUp::default();
        made.ready("begin");
        for shown in [message(1, "a"), message(2, "b"), message(3, "c")] {
            made.shows(shown);
        }
        made.resumed("a");
        made.shows(again);
        assert_eq!(made.broken(), [rule]);
    }
}

#[test]
fn a_message_that_a_stream_has_not_shown_in_the_end_is_found() {
    let follow = |shown: &[(i64, &str)]| {
        let mut made = MadeUp::default();
        made.acknowledged(1, "a");
        made.ready("begin");
        made.acknowledged(2, "b");
        made.send("c", Outcome::Unknown("503"));
        made.resumed("begin");
        for (seq, content) in shown {
            made.shows(message(*seq, content));
        }
        made.stored(&[(1, "a"), (2, "b"), (3, "c")]);
        assert_eq!(
            check::streams_lack_messages(&made.history),
            made.broken().contains(&check::STREAM_MISSED)
        );
        made.broken()
    };
    assert_eq!(follow(&[(2, "b"), (3, "c")]), [""; 0]);
    assert_eq!(follow(&[(2, "b")]), [check::STREAM_MISSED]);
    assert_eq!(follow(&[(3, "c")]), [check::STREAM_MISSED]);
    assert_eq!(follow(&[]), [check::STREAM_MISSED]);

    // What a stream had shown and took back counts no more.
    let mut made = MadeUp::default();
    made.ready("begin");
    made.acknowledged(1, "a");
    made.shows(message(1, "a"));
    made.resumed("begin");
    made.stored(&[(1, "a")]);
    assert_eq!(made.broken(), [check::STREAM_MISSED]);
}

#[test]
fn a_message_that_an_open_stream_shows_late_is_found_unless_something_fails() {
    /// Seconds until the message is shown, and what fails meanwhile.
    fn shown_after(seconds: u64, disturb: impl Fn(&mut MadeUp)) -> Vec<&'static str> {
        let mut made = MadeUp::default();
        made.wait(100);
        made.ready("begin");
        made.wait(1);
        made.acknowledged(1, "a");
        made.wait(seconds);
        disturb(&mut made);
        made.shows(message(1, "a"));
        made.broken()
    }
    assert_eq!(shown_after(2, |_| {}), [""; 0]);
    assert_eq!(shown_after(4, |_| {}), [check::STREAM_LATE]);
    assert_eq!(shown_after(4, |made| made.disturbed(2, false, true)), [""; 0]);
    assert_eq!(shown_after(4, |made| made.disturbed(2, true, false)), [""; 0]);
    assert_eq!(shown_after(4, |made| made.disturbed(20, true, true)), [""; 0]);
    assert_eq!(shown_after(14, |made| made.disturbed(14, true, false)), [check::STREAM_LATE]);
    assert_eq!(shown_after(14, |made| made.disturbed(14, false, false)), [""; 0]);

    // A stream that was left in time owes nothing before it is resumed.
    let mut made = MadeUp::default();
    made.ready("begin");
    made.acknowledged(1, "a");
    made.told(Told::Closed("the follower left"));
    made.wait(5);
    made.resumed("begin");
    made.shows(message(1, "a"));
    assert_eq!(made.broken(), [""; 0]);

    // Not shown at all, while others are.
    let mut made = MadeUp::default();
    made.ready("begin");
    made.acknowledged(1, "a");
    made.wait(5);
    made.read(NEWEST, &[(1, "a")], false);
    assert_eq!(made.broken(), [check::STREAM_LATE]);
}

#[test]
fn a_stream_that_forgets_its_position_or_takes_up_none_is_found() {
    let begin = |asked: Option<&str>, told: Told| {
        let mut made = MadeUp::default();
        made.ready("begin");
        made.told(Told::Closed("the follower left"));
        made.asked(asked);
        made.told(told);
        made.broken()
    };
    let ready = |resumed| Told::Ready { position: "begin".to_owned(), resumed };
    assert_eq!(begin(Some("begin"), ready(true)), [""; 0]);
    assert_eq!(begin(None, ready(false)), [""; 0]);
    assert_eq!(begin(Some("begin"), ready(false)), [check::STREAM_RESET]);
    assert_eq!(begin(None, ready(true)), [check::STREAM_RESET]);
    let reset = Told::Reset { position: "begin".to_owned(), reason: "epoch".to_owned() };
    assert_eq!(begin(Some("begin"), reset), [check::STREAM_RESET]);
}

#[test]
fn a_stream_that_shows_what_is_not_stored_or_not_its_users_is_found() {
    let mut made = MadeUp::default();
    made.ready("begin");
    made.send("a", Outcome::Unknown("503"));
    made.shows(message(1, "a"));
    made.stored(&[]);
    assert_eq!(made.broken(), [check::UNSTORED]);

    let mut made = MadeUp::default();
    made.ready("begin");
    made.shows(Message { recipient: "dan".to_owned(), ..message(1, "a") });
    assert_eq!(made.broken(), [check::STREAM_FOREIGN]);

    let mut made = MadeUp::default();
    made.ready("begin");
    made.acknowledged(1, "a");
    made.shows(Message { id: "another id".to_owned(), ..message(1, "a") });
    assert_eq!(made.broken(), [check::TWO_VERSIONS]);
}

#[test]
fn events_of_a_stream_that_no_client_can_use_are_found() {
    let bad = |told: Vec<Told>| {
        let mut made = MadeUp::default();
        let message = made.history.intern(message(1, "a"));
        assert_eq!(message, 0);
        made.asked(None);
        told.into_iter().for_each(|told| made.told(told));
        made.broken()
    };
    let ready = |position: &str| Told::Ready { position: position.to_owned(), resumed: false };
    let shows = |position: &str| Told::Message { position: position.to_owned(), message: 0 };
    let end = |reason: &str| Told::End { reason: reason.to_owned() };
    assert_eq!(bad(vec![ready("1"), shows("2"), end("lifetime")]), [""; 0]);
    assert_eq!(bad(vec![end("too_many")]), [""; 0]);
    let cases = [
        vec![shows("2")],
        vec![ready("")],
        vec![ready("1"), ready("2")],
        vec![ready("1"), shows("")],
        vec![ready("1"), end("lifetime"), shows("2")],
        vec![ready("1"), end("expired")],
    ];
    for told in cases {
        assert_eq!(bad(told.clone()), [check::STREAM_EVENTS], "{told:?}");
    }
    assert_eq!(bad(vec![Told::Wrong("500".to_owned())]), [check::WRONG_ANSWER]);
}
