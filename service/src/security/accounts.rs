//! What an operator does to a user: disables or enables it, sets its password, ends its sessions.
//!
//! A login locks the user for as long as it takes to begin a session. Each change here locks it too, and ends the sessions in
//! the same transaction. So a login at the same time either was first, and its session ends, or it sees the change.

use sqlx::Connection as _;
use uuid::Uuid;

use super::sessions::{Ending, Sessions, end};
use crate::store::operation::Operation;

#[derive(Clone, Copy, Debug)]
pub(crate) enum Change<'a> {
    Disable,
    Enable,
    /// Its hash.
    Password(&'a str),
    /// Ends the sessions, and nothing else.
    Revoke,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Changed {
    /// Before the change.
    pub(crate) was_disabled: bool,
    /// How many sessions have ended.
    pub(crate) ended: u64,
}

impl Sessions {
    /// Changes a user, and says what was changed; `None` if there is no such user. Statements that began before may still store
    /// messages of the user: [`Sessions::settle`] waits for them.
    pub(crate) async fn change(
        &self,
        user: Uuid,
        change: Change<'_>,
    ) -> Result<Option<Changed>, sqlx::Error> {
        let mut connection = self.database().acquire().await?;
        let work = async {
            let mut transaction = connection.begin().await?;
            let query = sqlx::query_scalar!(
                r#"SELECT disabled_at IS NOT NULL AS "was_disabled!" FROM users WHERE id = $1 FOR NO KEY UPDATE"#,
                user,
            );
            let Some(was_disabled) = query.fetch_optional(&mut *transaction).await? else { return Ok(None) };
            let query = match change {
                Change::Disable if !was_disabled => {
                    Some(sqlx::query!("UPDATE users SET disabled_at = clock_timestamp() WHERE id = $1", user))
                }
                Change::Enable if was_disabled => {
                    Some(sqlx::query!("UPDATE users SET disabled_at = NULL WHERE id = $1", user))
                }
                Change::Password(hash) => {
                    Some(sqlx::query!("UPDATE users SET password_hash = $2 WHERE id = $1", user, hash))
                }
                _ => None,
            };
            if let Some(query) = query {
                query.execute(&mut *transaction).await?;
            }
            // Also those of a user who is disabled already: a replica of a release that does not know of it may have begun some.
            let ended = match change {
                Change::Enable => 0,
                _ => end(&mut transaction, user, Ending::All).await?,
            };
            transaction.commit().await?;
            Ok(Some(Changed { was_disabled, ended }))
        };
        self.database().run(Operation::ChangeUser, work).await
    }
}
