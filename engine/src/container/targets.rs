//! Where a container's mounts may go: anywhere but into /proc, through which the kernel is spoken to. A
//! container that brings its own would have its limits written elsewhere.

use std::fs;
use std::io;
use std::os::fd::AsRawFd as _;
use std::path::{Component, Path, PathBuf};

use crate::container::config::{ContainerConfig, ContainerMount, MountSource};
use crate::sys;

/// Files that tell of the machine, which a container may be shown its own of. As runc has them.
const COVERABLE: [&str; 11] = [
    "/proc/cpuinfo",
    "/proc/diskstats",
    "/proc/loadavg",
    "/proc/meminfo",
    "/proc/net/dev",
    "/proc/slabinfo",
    "/proc/stat",
    "/proc/swaps",
    "/proc/sys/crypto/fips_enabled",
    "/proc/sys/kernel/ns_last_pid",
    "/proc/uptime",
];

/// Says why a mount may not go where it is to go.
pub(crate) fn check(mount: &ContainerMount) -> Result<(), String> {
    let target = plain(Path::new(&mount.target));
    // The host's /proc is a real one.
    let real =
        matches!(&mount.source, MountSource::Bind { path, .. } if path == "/proc") && target == Path::new("/proc");
    if real { Ok(()) } else { check_path(&mount.target, &target) }
}

/// The same of a file that is shown.
pub(crate) fn check_file(target: &str) -> Result<(), String> {
    check_path(target, &plain(Path::new(target)))
}

/// As [`check`], with what links in `rootfs` come to; nothing is mounted there yet.
pub(crate) fn check_in_root(config: &ContainerConfig, rootfs: &Path) -> io::Result<()> {
    for own in ["proc", "sys"] {
        if fs::symlink_metadata(rootfs.join(own)).is_ok_and(|meta| meta.is_symlink()) {
            return Err(io::Error::other(format!(
                "the image has a link in the place of /{own}: it is not to be trusted"
            )));
        }
    }
    let files = config.payloads.iter().map(|payload| &payload.target);
    for target in config.mounts.iter().map(|mount| &mount.target).chain(files) {
        let leads_to = resolved(rootfs, Path::new(target));
        if leads_to != plain(Path::new(target)) {
            check_path(target, &leads_to).map_err(io::Error::other)?;
        }
    }
    Ok(())
}

fn check_path(named: &str, target: &Path) -> Result<(), String> {
    if !target.starts_with("/proc") || COVERABLE.iter().any(|path| target == Path::new(path)) {
        return Ok(());
    }
    Err(format!("{named:?} cannot be mounted because it is inside /proc: choose another place in the container"))
}

/// A path from the root, without `.` and `..`.
fn plain(path: &Path) -> PathBuf {
    let mut plain = PathBuf::from("/");
    for component in path.components() {
        match component {
            Component::Normal(name) => plain.push(name),
            Component::ParentDir => drop(plain.pop()),
            Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
        }
    }
    plain
}

/// Where a path leads inside `rootfs`, as far as it is there; the rest as it stands.
pub(crate) fn resolved(rootfs: &Path, path: &Path) -> PathBuf {
    let wanted = plain(path);
    // By the name that the kernel has for it.
    let real = fs::File::open(rootfs).and_then(|root| fs::read_link(format!("/proc/self/fd/{}", root.as_raw_fd())));
    let real = real.unwrap_or_else(|_| rootfs.to_owned());
    for there in wanted.ancestors() {
        let inside = there.strip_prefix("/").unwrap_or(there);
        let Ok(found) = sys::open_in_root(rootfs, inside) else { continue };
        let Ok(found) = fs::read_link(format!("/proc/self/fd/{}", found.as_raw_fd())) else { continue };
        let found = found.strip_prefix(&real).unwrap_or(&found).to_owned();
        // Not joined with nothing, which would add a slash.
        let mut led = Path::new("/").join(found);
        led.extend(wanted.strip_prefix(there).into_iter().flatten());
        return led;
    }
    wanted
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tmpfs(target: &str) -> ContainerMount {
        let source = MountSource::Tmpfs { size_bytes: None, mode: None, options: Vec::new() };
        ContainerMount { source, target: target.into(), read_only: false }
    }

    #[test]
    fn nothing_is_mounted_in_proc_but_what_tells_of_the_machine() {
        for (target, good) in [
            ("/data", true),
            ("/process", true),
            ("/proc/meminfo", true),
            ("/proc", false),
            ("/proc/", false),
            ("/proc/self/attr", false),
            ("/x/../proc/sys", false),
            ("proc/./sys", false),
        ] {
            assert_eq!(check(&tmpfs(target)).is_ok(), good, "{target}");
        }
    }

    #[test]
    fn links_into_proc_are_seen_through() {
        let root = tempfile::tempdir().unwrap();
        for dir in ["proc", "sys", "data"] {
            fs::create_dir(root.path().join(dir)).unwrap();
        }
        std::os::unix::fs::symlink("../../proc", root.path().join("data/link")).unwrap();
        let config = |target: &str| ContainerConfig { mounts: vec![tmpfs(target)], ..ContainerConfig::default() };
        let check = |target: &str| check_in_root(&config(target), root.path());
        assert!(check("/data/other/new").is_ok());
        assert!(check("/data/link/self/attr").is_err());
        fs::remove_dir(root.path().join("sys")).unwrap();
        std::os::unix::fs::symlink("/data", root.path().join("sys")).unwrap();
        assert!(check("/data").is_err());
    }
}
