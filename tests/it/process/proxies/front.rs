//! A proxy in front of a service.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use tests::servers::daemon::{self, Daemon};
use tests::servers::{ports, programs};
use tests::{Scratch, install};

use crate::process::support::{Database, Service, Start, User};

const START_LIMIT: Duration = Duration::from_secs(20);

/// A running proxy, and the service behind it.
pub(super) struct Front {
    pub(super) address: SocketAddr,
    pub(super) service: Service,
    pub(super) ana: User,
    pub(super) ben: User,
    _proxy: Daemon,
    _directory: Scratch,
    _database: Database,
}

impl Front {
    /// Starts a service, and the proxy with an example's configuration after `change`.
    pub(super) fn start(
        example: &str,
        change: impl FnOnce(String) -> String,
        command: impl FnOnce(&Path, &Path) -> Result<Command>,
    ) -> Result<Self> {
        let database = Database::create()?;
        let start = Start::on(&database).env("STREAMS_PER_USER_MAX", "1000");
        let service = start.env("STREAM_DRAIN_SECONDS", "0").ready()?;
        let (ana, ben) = service.two_users()?;
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/examples").join(example);
        let port = ports::free()?;
        let text = fs::read_to_string(&file).with_context(|| format!("read {}", file.display()))?;
        let text = replaced(&text, "127.0.0.1:8000", &service.public.to_string())?;
        let text = replaced(&text, "8080", &port.to_string())?;
        let directory = Scratch::new("proxy")?;
        let configuration = directory.path().join(example);
        fs::write(&configuration, change(text))?;
        let mut proxy =
            Daemon::start(command(directory.path(), &configuration)?, &directory.path().join("log"))?;
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        proxy.await_ready(START_LIMIT, || TcpStream::connect(address).is_ok())?;
        Ok(Self { address, service, ana, ben, _proxy: proxy, _directory: directory, _database: database })
    }
}

/// What the example has, changed. An example that lacks it would prove nothing.
pub(super) fn replaced(text: &str, from: &str, to: &str) -> Result<String> {
    ensure!(text.contains(from), "the example has no {from:?}");
    Ok(text.replace(from, to))
}

/// Finds a program of a package of the same name, or installs it.
pub(super) fn program(name: &str) -> Result<PathBuf> {
    let find = || {
        let elsewhere = ["/usr/sbin", "/usr/local/sbin"].map(|dir| Path::new(dir).join(name));
        programs::in_path(name).or_else(|| elsewhere.into_iter().find(|path| path.is_file()))
    };
    if find().is_none() && install::can_install() {
        install::install(&[name])?;
    }
    let command = format!(
        "{name} is not installed. Install by hand: sudo apt-get install {name}, or brew install {name}"
    );
    find().context(command)
}

pub(super) fn dies_with_us(program: &Path) -> Command {
    daemon::dies_with_us(program, "TERM")
}
