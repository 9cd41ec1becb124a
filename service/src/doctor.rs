//! `chat-service doctor` and `chat-service healthcheck`: what an operator asks before asking anybody else.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::runtime::Handle;

use crate::config::Config;
use crate::db::{self, Database, Schema};
use crate::metrics::Metrics;
use crate::redis::Redis;

const HEALTHCHECK_TIMEOUT: Duration = Duration::from_secs(3);
const HEALTHCHECK_INTERVAL: Duration = Duration::from_millis(250);

/// Checks the configuration, Postgres, the schema and Redis; every failure names its fix.
pub async fn doctor(config: &Config) -> anyhow::Result<ExitCode> {
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
    let metrics = Metrics::new()?;
    let options = db::connect_options(config).map_err(anyhow::Error::msg)?;
    let place = format!("{}:{}", options.get_host(), options.get_port());
    match db::connect(&options).await {
        Err(error) => {
            report("postgres", Err(format!("{place}: {error}: {}", postgres_fix(&error))));
            report("schema", Err("unknown without Postgres".into()));
        }
        Ok(_) => {
            report("postgres", Ok(format!("{place} answers")));
            let database = Database::new(db::pool(config, options), Arc::clone(&metrics));
            report("schema", schema(&database).await);
        }
    }
    let redis = Redis::new(config, Vec::new(), vec![Handle::current()], metrics)?;
    report(
        "redis",
        redis.check().await.map(|()| "answers and takes writes".to_owned()).map_err(|error| {
            format!("{error}: start Redis, or correct REDIS_URL and REDIS_MODE; the service runs degraded without it")
        }),
    );
    Ok(if healthy { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

async fn schema(database: &Database) -> Result<String, String> {
    let known = db::known_version();
    match db::schema(database).await {
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

fn postgres_fix(error: &sqlx::Error) -> &'static str {
    let code = match error {
        sqlx::Error::Database(error) => error.code().unwrap_or_default().into_owned(),
        _ => String::new(),
    };
    match code.as_str() {
        "28P01" | "28000" => "correct DB_USER and DB_PASSWORD, or DATABASE_URL",
        "3D000" => "create the database (`createdb`), or correct DB_NAME",
        "53300" => "raise max_connections of Postgres, or lower DB_POOL_MAX",
        _ => "start Postgres, or correct DB_HOST and DB_PORT, or DATABASE_URL",
    }
}

/// Asks a running instance on this machine for its readiness, for images that have no shell and no curl; again and again
/// for as long as it may wait.
pub fn healthcheck(config: &Config, wait: Duration) -> ExitCode {
    let host = match config.host {
        IpAddr::V4(Ipv4Addr::UNSPECIFIED) => IpAddr::V4(Ipv4Addr::LOCALHOST),
        IpAddr::V6(Ipv6Addr::UNSPECIFIED) => IpAddr::V6(Ipv6Addr::LOCALHOST),
        host => host,
    };
    let address = SocketAddr::new(host, config.ops_port);
    let deadline = Instant::now() + wait;
    loop {
        let fault = match ask(address) {
            Ok(status) if status.contains(" 200 ") => return ExitCode::SUCCESS,
            Ok(status) => format!("not ready: http://{address}/healthz answers {status}"),
            Err(error) => {
                format!("no answer from http://{address}/healthz: {error}; is OPS_PORT the instance's?")
            }
        };
        if Instant::now() >= deadline {
            eprintln!("{fault}");
            return ExitCode::FAILURE;
        }
        std::thread::sleep(HEALTHCHECK_INTERVAL);
    }
}

/// The status line of a GET.
fn ask(address: SocketAddr) -> std::io::Result<String> {
    let mut stream = TcpStream::connect_timeout(&address, HEALTHCHECK_TIMEOUT)?;
    stream.set_read_timeout(Some(HEALTHCHECK_TIMEOUT))?;
    stream.set_write_timeout(Some(HEALTHCHECK_TIMEOUT))?;
    write!(stream, "GET /healthz HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n")?;
    let mut answer = Vec::new();
    stream.take(64 * 1024).read_to_end(&mut answer)?;
    let answer = String::from_utf8_lossy(&answer);
    Ok(answer.lines().next().unwrap_or("nothing").to_owned())
}
