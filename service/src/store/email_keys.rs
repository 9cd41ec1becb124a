//! The keys of email addresses from releases that folded them in another way.

use sqlx::PgConnection;
use uuid::Uuid;

use super::postgres::violated_constraint;
use crate::text::email_key;

/// Users read at once.
const STEP_ROWS: i64 = 1000;

/// Gives every user the key that this release looks an address up by. Older releases stored the lower case, which is the
/// same in ASCII, so only the others are read. For that Postgres looks at each user.
///
/// It runs after the migrations, each time, and finds nothing to do when it is done. An old replica that still runs beside
/// this one may add such a user; the next run corrects it. Of users whose addresses are one now, one has the key, the
/// others keep their old ones, and no new user can register with that address.
pub(super) async fn fold(connection: &mut PgConnection) -> Result<(), sqlx::Error> {
    let mut last = Uuid::nil();
    loop {
        let users = sqlx::query!(
            "SELECT id, email, email_key FROM users
             WHERE id > $1 AND octet_length(email_key) > char_length(email_key) ORDER BY id LIMIT $2",
            last,
            STEP_ROWS,
        )
        .fetch_all(&mut *connection)
        .await?;
        let Some(end) = users.last() else { return Ok(()) };
        last = end.id;
        for user in users {
            let key = email_key(&user.email);
            if key == user.email_key {
                continue;
            }
            let update = sqlx::query!(
                "UPDATE users SET email_key = $2 WHERE id = $1 AND email_key = $3",
                user.id,
                key,
                user.email_key,
            );
            match update.execute(&mut *connection).await {
                Err(error) if violated_constraint(&error) == Some("users_email_taken") => {
                    tracing::warn!(id = %user.id, "the email address of this user is another user's too, in another spelling: both stay");
                }
                Err(error) => return Err(error),
                Ok(_) => {}
            }
        }
    }
}
