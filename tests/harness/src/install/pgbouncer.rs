//! PgBouncer, old and new. Debian 12 has one that cannot share prepared statements (1.18); the one of the next release is
//! built from its source package, which works without that release's libraries.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::{can_install, install};
use crate::places::{self, Scratch};
use crate::servers::{daemon, programs};

/// The first that keeps prepared statements in transaction mode.
pub const OLDEST: (u32, u32) = (1, 21);

/// The Debian release whose source package is built.
const SOURCE_RELEASE: &str = "trixie";
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// What the build needs, by its Debian names, and a file of each.
const BUILD_PACKAGES: [(&str, &str); 5] = [
    ("gcc", "/usr/bin/gcc"),
    ("make", "/usr/bin/make"),
    ("pkgconf", "/usr/bin/pkg-config"),
    ("libevent-dev", "/usr/include/event2/event.h"),
    ("libssl-dev", "/usr/include/openssl/ssl.h"),
];

/// An index of 11 MB over a slow network.
const FETCH_LIMIT: Duration = Duration::from_secs(600);
const BUILD_LIMIT: Duration = Duration::from_secs(300);

const ADVICE: &str =
    "install PgBouncer 1.21 or newer by hand (macOS: brew install pgbouncer) and put it on PATH";

/// The programs by what they can do.
#[derive(Clone, Debug)]
pub struct PgBouncers {
    /// At least [`OLDEST`].
    pub current: PathBuf,
    /// The distribution's, where that is older.
    pub outdated: Option<PathBuf>,
}

/// Finds the programs, and installs or builds what is missing.
pub fn ensure() -> Result<PgBouncers> {
    static FOUND: Mutex<Option<PgBouncers>> = Mutex::new(None);
    let mut found = FOUND.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(found) = &*found {
        return Ok(found.clone());
    }
    if programs::pgbouncer().is_none() && can_install() {
        install(&["pgbouncer"])?;
    }
    let installed = programs::pgbouncer();
    let version = |program: &Path| programs::pgbouncer_version(program);
    let programs = match installed {
        Some(program) if version(&program).is_some_and(|version| version >= OLDEST) => {
            PgBouncers { current: program, outdated: None }
        }
        outdated => PgBouncers { current: built()?, outdated },
    };
    Ok(found.insert(programs).clone())
}

/// The one in `target/tools`, built if it is not there yet.
fn built() -> Result<PathBuf> {
    let tools = places::target_dir()?.join("tools/pgbouncer");
    let program = tools.join("pgbouncer");
    if programs::pgbouncer_version(&program).is_some_and(|version| version >= OLDEST) {
        return Ok(program);
    }
    if !can_install() || !Path::new(KEYRING).is_file() {
        bail!("no PgBouncer that keeps prepared statements: {ADVICE}");
    }
    let missing = BUILD_PACKAGES.iter().filter(|(_, file)| !Path::new(file).exists());
    let missing: Vec<&str> = missing.map(|(package, _)| *package).collect();
    if !missing.is_empty() {
        install(&missing)?;
    }
    let scratch = Scratch::new("pgbouncer-build")?;
    let source = fetch(scratch.path()).context("fetch PgBouncer's source package")?;
    compile(&source).context("build PgBouncer")?;
    fs::create_dir_all(&tools)?;
    // Renamed when it is complete: another process may look for it.
    let copy = tools.join(format!("pgbouncer.{}", std::process::id()));
    fs::copy(source.join("pgbouncer"), &copy)?;
    fs::rename(copy, &program)?;
    let version = programs::pgbouncer_version(&program).context("the built PgBouncer does not start")?;
    if version < OLDEST {
        bail!("Debian {SOURCE_RELEASE} has PgBouncer {}.{}: {ADVICE}", version.0, version.1);
    }
    Ok(program)
}

/// Downloads and unpacks the source, with an apt configuration of its own: the machine's stays as it is, and apt checks the
/// signature.
fn fetch(dir: &Path) -> Result<PathBuf> {
    let at = |name: &str| dir.join(name).display().to_string();
    for name in ["lists/partial", "cache/archives/partial", "source"] {
        fs::create_dir_all(dir.join(name))?;
    }
    let mirror = mirror()?;
    let source = format!("deb-src [signed-by={KEYRING}] {mirror} {SOURCE_RELEASE} main\n");
    fs::write(dir.join("sources.list"), source)?;
    let settings = [
        ("Dir::Etc::SourceList", at("sources.list")),
        ("Dir::Etc::SourceParts", "/dev/null".to_owned()),
        ("Dir::State::Lists", at("lists")),
        ("Dir::Cache", at("cache")),
        // The scratch directory is closed to apt's own user.
        ("APT::Sandbox::User", "root".to_owned()),
    ];
    let text: String = settings.iter().map(|(name, value)| format!("{name} \"{value}\";\n")).collect();
    fs::write(dir.join("apt.conf"), text)?;
    let apt = |arguments: &[&str]| {
        let mut command = Command::new("apt-get");
        command.env("APT_CONFIG", dir.join("apt.conf")).current_dir(dir.join("source")).args(arguments);
        daemon::run_ok(command, FETCH_LIMIT)
    };
    apt(&["update", "-q"])?;
    apt(&["source", "-q", "--download-only", "pgbouncer"])?;
    let names = |dir: &Path| -> Result<Vec<PathBuf>> {
        Ok(fs::read_dir(dir)?.map(|entry| entry.map(|entry| entry.path())).collect::<Result<_, _>>()?)
    };
    let archive = names(&dir.join("source"))?
        .into_iter()
        .find(|path| path.display().to_string().ends_with(".orig.tar.gz"))
        .context("the source package has no .orig.tar.gz")?;
    let mut tar = Command::new("tar");
    tar.arg("-xzf").arg(archive).current_dir(dir.join("source"));
    daemon::run_ok(tar, BUILD_LIMIT)?;
    names(&dir.join("source"))?.into_iter().find(|path| path.is_dir()).context("the archive has no directory")
}

/// Where this machine gets its Debian packages from.
fn mirror() -> Result<String> {
    let mut command = Command::new("apt-get");
    command.args(["indextargets", "--format", "$(ORIGIN) $(CODENAME) $(REPO_URI)"]);
    let targets = daemon::run_ok(command, Duration::from_secs(30))?;
    let found = targets.lines().find_map(|line| {
        let [origin, codename, uri] = line.split(' ').collect::<Vec<_>>().try_into().ok()?;
        // Not the security updates, whose repository has other releases.
        (origin == "Debian" && !codename.contains('-')).then(|| uri.to_owned())
    });
    found.with_context(|| format!("apt has no Debian mirror: {ADVICE}"))
}

fn compile(source: &Path) -> Result<()> {
    let mut configure = Command::new("./configure");
    configure.args(["-q", "--without-cares", "--without-pam", "--without-systemd"]);
    let mut make = Command::new("make");
    make.args(["-j2", "pgbouncer"]);
    for mut command in [configure, make] {
        command.current_dir(source);
        daemon::run_ok(command, BUILD_LIMIT)?;
    }
    Ok(())
}
