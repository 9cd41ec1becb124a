//! A line between a replica and a server that can be cut, stalled, slowed, or robbed of its answers.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Handle;
use tokio::sync::{mpsc, watch};

use crate::servers::ports;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Line {
    Open,
    /// Connections break, new ones at once.
    Cut,
    /// Nothing passes. What was sent meanwhile arrives afterwards, even if whoever sent it has given up.
    Stalled,
    /// Requests pass, answers do not.
    Muted,
    /// Everything arrives that much later.
    Slow(Duration),
}

#[derive(Debug)]
pub struct Proxy {
    port: u16,
    line: watch::Sender<Line>,
}

/// Chunks under way in one direction; a peer that sends more has to wait, as on a real line.
const CHUNKS_MAX: usize = 256;
const CHUNK_BYTES: usize = 16 * 1024;

impl Proxy {
    /// Listens on a port of its own and leads to another on the loopback address.
    pub fn start(runtime: &Handle, server: u16) -> Result<Self> {
        let port = ports::free()?;
        let listener = runtime.block_on(TcpListener::bind((Ipv4Addr::LOCALHOST, port)));
        let listener = listener.with_context(|| format!("listen on port {port}"))?;
        let (line, state) = watch::channel(Line::Open);
        runtime.spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                tokio::spawn(carry(client, SocketAddr::from((Ipv4Addr::LOCALHOST, server)), state.clone()));
            }
        });
        Ok(Self { port, line })
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    pub fn set(&self, line: Line) {
        self.line.send_replace(line);
    }
}

async fn carry(client: TcpStream, server: SocketAddr, mut state: watch::Receiver<Line>) {
    if *state.borrow() == Line::Cut {
        return;
    }
    let Ok(server) = TcpStream::connect(server).await else { return };
    let _ = (client.set_nodelay(true), server.set_nodelay(true));
    let (from_client, to_client) = client.into_split();
    let (from_server, to_server) = server.into_split();
    let requests = pump(from_client, to_server, state.clone(), false);
    let answers = pump(from_server, to_client, state.clone(), true);
    tokio::select! {
        _ = async { tokio::join!(requests, answers) } => {}
        // An error means that the proxy is gone.
        _ = state.wait_for(|line| *line == Line::Cut) => {}
    }
}

/// Moves bytes in one direction until it ends; what was taken is delivered before that.
async fn pump(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    mut state: watch::Receiver<Line>,
    answers: bool,
) {
    let (sender, mut chunks) = mpsc::channel::<(Instant, Vec<u8>)>(CHUNKS_MAX);
    let read = async move {
        let mut buffer = vec![0; CHUNK_BYTES];
        while let Ok(count @ 1..) = from.read(&mut buffer).await {
            if sender.send((Instant::now(), buffer[..count].to_vec())).await.is_err() {
                return;
            }
        }
    };
    let write = async move {
        while let Some((taken, chunk)) = chunks.recv().await {
            if hold(&mut state, taken, answers).await.is_none() || to.write_all(&chunk).await.is_err() {
                return;
            }
        }
        let _ = to.shutdown().await;
    };
    tokio::join!(read, write);
}

/// Waits until the line lets a chunk pass.
async fn hold(state: &mut watch::Receiver<Line>, taken: Instant, answers: bool) -> Option<()> {
    loop {
        let line = *state.borrow_and_update();
        match line {
            Line::Open => return Some(()),
            Line::Muted if !answers => return Some(()),
            Line::Slow(delay) => {
                tokio::time::sleep_until((taken + delay).into()).await;
                return Some(());
            }
            Line::Cut => return None,
            Line::Stalled | Line::Muted => state.changed().await.ok()?,
        }
    }
}
