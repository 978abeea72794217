//! Copies of files, with owners, modes, times, extended attributes and further names.

use std::collections::BTreeMap;
use std::fs::{self, Metadata};
use std::io;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _, lchown, symlink};
use std::path::{Path, PathBuf};

use nix::fcntl::AT_FDCWD;
use nix::sys::stat::{Mode, SFlag, UtimensatFlags, mknod, utimensat};
use nix::sys::time::TimeSpec;

/// What overlayfs says of a directory to itself.
const OVERLAY_PREFIXES: [&str; 2] = ["trusted.overlay.", "user.overlay."];

/// Copies files into one tree; what has several names there has several here.
#[derive(Debug, Default)]
pub(crate) struct Copier {
    /// The first copy of each file that has several names.
    links: BTreeMap<(u64, u64), PathBuf>,
}

impl Copier {
    /// Copies what is no directory; nothing may be at `to`. Sockets are nobody's data.
    pub(crate) fn copy_file(&mut self, from: &Path, to: &Path, meta: &Metadata) -> io::Result<()> {
        let kind = meta.file_type();
        if kind.is_socket() {
            return Ok(());
        }
        if meta.nlink() > 1 {
            if let Some(first) = self.links.get(&(meta.dev(), meta.ino())) {
                return fs::hard_link(first, to);
            }
            self.links.insert((meta.dev(), meta.ino()), to.to_owned());
        }
        if kind.is_symlink() {
            symlink(fs::read_link(from)?, to)?;
        } else if kind.is_file() {
            // By reference where the file system can.
            fs::copy(from, to)?;
        } else {
            let kind = SFlag::from_bits_truncate(meta.mode() & libc::S_IFMT);
            mknod(to, kind, Mode::empty(), meta.rdev())?;
        }
        copy_attributes(from, to, meta)
    }

    /// Copies all below a directory into another one, but for devices.
    pub(crate) fn copy_children(&mut self, from: &Path, to: &Path) -> io::Result<()> {
        for entry in fs::read_dir(from)? {
            let entry = entry?;
            let (source, target, meta) = (entry.path(), to.join(entry.file_name()), entry.metadata()?);
            let kind = meta.file_type();
            if kind.is_dir() {
                fs::create_dir(&target)?;
                self.copy_children(&source, &target)?;
                copy_attributes(&source, &target, &meta)?;
            } else if !kind.is_char_device() && !kind.is_block_device() {
                self.copy_file(&source, &target, &meta)?;
            }
        }
        Ok(())
    }
}

/// Gives `to` the owner, mode, extended attributes and times of `from`; follows no link.
pub(crate) fn copy_attributes(from: &Path, to: &Path, meta: &Metadata) -> io::Result<()> {
    lchown(to, Some(meta.uid()), Some(meta.gid()))?;
    if !meta.is_symlink() {
        fs::set_permissions(to, fs::Permissions::from_mode(meta.mode() & 0o7777))?;
    }
    for name in xattr::list(from).into_iter().flatten() {
        let text = name.to_string_lossy();
        if OVERLAY_PREFIXES.iter().any(|prefix| text.starts_with(prefix)) {
            continue;
        }
        if let Ok(Some(value)) = xattr::get(from, &name)
            && let Err(error) = xattr::set(to, &name, &value)
            && error.kind() != io::ErrorKind::Unsupported
        {
            return Err(error);
        }
    }
    let accessed = TimeSpec::new(meta.atime(), meta.atime_nsec());
    let modified = TimeSpec::new(meta.mtime(), meta.mtime_nsec());
    utimensat(AT_FDCWD, to, &accessed, &modified, UtimensatFlags::NoFollowSymlink)?;
    Ok(())
}
