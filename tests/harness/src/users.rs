//! Users of the service who have logged in.

use std::net::SocketAddr;

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

use crate::http::Client;

pub const PASSWORD: &str = "correct horse battery";

#[derive(Clone, Debug)]
pub struct User {
    pub id: String,
    pub name: String,
    pub token: String,
}

impl User {
    /// Registers a user of this name, which has to be new, and logs in.
    pub fn register(service: SocketAddr, name: &str) -> Result<Self> {
        let body = json!({"username": name, "email": format!("{name}@example.com"), "password": PASSWORD});
        let answer = Client::new(service).expect(201, "POST", "/register", None, &body.to_string())?;
        let mut user = Self { id: text(&answer, "id")?, name: name.to_owned(), token: String::new() };
        user.log_in(service)?;
        Ok(user)
    }

    /// Gets a new token.
    pub fn log_in(&mut self, service: SocketAddr) -> Result<()> {
        let body = json!({"username": self.name, "password": PASSWORD}).to_string();
        let answer = Client::new(service).expect(200, "POST", "/login", None, &body)?;
        self.token = text(&answer, "access_token")?;
        Ok(())
    }
}

fn text(value: &Value, field: &str) -> Result<String> {
    value[field].as_str().map(str::to_owned).with_context(|| format!("no {field} in {value}"))
}
