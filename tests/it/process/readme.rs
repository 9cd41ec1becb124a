//! The README's configuration and API are those of the code.

use std::path::Path;

use anyhow::{Context as _, Result};
use chat_service::config::Config;

use super::support::Start;

/// Every variable of the contract with its default. It changes only when the contract does.
const DEFAULTS: &[(&str, Option<&str>)] = &[
    ("SECRET_KEY", Some("please-change")),
    ("SECRET_KEY_PREVIOUS", None),
    ("ACCESS_TOKEN_EXP_MINUTES", Some("60")),
    ("REFRESH_TOKEN_EXP_DAYS", Some("30")),
    ("DB_USER", Some("postgres")),
    ("DB_PASSWORD", Some("postgres")),
    ("DB_HOST", Some("localhost")),
    ("DB_PORT", Some("5432")),
    ("DB_NAME", Some("chat_service")),
    ("DATABASE_URL", None),
    ("DB_POOL_MAX", Some("20")),
    ("DB_STATEMENT_TIMEOUT_MS", Some("5000")),
    ("REDIS_URL", Some("redis://localhost:6379/0")),
    ("REDIS_MODE", Some("single")),
    ("REDIS_SENTINEL_MASTER", Some("mymaster")),
    ("REDIS_MASTER_URL", None),
    ("HOST", Some("0.0.0.0")),
    ("PORT", Some("8000")),
    ("OPS_PORT", Some("9000")),
    ("LOGIN_RATE_LIMIT_PER_MINUTE", Some("5")),
    ("SEND_RATE_LIMIT_PER_MINUTE", Some("30")),
    ("REGISTER_RATE_LIMIT_PER_MINUTE", Some("30")),
    ("NEW_CONVERSATIONS_PER_HOUR", Some("30")),
    ("TRUSTED_PROXIES", None),
    ("KEEP_ALIVE_SECONDS", Some("75")),
    ("CORS_ALLOWED_ORIGINS", None),
    ("CACHE_WINDOW", Some("50")),
    ("CACHE_TTL_SECONDS", Some("30")),
    ("MESSAGE_RETENTION_DAYS", Some("0")),
    ("MAX_BODY_BYTES", Some("65536")),
    ("REQUEST_TIMEOUT_MS", Some("10000")),
    ("SHUTDOWN_GRACE_SECONDS", Some("20")),
    ("STREAMS_PER_USER_MAX", Some("10")),
    ("STREAMS_MAX", Some("50000")),
    ("STREAM_MAX_SECONDS", Some("600")),
    ("STREAM_DRAIN_SECONDS", Some("30")),
    ("CHAT_PAGE", None),
    ("MIGRATE_ON_START", Some("true")),
    ("LOG_FORMAT", Some("text")),
    ("RUST_LOG", Some("info")),
    ("APP_ENV", Some("development")),
];

fn readme() -> Result<String> {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../README.md");
    std::fs::read_to_string(&file).with_context(|| format!("read {}", file.display()))
}

/// The cells of a table's rows.
fn rows(table: &str) -> Vec<Vec<String>> {
    let rows = table.lines().filter(|line| line.starts_with("| `"));
    let cell = |cell: &str| cell.trim().to_owned();
    rows.map(|row| row.trim_matches('|').split('|').map(cell).collect()).collect()
}

fn code(cell: &str) -> Option<&str> {
    cell.strip_prefix('`')?.strip_suffix('`')
}

#[test]
fn the_configuration_has_the_contracts_variables_and_defaults() {
    let variables = Config::variables();
    let variables: Vec<_> = variables.iter().map(|v| (&*v.name, v.default.as_deref())).collect();
    assert_eq!(variables, DEFAULTS);
}

#[test]
fn the_readme_lists_every_variable_with_its_default_and_no_other() -> Result<()> {
    let readme = readme()?;
    let (_, table) = readme.split_once("<!-- configuration -->").context("the marker")?;
    let (table, _) = table.split_once("<!-- /configuration -->").context("the end marker")?;
    let rows = rows(table);
    let mut listed = Vec::new();
    for row in &rows {
        assert_eq!(row.len(), 3, "{row:?}");
        assert!(!row[2].is_empty(), "{row:?} has no meaning");
        listed.push((code(&row[0]).context("a name in code")?.to_owned(), code(&row[1]).map(str::to_owned)));
    }
    let variables = Config::variables().into_iter().map(|variable| (variable.name, variable.default));
    let expected: Vec<_> = variables.chain([("OTEL_*".to_owned(), None)]).collect();
    assert_eq!(listed, expected);
    Ok(())
}

#[test]
fn the_readme_names_every_call_of_the_openapi_document() -> Result<()> {
    let readme = readme()?;
    let (_, section) = readme.split_once("## API").context("the section")?;
    let calls: Vec<_> =
        rows(section.split("\n#").next().unwrap_or_default()).into_iter().map(|row| row[0].clone()).collect();
    let document: serde_json::Value =
        serde_json::from_str(&Start::default().args(&["openapi"]).run()?.stdout)?;
    let paths = document["paths"].as_object().context("paths")?;
    let mut described = Vec::new();
    for (path, methods) in paths {
        for method in methods.as_object().context("methods")?.keys() {
            described.push(format!("`{} {path}`", method.to_uppercase()));
        }
    }
    let (mut calls, mut described) = (calls, described);
    calls.sort();
    described.sort();
    assert_eq!(calls, described);
    Ok(())
}
