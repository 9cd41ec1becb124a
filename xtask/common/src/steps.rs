//! One step of a command: a line while it runs, a line with its time when it is done, and for a failure the end of its
//! output with the fix.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, PipeReader, Write};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use harness::servers::daemon;
use indicatif::{ProgressBar, ProgressStyle};
use rustix::process::{Pid, Signal, kill_process, kill_process_group};

use crate::{dry_run, signals, workspace};

/// No step takes nearly as long, even from an empty target directory on a small machine.
const STEP_LIMIT: Duration = Duration::from_secs(3600);
/// Names the file to which an included command writes its counts.
const COUNTS: &str = "XTASK_COUNTS";
const NAME_WIDTH: usize = 24;
const TAIL_LINES: usize = 60;

/// Runs one step under a progress line.
pub fn step<T>(name: &str, work: impl FnOnce(&Progress) -> Result<T>) -> Result<T> {
    signals::check()?;
    let progress = Progress::start(name);
    let outcome = work(&progress);
    progress.finish(outcome.is_ok());
    outcome
}

/// Counts checks: each step is one, a test run counts its tests.
#[derive(Debug, Default)]
pub struct Tally {
    pub passed: u64,
    pub failed: u64,
}

impl Tally {
    /// Runs a step that counts as one check. A failure is shown with its fix and does not end the command.
    pub fn check<T>(
        &mut self,
        name: &str,
        fix: &str,
        work: impl FnOnce(&Progress) -> Result<T>,
    ) -> Option<T> {
        match step(name, work) {
            Ok(value) => {
                self.passed += 1;
                Some(value)
            }
            // An interrupted command prints that once, at its end.
            Err(_) if signals::asked_to_end() => None,
            Err(error) => {
                self.failed += 1;
                println!("{error:#}");
                if !fix.is_empty() {
                    println!("  fix: {fix}");
                }
                None
            }
        }
    }

    /// Runs another of our commands in this terminal, and adds its counts.
    pub fn include(&mut self, mut command: Command) -> Result<()> {
        signals::check()?;
        let counts = workspace::log_file("counts")?;
        let _ = fs::remove_file(&counts);
        let mut child = command.env(COUNTS, &counts).stdin(Stdio::null()).spawn()?;
        while child.try_wait()?.is_none() {
            if signals::asked_to_end() {
                // Ctrl-C has reached it as well; two signals within a second count as one.
                let _ = kill_process(Pid::from_child(&child), Signal::TERM);
                child.wait()?;
                return Ok(());
            }
            thread::sleep(Duration::from_millis(50));
        }
        let text = fs::read_to_string(&counts).unwrap_or_default();
        let (passed, failed) = text.split_once(' ').context("it ended early, see above")?;
        self.passed += passed.parse::<u64>()?;
        self.failed += failed.parse::<u64>()?;
        Ok(())
    }

    /// Prints the last line, which CI reads; an included command writes its counts to a file instead.
    pub fn close(&self) -> std::process::ExitCode {
        if signals::asked_to_end() {
            println!("  interrupted");
            return std::process::ExitCode::from(130);
        }
        if let Some(file) = std::env::var_os(COUNTS) {
            // Without the file, the including command counts a failure.
            let _ = fs::write(file, format!("{} {}", self.passed, self.failed));
            return std::process::ExitCode::from(u8::from(self.failed > 0));
        }
        println!("\n{} passed, {} failed", self.passed, self.failed);
        std::process::ExitCode::from(u8::from(self.failed > 0))
    }
}

/// The line of a running step.
#[derive(Debug)]
pub struct Progress {
    name: String,
    bar: ProgressBar,
    started: Instant,
}

impl Progress {
    fn start(name: &str) -> Self {
        let bar = if dry_run::is_on() { ProgressBar::hidden() } else { ProgressBar::new_spinner() };
        if dry_run::is_on() {
            println!("# {name}");
        } else if bar.is_hidden() {
            // No terminal: the name now, the outcome later.
            print!("  {name:<NAME_WIDTH$}");
            let _ = std::io::stdout().flush();
        } else {
            let template = format!("{{spinner}} {{prefix:{NAME_WIDTH}}} {{elapsed:>4}}  {{wide_msg:.dim}}");
            bar.set_style(ProgressStyle::with_template(&template).expect("a valid template"));
            bar.set_prefix(name.to_owned());
            bar.enable_steady_tick(Duration::from_millis(120));
        }
        Self { name: name.to_owned(), bar, started: Instant::now() }
    }

    fn finish(self, passed: bool) {
        let outcome = format!(
            "{:<5}{:>6.1} s",
            if passed { "ok" } else { "FAIL" },
            self.started.elapsed().as_secs_f32()
        );
        let hidden = self.bar.is_hidden();
        self.bar.finish_and_clear();
        if dry_run::is_on() {
            return;
        }
        if hidden {
            println!("{outcome}");
        } else {
            println!("  {:<NAME_WIDTH$}{outcome}", self.name);
        }
    }

    /// Shows the current state of the step.
    pub fn say(&self, line: &str) {
        // Escape sequences would survive the bar's shortening only by half.
        let plain: String = line.chars().filter(|c| !c.is_control()).collect();
        self.bar.set_message(plain);
    }

    /// Prints a line that stays.
    pub fn note(&self, line: &str) {
        if dry_run::is_on() {
            println!("# {line}");
        } else if self.bar.is_hidden() {
            println!("{line}");
            print!("  {:<NAME_WIDTH$}", "");
            let _ = std::io::stdout().flush();
        } else {
            self.bar.suspend(|| println!("  {line}"));
        }
    }

    /// Runs a command to its end and returns its output. A failure names the file that keeps all of it. A dry run prints
    /// the command, and returns nothing.
    pub fn run(&self, command: Command) -> Result<String> {
        self.run_counted(command, |_| ())
    }

    /// As [`Self::run`], and each line is shown to `see` as it comes, also those of a command that fails later.
    pub fn run_counted(&self, command: Command, see: impl FnMut(&str)) -> Result<String> {
        if dry_run::is_on() {
            println!("{}", dry_run::shell_line(&command));
            return Ok(String::new());
        }
        self.follow(Job::start(&self.name, command)?, see)
    }

    /// Shows a command that was started before, and waits for its end.
    pub fn join(&self, job: Job) -> Result<String> {
        self.follow(job, |_| ())
    }

    fn follow(&self, mut job: Job, see: impl FnMut(&str)) -> Result<String> {
        let output = self.read(&mut job, see);
        if output.is_err() {
            job.terminate();
        }
        let Some(status) = daemon::poll(Duration::from_secs(20), || Ok(job.child.try_wait()?))? else {
            bail!("{} does not end and is killed", job.program);
        };
        let output = output?;
        if !status.success() {
            let tail = daemon::tail(&without_progress(&output), TAIL_LINES);
            bail!("{tail}\n  {status}; all of its output: {}", workspace::shown(&job.log));
        }
        Ok(output)
    }

    /// Reads lines until the command closes its output, or has ended and left it to a straggler that says nothing.
    fn read(&self, job: &mut Job, mut see: impl FnMut(&str)) -> Result<String> {
        let deadline = Instant::now() + STEP_LIMIT;
        let mut output = String::new();
        let mut ended = false;
        loop {
            match job.lines.recv_timeout(Duration::from_millis(100)) {
                Ok(line) => {
                    self.say(line.trim());
                    see(&line);
                    output += &line;
                    output.push('\n');
                }
                Err(RecvTimeoutError::Disconnected) => return Ok(output),
                Err(RecvTimeoutError::Timeout) if ended => return Ok(output),
                // Once more: on a busy machine the thread that reads may not have had its turn yet.
                Err(RecvTimeoutError::Timeout) => ended = job.child.try_wait()?.is_some(),
            }
            signals::check()?;
            if Instant::now() >= deadline {
                bail!("no end after {} min", STEP_LIMIT.as_secs() / 60);
            }
        }
    }
}

/// A command that runs beside other steps. Dropping it ends it.
#[derive(Debug)]
pub struct Job {
    program: String,
    child: Child,
    lines: Receiver<String>,
    log: PathBuf,
}

impl Job {
    /// Starts the command. Its output is kept in a file named after the step.
    pub fn start(step: &str, mut command: Command) -> Result<Self> {
        let log = workspace::log_file(step)?;
        let (reader, writer) = std::io::pipe()?;
        command.stdin(Stdio::null()).stdout(writer.try_clone()?).stderr(writer);
        let program = command.get_program().to_string_lossy().into_owned();
        let child = daemon::spawn(command).with_context(|| format!("start {program}"))?;
        Ok(Self { program, child, lines: lines_of(reader, File::create(&log)?), log })
    }

    /// Sends SIGTERM to its process group.
    fn terminate(&self) {
        let _ = kill_process_group(Pid::from_child(&self.child), Signal::TERM);
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            self.terminate();
            if !matches!(daemon::poll(Duration::from_secs(5), || Ok(self.child.try_wait()?)), Ok(Some(_))) {
                let _ = kill_process_group(Pid::from_child(&self.child), Signal::KILL);
                let _ = self.child.wait();
            }
        }
    }
}

/// Without cargo's progress lines, which would push the error out of the tail.
fn without_progress(output: &str) -> String {
    const AT_WORK: [&str; 9] = [
        "Blocking",
        "Checking",
        "Compiling",
        "Documenting",
        "Downloaded",
        "Downloading",
        "Fresh",
        "Locking",
        "Updating",
    ];
    let is_news = |line: &&str| !line.split_whitespace().next().is_some_and(|word| AT_WORK.contains(&word));
    output.lines().filter(is_news).collect::<Vec<_>>().join("\n")
}

/// The output's lines, while they are also written to a file.
fn lines_of(reader: PipeReader, mut log: File) -> Receiver<String> {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        for line in BufReader::new(reader).split(b'\n').map_while(Result::ok) {
            let line = String::from_utf8_lossy(&line).into_owned();
            // A full disk must not end the step: its output still goes to the reader.
            let _ = writeln!(log, "{line}");
            if sender.send(line).is_err() {
                return;
            }
        }
    });
    receiver
}
