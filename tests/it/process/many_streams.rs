//! Ten thousand idle streams on one replica.

use std::time::Duration;

use anyhow::{Result, ensure};
use load::{Followers, Targets};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use super::support::{Database, Start, User};

const STREAMS: usize = 10_000;
const USERS: usize = 10;

/// The limit is 12 KiB. About four are the kernel's, for a socket; these are the process's own, in a debug build.
const RESIDENT_MAX_BYTES: usize = 8 * 1024;

const OPEN_LIMIT: Duration = Duration::from_secs(60);

/// The service has to raise its limit of open files itself.
const OPEN_FILES: u32 = 1024;

#[test]
#[cfg(target_os = "linux")]
fn ten_thousand_idle_streams_fit_into_8_kib_each_and_all_get_a_message() -> Result<()> {
    let limit = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit })?;
    let database = Database::create()?;
    let start = Start::on(&database).env("STREAMS_PER_USER_MAX", "1000").open_files(OPEN_FILES);
    let start = start.env("STREAM_MAX_SECONDS", "3600").env("STREAM_DRAIN_SECONDS", "0");
    let users: Vec<User> = {
        let service = start.ready()?;
        (0..USERS).map(|number| service.user(&format!("user{number}"))).collect::<Result<_>>()?
    };
    // Another process: what a login leaves behind, streams would fill first.
    let service = start.ready()?;
    let before = service.process.resident_kib()? as usize;
    let tokens = users.iter().map(|user| user.token.clone());
    let targets = Targets::new(vec![service.public]);
    let followers = Followers::start(&targets, tokens.cycle().take(STREAMS).collect(), OPEN_LIMIT)?;
    let resident = (service.process.resident_kib()? as usize).saturating_sub(before) * 1024 / STREAMS;
    ensure!(resident < RESIDENT_MAX_BYTES, "an idle stream takes {resident} bytes");
    service.send(&users[0], &users[1], "1 1 to a tenth of all, twice")?.expect(201)?;
    let wanted = 2 * STREAMS / USERS;
    followers.await_shown(wanted, Duration::from_secs(20));
    ensure!(followers.shown() == wanted, "{} of {wanted} streams have the message", followers.shown());
    let (_, opened) = followers.stop()?;
    ensure!(opened.len() == STREAMS, "streams were opened {} times", opened.len());
    Ok(())
}
