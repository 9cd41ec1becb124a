//! What a connection of a closed loop asks for.

use std::net::SocketAddr;
use std::sync::Arc;

use crate::response;

/// Requests are complete texts, so that to send one costs nothing more.
#[derive(Clone, Debug)]
pub enum Requests {
    InTurn(Vec<Vec<u8>>),
    AtRandom(Arc<[Vec<u8>]>),
    /// One at random, then this many older pages of it, each by `before`, as its `Link` says.
    Scroll {
        newest: Arc<[Vec<u8>]>,
        older: u32,
    },
}

/// `GET path` with a token.
pub fn get(address: SocketAddr, path: &str, token: &str) -> Vec<u8> {
    format!("GET {path} HTTP/1.1\r\nhost: {address}\r\nauthorization: Bearer {token}\r\n\r\n").into_bytes()
}

/// `POST path` with a JSON body.
pub fn post(address: SocketAddr, path: &str, token: Option<&str>, body: &str) -> Vec<u8> {
    let authorization = token.map(|token| format!("authorization: Bearer {token}\r\n")).unwrap_or_default();
    format!(
        "POST {path} HTTP/1.1\r\nhost: {address}\r\n{authorization}content-type: application/json\r\n\
         content-length: {}\r\n\r\n{body}",
        body.len()
    )
    .into_bytes()
}

impl Requests {
    pub(crate) fn start(self) -> Asking {
        Asking { requests: self, at: 0, older_left: 0, page: Vec::new() }
    }
}

/// One connection's place in its requests.
pub(crate) struct Asking {
    requests: Requests,
    at: usize,
    older_left: u32,
    page: Vec<u8>,
}

impl Asking {
    /// The next request, after this answer.
    pub(crate) fn next(&mut self, answer: &[u8]) -> &[u8] {
        match &self.requests {
            Requests::InTurn(all) => {
                self.at += 1;
                &all[(self.at - 1) % all.len()]
            }
            Requests::AtRandom(all) => &all[fastrand::usize(..all.len())],
            Requests::Scroll { newest, older } => {
                let oldest = if self.older_left > 0 { response::oldest_seq(answer) } else { None };
                let Some(oldest) = oldest else {
                    self.at = fastrand::usize(..newest.len());
                    self.older_left = *older;
                    return &newest[self.at];
                };
                self.older_left -= 1;
                let request = &newest[self.at];
                let end = request.windows(6).position(|text| text == b" HTTP/").unwrap_or_default();
                self.page.clear();
                self.page.extend_from_slice(&request[..end]);
                self.page.extend_from_slice(format!("&before={oldest}").as_bytes());
                self.page.extend_from_slice(&request[end..]);
                &self.page
            }
        }
    }
}
