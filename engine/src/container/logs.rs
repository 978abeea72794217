//! A container's output on disk: JSON lines as Docker writes them, rotated by size; and the reader
//! that follows them across rotations.

use std::collections::VecDeque;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead as _, BufReader, Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use skep_api::Timestamp;
use tokio::sync::mpsc;

use crate::container::config::LogConfig;

/// Which of a container's outputs a line came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Stream {
    Stdout,
    Stderr,
}

/// A line of output with its line end, or the beginning of one that is very long.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogLine {
    #[serde(rename = "log")]
    pub text: String,
    pub stream: Stream,
    pub time: Timestamp,
}

/// Which lines are wanted.
#[derive(Clone, Debug)]
pub struct LogOptions {
    pub stdout: bool,
    pub stderr: bool,
    pub since: Option<Timestamp>,
    pub until: Option<Timestamp>,
    /// Only the last so many; all if absent.
    pub tail: Option<usize>,
    /// Go on with what comes until the container ends.
    pub follow: bool,
}

/// Lines as they are read.
pub type LogStream = mpsc::Receiver<LogLine>;

/// Longer lines are kept in pieces of this many bytes.
const LINE_LEN_MAX: usize = 16 << 10;

/// Writes one container's output; lives in its shim.
pub(crate) struct LogWriter {
    path: PathBuf,
    config: LogConfig,
    file: File,
    len: u64,
    partial: [Vec<u8>; 2],
}

impl LogWriter {
    pub(crate) fn open(path: &Path, config: LogConfig) -> io::Result<Self> {
        let file = open_append(path)?;
        let len = file.metadata()?.len();
        Ok(Self { path: path.to_owned(), config, file, len, partial: [Vec::new(), Vec::new()] })
    }

    /// Takes output as it comes; whole lines are written at once.
    pub(crate) fn write(&mut self, stream: Stream, bytes: &[u8], at: Timestamp) -> io::Result<()> {
        let slot = stream as usize;
        let mut batch = Vec::new();
        for piece in bytes.split_inclusive(|&byte| byte == b'\n') {
            self.partial[slot].extend_from_slice(piece);
            let line = &self.partial[slot];
            if line.ends_with(b"\n") || line.len() >= LINE_LEN_MAX {
                encode(&mut batch, stream, line, at);
                self.partial[slot].clear();
            }
        }
        self.append(&batch)
    }

    /// Writes what is left of unfinished lines.
    pub(crate) fn finish(&mut self, at: Timestamp) -> io::Result<()> {
        let mut batch = Vec::new();
        for stream in [Stream::Stdout, Stream::Stderr] {
            let line = std::mem::take(&mut self.partial[stream as usize]);
            if !line.is_empty() {
                encode(&mut batch, stream, &line, at);
            }
        }
        self.append(&batch)
    }

    fn append(&mut self, batch: &[u8]) -> io::Result<()> {
        if batch.is_empty() {
            return Ok(());
        }
        if self.len > 0 && self.len + batch.len() as u64 > self.config.max_size_bytes {
            self.rotate()?;
        }
        self.file.write_all(batch)?;
        self.len += batch.len() as u64;
        Ok(())
    }

    /// `log` becomes `log.1`, that `log.2`, and so on; the last goes.
    fn rotate(&mut self) -> io::Result<()> {
        for number in (1..self.config.max_files).rev() {
            let from = if number == 1 { self.path.clone() } else { numbered(&self.path, number - 1) };
            match fs::rename(from, numbered(&self.path, number)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        if self.config.max_files == 1 {
            fs::remove_file(&self.path)?;
        }
        self.file = open_append(&self.path)?;
        self.len = 0;
        Ok(())
    }
}

/// Makes the file, for readers who come before the first word.
pub(crate) fn ensure(path: &Path) -> io::Result<()> {
    open_append(path).map(drop)
}

fn open_append(path: &Path) -> io::Result<File> {
    OpenOptions::new().create(true).append(true).mode(0o640).open(path)
}

fn numbered(path: &Path, number: u32) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{number}"));
    name.into()
}

fn encode(batch: &mut Vec<u8>, stream: Stream, line: &[u8], at: Timestamp) {
    let line = LogLine { text: String::from_utf8_lossy(line).into_owned(), stream, time: at };
    serde_json::to_writer(&mut *batch, &line).expect("a line is always JSON");
    batch.push(b'\n');
}

/// How often a followed file is looked at.
const FOLLOW_PAUSE: Duration = Duration::from_millis(20);
const LINES_AHEAD: usize = 256;

/// Reads a container's output. While following, `ended` says when no more will come.
pub(crate) fn read(path: PathBuf, options: LogOptions, ended: impl Fn() -> bool + Send + 'static) -> LogStream {
    let (lines, stream) = mpsc::channel(LINES_AHEAD);
    // Opened before the caller is told: a container that is removed at once is read to its end.
    let current = File::open(&path).ok();
    std::thread::Builder::new()
        .name("log-reader".into())
        .spawn(move || {
            if let Err(error) = read_all(&path, current, &options, &ended, &lines) {
                tracing::warn!(path = %path.display(), %error, "a log cannot be read");
            }
        })
        .expect("a thread can be started");
    stream
}

fn read_all(
    path: &Path,
    current: Option<File>,
    options: &LogOptions,
    ended: &dyn Fn() -> bool,
    lines: &mpsc::Sender<LogLine>,
) -> io::Result<()> {
    let wanted = |line: &LogLine| {
        (match line.stream {
            Stream::Stdout => options.stdout,
            Stream::Stderr => options.stderr,
        }) && options.since.is_none_or(|since| line.time >= since)
            && options.until.is_none_or(|until| line.time <= until)
    };
    // Oldest first: the numbered files, then the current one.
    let rotated = (1..).map(|number| numbered(path, number)).take_while(|path| path.exists());
    let rotated: Vec<_> = rotated.collect();
    let mut last: VecDeque<LogLine> = VecDeque::new();
    let mut deliver = |line: LogLine| match options.tail {
        _ if !wanted(&line) => true,
        None => lines.blocking_send(line).is_ok(),
        Some(tail) => {
            last.push_back(line);
            if last.len() > tail {
                last.pop_front();
            }
            true
        }
    };
    for path in rotated.iter().rev() {
        if let Ok(file) = File::open(path) {
            drain(&mut BufReader::new(file), &mut deliver)?;
        }
    }
    let current = current.or_else(|| open_when_there(path, options, ended, lines));
    let Some(file) = current else { return Ok(()) };
    let mut reader = BufReader::new(file);
    drain(&mut reader, &mut deliver)?;
    for line in last {
        if lines.blocking_send(line).is_err() {
            return Ok(());
        }
    }
    while options.follow && !lines.is_closed() {
        // Looked at before the last read, so that nothing written before the end is missed.
        let over = ended();
        let mut open = true;
        drain(&mut reader, &mut |line| {
            open = !wanted(&line) || lines.blocking_send(line).is_ok();
            open
        })?;
        if over || !open {
            break;
        }
        if rotated_away(path, reader.get_ref())? {
            reader = BufReader::new(File::open(path)?);
        } else {
            std::thread::sleep(FOLLOW_PAUSE);
        }
    }
    Ok(())
}

/// Opens the current file; a container that is followed from before its start has none yet.
fn open_when_there(
    path: &Path,
    options: &LogOptions,
    ended: &dyn Fn() -> bool,
    lines: &mpsc::Sender<LogLine>,
) -> Option<File> {
    loop {
        let over = ended();
        match File::open(path) {
            Ok(file) => return Some(file),
            Err(_) if options.follow && !over && !lines.is_closed() => std::thread::sleep(FOLLOW_PAUSE),
            Err(_) => return None,
        }
    }
}

/// Hands on every whole line there is; what is half written stays for the next time.
fn drain(reader: &mut BufReader<File>, deliver: &mut dyn FnMut(LogLine) -> bool) -> io::Result<()> {
    let mut text = Vec::new();
    loop {
        text.clear();
        let len = reader.read_until(b'\n', &mut text)?;
        if !text.ends_with(b"\n") {
            reader.seek(SeekFrom::Current(-i64::try_from(len).map_err(io::Error::other)?))?;
            return Ok(());
        }
        // A torn line, as after a full disk, is passed over.
        if let Ok(line) = serde_json::from_slice(&text)
            && !deliver(line)
        {
            return Ok(());
        }
    }
}

fn rotated_away(path: &Path, open: &File) -> io::Result<bool> {
    match fs::metadata(path) {
        Ok(now) => Ok(now.ino() != open.metadata()?.ino()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(tail: Option<usize>) -> LogOptions {
        LogOptions { stdout: true, stderr: true, since: None, until: None, tail, follow: false }
    }

    fn text(mut stream: LogStream) -> String {
        std::iter::from_fn(|| stream.blocking_recv()).map(|line| line.text).collect()
    }

    #[test]
    fn output_is_rotated_and_read_in_order() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let config = LogConfig { max_size_bytes: 250, max_files: 3, ..LogConfig::default() };
        let mut writer = LogWriter::open(&path, config).unwrap();
        for number in 0..12 {
            writer.write(Stream::Stdout, format!("line {number}\n").as_bytes(), Timestamp::from_nanos(number)).unwrap();
        }
        writer.write(Stream::Stderr, b"half", Timestamp::from_nanos(99)).unwrap();
        writer.finish(Timestamp::from_nanos(100)).unwrap();
        assert!(numbered(&path, 2).exists() && !numbered(&path, 3).exists());
        assert_eq!(text(read(path.clone(), options(Some(3)), || true)), "line 10\nline 11\nhalf");
        let all = text(read(path.clone(), options(None), || true));
        assert!(all.ends_with("line 11\nhalf") && !all.contains("line 0\n"), "{all}");
        let mut since = options(None);
        since.since = Some(Timestamp::from_nanos(11));
        since.stderr = false;
        assert_eq!(text(read(path, since, || true)), "line 11\n");
    }
}
