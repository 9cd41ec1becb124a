//! `chat-service admin messages`.

use std::time::Duration;

use anyhow::{Result, bail};
use clap::Subcommand;
use serde_json::json;
use time::OffsetDateTime;
use uuid::Uuid;

use super::context::{Answer, Context, Done, Options, failed, time_text};
use crate::chat::retention;
use crate::config::Config;
use crate::store::operation::Operation;
use crate::store::postgres::is_conflict;

/// For the count of a dry run: no index has messages by their time.
const COUNT_LIMIT: Duration = Duration::from_secs(60);

/// After a step: 5,000 messages a second at most.
const PAUSE: Duration = Duration::from_millis(50);

/// Steps in a row that may lose a deadlock.
const CONFLICTS_MAX: u32 = 20;

#[derive(Subcommand, Debug)]
pub(super) enum Command {
    /// Remove messages that are older than so many days, once
    ///
    /// It does once what MESSAGE_RETENTION_DAYS does all the time: `seq` goes on, pages end where history ends. No message goes that
    /// is younger than the oldest idempotency key. Small steps, at most 5000 messages a second; if it is interrupted, repeat it.
    /// Replicas notice within seconds. The dry run counts by reading all messages, within 60 s.
    Purge {
        /// The age in days
        #[arg(long, value_name = "DAYS", value_parser = clap::value_parser!(u32).range(1..=36_500))]
        older_than: u32,
    },
}

impl Command {
    pub(super) fn name(&self) -> &'static str {
        match self {
            Self::Purge { .. } => "messages purge",
        }
    }
}

pub(super) async fn run(config: &Config, options: &Options, command: &Command) -> Result<Answer> {
    let Command::Purge { older_than: days } = command;
    let older_than = OffsetDateTime::now_utc() - time::Duration::days((*days).into());
    let limit = options.dry_run.then_some(COUNT_LIMIT);
    let context = Context::open(config, limit, !options.dry_run).await?;
    let messages = if options.dry_run {
        count(&context, older_than).await.map_err(|error| failed(&error))
    } else {
        purge(&context, older_than).await
    };
    context.close().await;
    let messages = messages?;
    let outcome = if messages == 0 { "nothing_to_purge" } else { "purged" };
    let before = time_text(older_than);
    let dry_run = if options.dry_run { "dry run, nothing was changed: " } else { "" };
    let text = format!("{dry_run}messages of before {before}: {}, {messages}", outcome.replace('_', " "));
    let json =
        json!({"outcome": outcome, "messages": messages, "before": before, "dry_run": options.dry_run});
    Ok(Answer::Done(Done { outcome, user: None, json, text, fault: None }))
}

async fn count(context: &Context, older_than: OffsetDateTime) -> Result<u64, sqlx::Error> {
    let mut connection = context.database.acquire().await?;
    let query =
        sqlx::query_scalar!(r#"SELECT count(*) AS "count!" FROM messages WHERE created_at < $1"#, older_than);
    let found = context.database.run(Operation::FindOldMessages, query.fetch_one(&mut *connection)).await?;
    Ok(found.unsigned_abs())
}

async fn purge(context: &Context, older_than: OffsetDateTime) -> Result<u64> {
    let (mut removed, mut conflicts) = (0, 0);
    let mut next = Some(Uuid::nil());
    while let Some(from) = next {
        match retention::step(&context.database, None, older_than, from).await {
            Ok(step) => {
                removed += step.removed;
                (next, conflicts) = (step.next, 0);
            }
            Err(error) if is_conflict(&error) && conflicts < CONFLICTS_MAX => conflicts += 1,
            Err(error) => bail!("{removed} messages were purged, then {}", failed(&error)),
        }
        tokio::time::sleep(PAUSE).await;
    }
    Ok(removed)
}
