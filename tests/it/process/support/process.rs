//! The built binary as a process with a clean environment.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::net::SocketAddr;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use rustix::process::{Pid, Signal, kill_process};
use tests::servers::daemon::{self, dies_with_us};
use tests::{Scratch, service_binary};

use super::{Database, LIMIT, Service, eventually, shared_redis};

/// What a process is started with. Nothing is inherited.
#[derive(Clone, Debug, Default)]
pub(crate) struct Start {
    environment: Vec<(String, OsString)>,
    arguments: Vec<String>,
    files: Vec<(String, Vec<u8>)>,
    open_files: Option<u32>,
    stdin: Option<String>,
}

impl Start {
    /// Free ports on the loopback address, and nothing else.
    pub(crate) fn bare() -> Self {
        Self::default().env("HOST", "127.0.0.1").env("PORT", "0").env("OPS_PORT", "0")
    }

    /// With this database, the shared Redis and no rate limits: those count by address, and all tests have the same one.
    pub(crate) fn on(database: &Database) -> Self {
        Self::bare()
            .env("DATABASE_URL", &database.url())
            .env("REDIS_URL", &shared_redis())
            .env("LOGIN_RATE_LIMIT_PER_MINUTE", "0")
            .env("SEND_RATE_LIMIT_PER_MINUTE", "0")
            .env("REGISTER_RATE_LIMIT_PER_MINUTE", "0")
            .env("NEW_CONVERSATIONS_PER_HOUR", "0")
    }

    #[must_use]
    pub(crate) fn env(self, name: &str, value: &str) -> Self {
        self.env_bytes(name, value.as_bytes())
    }

    /// A value that need not be text.
    #[must_use]
    pub(crate) fn env_bytes(mut self, name: &str, value: &[u8]) -> Self {
        self = self.unset(name);
        self.environment.push((name.to_owned(), OsStr::from_bytes(value).to_owned()));
        self
    }

    /// Sets the variable, if there is a value for it.
    #[must_use]
    pub(crate) fn env_if(self, name: &str, value: Option<&str>) -> Self {
        match value {
            Some(value) => self.env(name, value),
            None => self,
        }
    }

    #[must_use]
    pub(crate) fn unset(mut self, name: &str) -> Self {
        self.environment.retain(|(known, _)| known != name);
        self
    }

    #[must_use]
    pub(crate) fn args(mut self, arguments: &[&str]) -> Self {
        self.arguments = arguments.iter().map(|argument| (*argument).to_owned()).collect();
        self
    }

    /// A file in the working directory.
    #[must_use]
    pub(crate) fn file(mut self, name: &str, text: impl AsRef<[u8]>) -> Self {
        self.files.push((name.to_owned(), text.as_ref().to_owned()));
        self
    }

    /// What it reads from stdin; nothing by default.
    #[must_use]
    pub(crate) fn stdin(mut self, text: &str) -> Self {
        self.stdin = Some(text.to_owned());
        self
    }

    /// Begins with this soft limit of open files.
    #[must_use]
    pub(crate) fn open_files(mut self, limit: u32) -> Self {
        self.open_files = Some(limit);
        self
    }

    pub(crate) fn spawn(&self) -> Result<Process> {
        let directory = Scratch::new("process")?;
        for (name, text) in &self.files {
            let path = directory.path().join(name);
            fs::create_dir_all(path.parent().context("a folder")?)?;
            fs::write(path, text)?;
        }
        let [stdout, stderr] = ["stdout", "stderr"].map(|name| directory.path().join(name));
        let mut command = match self.open_files {
            None => dies_with_us(&service_binary()?, "KILL"),
            Some(limit) => {
                let mut shell = dies_with_us(Path::new("/bin/sh"), "KILL");
                shell
                    .args(["-c", &format!("ulimit -Sn {limit} && exec \"$0\" \"$@\"")])
                    .arg(service_binary()?);
                shell
            }
        };
        command.env_clear().envs(self.environment.iter().cloned()).args(&self.arguments);
        command.current_dir(directory.path()).stdin(Stdio::null());
        if let Some(text) = &self.stdin {
            let stdin = directory.path().join("stdin");
            fs::write(&stdin, text)?;
            command.stdin(File::open(stdin)?);
        }
        command.stdout(File::create(&stdout)?).stderr(File::create(&stderr)?);
        let child = daemon::spawn(command)?;
        Ok(Process { child, stdout, stderr, _directory: directory })
    }

    /// Runs a command that ends on its own.
    pub(crate) fn run(&self) -> Result<Finished> {
        let mut process = self.spawn()?;
        let code = process.exit(LIMIT)?;
        Ok(Finished { code, stdout: process.stdout(), stderr: process.stderr() })
    }

    /// Starts it, and returns once it listens, ready or not.
    pub(crate) fn listen(&self) -> Result<Service> {
        let mut process = self.spawn()?;
        let addresses = daemon::poll(LIMIT, || {
            if let Some(status) = process.child.try_wait()? {
                bail!("the process ended early ({status}):\n{}{}", process.stdout(), process.stderr());
            }
            Ok(addresses(&process.stdout()))
        })?;
        let [public, operations] = addresses.context("the process does not listen")?;
        Ok(Service { process, public, operations })
    }

    /// Starts it, and returns once it is ready and reaches everything that it depends on.
    pub(crate) fn ready(&self) -> Result<Service> {
        let service = self.listen()?;
        service.becomes("ok")?;
        Ok(service)
    }
}

/// The two addresses in the log line that has them, in either format.
fn addresses(log: &str) -> Option<[SocketAddr; 2]> {
    let line = log.lines().find(|line| line.contains("listening"))?;
    let address = |name: &str| {
        let from = line.find(name)? + name.len();
        let text = line[from..].trim_start_matches(['=', '"', ':']);
        text[..text.find([' ', '"']).unwrap_or(text.len())].parse().ok()
    };
    Some([address("public")?, address("operations")?])
}

/// The outcome of a process that has ended.
#[derive(Debug)]
pub(crate) struct Finished {
    pub(crate) code: i32,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Finished {
    pub(crate) fn said(&self) -> String {
        format!("{}{}", self.stdout, self.stderr)
    }
}

#[derive(Debug)]
pub(crate) struct Process {
    child: Child,
    stdout: PathBuf,
    stderr: PathBuf,
    _directory: Scratch,
}

impl Process {
    /// Resident memory in KiB, of which /proc knows.
    pub(crate) fn resident_kib(&self) -> Result<u64> {
        self.memory_kib("VmRSS:")
    }

    /// The most that it ever was.
    pub(crate) fn peak_kib(&self) -> Result<u64> {
        self.memory_kib("VmHWM:")
    }

    fn memory_kib(&self, name: &str) -> Result<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id()))?;
        let line = status.lines().find(|line| line.starts_with(name)).context("a line of memory")?;
        Ok(line.split_whitespace().nth(1).context("a number")?.parse()?)
    }

    pub(crate) fn signal(&self, signal: Signal) -> Result<()> {
        Ok(kill_process(Pid::from_child(&self.child), signal)?)
    }

    pub(crate) fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// The exit code, or 128 plus the signal that ended it.
    pub(crate) fn exit(&mut self, limit: Duration) -> Result<i32> {
        use std::os::unix::process::ExitStatusExt as _;
        let status = daemon::poll(limit, || Ok(self.child.try_wait()?))?;
        let Some(status) = status else {
            bail!(
                "the process did not end within {} s:\n{}{}",
                limit.as_secs(),
                self.stdout(),
                self.stderr()
            );
        };
        Ok(status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or_default()))
    }

    pub(crate) fn stdout(&self) -> String {
        read(&self.stdout)
    }

    pub(crate) fn stderr(&self) -> String {
        read(&self.stderr)
    }

    pub(crate) fn said(&self) -> String {
        self.stdout() + &self.stderr()
    }

    /// The log lines with all of these words.
    pub(crate) fn lines_with(&self, words: &[&str]) -> Vec<String> {
        let log = self.stdout();
        let lines = log.lines().filter(|line| words.iter().all(|word| line.contains(word)));
        lines.map(str::to_owned).collect()
    }

    /// Waits for log lines with all of these words.
    pub(crate) fn logs(&self, words: &[&str]) -> Result<Vec<String>> {
        eventually(&format!("a log line with {words:?}"), || {
            Some(self.lines_with(words)).filter(|lines| !lines.is_empty())
        })
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if self.is_running() {
            let _ = self.child.kill();
        }
        let _ = self.child.wait();
        if thread::panicking() {
            eprintln!("the log:\n{}", daemon::tail(&self.said(), 30));
        }
    }
}

fn read(file: &Path) -> String {
    String::from_utf8_lossy(&fs::read(file).unwrap_or_default()).into_owned()
}
