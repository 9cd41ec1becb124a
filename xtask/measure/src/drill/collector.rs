//! A minimal OTLP collector for the traces of the replicas, which can be stopped.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context as _, Result};
use harness::servers::ports;

use super::scene::lock;

const POLL: Duration = Duration::from_millis(50);
/// Longer than an exporter keeps a connection silent.
const SILENCE_LIMIT: Duration = Duration::from_secs(2);

pub(super) struct Collector {
    pub(super) port: u16,
    stop: Arc<AtomicBool>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Collector {
    pub(super) fn start() -> Result<Self> {
        let collector = Self { port: ports::free()?, stop: Arc::default(), thread: Mutex::default() };
        collector.listen()?;
        Ok(collector)
    }

    /// Answers on its port, from now on.
    pub(super) fn listen(&self) -> Result<()> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, self.port));
        let listener = listener.with_context(|| format!("listen on port {}", self.port))?;
        listener.set_nonblocking(true)?;
        self.stop.store(false, Ordering::Relaxed);
        let stop = Arc::clone(&self.stop);
        *lock(&self.thread) = Some(thread::spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                match listener.accept() {
                    // The exporter notices a broken connection.
                    Ok((stream, _)) => drop(answer(stream)),
                    Err(_) => thread::sleep(POLL),
                }
            }
        }));
        Ok(())
    }

    /// From now on connections are refused.
    pub(super) fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = lock(&self.thread).take() {
            let _ = thread.join();
        }
    }
}

impl Drop for Collector {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Receives one export. The next one needs a new connection, which a stopped collector refuses.
fn answer(stream: TcpStream) -> Result<()> {
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(SILENCE_LIMIT))?;
    let mut reader = BufReader::new(stream);
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        anyhow::ensure!(reader.read_line(&mut head)? > 0, "the connection ended");
    }
    let head = head.to_lowercase();
    let length = head.lines().find_map(|line| line.strip_prefix("content-length:"));
    let mut body = vec![0; length.context("a length")?.trim().parse()?];
    reader.read_exact(&mut body)?;
    reader.get_mut().write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")?;
    Ok(())
}
