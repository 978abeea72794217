//! Roots by overlayfs.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use nix::mount::{MsFlags, mount};

use super::Storage;
use crate::container::rootfs::{ContainerDirs, is_mount_point};
use crate::mounts::unmount;

/// overlayfs takes its options in one page.
const OPTIONS_LEN_MAX: usize = 4095;

#[derive(Debug)]
pub(crate) struct Overlay2;

impl Storage for Overlay2 {
    fn raise(&self, dirs: &ContainerDirs, layers: &[PathBuf]) -> io::Result<()> {
        let (upper, work, root) = (dirs.upper(), dirs.work(), dirs.rootfs());
        for dir in [&upper, &work] {
            fs::create_dir_all(dir)?;
        }
        dirs.make_rootfs()?;
        fs::set_permissions(&upper, fs::Permissions::from_mode(0o755))?;
        if is_mount_point(&root)? {
            return Ok(());
        }
        let nothing = dirs.data.join("nothing");
        if layers.is_empty() {
            // An overlay is over something.
            fs::create_dir_all(&nothing)?;
        }
        let layers = if layers.is_empty() { std::slice::from_ref(&nothing) } else { layers };
        let layers: Vec<PathBuf> = layers.iter().map(|dir| dirs.view(dir)).collect();
        let (lower, upper, work) = (lower_dirs(&layers), dirs.view(&upper), dirs.view(&work));
        let options = format!("lowerdir={lower},upperdir={},workdir={}", upper.display(), work.display());
        if options.len() > OPTIONS_LEN_MAX {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("the image has {} layers, more than overlayfs takes at once", layers.len()),
            ));
        }
        dirs.as_root(|| Ok(mount(Some("overlay"), &root, Some("overlay"), MsFlags::empty(), Some(options.as_str()))?))
    }

    fn note_changes(&self, _: &ContainerDirs) -> io::Result<()> {
        // The kernel does.
        Ok(())
    }

    fn lower(&self, dirs: &ContainerDirs) -> io::Result<()> {
        unmount(&dirs.rootfs())
    }
}

/// Whether the file system of `dir` can be below an overlay and take what is written.
pub(super) fn try_in(dir: &Path) -> io::Result<()> {
    let place = dir.join("overlay-trial");
    let path = |name: &str| place.join(name);
    let trial = || {
        for name in ["lower", "upper", "work", "root"] {
            fs::create_dir_all(path(name))?;
        }
        let [lower, upper, work] = ["lower", "upper", "work"].map(|name| path(name).display().to_string());
        let options = format!("lowerdir={lower},upperdir={upper},workdir={work}");
        mount(Some("overlay"), &path("root"), Some("overlay"), MsFlags::empty(), Some(options.as_str()))?;
        // Where layers are hidden by extended attributes that the file system cannot have, nothing is said above.
        let written = fs::write(path("root").join("file"), "").and_then(|()| {
            xattr::set(path("upper"), "trusted.overlay.trial", b"y")?;
            unmount(&path("root"))
        });
        written.or_else(|error| unmount(&path("root")).and(Err(error)))
    };
    let tried = trial();
    // It may not be there.
    let _ = fs::remove_dir_all(&place);
    tried
}

/// Layers as overlayfs takes them, the uppermost first. It refuses one that is there twice, as steps of a
/// build that change nothing make them; the upper one hides whatever the lower would show.
fn lower_dirs(layers: &[PathBuf]) -> String {
    let mut seen = BTreeSet::new();
    let uppermost = layers.iter().rev().filter(|dir| seen.insert(*dir));
    uppermost.map(|dir| dir.display().to_string()).collect::<Vec<_>>().join(":")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_layer_that_is_there_twice_is_mounted_once_where_it_is_uppermost() {
        let layers = ["/a", "/b", "/a", "/c"].map(PathBuf::from);
        assert_eq!(lower_dirs(&layers), "/c:/a:/b");
    }
}
