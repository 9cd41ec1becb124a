//! The history checker: a short run of it, and its rules on histories that were made up to break each of them.
//!
//! `HISTORY_SECONDS` and `HISTORY_SEED` choose another run. `cargo xtask soak` runs for longer, and
//! `cargo xtask soak --self-check` shows that the checker finds the fault of builds that are broken on purpose.

mod accounts;
mod streams;

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
