//! `chat-service admin conversations`.

use std::time::Duration;

use anyhow::Result;
use clap::Subcommand;
use serde_json::json;
use time::OffsetDateTime;
use uuid::Uuid;

use super::context::{Answer, Context, Done, failed, time_text};
use crate::config::Config;
use crate::store::operation::Operation;

/// No index has conversations by their length: it would change with each message. So all are read.
const LIMIT: Duration = Duration::from_secs(60);

#[derive(Subcommand, Debug)]
pub(super) enum Command {
    /// List the conversations with the most messages, by their last seq
    ///
    /// No index has them in this order, so this reads the whole table of conversations, one narrow row for each, within 60 s. It
    /// locks nothing. On a large installation run it when there is little to do.
    Largest {
        /// How many
        #[arg(long, default_value_t = 10, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1000))]
        limit: u16,
    },
}

impl Command {
    pub(super) fn name(&self) -> &'static str {
        match self {
            Self::Largest { .. } => "conversations largest",
        }
    }
}

pub(super) async fn run(config: &Config, command: &Command) -> Result<Answer> {
    let Command::Largest { limit } = command;
    let context = Context::open(config, Some(LIMIT), false).await?;
    let largest = largest(&context, *limit).await;
    context.close().await;
    let conversations = largest.map_err(|error| failed(&error))?;
    let lines = conversations.iter().map(|found| {
        let Conversation { id, low_user, high_user, last_seq, .. } = found;
        format!("{last_seq:>12}  {}  {id}  {low_user} {high_user}", time_text(found.last_at))
    });
    let head = format!("{:>12}  {:<27}  {:<36}  users", "last seq", "last message", "conversation");
    let text = [head].into_iter().chain(lines).collect::<Vec<_>>().join("\n");
    let json = conversations.iter().map(|found| {
        json!({
            "id": found.id,
            "user_ids": [found.low_user, found.high_user],
            "last_seq": found.last_seq,
            "last_at": time_text(found.last_at),
        })
    });
    let json = json!({"conversations": json.collect::<Vec<_>>()});
    Ok(Answer::Done(Done { outcome: "listed", user: None, json, text, fault: None }))
}

struct Conversation {
    id: Uuid,
    low_user: Uuid,
    high_user: Uuid,
    last_seq: i64,
    last_at: OffsetDateTime,
}

async fn largest(context: &Context, limit: u16) -> Result<Vec<Conversation>, sqlx::Error> {
    let mut connection = context.database.acquire().await?;
    let query = sqlx::query_as!(
        Conversation,
        "SELECT id, low_user, high_user, last_seq, last_at FROM conversations ORDER BY last_seq DESC, id LIMIT $1",
        i64::from(limit),
    );
    context.database.run(Operation::ListConversations, query.fetch_all(&mut *connection)).await
}
