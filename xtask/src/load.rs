//! `cargo xtask load`: conversations against a running service, none of whose requests may fail.

use std::net::{SocketAddr, ToSocketAddrs};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use common::conversation::{self as load, Pair};
use common::signals;
use common::steps::step;

#[derive(clap::Args)]
#[command(after_help = "Examples:
  cargo xtask load                                 20 s of three conversations, at port 8000
  cargo xtask load --seconds 120 --conversations 10
  cargo xtask load --address 127.0.0.1:30080       the service in a cluster")]
pub(crate) struct Args {
    /// The service's public address
    #[arg(long, default_value = "127.0.0.1:8000", value_name = "HOST:PORT")]
    address: String,
    /// Seconds to run
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u64).range(1..=600))]
    seconds: u64,
    /// Conversations at a time
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..=50))]
    conversations: u16,
    /// Pause between two requests of a conversation, in milliseconds
    #[arg(long, default_value_t = 10, value_name = "MS")]
    pause: u64,
}

pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    signals::listen()?;
    let address: SocketAddr = args
        .address
        .to_socket_addrs()
        .with_context(|| format!("{} is not HOST:PORT", args.address))?
        .next()
        .with_context(|| format!("{} has no address", args.address))?;
    let mut pairs = step("users", |_| {
        let name = |number| format!("load-{:08x}-{number}", fastrand::u32(..));
        (0..args.conversations).map(|number| Pair::new(address, &name(number))).collect::<Result<Vec<_>>>()
    })
    .with_context(|| {
        format!("registration at {address} failed: does the service run, without rate limits?")
    })?;
    let end = Instant::now() + Duration::from_secs(args.seconds);
    let pause = Duration::from_millis(args.pause);
    let ((), report) = step("conversations", |progress| {
        load::during(&mut pairs, address, pause, || {
            while Instant::now() < end && !signals::asked_to_end() {
                progress.say("Ctrl-C ends it early");
                std::thread::sleep(Duration::from_millis(200));
            }
            Ok(())
        })
    })?;
    let messages =
        step("read it all", |_| pairs.iter_mut().map(|pair| pair.verify(address)).sum::<Result<usize>>())?;
    ensure!(messages > 0, "no message was stored");
    println!("\n{}; {messages} messages, gapless and as acknowledged", report.verdict()?);
    Ok(ExitCode::SUCCESS)
}
