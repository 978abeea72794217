//! Unpacks one layer into a directory of its own, as overlayfs wants it.
//!
//! Nothing lands outside the directory, whatever the archive says: `tar` refuses names with `..`
//! and links that lead out. Whiteouts become what overlayfs understands.

use std::cell::Cell;
use std::io::{self, BufReader, Chain, Cursor, Read};
use std::path::{Component, Path, PathBuf};

use nix::sys::time::TimeSpec;
use sha2::{Digest as _, Sha256};

use crate::sys;

/// More unpacked bytes than this in one layer are refused: an image may be a bomb.
const LAYER_LEN_MAX: u64 = 64 << 30;

/// Why a layer does not unpack.
#[derive(Debug, thiserror::Error)]
pub enum UnpackError {
    #[error("layer {0} cannot be unpacked")]
    Io(String, #[source] io::Error),
    #[error("layer {want} holds other data than its name says: {got}")]
    Digest { want: String, got: String },
    #[error("layer {layer} holds an entry that would land outside the image: {path}")]
    Escape { layer: String, path: PathBuf },
}

/// Unpacks `archive` (plain or compressed) into `dir`, and checks that the plain data is `diff_id`.
pub(crate) fn unpack(archive: impl Read, dir: &Path, diff_id: &str) -> Result<u64, UnpackError> {
    let (len, got) = unpack_plain(archive, dir, diff_id)?;
    if got == diff_id { Ok(len) } else { Err(UnpackError::Digest { want: diff_id.to_owned(), got }) }
}

/// Unpacks an archive that nobody vouches for.
pub(crate) fn unpack_unchecked(archive: impl Read, dir: &Path) -> Result<u64, UnpackError> {
    unpack_plain(archive, dir, "of the archive").map(|(len, _)| len)
}

/// How files are put among those that are there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Placing {
    /// Whether a directory stays one, and what is none stays none; otherwise what comes replaces what is there.
    pub(crate) keeps_kinds: bool,
    /// Whose the files are; none: as the archive says.
    pub(crate) owner: Option<(u32, u32)>,
}

/// Unpacks an archive that holds files as they are: no name says that another is hidden.
pub(crate) fn unpack_files(archive: impl Read, dir: &Path) -> io::Result<()> {
    place_files(archive, dir, Placing { keeps_kinds: true, owner: None })
}

/// The same, among files that may be in the way. The directory has to be in a root of the process's own, as links are
/// followed.
pub(crate) fn place_files(archive: impl Read, dir: &Path, placing: Placing) -> io::Result<()> {
    let len = Cell::new(0);
    let (mut tar, mut times) = open(decompress(archive)?, &len)?;
    for entry in tar.entries()? {
        let mut entry = entry?;
        times.note(&entry)?;
        let path = entry.path()?.into_owned();
        let target = dir.join(&path);
        let is_inside = path.components().all(|part| matches!(part, Component::Normal(_) | Component::CurDir));
        if !placing.keeps_kinds && is_inside {
            make_way(&target, entry.header().entry_type().is_dir())?;
        }
        if !entry.unpack_in(dir)? {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("{} would land outside of the directory", path.display()),
            ));
        }
        if let Some((uid, gid)) = placing.owner {
            std::os::unix::fs::lchown(&target, Some(uid), Some(gid))?;
        }
        is_whole(&entry, &len)?;
    }
    times.set(dir)
}

/// Removes what is there of another kind than what comes.
fn make_way(target: &Path, is_dir: bool) -> io::Result<()> {
    match std::fs::symlink_metadata(target) {
        Ok(there) if there.is_dir() && !is_dir => std::fs::remove_dir_all(target),
        Ok(there) if !there.is_dir() && is_dir => std::fs::remove_file(target),
        Ok(_) | Err(_) => Ok(()),
    }
}

fn unpack_plain(archive: impl Read, dir: &Path, diff_id: &str) -> Result<(u64, String), UnpackError> {
    let io_error = |cause| UnpackError::Io(diff_id.to_owned(), cause);
    let mut plain = Counted { inner: decompress(archive).map_err(io_error)?, hash: Sha256::new(), len: 0 };
    {
        let len = Cell::new(0);
        let (mut tar, mut times) = open(&mut plain, &len).map_err(io_error)?;
        for entry in tar.entries().map_err(io_error)? {
            let mut entry = entry.map_err(io_error)?;
            times.note(&entry).map_err(io_error)?;
            unpack_entry(&mut entry, dir, diff_id)?;
            is_whole(&entry, &len).map_err(io_error)?;
        }
        times.set(dir).map_err(io_error)?;
    }
    // What follows the archive's end belongs to the digest too.
    io::copy(&mut plain, &mut io::sink()).map_err(io_error)?;
    Ok((plain.len, format!("sha256:{}", hex::encode(plain.hash.finalize()))))
}

fn unpack_entry<R: Read>(entry: &mut tar::Entry<'_, R>, dir: &Path, layer: &str) -> Result<(), UnpackError> {
    let io_error = |cause| UnpackError::Io(layer.to_owned(), cause);
    let path = entry.path().map_err(io_error)?.into_owned();
    let escape = || UnpackError::Escape { layer: layer.to_owned(), path: path.clone() };
    if path.components().any(|part| part == Component::ParentDir) {
        return Err(escape());
    }
    let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    if let Some(hidden) = name.strip_prefix(".wh.") {
        let parent = parent_inside(dir, &path).map_err(io_error)?.ok_or_else(escape)?;
        return whiteout(&parent, hidden).map_err(io_error);
    }
    if entry.header().entry_type().is_character_special() || entry.header().entry_type().is_block_special() {
        // A container's devices are its runtime's; an image has none to give.
        return Ok(());
    }
    match entry.unpack_in(dir) {
        Ok(true) => Ok(()),
        Ok(false) => Err(escape()),
        Err(error) if error.to_string().contains("outside") => Err(escape()),
        Err(error) => Err(io_error(error)),
    }
}

/// When directories were changed last: that is set when nothing is put into them any more.
#[derive(Debug)]
struct DirectoryTimes {
    /// Whether the archive says anything of times.
    said: bool,
    all: Vec<(PathBuf, i64)>,
}

impl DirectoryTimes {
    fn note<R: Read>(&mut self, entry: &tar::Entry<'_, R>) -> io::Result<()> {
        if self.said && entry.header().entry_type().is_dir() {
            let seconds = i64::try_from(entry.header().mtime()?).unwrap_or(i64::MAX);
            self.all.push((entry.path()?.into_owned(), seconds));
        }
        Ok(())
    }

    fn set(self, root: &Path) -> io::Result<()> {
        for (path, seconds) in self.all {
            let path: PathBuf = path.components().filter(|part| matches!(part, Component::Normal(_))).collect();
            // A later entry may have put something else in its place.
            if let Ok(file) = sys::open_in_root(root, &path)
                && file.metadata()?.is_dir()
            {
                let time = TimeSpec::new(seconds, 0);
                nix::sys::stat::futimens(&file, &time, &time)?;
            }
        }
        Ok(())
    }
}

/// An archive whose beginning was looked at.
type Looked<'a, R> = tar::Archive<WholeBlocks<'a, Chain<Cursor<Vec<u8>>, R>>>;

/// Opens an archive to unpack it with all that it says of its files; `len` counts what there is of it.
///
/// Some programs leave owners and times blank, in all entries or in none: root is meant, and now.
fn open<R: Read>(mut archive: R, len: &Cell<u64>) -> io::Result<(Looked<'_, R>, DirectoryTimes)> {
    let mut first = Vec::with_capacity(HEADER_LEN);
    archive.by_ref().take(HEADER_LEN as u64).read_to_end(&mut first)?;
    let (owners, times) = match first.first_chunk::<HEADER_LEN>() {
        Some(first) => {
            let old = tar::Header::from_byte_slice(first).as_old();
            (!is_blank(&old.uid) && !is_blank(&old.gid), !is_blank(&old.mtime))
        }
        None => (true, true),
    };
    let mut archive = tar::Archive::new(WholeBlocks { inner: Cursor::new(first).chain(archive), len, filled: 0 });
    archive.set_preserve_permissions(true);
    archive.set_preserve_ownerships(owners);
    archive.set_preserve_mtime(times);
    archive.set_unpack_xattrs(true);
    archive.set_overwrite(true);
    Ok((archive, DirectoryTimes { said: times, all: Vec::new() }))
}

const HEADER_LEN: usize = 512;
/// Archives are made of blocks.
const BLOCK_LEN: u64 = HEADER_LEN as u64;

/// An archive filled up to the end of its last block: some programs leave that out (umoci is one), and Docker takes it.
struct WholeBlocks<'a, R> {
    inner: R,
    /// Without what is filled up.
    len: &'a Cell<u64>,
    filled: u64,
}

impl<R: Read> Read for WholeBlocks<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let len = self.inner.read(buffer)?;
        if len > 0 {
            self.len.set(self.len.get() + len as u64);
            return Ok(len);
        }
        let end = self.len.get() + self.filled;
        let missing = end.next_multiple_of(BLOCK_LEN) - end;
        let zeros = io::repeat(0).take(missing).read(buffer)?;
        self.filled += zeros as u64;
        Ok(zeros)
    }
}

/// That an entry's own data was there, not only what its last block was filled up with.
fn is_whole<R: Read>(entry: &tar::Entry<'_, R>, len: &Cell<u64>) -> io::Result<()> {
    let end = entry.raw_file_position() + entry.header().entry_size()?;
    if end > len.get() && entry.header().entry_type().is_file() {
        let path = entry.path()?.display().to_string();
        return Err(io::Error::new(io::ErrorKind::UnexpectedEof, format!("the archive ends within {path}")));
    }
    Ok(())
}

fn is_blank(field: &[u8]) -> bool {
    field.iter().all(|byte| matches!(byte, 0 | b' '))
}

/// The directory of `path` within `dir`, made if need be; `None` if it leads out.
fn parent_inside(dir: &Path, path: &Path) -> io::Result<Option<PathBuf>> {
    let root = dir.canonicalize()?;
    let mut current = root.clone();
    let Some(parent) = path.parent() else { return Ok(Some(root)) };
    // One step at a time: nothing is made beyond a link before it is known where that leads.
    for part in parent.components().filter(|part| matches!(part, Component::Normal(_))) {
        let next = current.join(part);
        match std::fs::create_dir(&next) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => current = next.canonicalize()?,
        }
        if !current.starts_with(&root) {
            return Ok(None);
        }
    }
    Ok(Some(current))
}

/// What says that a directory hides all that is below it: as overlayfs has it, and where a file system cannot have that.
pub(crate) const OPAQUE: [&str; 2] = ["trusted.overlay.opaque", "user.overlay.opaque"];

/// Whether a layer's directory hides all that is below it.
pub(crate) fn is_opaque(dir: &Path) -> bool {
    OPAQUE.iter().any(|name| matches!(xattr::get(dir, name), Ok(Some(value)) if value == b"y"))
}

/// Says in overlayfs' terms that a name, or all of a directory, is hidden from below.
fn whiteout(parent: &Path, hidden: &str) -> io::Result<()> {
    use nix::sys::stat::{Mode, SFlag, makedev, mknod};
    if hidden == ".wh..opq" {
        return xattr::set(parent, OPAQUE[0], b"y").or_else(|_| xattr::set(parent, OPAQUE[1], b"y"));
    }
    if hidden.is_empty() || hidden.contains('/') || hidden == "." || hidden == ".." {
        return Err(io::Error::new(io::ErrorKind::InvalidData, format!("whiteout of {hidden:?}")));
    }
    mknod(&parent.join(hidden), SFlag::S_IFCHR, Mode::empty(), makedev(0, 0))?;
    Ok(())
}

/// What unpacking xz may take of memory: its largest usual setting needs 65 MiB.
const XZ_MEMORY_MAX_KIB: u32 = 128 << 10;
/// The longest beginning that tells how something is compressed.
const MAGIC_LEN: u64 = 6;

/// Reads an archive that is plain, or compressed by gzip, zstd, bzip2 or xz. All of it is done in this
/// process: no program is run, least of all one of an image.
pub(crate) fn decompress<'a>(mut archive: impl Read + 'a) -> io::Result<Box<dyn Read + 'a>> {
    let mut magic = Vec::new();
    archive.by_ref().take(MAGIC_LEN).read_to_end(&mut magic)?;
    let whole = Cursor::new(magic.clone()).chain(archive);
    let archive = BufReader::with_capacity(1 << 18, whole);
    Ok(match magic.as_slice() {
        [0x1f, 0x8b, ..] => Box::new(flate2::bufread::MultiGzDecoder::new(archive)),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => Box::new(zstd::Decoder::with_buffer(archive)?),
        [b'B', b'Z', b'h', ..] => Box::new(bzip2::bufread::MultiBzDecoder::new(archive)),
        [0xfd, b'7', b'z', b'X', b'Z', 0] => {
            Box::new(lzma_rust2::XzReader::new_mem_limit(archive, true, XZ_MEMORY_MAX_KIB))
        }
        _ => Box::new(archive),
    })
}

/// Counts and hashes what passes.
struct Counted<R> {
    inner: R,
    hash: Sha256,
    len: u64,
}

impl<R: Read> Read for Counted<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let len = self.inner.read(buffer)?;
        self.hash.update(&buffer[..len]);
        self.len += len as u64;
        if self.len > LAYER_LEN_MAX {
            return Err(io::Error::new(io::ErrorKind::FileTooLarge, "the layer unpacks to more than 64 GiB"));
        }
        Ok(len)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    fn archive(entries: &[(&str, tar::EntryType, &str)]) -> (Vec<u8>, String) {
        let mut tar = tar::Builder::new(Vec::new());
        for (path, kind, content) in entries {
            let mut header = tar::Header::new_gnu();
            // Written raw, for the builder would refuse what a hostile archive holds.
            header.as_gnu_mut().unwrap().name[..path.len()].copy_from_slice(path.as_bytes());
            header.set_entry_type(*kind);
            header.set_mode(0o644);
            header.set_uid(0);
            header.set_gid(0);
            header.set_mtime(0);
            if kind.is_file() {
                header.set_size(content.len() as u64);
                header.set_cksum();
                tar.append(&header, content.as_bytes()).unwrap();
            } else {
                header.as_gnu_mut().unwrap().linkname[..content.len()].copy_from_slice(content.as_bytes());
                header.set_size(0);
                header.set_cksum();
                tar.append(&header, io::empty()).unwrap();
            }
        }
        let bytes = tar.into_inner().unwrap();
        let digest = format!("sha256:{}", hex::encode(Sha256::digest(&bytes)));
        (bytes, digest)
    }

    #[test]
    fn archives_are_read_however_they_are_compressed() {
        let bzip2 = "425a6839314159265359d3696e59000000c1800010120008002000219a68334d13338bb9229c284869b4b72c80";
        let xz = "fd377a585a000004e6d6b4460200210116000000742fe5a3010004626565730a0000000084343ad20b59957b00011d05b82d80af\
                  1fb6f37d010000000004595a";
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all(b"bees\n").unwrap();
        let zstd = zstd::encode_all(b"bees\n".as_slice(), 0).unwrap();
        let hex = |text| hex::decode(text).unwrap();
        for packed in [b"bees\n".to_vec(), gzip.finish().unwrap(), zstd, hex(bzip2), hex(xz)] {
            let mut text = String::new();
            decompress(packed.as_slice()).unwrap().read_to_string(&mut text).unwrap();
            assert_eq!(text, "bees\n", "{packed:x?}");
        }
        let mut nothing = String::new();
        assert_eq!(decompress(io::empty()).unwrap().read_to_string(&mut nothing).unwrap(), 0);
    }

    #[test]
    fn blank_owners_and_times_are_root_and_now() {
        let mut header = tar::Header::new_gnu();
        header.set_path("file").unwrap();
        header.set_mode(0o640);
        header.set_size(1);
        header.set_cksum();
        let mut tar = tar::Builder::new(Vec::new());
        tar.append(&header, b"x".as_slice()).unwrap();
        let dir = tempfile::tempdir().unwrap();
        unpack_files(tar.into_inner().unwrap().as_slice(), dir.path()).unwrap();
        assert_eq!(std::fs::read(dir.path().join("file")).unwrap(), b"x");
    }

    #[test]
    fn an_archive_may_lack_the_end_of_its_last_block_and_nothing_else() {
        let (bytes, _) =
            archive(&[("first", tar::EntryType::Regular, "1"), ("last", tar::EntryType::Regular, "hello")]);
        let last = 3 * HEADER_LEN;
        let unpacked = |len| {
            let dir = tempfile::tempdir().unwrap();
            let unpacked = unpack_files(&bytes[..len], dir.path());
            unpacked.map(|()| std::fs::read_to_string(dir.path().join("last")).unwrap())
        };
        for len in [last + 5, last + 6, last + HEADER_LEN] {
            assert_eq!(unpacked(len).unwrap(), "hello", "{len}");
        }
        assert!(unpacked(last + 4).unwrap_err().to_string().contains("ends within last"));
        assert!(unpacked(last - 1).is_err());
    }

    #[test]
    fn nothing_lands_outside_the_layer() {
        use tar::EntryType::{Link, Regular, Symlink};
        let attacks: [&[(&str, tar::EntryType, &str)]; 5] = [
            &[("../evil", Regular, "x")],
            &[("out", Symlink, "../.."), ("out/evil", Regular, "x")],
            &[("abs", Symlink, "/tmp"), ("abs/evil-skep", Regular, "x")],
            &[("hard", Link, "../../../etc/passwd")],
            &[("out", Symlink, "../.."), ("out/.wh.evil", Regular, "")],
        ];
        for attack in attacks {
            let top = tempfile::tempdir().unwrap();
            let dir = top.path().join("a/layer");
            std::fs::create_dir_all(&dir).unwrap();
            let (bytes, digest) = archive(attack);
            assert!(unpack(bytes.as_slice(), &dir, &digest).is_err(), "{attack:?}");
            let outside: Vec<_> = std::fs::read_dir(top.path()).unwrap().flatten().map(|e| e.file_name()).collect();
            assert_eq!(outside, ["a"], "{attack:?}");
        }
        assert!(!Path::new("/tmp/evil-skep").exists());
    }

    #[test]
    fn a_layer_must_be_what_its_name_says() {
        let dir = tempfile::tempdir().unwrap();
        let (bytes, digest) = archive(&[("etc/motd", tar::EntryType::Regular, "hello")]);
        let other = format!("sha256:{}", "0".repeat(64));
        assert!(matches!(unpack(bytes.as_slice(), dir.path(), &other), Err(UnpackError::Digest { .. })));
        let gz = {
            let mut encoder = flate2::read::GzEncoder::new(bytes.as_slice(), flate2::Compression::fast());
            let mut out = Vec::new();
            encoder.read_to_end(&mut out).unwrap();
            out
        };
        let dir = tempfile::tempdir().unwrap();
        unpack(gz.as_slice(), dir.path(), &digest).unwrap();
        assert_eq!(std::fs::read_to_string(dir.path().join("etc/motd")).unwrap(), "hello");
    }
}
