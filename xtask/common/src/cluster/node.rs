//! The node's main process: its start, how to find it, and its end without leftovers.

use std::fs::{self, File, OpenOptions};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use harness::places;
use harness::servers::daemon;
use rustix::process::{Flock, FlockType, Pid, Signal, fcntl_getlk, kill_process};

use super::{API, NODE_PORT};
use crate::workspace;

/// Settings of the whole machine that the kubelet changes.
const SYSCTLS: [&str; 4] =
    ["vm/overcommit_memory", "vm/panic_on_oom", "kernel/panic", "kernel/panic_on_oops"];
/// The context's name in every kubeadm cluster. A Tiltfile that allows it would allow all of them.
const KUBEADMS_CONTEXT: &str = "kubernetes-super-admin@kubernetes";
const CGROUP: &str = "chat-service-cluster";

/// All that the node keeps.
pub(super) fn dir() -> Result<PathBuf> {
    Ok(places::target_dir()?.join("cluster"))
}

fn data() -> Result<PathBuf> {
    Ok(dir()?.join("data"))
}

/// The node's first process, by the lock that it holds as long as it lives.
pub(super) fn find() -> Result<Option<i32>> {
    let path = data()?.join("lock");
    let Ok(file) = OpenOptions::new().read(true).write(true).open(&path) else { return Ok(None) };
    let held = fcntl_getlk(&file, &Flock::from(FlockType::WriteLock));
    let held = held.with_context(|| format!("ask who holds {}", path.display()))?;
    Ok(held.and_then(|lock| lock.pid).map(|pid| pid.as_raw_nonzero().get()))
}

pub(super) fn start(program: &Path) -> Result<()> {
    // Before anything changes: the cgroup below would be the other cluster's.
    if TcpListener::bind(API).is_err() {
        bail!(
            "{API} is taken: another clone's cluster runs on this machine; end it with its `cargo xtask cluster down`"
        );
    }
    let data = data()?;
    fs::create_dir_all(data.join("logs")).with_context(|| format!("create {}", data.display()))?;
    save_sysctls()?;
    // Left by a node that did not end with `down`, such as at a reboot.
    remove_cgroups()?;
    let log = data.join("logs/node.log");
    let output = File::create(&log).with_context(|| format!("create {}", log.display()))?;
    let mut command = Command::new(program);
    command.arg("node").arg("-data").arg(&data);
    command.arg("-config").arg(workspace::root().join("deploy/cluster/config"));
    command.args(["-port", &format!("{API}=127.0.0.1:6443")]);
    command.args(["-port", &format!("127.0.0.1:{NODE_PORT}={NODE_PORT}")]);
    command.stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output);
    // It starts the node in another session, and ends.
    let status = daemon::spawn(command)?.wait()?;
    let begun = daemon::poll(Duration::from_secs(20), find)?;
    if !status.success() || begun.is_none() {
        bail!(
            "the node does not start:\n{}",
            daemon::tail(&fs::read_to_string(&log).unwrap_or_default(), 12)
        );
    }
    Ok(())
}

/// Kills the node; the kernel then ends its processes and removes its mounts and its network. The rest are files.
pub(super) fn down() -> Result<()> {
    if let Some(pid) = find()? {
        let target = Pid::from_raw(pid).context("a process id")?;
        let _ = kill_process(target, Signal::KILL);
        if daemon::poll(Duration::from_secs(60), || Ok((!daemon::is_alive(pid)).then_some(())))?.is_none() {
            bail!("the node's process {pid} does not end");
        }
    }
    if !dir()?.exists() {
        // What runs is another clone's.
        return Ok(());
    }
    remove_cgroups()?;
    restore_sysctls()?;
    let dir = dir()?;
    // The last mounts go a moment after the last process.
    let gone = daemon::poll(Duration::from_secs(20), || {
        if !dir.exists() {
            return Ok(Some(()));
        }
        Ok(fs::remove_dir_all(&dir).ok())
    })?;
    if gone.is_none() {
        fs::remove_dir_all(&dir).with_context(|| format!("remove {}", dir.display()))?;
    }
    Ok(())
}

/// Everything with the node's cgroup in its name, from the leaves up; its processes are gone.
fn remove_cgroups() -> Result<()> {
    let top = Path::new("/sys/fs/cgroup");
    let mut groups = vec![top.join(CGROUP)];
    for hierarchy in fs::read_dir(top).into_iter().flatten().flatten() {
        groups.push(hierarchy.path().join(CGROUP));
    }
    for group in groups.iter().filter(|group| group.is_dir()) {
        let gone = daemon::poll(Duration::from_secs(10), || Ok(remove_tree(group).then_some(())))?;
        if gone.is_none() {
            bail!("{} has processes still", group.display());
        }
    }
    Ok(())
}

fn remove_tree(group: &Path) -> bool {
    for entry in fs::read_dir(group).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_tree(&entry.path());
        }
    }
    fs::remove_dir(group).is_ok()
}

fn save_sysctls() -> Result<()> {
    let path = dir()?.join("sysctls");
    // After a node that did not end with `down`, these are the kubelet's.
    if path.exists() {
        return Ok(());
    }
    let value = |name| fs::read_to_string(Path::new("/proc/sys").join(name)).unwrap_or_default();
    let lines: String = SYSCTLS.iter().map(|name| format!("{name} {}\n", value(name).trim())).collect();
    fs::write(&path, lines).with_context(|| format!("write {}", path.display()))
}

fn restore_sysctls() -> Result<()> {
    let Ok(saved) = fs::read_to_string(dir()?.join("sysctls")) else { return Ok(()) };
    for (name, value) in saved.lines().filter_map(|line| line.split_once(' ')) {
        let path = Path::new("/proc/sys").join(name);
        if fs::read_to_string(&path).is_ok_and(|now| now.trim() != value) {
            fs::write(&path, value).with_context(|| format!("restore {}", path.display()))?;
        }
    }
    Ok(())
}

/// The administrator's kubeconfig, with the address that the machine knows. `false` while the node has none yet.
pub(super) fn write_kubeconfig(api: &str) -> Result<bool> {
    if find()?.is_none() {
        bail!("the node ended. {}", last_words());
    }
    // The last one that is made: all other certificates exist by then.
    let made = data()?.join("pki/kubelet.conf").exists();
    let Ok(inside) = fs::read_to_string(data()?.join("pki/super-admin.conf")) else { return Ok(false) };
    let path = super::kubeconfig()?;
    let outside = inside.replace("10.213.255.1:6443", api).replace(KUBEADMS_CONTEXT, super::CONTEXT);
    fs::write(&path, outside).with_context(|| format!("write {}", path.display()))?;
    Ok(made)
}

/// A command of containerd's own client inside the node, with a file as its input.
pub(super) fn containerd(args: &[&str], input: Option<File>) -> Result<String> {
    let pid = find()?.context("no cluster runs: cargo xtask cluster up")?;
    let mut command = Command::new("nsenter");
    command.args(["--mount", "--target", &pid.to_string(), "--", "ctr", "--namespace", "k8s.io"]).args(args);
    // An image of a hundred megabytes takes seconds.
    let input = input.map_or_else(Stdio::null, Stdio::from);
    let output = daemon::run_with(input, command, Duration::from_secs(180))?;
    if !output.status.success() {
        bail!("ctr {}: {}", args.join(" "), String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// What a node that fails said last.
pub(super) fn last_words() -> String {
    let Ok(logs) = data().map(|data| data.join("logs")) else { return String::new() };
    let mut words = format!("Its logs are in {}; their ends:\n", workspace::shown(&logs));
    for name in ["node", "kube-apiserver", "kubelet", "containerd"] {
        let text = fs::read_to_string(logs.join(format!("{name}.log"))).unwrap_or_default();
        words += &format!("  {name}\n{}\n", daemon::tail(&text, 4));
    }
    words
}
