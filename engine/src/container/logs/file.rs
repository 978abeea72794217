//! The files that a container's output lies in: one that is written to, and closed ones, numbered
//! from the newest, which may be compressed.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;

use flate2::Compression;
use flate2::write::GzEncoder;
use skep_api::Timestamp;

use super::config::{FileFormat, LogConfig};
use super::{LogLine, Stream};

/// Writes whole lines, and begins a new file when one is full.
pub(super) struct LogFile {
    path: PathBuf,
    format: FileFormat,
    max_size_bytes: u64,
    max_files: u32,
    compress: bool,
    file: File,
    len: u64,
    /// Compresses what was closed last.
    packing: Option<JoinHandle<()>>,
}

impl LogFile {
    pub(super) fn open(path: &Path, format: FileFormat, config: &LogConfig) -> io::Result<Self> {
        let file = open_append(path)?;
        if format == FileFormat::Binary {
            // What a host's sudden end left of a record would hide all that follow.
            file.set_len(whole_records_len(path)?)?;
        }
        let len = file.metadata()?.len();
        Ok(Self {
            path: path.to_owned(),
            format,
            max_size_bytes: config.max_size_bytes,
            max_files: config.max_files,
            compress: config.compress,
            file,
            len,
            packing: None,
        })
    }

    /// Adds a line to what is to be written.
    pub(super) fn encode(&self, batch: &mut Vec<u8>, stream: Stream, line: &[u8], at: Timestamp, attrs: &[u8]) {
        match self.format {
            FileFormat::Json => {
                let line = LogLine { text: String::from_utf8_lossy(line).into_owned(), stream, time: at };
                serde_json::to_writer(&mut *batch, &line).expect("a line is always JSON");
                if !attrs.is_empty() {
                    batch.pop();
                    batch.extend_from_slice(b",\"attrs\":");
                    batch.extend_from_slice(attrs);
                    batch.push(b'}');
                }
                batch.push(b'\n');
            }
            FileFormat::Binary => {
                let len = u32::try_from(RECORD_HEAD_LEN + line.len()).expect("a line is short");
                batch.extend_from_slice(&len.to_be_bytes());
                batch.push(stream as u8);
                batch.extend_from_slice(&at.as_nanos().to_be_bytes());
                batch.extend_from_slice(line);
            }
        }
    }

    /// Writes what [`Self::encode`] put together: all of it, or nothing.
    pub(super) fn append(&mut self, batch: &[u8]) -> io::Result<()> {
        if batch.is_empty() {
            return Ok(());
        }
        if self.len > 0 && self.len + batch.len() as u64 > self.max_size_bytes {
            self.rotate()?;
        }
        if let Err(error) = self.file.write_all(batch) {
            // On a full disk: no half of a line stays.
            self.file.set_len(self.len)?;
            return Err(error);
        }
        self.len += batch.len() as u64;
        Ok(())
    }

    /// Waits until all that is closed is compressed.
    pub(super) fn finish(&mut self) {
        if let Some(packing) = self.packing.take() {
            // It ends by itself; what it could not compress stays as it was.
            let _ = packing.join();
        }
    }

    /// `log` becomes `log.1`, that `log.2`, and so on; the last goes.
    fn rotate(&mut self) -> io::Result<()> {
        self.finish();
        for number in (1..self.max_files).rev() {
            let to = numbered(&self.path, number);
            if number == 1 {
                rename_if_there(&self.path, &to)?;
            } else {
                let from = numbered(&self.path, number - 1);
                rename_if_there(&from, &to)?;
                rename_if_there(&compressed(&from), &compressed(&to))?;
            }
        }
        if self.max_files == 1 {
            fs::remove_file(&self.path)?;
        }
        self.file = open_append(&self.path)?;
        self.len = 0;
        if self.compress && self.max_files > 1 {
            let closed = numbered(&self.path, 1);
            let work = move || drop(pack(&closed));
            self.packing = std::thread::Builder::new().name("log-packer".into()).spawn(work).ok();
        }
        Ok(())
    }
}

/// Replaces a file by its compressed form; leaves it as it is if that fails.
fn pack(path: &Path) -> io::Result<()> {
    let target = compressed(path);
    let mut part = target.as_os_str().to_owned();
    part.push(".part");
    let part = PathBuf::from(part);
    let packed = || {
        let out = OpenOptions::new().create(true).write(true).truncate(true).mode(0o640).open(&part)?;
        let mut encoder = GzEncoder::new(out, Compression::fast());
        io::copy(&mut File::open(path)?, &mut encoder)?;
        encoder.finish()?;
        fs::rename(&part, &target)
    };
    match packed() {
        Ok(()) => fs::remove_file(path),
        Err(error) => fs::remove_file(&part).and(Err(error)),
    }
}

/// Makes the file, for readers who come before the first word.
pub(crate) fn ensure(path: &Path) -> io::Result<()> {
    open_append(path).map(drop)
}

fn open_append(path: &Path) -> io::Result<File> {
    OpenOptions::new().create(true).append(true).mode(0o640).open(path)
}

pub(super) fn numbered(path: &Path, number: u32) -> PathBuf {
    with_suffix(path, &format!(".{number}"))
}

pub(super) fn compressed(path: &Path) -> PathBuf {
    with_suffix(path, ".gz")
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

fn rename_if_there(from: &Path, to: &Path) -> io::Result<()> {
    match fs::rename(from, to) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Of a binary record, behind its length (32 bits, higher byte first): the stream (0 or 1), the time
/// in nanoseconds (64 bits, higher byte first); the text follows.
const RECORD_HEAD_LEN: usize = 9;
const RECORD_LEN_MAX: usize = RECORD_HEAD_LEN + super::LINE_LEN_MAX * 2;

/// Reads one record. `None` at the end or where one is not whole: `bytes` holds what was read of it.
pub(super) fn read_record(reader: &mut impl BufRead, bytes: &mut Vec<u8>) -> io::Result<Option<LogLine>> {
    bytes.clear();
    reader.by_ref().take(4).read_to_end(bytes)?;
    let Some(len) = bytes.first_chunk::<4>().map(|len| u32::from_be_bytes(*len) as usize) else { return Ok(None) };
    if !(RECORD_HEAD_LEN..=RECORD_LEN_MAX).contains(&len) {
        return Err(io::Error::new(io::ErrorKind::InvalidData, format!("a record of {len} bytes cannot be")));
    }
    reader.by_ref().take(len as u64).read_to_end(bytes)?;
    if bytes.len() < 4 + len {
        return Ok(None);
    }
    let (head, text) = bytes[4..].split_at(RECORD_HEAD_LEN);
    let stream = if head[0] == 0 { Stream::Stdout } else { Stream::Stderr };
    let nanos = i64::from_be_bytes(*head[1..].first_chunk().expect("the head is that long"));
    let text = String::from_utf8_lossy(text).into_owned();
    Ok(Some(LogLine { text, stream, time: Timestamp::from_nanos(nanos) }))
}

fn whole_records_len(path: &Path) -> io::Result<u64> {
    let mut reader = BufReader::new(File::open(path)?);
    let (mut bytes, mut len) = (Vec::new(), 0);
    while let Ok(Some(_)) = read_record(&mut reader, &mut bytes) {
        len += bytes.len() as u64;
    }
    Ok(len)
}
