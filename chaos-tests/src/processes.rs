//! Finding and ending the processes of a rig.

use std::fs;
use std::path::Path;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// All processes whose command line names `path`.
pub(crate) fn naming(path: &Path) -> Vec<Pid> {
    let needle = path.as_os_str().as_encoded_bytes();
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    let own = i32::try_from(std::process::id()).unwrap_or(0);
    pids.filter(|&pid| pid != own)
        .filter(|pid| {
            let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            line.windows(needle.len()).any(|window| window == needle)
        })
        .map(Pid::from_raw)
        .collect()
}

/// Ends every process in the cgroups below `parent` (`/name`), then removes the cgroups.
pub(crate) fn clear_cgroups(parent: &str) {
    let hierarchies = fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten().map(|entry| entry.path());
    let roots = hierarchies.chain(std::iter::once("/sys/fs/cgroup".into()));
    for root in roots {
        let dir = root.join(parent.trim_start_matches('/'));
        for _ in 0..50 {
            if !dir.exists() {
                break;
            }
            kill_below(&dir);
            remove_below(&dir);
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
    }
}

fn kill_below(dir: &Path) {
    // What a daemon froze when it was killed itself takes no signal before it is thawed.
    for (file, thawed) in [("freezer.state", "THAWED"), ("cgroup.freeze", "0")] {
        if dir.join(file).exists() {
            let _ = fs::write(dir.join(file), thawed);
        }
    }
    let text = fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default();
    for pid in text.lines().filter_map(|line| line.parse().ok()).map(Pid::from_raw) {
        // Gone already is just as well.
        let _ = kill(pid, Signal::SIGKILL);
    }
    for sub in subdirs(dir) {
        kill_below(&sub);
    }
}

fn remove_below(dir: &Path) {
    for sub in subdirs(dir) {
        remove_below(&sub);
    }
    // Busy until its last process is reaped: tried again.
    let _ = fs::remove_dir(dir);
}

fn subdirs(dir: &Path) -> Vec<std::path::PathBuf> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).filter(|path| path.is_dir()).collect()
}

/// Whether the stock client is here to be tried; says so if not.
#[must_use]
pub fn has_docker() -> bool {
    let there = std::process::Command::new("docker").arg("--version").output().is_ok();
    if !there {
        eprintln!("SKIPPED: there is no docker client on the PATH");
    }
    there
}
