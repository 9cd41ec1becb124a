//! Paths below the target directory: the built service, and scratch directories for servers.

use std::env;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result, anyhow, bail};

use crate::servers::{self, daemon};

/// The built `chat-service`: `CHAT_SERVICE_BIN`, else the one beside the running test or xtask.
pub fn service_binary() -> Result<PathBuf> {
    let named = env::var_os("CHAT_SERVICE_BIN").map(PathBuf::from);
    let file = named.map_or_else(|| Ok(profile_dir()?.join("chat-service")), anyhow::Ok)?;
    if !file.is_file() {
        bail!("{} does not exist: cargo build -p chat-service", file.display());
    }
    Ok(file)
}

/// `target`, or the directory that cargo uses instead.
pub fn target_dir() -> Result<PathBuf> {
    let profile = profile_dir()?;
    Ok(profile.parent().context("a target directory")?.to_owned())
}

/// `target/debug`, from `target/debug/xtask` or `target/debug/deps/it-1234`.
fn profile_dir() -> Result<PathBuf> {
    let exe = env::current_exe()?;
    let dir = exe.parent().ok_or_else(|| anyhow!("{} has no directory", exe.display()))?;
    Ok(if dir.ends_with("deps") { dir.parent().unwrap_or(dir) } else { dir }.to_owned())
}

/// FNV-1a. Unlike the standard hasher it is stable over releases of Rust: names made from a path's hash must be found again
/// after an upgrade.
pub fn stable_hash(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}

/// A directory below `target/test`. It is removed on drop; if this process is killed, by a later one.
#[derive(Debug)]
pub struct Scratch {
    path: PathBuf,
}

impl Scratch {
    pub fn new(name: &str) -> Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let root = target_dir()?.join("test");
        remove_dead(&root);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = root.join(format!("{}-{number}-{name}", std::process::id()));
        fs::create_dir_all(&path).with_context(|| format!("create {}", path.display()))?;
        // As root, servers run as another user, which must be able to enter the directory, but not to list it.
        fs::set_permissions(&path, fs::Permissions::from_mode(0o711))?;
        Ok(Self { path })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.path);
    }
}

/// Names of directories start with the id of the process that made them. Those of dead processes are leftovers.
fn remove_dead(root: &Path) {
    for entry in fs::read_dir(root).into_iter().flatten().flatten() {
        let owner = entry.file_name().to_str().and_then(|name| name.split('-').next()?.parse::<i32>().ok());
        if owner.is_some_and(|pid| !daemon::is_alive(pid)) {
            for server in fs::read_dir(entry.path()).into_iter().flatten().flatten() {
                let _ = servers::clear(&server.path());
            }
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}
