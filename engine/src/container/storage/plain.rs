//! Roots that are plain directories: copies of their layers, or snapshots of such a copy.
//!
//! What such a root was when it was made is noted for each of its files: inode and time of the last change of any kind, which
//! nobody can set. What has another one since is changed.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, Metadata};
use std::io;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use skep_api::encoding;

use super::Storage;
use crate::container::rootfs::ContainerDirs;
use crate::image::unpack::{OPAQUE, is_opaque};
use crate::tree::{Copier, copy_attributes};
use crate::{disk, sys};

/// Copies.
#[derive(Debug)]
pub(super) struct Vfs;

impl Storage for Vfs {
    fn raise(&self, dirs: &ContainerDirs, layers: &[PathBuf]) -> io::Result<()> {
        raise(dirs, |root| {
            fs::create_dir(root)?;
            apply_all(layers, root)?;
            disk::write_passing(&dirs.made(), &Made::of(root)?.to_bytes())
        })
    }

    fn note_changes(&self, dirs: &ContainerDirs) -> io::Result<()> {
        note_changes(dirs)
    }

    fn lower(&self, _: &ContainerDirs) -> io::Result<()> {
        Ok(())
    }
}

/// Snapshots of one copy for each list of layers.
#[derive(Debug)]
pub(super) struct Btrfs {
    trees: PathBuf,
}

impl Btrfs {
    pub(super) fn new(data_dir: &Path) -> Self {
        Self { trees: data_dir.join("image/trees") }
    }

    /// The copy of these layers; made if it is not there.
    fn tree(&self, layers: &[PathBuf]) -> io::Result<PathBuf> {
        let names: Vec<String> = layers.iter().map(|layer| name_of(layer)).collect();
        let tree = self.trees.join(hex::encode(&Sha256::digest(names.join(":"))[..16]));
        if tree.with_extension("layers").exists() {
            return Ok(tree);
        }
        fs::create_dir_all(&self.trees)?;
        // Others may be making the same one.
        let new = self.trees.join(format!("new-{:016x}", rand::random::<u64>()));
        sys::create_subvolume(&new)?;
        let made = apply_all(layers, &new).and_then(|()| {
            disk::write_passing(&tree.with_extension("made"), &Made::of(&new)?.to_bytes())?;
            fs::rename(&new, &tree)?;
            disk::write_passing(&tree.with_extension("layers"), names.join("\n").as_bytes())
        });
        match made {
            // Theirs is as good.
            Err(_) if tree.with_extension("layers").exists() => remove(&new).map(|()| tree),
            Err(error) => remove(&new).and(Err(error)),
            Ok(()) => Ok(tree),
        }
    }
}

impl Storage for Btrfs {
    fn raise(&self, dirs: &ContainerDirs, layers: &[PathBuf]) -> io::Result<()> {
        raise(dirs, |root| {
            let tree = self.tree(layers)?;
            sys::snapshot_subvolume(&tree, root)?;
            fs::copy(tree.with_extension("made"), dirs.made())?;
            Ok(())
        })
    }

    fn note_changes(&self, dirs: &ContainerDirs) -> io::Result<()> {
        note_changes(dirs)
    }

    fn lower(&self, _: &ContainerDirs) -> io::Result<()> {
        Ok(())
    }

    fn prune(&self, is_there: &dyn Fn(&str) -> bool) -> io::Result<()> {
        for entry in fs::read_dir(&self.trees).into_iter().flatten() {
            let path = entry?.path();
            if path.extension().is_none_or(|extension| extension != "layers") {
                continue;
            }
            if !fs::read_to_string(&path)?.lines().all(is_there) {
                // What is half gone is no tree.
                fs::remove_file(&path)?;
                remove(&path.with_extension(""))?;
                fs::remove_file(path.with_extension("made"))?;
            }
        }
        Ok(())
    }
}

/// Whether `dir` lies on btrfs.
pub(super) fn is_btrfs(dir: &Path) -> io::Result<()> {
    if nix::sys::statfs::statfs(dir)?.filesystem_type() == nix::sys::statfs::BTRFS_SUPER_MAGIC {
        return Ok(());
    }
    Err(io::Error::new(io::ErrorKind::Unsupported, "it is not on btrfs"))
}

/// Makes a container's root, unless it is there, whole.
fn raise(dirs: &ContainerDirs, make: impl FnOnce(&Path) -> io::Result<()>) -> io::Result<()> {
    if dirs.made().exists() {
        return Ok(());
    }
    let root = dirs.plain_rootfs();
    remove(&root)?;
    make(&root)
}

fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn name_of(layer: &Path) -> String {
    layer.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// Copies layers over each other, the lowest first.
fn apply_all(layers: &[PathBuf], root: &Path) -> io::Result<()> {
    layers.iter().try_for_each(|layer| {
        apply(&mut Copier::default(), layer, root)?;
        copy_attributes(layer, root, &fs::metadata(layer)?)
    })
}

fn is_whiteout(meta: &Metadata) -> bool {
    meta.file_type().is_char_device() && meta.rdev() == 0
}

/// Copies a directory of a layer over what is there. Nothing in the root is followed.
fn apply(copier: &mut Copier, layer: &Path, root: &Path) -> io::Result<()> {
    for entry in fs::read_dir(layer)? {
        let entry = entry?;
        let (from, to, meta) = (entry.path(), root.join(entry.file_name()), entry.metadata()?);
        let before = fs::symlink_metadata(&to).ok();
        let stays = meta.is_dir() && before.as_ref().is_some_and(Metadata::is_dir) && !is_opaque(&from);
        match before {
            Some(before) if before.is_dir() && !stays => fs::remove_dir_all(&to)?,
            Some(_) if !stays => fs::remove_file(&to)?,
            _ => {}
        }
        if meta.is_dir() {
            if !stays {
                fs::create_dir(&to)?;
            }
            apply(copier, &from, &to)?;
            copy_attributes(&from, &to, &meta)?;
        } else if !is_whiteout(&meta) {
            copier.copy_file(&from, &to, &meta)?;
        }
    }
    Ok(())
}

/// What a file was last: its inode, and the time of its last change.
type Stamp = (u64, i64, i64);

fn stamp(meta: &Metadata) -> Stamp {
    (meta.ino(), meta.ctime(), meta.ctime_nsec())
}

/// A root when it was made, by path.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Made(BTreeMap<Vec<u8>, Stamp>);

impl Made {
    fn of(root: &Path) -> io::Result<Self> {
        let mut made = Self::default();
        made.add(root, Path::new(""))?;
        Ok(made)
    }

    fn add(&mut self, root: &Path, dir: &Path) -> io::Result<()> {
        for entry in fs::read_dir(root.join(dir))? {
            let entry = entry?;
            let (path, meta) = (dir.join(entry.file_name()), entry.metadata()?);
            self.0.insert(path.as_os_str().as_bytes().to_vec(), stamp(&meta));
            if meta.is_dir() {
                self.add(root, &path)?;
            }
        }
        Ok(())
    }

    fn read(path: &Path) -> io::Result<Self> {
        encoding::decode_serde(&fs::read(path)?).map_err(io::Error::other)
    }

    fn to_bytes(&self) -> Vec<u8> {
        encoding::encode_serde(self)
    }

    fn get(&self, path: &Path) -> Option<&Stamp> {
        self.0.get(path.as_os_str().as_bytes())
    }
}

/// Writes down, as overlayfs has it, what was changed in a root since it was made.
fn note_changes(dirs: &ContainerDirs) -> io::Result<()> {
    let upper = dirs.upper();
    remove(&upper)?;
    if !dirs.made().exists() {
        return Ok(());
    }
    let root = dirs.plain_rootfs();
    let mut noting = Noting { made: Made::read(&dirs.made())?, root: &root, upper: &upper, copier: Copier::default() };
    fs::create_dir(&upper)?;
    noting.directory(Path::new(""))?;
    noting.finish(Path::new(""))
}

struct Noting<'a> {
    made: Made,
    root: &'a Path,
    upper: &'a Path,
    copier: Copier,
}

impl Noting<'_> {
    /// Notes what is different below a directory that was there before.
    fn directory(&mut self, dir: &Path) -> io::Result<()> {
        let mut there = BTreeSet::new();
        for entry in fs::read_dir(self.root.join(dir))? {
            let entry = entry?;
            let (path, meta) = (dir.join(entry.file_name()), entry.metadata()?);
            let before = self.made.get(&path).copied();
            let same = before == Some(stamp(&meta));
            let same_directory = meta.is_dir() && before.is_some_and(|(inode, ..)| inode == meta.ino());
            if same_directory {
                if !same {
                    self.make_way(&path)?;
                }
                self.directory(&path)?;
            } else if !same {
                self.make_way(dir)?;
                self.whole(&path, &meta, before.is_some())?;
            }
            there.insert(path);
        }
        let gone = self.children_before(dir).into_iter().filter(|path| !there.contains(path)).collect::<Vec<_>>();
        for path in gone {
            self.make_way(dir)?;
            mknod(&self.upper.join(path), SFlag::S_IFCHR, Mode::empty(), makedev(0, 0))?;
        }
        Ok(())
    }

    /// What was in a directory when the root was made.
    fn children_before(&self, dir: &Path) -> Vec<PathBuf> {
        let mut prefix = dir.as_os_str().as_bytes().to_vec();
        if !prefix.is_empty() {
            prefix.push(b'/');
        }
        let below = self.made.0.range(prefix.clone()..).map(|(path, _)| path);
        let below = below.take_while(|path| path.starts_with(&prefix));
        let children = below.filter(|path| !path.is_empty() && !path[prefix.len()..].contains(&b'/'));
        children.map(|path| PathBuf::from(std::ffi::OsString::from_vec(path.clone()))).collect()
    }

    /// Copies what is new, with all below it.
    fn whole(&mut self, path: &Path, meta: &Metadata, replaces: bool) -> io::Result<()> {
        let (from, to) = (self.root.join(path), self.upper.join(path));
        if !meta.is_dir() {
            return self.copier.copy_file(&from, &to, meta);
        }
        fs::create_dir(&to)?;
        if replaces {
            xattr::set(&to, OPAQUE[0], b"y").or_else(|_| xattr::set(&to, OPAQUE[1], b"y"))?;
        }
        for entry in fs::read_dir(&from)? {
            let entry = entry?;
            self.whole(&path.join(entry.file_name()), &entry.metadata()?, false)?;
        }
        copy_attributes(&from, &to, meta)
    }

    /// Has a directory that was there before be there.
    fn make_way(&self, dir: &Path) -> io::Result<()> {
        let mut way = PathBuf::new();
        for part in dir.components() {
            way.push(part);
            match fs::create_dir(self.upper.join(&way)) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }

    /// Gives directories that were there before their attributes, the innermost first: what is made in them changes their times.
    fn finish(&self, dir: &Path) -> io::Result<()> {
        for entry in fs::read_dir(self.upper.join(dir))? {
            let entry = entry?;
            let path = dir.join(entry.file_name());
            if entry.file_type()?.is_dir() && self.made.get(&path).is_some() {
                self.finish(&path)?;
            }
        }
        let from = self.root.join(dir);
        copy_attributes(&from, &self.upper.join(dir), &fs::metadata(&from)?)
    }
}
