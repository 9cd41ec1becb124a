//! Child processes that end with their use or their parent, and waits with limits.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::{LazyLock, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process, kill_process_group, test_kill_process};

use super::programs;

const POLL: Duration = Duration::from_millis(10);

/// Asks repeatedly until there is an answer, or until the time is over (`None`).
pub fn poll<T>(limit: Duration, mut ask: impl FnMut() -> Result<Option<T>>) -> Result<Option<T>> {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(answer) = ask()? {
            return Ok(Some(answer));
        }
        if Instant::now() >= deadline {
            return Ok(None);
        }
        thread::sleep(POLL);
    }
}

/// A command whose process gets `signal` when we die, even when we are killed. Only Linux can do that; elsewhere the next
/// start clears the leftovers.
pub fn dies_with_us(program: &Path, signal: &str) -> Command {
    static SETPRIV: LazyLock<Option<PathBuf>> = LazyLock::new(|| {
        let setpriv = programs::in_path("setpriv")?;
        let help = Command::new(&setpriv).arg("--help").output().ok()?;
        String::from_utf8_lossy(&help.stdout).contains("--pdeathsig").then_some(setpriv)
    });
    match &*SETPRIV {
        Some(setpriv) => {
            let mut command = Command::new(setpriv);
            command.args(["--pdeathsig", signal, "--"]).arg(program);
            command
        }
        None => Command::new(program),
    }
}

/// Starts the command in its own process group, so that Ctrl-C reaches only us, and we shut down gracefully.
///
/// The kernel sends the death signal when the *thread* that started the child ends, and tests run on short-lived
/// threads. So one thread that never ends starts them all.
pub fn spawn(mut command: Command) -> io::Result<Child> {
    type Job = (Command, mpsc::Sender<io::Result<Child>>);
    static SPAWNER: LazyLock<mpsc::Sender<Job>> = LazyLock::new(|| {
        let (sender, jobs) = mpsc::channel::<Job>();
        thread::spawn(move || {
            for (mut command, reply) in jobs {
                // The caller waits below, so the reply has a receiver.
                let _ = reply.send(command.spawn());
            }
        });
        sender
    });
    command.process_group(0);
    let (reply, answer) = mpsc::channel();
    let gone = |_| io::Error::other("the spawning thread is gone");
    SPAWNER.send((command, reply)).map_err(|_| io::Error::other("the spawning thread is gone"))?;
    answer.recv().map_err(gone)?
}

/// Runs a short command. At the limit, kills it with everything that it started.
pub fn run(command: Command, limit: Duration) -> Result<Output> {
    run_with(Stdio::null(), command, limit)
}

/// As [`run`], with an input.
pub fn run_with(input: Stdio, mut command: Command, limit: Duration) -> Result<Output> {
    let name = command.get_program().to_string_lossy().into_owned();
    command.stdin(input).stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = spawn(command).with_context(|| format!("start {name}"))?;
    let pid = Pid::from_child(&child);
    let (done, output) = mpsc::channel();
    // `wait_with_output` reads both pipes at once, so that the command cannot block on a full one.
    thread::spawn(move || done.send(child.wait_with_output()));
    match output.recv_timeout(limit) {
        Ok(output) => output.with_context(|| format!("run {name}")),
        Err(_) => {
            let _ = kill_process_group(pid, Signal::KILL);
            bail!("{name} did not end within {} s", limit.as_secs())
        }
    }
}

/// As [`run`], but a failed command is an error with its output.
pub fn run_ok(command: Command, limit: Duration) -> Result<String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = run(command, limit)?;
    if !output.status.success() {
        let printed = [output.stdout, output.stderr].concat();
        bail!("{name} failed ({}):\n{}", output.status, tail(&String::from_utf8_lossy(&printed), 20));
    }
    Ok(String::from_utf8_lossy(&output.stdout).trim_end().to_owned())
}

/// The last lines, indented below the error's own line.
pub fn tail(text: &str, lines: usize) -> String {
    let all: Vec<&str> = text.trim_end().lines().collect();
    let from = all.len().saturating_sub(lines);
    all[from..].iter().map(|line| format!("    {line}")).collect::<Vec<_>>().join("\n")
}

/// Whether the process exists and is not a zombie.
pub fn is_alive(pid: i32) -> bool {
    let Some(pid) = Pid::from_raw(pid) else { return false };
    test_kill_process(pid).is_ok() && !stat(pid.as_raw_nonzero().get()).is_some_and(|stat| stat.zombie)
}

/// The command line of a running process, which shows whether a pid file is stale.
pub fn command_line(pid: i32) -> Option<String> {
    if let Ok(raw) = fs::read(format!("/proc/{pid}/cmdline")) {
        return Some(String::from_utf8_lossy(&raw).replace('\0', " "));
    }
    let mut ps = Command::new("ps");
    ps.args(["-o", "args=", "-p", &pid.to_string()]);
    run_ok(ps, Duration::from_secs(5)).ok()
}

/// Ends a process that a killed run left behind, if its command line has `mark`: the id may belong to another process now.
pub(crate) fn stop_leftover(pid: i32, mark: &str, gentle: Signal) -> Result<()> {
    let is_ours = || is_alive(pid) && command_line(pid).is_some_and(|line| line.contains(mark));
    let Some(target) = Pid::from_raw(pid) else { return Ok(()) };
    for (signal, limit) in [(gentle, Duration::from_secs(10)), (Signal::KILL, Duration::from_secs(5))] {
        if !is_ours() {
            return Ok(());
        }
        let _ = kill_process(target, Signal::CONT);
        let _ = kill_process(target, signal);
        poll(limit, || Ok((!is_ours()).then_some(())))?;
    }
    if is_ours() {
        bail!("process {pid} of an earlier run does not end; end it by hand: kill -9 {pid}");
    }
    Ok(())
}

/// One running server program, its log and its state.
#[derive(Debug)]
pub struct Daemon {
    child: Child,
    log: PathBuf,
    paused: bool,
}

impl Daemon {
    /// Starts the program with its output appended to `log`.
    pub fn start(mut command: Command, log: &Path) -> Result<Self> {
        let output = OpenOptions::new().create(true).append(true).open(log);
        let output: File = output.with_context(|| format!("open {}", log.display()))?;
        command.stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output);
        let child = spawn(command)?;
        Ok(Self { child, log: log.to_owned(), paused: false })
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Waits until the server is ready. Its early end, or the limit, is an error with the end of its log.
    pub fn await_ready(&mut self, limit: Duration, mut ready: impl FnMut() -> bool) -> Result<()> {
        let log = self.log.clone();
        let answer = poll(limit, || match self.child.try_wait()? {
            Some(status) => Ok(Some(Err(status))),
            None => Ok(ready().then_some(Ok(()))),
        })?;
        let log_end = || tail(&fs::read_to_string(&log).unwrap_or_default(), 12);
        match answer {
            Some(Ok(())) => Ok(()),
            Some(Err(status)) => bail!("it ended early ({status}), the end of its log:\n{}", log_end()),
            None => bail!("it was not ready after {} s, the end of its log:\n{}", limit.as_secs(), log_end()),
        }
    }

    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    pub fn signal(&self, signal: Signal) {
        // It may have ended already, which the next wait reports.
        let _ = kill_process(Pid::from_child(&self.child), signal);
    }

    pub fn wait(&mut self, limit: Duration) -> Result<Option<ExitStatus>> {
        poll(limit, || Ok(self.child.try_wait()?))
    }

    /// Sends each signal in turn, and waits for the process to end until the limit after it.
    pub(crate) fn end(&mut self, signals: &[(Signal, Duration)]) -> Result<()> {
        self.resume();
        for (signal, limit) in signals {
            self.signal(*signal);
            if self.wait(*limit)?.is_some() {
                return Ok(());
            }
        }
        bail!("process {} does not end", self.id())
    }

    /// Asks it to end, and kills it after `limit`.
    pub fn stop(&mut self, limit: Duration) -> Result<()> {
        self.end(&[(Signal::TERM, limit), (Signal::KILL, Duration::from_secs(10))])
    }

    /// Kills it and its children at once, like a power failure.
    pub(crate) fn kill_all(&mut self) -> Result<()> {
        // Stopped first, it cannot start another child meanwhile.
        self.pause();
        let children = children(self.id());
        self.signal(Signal::KILL);
        for child in &children {
            let _ = kill_process(*child, Signal::KILL);
        }
        self.paused = false;
        if self.wait(Duration::from_secs(10))?.is_none() {
            bail!("process {} survives SIGKILL", self.id());
        }
        let gone = || children.iter().all(|child| !is_alive(child.as_raw_nonzero().get()));
        poll(Duration::from_secs(10), || Ok(gone().then_some(())))?;
        Ok(())
    }

    /// Freezes it with its children: connections stay open, and nothing answers.
    pub(crate) fn pause(&mut self) {
        self.paused = true;
        self.signal(Signal::STOP);
        for child in children(self.id()) {
            let _ = kill_process(child, Signal::STOP);
        }
    }

    pub(crate) fn resume(&mut self) {
        if !std::mem::take(&mut self.paused) {
            return;
        }
        for child in children(self.id()) {
            let _ = kill_process(child, Signal::CONT);
        }
        self.signal(Signal::CONT);
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if self.is_running() {
            let _ = self.kill_all();
        }
    }
}

struct Stat {
    parent: i32,
    zombie: bool,
}

/// What /proc says about a process; `None` without /proc, or when the process is gone.
fn stat(pid: i32) -> Option<Stat> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name in parentheses may itself hold spaces and parentheses: the fields begin after the last one.
    let mut fields = text.rsplit_once(')')?.1.split_whitespace();
    let zombie = fields.next()? == "Z";
    Some(Stat { parent: fields.next()?.parse().ok()?, zombie })
}

/// The direct children. Each Postgres backend is a session leader, so a process group would not include it.
fn children(parent: u32) -> Vec<Pid> {
    let Ok(parent) = i32::try_from(parent) else { return Vec::new() };
    if let Ok(entries) = fs::read_dir("/proc") {
        return entries
            .flatten()
            .filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok())
            .filter(|pid| stat(*pid).is_some_and(|stat| stat.parent == parent))
            .filter_map(Pid::from_raw)
            .collect();
    }
    let mut pgrep = Command::new("pgrep");
    pgrep.args(["-P", &parent.to_string()]);
    let list = run_ok(pgrep, Duration::from_secs(5)).unwrap_or_default();
    list.split_whitespace().filter_map(|pid| Pid::from_raw(pid.parse().ok()?)).collect()
}
