//! Conversations by the ten thousand, made by SQL.

use std::net::SocketAddr;
use std::sync::Arc;

use anyhow::Result;
use harness::User;
use serde_json::json;

use crate::bench::setup::{CONTENT, DATABASE, Setup, create_users, user_sql};

pub(super) const CONVERSATIONS: usize = 20_000;
const MESSAGES: usize = 60;
/// The first ones have more, so that pages below any window are there to be read.
pub(super) const LONG_CONVERSATIONS: usize = 100;
pub(super) const LONG_MESSAGES: usize = 200;

/// The sender and reader of each conversation. Conversation `n` is between the users `2n` and `2n + 1`.
pub(super) struct Data {
    users: Vec<User>,
}

/// The SQL for the id of conversation `n`: scattered, as the service's own are.
pub(super) fn conversation_sql(n: &str) -> String {
    format!("md5(({n})::text)::uuid")
}

impl Data {
    pub(super) fn create(setup: &Setup) -> Result<Self> {
        let users = create_users(setup, 2 * CONVERSATIONS)?;
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
        Ok(Self { users })
    }

    /// Path and token of a read of conversation `n`.
    pub(super) fn read(&self, n: usize, query: &str) -> (String, &str) {
        let (reader, peer) = self.pair(n);
        (format!("/messages?peer_id={}{query}", peer.id), &reader.token)
    }

    /// A read of conversation `n`, as bytes.
    pub(super) fn get(&self, address: SocketAddr, n: usize, query: &str) -> Vec<u8> {
        let (path, token) = self.read(n, query);
        load::get(address, &path, token)
    }

    /// A message of the reader to conversation `n`.
    pub(super) fn post(&self, address: SocketAddr, n: usize) -> Arc<[u8]> {
        let (reader, peer) = self.pair(n);
        let body = json!({"recipient_id": peer.id, "content": CONTENT}).to_string();
        load::post(address, "/send", Some(&reader.token), &body).into()
    }

    fn pair(&self, n: usize) -> (&User, &User) {
        (&self.users[2 * n], &self.users[2 * n + 1])
    }
}
