//! The sources of Postgres and Redis: the user's own, installed programs, containers, packages, in that order.

use std::net::{TcpStream, ToSocketAddrs};
use std::path::Path;
use std::time::Duration;

use anyhow::{Result, anyhow, bail};
use common::steps::{Progress, step};
use harness::servers::{ports, programs};
use harness::{Postgres, PostgresOptions, Redis, RedisOptions, install};

use super::container::{Container, Engine};
use super::settings::Settings;

pub(crate) const POSTGRES_DIR: &str = "postgres";
pub(crate) const REDIS_DIR: &str = "redis";
pub(crate) const DATABASE: &str = "chat_service";

/// Tried first, so that the addresses stay the same from run to run. Not the standard ports, where another server may
/// start later.
pub(crate) const POSTGRES_PORT: u16 = 15432;
pub(crate) const REDIS_PORT: u16 = 16379;

const CONNECT_LIMIT: Duration = Duration::from_secs(3);

/// The two servers that the service needs.
#[derive(Debug)]
pub(crate) struct Backends {
    pub(crate) postgres: Backend,
    pub(crate) redis: Backend,
}

#[derive(Debug)]
pub(crate) enum Backend {
    /// The user's own, set by this variable.
    Given(&'static str),
    Postgres(Postgres),
    Redis(Redis),
    Container(Container),
    /// Only Redis can be.
    Unavailable,
}

impl Backend {
    /// The URL to set for the service. It reads the user's own from the environment.
    pub(crate) fn url(&self) -> Option<String> {
        match self {
            Self::Postgres(postgres) => Some(postgres.url(DATABASE)),
            Self::Redis(redis) => Some(redis.url(0)),
            Self::Container(container) => Some(container.url().to_owned()),
            Self::Given(_) | Self::Unavailable => None,
        }
    }

    /// For the reader; a given URL may hold a password and is not repeated.
    pub(crate) fn shown(&self) -> String {
        match (self.url(), self) {
            (Some(url), _) => url,
            (None, Self::Given(variable)) => format!("as {variable} says"),
            (None, _) => "unavailable: the service runs degraded".to_owned(),
        }
    }

    pub(crate) fn stop(self) -> Result<()> {
        match self {
            Self::Postgres(mut postgres) => postgres.stop(),
            Self::Redis(mut redis) => redis.stop(),
            Self::Container(container) => container.stop(),
            Self::Given(_) | Self::Unavailable => Ok(()),
        }
    }
}

pub(crate) fn start(dir: &Path, settings: &Settings) -> Result<Backends> {
    let postgres = given_postgres(settings)?;
    let redis = given_redis(settings);
    let mut missing = install::missing_packages();
    missing.retain(|package| match *package {
        "postgresql" => postgres.is_none(),
        _ => redis.is_none(),
    });
    let mut engine = None;
    if !missing.is_empty() {
        engine = step("container engine", |progress| Ok(Engine::find(progress)))?;
        if engine.is_none() && install::can_install() {
            step("install", |progress| {
                progress.note(&format!("installing {} with apt-get", missing.join(" and ")));
                install::install(&missing)
            })?;
        }
    }
    let postgres = match postgres {
        Some(given) => given,
        None => step("Postgres", |progress| start_postgres(dir, engine.as_ref(), progress))?,
    };
    let redis = match redis {
        Some(given) => given,
        None => step("Redis", |progress| start_redis(dir, engine.as_ref(), progress))?,
    };
    Ok(Backends { postgres, redis })
}

pub(crate) fn start_postgres(dir: &Path, engine: Option<&Engine>, progress: &Progress) -> Result<Backend> {
    let options = PostgresOptions::durable().port(ports::prefer(POSTGRES_PORT)?);
    if programs::postgres_bin_dirs().is_empty() {
        if let Some(engine) = engine {
            return engine.postgres(progress).map(Backend::Container);
        }
        bail!(
            "Postgres is not installed, and there is no way to get it from here. Install by hand:\n{}",
            install::ADVICE
        );
    }
    let wanted = dir.join(POSTGRES_DIR);
    let postgres = Postgres::start(&wanted, options)?;
    if wanted.canonicalize()? != postgres.home() {
        progress
            .note(&format!("its user cannot reach target/, the data is in {}", postgres.home().display()));
    }
    postgres.create_database(DATABASE)?;
    Ok(Backend::Postgres(postgres))
}

fn start_redis(dir: &Path, engine: Option<&Engine>, progress: &Progress) -> Result<Backend> {
    if programs::redis_server().is_none() {
        let Some(engine) = engine else {
            progress.note("Redis is not installed: the service runs degraded without it. To have it:");
            progress.note(install::ADVICE);
            return Ok(Backend::Unavailable);
        };
        return engine.redis(progress).map(Backend::Container);
    }
    let options = RedisOptions::default().port(ports::prefer(REDIS_PORT)?);
    Ok(Backend::Redis(Redis::start(&dir.join(REDIS_DIR), options)?))
}

/// The user's Postgres. Its host has to answer; the migrations report what else is wrong with it.
fn given_postgres(settings: &Settings) -> Result<Option<Backend>> {
    if settings.get("DATABASE_URL").is_some() {
        let place = settings.get("DATABASE_URL").and_then(|url| place(url, 5432));
        return reachable("DATABASE_URL", place).map(Some);
    }
    let parts = ["DB_HOST", "DB_PORT", "DB_NAME", "DB_USER", "DB_PASSWORD"];
    let Some(variable) = parts.into_iter().find(|name| settings.get(name).is_some()) else { return Ok(None) };
    let port = settings.get("DB_PORT").unwrap_or("5432");
    let place = format!("{}:{port}", settings.get("DB_HOST").unwrap_or("localhost"));
    reachable(variable, Some(place)).map(Some)
}

fn reachable(variable: &'static str, place: Option<String>) -> Result<Backend> {
    // The service may understand what this does not, such as a socket's directory.
    if let Some(place) = place.filter(|place| !answers(place)) {
        bail!(
            "{variable} leads to {place}, where nothing answers: start that Postgres, or unset it to get a private one"
        );
    }
    Ok(Backend::Given(variable))
}

/// The user's Redis. The service also starts without it.
fn given_redis(settings: &Settings) -> Option<Backend> {
    let url = settings.get("REDIS_URL")?;
    if let Some(place) = place(url.split(',').next()?, 6379).filter(|place| !answers(place)) {
        println!("  REDIS_URL leads to {place}, where nothing answers: the service runs degraded");
    }
    Some(Backend::Given("REDIS_URL"))
}

fn answers(place: &str) -> bool {
    let connect = || -> Result<TcpStream> {
        let address = place.to_socket_addrs()?.next().ok_or_else(|| anyhow!("no address"))?;
        Ok(TcpStream::connect_timeout(&address, CONNECT_LIMIT)?)
    };
    connect().is_ok()
}

/// `host:port` of a URL.
fn place(url: &str, default_port: u16) -> Option<String> {
    let authority = url.split_once("://")?.1.split(['/', '?']).next()?;
    let place = authority.rsplit_once('@').map_or(authority, |(_, place)| place);
    if place.is_empty() || place.starts_with('%') || place.contains(',') {
        return None;
    }
    // The colons of an IPv6 address are inside its brackets.
    let has_port = place.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok());
    Some(if has_port { place.to_owned() } else { format!("{place}:{default_port}") })
}

#[cfg(test)]
mod of_places {
    use super::place;

    #[test]
    fn the_place_of_a_url_is_its_host_and_port() {
        let of = |url| place(url, 5432);
        assert_eq!(of("postgres://u:p@db/name").as_deref(), Some("db:5432"));
        assert_eq!(of("postgres://u:p%40x@db:6000/name?sslmode=disable").as_deref(), Some("db:6000"));
        assert_eq!(of("postgres://[::1]/name").as_deref(), Some("[::1]:5432"));
        assert_eq!(of("postgres://[::1]:6000").as_deref(), Some("[::1]:6000"));
        assert_eq!(of("postgres://%2Ftmp/name"), None);
        assert_eq!(of("postgres:///name"), None);
    }
}
