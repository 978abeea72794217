//! A container's output: cut into lines, kept in files that are rotated by size, handed on where its
//! log driver says, and read again.

pub(crate) mod config;
pub(crate) mod file;
pub(crate) mod forward;
pub(crate) mod reader;

use std::io;
use std::path::Path;

use serde::{Deserialize, Serialize};
use skep_api::Timestamp;

use self::config::LogConfig;
use self::file::LogFile;
use self::forward::{Forwarder, Line, LogSubject, Part};

/// Which of a container's outputs a line came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Stream {
    Stdout,
    Stderr,
}

impl Stream {
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::Stdout => "stdout",
            Self::Stderr => "stderr",
        }
    }
}

/// A line of output with its line end, or the beginning of one that is very long.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogLine {
    #[serde(rename = "log")]
    pub text: String,
    pub stream: Stream,
    pub time: Timestamp,
}

/// Longer lines are kept in pieces of this many bytes.
const LINE_LEN_MAX: usize = 16 << 10;

/// Takes one container's output; lives in its shim.
pub(crate) struct LogWriter {
    file: Option<LogFile>,
    forwarder: Option<Forwarder>,
    /// JSON of what is told beside each line; empty if nothing is.
    attributes: Vec<u8>,
    partial: [Vec<u8>; 2],
    /// The last pieces of lines that are cut.
    cut: [Option<Part>; 2],
}

impl LogWriter {
    /// None, if output is neither kept nor handed on.
    pub(crate) fn open(path: &Path, config: &LogConfig, subject: &LogSubject) -> io::Result<Option<Self>> {
        let file = config.kept().map(|format| LogFile::open(path, format, config)).transpose()?;
        let forwarder = Forwarder::new(config, subject);
        if file.is_none() && forwarder.is_none() {
            return Ok(None);
        }
        let attributes = match subject.attributes.is_empty() {
            true => Vec::new(),
            false => serde_json::to_vec(&subject.attributes)?,
        };
        Ok(Some(Self { file, forwarder, attributes, partial: [Vec::new(), Vec::new()], cut: [None, None] }))
    }

    /// Takes output as it comes; whole lines are written at once.
    pub(crate) fn write(&mut self, stream: Stream, bytes: &[u8], at: Timestamp) -> io::Result<()> {
        let mut batch = Vec::new();
        for piece in bytes.split_inclusive(|&byte| byte == b'\n') {
            let partial = &mut self.partial[stream as usize];
            partial.extend_from_slice(piece);
            if partial.ends_with(b"\n") || partial.len() >= LINE_LEN_MAX {
                let mut line = std::mem::take(partial);
                self.take(&mut batch, stream, &line, at);
                line.clear();
                self.partial[stream as usize] = line;
            }
        }
        let written = self.append(&batch);
        self.flush();
        written
    }

    /// Writes what is left of unfinished lines.
    pub(crate) fn finish(&mut self, at: Timestamp) -> io::Result<()> {
        let mut batch = Vec::new();
        for stream in [Stream::Stdout, Stream::Stderr] {
            let line = std::mem::take(&mut self.partial[stream as usize]);
            if !line.is_empty() {
                self.take(&mut batch, stream, &line, at);
            }
        }
        let written = self.append(&batch);
        self.flush();
        if let Some(file) = &mut self.file {
            file.finish();
        }
        written
    }

    fn take(&mut self, batch: &mut Vec<u8>, stream: Stream, line: &[u8], at: Timestamp) {
        if let Some(file) = &self.file {
            file.encode(batch, stream, line, at, &self.attributes);
        }
        if let Some(forwarder) = &mut self.forwarder {
            let text = line.strip_suffix(b"\n").unwrap_or(line);
            let part = next_part(&mut self.cut[stream as usize], line);
            forwarder.send(&Line { stream, text, at, part });
        }
    }

    fn flush(&mut self) {
        if let Some(forwarder) = &mut self.forwarder {
            forwarder.flush();
        }
    }

    fn append(&mut self, batch: &[u8]) -> io::Result<()> {
        self.file.as_mut().map_or(Ok(()), |file| file.append(batch))
    }
}

/// Where a piece stands in its line, after what the piece before it was.
fn next_part(cut: &mut Option<Part>, piece: &[u8]) -> Option<Part> {
    let goes_on = !piece.ends_with(b"\n") && piece.len() >= LINE_LEN_MAX;
    let part = match *cut {
        Some(before) => Some(Part { ordinal: before.ordinal + 1, is_last: !goes_on, ..before }),
        None => goes_on.then(|| Part { id: rand::random(), ordinal: 1, is_last: false }),
    };
    *cut = part.filter(|part| !part.is_last);
    part
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;
    use std::os::unix::net::UnixDatagram;
    use std::time::Duration;

    use super::config::{FileFormat, LogDriver};
    use super::file::{compressed, numbered};
    use super::forward::connection::Address;
    use super::forward::syslog::{Syslog, SyslogFormat};
    use super::reader::{LogOptions, LogStream, read};
    use super::*;

    fn options(tail: Option<usize>) -> LogOptions {
        LogOptions { stdout: true, stderr: true, since: None, until: None, tail, follow: false }
    }

    fn text(mut stream: LogStream) -> String {
        std::iter::from_fn(|| stream.blocking_recv()).map(|line| line.text).collect()
    }

    fn writer(path: &Path, config: &LogConfig) -> LogWriter {
        LogWriter::open(path, config, &LogSubject::default()).unwrap().unwrap()
    }

    fn check_rotation(driver: LogDriver, max_size_bytes: u64, compress: bool) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let config = LogConfig { driver, max_size_bytes, max_files: 3, compress, ..LogConfig::default() };
        let format = config.kept().unwrap();
        let mut writer = writer(&path, &config);
        for number in 0..12 {
            writer.write(Stream::Stdout, format!("line {number}\n").as_bytes(), Timestamp::from_nanos(number)).unwrap();
        }
        writer.write(Stream::Stderr, b"half", Timestamp::from_nanos(99)).unwrap();
        writer.finish(Timestamp::from_nanos(100)).unwrap();
        let closed = |number| numbered(&path, number);
        assert_eq!((closed(2).exists(), compressed(&closed(2)).exists()), (!compress, compress));
        assert!(!closed(3).exists() && !compressed(&closed(3)).exists());
        assert_eq!(text(read(path.clone(), format, options(Some(3)), || true)), "line 10\nline 11\nhalf");
        let all = text(read(path.clone(), format, options(None), || true));
        assert!(all.ends_with("line 11\nhalf") && !all.contains("line 0\n"), "{all}");
        let mut since = options(None);
        since.since = Some(Timestamp::from_nanos(11));
        since.stderr = false;
        assert_eq!(text(read(path, format, since, || true)), "line 11\n");
    }

    #[test]
    fn output_is_rotated_and_read_in_order() {
        check_rotation(LogDriver::JsonFile, 250, false);
        check_rotation(LogDriver::JsonFile, 250, true);
        check_rotation(LogDriver::Local, 70, true);
    }

    #[test]
    fn what_is_torn_hides_nothing_of_what_follows() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let config = LogConfig { driver: LogDriver::Local, ..LogConfig::default() };
        let line = |text: &str| writer(&path, &config).write(Stream::Stdout, text.as_bytes(), Timestamp::from_nanos(1));
        line("one\n").unwrap();
        line("two\n").unwrap();
        let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
        file.set_len(file.metadata().unwrap().len() - 2).unwrap();
        line("three\n").unwrap();
        assert_eq!(text(read(path, FileFormat::Binary, options(None), || true)), "one\nthree\n");
    }

    #[test]
    fn lines_reach_a_syslog_server_also_after_it_was_away() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("syslog");
        let syslog = Syslog { address: Address::Unix(socket.clone()), facility: 1, format: SyslogFormat::Rfc5424 };
        let config = LogConfig { driver: LogDriver::Syslog(syslog), ..LogConfig::default() };
        let mut writer = writer(&dir.path().join("log"), &config);
        let mut say = |text: &str| writer.write(Stream::Stdout, text.as_bytes(), Timestamp::from_nanos(1)).unwrap();
        let receive = |server: &UnixDatagram| {
            let mut buffer = [0; 256];
            server.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
            let len = server.recv(&mut buffer).unwrap();
            String::from_utf8_lossy(&buffer[..len]).into_owned()
        };
        let server = UnixDatagram::bind(&socket).unwrap();
        say("one\n");
        assert!(receive(&server).ends_with("- one\n"));
        drop(server);
        std::fs::remove_file(&socket).unwrap();
        let server = UnixDatagram::bind(&socket).unwrap();
        say("two\n");
        assert!(receive(&server).ends_with("- two\n"));
        let kept = text(read(dir.path().join("log"), FileFormat::Binary, options(None), || true));
        assert_eq!(kept, "one\ntwo\n");
    }

    #[test]
    fn a_stream_of_messages_tells_them_apart() {
        let server = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("tcp://{}", server.local_addr().unwrap());
        let options = [("gelf-address".to_owned(), address)].into();
        let config = LogConfig::parse("gelf", &options, &LogConfig::default()).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let mut writer = writer(&dir.path().join("log"), &config);
        writer.write(Stream::Stdout, b"one\ntwo\n", Timestamp::from_nanos(1)).unwrap();
        drop(writer);
        let mut told = Vec::new();
        server.accept().unwrap().0.read_to_end(&mut told).unwrap();
        let messages = told.split(|&byte| byte == 0).filter(|message| !message.is_empty());
        let message = |bytes| serde_json::from_slice::<serde_json::Value>(bytes).unwrap()["short_message"].clone();
        assert_eq!(messages.map(message).collect::<Vec<_>>(), ["one", "two"]);
    }

    #[test]
    fn pieces_of_a_long_line_say_which_they_are() {
        let (mut cut, long) = (None, vec![b'x'; LINE_LEN_MAX]);
        let mut next = |piece: &[u8]| next_part(&mut cut, piece).map(|part| (part.ordinal, part.is_last));
        assert_eq!(next(b"short\n"), None);
        assert_eq!([next(&long), next(&long), next(b"end\n")], [Some((1, false)), Some((2, false)), Some((3, true))]);
        assert_eq!(next(b"short\n"), None);
    }

    #[test]
    fn a_server_that_takes_nothing_holds_the_output_up_once_and_not_again() {
        let server = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = server.local_addr().unwrap().to_string();
        let syslog = Syslog { address: Address::Tcp(address), facility: 1, format: SyslogFormat::Rfc5424 };
        let config = LogConfig { driver: LogDriver::Syslog(syslog), max_size_bytes: u64::MAX, ..LogConfig::default() };
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let mut writer = writer(&path, &config);
        let line = "x".repeat(16 << 10) + "\n";
        let begun = std::time::Instant::now();
        // Far more than the connection's buffers hold.
        for _ in 0..2000 {
            writer.write(Stream::Stdout, line.as_bytes(), Timestamp::from_nanos(1)).unwrap();
        }
        assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
        assert_eq!(text(read(path, FileFormat::Binary, options(None), || true)).len(), 2000 * line.len());
    }
}
