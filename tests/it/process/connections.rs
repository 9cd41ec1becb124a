//! Connections: how long one may be idle, and what a stopping process does with those that have just come.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use h2::client::SendRequest;
use rustix::process::Signal;

use super::support::{Database, LIMIT, Service, Start};

/// A connection on which the client speaks HTTP/1.1 itself.
struct Raw(TcpStream);

impl Raw {
    fn connect(address: SocketAddr) -> Result<Self> {
        let stream = TcpStream::connect(address)?;
        stream.set_read_timeout(Some(LIMIT))?;
        Ok(Self(stream))
    }

    fn says(&mut self, bytes: &str) -> Result<()> {
        Ok(self.0.write_all(bytes.as_bytes())?)
    }

    /// The status of the next response, which has a `content-length`.
    fn status(&mut self) -> Result<u16> {
        let (mut head, mut byte) = (Vec::new(), [0]);
        while !head.ends_with(b"\r\n\r\n") {
            ensure!(self.0.read(&mut byte)? == 1, "closed without a response");
            head.extend(byte);
        }
        let head = String::from_utf8(head)?.to_ascii_lowercase();
        let length = head.lines().find_map(|line| line.strip_prefix("content-length: "));
        let mut body = vec![0; length.context("a length")?.parse()?];
        self.0.read_exact(&mut body)?;
        head.split(' ').nth(1).context("a status")?.parse().context("a status")
    }

    fn get(&mut self, path: &str) -> Result<u16> {
        self.says(&format!("GET {path} HTTP/1.1\r\nhost: test\r\n\r\n"))?;
        self.status()
    }

    /// When the service closes the connection. Nothing may be sent before.
    fn closed(&mut self) -> Result<Instant> {
        match self.0.read(&mut [0; 64]) {
            Ok(0) => Ok(Instant::now()),
            Ok(_) => bail!("a response to nothing"),
            Err(error) => Err(error).context("not closed"),
        }
    }
}

/// An HTTP/2 connection. Its task answers pings.
async fn http2(address: SocketAddr) -> Result<SendRequest<bytes::Bytes>> {
    let stream = tokio::net::TcpStream::connect(address).await?;
    let (sender, connection) = h2::client::handshake(stream).await?;
    tokio::spawn(connection);
    Ok(sender)
}

async fn get_http2(sender: &SendRequest<bytes::Bytes>, address: SocketAddr) -> Result<u16> {
    let request = http::Request::get(format!("http://{address}/healthz")).body(())?;
    let (response, _) = sender.clone().ready().await?.send_request(request, true)?;
    Ok(response.await?.status().as_u16())
}

fn pause_until(since: Instant, seconds: f32) {
    thread::sleep((since + Duration::from_secs_f32(seconds)).saturating_duration_since(Instant::now()));
}

#[test]
fn by_default_an_idle_connection_is_kept_for_more_than_30_s_and_half_a_head_is_not() -> Result<()> {
    let database = Database::create()?;
    let service = Start::on(&database).ready()?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let mut idle = [Raw::connect(service.public)?, Raw::connect(service.operations)?];
    for connection in &mut idle {
        ensure!(connection.get("/healthz")? == 200);
    }
    let used = runtime.block_on(http2(service.public))?;
    ensure!(runtime.block_on(get_http2(&used, service.public))? == 200);
    let unused = runtime.block_on(http2(service.public))?;
    let mut slow = Vec::new();
    for address in [service.public, service.operations] {
        slow.extend([(Raw::connect(address)?, ""), (Raw::connect(address)?, "GET /healthz HT")]);
    }
    let started = Instant::now();
    for (connection, head) in &mut slow {
        connection.says(head)?;
    }
    for (connection, head) in &mut slow {
        let taken = connection.closed().with_context(|| format!("after {head:?}"))? - started;
        ensure!((29..33).contains(&taken.as_secs()), "{head:?}: closed after {taken:?}");
    }
    pause_until(started, 32.0);
    for connection in &mut idle {
        ensure!(connection.get("/healthz")? == 200);
    }
    for sender in [&used, &unused] {
        ensure!(runtime.block_on(get_http2(sender, service.public))? == 200);
    }
    Ok(())
}

#[test]
fn keep_alive_seconds_is_how_long_an_idle_connection_is_kept() -> Result<()> {
    let database = Database::create()?;
    let service = Start::on(&database).env("KEEP_ALIVE_SECONDS", "5").ready()?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let mut idle = [Raw::connect(service.public)?, Raw::connect(service.operations)?];
    let sender = runtime.block_on(http2(service.public))?;
    for pause in [0.0, 3.5] {
        pause_until(Instant::now(), pause);
        for connection in &mut idle {
            ensure!(connection.get("/healthz")? == 200);
        }
        ensure!(runtime.block_on(get_http2(&sender, service.public))? == 200);
    }
    let started = Instant::now();
    for connection in &mut idle {
        let taken = connection.closed()? - started;
        ensure!((4..9).contains(&taken.as_secs()), "closed after {taken:?}");
    }
    pause_until(started, 8.0);
    let refused = runtime.block_on(get_http2(&sender, service.public));
    ensure!(refused.is_err(), "the HTTP/2 connection is still served: {refused:?}");
    Ok(())
}

/// Sends SIGTERM, and stops the process's threads shortly before the end of the time for load balancers, so that a client
/// that connects now is in the kernel's queue when the process closes its listener.
fn frozen_at_the_stop(service: &Service) -> Result<()> {
    service.process.signal(Signal::TERM)?;
    service.process.logs(&["stopping: no longer ready"])?;
    thread::sleep(Duration::from_millis(600));
    service.process.signal(Signal::STOP)
}

#[test]
fn a_connection_that_the_kernel_took_before_the_stop_gets_its_response() -> Result<()> {
    const CLIENTS: usize = 60;
    let database = Database::create()?;
    let mut service = Start::on(&database).env("SHUTDOWN_GRACE_SECONDS", "30").ready()?;
    frozen_at_the_stop(&service)?;
    let mut clients = Vec::new();
    for _ in 0..CLIENTS {
        clients.push(Raw::connect(service.public)?);
    }
    const GET: &str = "GET /me HTTP/1.1\r\nhost: test\r\n\r\n";
    let (early, late) = clients.split_at_mut(CLIENTS / 2);
    for client in &mut *early {
        client.says(GET)?;
    }
    // The time for load balancers ends while the process stands still.
    thread::sleep(Duration::from_millis(900));
    service.process.signal(Signal::CONT)?;
    thread::sleep(Duration::from_millis(30));
    for client in &mut *late {
        client.says(GET).ok();
    }
    for (number, client) in clients.iter_mut().enumerate() {
        let status = client.status().with_context(|| format!("client {number} of {CLIENTS}"))?;
        ensure!(status == 401, "{status}");
    }
    ensure!(service.process.exit(LIMIT)? == 0, "{}", service.process.said());
    Ok(())
}
