//! Access tokens: signed JWTs, and a cache of those that were verified.

use std::time::{SystemTime, UNIX_EPOCH};

use jsonwebtoken::{DecodingKey, EncodingKey, Header, Validation};
use quick_cache::sync::Cache;
use secrecy::{ExposeSecret as _, SecretString};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::config::Config;

/// Verified tokens in the cache. A token has some 200 bytes, and an active client sends the same one for up to an hour.
const VERIFIED_MAX: usize = 10_000;

/// A token could not be signed.
#[derive(thiserror::Error, Debug)]
#[error(transparent)]
pub struct TokenError(#[from] jsonwebtoken::errors::Error);

/// Signs and verifies access tokens.
pub struct Tokens {
    signing: EncodingKey,
    /// The current key, then the previous one during a rotation.
    verifying: Vec<DecodingKey>,
    validation: Validation,
    lifetime_seconds: u64,
    /// The claims of verified tokens, by the whole token with its signature: the same bytes verify again under the same
    /// keys until they expire. To decode a token again, with the preparation of the key, is a tenth of a read's cost.
    verified: Cache<String, Claims>,
}

/// What a verified token says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Verified {
    pub user: Uuid,
    /// The user's id in a token of a release without sessions.
    pub session: Uuid,
    /// Seconds since 1970.
    pub expires: u64,
}

#[derive(Serialize, Deserialize, Clone, Copy)]
struct Claims {
    sub: Uuid,
    #[serde(skip_serializing_if = "Option::is_none")]
    sid: Option<Uuid>,
    iat: u64,
    exp: u64,
}

impl Tokens {
    pub fn new(config: &Config) -> Self {
        let key = |secret: &SecretString| DecodingKey::from_secret(secret.expose_secret().as_bytes());
        let mut validation = Validation::new(jsonwebtoken::Algorithm::HS256);
        validation.leeway = 0;
        validation.set_required_spec_claims(&["exp", "sub"]);
        Self {
            signing: EncodingKey::from_secret(config.secret_key.expose_secret().as_bytes()),
            verifying: [Some(&config.secret_key), config.secret_key_previous.as_ref()]
                .into_iter()
                .flatten()
                .map(key)
                .collect(),
            validation,
            lifetime_seconds: config.access_token_lifetime().as_secs(),
            verified: Cache::new(VERIFIED_MAX),
        }
    }

    /// A token of the session, and its lifetime in seconds. `issued_at` is in seconds since 1970.
    pub fn issue(&self, user: Uuid, session: Uuid, issued_at: u64) -> Result<(String, u64), TokenError> {
        let (sid, iat) = (Some(session), issued_at);
        let claims = Claims { sub: user, sid, iat, exp: iat + self.lifetime_seconds };
        let token = jsonwebtoken::encode(&Header::default(), &claims, &self.signing)?;
        Ok((token, self.lifetime_seconds))
    }

    /// The user that a token was issued for, and until when.
    pub fn verify(&self, token: &str) -> Option<Verified> {
        if let Some(verified) = self.recall(token, now()) {
            return Some(verified);
        }
        let decode = |key| jsonwebtoken::decode::<Claims>(token, key, &self.validation).ok();
        let claims = self.verifying.iter().find_map(decode)?.claims;
        self.verified.insert(token.to_owned(), claims);
        Some(claims.verified())
    }

    /// As of a token that was verified before and has not expired.
    fn recall(&self, token: &str, now: u64) -> Option<Verified> {
        self.verified.get(token).filter(|claims| now <= claims.exp).map(|claims| claims.verified())
    }
}

impl Claims {
    fn verified(self) -> Verified {
        Verified { user: self.sub, session: self.sid.unwrap_or(self.sub), expires: self.exp }
    }
}

/// Seconds since 1970.
fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

impl std::fmt::Debug for Tokens {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Tokens").field("keys", &self.verifying.len()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn tokens(pairs: &[(&str, &str)]) -> Tokens {
        jsonwebtoken_provider();
        let variables: BTreeMap<_, _> =
            pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        Tokens::new(&Config::from_variables(&variables).expect("valid"))
    }

    fn jsonwebtoken_provider() {
        rustls::crypto::aws_lc_rs::default_provider().install_default().ok();
    }

    fn forge(claims: &serde_json::Value, algorithm: jsonwebtoken::Algorithm, key: &str) -> String {
        let key = EncodingKey::from_secret(key.as_bytes());
        jsonwebtoken::encode(&Header::new(algorithm), claims, &key).expect("encodes")
    }

    #[test]
    fn a_token_names_its_user_under_the_key_it_was_signed_with() {
        let user = Uuid::now_v7();
        let (token, lifetime) =
            tokens(&[("SECRET_KEY", "one")]).issue(user, Uuid::now_v7(), now()).expect("issued");
        assert_eq!(lifetime, 3600);
        let user_of = |verified: Option<Verified>| verified.map(|verified| verified.user);
        assert_eq!(user_of(tokens(&[("SECRET_KEY", "one")]).verify(&token)), Some(user));
        assert_eq!(tokens(&[("SECRET_KEY", "two")]).verify(&token), None);
        assert_eq!(
            user_of(tokens(&[("SECRET_KEY", "two"), ("SECRET_KEY_PREVIOUS", "one")]).verify(&token)),
            Some(user)
        );
    }

    #[test]
    fn only_a_verified_token_is_remembered_and_only_until_it_expires() {
        let tokens = tokens(&[("SECRET_KEY", "one")]);
        let user = Uuid::now_v7();
        let (token, lifetime) = tokens.issue(user, Uuid::now_v7(), now()).expect("issued");
        assert_eq!(tokens.recall(&token, now()), None);
        let verified = tokens.verify(&token).expect("verified");
        assert_eq!(verified.user, user);
        assert_ne!(verified.session, user);
        assert!(verified.expires.abs_diff(now() + lifetime) <= 1);
        assert_eq!(tokens.recall(&token, now()), Some(verified));
        assert_eq!(tokens.recall(&token, now() + lifetime + 1), None);
        let (other, _) = super::tests::tokens(&[("SECRET_KEY", "two")])
            .issue(user, Uuid::now_v7(), now())
            .expect("issued");
        assert_eq!(tokens.verify(&other), None);
        assert_eq!(tokens.recall(&other, now()), None);
        // The same claims under another signature.
        let (claims, _) = token.rsplit_once('.').expect("a signature");
        let (_, signature) = other.rsplit_once('.').expect("a signature");
        assert_eq!(tokens.verify(&format!("{claims}.{signature}")), None);
    }

    #[test]
    fn expired_unsigned_and_otherwise_signed_tokens_are_refused() {
        let tokens = tokens(&[("SECRET_KEY", "one")]);
        let claims = |exp| serde_json::json!({"sub": Uuid::now_v7(), "iat": 0, "exp": exp});
        let hs256 = jsonwebtoken::Algorithm::HS256;
        let old =
            tokens.verify(&forge(&claims(now() + 60), hs256, "one")).expect("of a release without sessions");
        assert_eq!(old.session, old.user);
        assert!(tokens.verify(&forge(&claims(now() - 2), hs256, "one")).is_none(), "expired");
        let hs384 = jsonwebtoken::Algorithm::HS384;
        assert!(tokens.verify(&forge(&claims(now() + 60), hs384, "one")).is_none(), "another algorithm");
        let endless = serde_json::json!({"sub": Uuid::now_v7(), "iat": 0});
        assert!(tokens.verify(&forge(&endless, hs256, "one")).is_none(), "no exp");
        let nobody = serde_json::json!({"sub": "admin", "iat": 0, "exp": now() + 60});
        assert!(tokens.verify(&forge(&nobody, hs256, "one")).is_none(), "no user id");
        // {"alg":"none"} and a valid body, without a signature.
        let (token, _) = tokens.issue(Uuid::now_v7(), Uuid::now_v7(), now()).expect("issued");
        let body = token.split('.').nth(1).expect("three parts");
        assert!(tokens.verify(&format!("eyJhbGciOiJub25lIn0.{body}.")).is_none(), "unsigned");
    }
}
