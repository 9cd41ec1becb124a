//! `chat-service canary`: two fixed users exchange messages over the API of a running service until it is stopped. It exports
//! what they see: latencies, failures, and acknowledged messages that are gone.

mod client;
mod follower;
mod listener;
mod metrics;
mod round;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use reqwest::Url;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, watch};
use tokio::time::sleep;

use self::client::{Api, Session};
use self::follower::{Follower, State};
use self::metrics::Metrics;
use self::round::Canary;
use crate::security::passwords::{PASSWORD_LENGTH, password_length};

const SENDER: &str = "canary-1";
const RECIPIENT: &str = "canary-2";

/// After a log-in that failed. Two accounts that log in and register stay below the limit of log-ins per minute.
const LOG_IN_PAUSE: Duration = Duration::from_secs(60);
const ARRIVALS: usize = 64;

#[derive(clap::Args, Clone, Debug)]
pub struct Args {
    /// The address of the service's public port
    #[arg(long, default_value = "http://localhost:8000", value_name = "URL")]
    url: Url,
    /// The pause between two rounds; each stores one message. Below 5 s raise SEND_RATE_LIMIT_PER_MINUTE
    #[arg(long, default_value_t = 10, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(1..=300))]
    interval: u32,
    /// Where /metrics and /livez are served
    #[arg(long, default_value = "0.0.0.0:9000", value_name = "ADDRESS")]
    listen: SocketAddr,
}

/// Runs until SIGTERM or SIGINT.
pub fn run(args: &Args) -> Result<()> {
    let password = std::env::var("CANARY_PASSWORD").unwrap_or_default();
    ensure!(
        PASSWORD_LENGTH.contains(&password_length(&password)),
        "set CANARY_PASSWORD, the password of {SENDER} and {RECIPIENT}, to 8 to 128 characters"
    );
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let outcome = runtime.block_on(async {
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        tokio::select! {
            _ = terminate.recv() => Ok(()),
            _ = interrupt.recv() => Ok(()),
            outcome = watch(args, &password) => outcome,
        }
    });
    runtime.shutdown_timeout(Duration::from_millis(100));
    outcome
}

async fn watch(args: &Args, password: &str) -> Result<()> {
    let metrics = Arc::new(Metrics::new()?);
    let listener = TcpListener::bind(args.listen)
        .await
        .with_context(|| format!("cannot listen on {}: choose another --listen", args.listen))?;
    println!("canary: {} every {} s, metrics on {}", args.url, args.interval, listener.local_addr()?);
    tokio::spawn(listener::serve(listener, Arc::clone(&metrics)));
    let api = Api::new(&args.url)?;
    loop {
        match log_in(&api, password).await {
            Ok((sender, recipient)) => {
                let error = follow_rounds(&api, &metrics, args, sender, recipient).await;
                eprintln!("canary: refresh: {error:#}; it logs in again");
            }
            Err(error) => {
                eprintln!("canary: log in: {error:#}");
                metrics.failed("log_in");
                metrics.round(false);
                sleep(LOG_IN_PAUSE.mul_f64(1.0 + rand::random::<f64>() / 4.0)).await;
            }
        }
    }
}

async fn log_in(api: &Api, password: &str) -> Result<(Session, Session)> {
    Ok((api.log_in(SENDER, password).await?, api.log_in(RECIPIENT, password).await?))
}

/// Rounds, until the tokens cannot be renewed.
async fn follow_rounds(
    api: &Api,
    metrics: &Metrics,
    args: &Args,
    sender: Session,
    recipient: Session,
) -> anyhow::Error {
    let (token, token_of_follower) = watch::channel(recipient.token.clone());
    let (state, state_of_follower) = watch::channel(State::default());
    let (arrived, arrivals) = mpsc::channel(ARRIVALS);
    let follower = Follower::new(api.clone(), token_of_follower, state, arrived);
    let mut canary = Canary::new(api.clone(), metrics, (sender, recipient), state_of_follower, arrivals);
    let rounds = async {
        loop {
            if let Err(error) = canary.renew().await {
                return error;
            }
            token.send_if_modified(|known| {
                let renewed = *known != canary.recipient.token;
                known.clone_from(&canary.recipient.token);
                renewed
            });
            canary.round().await;
            sleep(Duration::from_secs(args.interval.into()).mul_f64(1.0 + rand::random::<f64>() / 10.0))
                .await;
        }
    };
    tokio::select! {
        error = rounds => error,
        () = follower.run() => anyhow::anyhow!("the stream is no longer followed"),
    }
}
