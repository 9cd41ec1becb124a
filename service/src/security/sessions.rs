//! Sessions: what a login begins and a logout ends.
//!
//! An access token carries its session. Statements that serve a request read whether the session has ended in the table
//! `ended_sessions`, which keeps it for as long as one of its tokens may live. What needs no statement learns of it from
//! `chat/permission.rs`.

use std::time::Duration;

use secrecy::SecretString;
use sqlx::{Connection as _, PgConnection};
use time::OffsetDateTime;
use uuid::Uuid;

use super::refresh::{RefreshToken, Succession};
use crate::config::Config;
use crate::store::barrier;
use crate::store::operation::Operation;
use crate::store::postgres::Database;

/// For how long the refresh token before the current one answers as it did: the client may have lost the answer.
const GRACE: Duration = Duration::from_secs(10);

/// A session keeps no more of what its client sent.
const AGENT_MAX_CHARS: usize = 256;

/// Nobody has more devices. A list of that many takes half a megabyte at most.
const LISTED_MAX: i64 = 1000;

pub struct Sessions {
    database: Database,
    succession: Succession,
    /// How long a refresh token is good for.
    lifetime: Duration,
    /// For how long a statement in flight is waited for.
    writers_limit: Duration,
}

/// What a client gets for a login or a refresh token.
#[derive(Debug)]
pub struct Grant {
    pub user: Uuid,
    pub session: Uuid,
    pub refresh_token: SecretString,
    /// Seconds since 1970, for the access token.
    pub issued_at: u64,
}

/// The client that logs in, as it was given.
#[derive(Debug)]
pub struct Client {
    pub address: Option<String>,
    pub agent: Option<String>,
}

#[derive(Debug)]
pub struct Session {
    pub id: Uuid,
    pub created_at: OffsetDateTime,
    pub last_used_at: OffsetDateTime,
    pub client_address: Option<String>,
    pub user_agent: Option<String>,
}

/// Which of a user's sessions end.
#[derive(Clone, Copy, Debug)]
pub enum Ending {
    /// The caller's own.
    Own(Uuid),
    /// One of the list.
    Listed(Uuid),
    All,
    AllBut(Uuid),
}

impl Sessions {
    pub(crate) fn new(config: &Config, database: Database) -> Self {
        Self {
            database,
            succession: Succession::new(config),
            lifetime: config.refresh_token_lifetime(),
            writers_limit: config.statement_timeout(),
        }
    }

    pub(super) fn database(&self) -> &Database {
        &self.database
    }

    /// How long a refresh token is good for.
    pub fn lifetime(&self) -> Duration {
        self.lifetime
    }

    /// Begins a session, unless the password that was verified is no longer the user's, or the user may not log in.
    pub async fn begin(
        &self,
        user: Uuid,
        verified_hash: &str,
        client: Client,
    ) -> Result<Option<Grant>, sqlx::Error> {
        let token = RefreshToken::random();
        let agent = client.agent.map(|agent| agent.chars().take(AGENT_MAX_CHARS).collect::<String>());
        let session = Uuid::new_v4();
        let mut connection = self.database.acquire().await?;
        // The lock is for a change of the password at the same time, or of the user by an operator: it ends all sessions, also
        // this one.
        let query = sqlx::query_scalar!(
            r#"INSERT INTO sessions (id, user_id, family, current_hash, client_address, user_agent)
               SELECT $1, id, $3, $4, $5, $6 FROM users
               WHERE id = $2 AND password_hash = $7 AND disabled_at IS NULL FOR SHARE
               RETURNING created_at"#,
            session,
            user,
            token.family,
            token.hash(),
            client.address,
            agent,
            verified_hash,
        );
        let begun =
            self.database.run(Operation::BeginSession, query.fetch_optional(&mut *connection)).await?;
        Ok(begun.map(|at| grant(user, session, &token, at)))
    }

    /// Exchanges a refresh token for the next one. One that was used before ends its session, except within [`GRACE`].
    pub async fn refresh(&self, text: &str) -> Result<Option<Grant>, sqlx::Error> {
        let Some(token) = RefreshToken::parse(text) else { return Ok(None) };
        let hash = token.hash();
        // Another request may exchange the same token at the same time.
        for _ in 0..2 {
            let Some(found) = self.find(token.family).await? else { return Ok(None) };
            if found.current_hash == hash {
                if let Some(grant) = self.rotate(&found, &token).await? {
                    return Ok(Some(grant));
                }
                continue;
            }
            let repeated = found.previous_hash.as_ref() == Some(&hash) && found.is_recent;
            if let (true, Some(salt)) = (repeated, &found.salt) {
                let same = self.succession.successors(&token, salt);
                let same = same.into_iter().find(|successor| successor.hash() == found.current_hash);
                return Ok(same.map(|token| grant(found.user_id, found.id, &token, found.last_used_at)));
            }
            // Someone else has the token, or had it.
            self.end(found.user_id, Ending::Listed(found.id)).await?;
            return Ok(None);
        }
        Ok(None)
    }

    async fn find(&self, family: Uuid) -> Result<Option<Found>, sqlx::Error> {
        let mut connection = self.database.acquire().await?;
        let query = sqlx::query_as!(
            Found,
            r#"SELECT id, user_id, current_hash, previous_hash, salt, last_used_at,
                      last_used_at > clock_timestamp() - make_interval(secs => $2) AS "is_recent!"
               FROM sessions
               WHERE family = $1 AND last_used_at > clock_timestamp() - make_interval(secs => $3)
                     AND EXISTS (SELECT FROM users WHERE users.id = user_id AND disabled_at IS NULL)"#,
            family,
            GRACE.as_secs_f64(),
            self.lifetime.as_secs_f64(),
        );
        self.database.run(Operation::FindSession, query.fetch_optional(&mut *connection)).await
    }

    /// `None` if another request was first, or the user was disabled.
    async fn rotate(&self, found: &Found, token: &RefreshToken) -> Result<Option<Grant>, sqlx::Error> {
        let salt = Succession::random_salt();
        let Some(next) = self.succession.successors(token, &salt).next() else { return Ok(None) };
        let mut connection = self.database.acquire().await?;
        let query = sqlx::query_scalar!(
            "UPDATE sessions
             SET previous_hash = current_hash, current_hash = $3, salt = $4, last_used_at = clock_timestamp()
             WHERE id = $1 AND current_hash = $2
                   AND EXISTS (SELECT FROM users WHERE users.id = user_id AND disabled_at IS NULL)
             RETURNING last_used_at",
            found.id,
            found.current_hash,
            next.hash(),
            &salt,
        );
        let rotated =
            self.database.run(Operation::RotateRefreshToken, query.fetch_optional(&mut *connection)).await?;
        Ok(rotated.map(|at| grant(found.user_id, found.id, &next, at)))
    }

    /// False if the session has ended, or its user is gone.
    pub async fn is_valid(&self, user: Uuid, session: Uuid) -> Result<bool, sqlx::Error> {
        let mut connection = self.database.acquire().await?;
        let query = sqlx::query_scalar!(
            r#"SELECT EXISTS (SELECT FROM users WHERE id = $1)
                      AND NOT EXISTS (SELECT FROM ended_sessions WHERE session_id = $2) AS "is_valid!""#,
            user,
            session,
        );
        self.database.run(Operation::FindSession, query.fetch_one(&mut *connection)).await
    }

    /// Ends sessions of the user. After it no statement stores a message of theirs. Returns how many have ended.
    pub async fn end(&self, user: Uuid, which: Ending) -> Result<u64, sqlx::Error> {
        let mut connection = self.database.acquire().await?;
        let ended = self.database.run(Operation::EndSessions, end(&mut connection, user, which)).await?;
        drop(connection);
        self.settle().await?;
        Ok(ended)
    }

    /// Changes the password and ends all other sessions. False if the old hash is no longer the user's, or
    /// the user was disabled.
    pub async fn change_password(
        &self,
        user: Uuid,
        [old_hash, new_hash]: [&str; 2],
        kept: Uuid,
    ) -> Result<bool, sqlx::Error> {
        let mut connection = self.database.acquire().await?;
        let work = async {
            let mut transaction = connection.begin().await?;
            // First, so that a login with the old password either is over, or fails.
            let query = sqlx::query!(
                "UPDATE users SET password_hash = $3
                 WHERE id = $1 AND password_hash = $2 AND disabled_at IS NULL",
                user,
                old_hash,
                new_hash,
            );
            if query.execute(&mut *transaction).await?.rows_affected() == 0 {
                return Ok(false);
            }
            end(&mut transaction, user, Ending::AllBut(kept)).await?;
            transaction.commit().await.map(|()| true)
        };
        let changed = self.database.run(Operation::ChangePassword, work).await?;
        drop(connection);
        self.settle().await?;
        Ok(changed)
    }

    /// Waits for the statements that began before what was just committed.
    pub(crate) async fn settle(&self) -> Result<(), sqlx::Error> {
        barrier::writers_before_now_have_ended(&self.database, self.writers_limit).await
    }

    /// The user's sessions, newest first, [`LISTED_MAX`] at most.
    pub async fn list(&self, user: Uuid) -> Result<Vec<Session>, sqlx::Error> {
        let mut connection = self.database.acquire().await?;
        let query = sqlx::query_as!(
            Session,
            "SELECT id, created_at, last_used_at, client_address, user_agent FROM sessions
             WHERE user_id = $1 AND last_used_at > clock_timestamp() - make_interval(secs => $2)
             ORDER BY created_at DESC, id LIMIT $3",
            user,
            self.lifetime.as_secs_f64(),
            LISTED_MAX,
        );
        self.database.run(Operation::ListSessions, query.fetch_all(&mut *connection)).await
    }
}

/// A session that a refresh token belongs to.
struct Found {
    id: Uuid,
    user_id: Uuid,
    current_hash: Vec<u8>,
    previous_hash: Option<Vec<u8>>,
    salt: Option<Vec<u8>>,
    last_used_at: OffsetDateTime,
    is_recent: bool,
}

fn grant(user: Uuid, session: Uuid, token: &RefreshToken, at: OffsetDateTime) -> Grant {
    let issued_at = u64::try_from(at.unix_timestamp()).unwrap_or_default();
    Grant { user, session, refresh_token: token.text().into(), issued_at }
}

/// Ends sessions, and returns how many. A token without one has its user's id as session.
pub(super) async fn end(
    connection: &mut PgConnection,
    user: Uuid,
    which: Ending,
) -> Result<u64, sqlx::Error> {
    let (only, but, noted) = match which {
        Ending::Own(session) => (Some(session), None, Some(session)),
        Ending::Listed(session) => (Some(session), None, None),
        Ending::All => (None, None, Some(user)),
        Ending::AllBut(session) => (None, Some(session), Some(user).filter(|user| *user != session)),
    };
    let query = sqlx::query_scalar!(
        r#"WITH gone AS (
               DELETE FROM sessions
               WHERE user_id = $1 AND ($2::uuid IS NULL OR id = $2) AND ($3::uuid IS NULL OR id <> $3)
               RETURNING id
           ), noted AS (
               INSERT INTO ended_sessions (session_id)
               SELECT id FROM gone UNION SELECT $4::uuid WHERE $4::uuid IS NOT NULL
           )
           SELECT count(*) AS "count!" FROM gone"#,
        user,
        only,
        but,
        noted,
    );
    Ok(query.fetch_one(connection).await?.unsigned_abs())
}

impl std::fmt::Debug for Sessions {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Sessions").field("lifetime", &self.lifetime).finish_non_exhaustive()
    }
}
