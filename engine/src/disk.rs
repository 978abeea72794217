//! Files that are whole or not there.

use std::fs;
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

/// Writes `bytes` to `path` (mode 0600) so that a reader sees the old file or the new one, also
/// after the host's crash.
///
/// # Errors
///
/// The file cannot be written; what was there before still is.
pub fn write_whole(path: &Path, bytes: &[u8]) -> io::Result<()> {
    replace(path, bytes, fs::File::sync_data)
}

/// As [`write_whole`], but for what no one needs after the host's crash: flushing takes longer than
/// all the rest.
pub(crate) fn write_passing(path: &Path, bytes: &[u8]) -> io::Result<()> {
    replace(path, bytes, |_| Ok(()))
}

fn replace(path: &Path, bytes: &[u8], settle: impl FnOnce(&fs::File) -> io::Result<()>) -> io::Result<()> {
    // Another one may be writing the same file.
    let new = path.with_extension(format!("{:016x}.new", rand::random::<u64>()));
    let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&new)?;
    let written = file.write_all(bytes).and_then(|()| settle(&file)).and_then(|()| fs::rename(&new, path));
    if written.is_err() {
        // The first error is the one to tell.
        let _ = fs::remove_file(&new);
    }
    written
}

/// The bytes that a directory's files hold; what cannot be read counts nothing.
pub(crate) fn content(dir: &Path) -> u64 {
    sum(dir, &fs::Metadata::len)
}

/// The bytes that a directory's files take on disk; what cannot be read counts nothing.
#[must_use]
pub fn usage(dir: &Path) -> u64 {
    sum(dir, &|meta| std::os::unix::fs::MetadataExt::blocks(meta) * 512)
}

fn sum(dir: &Path, size: &dyn Fn(&fs::Metadata) -> u64) -> u64 {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries
        .map(|entry| match entry.metadata() {
            Ok(meta) if meta.is_dir() => sum(&entry.path(), size),
            Ok(meta) => size(&meta),
            Err(_) => 0,
        })
        .sum()
}
