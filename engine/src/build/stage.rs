//! Layers under way: file systems that are mounted to be changed, and what is copied into them.

use std::fs;
use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown, lchown, symlink};
use std::path::{Path, PathBuf};

use crate::build::chmod::Chmod;
use crate::build::context::{Named, Sources, clean};
use crate::build::copying::Piece;
use crate::container::rootfs::ContainerDirs;
use crate::container::user;
use crate::engine::Engine;
use crate::image::store::{Image, ImageStore};
use crate::image::{layer, unpack};
use crate::sys;

/// A file system of layers, mounted, with a new layer on top; gone when it is dropped.
#[derive(Debug)]
pub(crate) struct Mounted {
    dirs: ContainerDirs,
}

impl Mounted {
    pub(crate) fn new(engine: &Engine, layers: &[String]) -> io::Result<Self> {
        let (store, storage) = (engine.image_store(), engine.storage());
        let data = store.incoming()?;
        let mounted = Self { dirs: ContainerDirs { run: data.join("run"), data, shift: None, storage } };
        let dirs: Vec<PathBuf> = layers.iter().map(|layer| store.layer_dir(layer)).collect();
        mounted.dirs.mount_root(&dirs)?;
        Ok(mounted)
    }

    pub(crate) fn root(&self) -> PathBuf {
        self.dirs.rootfs()
    }

    /// Makes a layer of what was changed.
    pub(crate) fn seal(self, store: &ImageStore) -> io::Result<String> {
        self.dirs.unmount()?;
        seal_changes(store, &self.dirs, |_| ())
    }
}

/// The files of an image, mounted; gone when it is dropped.
#[derive(Debug)]
pub struct ImageFiles(Mounted);

impl ImageFiles {
    /// Where they are.
    #[must_use]
    pub fn root(&self) -> PathBuf {
        self.0.root()
    }

    /// Writes an archive of them.
    pub fn archive(&self, to: impl io::Write) -> io::Result<()> {
        layer::pack_children(&self.root(), to)
    }
}

impl Engine {
    /// Mounts an image's files.
    pub fn image_files(&self, image: &Image) -> io::Result<ImageFiles> {
        Mounted::new(self, &image.layers).map(ImageFiles)
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if let Err(error) = self.dirs.remove() {
            tracing::warn!(%error, "a build left something behind");
        }
    }
}

/// Makes a layer of what was changed in a root, once that is tidied up; takes it away.
pub(crate) fn seal_changes(store: &ImageStore, dirs: &ContainerDirs, tidy: impl FnOnce(&Path)) -> io::Result<String> {
    let dir = store.incoming()?;
    fs::remove_dir(&dir)?;
    fs::rename(dirs.changed()?, &dir)?;
    tidy(&dir);
    layer::seal(store, &dir).map(|(diff_id, _)| diff_id)
}

/// How files are copied.
#[derive(Clone, Debug, Default)]
pub(crate) struct CopyOptions {
    /// Whether it is ADD: archives of the context are unpacked.
    pub(crate) unpacks: bool,
    /// `user[:group]`, as the image knows them.
    pub(crate) chown: Option<String>,
    /// Whether files keep their owners where `chown` says nothing; they are root's otherwise.
    pub(crate) keeps_owners: bool,
    pub(crate) chmod: Option<Chmod>,
    /// Whether sources keep the directories that they lie in.
    pub(crate) parents: bool,
    /// What is left out, seen from each source.
    pub(crate) exclude: Vec<String>,
}

struct Copier<'a> {
    sources: &'a Sources,
    root: &'a Path,
    /// None: each file keeps its own.
    owner: Option<(u32, u32)>,
    options: &'a CopyOptions,
}

/// Copies what `paths` name to `target` within `root`.
pub(crate) fn copy(
    sources: &Sources,
    paths: &[Named],
    root: &Path,
    target: &str,
    options: &CopyOptions,
) -> io::Result<()> {
    let owner = match &options.chown {
        Some(spec) => {
            let user = user::resolve(root, spec, &[]).map_err(io::Error::other)?;
            // A user alone is also the group, as `--chown` has it.
            let gid = if spec.contains(':') || user.gid != 0 { user.gid } else { user.uid };
            Some((user.uid, gid))
        }
        None if options.keeps_owners => None,
        None => Some((0, 0)),
    };
    let copier = Copier { sources, root, owner, options };
    let inside = clean(target);
    let is_dir =
        sys::open_in_root(root, &inside).ok().and_then(|file| file.metadata().ok()).is_some_and(|meta| meta.is_dir());
    if paths.len() > 1 && !target.ends_with('/') && !is_dir && !options.parents {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "when using COPY with more than one source file, the destination must be a directory and end with a /",
        ));
    }
    for Named { path, below } in paths {
        let (inside, is_dir) = match below {
            Some(below) => (inside.join(below), true),
            None => (inside.clone(), is_dir),
        };
        // A link that is named itself is followed, within the root.
        let file = sys::open_in_root(sources.root(), path)?;
        let source = fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
        let meta = file.metadata()?;
        if !meta.is_dir() && sources.is_left_out(path, path) {
            continue;
        }
        if meta.is_dir() {
            sys::ensure_dir(root, &inside, copier.owner)?;
            copier.children(path, &source, path, &inside)?;
        } else if options.unpacks && is_archive(&source)? {
            let into = sys::ensure_dir(root, &inside, copier.owner)?;
            unpack::unpack_files(fs::File::open(&source)?, &into)?;
        } else if target.ends_with('/') || is_dir {
            let into = sys::ensure_dir(root, &inside, copier.owner)?;
            copier.file(&source, &into.join(path.file_name().unwrap_or_default()))?;
        } else {
            let into = sys::ensure_dir(root, inside.parent().unwrap_or_else(|| Path::new("")), copier.owner)?;
            copier.file(&source, &into.join(inside.file_name().unwrap_or_default()))?;
        }
    }
    Ok(())
}

/// Writes a file that stands in the Dockerfile itself, or came from elsewhere.
pub(crate) fn write_file(root: &Path, target: &str, piece: &Piece, options: &CopyOptions) -> io::Result<()> {
    let dir = tempfile_dir()?;
    let written = (|| {
        let path = dir.join(&piece.name);
        fs::write(&path, &piece.content)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(piece.mode))?;
        fs::File::open(&path)?.set_modified(piece.modified)?;
        copy(&Sources::whole(&dir), &[PathBuf::from(&piece.name).into()], root, target, options)
    })();
    // Another's tidying up may come first.
    let _ = fs::remove_dir_all(dir);
    written
}

fn tempfile_dir() -> io::Result<PathBuf> {
    let dir = std::env::temp_dir().join(format!("skep-build-{:016x}", rand::random::<u64>()));
    fs::create_dir(&dir)?;
    fs::set_permissions(&dir, fs::Permissions::from_mode(0o700))?;
    Ok(dir)
}

impl Copier<'_> {
    /// Copies what is in the directory `from` to `inside` the root. What the image has there may be a
    /// link: each directory is found anew from the root, so that none leads out.
    fn children(&self, named: &Path, from: &Path, path: &Path, inside: &Path) -> io::Result<()> {
        for entry in fs::read_dir(from)? {
            let entry = entry?;
            let (source, below) = (entry.path(), path.join(entry.file_name()));
            let target = inside.join(entry.file_name());
            if entry.file_type()?.is_dir() {
                let there = sys::open_in_root(self.root, &target).is_ok();
                let dir = sys::ensure_dir(self.root, &target, self.owner)?;
                if !there {
                    self.attributes(&source, &dir)?;
                }
                // Something of it may be let in again.
                self.children(named, &source, &below, &target)?;
                if !there && self.sources.is_left_out(named, &below) {
                    // Empty unless something was.
                    let _ = fs::remove_dir(&dir);
                }
            } else if !self.sources.is_left_out(named, &below) {
                let dir = sys::ensure_dir(self.root, inside, self.owner)?;
                self.file(&source, &dir.join(entry.file_name()))?;
            }
        }
        Ok(())
    }

    fn file(&self, source: &Path, target: &Path) -> io::Result<()> {
        let meta = fs::symlink_metadata(source)?;
        match fs::symlink_metadata(target) {
            Ok(there) if there.is_dir() && !meta.is_dir() => {
                return Err(io::Error::new(
                    io::ErrorKind::IsADirectory,
                    format!("cannot copy a file over the directory {}", target.display()),
                ));
            }
            Ok(_) => fs::remove_file(target)?,
            Err(_) => {}
        }
        if meta.is_symlink() {
            symlink(fs::read_link(source)?, target)?;
            let (uid, gid) = self.owner.unwrap_or_else(|| (meta.uid(), meta.gid()));
            return lchown(target, Some(uid), Some(gid));
        }
        if meta.is_file() {
            fs::copy(source, target)?;
            self.attributes(source, target)?;
            return fs::File::open(target)?.set_modified(meta.modified()?);
        }
        Ok(())
    }

    fn attributes(&self, source: &Path, target: &Path) -> io::Result<()> {
        let meta = fs::metadata(source)?;
        let (uid, gid) = self.owner.unwrap_or_else(|| (meta.uid(), meta.gid()));
        chown(target, Some(uid), Some(gid))?;
        let mode = meta.mode() & 0o7777;
        let mode = self.options.chmod.as_ref().map_or(mode, |chmod| chmod.apply(mode, meta.is_dir()));
        fs::set_permissions(target, fs::Permissions::from_mode(mode))
    }
}

/// Whether a file is a tar archive, plain or compressed.
fn is_archive(path: &Path) -> io::Result<bool> {
    let Ok(plain) = unpack::decompress(fs::File::open(path)?) else { return Ok(false) };
    let mut archive = tar::Archive::new(plain);
    let Ok(mut entries) = archive.entries() else { return Ok(false) };
    Ok(matches!(entries.next(), Some(Ok(_))))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn root() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("root/etc")).unwrap();
        fs::create_dir_all(dir.path().join("context/d/e")).unwrap();
        fs::write(dir.path().join("context/f"), "file").unwrap();
        fs::write(dir.path().join("context/d/e/g"), "deep").unwrap();
        dir
    }

    #[track_caller]
    fn check(paths: &[&str], target: &str, want: &str) {
        let dir = root();
        symlink("/etc", dir.path().join("root/link")).unwrap();
        symlink("../../../../../..", dir.path().join("root/up")).unwrap();
        let sources = Sources::whole(&dir.path().join("context"));
        let paths: Vec<_> = paths.iter().map(|path| PathBuf::from(path).into()).collect();
        let copied = copy(&sources, &paths, &dir.path().join("root"), target, &CopyOptions::default());
        match copied {
            Ok(()) => assert!(dir.path().join("root").join(want).exists(), "{target} should bring {want}"),
            Err(error) => assert!(error.to_string().contains(want), "{error} should say {want}"),
        }
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2, "nothing lands outside");
    }

    #[test]
    fn files_and_directories_land_where_docker_puts_them() {
        check(&["f"], "/new", "new");
        check(&["f"], "/new/", "new/f");
        check(&["f"], "/etc", "etc/f");
        check(&["f"], "/link/", "etc/f");
        check(&["f"], "/up/x/", "x/f");
        check(&["d"], "/new", "new/e/g");
        check(&["f", "d"], "/new/", "new/e/g");
        check(&["f", "d"], "/new", "end with a /");
    }

    #[test]
    fn directories_are_kept_and_files_left_out_as_asked() {
        let dir = root();
        let context = dir.path().join("context");
        for path in ["p/a/package.json", "p/a/main.js", "p/b/package.json", "p/b/sub/package.json", "p/b/README.md"] {
            fs::create_dir_all(context.join(path).parent().unwrap()).unwrap();
            fs::write(context.join(path), path).unwrap();
        }
        let came = |source: &str, exclude: &[&str], parents: bool| {
            let root = tempfile::tempdir().unwrap();
            let exclude: Vec<String> = exclude.iter().map(|&pattern| pattern.to_owned()).collect();
            let sources = Sources::whole(&context).excluding(&exclude).unwrap();
            let paths = if parents { sources.find_with_parents(source) } else { sources.find(source) }.unwrap();
            let options = CopyOptions { parents, exclude, keeps_owners: true, ..CopyOptions::default() };
            copy(&sources, &paths, root.path(), "/to/", &options).unwrap();
            let to = root.path().join("to");
            let files = walk(&to).into_iter().map(|path| path.strip_prefix(&to).unwrap().display().to_string());
            files.collect::<Vec<_>>().join(" ")
        };
        assert_eq!(came("p/*/package.json", &[], true), "p/a/package.json p/b/package.json");
        assert_eq!(came("p/./*/package.json", &[], true), "a/package.json b/package.json");
        assert_eq!(came("**/package.json", &[], true), "p/a/package.json p/b/package.json p/b/sub/package.json");
        assert_eq!(came("./p/b", &["*.md", "sub"], true), "p/b/package.json");
        assert_eq!(came("p", &["**/*.json"], false), "a/main.js b/README.md");
        assert_eq!(came("p/b/*", &["*.md"], false), "package.json");
        assert_eq!(came("p/a", &["p"], false), "main.js package.json", "what it lies in does not count");
    }

    /// The files below a directory, in order.
    fn walk(dir: &Path) -> Vec<PathBuf> {
        let entries = fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path());
        let mut found: Vec<_> = entries.flat_map(|path| if path.is_dir() { walk(&path) } else { vec![path] }).collect();
        found.sort();
        found
    }

    #[test]
    fn links_of_the_image_below_the_target_lead_nowhere_outside() {
        let dir = root();
        let (root, outside) = (dir.path().join("root"), dir.path().join("outside"));
        fs::create_dir(&outside).unwrap();
        fs::create_dir(root.join("to")).unwrap();
        // In the image `to/e` is a link to a place that only the host has.
        symlink(&outside, root.join("to/e")).unwrap();
        let sources = Sources::whole(&dir.path().join("context"));
        let copied = copy(&sources, &[PathBuf::from("d").into()], &root, "/to/", &CopyOptions::default());
        assert!(copied.is_err() || root.join(outside.strip_prefix("/").unwrap()).join("g").exists());
        assert_eq!(fs::read_dir(&outside).unwrap().count(), 0);
        // Where it leads to a directory of the image, the copy lands there.
        fs::remove_file(root.join("to/e")).unwrap();
        symlink("/etc", root.join("to/e")).unwrap();
        copy(&sources, &[PathBuf::from("d").into()], &root, "/to/", &CopyOptions::default()).unwrap();
        assert_eq!(fs::read_to_string(root.join("etc/g")).unwrap(), "deep");
        assert!(!Path::new("/etc/g").exists());
    }
}
