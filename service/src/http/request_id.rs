//! `x-request-id`: the caller's where it sent a sane one, else a new one.

use salvo::Request;
use salvo::http::header::{HeaderName, HeaderValue};
use uuid::Uuid;

pub(super) const X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// Long enough for a UUID with a prefix, short enough for a log line.
const MAX_LENGTH: usize = 64;

#[derive(Clone, Debug)]
pub(super) struct RequestId(HeaderValue);

impl RequestId {
    /// Takes the caller's id, or makes one, and stores it in the request.
    pub(super) fn assign(req: &mut Request) -> Self {
        let id = match req.headers().get(X_REQUEST_ID) {
            Some(value) if is_sane(value.as_bytes()) => Self(value.clone()),
            _ => Self::new(),
        };
        req.extensions_mut().insert(id.clone());
        id
    }

    /// The id that `assign` gave to this request.
    pub(super) fn of(req: &Request) -> &str {
        req.extensions().get::<Self>().map(Self::as_str).unwrap_or_default()
    }

    pub(super) fn as_str(&self) -> &str {
        self.0.to_str().unwrap_or_default()
    }

    pub(super) fn header(&self) -> HeaderValue {
        self.0.clone()
    }

    fn new() -> Self {
        let mut text = [0; uuid::fmt::Simple::LENGTH];
        let text = Uuid::now_v7().simple().encode_lower(&mut text);
        Self(HeaderValue::from_str(text).unwrap_or(HeaderValue::from_static("none")))
    }
}

/// Anything else could break a log line or a header of the next service.
fn is_sane(id: &[u8]) -> bool {
    (1..=MAX_LENGTH).contains(&id.len())
        && id.iter().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_short_plain_ids_are_accepted() {
        for sane in ["a", "A.b_c-9", &"x".repeat(64)] {
            assert!(is_sane(sane.as_bytes()), "{sane}");
        }
        for odd in ["", "a b", "a\"b", "ä", "a/b", &"x".repeat(65)] {
            assert!(!is_sane(odd.as_bytes()), "{odd}");
        }
    }
}
