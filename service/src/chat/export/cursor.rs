//! Where an export stands: a place behind one of its lines, as an opaque text.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use uuid::Uuid;

/// A line of an export. They come in this order; within a kind in the order of the ids, and of `seq`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    User,
    Session(Uuid),
    Block(Uuid),
    /// The line of the conversation itself has the seq 0.
    Conversation {
        peer: Uuid,
        seq: i64,
    },
}

const BYTES: usize = 16 + 1 + 16 + 8;

impl Place {
    /// Names the user, because another's places mean nothing.
    pub(super) fn encode(self, user: Uuid) -> String {
        let (kind, id, seq) = match self {
            Self::User => (0, Uuid::nil(), 0),
            Self::Session(id) => (1, id, 0),
            Self::Block(id) => (2, id, 0),
            Self::Conversation { peer, seq } => (3, peer, seq),
        };
        URL_SAFE_NO_PAD.encode([&user.as_bytes()[..], &[kind], id.as_bytes(), &seq.to_be_bytes()].concat())
    }

    /// `None` unless it is a place of this user's exports.
    pub(crate) fn decode(text: &str, user: Uuid) -> Option<Self> {
        let bytes: [u8; BYTES] = URL_SAFE_NO_PAD.decode(text).ok()?.try_into().ok()?;
        let (owner, rest) = bytes.split_first_chunk::<16>()?;
        let (kind, rest) = rest.split_first()?;
        let (id, seq) = rest.split_first_chunk::<16>()?;
        let (id, seq) = (Uuid::from_bytes(*id), i64::from_be_bytes(seq.try_into().ok()?));
        let place = match kind {
            0 => Self::User,
            1 => Self::Session(id),
            2 => Self::Block(id),
            3 => Self::Conversation { peer: id, seq },
            _ => return None,
        };
        // Of each place there is one text.
        (*owner == *user.as_bytes() && seq >= 0 && place.encode(user) == text).then_some(place)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cursor_is_read_as_it_was_written_by_its_user_alone() {
        let [user, id] = [1, 2].map(Uuid::from_u128);
        for place in [
            Place::User,
            Place::Session(id),
            Place::Block(id),
            Place::Conversation { peer: id, seq: 0 },
            Place::Conversation { peer: id, seq: i64::MAX },
        ] {
            let text = place.encode(user);
            assert_eq!(Place::decode(&text, user), Some(place));
            assert_eq!(Place::decode(&text, id), None);
            for bad in [&text[1..], &text[..text.len() - 1], &format!("{text}A"), &format!("{text}=")] {
                assert_eq!(Place::decode(bad, user), None, "{bad}");
            }
        }
        let negative = Place::Conversation { peer: id, seq: -1 }.encode(user);
        let unused = URL_SAFE_NO_PAD.encode([&user.as_bytes()[..], &[4], &[0; 24]].concat());
        for bad in ["", "x", "%", &negative, &unused] {
            assert_eq!(Place::decode(bad, user), None, "{bad}");
        }
    }
}
