//! From a layer's directory, as overlayfs has it, to the archive that registries know it by.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::image::store::ImageStore;
use crate::image::unpack::is_opaque;

/// A layer's archive as it is kept, and as registries name it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct LayerBlob {
    pub(crate) digest: String,
    pub(crate) media_type: String,
    pub(crate) size_bytes: u64,
}

pub(crate) const TAR: &str = "application/vnd.oci.image.layer.v1.tar";
pub(crate) const TAR_GZIP: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
pub(crate) const TAR_ZSTD: &str = "application/vnd.oci.image.layer.v1.tar+zstd";

/// Makes a layer of what lies in `dir`, which is taken away; returns its plain digest and size.
pub(crate) fn seal(store: &ImageStore, dir: &Path) -> io::Result<(String, u64)> {
    let archive = dir.with_extension("archive");
    let mut hashed = Hashed { inner: BufWriter::new(File::create(&archive)?), hash: Sha256::new(), len: 0 };
    pack(dir, &mut hashed)?;
    hashed.inner.flush()?;
    let digest = format!("sha256:{}", hex::encode(hashed.hash.finalize()));
    let blob = LayerBlob { digest: digest.clone(), media_type: TAR.into(), size_bytes: hashed.len };
    store.keep_layer(dir, &archive, &blob, &digest)?;
    Ok((digest, hashed.len))
}

/// Makes a layer of what overlayfs has written to `upper`, which stays.
pub(crate) fn seal_copy(store: &ImageStore, upper: &Path) -> io::Result<String> {
    let dir = store.incoming()?;
    let archive = dir.with_extension("archive");
    let mut hashed = Hashed { inner: BufWriter::new(File::create(&archive)?), hash: Sha256::new(), len: 0 };
    if upper.exists() {
        pack(upper, &mut hashed)?;
    } else {
        // It never ran: nothing was written.
        pack(&dir, &mut hashed)?;
    }
    hashed.inner.flush()?;
    let digest = format!("sha256:{}", hex::encode(hashed.hash.finalize()));
    let blob = LayerBlob { digest: digest.clone(), media_type: TAR.into(), size_bytes: hashed.len };
    crate::image::unpack::unpack(File::open(&archive)?, &dir, &digest).map_err(io::Error::other)?;
    store.keep_layer(&dir, &archive, &blob, &digest)?;
    Ok(digest)
}

/// The digest of a file as it is.
pub(crate) fn digest_of(path: &Path) -> io::Result<String> {
    let mut hash = Hashed { inner: io::sink(), hash: Sha256::new(), len: 0 };
    io::copy(&mut File::open(path)?, &mut hash)?;
    Ok(format!("sha256:{}", hex::encode(hash.hash.finalize())))
}

/// What an archive is called that begins so.
pub(crate) fn media_type(path: &Path) -> io::Result<&'static str> {
    let mut magic = [0; 4];
    let len = io::Read::read(&mut File::open(path)?, &mut magic)?;
    Ok(match &magic[..len] {
        [0x1f, 0x8b, ..] => TAR_GZIP,
        [0x28, 0xb5, 0x2f, 0xfd] => TAR_ZSTD,
        _ => TAR,
    })
}

/// Hashes and counts what passes.
pub(crate) struct Hashed<W> {
    pub(crate) inner: W,
    pub(crate) hash: Sha256,
    pub(crate) len: u64,
}

impl<W: Write> Write for Hashed<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let len = self.inner.write(bytes)?;
        self.hash.update(&bytes[..len]);
        self.len += len as u64;
        Ok(len)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

/// Writes a directory's content as a layer: whiteouts by name, entries in order.
fn pack(dir: &Path, to: impl Write) -> io::Result<()> {
    let mut packer = Packer { tar: tar::Builder::new(to), links: BTreeMap::new(), whiteouts: true };
    packer.tar.follow_symlinks(false);
    packer.children(dir, Path::new(""))?;
    packer.tar.into_inner()?.flush()
}

/// Writes what is at `path`, or all below it, under `name`; devices and sockets are left out.
pub(crate) fn pack_tree(path: &Path, name: &Path, to: impl Write) -> io::Result<()> {
    let mut packer = Packer { tar: tar::Builder::new(to), links: BTreeMap::new(), whiteouts: false };
    packer.tar.follow_symlinks(false);
    packer.entry(path, name)?;
    packer.tar.into_inner()?.flush()
}

/// Writes all below `dir`, not itself.
pub(crate) fn pack_children(dir: &Path, to: impl Write) -> io::Result<()> {
    let mut packer = Packer { tar: tar::Builder::new(to), links: BTreeMap::new(), whiteouts: false };
    packer.tar.follow_symlinks(false);
    packer.children(dir, Path::new(""))?;
    packer.tar.into_inner()?.flush()
}

struct Packer<W: Write> {
    tar: tar::Builder<W>,
    /// The first name of each file that has several.
    links: BTreeMap<(u64, u64), PathBuf>,
    whiteouts: bool,
}

impl<W: Write> Packer<W> {
    fn children(&mut self, dir: &Path, name: &Path) -> io::Result<()> {
        let mut entries: Vec<_> = fs::read_dir(dir)?.collect::<Result<_, _>>()?;
        entries.sort_by_key(fs::DirEntry::file_name);
        for entry in entries {
            self.entry(&entry.path(), &name.join(entry.file_name()))?;
        }
        Ok(())
    }

    fn entry(&mut self, path: &Path, name: &Path) -> io::Result<()> {
        let meta = fs::symlink_metadata(path)?;
        let kind = meta.file_type();
        if kind.is_char_device() && meta.rdev() == 0 && self.whiteouts {
            let hidden = name.file_name().unwrap_or_default().to_string_lossy().into_owned();
            return self.marker(&name.with_file_name(format!(".wh.{hidden}")), &meta);
        }
        if kind.is_socket() || kind.is_char_device() || kind.is_block_device() {
            return Ok(());
        }
        let mut header = tar::Header::new_gnu();
        header.set_metadata(&meta);
        // Names come from the image's own files, not the host's.
        header.set_size(0);
        let inode = (meta.dev(), meta.ino());
        let linked = self.links.get(&inode).filter(|_| kind.is_file() && meta.nlink() > 1).cloned();
        self.extensions(path, name, kind.is_dir(), linked.as_deref())?;
        if kind.is_symlink() {
            header.set_entry_type(tar::EntryType::Symlink);
            return self.tar.append_link(&mut header, name, fs::read_link(path)?);
        }
        if kind.is_dir() {
            header.set_entry_type(tar::EntryType::Directory);
            let mut slashed = name.as_os_str().to_owned();
            slashed.push("/");
            self.tar.append_data(&mut header, Path::new(&slashed), io::empty())?;
            if self.whiteouts && is_opaque(path) {
                self.marker(&name.join(".wh..wh..opq"), &meta)?;
            }
            return self.children(path, name);
        }
        if kind.is_fifo() {
            header.set_entry_type(tar::EntryType::Fifo);
            return self.tar.append_data(&mut header, name, io::empty());
        }
        if let Some(first) = linked {
            header.set_entry_type(tar::EntryType::Link);
            return self.tar.append_link(&mut header, name, first);
        }
        if meta.nlink() > 1 {
            self.links.insert(inode, name.to_owned());
        }
        header.set_entry_type(tar::EntryType::Regular);
        header.set_size(meta.len());
        // A file that grows meanwhile is cut, one that shrinks is an error.
        self.tar.append_data(&mut header, name, io::Read::take(File::open(path)?, meta.len()))
    }

    fn marker(&mut self, name: &Path, meta: &fs::Metadata) -> io::Result<()> {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(tar::EntryType::Regular);
        header.set_size(0);
        header.set_mode(0o600);
        header.set_mtime(u64::try_from(meta.mtime()).unwrap_or(0));
        self.tar.append_data(&mut header, name, io::empty())
    }

    /// What a file is beyond its mode: capabilities, and users' own attributes; and names that begin with `./`, as
    /// clients look for them who copy what is in a directory, while plain headers leave that out.
    fn extensions(&mut self, path: &Path, name: &Path, is_dir: bool, linked: Option<&Path>) -> io::Result<()> {
        let names = xattr::list(path).into_iter().flatten();
        let mut pairs = Vec::new();
        for name in names.filter(|name| {
            let bytes = name.as_bytes();
            bytes == b"security.capability" || bytes.starts_with(b"user.")
        }) {
            if let Some(value) = xattr::get(path, &name)? {
                pairs.push((format!("SCHILY.xattr.{}", name.to_string_lossy()), value));
            }
        }
        for (key, name) in [("path", Some(name)), ("linkpath", linked)] {
            let Some(name) = name.filter(|name| name.starts_with(".") && name.as_os_str() != ".") else { continue };
            let mut bytes = name.as_os_str().as_bytes().to_vec();
            bytes.extend_from_slice(if is_dir && key == "path" { b"/" } else { b"" });
            pairs.push((key.to_owned(), bytes));
        }
        if pairs.is_empty() {
            return Ok(());
        }
        self.tar.append_pax_extensions(pairs.iter().map(|(key, value)| (key.as_str(), value.as_slice())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::unpack;

    #[test]
    fn a_layer_packs_and_unpacks_to_itself() {
        let top = tempfile::tempdir().unwrap();
        let store = ImageStore::open(&top.path().join("image")).unwrap();
        let dir = store.incoming().unwrap();
        fs::create_dir(dir.join("sub")).unwrap();
        fs::write(dir.join("sub/file"), "text").unwrap();
        fs::hard_link(dir.join("sub/file"), dir.join("sub/same")).unwrap();
        std::os::unix::fs::symlink("sub/file", dir.join("link")).unwrap();
        let (diff_id, _) = seal(&store, &dir).unwrap();
        assert!(store.has_layer(&diff_id) && !dir.exists());
        let (path, blob) = store.blob(&diff_id).unwrap();
        assert_eq!(blob.digest, diff_id);
        let again = top.path().join("again");
        fs::create_dir(&again).unwrap();
        unpack::unpack(File::open(path).unwrap(), &again, &diff_id).unwrap();
        assert_eq!(fs::read_to_string(again.join("link")).unwrap(), "text");
        assert_eq!(fs::metadata(again.join("sub/same")).unwrap().nlink(), 2);
    }
}
