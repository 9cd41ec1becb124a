//! `/metrics` and `/livez` of the canary.

use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{sleep, timeout};

use super::metrics::Metrics;

/// From the first byte of a request to the last of its answer.
const LIMIT: Duration = Duration::from_secs(5);
const HEAD_MAX: usize = 8 * 1024;

/// One connection after the other: Prometheus and the kubelet are the only clients.
pub(super) async fn serve(listener: TcpListener, metrics: Arc<Metrics>) {
    loop {
        match listener.accept().await {
            // A client that goes away is no fault of the canary's.
            Ok((stream, _)) => drop(timeout(LIMIT, answer(stream, &metrics)).await),
            // Too many open files: wait until there are fewer.
            Err(_) => sleep(Duration::from_secs(1)).await,
        }
    }
}

async fn answer(mut stream: TcpStream, metrics: &Metrics) -> std::io::Result<()> {
    let mut head = Vec::new();
    while !head.windows(4).any(|end| end == b"\r\n\r\n") {
        if head.len() > HEAD_MAX || stream.read_buf(&mut head).await? == 0 {
            return Ok(());
        }
    }
    let (status, body) = if head.starts_with(b"GET /metrics ") {
        metrics.render().map_or(("500 Internal Server Error", String::new()), |text| ("200 OK", text))
    } else if head.starts_with(b"GET /livez ") {
        ("200 OK", "ok\n".to_owned())
    } else {
        ("404 Not Found", String::new())
    };
    let answer = format!(
        "HTTP/1.1 {status}\r\ncontent-type: text/plain; version=0.0.4\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(answer.as_bytes()).await?;
    stream.shutdown().await
}
