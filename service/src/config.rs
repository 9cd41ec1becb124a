//! The configuration: one struct, read from the environment and an optional `.env` file, checked at the start.
//!
//! Every variable is declared once, as a clap argument whose long name is the variable's. clap supplies
//! parsing, defaults and ranges; `from_variables` supplies the values and turns an error into one line.

mod check;
mod dotenv;
mod values;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::Path;
use std::time::Duration;

use clap::builder::{PossibleValuesParser, TypedValueParser as _};
use clap::error::{ContextKind, ContextValue};
use clap::{CommandFactory as _, FromArgMatches as _, Parser, ValueEnum};
use ipnet::IpNet;
use secrecy::{ExposeSecret as _, SecretString};
use sqlx::postgres::PgConnectOptions;

pub use self::values::ANY_ORIGIN;
use self::values::{log_filter, origin, parse_database_url, trusted_proxy};

/// The key that a fresh checkout runs with. It is public, so production refuses it.
pub const DEFAULT_SECRET_KEY: &str = "please-change";

/// HS256 is as strong as its key, and RFC 7518 asks for a key as long as the hash.
const SECRET_KEY_MIN_BYTES: usize = 32;

/// The exit code for a bad configuration: `EX_CONFIG` of sysexits.h.
pub const EXIT_CONFIG: u8 = 78;

// `value_name` is the example that an error shows when the variable has no default to show.
#[derive(Parser, Clone, Debug)]
#[command(
    name = "chat-service",
    no_binary_name = true,
    disable_help_flag = true,
    disable_version_flag = true
)]
pub struct Config {
    /// HS256 key that signs access tokens; production refuses the default and anything under 32 bytes
    #[arg(long = "SECRET_KEY", default_value = DEFAULT_SECRET_KEY, value_name = "at least 32 random bytes")]
    pub secret_key: SecretString,
    /// The key before a rotation: still verifies tokens, signs none
    #[arg(long = "SECRET_KEY_PREVIOUS", value_name = "the old SECRET_KEY")]
    pub secret_key_previous: Option<SecretString>,
    /// How long an access token is valid
    #[arg(long = "ACCESS_TOKEN_EXP_MINUTES", default_value_t = 60, value_parser = clap::value_parser!(u32).range(1..=525_600))]
    pub access_token_exp_minutes: u32,
    /// After how many days a session ends whose refresh token was not used
    #[arg(long = "REFRESH_TOKEN_EXP_DAYS", default_value_t = 30, value_parser = clap::value_parser!(u32).range(1..=3650))]
    pub refresh_token_exp_days: u32,

    /// Postgres user
    #[arg(long = "DB_USER", default_value = "postgres")]
    pub db_user: String,
    /// Postgres password
    #[arg(long = "DB_PASSWORD", default_value = "postgres", value_name = "the user's password")]
    pub db_password: SecretString,
    /// Postgres host
    #[arg(long = "DB_HOST", default_value = "localhost")]
    pub db_host: String,
    /// Postgres port
    #[arg(long = "DB_PORT", default_value_t = 5432, value_parser = clap::value_parser!(u16).range(1..))]
    pub db_port: u16,
    /// Postgres database
    #[arg(long = "DB_NAME", default_value = "chat_service")]
    pub db_name: String,
    /// Postgres as one URL; wins over DB_*, its sslmode is honoured
    #[arg(
        long = "DATABASE_URL",
        value_name = "postgres://user:password@host:5432/chat_service?sslmode=require"
    )]
    pub database_url: Option<SecretString>,
    /// Most Postgres connections of one replica
    #[arg(long = "DB_POOL_MAX", default_value_t = 20, value_parser = clap::value_parser!(u32).range(2..=1000))]
    pub db_pool_max: u32,
    /// When Postgres gives up on a statement
    #[arg(long = "DB_STATEMENT_TIMEOUT_MS", default_value_t = 5000, value_parser = clap::value_parser!(u32).range(100..=600_000))]
    pub db_statement_timeout_ms: u32,

    /// Redis; rediss:// for TLS; several URLs, comma-separated, with REDIS_MODE=cluster or sentinel
    #[arg(
        long = "REDIS_URL",
        default_value = "redis://localhost:6379/0",
        value_name = "redis://:password@host:6379/0",
        hide_default_value = true
    )]
    pub redis_url: SecretString,
    /// How REDIS_URL is meant
    #[arg(long = "REDIS_MODE", default_value = "single")]
    pub redis_mode: RedisMode,
    /// The name of the master that the sentinels watch
    #[arg(long = "REDIS_SENTINEL_MASTER", default_value = "mymaster")]
    pub redis_sentinel_master: String,
    /// How the master is reached where that differs from the sentinels: scheme, credentials, database, and its name as host
    #[arg(long = "REDIS_MASTER_URL", value_name = "rediss://user:password@mymaster/0")]
    pub redis_master_url: Option<SecretString>,

    /// Address that both ports listen on
    #[arg(long = "HOST", default_value = "0.0.0.0")]
    pub host: IpAddr,
    /// The public port: the API, its documentation, readiness
    #[arg(long = "PORT", default_value_t = 8000)]
    pub port: u16,
    /// The operations port: metrics, liveness, readiness; never behind an ingress
    #[arg(long = "OPS_PORT", default_value_t = 9000)]
    pub ops_port: u16,

    /// Logins per client address and minute; 0 switches the limit off
    #[arg(long = "LOGIN_RATE_LIMIT_PER_MINUTE", default_value_t = 5)]
    pub login_rate_limit_per_minute: u32,
    /// Messages per user and minute; 0 switches the limit off
    #[arg(long = "SEND_RATE_LIMIT_PER_MINUTE", default_value_t = 30)]
    pub send_rate_limit_per_minute: u32,
    /// Registrations per client address and minute; 0 switches the limit off
    #[arg(long = "REGISTER_RATE_LIMIT_PER_MINUTE", default_value_t = 30)]
    pub register_rate_limit_per_minute: u32,
    /// Conversations that a user may begin in an hour; 0 switches the limit off
    #[arg(long = "NEW_CONVERSATIONS_PER_HOUR", default_value_t = 30, value_parser = clap::value_parser!(u32).range(0..=1000))]
    pub new_conversations_per_hour: u32,
    /// Networks or addresses whose X-Forwarded-For is believed, comma-separated
    #[arg(long = "TRUSTED_PROXIES", value_delimiter = ',', value_name = "10.0.0.0/8,192.168.0.0/16", value_parser = trusted_proxy)]
    pub trusted_proxies: Vec<IpNet>,
    /// How long an idle connection is kept; longer than any load balancer in front keeps it
    #[arg(long = "KEEP_ALIVE_SECONDS", default_value_t = 75, value_parser = clap::value_parser!(u32).range(5..=3600))]
    pub keep_alive_seconds: u32,
    /// Origins whose pages may call the API from a browser, comma-separated; `*` for all
    #[arg(long = "CORS_ALLOWED_ORIGINS", value_delimiter = ',', value_parser = origin, value_name = "https://chat.example.com,https://admin.example.com")]
    pub cors_allowed_origins: Vec<String>,

    /// Recent messages kept in Redis per conversation; 0 switches the window off
    #[arg(long = "CACHE_WINDOW", default_value_t = 50, value_parser = clap::value_parser!(u32).range(0..=1000))]
    pub cache_window: u32,
    /// How long an unused window stays in Redis
    #[arg(long = "CACHE_TTL_SECONDS", default_value_t = 30, value_parser = clap::value_parser!(u32).range(1..=86_400))]
    pub cache_ttl_seconds: u32,

    /// After how many days messages are removed; 0 keeps them for ever
    #[arg(long = "MESSAGE_RETENTION_DAYS", default_value_t = 0, value_parser = clap::value_parser!(u32).range(0..=36_500))]
    pub message_retention_days: u32,

    /// Largest request body
    #[arg(long = "MAX_BODY_BYTES", default_value_t = 65_536, value_parser = clap::value_parser!(u32).range(1024..=16_777_216))]
    pub max_body_bytes: u32,
    /// When a request is given up with 503, and its body, after half of this, with 408
    #[arg(long = "REQUEST_TIMEOUT_MS", default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(100..=600_000))]
    pub request_timeout_ms: u32,
    /// How long a stopping process may take to finish what it has begun
    #[arg(long = "SHUTDOWN_GRACE_SECONDS", default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=3600))]
    pub shutdown_grace_seconds: u32,
    /// Streams of one user that a process keeps open
    #[arg(long = "STREAMS_PER_USER_MAX", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub streams_per_user_max: u32,
    /// Streams that a process keeps open
    #[arg(long = "STREAMS_MAX", default_value_t = 50_000, value_parser = clap::value_parser!(u32).range(0..=1_000_000))]
    pub streams_max: u32,
    /// How long a stream lives at most, so that replicas that came later get their share
    #[arg(long = "STREAM_MAX_SECONDS", default_value_t = 600, value_parser = clap::value_parser!(u32).range(10..=86_400))]
    pub stream_max_seconds: u32,
    /// Over how long a stopping process ends its streams
    #[arg(long = "STREAM_DRAIN_SECONDS", default_value_t = 30, value_parser = clap::value_parser!(u32).range(0..=3600))]
    pub stream_drain_seconds: u32,
    /// The chat page at `/`; not in production unless it is set
    #[arg(long = "CHAT_PAGE", value_name = "true", action = clap::ArgAction::Set, value_parser = PossibleValuesParser::new(["true", "false"]).map(|s| s == "true"))]
    pub chat_page: Option<bool>,
    /// Migrate the schema when the service starts
    #[arg(long = "MIGRATE_ON_START", default_value = "true", action = clap::ArgAction::Set, value_parser = PossibleValuesParser::new(["true", "false"]).map(|s| s == "true"))]
    pub migrate_on_start: bool,

    /// `text` is one plain line per event, `json` is for log pipelines
    #[arg(long = "LOG_FORMAT", default_value = "text")]
    pub log_format: LogFormat,
    /// Log filter: a level, or directives per target
    #[arg(long = "RUST_LOG", default_value = "info", value_parser = log_filter)]
    pub rust_log: String,
    /// `production` turns the safety refusals on
    #[arg(long = "APP_ENV", default_value = "development")]
    pub app_env: AppEnv,
}

#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub enum RedisMode {
    Single,
    Cluster,
    Sentinel,
}

#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    Text,
    Json,
}

#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub enum AppEnv {
    Development,
    Production,
}

/// One line that names the variable, what is wrong with its value, and an example of a good one.
#[derive(thiserror::Error, Debug)]
#[error("configuration: {0}")]
pub struct ConfigError(String);

/// What documentation needs to know of a variable.
#[derive(Debug)]
pub struct Variable {
    pub name: String,
    pub default: Option<String>,
    pub help: String,
}

impl Config {
    /// Reads `.env` in the working directory, if there is one, and the environment, which wins. The file's variables become
    /// part of the environment, where OpenTelemetry looks for its own: so this comes before any thread is started.
    pub fn from_environment() -> Result<Self, ConfigError> {
        let file = dotenv::read(Path::new(".env")).map_err(|fault| ConfigError(format!(".env: {fault}")))?;
        let command = Self::command();
        let known = |name: &str| {
            name.starts_with("OTEL_") || command.get_arguments().any(|known| known.get_long() == Some(name))
        };
        let mut variables = file.pairs;
        for (name, value) in std::env::vars_os() {
            // A name that is not UTF-8 is none of ours.
            let Ok(name) = name.into_string() else { continue };
            match value.into_string() {
                Ok(value) => variables.insert(name, value),
                Err(_) if known(&name) => {
                    return Err(ConfigError(format!(
                        "{name}: its value is not UTF-8; for example use ASCII"
                    )));
                }
                Err(_) => None,
            };
        }
        let config = Self::from_variables(&variables)?;
        // Variables that are set keep their values. Every line has been parsed before.
        dotenvy::from_read(file.text.as_bytes()).ok();
        Ok(config)
    }

    /// The configuration that these variables mean. Unknown names are ignored; an empty value counts as unset,
    /// because that is what a template with an absent value produces.
    pub fn from_variables(variables: &BTreeMap<String, String>) -> Result<Self, ConfigError> {
        let mut command = Self::command();
        command.build();
        let arguments: Vec<String> = command
            .get_arguments()
            .filter_map(|argument| {
                let name = argument.get_long()?;
                let value = variables.get(name).filter(|value| !value.is_empty())?;
                Some(format!("--{name}={value}"))
            })
            .collect();
        let config = command
            .clone()
            .try_get_matches_from(arguments)
            .and_then(|matches| Self::from_arg_matches(&matches))
            .map_err(|error| describe(&command, &error))?;
        config.check()?;
        Ok(config)
    }

    /// Every variable of the configuration, in the order of its documentation.
    pub fn variables() -> Vec<Variable> {
        Self::command()
            .get_arguments()
            .map(|argument| Variable {
                name: argument.get_long().unwrap_or_default().to_owned(),
                default: argument.get_default_values().first().map(|v| v.to_string_lossy().into_owned()),
                help: argument.get_help().map(ToString::to_string).unwrap_or_default(),
            })
            .collect()
    }

    pub fn access_token_lifetime(&self) -> Duration {
        Duration::from_secs(u64::from(self.access_token_exp_minutes) * 60)
    }

    pub fn refresh_token_lifetime(&self) -> Duration {
        Duration::from_secs(u64::from(self.refresh_token_exp_days) * 24 * 3600)
    }

    /// The age at which messages are removed, if they are: 25 hours at least, so that no Idempotency-Key outlives its message.
    pub fn message_retention(&self) -> Option<Duration> {
        let hours = u64::from(self.message_retention_days) * 24;
        (hours > 0).then(|| Duration::from_secs(hours.max(25) * 3600))
    }

    pub fn request_timeout(&self) -> Duration {
        Duration::from_millis(self.request_timeout_ms.into())
    }

    /// How long a request's body may take: half of the request's time, so that the other half is left for the work.
    pub fn body_timeout(&self) -> Duration {
        self.request_timeout() / 2
    }

    pub fn keep_alive(&self) -> Duration {
        Duration::from_secs(self.keep_alive_seconds.into())
    }

    pub fn statement_timeout(&self) -> Duration {
        Duration::from_millis(self.db_statement_timeout_ms.into())
    }

    pub fn shutdown_grace(&self) -> Duration {
        Duration::from_secs(self.shutdown_grace_seconds.into())
    }

    pub fn stream_drain(&self) -> Duration {
        Duration::from_secs(self.stream_drain_seconds.into())
    }

    /// How to connect to Postgres, from `DATABASE_URL` or else `DB_*`. The error names the fault without the password.
    pub fn connect_options(&self) -> Result<PgConnectOptions, ConfigError> {
        let options = match &self.database_url {
            Some(url) => parse_database_url(url.expose_secret()).map_err(|fault| {
                ConfigError(format!(
                    "DATABASE_URL: {fault}; for example \
                     DATABASE_URL=postgres://user:password@host:5432/chat_service?sslmode=require"
                ))
            })?,
            None => {
                self.check_db_parts()?;
                PgConnectOptions::new_without_pgpass()
                    .host(&self.db_host)
                    .port(self.db_port)
                    .username(&self.db_user)
                    .password(self.db_password.expose_secret())
                    .database(&self.db_name)
            }
        };
        // The driver asks for more digits in the text form of floats, which is not used; PgBouncer refuses the parameter.
        Ok(options.application_name("chat-service").extra_float_digits(None))
    }

    /// The URLs of `REDIS_URL`. With a single Redis a comma belongs to the URL: its password may have one.
    pub fn redis_urls(&self) -> Vec<String> {
        let text = self.redis_url.expose_secret();
        match self.redis_mode {
            RedisMode::Single => vec![text.to_owned()],
            RedisMode::Cluster | RedisMode::Sentinel => {
                text.split(',').map(|url| url.trim().to_owned()).collect()
            }
        }
    }

    /// A URL with the master's scheme, credentials and database. Where nothing else is said, they are the sentinels'.
    pub fn redis_master_url(&self) -> String {
        let own = self.redis_master_url.as_ref().map(|url| url.expose_secret().to_owned());
        own.or_else(|| self.redis_urls().into_iter().next()).unwrap_or_default()
    }

    pub fn has_chat_page(&self) -> bool {
        self.chat_page.unwrap_or(self.app_env == AppEnv::Development)
    }

    /// True when the signing key is one that production refuses.
    pub fn secret_key_is_weak(&self) -> bool {
        is_weak(&self.secret_key)
    }
}

fn is_weak(key: &SecretString) -> bool {
    let key = key.expose_secret();
    key == DEFAULT_SECRET_KEY || key.len() < SECRET_KEY_MIN_BYTES
}

/// clap's error as one line. Values of secrets are never part of it: the variables that hold one take any text.
fn describe(command: &clap::Command, error: &clap::Error) -> ConfigError {
    let text = |kind| match error.get(kind) {
        Some(ContextValue::String(text)) => text.clone(),
        _ => String::new(),
    };
    let argument = text(ContextKind::InvalidArg);
    let name = argument.trim_start_matches('-').split([' ', '=']).next().unwrap_or_default().to_owned();
    let known = command.get_arguments().find(|argument| argument.get_long() == Some(&name));
    let example = known
        .and_then(|argument| {
            let default = argument.get_default_values().first().map(|v| v.to_string_lossy().into_owned());
            default.or_else(|| Some(argument.get_value_names()?.first()?.to_string()))
        })
        .unwrap_or_default();
    let fault = std::error::Error::source(error).map(ToString::to_string);
    let fault = fault.unwrap_or_else(|| match error.get(ContextKind::ValidValue) {
        Some(ContextValue::Strings(values)) => format!("it is none of {}", values.join(", ")),
        _ => "it is not a valid value".to_owned(),
    });
    // One line, whatever the value.
    let value: String = text(ContextKind::InvalidValue)
        .chars()
        .flat_map(|c| if c.is_control() { c.escape_default().collect() } else { vec![c] })
        .collect();
    ConfigError(format!("{name}: '{value}' cannot be used: {fault}; for example {name}={example}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(super) fn load(pairs: &[(&str, &str)]) -> Result<Config, String> {
        let variables = pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        Config::from_variables(&variables).map_err(|error| error.to_string())
    }

    #[test]
    fn an_empty_environment_gives_the_documented_defaults() {
        let config = load(&[]).expect("defaults are valid");
        assert_eq!(config.port, 8000);
        assert_eq!(config.ops_port, 9000);
        assert_eq!(config.db_name, "chat_service");
        assert_eq!(config.access_token_exp_minutes, 60);
        assert!(config.migrate_on_start);
        assert!(config.trusted_proxies.is_empty());
        assert_eq!(config.app_env, AppEnv::Development);
    }

    #[test]
    fn a_bad_value_is_one_line_with_the_name_the_fault_and_an_example() {
        for (name, value, example) in [
            ("PORT", "eighty", "PORT=8000"),
            ("PORT", "70000", "PORT=8000"),
            ("DB_POOL_MAX", "0", "DB_POOL_MAX=20"),
            ("APP_ENV", "staging", "APP_ENV=development"),
            ("LOG_FORMAT", "xml", "LOG_FORMAT=text"),
            ("MIGRATE_ON_START", "maybe", "MIGRATE_ON_START=true"),
            ("TRUSTED_PROXIES", "10.0.0.0/99", "TRUSTED_PROXIES=10.0.0.0/8"),
            ("CORS_ALLOWED_ORIGINS", "https://a.example,*", "CORS_ALLOWED_ORIGINS=https://"),
            ("RUST_LOG", "chat=loud", "RUST_LOG=info"),
            ("REDIS_MODE", "ring", "REDIS_MODE=single"),
            ("REDIS_URL", "http://x", "REDIS_URL=redis://"),
            ("DATABASE_URL", "mysql://x", "DATABASE_URL=postgres://"),
            ("OPS_PORT", "8000", "OPS_PORT=9000"),
            ("HOST", "nowhere", "HOST=0.0.0.0"),
            ("SEND_RATE_LIMIT_PER_MINUTE", "-1", "SEND_RATE_LIMIT_PER_MINUTE=30"),
        ] {
            let error = load(&[(name, value)]).expect_err(name);
            assert!(error.contains(&format!("{name}:")), "{error}");
            assert!(error.contains(example), "{error}");
            assert!(!error.contains('\n'), "{error}");
        }
    }

    #[test]
    fn production_refuses_the_default_key_and_a_short_one() {
        for key in [None, Some("0123456789012345678901234567890")] {
            let mut pairs = vec![("APP_ENV", "production")];
            pairs.extend(key.map(|key| ("SECRET_KEY", key)));
            let error = load(&pairs).expect_err("a weak key");
            assert!(error.contains("SECRET_KEY") && error.contains("production"), "{error}");
            assert!(!error.contains("0123456789"), "the key must not be shown: {error}");
        }
        let strong = ("SECRET_KEY", "01234567890123456789012345678901");
        assert!(load(&[("APP_ENV", "production"), strong]).is_ok());
        let previous = ("SECRET_KEY_PREVIOUS", "please-change");
        assert!(load(&[("APP_ENV", "production"), strong, previous]).is_err());
    }

    #[test]
    fn an_empty_value_counts_as_unset() {
        let config = load(&[("DATABASE_URL", ""), ("PORT", ""), ("SECRET_KEY_PREVIOUS", "")]).expect("unset");
        assert!(config.database_url.is_none() && config.secret_key_previous.is_none());
        assert_eq!(config.port, 8000);
    }

    #[test]
    fn a_line_break_in_what_postgres_is_asked_with_is_refused_and_not_shown() {
        for name in ["DB_USER", "DB_PASSWORD", "DB_HOST", "DB_NAME"] {
            for value in ["s3cret\n", "s3cret\r\n", "s3\u{7}cret"] {
                let error = load(&[(name, value)]).expect_err(name);
                assert!(error.contains(&format!("{name}:")) && error.contains("for example"), "{error}");
                assert!(
                    !error.contains("cret\n") && !error.contains('\n') && !error.contains('\u{7}'),
                    "{error}"
                );
            }
            // Where the URL wins they are not used.
            assert!(load(&[(name, "s3cret\n"), ("DATABASE_URL", "postgres://u:p@h/d")]).is_ok());
        }
        let error = load(&[("DATABASE_URL", "postgres://u:s3cret%0A@h/d")]).expect_err("%0A");
        assert!(
            error.contains("DATABASE_URL:") && error.contains("%0A") && !error.contains("s3cret"),
            "{error}"
        );
        let master = [("REDIS_MODE", "sentinel"), ("REDIS_SENTINEL_MASTER", "mymaster\n")];
        assert!(load(&master).expect_err("a line break").contains("REDIS_SENTINEL_MASTER:"));
    }

    #[test]
    fn a_line_break_in_a_key_or_at_the_end_of_a_url_does_no_harm() {
        // It is part of the key, on every replica; and a URL is parsed without.
        let key = "01234567890123456789012345678901\n";
        let config = load(&[("SECRET_KEY", key), ("APP_ENV", "production")]).expect("a key");
        assert_eq!(config.secret_key.expose_secret(), key);
        let options = load(&[("DATABASE_URL", "postgres://u:p@h/d\n")]).expect("a URL").connect_options();
        assert_eq!(options.expect("a URL").get_database(), Some("d"));
        load(&[("REDIS_URL", "redis://:p@h/0\n")]).expect("a URL");
    }

    #[test]
    fn an_error_is_one_line_whatever_the_value() {
        for name in ["PORT", "HOST", "TRUSTED_PROXIES", "RUST_LOG", "APP_ENV", "MIGRATE_ON_START"] {
            let error = load(&[(name, "loud=loud=\n\r")]).expect_err(name);
            assert!(error.contains(&format!("{name}:")) && !error.contains(['\n', '\r']), "{error}");
        }
    }

    #[test]
    fn secrets_are_not_printed() {
        let config = load(&[
            ("SECRET_KEY", "key-that-is-secret"),
            ("SECRET_KEY_PREVIOUS", "key-that-was-secret"),
            ("DB_PASSWORD", "db-secret"),
            ("DATABASE_URL", "postgres://u:url-secret@h/d"),
            ("REDIS_URL", "redis://:redis-secret@h/0"),
        ])
        .expect("valid");
        assert!(!format!("{config:?}").contains("secret@"));
        assert!(!format!("{config:?}").contains("db-secret"));
        assert!(!format!("{config:?}").contains("that-"));
    }
}
