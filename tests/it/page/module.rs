//! `chat-client.js`, which authors of clients copy.

use serde_json::json;

use super::browser::Person;
use crate::support::TestApp;

#[tokio::test(flavor = "multi_thread")]
async fn the_module_reads_events_however_their_text_is_cut() {
    let app = TestApp::start().await;
    let person = Person::at(app.running.public).await;
    let text = "\
        :\n\n\
        id: AQ_-\nevent: ready\ndata: {\"resumed\":false}\n\n\
        id: BQ\r\nevent: message\r\ndata: one\r\ndata:two\r\nunknown: x\r\n\r\n\
        data\rdata: : 👋 مرحبا\r\r\
        event: message\nid: never dispatched\n\n\
        retry: 1500\nretry: soon\n\nevent: end\ndata: {}\n\n\
        data: incomplete";
    let script = "
        const { EventParser } = await import('./page/chat-client.js');
        const text = arguments[0];
        const read = (pieces) => {
            const parser = new EventParser();
            return pieces.flatMap((piece) => parser.push(piece));
        };
        const all = [[...text], [text]];
        for (let at = 0; at <= text.length; at++) all.push([text.slice(0, at), text.slice(at)]);
        return [...new Set(all.map((pieces) => JSON.stringify(read(pieces))))].map(JSON.parse);
    ";
    let script = script.replace("arguments[0]", &json!(text).to_string());
    let expected = json!([
        {"name": "ready", "id": "AQ_-", "data": "{\"resumed\":false}"},
        {"name": "message", "id": "BQ", "data": "one\ntwo"},
        {"name": "message", "data": "\n: 👋 مرحبا"},
        {"name": "end", "data": "{}", "retry": 1500},
    ]);
    assert_eq!(person.runs_async(&script, json!(null)).await, json!([expected]));
    person.leaves().await;
}
