//! Properties of the running service, checked with random input.

use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use tokio::runtime::Runtime;

use crate::messages::walk;
use crate::support::{TestApp, User, together};

/// Runs `check` on `cases` random values. A failure is shrunk and printed; nothing is kept between runs.
fn for_all<S: Strategy>(runtime: &Runtime, cases: u32, strategy: &S, check: impl AsyncFn(S::Value)) {
    let config = Config { cases, max_shrink_iters: 200, failure_persistence: None, ..Config::default() };
    let outcome = TestRunner::new(config).run(strategy, |value| {
        runtime.block_on(check(value));
        Ok(())
    });
    outcome.unwrap_or_else(|error| panic!("{error}"));
}

/// Any text that a message may have, with many special characters.
fn content() -> impl Strategy<Value = String> {
    let special = prop::sample::select(
        " \t\r\n\u{85}\u{a0}\u{1680}\u{2003}\u{2028}\u{2029}\u{3000}\u{200b}\u{200d}\u{202e}\u{feff}\u{301}\u{7f}\
         \u{fe0f}\u{1f468}\u{d7ff}\u{e000}\u{fffd}\u{ffff}\u{10ffff}\"\\/<>&'{}[],:%$;0"
            .chars()
            .collect::<Vec<_>>(),
    );
    let character = prop_oneof![3 => any::<char>(), 2 => special, 1 => prop::char::range(' ', '~')];
    let text = prop::collection::vec(character, 1..80).prop_map(String::from_iter);
    let refused = |c: char| c < ' ' && !"\t\r\n".contains(c);
    // With a visible character: the others are mostly not.
    let text = (text, 0_usize..80).prop_map(|(text, at)| {
        let mut characters: Vec<char> = text.trim().chars().collect();
        characters.insert(at.min(characters.len()), '.');
        String::from_iter(characters)
    });
    text.prop_filter("a message has no control characters", move |text| !text.chars().any(refused))
}

#[test]
fn any_content_is_the_same_bytes_in_every_response() {
    let runtime = Runtime::new().expect("a runtime");
    let (app, ana, ben) = runtime.block_on(async {
        let app = TestApp::start().await;
        let (ana, ben) = app.pair().await;
        (app, ana, ben)
    });
    for_all(&runtime, 96, &content(), async |content| {
        // Only Unicode white space at both ends is removed.
        let expected = content.trim_matches(char::is_whitespace);
        let message = app.sent(&ana, &ben, &content).await;
        assert_eq!(message["content"], expected, "in the 201");
        let seq = message["seq"].as_i64().expect("a seq");
        let hit = app.hit(&ben, &ana, "limit=1").await.json(200);
        assert_eq!(hit[0], message, "from the window");
        let row = app.messages(&ana, &ben, &format!("limit=1&before={}", seq + 1)).await.json(200);
        assert_eq!(row[0], message, "from Postgres");
    });
}

/// A conversation of `length` messages.
async fn conversation(app: &TestApp, length: i64) -> (User, User) {
    let (ana, ben) = app.pair().await;
    together((0..length).map(|_| app.sent(&ana, &ben, "hello"))).await;
    (ana, ben)
}

#[test]
fn pages_by_offset_before_and_after_never_repeat_or_skip() {
    let runtime = Runtime::new().expect("a runtime");
    // A small window: pages are within it, across its end, and beyond.
    let app = runtime.block_on(TestApp::with(&[("CACHE_WINDOW", "10")]));
    let strategy = (0_i64..40, 1_i64..15, 0_i64..45);
    for_all(&runtime, 40, &strategy, async |(length, limit, start)| {
        let (ana, ben) = conversation(&app, length).await;
        let down = |from: i64| (1..=from).rev().collect::<Vec<_>>();

        let mut by_offset = Vec::new();
        for offset in (0..=length).step_by(limit as usize) {
            by_offset.extend(app.seqs(&ana, &ben, &format!("limit={limit}&offset={offset}")).await);
        }
        assert_eq!(by_offset, down(length), "by offset");

        // Every page but the last is full, and the last one is not empty.
        let check = |pages: &[Vec<i64>], what: &str| {
            let (last, full) = pages.split_last().expect("a page");
            assert!(full.iter().all(|page| page.len() as i64 == limit), "{what}: {pages:?}");
            assert!(full.is_empty() || !last.is_empty(), "{what}: {pages:?}");
        };
        for (query, from) in [
            (format!("limit={limit}"), length),
            (format!("limit={limit}&offset={start}"), (length - start).max(0)),
            (format!("limit={limit}&before={start}"), length.min((start - 1).max(0))),
        ] {
            let pages = walk(&app, &ana, &ben, &query).await;
            check(&pages, &query);
            assert_eq!(pages.concat(), down(from), "{query}");
        }

        let query = format!("limit={limit}&after={start}");
        let pages = walk(&app, &ben, &ana, &query).await;
        check(&pages, &query);
        let upward: Vec<i64> = pages.iter().flat_map(|page| page.iter().rev()).copied().collect();
        assert_eq!(upward, (start + 1..=length).collect::<Vec<_>>(), "{query}");
    });
}
