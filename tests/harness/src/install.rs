//! Installs the server programs where that needs no password: on Debian or Ubuntu, as root or with password-less sudo.

pub mod pgbouncer;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::servers::{daemon, programs};

/// A first `apt-get update` and 60 MB over a slow network.
const INSTALL_LIMIT: Duration = Duration::from_secs(900);

/// What to type where we cannot install them.
pub const ADVICE: &str = "\
  Debian, Ubuntu:  sudo apt-get install postgresql redis-server
  Fedora:          sudo dnf install postgresql-server valkey
  macOS:           brew install postgresql@17 redis
or set DATABASE_URL and REDIS_URL, or start Docker or Podman";

/// What to type for Prometheus.
const PROMETHEUS_ADVICE: &str = "  Debian, Ubuntu:  sudo apt-get install prometheus
  Fedora:          sudo dnf install prometheus
  macOS:           brew install prometheus
or put the programs of https://prometheus.io/download on PATH";

/// What to type for the browser.
const BROWSER_ADVICE: &str = "  Debian:  sudo apt-get install chromium chromium-driver
  macOS:   brew install --cask chromium chromedriver
or put chromedriver, and chromium or google-chrome, on PATH";

/// Debian 12's: the first with the checks and functions that the rules and their tests use.
const PROMETHEUS_OLDEST: (u32, u32) = (2, 42);

/// The programs of one Prometheus.
#[derive(Clone, Debug)]
pub struct Prometheus {
    pub server: PathBuf,
    pub promtool: PathBuf,
}

/// A browser, and the program that drives it.
#[derive(Clone, Debug)]
pub struct Browser {
    pub chromium: PathBuf,
    pub driver: PathBuf,
}

/// The packages start their servers on the standard ports unless a policy forbids it. A policy that exists already is the
/// administrator's, and stays; ours is always removed again.
const SCRIPT: &str = r#"
set -eu
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
    trap 'rm -f "$policy"' EXIT
    trap 'exit 130' INT TERM HUP
    printf '#!/bin/sh\nexit 101\n' > "$policy"
    chmod 755 "$policy"
fi
export DEBIAN_FRONTEND=noninteractive
install() { apt-get -o DPkg::Lock::Timeout=120 install -y -q --no-install-recommends "$@"; }
if ! apt-get -s -q install --no-install-recommends "$@" >/dev/null 2>&1 || ! install "$@"; then
    apt-get -o DPkg::Lock::Timeout=120 update -q
    install "$@"
fi
"#;

/// The packages that are missing, by their Debian names.
pub fn missing_packages() -> Vec<&'static str> {
    let mut missing = Vec::new();
    if programs::postgres_bin_dirs().is_empty() {
        missing.push("postgresql");
    }
    if programs::redis_server().is_none() {
        missing.push("redis-server");
    }
    missing
}

/// Whether [`install`] can work here at all.
pub fn can_install() -> bool {
    programs::in_path("apt-get").is_some() && privileged_shell().is_some()
}

/// Makes sure that the programs of Postgres and Redis are installed. Calls `say` before it installs anything.
pub fn ensure_programs(say: impl FnOnce(&str)) -> Result<()> {
    let missing = missing_packages();
    if missing.is_empty() {
        return Ok(());
    }
    if !can_install() {
        bail!("{} not installed. Install by hand:\n{ADVICE}", missing.join(" and "));
    }
    say(&format!("installing {} with apt-get", missing.join(" and ")));
    install(&missing)
}

/// Installs the library that sets the clock of a server, where that is possible. Calls `say` before it installs it.
pub fn offer_libfaketime(say: impl FnOnce(&str)) -> Result<()> {
    if programs::libfaketime().is_none() && can_install() {
        say("installing libfaketime with apt-get");
        install(&["libfaketime"])?;
    }
    Ok(())
}

/// Whether [`ensure_prometheus`] can work here.
pub fn has_prometheus() -> bool {
    programs::prometheus().is_some() && programs::promtool().is_some() || can_install()
}

/// Makes sure that Prometheus and promtool are installed. Calls `say` before it installs anything.
pub fn ensure_prometheus(say: impl FnOnce(&str)) -> Result<Prometheus> {
    let find = || Some(Prometheus { server: programs::prometheus()?, promtool: programs::promtool()? });
    let found = match find() {
        Some(found) => found,
        None if can_install() => {
            say("installing prometheus with apt-get");
            install(&["prometheus"])?;
            find().with_context(|| {
                format!("the package prometheus has no promtool. Install by hand:\n{PROMETHEUS_ADVICE}")
            })?
        }
        None => bail!("prometheus and promtool are not installed. Install by hand:\n{PROMETHEUS_ADVICE}"),
    };
    for program in [&found.server, &found.promtool] {
        let version = programs::prometheus_version(program)
            .with_context(|| format!("{} --version prints no version", program.display()))?;
        if version < PROMETHEUS_OLDEST {
            let ((major, minor), (oldest_major, oldest_minor)) = (version, PROMETHEUS_OLDEST);
            bail!(
                "{} is version {major}.{minor}, at least {oldest_major}.{oldest_minor} is needed. \
                 Install by hand:\n{PROMETHEUS_ADVICE}",
                program.display()
            );
        }
    }
    Ok(found)
}

/// The installed browser.
pub fn browser() -> Option<Browser> {
    let chromium =
        ["chromium", "chromium-browser", "google-chrome"].into_iter().find_map(programs::in_path)?;
    Some(Browser { chromium, driver: programs::in_path("chromedriver")? })
}

/// Makes sure that a browser and its driver are installed. Calls `say` before it installs anything.
pub fn ensure_browser(say: impl FnOnce(&str)) -> Result<Browser> {
    if browser().is_none() && can_install() {
        say("installing chromium with apt-get");
        install(&["chromium", "chromium-driver"])?;
    }
    browser().with_context(|| {
        format!("chromium and chromedriver are not installed. Install by hand:\n{BROWSER_ADVICE}")
    })
}

/// Installs the packages without leaving their services running.
pub fn install(packages: &[&str]) -> Result<()> {
    // Tests run at the same time, and one of them would remove the policy of another.
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _held = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let mut command = privileged_shell().context("neither root nor password-less sudo")?;
    command.args(["-c", SCRIPT, "sh"]).args(packages);
    daemon::run_ok(command, INSTALL_LIMIT).with_context(|| format!("install {}", packages.join(" ")))?;
    let missing = missing_packages();
    if let Some(still) = packages.iter().find(|package| missing.contains(package)) {
        bail!("{still} is installed, but its programs are not found. Install by hand:\n{ADVICE}");
    }
    Ok(())
}

/// A root shell that asks for no password.
fn privileged_shell() -> Option<Command> {
    if rustix::process::geteuid().is_root() {
        return Some(Command::new("/bin/sh"));
    }
    let sudo = programs::in_path("sudo")?;
    let mut probe = Command::new(&sudo);
    probe.args(["-n", "true"]);
    daemon::run_ok(probe, Duration::from_secs(10)).ok()?;
    let mut command = Command::new(sudo);
    command.arg("-n").arg(Path::new("/bin/sh"));
    Some(command)
}
