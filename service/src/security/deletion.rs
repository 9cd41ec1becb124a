//! Deletes accounts. What takes longer than one statement follows in the background: `chat/erasure.rs`.

use std::time::Duration;

use uuid::Uuid;

use crate::config::Config;
use crate::store::barrier;
use crate::store::operation::Operation;
use crate::store::postgres::Database;

/// For how long others cannot register the name and the address, so that they cannot pose as the user.
const RESERVED: Duration = Duration::from_secs(30 * 24 * 3600);

#[derive(Debug)]
pub struct Deletion {
    database: Database,
    /// For how long a statement in flight is waited for.
    writers_limit: Duration,
}

impl Deletion {
    pub(crate) fn new(config: &Config, database: Database) -> Self {
        Self { database, writers_limit: config.statement_timeout() }
    }

    /// Deletes the user with all sessions. After it no statement stores a message of or to the user. False if the password that was
    /// verified is no longer the user's, or the user is gone.
    pub async fn delete(
        &self,
        user: Uuid,
        verified_hash: &str,
        erase_messages: bool,
    ) -> Result<bool, sqlx::Error> {
        let deleted = self.remove(user, Some(verified_hash), erase_messages).await?;
        if deleted {
            barrier::writers_before_now_have_ended(&self.database, self.writers_limit).await?;
        }
        Ok(deleted)
    }

    /// Deletes the user, whose password an operator need not know. Statements that began before may still store its messages.
    pub(crate) async fn remove(
        &self,
        user: Uuid,
        verified_hash: Option<&str>,
        erase_messages: bool,
    ) -> Result<bool, sqlx::Error> {
        let mut connection = self.database.acquire().await?;
        // A trigger notes the user in deleted_users, from which all replicas learn of it.
        let query = sqlx::query_scalar!(
            r#"WITH gone AS (
                   DELETE FROM users WHERE id = $1 AND password_hash = coalesce($2, password_hash)
                   RETURNING id, username_key, email_key
               ), reserved AS (
                   INSERT INTO reserved_names (hash, reserved_until)
                   SELECT reserved_name(kind, folded), clock_timestamp() + make_interval(secs => $4)
                   FROM gone
                   CROSS JOIN LATERAL (VALUES ('username', username_key), ('email', email_key)) AS n (kind, folded)
                   ON CONFLICT (hash) DO UPDATE SET reserved_until = excluded.reserved_until
               ), announced AS (
                   -- The user has no stream any more that could lack them.
                   DELETE FROM erased_conversations WHERE peer_id IN (SELECT id FROM gone) AND xact IS NOT NULL
               ), counted AS (
                   DELETE FROM new_conversations WHERE user_id IN (SELECT id FROM gone)
               ), begun AS (
                   INSERT INTO erasures (user_id, erase_messages) SELECT id, $3 FROM gone
               )
               SELECT count(*) AS "deleted!" FROM gone"#,
            user,
            verified_hash,
            erase_messages,
            RESERVED.as_secs_f64(),
        );
        let deleted = self.database.run(Operation::DeleteUser, query.fetch_one(&mut *connection)).await?;
        Ok(deleted > 0)
    }
}
