//! What the user has set: the environment, then `.env`, in the service's own order.

use std::collections::HashMap;
use std::env;
use std::path::Path;

use anyhow::{Context, Result};

#[derive(Debug, Default)]
pub(crate) struct Settings {
    given: HashMap<String, String>,
}

impl Settings {
    pub(crate) fn read(dot_env: &Path) -> Result<Self> {
        let mut given = HashMap::new();
        if dot_env.exists() {
            for pair in dotenvy::from_path_iter(dot_env).context("read .env")? {
                let (name, value) = pair.context("read .env")?;
                given.insert(name, value);
            }
        }
        given.extend(
            env::vars_os()
                .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?))),
        );
        Ok(Self { given })
    }

    pub(crate) fn get(&self, name: &str) -> Option<&str> {
        self.given.get(name).map(String::as_str).filter(|value| !value.is_empty())
    }
}
