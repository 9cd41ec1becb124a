//! `cargo xtask e2e`: the chart and the image on a real cluster, in operations and faults.

mod alerts;
mod checks;
mod faults;
mod kubernetes;
mod procedures;
mod readme;
mod stage;
mod tilt;

use std::process::ExitCode;

use anyhow::Result;
use clap::Parser;
use common::args::E2e as Args;
use common::prometheus::ON_A_CLUSTER;
use common::steps::{Progress, Tally, step};
use common::{kind, signals};

use stage::Stage;

type Check = fn(&mut Stage, &Progress) -> Result<()>;

/// In this order: each leaves the release as it found it, ready and with all of its messages.
const CHECKS: [(&str, Check); 25] = [
    ("every values file", checks::values_files),
    ("install", checks::install),
    ("helm test", checks::helm_test),
    ("conversation", checks::conversation),
    ("rollout restart", checks::rollout_restart),
    ("upgrade, new image", checks::upgrade),
    ("pod deleted", checks::pod_deleted),
    ("upgrade twice", checks::upgrade_twice),
    ("rollback", checks::rollback),
    ("new signing key", procedures::rotate_signing_key),
    ("new Postgres password", procedures::rotate_postgres_password),
    ("new Redis password", procedures::rotate_redis_password),
    ("lost Secret", procedures::lost_secret),
    ("Postgres killed", faults::postgres_killed),
    ("Redis killed", faults::redis_killed),
    ("drain, two replicas", faults::drain_two),
    ("drain, one replica", faults::drain_one),
    ("broken image", faults::broken_image),
    ("bad value", faults::bad_value),
    ("autoscaling", checks::autoscaling),
    (ON_A_CLUSTER.0, alerts::all),
    ("backup and restore", procedures::backup_and_restore),
    ("tilt loop", tilt::tilt_loop),
    ("uninstall", procedures::uninstall),
    ("half an installation", procedures::half_an_installation),
];

/// The other checks need this one.
const ALWAYS: &str = "install";

#[derive(Parser)]
#[command(bin_name = "cargo xtask")]
enum Cli {
    E2e(Args),
}

fn main() -> ExitCode {
    let Cli::E2e(args) = Cli::parse();
    let mut tally = Tally::default();
    match signals::listen().and_then(|()| all(&mut tally, &args)) {
        Ok(()) => tally.close(),
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn all(tally: &mut Tally, args: &Args) -> Result<()> {
    let started = std::time::Instant::now();
    // A cluster that ran before belongs to somebody, and stays.
    let was_up = kind::is_up()?;
    let outcome = match Stage::set(args) {
        Ok(mut stage) => {
            println!("  set up after {:.0} s", started.elapsed().as_secs_f32());
            kind::status()?;
            play(tally, &mut stage, args.only.as_deref());
            if args.keep || !was_up { Ok(()) } else { step("clean up", |progress| stage.strike(progress)) }
        }
        Err(error) => {
            tally.failed += 1;
            println!("{error:#}");
            Ok(())
        }
    };
    if !args.keep && !was_up {
        kind::down()?;
    }
    println!("  e2e: {:.0} s in all", started.elapsed().as_secs_f32());
    outcome
}

fn play(tally: &mut Tally, stage: &mut Stage, only: Option<&str>) {
    for (name, check) in CHECKS {
        if signals::asked_to_end() {
            return;
        }
        if only.is_some_and(|only| name != ALWAYS && !name.contains(only)) {
            continue;
        }
        let fix = format!("cargo xtask e2e --keep --only '{name}' runs it alone and leaves all to look at");
        if tally.check(name, &fix, |progress| check(stage, progress)).is_some() {
            continue;
        }
        if name == ALWAYS {
            println!("  nothing else can be checked");
            return;
        }
        // The next check needs a healthy release.
        if step("  repair", |progress| stage.repair(progress)).is_err() {
            tally.failed += 1;
            println!("  the release cannot be repaired, so the other checks would prove nothing");
            return;
        }
    }
}
