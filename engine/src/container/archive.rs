//! Files into and out of a container's file system, as tar archives.
//!
//! A container may change its files while they are read or written, links above all. So this is done
//! by a process of its own that has the container's root for its root: whatever it follows stays
//! inside.

use std::fs;
use std::io;
use std::path::Path;

use crate::container::id_map;
use crate::image::layer;
use crate::image::unpack::{self, Placing};

/// What an exit code of the helper means.
pub(crate) const NOT_FOUND: i32 = 44;
pub(crate) const NOT_A_DIRECTORY: i32 = 45;

/// Has the helper leave a directory a directory.
pub(crate) const KEEP_KINDS: &str = "keep";

/// `skep archive-out USERS ROOT PATH NAME`: writes what is at PATH to standard output, as NAME; an empty name: all
/// below it. USERS is a user namespace; none: the host's.
pub fn archive_out_main(users: &Path, root: &Path, path: &Path, name: &str) -> i32 {
    finish(enter(users, root).and_then(|()| {
        let out = io::BufWriter::with_capacity(1 << 16, io::stdout().lock());
        if name.is_empty() { layer::pack_children(path, out) } else { layer::pack_tree(path, Path::new(name), out) }
    }))
}

/// `skep archive-in USERS ROOT PATH KINDS OWNER`: unpacks standard input into the directory PATH. KINDS is `keep` if a
/// directory stays one; OWNER is `UID:GID`, or empty.
pub fn archive_in_main(users: &Path, root: &Path, path: &Path, kinds: &str, owner: &str) -> i32 {
    let owner = owner.split_once(':').and_then(|(uid, gid)| Some((uid.parse().ok()?, gid.parse().ok()?)));
    let placing = Placing { keeps_kinds: kinds == KEEP_KINDS, owner };
    finish(enter(users, root).and_then(|()| {
        let meta = fs::metadata(path)?;
        if !meta.is_dir() {
            return Err(io::Error::from(io::ErrorKind::NotADirectory));
        }
        unpack::place_files(io::stdin().lock(), path, placing).map_err(io::Error::other)
    }))
}

fn enter(users: &Path, root: &Path) -> io::Result<()> {
    // What leads there may be closed to who we are then.
    std::env::set_current_dir(root)?;
    if !users.as_os_str().is_empty() {
        id_map::enter_user_namespace(&fs::File::open(users)?)?;
    }
    nix::unistd::chroot(".")?;
    std::env::set_current_dir("/")
}

fn finish(result: io::Result<()>) -> i32 {
    match result {
        Ok(()) => 0,
        Err(error) => {
            eprintln!("{}", skep_api::with_causes(&error));
            match error.kind() {
                io::ErrorKind::NotFound => NOT_FOUND,
                io::ErrorKind::NotADirectory => NOT_A_DIRECTORY,
                _ => 1,
            }
        }
    }
}
