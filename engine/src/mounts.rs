//! What is mounted where.

use std::fs;
use std::io;
use std::path::Path;

use nix::mount::{MntFlags, umount2};

/// Whether something is mounted at `path`, of whatever file system: a bind of the same one, too.
pub(crate) fn is_mounted(path: &Path) -> io::Result<bool> {
    Ok(names(&fs::read_to_string("/proc/self/mountinfo")?, path))
}

fn names(mountinfo: &str, path: &Path) -> bool {
    let path = path.display().to_string().replace('\\', "\\134").replace(' ', "\\040");
    mountinfo.lines().any(|line| line.split(' ').nth(4) == Some(&path))
}

/// Takes down all that is mounted at `path`: what is removed next must not be reached through it.
pub(crate) fn unmount(path: &Path) -> io::Result<()> {
    loop {
        match umount2(path, MntFlags::MNT_DETACH) {
            Ok(()) => {}
            // Nothing is, or nothing is there.
            Err(nix::Error::EINVAL | nix::Error::ENOENT) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_are_found_by_their_whole_path() {
        let mounts = "36 35 98:0 / /run/a\\040b rw,noatime - ext4 /dev/x rw\n37 35 98:0 / /run/c rw - ext4 /dev/x rw\n";
        assert!(names(mounts, Path::new("/run/a b")) && names(mounts, Path::new("/run/c")));
        assert!(!names(mounts, Path::new("/run")) && !names(mounts, Path::new("/run/c/d")));
    }
}
