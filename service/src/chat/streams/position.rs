//! Positions of streams: which transactions of Postgres a client has seen, as an opaque text.

use std::fmt;
use std::str::FromStr;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use uuid::Uuid;

/// The first byte of a position, without and with a part of what comes after. Other formats get other numbers.
const WHOLE: u8 = 1;
const PARTIAL: u8 = 2;

/// A position is taken up for this long. What a client has missed by then it reads page by page.
const AGE_MAX: Duration = Duration::from_secs(7 * 24 * 3600);

/// Running transactions in one snapshot, far more than Postgres has connections for. A text that claims more is made up.
const RUNNING_MAX: usize = 10_000;

/// What one statement of Postgres sees, as `pg_current_snapshot()` says it: every transaction below `next` that is not in
/// `running`. The ones from `next` on had not begun.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Snapshot {
    pub(super) next: u64,
    /// In ascending order, all below `next`.
    pub(super) running: Vec<u64>,
}

impl Snapshot {
    pub(super) fn sees(&self, xact: u64) -> bool {
        xact < self.next && self.running.binary_search(&xact).is_err()
    }

    /// True if this snapshot sees all that the other one sees.
    pub(super) fn includes(&self, other: &Self) -> bool {
        other.next <= self.next && self.running.iter().all(|xact| !other.sees(*xact))
    }
}

/// As Postgres writes it: `xmin:xmax:xip,...`.
impl fmt::Display for Snapshot {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let oldest = self.running.first().copied().unwrap_or(self.next);
        write!(formatter, "{oldest}:{}:", self.next)?;
        for (index, xact) in self.running.iter().enumerate() {
            write!(formatter, "{}{xact}", if index == 0 { "" } else { "," })?;
        }
        Ok(())
    }
}

#[derive(thiserror::Error, Debug)]
#[error("not a snapshot: {0}")]
pub(super) struct NotASnapshot(String);

impl FromStr for Snapshot {
    type Err = NotASnapshot;

    fn from_str(text: &str) -> Result<Self, NotASnapshot> {
        let parse = || {
            let [_, next, running] = text.split(':').collect::<Vec<_>>()[..] else { return None };
            let running: Result<Vec<u64>, _> =
                running.split(',').filter(|xact| !xact.is_empty()).map(str::parse).collect();
            Some(Self { next: next.parse().ok()?, running: running.ok()? })
        };
        parse().ok_or_else(|| NotASnapshot(text.to_owned()))
    }
}

/// Where a stream stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Position {
    pub(super) user: Uuid,
    /// Names the server that numbered the transactions.
    pub(super) epoch: u64,
    /// Everything that this sees was delivered.
    pub(super) seen: Snapshot,
    /// And a part of what comes after.
    pub(super) within: Option<Within>,
}

/// Of what `until` sees and the position's `seen` does not, everything up to this message was delivered, in the order of
/// conversation and seq.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Within {
    pub(super) until: Snapshot,
    pub(super) conversation: Uuid,
    pub(super) seq: i64,
}

/// Why a position cannot be taken up. Its name is the `reason` of a `reset`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, strum::IntoStaticStr)]
#[strum(serialize_all = "snake_case")]
pub enum Refused {
    /// It is no position.
    Malformed,
    /// It is another user's.
    Foreign,
    /// Its transactions were numbered by another server, or before a failover.
    Epoch,
    /// Or messages that it lacks were removed.
    TooOld,
}

impl Position {
    /// Not a secret, and no protection: a stream has its caller's messages alone, whatever its position.
    pub(super) fn encode(&self) -> String {
        let mut bytes = Vec::with_capacity(64);
        bytes.push(if self.within.is_some() { PARTIAL } else { WHOLE });
        bytes.extend_from_slice(&tag(self.user).to_be_bytes());
        bytes.extend_from_slice(&self.epoch.to_be_bytes());
        put(&mut bytes, now());
        put_snapshot(&mut bytes, &self.seen);
        if let Some(within) = &self.within {
            bytes.extend_from_slice(within.conversation.as_bytes());
            put(&mut bytes, within.seq.unsigned_abs());
            put_snapshot(&mut bytes, &within.until);
        }
        URL_SAFE_NO_PAD.encode(bytes)
    }

    /// The caller compares its epoch with the current one, and whether messages were removed that it lacks.
    pub(super) fn decode(text: &str, user: Uuid) -> Result<Self, Refused> {
        let bytes = URL_SAFE_NO_PAD.decode(text).map_err(|_| Refused::Malformed)?;
        let mut rest = Reader(&bytes);
        let (encoded, written) = rest.position(user).ok_or(Refused::Malformed)?;
        if encoded.0 != tag(user) {
            return Err(Refused::Foreign);
        }
        if now().saturating_sub(written) > AGE_MAX.as_secs() {
            return Err(Refused::TooOld);
        }
        Ok(encoded.1)
    }
}

/// Seconds since 1970.
fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

/// Tells users' positions apart: the random end of the id.
fn tag(user: Uuid) -> u32 {
    let [.., a, b, c, d] = user.into_bytes();
    u32::from_be_bytes([a, b, c, d])
}

/// Seven bits a byte, lowest first; the highest bit says that more follow.
fn put(bytes: &mut Vec<u8>, mut number: u64) {
    while number > 0x7f {
        bytes.push(number as u8 | 0x80);
        number >>= 7;
    }
    bytes.push(number as u8);
}

/// The running transactions are close to the next one: as distances they are short.
fn put_snapshot(bytes: &mut Vec<u8>, snapshot: &Snapshot) {
    put(bytes, snapshot.next);
    put(bytes, snapshot.running.len() as u64);
    for xact in &snapshot.running {
        put(bytes, snapshot.next.saturating_sub(*xact));
    }
}

struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (taken, rest) = self.0.split_first_chunk::<N>()?;
        self.0 = rest;
        Some(*taken)
    }

    fn number(&mut self) -> Option<u64> {
        let mut number = 0u64;
        for shift in (0..64).step_by(7) {
            let [byte] = self.take()?;
            number |= u64::from(byte & 0x7f).checked_shl(shift)?;
            if byte & 0x80 == 0 {
                return Some(number);
            }
        }
        None
    }

    fn snapshot(&mut self) -> Option<Snapshot> {
        let next = self.number()?;
        let count = usize::try_from(self.number()?).ok().filter(|count| *count <= RUNNING_MAX)?;
        let running: Option<Vec<u64>> =
            (0..count).map(|_| self.number().and_then(|distance| next.checked_sub(distance))).collect();
        let running = running?;
        // Postgres knows no other snapshots.
        let is_one = next > 0
            && running.is_sorted_by(|a, b| a < b)
            && running.first().is_none_or(|first| *first > 0)
            && running.last().is_none_or(|last| *last < next);
        is_one.then_some(Snapshot { next, running })
    }

    /// The user's tag and the position, and when it was written.
    fn position(&mut self, user: Uuid) -> Option<((u32, Position), u64)> {
        let [format] = self.take()?;
        let tag = u32::from_be_bytes(self.take()?);
        let epoch = u64::from_be_bytes(self.take()?);
        let written = self.number()?;
        let seen = self.snapshot()?;
        let within = match format {
            WHOLE => None,
            PARTIAL => {
                let conversation = Uuid::from_bytes(self.take()?);
                let seq = i64::try_from(self.number()?).ok()?;
                Some(Within { conversation, seq, until: self.snapshot()? })
            }
            _ => return None,
        };
        self.0.is_empty().then_some(((tag, Position { user, epoch, seen, within }), written))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn snapshot(text: &str) -> Snapshot {
        text.parse().expect("a snapshot")
    }

    fn position() -> Position {
        Position {
            user: Uuid::from_u128(7),
            epoch: 42,
            seen: snapshot("10:20:10,12"),
            within: Some(Within {
                until: snapshot("18446744073709551600:18446744073709551610:18446744073709551600"),
                conversation: Uuid::from_u128(9),
                seq: 300,
            }),
        }
    }

    #[test]
    fn a_snapshot_sees_what_had_ended() {
        let seen = snapshot("10:20:10,12");
        assert!([1, 9, 11, 19].iter().all(|xact| seen.sees(*xact)));
        assert!([10, 12, 20, 21].iter().all(|xact| !seen.sees(*xact)));
        assert_eq!(seen.to_string(), "10:20:10,12");
        assert_eq!(snapshot("20:20:").to_string(), "20:20:");
        for bad in ["", "1:2", "1:x:", "1:2:a", "1:2:3:4"] {
            assert!(bad.parse::<Snapshot>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_later_snapshot_includes_an_earlier_one() {
        let (early, late) = (snapshot("10:20:10,12"), snapshot("12:25:12,21"));
        assert!(late.includes(&early) && !early.includes(&late));
        assert!(early.includes(&early));
        assert!(!snapshot("11:25:11").includes(&early), "11 had ended before");
    }

    #[test]
    fn a_position_is_read_as_it_was_written() {
        let whole = Position { within: None, ..position() };
        for position in [position(), whole] {
            let text = position.encode();
            assert!(text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_".contains(&byte)), "{text}");
            assert_eq!(Position::decode(&text, position.user), Ok(position));
        }
    }

    #[test]
    fn a_position_that_cannot_be_taken_up_is_refused() {
        let text = position().encode();
        let user = position().user;
        assert_eq!(Position::decode(&text, Uuid::from_u128(8)), Err(Refused::Foreign));
        for length in 0..text.len() {
            assert!(Position::decode(&text[..length], user).is_err(), "{length}");
        }
        for bad in ["x", "....", "AAAA", "%00", &format!("{text}AA"), &"A".repeat(5000)] {
            assert_eq!(Position::decode(bad, user), Err(Refused::Malformed), "{bad}");
        }
        for (next, running) in [(0, vec![]), (20, vec![0]), (20, vec![20])] {
            let seen = Snapshot { next, running };
            let text = Position { seen, within: None, ..position() }.encode();
            assert_eq!(Position::decode(&text, user), Err(Refused::Malformed), "Postgres refuses it");
        }
    }

    #[test]
    fn a_position_is_taken_up_for_a_week() {
        let mut bytes = vec![WHOLE];
        bytes.extend_from_slice(&tag(Uuid::from_u128(7)).to_be_bytes());
        bytes.extend_from_slice(&42u64.to_be_bytes());
        put(&mut bytes, now() - AGE_MAX.as_secs() - 1);
        put_snapshot(&mut bytes, &snapshot("20:20:"));
        let text = URL_SAFE_NO_PAD.encode(bytes);
        assert_eq!(Position::decode(&text, Uuid::from_u128(7)), Err(Refused::TooOld));
    }
}
