//! The history checker: a short run of it, and its rules on histories that were made up to break each of them.
//!
//! `HISTORY_SECONDS` and `HISTORY_SEED` choose another run. `cargo xtask soak` runs for longer, and
//! `cargo xtask soak --self-check` shows that the checker finds the fault of builds that are broken on purpose.

use std::env;
use std::slice::from_ref;
use std::time::Duration;

use anyhow::{Result, ensure};
use tests::history_checker::{
    self, Action, Disturbance, Follower, History, Message, Operation, Options, Outcome, Page, Plan,
    RedisMode, StreamEvent, Told, check,
};

const SECONDS: u64 = 60;

#[test]
fn no_fault_makes_the_service_lose_double_hide_or_reorder_a_message() -> Result<()> {
    let number = |name: &str| env::var(name).ok().and_then(|text| text.parse().ok());
    let seed = number("HISTORY_SEED").unwrap_or_else(history_checker::random_seed);
    let duration = Duration::from_secs(number("HISTORY_SECONDS").unwrap_or(SECONDS));
    println!("seed {seed}");
    let binary = tests::service_binary()?;
    let options = Options {
        redis: RedisMode::Single,
        plan: Plan::Mixed,
        seed,
        duration,
        binary,
        environment: Vec::new(),
    };
    let report = history_checker::run(&options, |_| true)?;
    ensure!(report.violations.is_empty(), "{}", history_checker::describe_violations(&options, &report));
    // A run in which nothing happened would prove nothing.
    let enough = report.acknowledged > 50 && report.reads > 200 && report.window_hits > 50;
    let followed = report.resumed_streams > 20 && report.streamed > 100;
    ensure!(enough && followed && report.faults.len() > 3, "seed {seed}: too little happened: {report:?}");
    Ok(())
}

#[test]
fn the_seed_chooses_the_faults_and_each_deployment_gets_its_own() {
    const ONE_SERVER: [&str; 8] = [
        "Redis rolled back",
        "clock of Redis set",
        "link to Redis cut",
        "link to Redis slow",
        "one replica without Postgres, one without Redis",
        "replica without Redis frozen",
        "replicas use different Redis",
        "responses of Redis withheld",
    ];
    const SEVERAL: [&str; 4] =
        ["Redis failed over", "Redis failed over and back", "Redis killed", "Redis rolled back"];
    const ALL: [&str; 8] = [
        "Postgres killed",
        "Postgres paused",
        "Redis flushed",
        "Redis paused",
        "clock of Postgres set",
        "link to Postgres stalled",
        "replica killed",
        "replica paused",
    ];
    for redis in [RedisMode::Single, RedisMode::Sentinel, RedisMode::Cluster] {
        let plan = history_checker::planned_faults(redis, 1, 3000);
        assert_eq!(plan, history_checker::planned_faults(redis, 1, 3000));
        assert_ne!(plan, history_checker::planned_faults(redis, 2, 3000));
        let names = plan.concat();
        let (own, others) = if redis == RedisMode::Single {
            (&ONE_SERVER[..], &SEVERAL[..2])
        } else {
            (&SEVERAL[..], &ONE_SERVER[1..])
        };
        for name in ALL.iter().chain(own) {
            assert!(names.contains(name), "{redis:?} never has {name}");
        }
        for name in others {
            assert!(!names.contains(name), "{redis:?} has {name}");
        }
    }
}

fn message(seq: i64, content: &str) -> Message {
    Message {
        id: format!("id of {content}"),
        seq,
        sender: "ana".to_owned(),
        recipient: "ben".to_owned(),
        content: content.to_owned(),
        created_at: format!("2026-01-31T12:00:{seq:02}.000000"),
        erased: false,
    }
}

/// A made-up history. Each operation takes one millisecond, and begins one millisecond after the last one ended.
#[derive(Default)]
struct MadeUp {
    history: History,
    now: u64,
}

impl MadeUp {
    fn operation(&mut self, action: Action, outcome: Outcome) -> &mut Operation {
        let start = Duration::from_millis(self.now + 1);
        let end = start + Duration::from_millis(1);
        self.now += 2;
        self.history.operations.push(Operation {
            client: 0,
            user: "ana".into(),
            session: 0,
            replica: 0,
            conversation: 0,
            start,
            end,
            action,
            outcome,
        });
        self.history.operations.last_mut().expect("it was just pushed")
    }

    fn send(&mut self, content: &str, outcome: Outcome) -> &mut Operation {
        self.operation(Action::Send { content: content.to_owned(), keyed: true }, outcome)
    }

    fn acknowledged(&mut self, seq: i64, content: &str) -> &mut Operation {
        let message = self.history.intern(message(seq, content));
        self.send(content, Outcome::Acknowledged { message, replayed: false })
    }

    fn read(&mut self, page: Page, messages: &[(i64, &str)], next: bool) -> &mut Operation {
        let messages =
            messages.iter().map(|(seq, content)| self.history.intern(message(*seq, content))).collect();
        self.operation(Action::Read(page), Outcome::Page { messages, stale: false, next })
    }

    fn stored(&mut self, messages: &[(i64, &str)]) {
        let messages =
            messages.iter().map(|(seq, content)| self.history.intern(message(*seq, content))).collect();
        self.history.stored = Some(vec![messages]);
    }

    /// The rules that are broken, each once.
    fn broken(&self) -> Vec<&'static str> {
        let mut rules: Vec<_> =
            check::violations(&self.history).into_iter().map(|violation| violation.rule).collect();
        rules.dedup();
        rules
    }
}

const NEWEST: Page = Page::Offset { offset: 0, limit: 2 };

#[test]
fn a_correct_history_is_accepted() {
    let mut made = MadeUp::default();
    made.read(NEWEST, &[], false);
    made.acknowledged(1, "a");
    made.send("b", Outcome::Unknown("503"));
    made.read(NEWEST, &[(2, "b"), (1, "a")], false);
    let message = made.history.intern(message(2, "b"));
    made.send("b", Outcome::Acknowledged { message, replayed: true });
    made.send("never stored", Outcome::Unknown("no answer in time"));
    made.acknowledged(3, "c");
    made.read(NEWEST, &[(3, "c"), (2, "b")], true);
    made.read(Page::Offset { offset: 2, limit: 2 }, &[(1, "a")], false);
    made.read(Page::Before { seq: 2, limit: 2 }, &[(1, "a")], false);
    made.read(Page::After { seq: 1, limit: 1 }, &[(2, "b")], true);
    made.stored(&[(1, "a"), (2, "b"), (3, "c")]);
    assert_eq!(made.broken(), [""; 0]);
}

#[test]
fn a_read_that_lacks_what_is_known_is_found_whatever_page_it_is() {
    let lacking = [
        (NEWEST, vec![(1, "a")]),
        (NEWEST, vec![]),
        (Page::Offset { offset: 1, limit: 5 }, vec![]),
        (Page::Before { seq: 9, limit: 5 }, vec![(1, "a")]),
        (Page::After { seq: 1, limit: 5 }, vec![]),
    ];
    for (page, messages) in lacking {
        let mut made = MadeUp::default();
        made.acknowledged(1, "a");
        made.acknowledged(2, "b");
        made.read(page, &messages, false);
        assert_eq!(made.broken(), [check::MISSED_ACK], "{page:?}");

        let mut made = MadeUp::default();
        made.read(NEWEST, &[(2, "b"), (1, "a")], false);
        made.read(page, &messages, false);
        assert_eq!(made.broken(), [check::WENT_BACK], "{page:?}");
    }
}

#[test]
fn a_read_may_lack_what_was_acknowledged_while_it_ran_and_a_stale_read_may_lack_anything() {
    let mut made = MadeUp::default();
    made.acknowledged(1, "a");
    let acknowledged = made.acknowledged(2, "b").end;
    made.read(NEWEST, &[(1, "a")], false).start = acknowledged;
    assert_eq!(made.broken(), [""; 0]);

    let mut made = MadeUp::default();
    made.acknowledged(1, "a");
    made.acknowledged(2, "b");
    if let Outcome::Page { stale, .. } = &mut made.read(NEWEST, &[(1, "a")], false).outcome {
        *stale = true;
    }
    assert_eq!(made.broken(), [""; 0]);
}

#[test]
fn a_page_with_a_gap_or_of_the_wrong_length_is_found() {
    let torn = [
        (NEWEST, vec![(3, "c"), (1, "a")], false),
        (NEWEST, vec![(1, "a"), (2, "b")], false),
        (NEWEST, vec![(2, "b")], true),
        (NEWEST, vec![(3, "c"), (2, "b"), (1, "a")], false),
        (NEWEST, vec![(3, "c"), (2, "b")], false),
        (NEWEST, vec![(1, "a")], true),
        (Page::Before { seq: 2, limit: 1 }, vec![(2, "b")], true),
        (Page::After { seq: 1, limit: 2 }, vec![(3, "c")], false),
        (Page::After { seq: 1, limit: 2 }, vec![(2, "b")], true),
    ];
    for (page, messages, next) in torn {
        let mut made = MadeUp::default();
        made.read(page, &messages, next);
        assert_eq!(made.broken(), [check::TORN_PAGE], "{page:?} {messages:?}");
    }
}

#[test]
fn a_seq_with_two_messages_and_a_message_with_two_seqs_are_found() {
    let mut made = MadeUp::default();
    made.read(NEWEST, &[(1, "a")], false);
    made.read(NEWEST, &[(1, "b")], false);
    assert_eq!(made.broken(), [check::TWO_VERSIONS]);

    let mut made = MadeUp::default();
    made.read(NEWEST, &[(2, "a"), (1, "a")], false);
    assert_eq!(made.broken(), [check::DOUBLED]);
}

#[test]
fn what_is_stored_has_to_be_what_was_acknowledged_once_and_in_order() {
    type Stored = &'static [(i64, &'static str)];
    let cases: [(Stored, &str); 5] = [
        (&[(1, "a")], check::LOST_ACK),
        (&[(1, "a"), (2, "b"), (4, "unanswered")], check::GAP),
        (&[(1, "a"), (2, "b"), (3, "from nowhere")], check::UNSENT),
        (&[(1, "a"), (2, "b"), (3, "unanswered"), (4, "unanswered")], check::DOUBLED),
        (&[(1, "a"), (2, "b"), (3, "unanswered")], ""),
    ];
    for (stored, rule) in cases {
        let mut made = MadeUp::default();
        made.acknowledged(1, "a");
        made.acknowledged(2, "b");
        made.send("unanswered", Outcome::Unknown("503"));
        made.stored(stored);
        let broken = made.broken();
        assert!(
            if rule.is_empty() { broken.is_empty() } else { broken.contains(&rule) },
            "{stored:?}: {broken:?}"
        );
    }
}

#[test]
fn what_was_shown_has_to_be_stored() {
    let mut made = MadeUp::default();
    made.send("a", Outcome::Unknown("503"));
    made.read(NEWEST, &[(1, "a")], false);
    made.stored(&[]);
    assert_eq!(made.broken(), [check::UNSTORED]);
}

#[test]
fn seq_and_created_at_follow_the_order_of_sending() {
    let mut made = MadeUp::default();
    made.acknowledged(2, "first");
    made.acknowledged(1, "second");
    made.stored(&[(1, "second"), (2, "first")]);
    assert_eq!(made.broken(), [check::SEND_ORDER]);

    let mut made = MadeUp::default();
    made.acknowledged(1, "a");
    let late = Message { created_at: "2026-01-31T13:00:00.000000".to_owned(), ..message(2, "b") };
    let early = message(3, "c");
    let stored = [message(1, "a"), late, early].map(|message| made.history.intern(message));
    made.send("b", Outcome::Unknown("503"));
    made.send("c", Outcome::Unknown("503"));
    made.history.stored = Some(vec![stored.to_vec()]);
    assert_eq!(made.broken(), [check::TIME_ORDER]);
}

#[test]
fn a_repeated_key_that_is_not_marked_as_replayed_and_a_wrong_answer_are_found() {
    let mut made = MadeUp::default();
    made.acknowledged(1, "a");
    made.acknowledged(1, "a");
    made.stored(&[(1, "a")]);
    assert_eq!(made.broken(), [check::TWO_ANSWERS]);

    let mut made = MadeUp::default();
    made.send("a", Outcome::Wrong("500".to_owned()));
    assert_eq!(made.broken(), [check::WRONG_ANSWER]);
}

/// Follows Ben on a made-up stream.
impl MadeUp {
    fn told(&mut self, told: Told) {
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
    fn ready(&mut self, position: &str) {
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

    fn wait(&mut self, seconds: u64) {
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

/// What is done to sessions, blocks and users. Ana sends, in session 0, and Ben blocks her.
impl MadeUp {
    fn change(&mut self, user: &str, action: Action, outcome: Outcome) {
        self.operation(action, outcome).user = user.into();
    }

    fn refused(&mut self, content: &str, status: u16) {
        self.send(content, Outcome::Refused(status));
    }

    fn replayed(&mut self, seq: i64, content: &str) {
        let message = self.history.intern(message(seq, content));
        self.send(content, Outcome::Acknowledged { message, replayed: true });
    }

    /// A page of messages that may be erased, which is the whole conversation.
    fn shows_all(&mut self, messages: &[Message]) -> &mut Operation {
        let messages = messages.iter().map(|message| self.history.intern(message.clone())).collect();
        let page = Page::Offset { offset: 0, limit: 9 };
        self.operation(Action::Read(page), Outcome::Page { messages, stale: false, next: false })
    }
}

type Act<'a> = &'a dyn Fn(&mut MadeUp);

const UNANSWERED: Outcome = Outcome::Unknown("503");

fn erased(seq: i64, content: &str) -> Message {
    Message { content: String::new(), erased: true, ..message(seq, content) }
}

#[test]
fn nothing_is_taken_from_a_session_after_the_answer_to_its_end() {
    let after = |outcome: Outcome, act: &dyn Fn(&mut MadeUp)| {
        let mut made = MadeUp::default();
        made.acknowledged(1, "a");
        made.change("ana", Action::Leave, outcome);
        act(&mut made);
        made.broken()
    };
    // Without an answer it may have ended or not.
    assert_eq!(after(UNANSWERED, &|made| _ = made.acknowledged(2, "b")), [""; 0]);
    for outcome in [Outcome::Done, UNANSWERED] {
        assert_eq!(after(outcome, &|made| made.refused("b", 401)), [""; 0]);
    }
    assert_eq!(after(Outcome::Done, &|made| _ = made.acknowledged(2, "b")), [check::AFTER_END]);
    assert_eq!(after(Outcome::Done, &|made| made.replayed(1, "a")), [check::AFTER_END]);
    let began_before = |made: &mut MadeUp| {
        let ended = made.history.operations[1].end;
        made.acknowledged(2, "b").start = ended;
    };
    assert_eq!(after(Outcome::Done, &began_before), [""; 0]);
    // Another session of the user goes on.
    assert_eq!(after(Outcome::Done, &|made| made.acknowledged(2, "b").session = 1), [""; 0]);
    // Stored although nobody was told so.
    let unanswered = |made: &mut MadeUp| {
        made.send("b", UNANSWERED);
        made.read(NEWEST, &[(2, "b"), (1, "a")], false).session = 1;
    };
    assert_eq!(after(Outcome::Done, &unanswered), [check::AFTER_END]);
    // A window may answer for a second.
    let read = |seconds| {
        move |made: &mut MadeUp| {
            made.wait(seconds);
            made.read(NEWEST, &[(1, "a")], false);
        }
    };
    assert_eq!(after(Outcome::Done, &read(0)), [""; 0]);
    assert_eq!(after(Outcome::Done, &read(2)), [check::AFTER_END]);
    // A user who is deleted has no session left.
    let mut made = MadeUp::default();
    made.change("ana", Action::Delete, Outcome::Done);
    made.refused("a", 401);
    made.acknowledged(1, "b").session = 1;
    assert_eq!(made.broken(), [check::AFTER_END]);
}

#[test]
fn nothing_is_taken_from_a_blocked_user_after_the_blocks_answer() {
    let after = |changes: &[(&str, Action, Outcome)], act: &dyn Fn(&mut MadeUp)| {
        let mut made = MadeUp::default();
        made.acknowledged(1, "a");
        made.send("tried", UNANSWERED);
        for (user, action, outcome) in changes {
            made.change(user, action.clone(), outcome.clone());
        }
        act(&mut made);
        made.broken()
    };
    let block = ("ben", Action::Block, Outcome::Done);
    let unblock = ("ben", Action::Unblock, Outcome::Done);
    let maybe = ("ben", Action::Block, UNANSWERED);
    let maybe_not = ("ben", Action::Unblock, UNANSWERED);
    let sends = |made: &mut MadeUp| _ = made.acknowledged(2, "b");
    let refused = |made: &mut MadeUp| made.refused("b", 403);
    assert_eq!(after(from_ref(&block), &sends), [check::AFTER_BLOCK]);
    assert_eq!(after(&[block.clone(), unblock.clone(), block.clone()], &sends), [check::AFTER_BLOCK]);
    for taken in [
        vec![],
        vec![maybe.clone()],
        vec![block.clone(), unblock.clone()],
        vec![block.clone(), maybe_not.clone()],
        // The one who blocks may write.
        vec![("ana", Action::Block, Outcome::Done)],
    ] {
        assert_eq!(after(&taken, &sends), [""; 0], "{taken:?}");
    }
    for refusing in [vec![block.clone()], vec![maybe], vec![block.clone(), maybe_not]] {
        assert_eq!(after(&refusing, &refused), [""; 0], "{refusing:?}");
    }
    // What was sent before is answered as it was, and may have been stored.
    assert_eq!(after(from_ref(&block), &|made| made.replayed(1, "a")), [""; 0]);
    assert_eq!(after(from_ref(&block), &|made| made.replayed(2, "tried")), [""; 0]);
    assert_eq!(after(from_ref(&block), &|made| _ = made.acknowledged(2, "tried")), [check::AFTER_BLOCK]);
    let unanswered = |made: &mut MadeUp| {
        made.send("b", UNANSWERED);
        made.read(NEWEST, &[(2, "b"), (1, "a")], false);
    };
    assert_eq!(after(from_ref(&block), &unanswered), [check::AFTER_BLOCK]);
    assert_eq!(after(&[unblock], &unanswered), [""; 0]);
}

#[test]
fn a_refusal_without_a_reason_is_found() {
    for status in [401, 403, 404] {
        let mut made = MadeUp::default();
        made.refused("a", status);
        // Too late, or of others.
        made.change("ana", Action::Leave, Outcome::Done);
        made.change("ana", Action::Block, Outcome::Done);
        made.change("ben", Action::Block, Outcome::Done);
        made.change("ben", Action::Delete, Outcome::Done);
        assert_eq!(made.broken(), [check::REFUSED], "{status}");
    }
    let mut made = MadeUp::default();
    made.change("ben", Action::Block, Outcome::Done);
    made.change("ben", Action::Unblock, Outcome::Done);
    made.refused("a", 403);
    assert_eq!(made.broken(), [check::REFUSED]);
    let mut made = MadeUp::default();
    made.change("ben", Action::Delete, Outcome::Done);
    made.refused("a", 404);
    assert_eq!(made.broken(), [""; 0]);
}

#[test]
fn messages_are_erased_only_by_a_deletion_for_good_and_keep_all_but_their_content() {
    let history = |deleted: Option<&str>, shown: &[&[Message]], stored: &[Message]| {
        let mut made = MadeUp::default();
        for seq in 1..=2 {
            made.acknowledged(seq, &seq.to_string());
        }
        made.shows_all(&[message(2, "2"), message(1, "1")]);
        if let Some(user) = deleted {
            made.change(user, Action::Delete, UNANSWERED);
        }
        for page in shown {
            made.shows_all(page);
        }
        made.history.stored =
            Some(vec![stored.iter().map(|message| made.history.intern(message.clone())).collect()]);
        made.broken()
    };
    let [first, second] = [1, 2].map(|seq| message(seq, &seq.to_string()));
    let [gone_first, gone] = [1, 2].map(|seq| erased(seq, &seq.to_string()));
    let none: [&str; 0] = [];
    // One after the other, in any order.
    let shown: [&[Message]; 2] = [&[gone.clone(), first.clone()], &[gone.clone(), gone_first.clone()]];
    assert_eq!(history(Some("ana"), &shown, &[gone_first.clone(), gone.clone()]), none);
    // Not everything needs to be erased when the run ends.
    assert_eq!(history(Some("ana"), &[], &[first.clone(), gone.clone()]), none);
    for deleted in [None, Some("ben")] {
        let shown: [&[Message]; 1] = [&[gone.clone(), first.clone()]];
        assert_eq!(history(deleted, &shown, &[first.clone(), gone.clone()]), [check::ERASED_EARLY]);
        assert_eq!(history(deleted, &[], &[first.clone(), gone.clone()]), [check::ERASED_EARLY]);
    }
    let back: [&[Message]; 2] = [&[gone.clone(), first.clone()], &[second.clone(), first.clone()]];
    assert_eq!(history(Some("ana"), &back, &[first.clone(), gone.clone()]), [check::UNERASED]);
    let half = Message { erased: true, ..second.clone() };
    let empty = Message { erased: false, ..gone.clone() };
    for bad in [half, empty] {
        let shown: [&[Message]; 1] = [&[bad.clone(), first.clone()]];
        assert!(
            history(Some("ana"), &shown, &[first.clone(), second.clone()]).contains(&check::ERASED_CONTENT)
        );
    }
    for changed in [
        Message { seq: 3, ..gone.clone() },
        Message { id: "another".to_owned(), ..gone.clone() },
        Message { sender: "ben".to_owned(), recipient: "ana".to_owned(), ..gone.clone() },
        Message { created_at: "2026-01-31T13:00:00.000000".to_owned(), ..gone.clone() },
    ] {
        let broken = history(Some("ana"), &[], &[first.clone(), changed.clone()]);
        assert!(broken.contains(&check::LOST_ACK), "{changed:?}: {broken:?}");
        let shown: [&[Message]; 1] = [&[changed.clone(), first.clone()]];
        let broken = history(Some("ana"), &shown, &[first.clone(), gone.clone()]);
        assert!(!broken.is_empty(), "{changed:?}");
    }
}

#[test]
fn a_stream_may_show_a_message_as_erased_after_the_deletion_alone() {
    for deleted in [false, true] {
        let mut made = MadeUp::default();
        made.ready("begin");
        made.acknowledged(1, "a");
        if deleted {
            made.change("ana", Action::Delete, Outcome::Done);
        }
        let message = made.history.intern(erased(1, "a"));
        made.told(Told::Message { position: "a".to_owned(), message });
        made.history.stored = Some(vec![vec![message]]);
        let early = if deleted { &[][..] } else { &[check::ERASED_EARLY] };
        assert_eq!(made.broken(), early);
    }
}

#[test]
fn messages_are_removed_from_the_low_end_and_do_not_come_back() {
    let four = [(1, "a"), (2, "b"), (3, "c"), (4, "d")];
    let newest = |limit| Page::Offset { offset: 0, limit };
    let history = |removals: bool, act: &dyn Fn(&mut MadeUp)| {
        let mut made = MadeUp::default();
        made.history.removals = removals;
        for (seq, content) in four {
            made.acknowledged(seq, content);
        }
        act(&mut made);
        made.broken()
    };
    let sound = |made: &mut MadeUp| {
        made.read(newest(4), &[(4, "d"), (3, "c"), (2, "b"), (1, "a")], false);
        made.read(newest(4), &[(4, "d"), (3, "c"), (2, "b")], false);
        made.read(newest(2), &[(4, "d"), (3, "c")], true);
        made.read(newest(2), &[(4, "d"), (3, "c")], false);
        made.read(Page::After { seq: 1, limit: 1 }, &[(3, "c")], true);
        made.read(Page::Before { seq: 3, limit: 2 }, &[], false);
        made.stored(&four[3..]);
    };
    assert_eq!(history(true, &sound), [""; 0]);
    // Without retention nothing may vanish.
    let broken = history(false, &sound);
    assert!(broken.contains(&check::TORN_PAGE) && broken.contains(&check::GAP), "{broken:?}");
    let faulty: [(Act<'_>, &str); 7] = [
        (
            &|made| {
                made.read(newest(4), &[(4, "d"), (3, "c")], false);
                made.read(newest(4), &[(4, "d"), (3, "c"), (2, "b")], false);
            },
            check::CAME_BACK,
        ),
        (
            &|made| {
                made.read(Page::Before { seq: 4, limit: 2 }, &[], false);
                made.read(Page::After { seq: 0, limit: 2 }, &[(3, "c")], false);
            },
            check::CAME_BACK,
        ),
        (
            &|made| {
                made.read(Page::After { seq: 0, limit: 2 }, &[(4, "d"), (3, "c")], false);
                made.stored(&four[1..]);
            },
            check::CAME_BACK,
        ),
        // From the middle, or the newest.
        (&|made| _ = made.read(newest(4), &[(4, "d"), (2, "b"), (1, "a")], false), check::TORN_PAGE),
        (&|made| _ = made.read(newest(4), &[(3, "c"), (2, "b"), (1, "a")], false), check::MISSED_ACK),
        (&|made| made.stored(&[(2, "b"), (4, "d")]), check::GAP),
        (&|made| made.stored(&four[1..3]), check::LOST_ACK),
    ];
    for (number, (act, rule)) in faulty.iter().enumerate() {
        let broken = history(true, act);
        assert!(broken.contains(rule), "{number}: {broken:?}");
    }
}
