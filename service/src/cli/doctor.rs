//! `chat-service doctor`: checks what the service needs, for operators.

use std::process::ExitCode;
use std::sync::Arc;

use tokio::runtime::Handle;

use crate::config::Config;
use crate::store::migrations::{self, Answer, Fault, Schema};
use crate::store::operation::Operation;
use crate::store::pooler::{self, StatementTimeout};
use crate::store::postgres::{self, Database, ReadOnly, connect_fix};
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
            let (reason, fix) = (postgres::reason(&error), connect_fix(&error));
            report("postgres", Err(format!("{server}: {reason}: {fix}")));
            report("schema", Err("unknown without Postgres".into()));
        }
        Ok(mut connection) => {
            let database = Database::new(config, options, Arc::clone(&metrics));
            if let Err(fault) = pooler::check(&database).await {
                report("postgres", Err(format!("{server}: {fault}")));
                report("schema", Err("unknown without Postgres".into()));
            } else {
                report("postgres", writes(&server, postgres::read_only(&mut connection).await));
                for (name, outcome) in database_checks(&database).await {
                    report(name, outcome);
                }
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

fn writes(server: &str, read_only: Result<Option<ReadOnly>, sqlx::Error>) -> Result<String, String> {
    match read_only {
        Ok(None) => Ok(format!("{server} answers and takes writes")),
        Ok(Some(why)) => Err(format!("{server} only reads, {}: {}", why.reason(), why.fix())),
        Err(error) => Err(format!("{server}: {}: {}", postgres::reason(&error), connect_fix(&error))),
    }
}

/// Postgres may have another limit than the service asks for: behind a pooler it has the role's.
async fn warn_without_limit(config: &Config, database: &Database) {
    let wanted = config.statement_timeout();
    let Ok(StatementTimeout { limit, role, database }) = pooler::statement_timeout(database).await else {
        return;
    };
    if limit.is_zero() || limit > wanted {
        let (limit, wanted) = (limit.as_millis(), wanted.as_millis());
        println!(
            "warn  limit     Postgres has statement_timeout = {limit} ms, not DB_STATEMENT_TIMEOUT_MS={wanted}, as behind a \
             pooler: run `ALTER ROLE {role} IN DATABASE {database} SET statement_timeout = {wanted}`, and restart the pooler"
        );
    }
}

/// The checks of the encoding, the schema, and what the role may do.
async fn database_checks(database: &Database) -> Vec<(&'static str, Result<String, String>)> {
    let Answer { schema, fault, .. } = match migrations::schema(database).await {
        Ok(answer) => answer,
        Err(error) => {
            let reason = postgres::reason(&error);
            return vec![("schema", Err(format!("{reason}: run `chat-service doctor` again")))];
        }
    };
    let version = schema.version();
    if let Some(Fault::NotUtf8(fault)) = &fault {
        let unknown = Err("unknown without a database in UTF8".to_owned());
        return vec![("encoding", Err(fault.to_string())), ("schema", unknown)];
    }
    let mut checks = vec![("encoding", Ok("UTF8".to_owned()))];
    let applied = match schema {
        Schema::Forbidden { version: 0, .. } => Err("unknown, before the role may read it".to_owned()),
        _ => migrations::version_fault(version).map_or(Ok(format!("version {version}, current")), Err),
    };
    checks.push(("schema", applied));
    let access = match fault {
        // The statements on lines of their own, to be copied.
        Some(Fault::Lacking(lacking)) => Err([vec![lacking.fault()], lacking.statements].concat().join("\n")),
        _ if version == 0 => Ok("the role lacks nothing yet".to_owned()),
        _ => Ok("the role may use all that the service needs".to_owned()),
    };
    checks.push(("access", access));
    checks
}
