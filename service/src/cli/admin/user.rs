//! `chat-service admin user`.

use std::io::{Read as _, Write as _};
use std::sync::Arc;

use anyhow::{Context as _, Result, bail};
use clap::Subcommand;
use rand::distr::{Alphanumeric, SampleString as _};
use serde_json::{Value, json};
use time::OffsetDateTime;
use uuid::Uuid;

use super::context::{Answer, Context, Done, Options, failed, time_text};
use crate::chat::export::{ExportError, Exports, Place};
use crate::chat::permission::Permission;
use crate::config::Config;
use crate::security::accounts::{Change, Changed};
use crate::security::deletion::Deletion;
use crate::security::passwords::{PASSWORD_LENGTH, Passwords, password_length};
use crate::security::sessions::Sessions;
use crate::store::health::Health;
use crate::store::operation::Operation;
use crate::store::postgres;
use crate::store::redis::Redis;

/// The length of an id; usernames are shorter.
const ID_CHARS: usize = 36;

/// 142 bits.
const RANDOM_CHARS: usize = 24;

/// More than any password has, in any form.
const STDIN_MAX_BYTES: u64 = 16 * 1024;

/// Messages that `show` reads at most to count the user's: a second or two.
const COUNTED_MAX: i64 = 100_000;

#[derive(clap::Args, Debug)]
pub(super) struct Target {
    /// An id, or a username in any case
    user: String,
}

#[derive(Subcommand, Debug)]
pub(super) enum Command {
    /// Show the account, its sessions, and how much it has written
    ///
    /// Of the messages in the user's conversations 100000 are looked at; `messages_sent` is exact where those are all, as
    /// `messages_sent_is_exact` says.
    Show(Target),
    /// Print everything that the service has of the user, as `GET /me/export` does
    ///
    /// Lines of JSON on stdout, also without --json. Each has a `cursor`: --after goes on behind the last whole line of an export that
    /// was interrupted. One export of a user runs at a time.
    Export {
        #[command(flatten)]
        target: Target,
        /// Go on behind the line with this cursor
        #[arg(long, value_name = "CURSOR")]
        after: Option<String>,
    },
    /// Delete the account, as `DELETE /me` does
    ///
    /// From now on every token of the user is 401, and its name and address are taken for 30 days. A replica of the service erases its
    /// messages in the background; `chat_erasures_pending` is 0 when that is done. It cannot be undone.
    Delete {
        #[command(flatten)]
        target: Target,
        /// Leave its messages as they are
        #[arg(long)]
        keep_messages: bool,
    },
    /// Keep the user from logging in, and end all its sessions
    ///
    /// A login, a refresh and every token of the user are 401 from now on, on every replica, as for a wrong password; its streams
    /// end. Others still find it, read its messages, and may write to it.
    Disable(Target),
    /// Let a disabled user log in again
    ///
    /// Sessions from before stay ended.
    Enable(Target),
    /// Set a new password, and end all sessions
    ///
    /// The random password is printed once; only its hash is stored. A user who is disabled stays so.
    ResetPassword {
        #[command(flatten)]
        target: Target,
        /// Read the new password from stdin instead: 8 to 128 characters, without the line break at its end
        #[arg(long)]
        password_stdin: bool,
    },
    /// End all sessions: every token of the user is 401 from now on
    Revoke(Target),
}

impl Command {
    pub(super) fn name(&self) -> &'static str {
        match self {
            Self::Show(_) => "user show",
            Self::Export { .. } => "user export",
            Self::Delete { .. } => "user delete",
            Self::Disable(_) => "user disable",
            Self::Enable(_) => "user enable",
            Self::ResetPassword { .. } => "user reset-password",
            Self::Revoke(_) => "user revoke",
        }
    }

    fn user(&self) -> &str {
        match self {
            Self::Show(target)
            | Self::Disable(target)
            | Self::Enable(target)
            | Self::Export { target, .. }
            | Self::Delete { target, .. }
            | Self::ResetPassword { target, .. }
            | Self::Revoke(target) => &target.user,
        }
    }
}

pub(super) async fn run(config: &Config, options: &Options, command: &Command) -> Result<Answer> {
    // First, so that nothing waits while it is typed.
    let password = match command {
        Command::ResetPassword { password_stdin: true, .. } => match password_from_stdin() {
            Ok(password) => password,
            Err(fault) => return Ok(Answer::Invalid(fault)),
        },
        _ => Alphanumeric.sample_string(&mut rand::rng(), RANDOM_CHARS),
    };
    let context = Context::open(config, None, !matches!(command, Command::Show(_))).await?;
    let answer = answer(&context, options, command, password).await;
    context.close().await;
    answer
}

async fn answer(context: &Context, options: &Options, command: &Command, password: String) -> Result<Answer> {
    let Some(user) = find(context, command.user()).await.map_err(|error| failed(&error))? else {
        return Ok(Answer::NoSuchUser);
    };
    match command {
        Command::Show(_) => show(context, user).await,
        Command::Export { after, .. } => export(context, options, &user, after.as_deref()).await,
        Command::Delete { keep_messages, .. } => delete(context, options, &user, !keep_messages).await,
        Command::Disable(_) => change(context, options, &user, Change::Disable).await,
        Command::Enable(_) => change(context, options, &user, Change::Enable).await,
        Command::Revoke(_) => change(context, options, &user, Change::Revoke).await,
        Command::ResetPassword { .. } if options.dry_run => {
            change(context, options, &user, Change::Password("")).await
        }
        Command::ResetPassword { password_stdin, .. } => {
            let hash = Passwords::start(Arc::clone(&context.metrics))?.hash(password.clone()).await?;
            let mut answer = change(context, options, &user, Change::Password(&hash)).await?;
            if let (false, Answer::Done(done)) = (password_stdin, &mut answer) {
                done.text = format!("{}\nThe new password, which is shown only now: {password}", done.text);
                done.json["password"] = password.into();
            }
            Ok(answer)
        }
    }
}

/// Why a password is refused is said without it.
fn password_from_stdin() -> Result<String, String> {
    let mut text = String::new();
    let read = std::io::stdin().take(STDIN_MAX_BYTES).read_to_string(&mut text);
    read.map_err(|error| format!("the password on stdin cannot be read: {error}"))?;
    let password = text.strip_suffix('\n').map_or(&*text, |line| line.strip_suffix('\r').unwrap_or(line));
    let length = password_length(password);
    if PASSWORD_LENGTH.contains(&length) {
        Ok(password.to_owned())
    } else {
        Err(format!("the password on stdin has {length} characters: use 8 to 128"))
    }
}

/// What `users` has of a user, and its sessions.
struct User {
    id: Uuid,
    username: String,
    email: String,
    created_at: OffsetDateTime,
    disabled_at: Option<OffsetDateTime>,
    sessions: i64,
    last_used_at: Option<OffsetDateTime>,
}

async fn find(context: &Context, text: &str) -> Result<Option<User>, sqlx::Error> {
    let id = Uuid::parse_str(text).ok().filter(|_| text.len() == ID_CHARS);
    let mut connection = context.database.acquire().await?;
    let query = sqlx::query_as!(
        User,
        r#"SELECT id, username, email, created_at, disabled_at,
                  (SELECT count(*) FROM sessions WHERE user_id = users.id) AS "sessions!",
                  (SELECT max(last_used_at) FROM sessions WHERE user_id = users.id) AS last_used_at
           FROM users WHERE id = $1 OR username_key = $2"#,
        id,
        text.to_ascii_lowercase(),
    );
    context.database.run(Operation::FindUser, query.fetch_optional(&mut *connection)).await
}

async fn show(context: &Context, user: User) -> Result<Answer> {
    let Written { conversations, sent, looked_at } =
        written(context, user.id).await.map_err(|error| failed(&error))?;
    let exact = looked_at < COUNTED_MAX;
    let text = |at: Option<OffsetDateTime>| at.map(time_text);
    let shown = |at| text(at).unwrap_or_else(|| "never".to_owned());
    let lines = [
        ("id", user.id.to_string()),
        ("username", user.username.clone()),
        ("email", user.email.clone()),
        ("created", shown(Some(user.created_at))),
        ("disabled", shown(user.disabled_at)),
        ("sessions", format!("{}, last used: {}", user.sessions, shown(user.last_used_at))),
        ("conversations", conversations.to_string()),
        ("messages sent", format!("{}{sent}", if exact { "" } else { "at least " })),
    ];
    let json = json!({
        "id": user.id,
        "username": user.username,
        "email": user.email,
        "created_at": text(Some(user.created_at)),
        "disabled_at": text(user.disabled_at),
        "sessions": user.sessions,
        "last_used_at": text(user.last_used_at),
        "conversations": conversations,
        "messages_sent": sent,
        "messages_sent_is_exact": exact,
    });
    let lines = lines.map(|(name, value)| format!("{name:<13}  {value}"));
    Ok(Answer::Done(Done {
        outcome: "shown",
        user: Some(user.id),
        json,
        text: lines.join("\n"),
        fault: None,
    }))
}

struct Written {
    conversations: i64,
    sent: i64,
    looked_at: i64,
}

/// Each conversation's messages are read by their primary key: no index has a sender's.
async fn written(context: &Context, user: Uuid) -> Result<Written, sqlx::Error> {
    let mut connection = context.database.acquire().await?;
    let query = sqlx::query_as!(
        Written,
        r#"WITH own AS MATERIALIZED (
               SELECT id FROM conversations WHERE low_user = $1
               UNION ALL
               SELECT id FROM conversations WHERE high_user = $1
           ), looked_at AS (
               SELECT m.sender_id FROM own CROSS JOIN LATERAL (
                   SELECT sender_id FROM messages WHERE conversation_id = own.id LIMIT $2
               ) m LIMIT $2
           )
           SELECT (SELECT count(*) FROM own) AS "conversations!",
                  count(*) FILTER (WHERE sender_id = $1) AS "sent!",
                  count(*) AS "looked_at!"
           FROM looked_at"#,
        user,
        COUNTED_MAX,
    );
    context.database.run(Operation::FindUser, query.fetch_one(&mut *connection)).await
}

/// Prints the lines as they come.
async fn export(context: &Context, options: &Options, user: &User, after: Option<&str>) -> Result<Answer> {
    let after = match after.map(|text| Place::decode(text, user.id).ok_or(text)) {
        Some(Err(text)) => {
            return Ok(Answer::Invalid(format!(
                "--after '{text}' is no cursor of the user's export: take the one of its last whole line"
            )));
        }
        after => after.and_then(Result::ok),
    };
    let mut done = Done {
        outcome: "exported",
        user: Some(user.id),
        json: Value::Null,
        text: String::new(),
        fault: None,
    };
    if options.dry_run {
        done.text = format!("dry run, nothing was exported: {} ({})", user.username, user.id);
        done.json = json!({"user_id": user.id, "outcome": done.outcome, "dry_run": true});
        return Ok(Answer::Done(done));
    }
    let Context { config, database, metrics } = context;
    // Nothing connects to it.
    let redis = Redis::new(config, Vec::new(), Vec::new(), Arc::clone(metrics))?;
    let health = Health::new();
    let permission = Permission::new(config, redis, database.clone(), Arc::clone(&health));
    let exports = Exports::new(database.clone(), health, permission, Arc::clone(metrics));
    // No session of the user: it has not ended.
    let mut lines = match exports.start(user.id, Uuid::new_v4(), after).await {
        Ok(lines) => lines,
        Err(ExportError::UserGone) => return Ok(Answer::NoSuchUser),
        Err(ExportError::Database(error)) => return Err(failed(&error)),
        Err(ExportError::Running { retry_after }) => {
            bail!("another export of this user runs: repeat the command in {} s", retry_after.as_secs())
        }
        Err(error @ ExportError::TooMany) => return Err(error.into()),
    };
    let mut stdout = std::io::stdout();
    while let Some(chunk) = lines.recv().await {
        let chunk =
            chunk.context("the export is not whole: go on with --after and the cursor of its last line")?;
        stdout.write_all(&chunk)?;
    }
    stdout.flush()?;
    Ok(Answer::Done(done))
}

async fn delete(context: &Context, options: &Options, user: &User, erase_messages: bool) -> Result<Answer> {
    let mut fault = None;
    if !options.dry_run {
        let deletion = Deletion::new(&context.config, context.database.clone());
        if !deletion.remove(user.id, None, erase_messages).await.map_err(|error| failed(&error))? {
            return Ok(Answer::NoSuchUser);
        }
        let sessions = Sessions::new(&context.config, context.database.clone());
        fault = sessions.settle().await.err().map(|error| {
            let reason = postgres::reason(&error);
            format!("it is done, but statements that began before still run, and may store messages of the user ({reason})")
        });
    }
    let left = if erase_messages { "its messages will be erased" } else { "its messages stay" };
    let dry_run = if options.dry_run { "dry run, nothing was changed: " } else { "" };
    Ok(Answer::Done(Done {
        outcome: "deleted",
        user: Some(user.id),
        json: json!({
            "user_id": user.id,
            "outcome": "deleted",
            "erase_messages": erase_messages,
            "dry_run": options.dry_run,
        }),
        text: format!("{dry_run}{} ({}): deleted, {left}", user.username, user.id),
        fault,
    }))
}

/// Makes the change, or says what it would do.
async fn change(context: &Context, options: &Options, user: &User, change: Change<'_>) -> Result<Answer> {
    let sessions = Sessions::new(&context.config, context.database.clone());
    let changed = if options.dry_run {
        let ended = if matches!(change, Change::Enable) { 0 } else { user.sessions.unsigned_abs() };
        Some(Changed { was_disabled: user.disabled_at.is_some(), ended })
    } else {
        sessions.change(user.id, change).await.map_err(|error| failed(&error))?
    };
    let Some(Changed { was_disabled, ended }) = changed else { return Ok(Answer::NoSuchUser) };
    let fault = match options.dry_run {
        true => None,
        false => sessions.settle().await.err().map(|error| {
            format!(
                "it is done, but statements that began before still run, and may store messages of the user: repeat the \
                 command to wait for them ({})",
                postgres::reason(&error)
            )
        }),
    };
    let outcome = match (change, was_disabled) {
        (Change::Disable, false) => "disabled",
        (Change::Disable, true) => "already_disabled",
        (Change::Enable, true) => "enabled",
        (Change::Enable, false) => "already_enabled",
        (Change::Password(_), _) => "password_reset",
        (Change::Revoke, _) => "revoked",
    };
    let json = json!({
        "user_id": user.id,
        "outcome": outcome,
        "sessions_ended": ended,
        "dry_run": options.dry_run,
    });
    let dry_run = if options.dry_run { "dry run, nothing was changed: " } else { "" };
    let text = format!(
        "{dry_run}{} ({}): {}, sessions ended: {ended}",
        user.username,
        user.id,
        outcome.replace('_', " ")
    );
    Ok(Answer::Done(Done { outcome, user: Some(user.id), json, text, fault }))
}
