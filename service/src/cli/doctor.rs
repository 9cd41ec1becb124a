//! `chat-service doctor`: checks what the service needs, for operators.

use std::process::ExitCode;
use std::sync::Arc;

use tokio::runtime::Handle;

use crate::config::Config;
use crate::store::migrations::{self, Schema};
use crate::store::operation::Operation;
use crate::store::pooler;
use crate::store::postgres::{self, Database, connect_fix};
use crate::store::redis::Redis;
use crate::telemetry::metrics::{Known, Metrics};

/// Checks the configuration, Postgres, the schema and Redis; every failure names its fix.
pub async fn run(config: &Config) -> anyhow::Result<ExitCode> {
    let mut healthy = true;
    let mut report = |name: &str, outcome: Result<String, String>| {
        healthy &= outcome.is_ok();
        match outcome {
            Ok(fact) => println!("ok    {name:<9} {fact}"),
            Err(fault) => println!("FAIL  {name:<9} {fault}"),
        }
    };
    report("config", Ok(format!("{:?}", config.app_env).to_lowercase()));
    report(
        "secret",
        if config.secret_key_is_weak() {
            Err("SECRET_KEY is the default or under 32 bytes: set it to the output of `openssl rand -base64 48`".into())
        } else {
            Ok("SECRET_KEY is long enough".into())
        },
    );
    let known = Known { operations: Operation::names().collect(), ..Known::default() };
    let metrics = Metrics::new(known)?;
    let options = config.connect_options()?;
    let server = format!("{}:{}", options.get_host(), options.get_port());
    match postgres::connect(&options).await {
        Err(error) => {
            report("postgres", Err(format!("{server}: {error}: {}", connect_fix(&error))));
            report("schema", Err("unknown without Postgres".into()));
        }
        Ok(_) => {
            let database = Database::new(postgres::pool(config, options), Arc::clone(&metrics));
            if let Err(fault) = pooler::check(&database).await {
                report("postgres", Err(format!("{server}: {fault}")));
                report("schema", Err("unknown without Postgres".into()));
            } else {
                report("postgres", Ok(format!("{server} answers")));
                report("schema", schema(&database).await);
                warn_without_limit(config, &database).await;
            }
        }
    }
    let redis = Redis::new(config, Vec::new(), vec![Handle::current()], metrics)?;
    report(
        "redis",
        redis.check().await.map(|()| "answers and takes writes".to_owned()).map_err(|fault| {
            format!("{}: {}; the service runs degraded without it", fault.reason, fault.fix)
        }),
    );
    Ok(if healthy { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Postgres may have another limit than the service asks for: behind a pooler it has the role's.
async fn warn_without_limit(config: &Config, database: &Database) {
    let (wanted, user) = (config.statement_timeout(), database.pool().connect_options());
    match pooler::statement_timeout(database).await {
        Ok(limit) if limit.is_zero() || limit > wanted => println!(
            "warn  limit     Postgres has statement_timeout = {} ms, not DB_STATEMENT_TIMEOUT_MS={}, as behind a pooler: run \
             `ALTER ROLE {} SET statement_timeout = {}`, and restart the pooler",
            limit.as_millis(),
            wanted.as_millis(),
            user.get_username(),
            wanted.as_millis(),
        ),
        _ => {}
    }
}

async fn schema(database: &Database) -> Result<String, String> {
    let known = migrations::known_version();
    match migrations::schema(database).await {
        Ok(Schema::Current { version }) if version > known => Err(format!(
            "version {version}, newer than this binary, which knows {known}: run the newer release"
        )),
        Ok(Schema::Current { version }) => Ok(format!("version {version}, current")),
        Ok(Schema::Behind { version }) => {
            Err(format!("version {version}, this binary needs {known}: run `chat-service migrate`"))
        }
        Err(error) => Err(format!("{error}: grant the user access to the table _sqlx_migrations")),
    }
}
