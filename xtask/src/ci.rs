//! `cargo xtask ci`: all that .ci/run runs, beginning with what `cargo xtask test` does.

use std::process::ExitCode;

use anyhow::Result;

use crate::steps::Tally;
use crate::{signals, test};

pub(crate) fn run() -> Result<ExitCode> {
    signals::listen()?;
    let mut tally = Tally::default();
    test::all(&mut tally)?;
    Ok(tally.close())
}
