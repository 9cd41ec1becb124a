//! The rules on sessions, blocks, deletions and retention.

use super::*;

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
