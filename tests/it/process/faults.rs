//! A bad configuration stops the start with exit code 78 and one line, and no secret is ever disclosed.

use std::net::TcpListener;

use anyhow::{Result, ensure};

use super::support::{Database, STRONG_KEY, Start, closed_port, has_none_of, shared_redis};

const EX_CONFIG: i32 = 78;

/// Every variable that does not accept every text, a text that it refuses, and the example in the error line.
const BAD_VALUES: &[(&str, &str, &str)] = &[
    ("ACCESS_TOKEN_EXP_MINUTES", "an hour", "ACCESS_TOKEN_EXP_MINUTES=60"),
    ("ACCESS_TOKEN_EXP_MINUTES", "0", "ACCESS_TOKEN_EXP_MINUTES=60"),
    ("REFRESH_TOKEN_EXP_DAYS", "0", "REFRESH_TOKEN_EXP_DAYS=30"),
    ("DB_PORT", "postgres", "DB_PORT=5432"),
    ("DB_PORT", "0", "DB_PORT=5432"),
    ("DATABASE_URL", "mysql://localhost/chat", "DATABASE_URL=postgres://"),
    ("DATABASE_URL", "postgres://localhost/chat?sslmode=perhaps", "DATABASE_URL=postgres://"),
    ("DATABASE_URL", "postgres://localhost:port/chat", "DATABASE_URL=postgres://"),
    ("DATABASE_URL", "postgres://chat:s3cret%0A@localhost/chat", "DATABASE_URL=postgres://"),
    ("DB_USER", "chat\n", "--from-literal"),
    ("DB_PASSWORD", "s3cret\n", "--from-literal"),
    ("DB_HOST", "localhost\r\n", "--from-literal"),
    ("DB_NAME", "chat\n", "--from-literal"),
    ("DB_POOL_MAX", "many", "DB_POOL_MAX=20"),
    ("DB_POOL_MAX", "1", "DB_POOL_MAX=20"),
    ("DB_STATEMENT_TIMEOUT_MS", "5s", "DB_STATEMENT_TIMEOUT_MS=5000"),
    ("REDIS_URL", "localhost:6379", "REDIS_URL=redis://"),
    ("REDIS_MODE", "ring", "REDIS_MODE=single"),
    ("REDIS_MASTER_URL", "mymaster:6379", "REDIS_MASTER_URL=redis"),
    ("REDIS_MASTER_URL", "redis://mymaster/0", "REDIS_MODE=sentinel"),
    ("HOST", "everywhere", "HOST=0.0.0.0"),
    ("PORT", "http", "PORT=8000"),
    ("PORT", "8000\n", "PORT=8000"),
    ("PORT", "65536", "PORT=8000"),
    ("OPS_PORT", "-1", "OPS_PORT=9000"),
    ("LOGIN_RATE_LIMIT_PER_MINUTE", "five", "LOGIN_RATE_LIMIT_PER_MINUTE=5"),
    ("SEND_RATE_LIMIT_PER_MINUTE", "-1", "SEND_RATE_LIMIT_PER_MINUTE=30"),
    ("REGISTER_RATE_LIMIT_PER_MINUTE", "1.5", "REGISTER_RATE_LIMIT_PER_MINUTE=30"),
    ("NEW_CONVERSATIONS_PER_HOUR", "1001", "NEW_CONVERSATIONS_PER_HOUR=30"),
    ("TRUSTED_PROXIES", "10.0.0.0/8,proxy", "TRUSTED_PROXIES=10.0.0.0/8"),
    ("KEEP_ALIVE_SECONDS", "1m", "KEEP_ALIVE_SECONDS=75"),
    ("KEEP_ALIVE_SECONDS", "4", "KEEP_ALIVE_SECONDS=75"),
    ("CORS_ALLOWED_ORIGINS", "chat.example.com", "CORS_ALLOWED_ORIGINS=https://chat.example.com"),
    ("CORS_ALLOWED_ORIGINS", "https://chat.example.com/", "CORS_ALLOWED_ORIGINS=https://chat.example.com"),
    ("CORS_ALLOWED_ORIGINS", "https://chat.example.com/app", "CORS_ALLOWED_ORIGINS=https://chat.example.com"),
    ("CORS_ALLOWED_ORIGINS", "*,https://chat.example.com", "CORS_ALLOWED_ORIGINS=https://chat.example.com"),
    ("CACHE_WINDOW", "all", "CACHE_WINDOW=50"),
    ("CACHE_TTL_SECONDS", "0", "CACHE_TTL_SECONDS=30"),
    ("MESSAGE_RETENTION_DAYS", "-1", "MESSAGE_RETENTION_DAYS=0"),
    ("MESSAGE_RETENTION_DAYS", "36501", "MESSAGE_RETENTION_DAYS=0"),
    ("MESSAGE_RETENTION_DAYS", "a year", "MESSAGE_RETENTION_DAYS=0"),
    ("MAX_BODY_BYTES", "64KiB", "MAX_BODY_BYTES=65536"),
    ("REQUEST_TIMEOUT_MS", "never", "REQUEST_TIMEOUT_MS=10000"),
    ("SHUTDOWN_GRACE_SECONDS", "20s", "SHUTDOWN_GRACE_SECONDS=20"),
    ("STREAMS_PER_USER_MAX", "0", "STREAMS_PER_USER_MAX=10"),
    ("STREAMS_MAX", "-1", "STREAMS_MAX=50000"),
    ("STREAM_MAX_SECONDS", "5", "STREAM_MAX_SECONDS=600"),
    ("STREAM_DRAIN_SECONDS", "30s", "STREAM_DRAIN_SECONDS=30"),
    ("CHAT_PAGE", "on", "CHAT_PAGE=true"),
    ("MIGRATE_ON_START", "perhaps", "MIGRATE_ON_START=true"),
    ("LOG_FORMAT", "xml", "LOG_FORMAT=text"),
    ("RUST_LOG", "chat_service=loud", "RUST_LOG=info"),
    ("APP_ENV", "staging", "APP_ENV=development"),
];

/// The same for OpenTelemetry's variables, which count only with an endpoint.
const BAD_OTEL_VALUES: &[(&str, &str, &str)] = &[
    ("OTEL_SDK_DISABLED", "yes", "OTEL_SDK_DISABLED=true"),
    ("OTEL_TRACES_EXPORTER", "zipkin", "OTEL_TRACES_EXPORTER=otlp"),
    ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc", "OTEL_EXPORTER_OTLP_PROTOCOL=http/protobuf"),
    ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/json", "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL=http/protobuf"),
    ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "collector:4318", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT=http://"),
    ("OTEL_PROPAGATORS", "tracecontext,b3", "OTEL_PROPAGATORS=tracecontext"),
    ("OTEL_TRACES_SAMPLER", "jaeger_remote", "OTEL_TRACES_SAMPLER=parentbased_traceidratio"),
    ("OTEL_TRACES_SAMPLER_ARG", "10%", "OTEL_TRACES_SAMPLER_ARG=0.1"),
    ("OTEL_TRACES_SAMPLER_ARG", "1.5", "OTEL_TRACES_SAMPLER_ARG=0.1"),
    ("OTEL_BSP_MAX_QUEUE_SIZE", "large", "OTEL_BSP_MAX_QUEUE_SIZE=2048"),
    ("OTEL_BSP_SCHEDULE_DELAY", "5s", "OTEL_BSP_SCHEDULE_DELAY=5000"),
];

/// Exit code 78 and one line on stderr that names the variable and has these words.
fn refused(start: &Start, variable: &str, words: &[&str]) -> Result<()> {
    let ended = start.run()?;
    ensure!(ended.code == EX_CONFIG, "{variable}: exit code {}: {}", ended.code, ended.said());
    ensure!(ended.stdout.is_empty(), "{variable}: {}", ended.stdout);
    ensure!(ended.stderr.lines().count() == 1, "{variable}: not one line: {}", ended.stderr);
    ensure!(ended.stderr.contains(&format!("{variable}: ")), "{variable}: {}", ended.stderr);
    for word in words {
        ensure!(ended.stderr.contains(word), "{variable}: no {word:?}: {}", ended.stderr);
    }
    Ok(())
}

#[test]
fn a_value_that_cannot_be_used_is_named_with_its_fault_and_an_example() -> Result<()> {
    for (variable, value, example) in BAD_VALUES {
        refused(&Start::bare().env(variable, value), variable, &["; for example ", example])?;
    }
    Ok(())
}

#[test]
fn values_that_the_sdk_would_silently_replace_are_refused_when_traces_are_exported() -> Result<()> {
    for (variable, value, example) in BAD_OTEL_VALUES {
        let start = Start::bare().env("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4318");
        refused(&start.env(variable, value), variable, &["; for example ", example])?;
    }
    // Without an endpoint they do not matter: some platforms set such variables for every process.
    let closed = format!("postgres://chat@127.0.0.1:{}/chat", closed_port()?);
    let migrate = Start::bare().env("OTEL_TRACES_SAMPLER", "xray").env("DATABASE_URL", &closed);
    let ended = migrate.args(&["migrate"]).run()?;
    ensure!(ended.code == 1 && !ended.said().contains("OTEL_"), "{}: {}", ended.code, ended.said());
    // A wrong URL is not quoted: it may hold a password.
    let secret = Start::bare().env("OTEL_EXPORTER_OTLP_ENDPOINT", "user:s3cret@collector:4318");
    refused(&secret, "OTEL_EXPORTER_OTLP_ENDPOINT", &["http://"])?;
    ensure!(!secret.run()?.said().contains("s3cret"));
    Ok(())
}

#[test]
fn every_variable_has_a_test_with_a_bad_value_unless_it_accepts_any_text() {
    let any_text = ["SECRET_KEY", "SECRET_KEY_PREVIOUS", "REDIS_SENTINEL_MASTER"];
    for variable in chat_service::config::Config::variables() {
        let tried = BAD_VALUES.iter().any(|(name, ..)| *name == variable.name);
        assert!(tried != any_text.contains(&&*variable.name), "{}", variable.name);
    }
}

#[test]
fn every_subcommand_that_needs_the_configuration_refuses_a_bad_one() -> Result<()> {
    for subcommand in ["serve", "migrate", "healthcheck", "doctor"] {
        let start = Start::bare().env("PORT", "http").args(&[subcommand]);
        refused(&start, "PORT", &["'http'", "PORT=8000"])?;
    }
    Ok(())
}

#[test]
fn production_refuses_a_signing_key_that_others_may_know() -> Result<()> {
    let production = Start::bare().env("APP_ENV", "production");
    refused(&production, "SECRET_KEY", &["APP_ENV=production", "for example SECRET_KEY="])?;
    refused(&production.clone().env("SECRET_KEY", "please-change"), "SECRET_KEY", &["production"])?;
    let short = "0123456789abcdef0123456789abcde";
    refused(&production.clone().env("SECRET_KEY", short), "SECRET_KEY", &["under 32 bytes"])?;
    let rotated = production.env("SECRET_KEY", STRONG_KEY).env("SECRET_KEY_PREVIOUS", "please-change");
    refused(&rotated, "SECRET_KEY_PREVIOUS", &["production"])
}

#[test]
fn production_starts_with_a_strong_key_and_development_warns_of_a_weak_one() -> Result<()> {
    let database = Database::create()?;
    let start = Start::on(&database);
    let said = start.clone().env("APP_ENV", "production").env("SECRET_KEY", STRONG_KEY).ready()?.stop()?;
    ensure!(!said.contains("SECRET_KEY"), "{said}");
    let weak = start.ready()?;
    ensure!(weak.process.lines_with(&["WARN", "SECRET_KEY"]).len() == 1, "{}", weak.process.said());
    Ok(())
}

#[test]
fn the_same_number_for_both_ports_is_refused() -> Result<()> {
    let port = closed_port()?.to_string();
    refused(&Start::bare().env("PORT", &port).env("OPS_PORT", &port), "OPS_PORT", &["PORT", "9000"])
}

#[test]
fn a_port_in_use_ends_the_start_with_a_line_that_names_it() -> Result<()> {
    let taken = TcpListener::bind("127.0.0.1:0")?;
    let address = taken.local_addr()?;
    for variable in ["PORT", "OPS_PORT"] {
        let ended = Start::bare().env(variable, &address.port().to_string()).run()?;
        ensure!(ended.code == EX_CONFIG, "exit code {}", ended.code);
        let said = ended.said();
        let lines: Vec<_> = said.lines().filter(|line| line.contains("ERROR")).collect();
        ensure!(lines.len() == 1 && lines[0].contains(&format!("{variable}: ")), "{said}");
        ensure!(lines[0].contains(&address.to_string()) && lines[0].contains("in use"), "{said}");
        ensure!(lines[0].contains("for example"), "{said}");
    }
    Ok(())
}

#[test]
fn a_dotenv_file_that_does_not_parse_is_refused_without_quoting_it() -> Result<()> {
    let ended = Start::bare().file(".env", "PORT=1234\nSECRET_KEY='never-disclosed\n").run()?;
    ensure!(ended.code == EX_CONFIG, "exit code {}", ended.code);
    ensure!(ended.stderr.lines().count() == 1 && ended.stderr.contains(".env: "), "{}", ended.stderr);
    ensure!(ended.stderr.contains("for example"), "{}", ended.stderr);
    ensure!(!ended.said().contains("never-disclosed"), "{}", ended.said());
    Ok(())
}

/// No output may have any of these; each is part of a value below.
const SECRETS: [&str; 6] =
    ["key-in-use", "key-before", "password-alone", "password-of-url", "password-of-redis", "battery"];

fn with_secrets(start: Start) -> Start {
    start
        .env("SECRET_KEY", "key-in-use-key-in-use-key-in-use-key")
        .env("SECRET_KEY_PREVIOUS", "key-before-key-before-key-before-key")
        .env("DB_PASSWORD", "password-alone")
        .env("RUST_LOG", "trace")
}

fn discloses_no_secret(said: &str) -> Result<()> {
    has_none_of(said, SECRETS)
}

#[test]
fn no_secret_is_disclosed_when_a_url_is_wrong() -> Result<()> {
    let port = closed_port()?;
    let wrong = [
        ("DATABASE_URL", "mysql://user:password-of-url@host/chat".to_owned()),
        ("DATABASE_URL", "postgres://user:password-of-url@host:port/chat".to_owned()),
        ("DATABASE_URL", "postgres://user:password-of-url@/chat?sslmode=password-of-url".to_owned()),
        ("DATABASE_URL", "postgres://user:password-of-url@[host/chat".to_owned()),
        ("DATABASE_URL", "postgres://user:#password-of-url@host/chat".to_owned()),
        ("DATABASE_URL", format!("postgres://user:password-of-url@127.0.0.1:{port}/chat")),
        ("DATABASE_URL", "postgres://user:password-of-url%0A@host/chat".to_owned()),
        ("DB_PASSWORD", "password-alone\n".to_owned()),
        ("REDIS_URL", "http://:password-of-redis@host".to_owned()),
        ("REDIS_URL", "redis://:password-of-redis@host:port".to_owned()),
        ("REDIS_URL", "redis://:password-of-redis@host/zero".to_owned()),
        ("REDIS_URL", "redis://:password-of-redis@[host".to_owned()),
        ("REDIS_MASTER_URL", "redis://:password-of-redis@mymaster/0".to_owned()),
        ("REDIS_MASTER_URL", "http://:password-of-redis@mymaster/0".to_owned()),
        ("REDIS_URL", format!("redis://:password-of-redis@127.0.0.1:{port}")),
    ];
    for (variable, value) in wrong {
        let start = with_secrets(Start::bare()).env("DB_PORT", &port.to_string()).env(variable, &value);
        for subcommand in ["doctor", "migrate"] {
            let ended = start.clone().args(&[subcommand]).run()?;
            ensure!(ended.code != 0, "{variable}={value}: {}", ended.said());
            discloses_no_secret(&ended.said())?;
        }
    }
    Ok(())
}

#[test]
fn no_secret_is_disclosed_while_serving_even_at_the_finest_log_level() -> Result<()> {
    let database = Database::create()?;
    let service = with_secrets(Start::on(&database)).ready()?;
    let (ana, ben) = service.two_users()?;
    service.send(&ana, &ben, "a text for two")?.expect(201)?;
    service.contents(&ben, &ana, 5)?;
    service.me("not-a-token")?.expect(401)?;
    let said = service.stop()?;
    ensure!(said.contains("DEBUG"), "nothing was logged at DEBUG");
    discloses_no_secret(&said)?;
    has_none_of(&said, [&*ana.token, &*ben.token, "not-a-token", "a text for two", "$argon2"])
}

#[test]
fn no_secret_is_disclosed_when_postgres_and_redis_are_unavailable_or_refuse() -> Result<()> {
    let port = closed_port()?;
    let url = format!("postgres://user:password-of-url@127.0.0.1:{port}/chat");
    let redis = shared_redis().replacen("redis://", "redis://:password-of-redis@", 1);
    let start = with_secrets(Start::bare()).env("DATABASE_URL", &url).env("REDIS_URL", &redis);
    let service = start.listen()?;
    service.becomes("unavailable")?;
    discloses_no_secret(&service.stop()?)?;
    discloses_no_secret(&start.args(&["doctor"]).run()?.said())
}

#[test]
fn a_debug_print_of_the_configuration_discloses_no_secret() -> Result<()> {
    let variables = [
        ("SECRET_KEY", "key-in-use"),
        ("SECRET_KEY_PREVIOUS", "key-before"),
        ("DB_PASSWORD", "password-alone"),
        ("DATABASE_URL", "postgres://user:password-of-url@host/chat"),
        ("REDIS_URL", "redis://:password-of-redis@host"),
        ("REDIS_MASTER_URL", "redis://:password-of-redis@mymaster"),
        ("REDIS_MODE", "sentinel"),
    ];
    let variables = variables.map(|(name, value)| (name.to_owned(), value.to_owned())).into();
    let config = chat_service::config::Config::from_variables(&variables)?;
    discloses_no_secret(&format!("{config:?} {config:#?}"))
}
