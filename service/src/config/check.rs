//! Checks what involves more than one variable, and the URLs.

use deadpool_redis::redis::{ConnectionAddr, IntoConnectionInfo as _};
use secrecy::ExposeSecret as _;

use super::{ANY_ORIGIN, AppEnv, Config, ConfigError, RedisMode, SECRET_KEY_MIN_BYTES, is_weak};

impl Config {
    pub(super) fn check(&self) -> Result<(), ConfigError> {
        if self.app_env == AppEnv::Production && self.secret_key_is_weak() {
            return Err(ConfigError(format!(
                "SECRET_KEY: the default, or a key under {SECRET_KEY_MIN_BYTES} bytes, is refused when \
                 APP_ENV=production; for example SECRET_KEY=$(openssl rand -base64 48)"
            )));
        }
        if self.app_env == AppEnv::Production && self.secret_key_previous.as_ref().is_some_and(is_weak) {
            return Err(ConfigError(format!(
                "SECRET_KEY_PREVIOUS: the default, or a key under {SECRET_KEY_MIN_BYTES} bytes, is refused \
                 when APP_ENV=production, because anyone could sign with it; for example leave it unset"
            )));
        }
        if self.port == self.ops_port && self.port != 0 {
            return Err(ConfigError(format!(
                "OPS_PORT: {} is the public PORT too; for example OPS_PORT=9000",
                self.ops_port
            )));
        }
        if self.cors_allowed_origins.len() > 1
            && self.cors_allowed_origins.iter().any(|one| one == ANY_ORIGIN)
        {
            return Err(ConfigError(
                "CORS_ALLOWED_ORIGINS: '*' allows every origin, and others are listed beside it; for example \
                 CORS_ALLOWED_ORIGINS=https://chat.example.com,https://admin.example.com"
                    .to_owned(),
            ));
        }
        self.connect_options()?;
        self.check_redis_urls()
    }

    /// A line break at the end of a Secret's value is not seen by those who look at it, and never belongs to it. In a URL
    /// it does no harm: URLs are parsed without.
    pub(super) fn check_db_parts(&self) -> Result<(), ConfigError> {
        for (name, value) in [
            ("DB_USER", self.db_user.as_str()),
            ("DB_PASSWORD", self.db_password.expose_secret()),
            ("DB_HOST", &self.db_host),
            ("DB_NAME", &self.db_name),
        ] {
            check_no_control(name, value)?;
        }
        Ok(())
    }

    /// Names what is wrong with `REDIS_URL` without quoting it: it may hold a password.
    fn check_redis_urls(&self) -> Result<(), ConfigError> {
        let fault = |number: usize, fault: &str| {
            ConfigError(format!(
                "REDIS_URL: URL {number} {fault}; for example REDIS_URL=redis://:password@host:6379/0"
            ))
        };
        if self.redis_mode == RedisMode::Sentinel {
            check_no_control("REDIS_SENTINEL_MASTER", &self.redis_sentinel_master)?;
        }
        for (index, url) in self.redis_urls().iter().enumerate() {
            if !url.starts_with("redis://") && !url.starts_with("rediss://") {
                return Err(fault(index + 1, "does not begin with redis:// or rediss://"));
            }
            url.as_str().into_connection_info().map_err(|_| fault(index + 1, "does not parse"))?;
        }
        self.check_redis_master_url()
    }

    /// As above. The host is checked, because an address there would not be the one that is reached.
    fn check_redis_master_url(&self) -> Result<(), ConfigError> {
        let Some(url) = &self.redis_master_url else { return Ok(()) };
        let name = &self.redis_sentinel_master;
        let fault = |fault: &str, example: &str| {
            Err(ConfigError(format!("REDIS_MASTER_URL: {fault}; for example {example}")))
        };
        let example = format!("REDIS_MASTER_URL=redis://:password@{name}/0");
        let url = url.expose_secret();
        if !url.starts_with("redis://") && !url.starts_with("rediss://") {
            return fault("it does not begin with redis:// or rediss://", &example);
        }
        if self.redis_mode != RedisMode::Sentinel {
            return fault("it counts only with REDIS_MODE=sentinel", "REDIS_MODE=sentinel");
        }
        match url.into_connection_info().map(|info| info.addr().clone()) {
            Ok(ConnectionAddr::Tcp(host, _) | ConnectionAddr::TcpTls { host, .. }) if host == *name => Ok(()),
            Ok(_) => fault(
                &format!(
                    "its host has to be {name}, the name in REDIS_SENTINEL_MASTER: the sentinels say where the master is"
                ),
                &example,
            ),
            Err(_) => fault("it does not parse", &example),
        }
    }
}

/// The value is not shown: it may be a password.
fn check_no_control(name: &str, value: &str) -> Result<(), ConfigError> {
    let fault = if value.ends_with(['\n', '\r']) {
        "it ends with a line break, as `echo` writes it"
    } else if value.contains(char::is_control) {
        "it has a control character"
    } else {
        return Ok(());
    };
    Err(ConfigError(format!(
        "{name}: {fault}; for example create the Secret with --from-literal, or encode the value with \
         `printf %s VALUE | base64`"
    )))
}
