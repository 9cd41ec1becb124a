//! The directory that a server lives in, and the user that it runs as: Postgres refuses root.

use std::fs::{self, DirBuilder, Permissions};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::places::stable_hash;

/// What a server runs as when we are root.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Owner {
    uid: u32,
    gid: u32,
}

#[derive(Clone, Debug)]
pub(crate) struct Home {
    path: PathBuf,
    owner: Option<Owner>,
}

impl Home {
    /// Makes the directory, or its stand-in when the server's user cannot reach it, such as below a closed `/root`.
    pub(crate) fn prepare(dir: &Path) -> Result<Self> {
        fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))?;
        let dir = dir.canonicalize()?;
        if !rustix::process::geteuid().is_root() {
            fs::set_permissions(&dir, Permissions::from_mode(0o700)).with_context(|| {
                format!("{} belongs to another user; remove it or run as that user", dir.display())
            })?;
            return Ok(Self { path: dir, owner: None });
        }
        // Files of an earlier run by another user still belong to that user.
        let earlier = dir.metadata().ok().filter(|meta| meta.uid() != 0);
        let owner =
            earlier.map(|meta| Owner { uid: meta.uid(), gid: meta.gid() }).unwrap_or_else(unprivileged);
        let path = if reachable(&dir, owner) { dir } else { stand_in(&dir, owner)? };
        chown(&path, Some(owner.uid), Some(owner.gid))
            .with_context(|| format!("chown {}", path.display()))?;
        fs::set_permissions(&path, Permissions::from_mode(0o700))?;
        Ok(Self { path, owner: Some(owner) })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Makes the command run in this directory, as its owner.
    pub(crate) fn inhabit(&self, command: &mut Command) {
        command.current_dir(&self.path);
        if let Some(owner) = self.owner {
            command.uid(owner.uid).gid(owner.gid);
        }
    }

    /// Writes a file that only the server's user may read.
    pub(crate) fn write(&self, name: &str, text: &str) -> Result<PathBuf> {
        let file = self.path.join(name);
        fs::write(&file, text).with_context(|| format!("write {}", file.display()))?;
        fs::set_permissions(&file, Permissions::from_mode(0o600))?;
        if let Some(owner) = self.owner {
            chown(&file, Some(owner.uid), Some(owner.gid))?;
        }
        Ok(file)
    }
}

/// The two directories that a server may use: the given one and its stand-in.
pub(crate) fn places(dir: &Path) -> Vec<PathBuf> {
    let real = dir.canonicalize();
    [dir.to_owned()].into_iter().chain(real.map(|real| stand_in_path(&real))).collect()
}

/// Removes them both. The server must not run.
pub(crate) fn remove(dir: &Path) -> Result<()> {
    for place in places(dir) {
        match fs::remove_dir_all(&place) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(error).with_context(|| format!("remove {}", place.display()));
            }
            _ => {}
        }
    }
    Ok(())
}

/// `postgres` if a package made that user, else `nobody`.
fn unprivileged() -> Owner {
    let passwd = fs::read_to_string("/etc/passwd").unwrap_or_default();
    let find = |name: &str| {
        let mut fields =
            passwd.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?.split(':').skip(1);
        Some(Owner { uid: fields.next()?.parse().ok()?, gid: fields.next()?.parse().ok()? })
    };
    find("postgres").or_else(|| find("nobody")).unwrap_or(Owner { uid: 65_534, gid: 65_534 })
}

/// Whether the user may enter all parents of the directory. The directory itself will be its own.
fn reachable(dir: &Path, owner: Owner) -> bool {
    dir.ancestors().skip(1).all(|parent| {
        parent.metadata().is_ok_and(|meta| {
            let shift = match () {
                () if meta.uid() == owner.uid => 6,
                () if meta.gid() == owner.gid => 3,
                () => 0,
            };
            (meta.mode() >> shift) & 0o1 == 1
        })
    })
}

fn stand_in_path(dir: &Path) -> PathBuf {
    let leaf = dir.file_name().unwrap_or_default().to_string_lossy().into_owned();
    Path::new("/var/tmp")
        .join(format!("chat-service-{:016x}-{leaf}", stable_hash(dir.as_os_str().as_encoded_bytes())))
}

fn stand_in(dir: &Path, owner: Owner) -> Result<PathBuf> {
    let path = stand_in_path(dir);
    match DirBuilder::new().mode(0o700).create(&path) {
        Ok(()) => {}
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
            // Any user may create a name in /var/tmp: we use it only if we, or the server's user, made it.
            let meta = path.symlink_metadata()?;
            if !meta.is_dir() || ![0, owner.uid].contains(&meta.uid()) {
                bail!("{} belongs to another user; remove it", path.display());
            }
        }
        Err(error) => return Err(error).with_context(|| format!("create {}", path.display())),
    }
    Ok(path)
}
