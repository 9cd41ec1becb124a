//! `cargo xtask ci`: all that .ci/run runs, beginning with what `cargo xtask test` does.

use std::process::ExitCode;

use anyhow::Result;

use crate::steps::Tally;
use crate::{drill, e2e, signals, soak, test};

pub(crate) fn run() -> Result<ExitCode> {
    signals::listen()?;
    let mut tally = Tally::default();
    test::all(&mut tally)?;
    drill::everything(&mut tally)?;
    e2e::everything(&mut tally)?;
    // A minute of faults is among the tests; this is the proof that it would notice.
    soak::self_check(&mut tally, tests::history_checker::random_seed());
    Ok(tally.close())
}
