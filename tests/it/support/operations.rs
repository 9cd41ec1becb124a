//! The operations of the OpenAPI document, each with a request that succeeds. Tests of all operations use them.

use std::collections::BTreeSet;
use std::fmt::{self, Display};

use reqwest::Method;
use serde_json::{Value, json};

use super::{PASSWORD, Request, TestApp, User, document, session};

#[derive(Debug)]
pub(crate) struct Operation {
    pub(crate) method: Method,
    /// As in the document: `/users/{username}`.
    pub(crate) path: String,
    /// What the document has of it.
    pub(crate) documented: Value,
}

impl Display for Operation {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{} {}", self.method, self.path)
    }
}

/// Every operation of the document.
pub(crate) fn operations() -> Vec<Operation> {
    let mut operations = Vec::new();
    for (path, item) in document()["paths"].as_object().expect("paths") {
        for (method, documented) in item.as_object().expect("a path's operations") {
            let method = Method::from_bytes(method.to_uppercase().as_bytes()).expect("a method");
            operations.push(Operation { method, path: path.clone(), documented: documented.clone() });
        }
    }
    operations
}

impl Operation {
    pub(crate) fn statuses(&self) -> BTreeSet<u16> {
        let responses = self.documented["responses"].as_object().expect("responses");
        responses.keys().map(|status| status.parse().expect("a status")).collect()
    }

    /// The path and the body of a request about `ben` that succeeds. An operation with parameters or a body is added here.
    /// What it creates is named by `name`, which must be new.
    pub(crate) fn example(&self, ben: &User, name: &str) -> (String, Option<Value>) {
        let path = self.path.clone();
        match self.to_string().as_str() {
            "POST /register" => {
                let email = format!("{name}@example.com");
                (path, Some(json!({"username": name, "email": email, "password": PASSWORD})))
            }
            "POST /login" => (path, Some(json!({"username": ben.name, "password": PASSWORD}))),
            // The name is a refresh token here, or else the token is unknown.
            "POST /refresh" => {
                let unknown = "A".repeat(64);
                let token = if name.len() == unknown.len() { name } else { &unknown };
                (path, Some(json!({"refresh_token": token})))
            }
            "POST /logout" | "POST /logout-all" => (path, None),
            "POST /password" => {
                (path, Some(json!({"current_password": PASSWORD, "new_password": format!("new {name}")})))
            }
            // The name is the password here.
            "DELETE /me" => (path, Some(json!({"password": name}))),
            // Of the caller's sessions the one of this token.
            "DELETE /sessions/{id}" => {
                let session = (!ben.token.is_empty()).then(|| session(&ben.token));
                (format!("/sessions/{}", session.unwrap_or_else(|| ben.id.clone())), None)
            }
            "PUT /blocks/{user_id}" | "DELETE /blocks/{user_id}" => (format!("/blocks/{}", ben.id), None),
            "POST /send" => (path, Some(json!({"recipient_id": ben.id, "content": name}))),
            "GET /messages" => (format!("{path}?peer_id={}", ben.id), None),
            "GET /users/{username}" => (format!("/users/{}", ben.name), None),
            _ if self.method == Method::GET && !path.contains('{') => (path, None),
            _ => panic!("no example of a request for {self}: add one here"),
        }
    }

    /// The example as a request, without a token.
    pub(crate) fn request(&self, app: &TestApp, ben: &User, name: &str) -> Request {
        let (path, body) = self.example(ben, name);
        let request = app.request(self.method.clone(), &path);
        body.iter().fold(request, |request, body| request.json(body))
    }
}
