//! `cargo xtask ci`: all that .ci/run runs, beginning with what `cargo xtask test` does.

use std::process::ExitCode;

use anyhow::Result;
use common::signals;
use common::steps::Tally;

use crate::external::{E2E, MEASURE};
use crate::test;

pub(crate) fn run() -> Result<ExitCode> {
    signals::listen()?;
    let mut tally = Tally::default();
    test::all(&mut tally)?;
    MEASURE.check(&mut tally, &["drill"]);
    // Not every machine that runs this can pull images.
    E2E.check(&mut tally, &["e2e", "--node-image", "build"]);
    // The tests run the history checker for a minute; this proves that it finds broken builds.
    MEASURE.check(&mut tally, &["soak", "--self-check"]);
    Ok(tally.close())
}
