//! `GET /messages`: pages, their limits and their links.

use reqwest::Method;
use uuid::Uuid;

use crate::support::{Response, TestApp, User};

/// The `seq`s of every page, from the first page along the links to the last.
pub(crate) async fn walk(app: &TestApp, reader: &User, peer: &User, query: &str) -> Vec<Vec<i64>> {
    let mut answer = app.messages(reader, peer, query).await;
    let mut pages = vec![answer.seqs()];
    while let Some(next) = answer.next() {
        assert!(pages.len() < 200, "the links never end: {pages:?}");
        answer = app.get(&next).by(reader).response().await;
        pages.push(answer.seqs());
    }
    pages
}

fn assert_page(answer: &Response, seqs: &[i64], next: Option<&str>) {
    assert_eq!(answer.seqs(), seqs);
    let query = answer.next().map(|next| {
        let (path, query) = next.split_once('?').expect("a query");
        assert_eq!(path, "/messages");
        query.split_once('&').expect("a peer and more").1.to_owned()
    });
    assert_eq!(query.as_deref(), next, "the link after {seqs:?}");
    assert_eq!(answer.header("warning"), None);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_page_is_the_five_newest_messages_newest_first_for_both() {
    let app = TestApp::start().await;
    let (ana, ben) = app.pair().await;
    app.sent_many(&ana, &ben, 7).await;
    for (reader, peer) in [(&ana, &ben), (&ben, &ana)] {
        let answer = app.messages(reader, peer, "").await;
        assert_page(&answer, &[7, 6, 5, 4, 3], Some("limit=5&before=3"));
        let messages = answer.json(200);
        for message in messages.as_array().expect("a page") {
            assert_eq!(message["content"], message["seq"].to_string());
            assert_eq!(
                (&message["sender_id"], &message["recipient_id"]),
                (&ana.id.clone().into(), &ben.id.clone().into())
            );
        }
        let next = answer.next().expect("a link");
        assert!(next.contains(&peer.id), "{next}");
        assert_page(&app.get(&next).by(reader).response().await, &[2, 1], None);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_last_page_has_no_link_even_when_it_is_exactly_full() {
    let app = TestApp::start().await;
    let (ana, ben) = app.pair().await;
    assert_page(&app.messages(&ana, &ben, "").await, &[], None);
    app.sent_many(&ana, &ben, 6).await;
    for (query, seqs, next) in [
        ("limit=6", &[6, 5, 4, 3, 2, 1][..], None),
        ("limit=100", &[6, 5, 4, 3, 2, 1], None),
        ("limit=3", &[6, 5, 4], Some("limit=3&before=4")),
        ("limit=3&offset=3", &[3, 2, 1], None),
        ("limit=3&before=4", &[3, 2, 1], None),
        ("limit=3&after=3", &[6, 5, 4], None),
        ("limit=6&after=0", &[6, 5, 4, 3, 2, 1], None),
        ("limit=1&offset=5", &[1], None),
        ("limit=1&after=5", &[6], None),
        ("limit=1&before=2", &[1], None),
    ] {
        // The first read may come from Postgres and a later one from the window: both must be the same.
        for _ in 0..3 {
            assert_page(&app.messages(&ana, &ben, query).await, seqs, next);
        }
    }
    // Reads from the window, which does not have the conversation's last seq from Postgres.
    for (query, seqs, next) in [
        ("limit=6", &[6, 5, 4, 3, 2, 1][..], None),
        ("limit=3", &[6, 5, 4], Some("limit=3&before=4")),
        ("limit=3&offset=3", &[3, 2, 1], None),
        ("limit=5&offset=6", &[], None),
    ] {
        assert_page(&app.hit(&ana, &ben, query).await, seqs, next);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_offset_skips_the_newest_and_links_back_in_time() {
    let app = TestApp::start().await;
    let (ana, ben) = app.pair().await;
    app.sent_many(&ana, &ben, 9).await;
    for (query, seqs, next) in [
        ("offset=0&limit=2", &[9, 8][..], Some("limit=2&before=8")),
        ("offset=3&limit=2", &[6, 5], Some("limit=2&before=5")),
        ("offset=3", &[6, 5, 4, 3, 2], Some("limit=5&before=2")),
        ("offset=8", &[1], None),
        ("offset=9", &[], None),
        ("offset=1000", &[], None),
        ("offset=9223372036854775807&limit=100", &[], None),
    ] {
        assert_page(&app.messages(&ana, &ben, query).await, seqs, next);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn before_lists_the_newest_below_it_and_links_back_in_time() {
    let app = TestApp::start().await;
    let (ana, ben) = app.pair().await;
    app.sent_many(&ana, &ben, 9).await;
    for (query, seqs, next) in [
        ("before=8&limit=3", &[7, 6, 5][..], Some("limit=3&before=5")),
        ("before=4&limit=3", &[3, 2, 1], None),
        ("before=2", &[1], None),
        ("before=1", &[], None),
        ("before=0", &[], None),
        ("before=10&limit=2", &[9, 8], Some("limit=2&before=8")),
        ("before=1000&limit=2", &[9, 8], Some("limit=2&before=8")),
        ("before=9223372036854775807&limit=2", &[9, 8], Some("limit=2&before=8")),
    ] {
        assert_page(&app.messages(&ana, &ben, query).await, seqs, next);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn after_lists_what_follows_directly_and_links_upward() {
    let app = TestApp::start().await;
    let (ana, ben) = app.pair().await;
    app.sent_many(&ana, &ben, 9).await;
    for (query, seqs, next) in [
        ("after=0&limit=4", &[4, 3, 2, 1][..], Some("limit=4&after=4")),
        ("after=4&limit=4", &[8, 7, 6, 5], Some("limit=4&after=8")),
        ("after=5&limit=4", &[9, 8, 7, 6], None),
        ("after=7", &[9, 8], None),
        ("after=9", &[], None),
        ("after=1000", &[], None),
        ("after=9223372036854775807&limit=100", &[], None),
        ("after=0&limit=100", &[9, 8, 7, 6, 5, 4, 3, 2, 1], None),
    ] {
        assert_page(&app.messages(&ana, &ben, query).await, seqs, next);
    }
    assert_eq!(walk(&app, &ben, &ana, "after=2&limit=3").await, [vec![5, 4, 3], vec![8, 7, 6], vec![9]]);
}

#[tokio::test(flavor = "multi_thread")]
async fn new_messages_shift_no_page_and_are_reached_upward() {
    let app = TestApp::start().await;
    let (ana, ben) = app.pair().await;
    app.sent_many(&ana, &ben, 6).await;
    let down = app.messages(&ana, &ben, "limit=3").await;
    let up = app.messages(&ana, &ben, "after=0&limit=3").await;
    assert_eq!((down.seqs(), up.seqs()), (vec![6, 5, 4], vec![3, 2, 1]));
    app.sent_many(&ben, &ana, 2).await;
    let down = app.get(&down.next().expect("a link")).by(&ana).response().await;
    assert_page(&down, &[3, 2, 1], None);
    let up = app.get(&up.next().expect("a link")).by(&ana).response().await;
    assert_page(&up, &[6, 5, 4], Some("limit=3&after=6"));
    let up = app.get(&up.next().expect("a link")).by(&ana).response().await;
    assert_page(&up, &[8, 7], None);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_page_beyond_the_window_is_the_same_as_without_a_window() {
    let app = TestApp::with(&[("CACHE_WINDOW", "10")]).await;
    let (ana, ben) = app.pair().await;
    app.sent_many(&ana, &ben, 25).await;
    app.hit(&ana, &ben, "limit=10").await;
    for (query, from, to) in [
        ("limit=10", 25, 16),
        ("limit=11", 25, 15),
        ("limit=5&offset=8", 17, 13),
        ("limit=20&offset=15", 10, 1),
    ] {
        let expected: Vec<i64> = (to..=from).rev().collect();
        assert_eq!(app.seqs(&ana, &ben, query).await, expected, "{query}");
    }
    let without = app.replica(&[("CACHE_WINDOW", "0")]).await;
    for query in ["", "limit=100", "offset=20"] {
        let (one, other) = (app.messages(&ana, &ben, query).await, without.messages(&ana, &ben, query).await);
        assert_eq!((one.json(200), one.next()), (other.json(200), other.next()), "{query}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn offset_before_and_after_exclude_one_another() {
    let app = TestApp::start().await;
    let (ana, ben) = app.pair().await;
    for (query, fields) in [
        ("offset=1&before=3", &["offset"][..]),
        ("offset=0&before=3", &["offset"]),
        ("offset=1&after=3", &["offset"]),
        ("before=5&after=3", &["before"]),
        ("offset=1&before=5&after=3", &["before"]),
    ] {
        assert_eq!(app.messages(&ana, &ben, query).await.invalid_fields(), fields, "{query}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn numbers_out_of_range_and_a_missing_peer_are_422_and_all_listed_at_once() {
    let app = TestApp::start().await;
    let (ana, ben) = app.pair().await;
    for (query, fields) in [
        ("limit=0", &["limit"][..]),
        ("limit=101", &["limit"]),
        ("limit=-5", &["limit"]),
        ("offset=-1", &["offset"]),
        ("before=-1", &["before"]),
        ("after=-1", &["after"]),
        ("limit=0&offset=-1", &["limit", "offset"]),
        ("limit=101&before=-1&after=-1", &["limit", "before", "after", "before"]),
    ] {
        assert_eq!(app.messages(&ana, &ben, query).await.invalid_fields(), fields, "{query}");
    }
    for (path, fields) in [
        ("/messages", &["peer_id"][..]),
        ("/messages?limit=0&offset=-1", &["peer_id", "limit", "offset"]),
        ("/messages?peer=x", &["peer_id"]),
    ] {
        assert_eq!(app.get(path).by(&ana).response().await.invalid_fields(), fields, "{path}");
    }
    for good in ["limit=1", "limit=100", "offset=0", "before=0", "after=0"] {
        assert_page(&app.messages(&ana, &ben, good).await, &[], None);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_number_that_does_not_parse_is_400_and_never_the_default() {
    let app = TestApp::start().await;
    let (ana, ben) = app.pair().await;
    for name in ["limit", "offset", "before", "after"] {
        for value in ["abc", "", "5x", "1.5", "1e3", "0x5", "%20", "9223372036854775808", "null", "%00", "５"]
        {
            let problem = app.messages(&ana, &ben, &format!("{name}={value}")).await.problem(400);
            assert!(problem["detail"].as_str().is_some_and(|text| text.contains(name)), "{problem}");
        }
    }
    app.messages(&ana, &ben, "limit=3&limit=4").await.problem(400);
    app.messages(&ana, &ben, &format!("peer_id={}", ana.id)).await.problem(400);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unknown_or_malformed_peer_is_404() {
    let app = TestApp::start().await;
    let ana = app.user("ana").await;
    for peer in [Uuid::now_v7().to_string().as_str(), "", "ana", "%00", "1"] {
        for query in ["", "&offset=60", "&before=5", "&after=5"] {
            let path = format!("/messages?peer_id={peer}{query}");
            app.request(Method::GET, &path).by(&ana).response().await.problem(404);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_third_user_cannot_read_a_conversation() {
    let app = TestApp::start().await;
    let (ana, ben) = app.pair().await;
    let eve = app.user("eve").await;
    app.sent(&ana, &ben, "between us").await;
    for peer in [&ana, &ben] {
        assert_page(&app.messages(&eve, peer, "").await, &[], None);
        assert_page(&app.messages(&eve, peer, "after=0").await, &[], None);
    }
}
