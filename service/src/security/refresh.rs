//! Refresh tokens: random, kept as hashes, each good for one use.
//!
//! A token names its family, by which the session is found, and has a secret. The current one is exchanged for its
//! successor. For a few seconds the one before is exchanged for the same successor, because the answer may have been lost.
//! The server does not keep tokens, so it derives the successor from the secret key, a random salt of this rotation, which the
//! session keeps, and the token itself: nobody can who lacks one of the three.

use aws_lc_rs::{digest, hmac};
use base64::Engine as _;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use secrecy::{ExposeSecret as _, SecretString};
use uuid::Uuid;

use crate::config::Config;

const SECRET_BYTES: usize = 32;

/// What the secret key signs here, and nowhere else.
const PURPOSE: &[u8] = b"refresh\0";

pub(super) struct RefreshToken {
    pub(super) family: Uuid,
    secret: [u8; SECRET_BYTES],
}

impl RefreshToken {
    pub(super) fn random() -> Self {
        Self { family: Uuid::new_v4(), secret: rand::random() }
    }

    pub(super) fn parse(text: &str) -> Option<Self> {
        let bytes = BASE64_URL_SAFE_NO_PAD.decode(text).ok()?;
        let (family, secret) = bytes.split_first_chunk()?;
        Some(Self { family: Uuid::from_bytes(*family), secret: secret.try_into().ok()? })
    }

    pub(super) fn text(&self) -> String {
        BASE64_URL_SAFE_NO_PAD.encode([self.family.as_bytes(), self.secret.as_slice()].concat())
    }

    /// What the session keeps. A fast hash suffices: there is nothing to guess in a random secret.
    pub(super) fn hash(&self) -> Vec<u8> {
        digest::digest(&digest::SHA256, &self.secret).as_ref().to_vec()
    }
}

/// Derives each token's successor.
pub(super) struct Succession {
    /// The current key, then the previous one during a rotation.
    keys: Vec<hmac::Key>,
}

impl Succession {
    pub(super) fn new(config: &Config) -> Self {
        let key =
            |secret: &SecretString| hmac::Key::new(hmac::HMAC_SHA256, secret.expose_secret().as_bytes());
        let keys = [Some(&config.secret_key), config.secret_key_previous.as_ref()];
        Self { keys: keys.into_iter().flatten().map(key).collect() }
    }

    pub(super) fn random_salt() -> [u8; SECRET_BYTES] {
        rand::random()
    }

    /// The successor, under each of the keys: the first is the one to give out.
    pub(super) fn successors(&self, token: &RefreshToken, salt: &[u8]) -> impl Iterator<Item = RefreshToken> {
        let text = [PURPOSE, salt, &token.secret].concat();
        self.keys.iter().map(move |key| {
            let mut secret = [0; SECRET_BYTES];
            secret.copy_from_slice(hmac::sign(key, &text).as_ref());
            RefreshToken { family: token.family, secret }
        })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn succession(key: &str, previous: Option<&str>) -> Succession {
        let mut variables = BTreeMap::from([("SECRET_KEY".to_owned(), key.to_owned())]);
        variables.extend(previous.map(|key| ("SECRET_KEY_PREVIOUS".to_owned(), key.to_owned())));
        Succession::new(&Config::from_variables(&variables).expect("valid"))
    }

    #[test]
    fn a_token_is_read_as_it_was_written() {
        let token = RefreshToken::random();
        let read = RefreshToken::parse(&token.text()).expect("a token");
        assert_eq!((read.family, read.hash()), (token.family, token.hash()));
        for bad in ["", "x", &token.text()[1..], &format!("{}AA", token.text()), "ä"] {
            assert!(RefreshToken::parse(bad).is_none(), "{bad}");
        }
    }

    #[test]
    fn the_successor_depends_on_key_salt_and_token() {
        let (token, other) = (RefreshToken::random(), RefreshToken::random());
        let first = |key, previous, token, salt: &[u8]| {
            let succession = succession(key, previous);
            succession.successors(token, salt).map(|token| token.hash()).collect::<Vec<_>>()
        };
        let hashes = first("one", None, &token, b"salt");
        assert_eq!(hashes, first("one", None, &token, b"salt"));
        assert_ne!(hashes, first("two", None, &token, b"salt"));
        assert_ne!(hashes, first("one", None, &other, b"salt"));
        assert_ne!(hashes, first("one", None, &token, b"other"));
        assert_eq!(hashes[0], first("two", Some("one"), &token, b"salt")[1]);
    }
}
