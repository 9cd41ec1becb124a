//! `chat-service healthcheck`: asks a running instance for its readiness, in images without a shell and curl.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use crate::config::Config;

const TIMEOUT: Duration = Duration::from_secs(3);
const INTERVAL: Duration = Duration::from_millis(250);

#[derive(clap::Args, Debug)]
pub struct Args {
    /// How long to wait for an instance that is not ready
    #[arg(long, default_value_t = 0, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(..=86_400))]
    pub wait: u32,
}

/// Asks the instance on this machine whether it is ready, and again for as long as `wait` while it is not.
pub fn run(config: &Config, wait: Duration) -> ExitCode {
    let host = match config.host {
        IpAddr::V4(Ipv4Addr::UNSPECIFIED) => IpAddr::V4(Ipv4Addr::LOCALHOST),
        IpAddr::V6(Ipv6Addr::UNSPECIFIED) => IpAddr::V6(Ipv6Addr::LOCALHOST),
        host => host,
    };
    let address = SocketAddr::new(host, config.ops_port);
    let deadline = Instant::now() + wait;
    loop {
        let fault = match ask(address) {
            Ok(status) if status.contains(" 200 ") => return ExitCode::SUCCESS,
            Ok(status) => format!("not ready: http://{address}/healthz answers {status}"),
            Err(error) => {
                format!("no answer from http://{address}/healthz: {error}; is OPS_PORT the instance's?")
            }
        };
        if Instant::now() >= deadline {
            eprintln!("{fault}");
            return ExitCode::FAILURE;
        }
        std::thread::sleep(INTERVAL);
    }
}

/// The status line of a GET.
fn ask(address: SocketAddr) -> std::io::Result<String> {
    let mut stream = TcpStream::connect_timeout(&address, TIMEOUT)?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.set_write_timeout(Some(TIMEOUT))?;
    write!(stream, "GET /healthz HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n")?;
    let mut answer = Vec::new();
    stream.take(64 * 1024).read_to_end(&mut answer)?;
    let answer = String::from_utf8_lossy(&answer);
    Ok(answer.lines().next().unwrap_or("nothing").to_owned())
}
