//! `cargo xtask ci`: all that .ci/run runs, beginning with what `cargo xtask test` does.

use std::process::ExitCode;

use anyhow::Result;

use crate::steps::Tally;
use crate::{signals, soak, test};

pub(crate) fn run() -> Result<ExitCode> {
    signals::listen()?;
    let mut tally = Tally::default();
    test::all(&mut tally)?;
    soak::self_check(&mut tally, soak::QUICK, tests::history::random_seed());
    Ok(tally.close())
}
