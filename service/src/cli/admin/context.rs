//! What every command has: its options, Postgres, and how it answers.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Result, anyhow, bail};
use serde_json::Value;
use time::OffsetDateTime;
use uuid::Uuid;

use crate::config::Config;
use crate::store::migrations::{self, Answer as SchemaAnswer, Schema};
use crate::store::operation::Operation;
use crate::store::pooler;
use crate::store::postgres::{self, Database, connect_fix, installation_fix};
use crate::telemetry::metrics::{Known, Metrics};
use crate::timestamp;

/// One for the statements, one for a look at others' beside them.
const POOL_MAX: u32 = 2;

/// Longer is no reason, but a document.
const REASON_MAX_CHARS: usize = 200;

#[derive(clap::Args, Debug)]
pub(super) struct Options {
    /// Say what would be done, and change nothing
    #[arg(long, global = true)]
    pub(super) dry_run: bool,
    /// Print the answer as one JSON document
    #[arg(long, global = true)]
    pub(super) json: bool,
    /// Why, for the log; without names and addresses
    #[arg(long, global = true, value_name = "TEXT", value_parser = reason)]
    pub(super) reason: Option<String>,
}

fn reason(text: &str) -> Result<String, String> {
    match text.chars().count() {
        1..=REASON_MAX_CHARS => Ok(text.to_owned()),
        count => {
            Err(format!("it has {count} characters: use 1 to {REASON_MAX_CHARS}, such as 'ticket 4711'"))
        }
    }
}

/// How a command ended that did not fail.
#[derive(Debug)]
pub(super) enum Answer {
    Done(Done),
    /// The input is wrong, and nothing was done.
    Invalid(String),
    NoSuchUser,
}

/// What a command found or did, or would do.
#[derive(Debug)]
pub(super) struct Done {
    /// One word, for the log.
    pub(super) outcome: &'static str,
    pub(super) user: Option<Uuid>,
    pub(super) json: Value,
    /// Empty if it is on stdout already.
    pub(super) text: String,
    /// What is left to be done, and how.
    pub(super) fault: Option<String>,
}

/// A time in an answer: as in the API's.
pub(super) fn time_text(at: OffsetDateTime) -> String {
    let text = timestamp::serialize(&at, serde_json::value::Serializer).ok();
    text.as_ref().and_then(|text| text.as_str()).unwrap_or_default().to_owned()
}

/// Postgres, with the schema of this binary.
#[derive(Debug)]
pub(super) struct Context {
    pub(super) config: Config,
    pub(super) database: Database,
    pub(super) metrics: Arc<Metrics>,
}

impl Context {
    /// For statements of at most `limit`, by default `DB_STATEMENT_TIMEOUT_MS`. Nothing is migrated. A Postgres that only reads
    /// is refused where something is to be changed.
    pub(super) async fn open(config: &Config, limit: Option<Duration>, changes: bool) -> Result<Self> {
        let mut config = config.clone();
        config.db_pool_max = POOL_MAX;
        if let Some(limit) = limit {
            config.db_statement_timeout_ms = u32::try_from(limit.as_millis())?;
        }
        let known = Known { operations: Operation::names().collect(), ..Known::default() };
        let metrics = Metrics::new(known)?;
        let options = config.connect_options()?;
        if let Err(error) = postgres::connect(&options).await {
            bail!("Postgres cannot be reached: {}: {}", postgres::reason(&error), connect_fix(&error));
        }
        let database = Database::new(&config, options, Arc::clone(&metrics));
        if let Err(fault) = pooler::check(&database).await {
            bail!(fault);
        }
        let SchemaAnswer { schema, fault, read_only } =
            migrations::schema(&database).await.map_err(|error| failed(&error))?;
        match (migrations::version_fault(schema.version()), fault) {
            (_, Some(fault)) if !matches!(schema, Schema::Behind { .. }) => bail!("{fault}"),
            (Some(fault), _) => bail!("the schema is at {fault}"),
            (None, Some(fault)) => bail!("{fault}"),
            (None, None) => {}
        }
        if let (true, Some(why)) = (changes, read_only) {
            bail!("Postgres only reads, {}, so nothing can be changed: {}", why.reason(), why.fix());
        }
        Ok(Self { config, database, metrics })
    }

    /// Closes the connections.
    pub(super) async fn close(self) {
        self.database.close().await;
    }
}

/// What failed, and what to do.
pub(super) fn failed(error: &sqlx::Error) -> anyhow::Error {
    let fix = match error {
        error if postgres::is_timeout(error) => {
            "repeat it when Postgres has less to do, or with a higher DB_STATEMENT_TIMEOUT_MS"
        }
        error => {
            installation_fix(error).unwrap_or("`chat-service doctor` may know more; then repeat the command")
        }
    };
    anyhow!("Postgres: {}: {fix}", postgres::reason(error))
}
