//! The right to export a user's data: one export at a time, whatever the replica.

use std::time::Duration;

use tokio::time::Instant;
use uuid::Uuid;

use crate::store::operation::Operation;
use crate::store::postgres::{Database, violated_constraint};

/// How long the lease of a process that was killed stays. Longer than an export goes without extending it: that is
/// [`EXTENDED_AFTER`], a wait for the client and one for Postgres.
const LEASE: Duration = Duration::from_secs(60);
const EXTENDED_AFTER: Duration = Duration::from_secs(10);

#[derive(Debug)]
pub(super) struct Lease {
    user: Uuid,
    holder: Uuid,
    extended: Instant,
}

pub(super) enum Taken {
    Ours(Lease),
    /// Another export has it, for so long at least.
    Other {
        left: Duration,
    },
    /// Or the session has ended.
    UserGone,
}

impl Lease {
    pub(super) async fn take(database: &Database, user: Uuid, session: Uuid) -> Result<Taken, sqlx::Error> {
        let lease = Self { user, holder: Uuid::new_v4(), extended: Instant::now() };
        let mut connection = database.acquire().await?;
        let query = sqlx::query!(
            r#"WITH caller AS (
                   SELECT id FROM users
                   WHERE id = $1 AND NOT EXISTS (SELECT FROM ended_sessions WHERE session_id = $2)
               ), taken AS (
                   INSERT INTO exports AS held (user_id, holder, expires_at)
                   SELECT id, $3, clock_timestamp() + make_interval(secs => $4) FROM caller
                   ON CONFLICT (user_id) DO UPDATE SET holder = excluded.holder, expires_at = excluded.expires_at
                   WHERE held.expires_at < clock_timestamp()
                   RETURNING user_id
               )
               SELECT EXISTS (SELECT FROM caller) AS "caller_exists!", EXISTS (SELECT FROM taken) AS "taken!",
                      (SELECT extract(epoch FROM expires_at - clock_timestamp())::float8 FROM exports
                       WHERE user_id = $1) AS "left?""#,
            user,
            session,
            lease.holder,
            LEASE.as_secs_f64(),
        );
        match database.run(Operation::BeginExport, query.fetch_one(&mut *connection)).await {
            Ok(row) if row.taken => Ok(Taken::Ours(lease)),
            Ok(row) if row.caller_exists => {
                let left = row.left.unwrap_or_default().clamp(1.0, LEASE.as_secs_f64());
                Ok(Taken::Other { left: Duration::from_secs_f64(left.ceil()) })
            }
            Ok(_) => Ok(Taken::UserGone),
            // Deleted at this moment.
            Err(error) if violated_constraint(&error) == Some("exports_user_id_fkey") => Ok(Taken::UserGone),
            Err(error) => Err(error),
        }
    }

    /// Extends it once in a while. False if another has it now, or the user is gone.
    pub(super) async fn extend(&mut self, database: &Database) -> Result<bool, sqlx::Error> {
        if self.extended.elapsed() < EXTENDED_AFTER {
            return Ok(true);
        }
        let started = Instant::now();
        let mut connection = database.acquire().await?;
        let query = sqlx::query!(
            "UPDATE exports SET expires_at = clock_timestamp() + make_interval(secs => $3)
             WHERE user_id = $1 AND holder = $2",
            self.user,
            self.holder,
            LEASE.as_secs_f64(),
        );
        let extended = database.run(Operation::ExtendExport, query.execute(&mut *connection)).await?;
        self.extended = started;
        Ok(extended.rows_affected() > 0)
    }

    pub(super) async fn release(&self, database: &Database) -> Result<(), sqlx::Error> {
        let mut connection = database.acquire().await?;
        let query =
            sqlx::query!("DELETE FROM exports WHERE user_id = $1 AND holder = $2", self.user, self.holder);
        database.run(Operation::EndExport, query.execute(&mut *connection)).await.map(|_| ())
    }
}
