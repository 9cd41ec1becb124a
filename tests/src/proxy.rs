//! A TCP proxy between a replica and a server. It can cut, stall or slow the link, or withhold the responses.

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
pub enum Link {
    Open,
    /// Open connections are closed, new ones at once.
    Cut,
    /// Nothing passes. What was sent in the meantime is delivered afterwards, even when its sender has given up.
    Stalled,
    /// As after the death of a machine that another has replaced: a connection that is used now never answers again, also
    /// once the link is open.
    Lost,
    /// Requests pass, responses do not.
    Muted,
    /// Everything is delayed by this much.
    Slow(Duration),
}

#[derive(Debug)]
pub struct Proxy {
    port: u16,
    server: watch::Sender<u16>,
    link: watch::Sender<Link>,
}

/// Chunks in flight in one direction. A peer that sends more has to wait, as on a real link.
const CHUNKS_MAX: usize = 256;
const CHUNK_BYTES: usize = 16 * 1024;

impl Proxy {
    /// Listens on a free loopback port and forwards to another one.
    pub fn start(runtime: &Handle, server: u16) -> Result<Self> {
        let port = ports::free()?;
        let listener = runtime.block_on(TcpListener::bind((Ipv4Addr::LOCALHOST, port)));
        let listener = listener.with_context(|| format!("listen on port {port}"))?;
        let (link, state) = watch::channel(Link::Open);
        let (server, target) = watch::channel(server);
        runtime.spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                tokio::spawn(carry(client, target.clone(), state.clone()));
            }
        });
        Ok(Self { port, server, link })
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    pub fn set(&self, link: Link) {
        self.link.send_replace(link);
    }

    /// Closes open connections, and forwards new ones to this port.
    pub fn lead_to(&self, server: u16) {
        self.server.send_replace(server);
    }
}

async fn carry(client: TcpStream, mut target: watch::Receiver<u16>, mut state: watch::Receiver<Link>) {
    if *state.borrow() == Link::Cut {
        return;
    }
    let port = *target.borrow_and_update();
    let server = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let Ok(server) = TcpStream::connect(server).await else { return };
    let _ = (client.set_nodelay(true), server.set_nodelay(true));
    let (from_client, to_client) = client.into_split();
    let (from_server, to_server) = server.into_split();
    let requests = pump(from_client, to_server, state.clone(), false);
    let responses = pump(from_server, to_client, state.clone(), true);
    tokio::select! {
        _ = async { tokio::join!(requests, responses) } => {}
        // An error means that the proxy is gone.
        _ = state.wait_for(|link| *link == Link::Cut) => {}
        _ = target.changed() => {}
    }
}

/// Moves bytes in one direction until the sender ends it; what was read by then is still delivered.
async fn pump(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    mut state: watch::Receiver<Link>,
    is_response: bool,
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
        while let Some((read_at, chunk)) = chunks.recv().await {
            if hold(&mut state, read_at, is_response).await.is_none() || to.write_all(&chunk).await.is_err() {
                return;
            }
        }
        let _ = to.shutdown().await;
    };
    tokio::join!(read, write);
}

/// Waits until the link lets a chunk pass.
async fn hold(state: &mut watch::Receiver<Link>, read_at: Instant, is_response: bool) -> Option<()> {
    loop {
        let link = *state.borrow_and_update();
        match link {
            Link::Open => return Some(()),
            Link::Muted if !is_response => return Some(()),
            Link::Slow(delay) => {
                tokio::time::sleep_until((read_at + delay).into()).await;
                return Some(());
            }
            Link::Cut => return None,
            Link::Lost => std::future::pending().await,
            Link::Stalled | Link::Muted => state.changed().await.ok()?,
        }
    }
}
