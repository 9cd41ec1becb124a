//! How the figures change with the load's shape. They have no goal; the curve is what counts.

use anyhow::Result;
use harness::User;

use super::setup::{DATABASE, Setup};
use super::{Bench, Row};

const DEEP_ROWS: u64 = 10_000_000;

/// The send rate over 1 to 256 connections.
pub(crate) fn connections(bench: &Bench, setup: &mut Setup) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for connections in [1, 4, 16, 64, 256] {
        let report = load::run(setup.send_scripts(connections, false), bench.duration)?.all(201)?;
        rows.push(Row {
            name: "connections",
            what: format!("POST /send, {connections} connections"),
            values: vec![report.rate()],
            unit: "/s",
            goal: None,
            detail: latencies(&report),
        });
    }
    Ok(rows)
}

/// All messages in one conversation, against one conversation per connection.
pub(crate) fn conversations(bench: &Bench, setup: &mut Setup) -> Result<Vec<Row>> {
    let mut ratios = Vec::new();
    let mut detail = String::new();
    for _ in 0..bench.rounds {
        let many = load::run(setup.send_scripts(64, false), bench.duration)?.all(201)?;
        let hot = load::run(setup.send_scripts(64, true), bench.duration)?.all(201)?;
        ratios.push(hot.rate() / many.rate());
        detail = format!("one {:.0}/s, many {:.0}/s", hot.rate(), many.rate());
    }
    let what = "POST /send, 64 connections: one hot conversation to many".to_owned();
    Ok(vec![Row { name: "conversations", what, values: ratios, unit: "x", goal: None, detail }])
}

/// Two replicas against one.
pub(crate) fn replicas(bench: &Bench, setup: &mut Setup) -> Result<Vec<Row>> {
    let second = setup.start_replica(&bench.dir, &bench.binary)?;
    let mut second = Some(second);
    let mut ratios = Vec::new();
    let mut detail = String::new();
    for _ in 0..bench.rounds {
        let one = load::run(setup.send_scripts(64, false), bench.duration)?.all(201)?;
        setup.replicas.extend(second.take());
        let two = load::run(setup.send_scripts(64, false), bench.duration)?.all(201)?;
        second = setup.replicas.pop();
        ratios.push(two.rate() / one.rate());
        detail = format!("two {:.0}/s, one {:.0}/s", two.rate(), one.rate());
    }
    let what = "POST /send, 64 connections: two replicas to one, on the same cores".to_owned();
    Ok(vec![Row { name: "replicas", what, values: ratios, unit: "x", goal: None, detail }])
}

/// A page out of the middle of ten million messages, against one out of ten.
pub(crate) fn depth(bench: &Bench, setup: &mut Setup) -> Result<Vec<Row>> {
    let (reader, peer) = setup.pair(200);
    let (shallow_reader, shallow_peer) = setup.pair(201);
    for (one, other, messages) in [(reader, peer, DEEP_ROWS), (shallow_reader, shallow_peer, 10)] {
        setup.postgres.query(
            DATABASE,
            &format!(
                "WITH made AS (
                     INSERT INTO conversations (low_user, high_user, id, last_seq, last_at)
                     VALUES (least('{one}'::uuid, '{other}'), greatest('{one}'::uuid, '{other}'),
                             gen_random_uuid(), {messages}, now())
                     ON CONFLICT (low_user, high_user) DO UPDATE SET id = excluded.id, last_seq = excluded.last_seq
                     RETURNING id
                 )
                 INSERT INTO messages (conversation_id, seq, id, sender_id, content, created_at)
                 SELECT made.id, seq, gen_random_uuid(), '{one}', 'message ' || seq, now()
                 FROM made, generate_series(1, {messages}) AS seq",
                one = one.id,
                other = other.id,
            ),
        )?;
    }
    setup.postgres.query(DATABASE, "VACUUM ANALYZE messages")?;
    let mut ratios = Vec::new();
    let mut detail = String::new();
    let page = |reader: &User, peer: &User, query: &str| {
        let path = format!("/messages?peer_id={}&{query}", peer.id);
        let scripts = (0..16).map(|i| load::Script::get(setup.address(i), &path, &reader.token)).collect();
        load::run(scripts, bench.duration)?.all(200)
    };
    for _ in 0..bench.rounds {
        let shallow = page(shallow_reader, shallow_peer, "before=9")?;
        let deep = page(reader, peer, &format!("before={}", DEEP_ROWS / 2))?;
        let offset = page(reader, peer, &format!("offset={}", DEEP_ROWS / 2))?;
        ratios.push(deep.rate().min(offset.rate()) / shallow.rate());
        detail = format!(
            "before {:.0}/s, offset {:.0}/s, of ten {:.0}/s",
            deep.rate(),
            offset.rate(),
            shallow.rate()
        );
    }
    let what = "a page from the middle of 10,000,000 messages to one of ten, the slower of before and offset";
    Ok(vec![Row { name: "depth", what: what.to_owned(), values: ratios, unit: "x", goal: None, detail }])
}

fn latencies(report: &load::Report) -> String {
    let ms = |share| report.quantile(share).as_secs_f64() * 1e3;
    format!("p50 {:.2} ms, p99 {:.2} ms", ms(0.5), ms(0.99))
}
