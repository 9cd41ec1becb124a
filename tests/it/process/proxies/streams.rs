//! What a stream has to do behind any proxy.

use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use load::{Followers, Targets};
use tests::sse::{EventStream, Next};

use super::front::Front;

const STREAMS: usize = 1000;

/// An event that comes by itself, and not with others, is here by then.
const AT_ONCE: Duration = Duration::from_secs(2);

/// Longer than any timeout that the tests give a proxy.
const SILENCE: Duration = Duration::from_secs(20);

/// For all streams to be open, or to prove that they cannot be.
pub(super) const OPENING: Duration = Duration::from_secs(20);
pub(super) const REFUSED_WITHIN: Duration = Duration::from_secs(6);

fn open(front: &Front, position: &str) -> Result<EventStream> {
    let bearer = format!("Bearer {}", front.ana.token);
    let headers = [("authorization", bearer.as_str()), ("last-event-id", position)];
    let stream = EventStream::open(front.address, "/stream", &headers, AT_ONCE);
    let stream = stream.map_err(|error| anyhow::anyhow!("no head: {error:?}"))?;
    ensure!(stream.status() == 200, "{}", stream.status());
    ensure!(stream.header("content-encoding").is_none(), "the stream is compressed");
    Ok(stream)
}

fn named(stream: &mut EventStream, name: &str) -> Result<()> {
    match stream.next(AT_ONCE) {
        Next::Event(event) if event.name == name => Ok(()),
        other => bail!("no event {name} at once, but {other:?}"),
    }
}

/// Each event arrives when it is written, and a stream goes on behind the last one.
pub(super) fn events_arrive_at_once(front: &Front) -> Result<()> {
    let mut stream = open(front, "")?;
    named(&mut stream, "ready")?;
    front.service.send(&front.ben, &front.ana, "first")?.expect(201)?;
    named(&mut stream, "message")?;
    let position = stream.last_id().to_owned();
    drop(stream);
    front.service.send(&front.ben, &front.ana, "second")?.expect(201)?;
    let mut stream = open(front, &position)?;
    named(&mut stream, "ready")?;
    named(&mut stream, "message")?;
    ensure!(matches!(stream.next(Duration::from_millis(300)), Next::Nothing), "a message came twice");
    Ok(())
}

/// Comments alone keep a stream.
pub(super) fn silence_is_survived(front: &Front) -> Result<()> {
    let mut stream = open(front, "")?;
    named(&mut stream, "ready")?;
    let began = Instant::now();
    while let Some(left) = SILENCE.checked_sub(began.elapsed()) {
        match stream.next(left.max(Duration::from_millis(1))) {
            Next::Nothing => {}
            other => bail!("after {:.0?}: {other:?}", began.elapsed()),
        }
    }
    ensure!(stream.comments() >= 1, "{} comments", stream.comments());
    front.service.send(&front.ben, &front.ana, "after the silence")?.expect(201)?;
    named(&mut stream, "message")
}

/// A thousand at once, and each gets a message.
pub(super) fn a_thousand_streams_are_carried(front: &Front, limit: Duration) -> Result<()> {
    let tokens = vec![front.ana.token.clone(); STREAMS];
    let followers = Followers::start(&Targets::new(vec![front.address]), tokens, limit)?;
    front.service.send(&front.ben, &front.ana, "1 1 to a thousand")?.expect(201)?;
    followers.await_shown(STREAMS, Duration::from_secs(10));
    ensure!(followers.shown() == STREAMS, "{} of {STREAMS} have the message", followers.shown());
    followers.stop()?;
    Ok(())
}
