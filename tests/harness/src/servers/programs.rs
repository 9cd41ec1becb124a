//! Where the server programs are: the override, `PATH`, then the directories that distributions use.

use std::env;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;

/// `PG_BIN_DIR` names one directory and ends the search.
pub const POSTGRES_OVERRIDE: &str = "PG_BIN_DIR";

/// The first executable file of this name on `PATH`.
pub fn in_path(name: &str) -> Option<PathBuf> {
    env::split_paths(&env::var_os("PATH")?).map(|dir| dir.join(name)).find(|file| is_executable(file))
}

/// Every directory with both `postgres` and `initdb`, the best one first.
pub fn postgres_bin_dirs() -> Vec<PathBuf> {
    if let Some(dir) = env::var_os(POSTGRES_OVERRIDE) {
        return Some(PathBuf::from(dir)).filter(|dir| has_postgres(dir)).into_iter().collect();
    }
    // A link on PATH leads to the real directory, where the other programs are.
    let on_path = in_path("postgres")
        .and_then(|file| file.canonicalize().ok())
        .and_then(|file| Some(file.parent()?.to_owned()));
    let versioned =
        ["/usr/lib/postgresql", "/usr/local/lib/postgresql", "/opt/postgresql", "/Library/PostgreSQL"];
    let prefixed = ["/opt/homebrew/opt", "/usr/local/opt", "/home/linuxbrew/.linuxbrew/opt"];
    let mut dirs: Vec<PathBuf> = on_path.into_iter().collect();
    dirs.extend(versioned.iter().flat_map(|root| newest_first(Path::new(root), "")));
    dirs.extend(prefixed.iter().flat_map(|root| newest_first(Path::new(root), "postgresql")));
    dirs.extend(
        ["/usr/local/pgsql/bin", "/Applications/Postgres.app/Contents/Versions/latest/bin"]
            .map(PathBuf::from),
    );
    let mut found: Vec<PathBuf> = Vec::new();
    for dir in dirs.into_iter().filter(|dir| has_postgres(dir)) {
        if !found.contains(&dir) {
            found.push(dir);
        }
    }
    found
}

/// The major version in the output of `postgres --version`.
pub fn postgres_major(bin_dir: &Path) -> Option<u32> {
    let output = Command::new(bin_dir.join("postgres")).arg("--version").output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    leading_number(text.split_whitespace().nth(2)?)
}

/// `redis-server`, or Valkey's, which has the same protocol.
pub fn redis_server() -> Option<PathBuf> {
    find_any(&["redis-server", "valkey-server"])
}

/// The command line client of either.
pub fn redis_cli() -> Option<PathBuf> {
    find_any(&["redis-cli", "valkey-cli"])
}

/// Prometheus's server.
pub fn prometheus() -> Option<PathBuf> {
    find_any(&["prometheus"])
}

/// The checker of rules and metrics, which comes with the server.
pub fn promtool() -> Option<PathBuf> {
    find_any(&["promtool"])
}

/// Major and minor version, from the output of either program: `prometheus, version 2.42.0+ds (...)`.
pub fn prometheus_version(program: &Path) -> Option<(u32, u32)> {
    let output = Command::new(program).arg("--version").output().ok()?;
    // Versions before 2.46 print it to stderr.
    let text = String::from_utf8([output.stdout, output.stderr].concat()).ok()?;
    let mut numbers = text.split_once(", version ")?.1.split('.');
    Some((leading_number(numbers.next()?)?, leading_number(numbers.next()?)?))
}

/// PgBouncer's program.
pub fn pgbouncer() -> Option<PathBuf> {
    find_any(&["pgbouncer"])
}

/// Major and minor version, from `PgBouncer 1.24.1`.
pub fn pgbouncer_version(program: &Path) -> Option<(u32, u32)> {
    let output = Command::new(program).arg("--version").output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    let mut numbers = text.strip_prefix("PgBouncer ")?.split('.');
    Some((leading_number(numbers.next()?)?, leading_number(numbers.next()?)?))
}

/// The library that sets the clock of a single process.
pub fn libfaketime() -> Option<PathBuf> {
    // Debian names a directory after the architecture.
    let below = std::fs::read_dir("/usr/lib").into_iter().flatten().flatten().map(|entry| entry.path());
    let dirs = ["/usr/lib64", "/usr/lib", "/usr/local/lib"].into_iter().map(PathBuf::from).chain(below);
    dirs.map(|dir| dir.join("faketime/libfaketime.so.1")).find(|file| file.is_file())
}

fn find_any(names: &[&str]) -> Option<PathBuf> {
    // sbin and Homebrew are often missing from PATH.
    let places =
        ["/usr/bin", "/usr/sbin", "/usr/local/bin", "/opt/homebrew/bin", "/home/linuxbrew/.linuxbrew/bin"];
    names.iter().find_map(|name| {
        in_path(name)
            .or_else(|| places.iter().map(|dir| Path::new(dir).join(name)).find(|file| is_executable(file)))
    })
}

fn has_postgres(dir: &Path) -> bool {
    is_executable(&dir.join("postgres")) && is_executable(&dir.join("initdb"))
}

fn is_executable(file: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt;
    file.metadata().is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
}

/// `root/<prefix>*/bin`, sorted by the number in the name.
fn newest_first(root: &Path, prefix: &str) -> Vec<PathBuf> {
    let version = |name: &OsStr| {
        let digits = name.to_str()?.strip_prefix(prefix)?.trim_start_matches(['@', '-']).to_owned();
        Some(leading_number(&digits).unwrap_or(0))
    };
    let mut dirs: Vec<(u32, PathBuf)> = std::fs::read_dir(root)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| Some((version(&entry.file_name())?, entry.path().join("bin"))))
        .collect();
    dirs.sort_by(|a, b| b.cmp(a));
    dirs.into_iter().map(|(_, dir)| dir).collect()
}

fn leading_number(text: &str) -> Option<u32> {
    text.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
}
