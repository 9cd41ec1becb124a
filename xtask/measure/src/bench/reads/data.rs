//! Users and conversations by the ten thousand. The service hashes a password per user, so SQL makes them, and their
//! tokens are signed here.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::Result;
use harness::replica::SECRET_KEY;
use jsonwebtoken::{EncodingKey, Header, encode};
use serde_json::json;

use crate::bench::setup::{CONTENT, DATABASE, Setup};

pub(super) const CONVERSATIONS: usize = 20_000;
const MESSAGES: usize = 60;
/// The first ones have more, so that pages below any window are there to be read.
pub(super) const LONG_CONVERSATIONS: usize = 100;
pub(super) const LONG_MESSAGES: usize = 200;

const TOKEN_LIFETIME: Duration = Duration::from_secs(24 * 3600);

/// The sender and reader of each conversation. Conversation `n` is between the users `2n` and `2n + 1`.
pub(super) struct Data {
    readers: Vec<Reader>,
}

struct Reader {
    token: String,
    peer: String,
}

/// The SQL for the id of conversation `n`: scattered, as the service's own are.
pub(super) fn conversation_sql(n: &str) -> String {
    format!("md5(({n})::text)::uuid")
}

impl Data {
    pub(super) fn create(setup: &Setup) -> Result<Self> {
        let user_sql = |n: &str| format!("('{USERS_PREFIX}' || lpad(to_hex({n}), 12, '0'))::uuid");
        setup.postgres.query(
            DATABASE,
            &format!(
                "INSERT INTO users (id, username, username_key, email, email_key, password_hash)
                 SELECT {id}, 'reader' || n, 'reader' || n, n || '@readers.example', n || '@readers.example', 'none'
                 FROM generate_series(0, {last}) AS n",
                id = user_sql("n"),
                last = 2 * CONVERSATIONS - 1,
            ),
        )?;
        setup.postgres.query(
            DATABASE,
            &format!(
                "INSERT INTO conversations (low_user, high_user, id, last_seq, last_at)
                 SELECT {low}, {high}, {id}, CASE WHEN n < {LONG_CONVERSATIONS} THEN {LONG_MESSAGES} ELSE {MESSAGES} END, now()
                 FROM generate_series(0, {last}) AS n",
                low = user_sql("2 * n"),
                high = user_sql("2 * n + 1"),
                id = conversation_sql("n"),
                last = CONVERSATIONS - 1,
            ),
        )?;
        // Message by message of all conversations, so that a conversation's rows lie apart, as they do where people talk.
        setup.postgres.query(
            DATABASE,
            &format!(
                "INSERT INTO messages (conversation_id, seq, id, sender_id, content, created_at)
                 SELECT {id}, seq, gen_random_uuid(), {sender}, '{CONTENT}', now()
                 FROM generate_series(1, {LONG_MESSAGES}) AS seq,
                      generate_series(0, CASE WHEN seq <= {MESSAGES} THEN {CONVERSATIONS} ELSE {LONG_CONVERSATIONS} END - 1) AS n
                 ORDER BY seq",
                id = conversation_sql("n"),
                sender = user_sql("2 * n + seq % 2"),
            ),
        )?;
        setup.postgres.query(DATABASE, "VACUUM (ANALYZE) users, conversations, messages")?;
        let key = EncodingKey::from_secret(SECRET_KEY.as_bytes());
        let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
        let reader = |n: usize| {
            let claims = json!({"sub": user(2 * n), "iat": now, "exp": now + TOKEN_LIFETIME.as_secs()});
            Ok(Reader { token: encode(&Header::default(), &claims, &key)?, peer: user(2 * n + 1) })
        };
        Ok(Self { readers: (0..CONVERSATIONS).map(reader).collect::<Result<_>>()? })
    }

    /// Path and token of a read of conversation `n`.
    pub(super) fn read(&self, n: usize, query: &str) -> (String, &str) {
        let Reader { token, peer } = &self.readers[n];
        (format!("/messages?peer_id={peer}{query}"), token)
    }

    /// A read of conversation `n`, as bytes.
    pub(super) fn get(&self, address: SocketAddr, n: usize, query: &str) -> Vec<u8> {
        let (path, token) = self.read(n, query);
        load::get(address, &path, token)
    }

    /// A message of the reader to conversation `n`.
    pub(super) fn post(&self, address: SocketAddr, n: usize) -> Arc<[u8]> {
        let Reader { token, peer } = &self.readers[n];
        let body = json!({"recipient_id": peer, "content": CONTENT}).to_string();
        load::post(address, "/send", Some(token), &body).into()
    }
}

/// As version 7 has them: ordered by the time of registration.
const USERS_PREFIX: &str = "01920000-0000-7000-8000-";

fn user(n: usize) -> String {
    format!("{USERS_PREFIX}{n:012x}")
}
