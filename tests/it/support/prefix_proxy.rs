//! A reverse proxy that serves the service under a prefix and strips it, as an ingress does.

use std::net::{Ipv4Addr, SocketAddr};

use reqwest::Url;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

/// Ends when it is dropped.
pub(crate) struct PrefixProxy {
    address: SocketAddr,
    prefix: &'static str,
    _accepting: JoinSet<()>,
}

impl PrefixProxy {
    /// `prefix` begins with a slash and does not end with one.
    pub(crate) async fn start(server: SocketAddr, prefix: &'static str) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("a free port");
        let address = listener.local_addr().expect("an address");
        let mut accepting = JoinSet::new();
        accepting.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((client, _)) = listener.accept().await {
                connections.spawn(async move { carry(client, server, prefix).await.unwrap_or_default() });
            }
        });
        Self { address, prefix, _accepting: accepting }
    }

    /// The URL of a path below the prefix.
    pub(crate) fn url(&self, path: &str) -> Url {
        Url::parse(&format!("http://{}{}{path}", self.address, self.prefix)).expect("a URL")
    }
}

/// One request without a body, and its response. What is not below the prefix gets 502, which the service never answers.
async fn carry(mut client: TcpStream, server: SocketAddr, prefix: &str) -> Option<()> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(client.read_u8().await.ok()?);
    }
    let head = String::from_utf8(head).ok()?;
    let (line, headers) = head.split_once("\r\n")?;
    let (method, target) = line.split_once(' ')?;
    let Some(rest) = target.strip_prefix(prefix).filter(|rest| rest.starts_with('/')) else {
        let refused = "HTTP/1.1 502 Not below the prefix\r\nx-request-id: proxy\r\ncontent-length: 0\r\nconnection: close\r\n\r\n";
        return client.write_all(refused.as_bytes()).await.ok();
    };
    let mut server = TcpStream::connect(server).await.ok()?;
    let request = format!("{method} {rest}\r\nconnection: close\r\n{headers}");
    server.write_all(request.as_bytes()).await.ok()?;
    tokio::io::copy(&mut server, &mut client).await.ok()?;
    Some(())
}
