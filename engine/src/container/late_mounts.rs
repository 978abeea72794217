//! Mounts that the built-in runtime must not see: what a container has at `/dev`, and below it.
//!
//! libcontainer makes its devices and links in whatever is mounted at `/dev`, which would be the host's own there,
//! and fails on what exists already. So it gets the usual file system to make them in; what is to lie above is mounted
//! afterwards by this, which it runs as a hook before it enters the container's root.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd as _;
use std::path::{Path, PathBuf};

use nix::mount::{MsFlags, mount};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use skep_api::with_causes;

use crate::sys::{self, Bind, Depth};

/// Where a container's terminals are.
const TERMINALS: &str = "/dev/pts";

/// One of the runtime-spec's `mounts`.
#[derive(Debug, Serialize, Deserialize)]
struct LateMount {
    destination: PathBuf,
    #[serde(rename = "type")]
    kind: String,
    source: PathBuf,
    options: Vec<String>,
}

/// Takes mounts at and below `/dev` out of `mounts`, if something of the user's is to be at `/dev`; returns the hook that
/// makes them. What the hook complains of goes to `complaints`.
///
/// Terminals stay the container's own: those of what is mounted there are for whoever is root alone, on many hosts.
pub(crate) fn take_hook(mounts: &mut Vec<Value>, rootfs: &Path, complaints: &Path) -> Option<Value> {
    let target = |mount: &Value| PathBuf::from(mount["destination"].as_str().unwrap_or_default());
    let first = mounts.iter().rposition(|mount| target(mount) == Path::new("/dev"))?;
    if mounts[first]["type"] == "tmpfs" && mounts[first]["source"] == "tmpfs" {
        return None;
    }
    let mut late = mounts.split_off(first);
    let elsewhere: Vec<_> = late.extract_if(.., |mount| !target(mount).starts_with("/dev")).collect();
    if let Some(terminals) = mounts.iter().position(|mount| target(mount) == Path::new(TERMINALS)) {
        late.insert(1, mounts.remove(terminals));
    }
    mounts.extend(elsewhere);
    let late = json!(late).to_string();
    Some(json!({"path": "/proc/self/exe", "args": ["skep-shim", "shim-mounts", rootfs, complaints, late]}))
}

/// `skep shim-mounts ROOT COMPLAINTS MOUNTS`: makes the mounts in a container's root.
pub fn late_mounts_main(root: &Path, complaints: &Path, mounts: &str) -> i32 {
    match serde_json::from_str(mounts).map_err(io::Error::other).and_then(|mounts: Vec<_>| make_all(root, &mounts)) {
        Ok(()) => 0,
        Err(error) => {
            drop(fs::write(complaints, with_causes(&error)));
            1
        }
    }
}

fn make_all(root: &Path, mounts: &[LateMount]) -> io::Result<()> {
    for mount in mounts {
        let made = mount.make(root).map_err(|error| {
            let (source, place) = (mount.source.display(), mount.destination.display());
            io::Error::new(error.kind(), format!("{source} cannot be mounted at {place}: {error}"))
        });
        match made {
            // What is at /dev has no place for terminals.
            Err(error) if mount.destination == Path::new(TERMINALS) && error.kind() == io::ErrorKind::NotFound => {}
            made => made?,
        }
    }
    if let (Ok(own), Ok(place)) = (open_in(root, "dev/pts/ptmx"), open_in(root, "dev/ptmx")) {
        let how = Bind { depth: Depth::Alone, read_only: None, propagation: (libc::MS_PRIVATE, Depth::Alone) };
        sys::bind(&path_of(&own), &place, how)?;
    }
    Ok(())
}

/// Links lead nowhere but within the root.
fn open_in(root: &Path, path: impl AsRef<Path>) -> io::Result<File> {
    sys::open_place_in_root(root, path.as_ref())
}

fn path_of(file: &File) -> PathBuf {
    format!("/proc/self/fd/{}", file.as_raw_fd()).into()
}

impl LateMount {
    fn make(&self, root: &Path) -> io::Result<()> {
        let place = open_in(root, self.destination.strip_prefix("/").unwrap_or(&self.destination))?;
        let has = |option: &str| self.options.iter().any(|given| given == option);
        if self.kind == "bind" {
            let deep = |deep: bool| if deep { Depth::WithAllBelow } else { Depth::Alone };
            let read_only = has("ro").then(|| deep(has("rro")));
            return sys::bind(
                &self.source,
                &place,
                Bind { depth: deep(has("rbind")), read_only, propagation: self.propagation() },
            );
        }
        let data: Vec<&str> = self.options.iter().map(String::as_str).filter(|option| option.contains('=')).collect();
        let flags = [
            ("ro", MsFlags::MS_RDONLY),
            ("nosuid", MsFlags::MS_NOSUID),
            ("nodev", MsFlags::MS_NODEV),
            ("noexec", MsFlags::MS_NOEXEC),
        ];
        let flags = flags.into_iter().filter(|(name, _)| has(name)).map(|(_, flag)| flag).collect();
        Ok(mount(Some(&self.source), &path_of(&place), Some(self.kind.as_str()), flags, Some(data.join(",").as_str()))?)
    }

    fn propagation(&self) -> (u64, Depth) {
        let words = [("private", libc::MS_PRIVATE), ("slave", libc::MS_SLAVE), ("shared", libc::MS_SHARED)];
        let said = self.options.iter().find_map(|option| {
            let (word, depth) =
                option.strip_prefix('r').map_or((option.as_str(), Depth::Alone), |word| (word, Depth::WithAllBelow));
            words.iter().find(|(name, _)| *name == word).map(|(_, flag)| (*flag, depth))
        });
        said.unwrap_or((libc::MS_PRIVATE, Depth::WithAllBelow))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mounts(own: &[(&str, &str)]) -> Vec<Value> {
        let system = [("/proc", "proc"), ("/dev", "tmpfs"), ("/dev/pts", "devpts")];
        let all = system
            .iter()
            .map(|(target, kind)| (target, kind, kind))
            .chain(own.iter().map(|(target, kind)| (target, kind, &"/host")));
        all.map(|(target, kind, source)| json!({"destination": target, "type": kind, "source": source, "options": []}))
            .collect()
    }

    #[test]
    fn only_what_is_at_dev_and_below_it_is_made_later() {
        let mut all = mounts(&[("/data", "bind"), ("/dev", "bind"), ("/dev/own", "bind"), ("/srv/dev", "bind")]);
        let hook = take_hook(&mut all, Path::new("/root"), Path::new("/complaints")).unwrap();
        let targets: Vec<_> = all.iter().map(|mount| mount["destination"].as_str().unwrap()).collect();
        assert_eq!(targets, ["/proc", "/dev", "/data", "/srv/dev"]);
        let late: Vec<LateMount> = serde_json::from_str(hook["args"][4].as_str().unwrap()).unwrap();
        let targets: Vec<_> = late.iter().map(|mount| mount.destination.to_str().unwrap()).collect();
        assert_eq!(targets, ["/dev", "/dev/pts", "/dev/own"]);
    }

    #[test]
    fn without_a_mount_at_dev_nothing_is_late() {
        for own in [&[("/data", "bind")][..], &[("/dev/own", "bind")]] {
            let mut all = mounts(own);
            assert!(take_hook(&mut all, Path::new("/root"), Path::new("/complaints")).is_none());
            assert_eq!(all, mounts(own));
        }
    }
}
