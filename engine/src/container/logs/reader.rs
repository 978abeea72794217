//! Reads a container's output from its files, oldest first, and follows them across rotations.

use std::collections::VecDeque;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read, Seek as _, SeekFrom};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use flate2::read::GzDecoder;
use skep_api::Timestamp;
use tokio::sync::mpsc;

use super::config::FileFormat;
use super::file::{self, compressed, numbered};
use super::{LogLine, Stream};

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

/// How often a followed file is looked at.
const FOLLOW_PAUSE: Duration = Duration::from_millis(20);
const LINES_AHEAD: usize = 256;

/// Reads a container's output. While following, `ended` says when no more will come.
pub(crate) fn read(
    path: PathBuf,
    format: FileFormat,
    options: LogOptions,
    ended: impl Fn() -> bool + Send + 'static,
) -> LogStream {
    let (lines, stream) = mpsc::channel(LINES_AHEAD);
    // Opened before the caller is told: a container that is removed at once is read to its end.
    let current = File::open(&path).ok();
    let reader = Reader { path, format, options, ended: Box::new(ended), lines };
    std::thread::Builder::new()
        .name("log-reader".into())
        .spawn(move || {
            if let Err(error) = reader.run(current) {
                tracing::warn!(path = %reader.path.display(), %error, "a log cannot be read");
            }
        })
        .expect("a thread can be started");
    stream
}

struct Reader {
    path: PathBuf,
    format: FileFormat,
    options: LogOptions,
    ended: Box<dyn Fn() -> bool + Send>,
    lines: mpsc::Sender<LogLine>,
}

impl Reader {
    fn run(&self, current: Option<File>) -> io::Result<()> {
        let mut last: VecDeque<LogLine> = VecDeque::new();
        let mut deliver = |line: LogLine| match self.options.tail {
            _ if !self.wants(&line) => true,
            None => self.lines.blocking_send(line).is_ok(),
            Some(tail) => {
                last.push_back(line);
                if last.len() > tail {
                    last.pop_front();
                }
                true
            }
        };
        for closed in closed_files(&self.path).into_iter().rev() {
            self.drain(&mut BufReader::new(closed), &mut deliver)?;
        }
        let current = current.or_else(|| self.open_when_there());
        let Some(file) = current else { return Ok(()) };
        let mut reader = BufReader::new(file);
        self.drain_open(&mut reader, &mut deliver)?;
        for line in last {
            if self.lines.blocking_send(line).is_err() {
                return Ok(());
            }
        }
        while self.options.follow && !self.lines.is_closed() {
            // Looked at before the last read, so that nothing written before the end is missed.
            let over = (self.ended)();
            let mut open = true;
            self.drain_open(&mut reader, &mut |line| {
                open = !self.wants(&line) || self.lines.blocking_send(line).is_ok();
                open
            })?;
            if over || !open {
                break;
            }
            if rotated_away(&self.path, reader.get_ref())? {
                reader = BufReader::new(File::open(&self.path)?);
            } else {
                std::thread::sleep(FOLLOW_PAUSE);
            }
        }
        Ok(())
    }

    fn wants(&self, line: &LogLine) -> bool {
        let options = &self.options;
        (match line.stream {
            Stream::Stdout => options.stdout,
            Stream::Stderr => options.stderr,
        }) && options.since.is_none_or(|since| line.time >= since)
            && options.until.is_none_or(|until| line.time <= until)
    }

    /// Opens the current file; a container that is followed from before its start has none yet.
    fn open_when_there(&self) -> Option<File> {
        loop {
            let over = (self.ended)();
            match File::open(&self.path) {
                Ok(file) => return Some(file),
                Err(_) if self.options.follow && !over && !self.lines.is_closed() => {
                    std::thread::sleep(FOLLOW_PAUSE);
                }
                Err(_) => return None,
            }
        }
    }

    /// Hands on every whole line of a file that is still written to; what is half written stays for
    /// the next time.
    fn drain_open(&self, reader: &mut BufReader<File>, deliver: &mut dyn FnMut(LogLine) -> bool) -> io::Result<()> {
        let half = self.drain(reader, deliver)?;
        if half > 0 {
            reader.seek(SeekFrom::Current(-i64::try_from(half).map_err(io::Error::other)?))?;
        }
        Ok(())
    }

    /// Hands on every whole line there is; returns how many bytes of another were read.
    fn drain(&self, reader: &mut impl BufRead, deliver: &mut dyn FnMut(LogLine) -> bool) -> io::Result<usize> {
        let mut bytes = Vec::new();
        loop {
            bytes.clear();
            let line = match self.format {
                FileFormat::Json => {
                    let len = reader.read_until(b'\n', &mut bytes)?;
                    if !bytes.ends_with(b"\n") {
                        return Ok(len);
                    }
                    // A torn line, as after a full disk, is passed over.
                    serde_json::from_slice(&bytes).ok()
                }
                FileFormat::Binary => match file::read_record(reader, &mut bytes)? {
                    Some(line) => Some(line),
                    None => return Ok(bytes.len()),
                },
            };
            if let Some(line) = line
                && !deliver(line)
            {
                return Ok(0);
            }
        }
    }
}

/// The files that were closed, newest first.
fn closed_files(path: &Path) -> Vec<Box<dyn Read>> {
    let open = |number| -> Option<Box<dyn Read>> {
        let plain = numbered(path, number);
        // One is made of the other meanwhile.
        let packed = || File::open(compressed(&plain)).map(|file| Box::new(GzDecoder::new(file)) as Box<dyn Read>);
        File::open(&plain).map(|file| Box::new(file) as Box<dyn Read>).or_else(|_| packed()).ok()
    };
    (1..).map_while(open).collect()
}

fn rotated_away(path: &Path, open: &File) -> io::Result<bool> {
    match fs::metadata(path) {
        Ok(now) => Ok(now.ino() != open.metadata()?.ino()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}
