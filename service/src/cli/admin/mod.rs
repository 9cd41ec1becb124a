//! `chat-service admin`: what operators do to users and conversations. One file for each noun.

mod context;
mod conversations;
mod messages;
mod user;

use std::io::Write as _;
use std::process::ExitCode;

use clap::Subcommand;

use self::context::{Answer, Options};
use crate::config::Config;
use crate::telemetry::AUDIT;

/// The exit code for a user who does not exist.
const EXIT_NO_SUCH_USER: u8 = 3;

const AFTER_HELP: &str = "\
A USER is an id, or a username in any case. The answer is on stdout, as text or with --json as one JSON document; everything
else is on stderr. Each command leaves a line with the message `audit` in its log: the command, the user's id, the outcome,
who (user id of the system, host) and --reason. Repeating a command does no harm.

Exit codes:
  0   done, or nothing was to be done
  1   failed: Postgres is unavailable, only reads, has another schema, or took too long
  2   the command line or the password is invalid
  3   there is no such user
  78  the configuration is invalid

Examples:
  chat-service admin user show ana
  chat-service admin user disable ana --reason 'ticket 4711' --dry-run
  chat-service admin user revoke 01920b1e-9f6a-7c7e-8f4e-0f6c1f4f2a11 --json
  chat-service admin user export ana > ana.ndjson
  chat-service admin conversations largest --limit 20
  chat-service admin messages purge --older-than 730 --dry-run
  kubectl -n chat exec deployment/chat-chat-service -- /chat-service admin user show ana";

#[derive(clap::Args, Debug)]
#[command(after_help = AFTER_HELP)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
    #[command(flatten)]
    options: Options,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// Show a user, export its data, delete it, disable it, set its password, end its sessions
    #[command(subcommand)]
    User(user::Command),
    /// Find the conversations with the most messages
    #[command(subcommand)]
    Conversations(conversations::Command),
    /// Remove old messages
    #[command(subcommand)]
    Messages(messages::Command),
}

/// Carries out a command, prints its answer, and leaves a line in the log.
pub async fn run(config: &Config, args: &Args) -> anyhow::Result<ExitCode> {
    let (name, answer) = match &args.command {
        Command::User(command) => (command.name(), user::run(config, &args.options, command).await),
        Command::Conversations(command) => (command.name(), conversations::run(config, command).await),
        Command::Messages(command) => (command.name(), messages::run(config, &args.options, command).await),
    };
    audit(&args.options, name, &answer);
    let answer = match answer? {
        Answer::Done(done) => done,
        Answer::Invalid(fault) => {
            eprintln!("chat-service: {fault}");
            return Ok(ExitCode::from(2));
        }
        Answer::NoSuchUser => {
            eprintln!("chat-service: there is no such user: give an id, or a username in any case");
            return Ok(ExitCode::from(EXIT_NO_SUCH_USER));
        }
    };
    // What was done must be said even where something is left to do.
    if !answer.text.is_empty() {
        let shown = if args.options.json { answer.json.to_string() } else { answer.text };
        writeln!(std::io::stdout(), "{shown}")?;
    }
    answer.fault.map_or(Ok(ExitCode::SUCCESS), |fault| Err(anyhow::anyhow!(fault)))
}

/// Never names, addresses or passwords.
fn audit(options: &Options, command: &'static str, answer: &anyhow::Result<Answer>) {
    let (user, outcome) = match answer {
        Ok(Answer::Done(done)) => (done.user.map(|id| id.to_string()), done.outcome),
        Ok(Answer::Invalid(_)) => (None, "invalid"),
        Ok(Answer::NoSuchUser) => (None, "no_such_user"),
        Err(_) => (None, "failed"),
    };
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").ok();
    tracing::info!(
        target: AUDIT,
        command,
        user_id = user.as_deref(),
        outcome,
        dry_run = options.dry_run,
        reason = options.reason.as_deref(),
        uid = rustix::process::getuid().as_raw(),
        host = host.as_deref().map(str::trim),
        "audit"
    );
}
