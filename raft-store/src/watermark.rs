//! How far the log once reached, kept beside the database.
//!
//! The database drops what follows a damaged page when it opens; without a second witness a
//! manager would then have forgotten entries it had acknowledged and might vote wrongly. The
//! witness is written after each flush, without a flush of its own: after a crash of the host it
//! may be behind, never ahead.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::Path;

/// The witness file.
#[derive(Debug)]
pub(crate) struct Watermark(File);

const LEN: usize = 16;

impl Watermark {
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path)?;
        Ok(Self(file))
    }

    /// The first index not known to be durable: all before it were.
    pub(crate) fn read(&self) -> io::Result<u64> {
        let mut bytes = [0; LEN];
        match self.0.read_exact_at(&mut bytes, 0) {
            Ok(()) => {
                let (index, check) = bytes.split_at(LEN / 2);
                let index = u64::from_be_bytes(index.try_into().expect("half of 16 bytes"));
                // A torn write counts as no witness.
                Ok(if check == (!index).to_be_bytes() { index } else { 0 })
            }
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(0),
            Err(error) => Err(error),
        }
    }

    pub(crate) fn write(&self, index: u64) -> io::Result<()> {
        let bytes = [index.to_be_bytes(), (!index).to_be_bytes()].concat();
        self.0.write_all_at(&bytes, 0)
    }
}
