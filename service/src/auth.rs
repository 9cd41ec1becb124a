//! Who is calling: access tokens, and the extractor that demands one.

use std::time::{SystemTime, UNIX_EPOCH};

use jsonwebtoken::{DecodingKey, EncodingKey, Header, Validation};
use quick_cache::sync::Cache;
use salvo::extract::{Extractible, Metadata};
use salvo::http::StatusCode;
use salvo::http::header::{AUTHORIZATION, WWW_AUTHENTICATE};
use salvo::{Depot, Request};
use salvo_oapi::{Components, EndpointArgRegister, Operation, SecurityRequirement};
use secrecy::{ExposeSecret as _, SecretString};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::config::Config;
use crate::error::{self, Error};
use crate::input::app;

/// The name of the bearer scheme in the OpenAPI document.
pub const SECURITY_SCHEME: &str = "bearer";

/// The user that a valid token names. An endpoint that takes it refuses everyone else with 401.
#[derive(Clone, Copy, Debug)]
pub struct Caller {
    pub id: Uuid,
}

/// Tokens that are remembered. A token is some 200 bytes, and a client that is active sends one and the same for up to
/// an hour.
const REMEMBERED_MAX: usize = 10_000;

/// Signs and verifies access tokens.
pub struct Tokens {
    signing: EncodingKey,
    /// The current key, then the one before a rotation.
    verifying: Vec<DecodingKey>,
    validation: Validation,
    lifetime_seconds: u64,
    /// What was verified, by the whole token with its signature: the same bytes under the same keys verify again, until
    /// they expire. Decoding anew, with the keys' preparation, is a tenth of what a read costs.
    verified: Cache<String, Claims>,
}

#[derive(Serialize, Deserialize, Clone, Copy)]
struct Claims {
    sub: Uuid,
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
            lifetime_seconds: u64::from(config.access_token_exp_minutes) * 60,
            verified: Cache::new(REMEMBERED_MAX),
        }
    }

    /// A token for the user, and its life in seconds.
    pub fn issue(&self, user: Uuid) -> Result<(String, u64), Error> {
        let iat = now();
        let claims = Claims { sub: user, iat, exp: iat + self.lifetime_seconds };
        let token =
            jsonwebtoken::encode(&Header::default(), &claims, &self.signing).map_err(Error::internal)?;
        Ok((token, self.lifetime_seconds))
    }

    /// The user that a token was issued for.
    pub fn verify(&self, token: &str) -> Option<Uuid> {
        if let Some(user) = self.recall(token, now()) {
            return Some(user);
        }
        let decode = |key| jsonwebtoken::decode::<Claims>(token, key, &self.validation).ok();
        let claims = self.verifying.iter().find_map(decode)?.claims;
        self.verified.insert(token.to_owned(), claims);
        Some(claims.sub)
    }

    /// The user of a token that was verified before and has not expired since.
    fn recall(&self, token: &str, now: u64) -> Option<Uuid> {
        self.verified.get(token).filter(|claims| now <= claims.exp).map(|claims| claims.sub)
    }
}

/// Seconds since 1970.
fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

impl Caller {
    /// The caller that this request has shown itself to be.
    pub fn of(depot: &Depot) -> Option<Self> {
        depot.get_typed::<Self>().ok().copied()
    }
}

impl<'ex> Extractible<'ex> for Caller {
    fn metadata() -> &'static Metadata {
        static METADATA: Metadata = Metadata::new("Caller");
        &METADATA
    }

    #[expect(refining_impl_trait, reason = "callers outside the endpoint macro want the concrete error")]
    async fn extract(req: &'ex mut Request, depot: &'ex mut Depot) -> Result<Self, Error> {
        let Some(header) = req.headers().get(AUTHORIZATION) else {
            return Err(Error::Unauthorized(
                "a token is needed: send Authorization: Bearer <token from POST /login>",
            ));
        };
        let token = header.to_str().ok().and_then(|header| header.split_once(' '));
        let app = app(depot)?;
        app.passwords.make_way();
        let id = match token {
            Some((scheme, token)) if scheme.eq_ignore_ascii_case("bearer") => {
                app.tokens.verify(token.trim_start_matches(' '))
            }
            _ => return Err(Error::Unauthorized("the header must be: Authorization: Bearer <token>")),
        };
        let caller =
            Self { id: id.ok_or(Error::Unauthorized("the token is invalid or expired: log in again"))? };
        depot.insert_typed(caller);
        Ok(caller)
    }
}

impl EndpointArgRegister for Caller {
    fn register(components: &mut Components, operation: &mut Operation, _arg: &str) {
        let requirement = SecurityRequirement::new(SECURITY_SCHEME, Vec::<String>::new());
        operation.securities.get_or_insert_default().push(requirement);
        document_unauthorized(components, operation, "No token, or a bad, expired or foreign one");
    }
}

pub fn document_unauthorized(components: &mut Components, operation: &mut Operation, description: &str) {
    error::document(components, operation, StatusCode::UNAUTHORIZED, description, &[WWW_AUTHENTICATE]);
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
        let (token, lifetime) = tokens(&[("SECRET_KEY", "one")]).issue(user).expect("issued");
        assert_eq!(lifetime, 3600);
        assert_eq!(tokens(&[("SECRET_KEY", "one")]).verify(&token), Some(user));
        assert_eq!(tokens(&[("SECRET_KEY", "two")]).verify(&token), None);
        assert_eq!(
            tokens(&[("SECRET_KEY", "two"), ("SECRET_KEY_PREVIOUS", "one")]).verify(&token),
            Some(user)
        );
    }

    #[test]
    fn only_a_verified_token_is_remembered_and_only_until_it_expires() {
        let tokens = tokens(&[("SECRET_KEY", "one")]);
        let user = Uuid::now_v7();
        let (token, lifetime) = tokens.issue(user).expect("issued");
        assert_eq!(tokens.recall(&token, now()), None);
        assert_eq!(tokens.verify(&token), Some(user));
        assert_eq!(tokens.recall(&token, now()), Some(user));
        assert_eq!(tokens.recall(&token, now() + lifetime + 1), None);
        let (other, _) = super::tests::tokens(&[("SECRET_KEY", "two")]).issue(user).expect("issued");
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
        assert!(tokens.verify(&forge(&claims(now() + 60), hs256, "one")).is_some());
        assert!(tokens.verify(&forge(&claims(now() - 2), hs256, "one")).is_none(), "expired");
        let hs384 = jsonwebtoken::Algorithm::HS384;
        assert!(tokens.verify(&forge(&claims(now() + 60), hs384, "one")).is_none(), "another algorithm");
        let endless = serde_json::json!({"sub": Uuid::now_v7(), "iat": 0});
        assert!(tokens.verify(&forge(&endless, hs256, "one")).is_none(), "no exp");
        let nobody = serde_json::json!({"sub": "admin", "iat": 0, "exp": now() + 60});
        assert!(tokens.verify(&forge(&nobody, hs256, "one")).is_none(), "no user id");
        // {"alg":"none"} and a valid body, without a signature.
        let (token, _) = tokens.issue(Uuid::now_v7()).expect("issued");
        let body = token.split('.').nth(1).expect("three parts");
        assert!(tokens.verify(&format!("eyJhbGciOiJub25lIn0.{body}.")).is_none(), "unsigned");
    }
}
