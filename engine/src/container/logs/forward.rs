//! Hands lines on to a syslog server or to the host's journal.
//!
//! Neither holds a container up for long: one that does not take a line within a second does not get it,
//! nor any other for half a minute. All of them are still in the container's own files.

use std::collections::BTreeMap;
use std::fmt;
use std::io::{self, Write as _};
use std::net::{TcpStream, ToSocketAddrs as _, UdpSocket};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::Path;
use std::time::{Duration, Instant};

use jiff::tz::TimeZone;
use serde::{Deserialize, Serialize};
use skep_api::Timestamp;

use super::Stream;
use super::config::{LogConfig, LogDriver, Syslog, SyslogAddress, SyslogFormat};

/// What is told of a container beside each of its lines.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct LogSubject {
    pub(crate) id: String,
    pub(crate) name: String,
    pub(crate) image: String,
    pub(crate) image_id: String,
    pub(crate) command: String,
    /// The labels and variables that the log's options ask for.
    pub(crate) attributes: BTreeMap<String, String>,
}

impl LogSubject {
    /// The line's tag, as the option `tag` has it.
    fn tag(&self, options: &BTreeMap<String, String>) -> String {
        let template = options.get("tag").filter(|tag| !tag.is_empty()).map_or("{{.ID}}", String::as_str);
        let short = |id: &str| id.trim_start_matches("sha256:").chars().take(12).collect::<String>();
        let (id, image_id) = (short(&self.id), short(&self.image_id));
        let values: [&str; 8] =
            [&id, &self.id, &self.name, &image_id, &self.image_id, &self.image, "skep", &self.command];
        let fields = super::config::TAG_FIELDS.into_iter().zip(values);
        let tight = template.replace("{{ ", "{{").replace(" }}", "}}");
        fields.fold(tight, |text, (field, value)| text.replace(&format!("{{{{.{field}}}}}"), value))
    }
}

/// The way to whoever takes lines elsewhere.
pub(super) struct Forwarder {
    kind: Kind,
    tag: String,
    subject: LogSubject,
    connection: Option<Connection>,
    /// Not tried again before.
    next_try: Instant,
}

enum Kind {
    Syslog { syslog: Syslog, hostname: String },
    Journal,
}

enum Connection {
    Datagrams(UnixDatagram),
    Stream(UnixStream),
    Udp(UdpSocket),
    Tcp(TcpStream),
}

const JOURNAL_SOCKET: &str = "/run/systemd/journal/socket";
/// How long anyone elsewhere is waited for.
const PATIENCE: Duration = Duration::from_secs(1);
/// How long one that refuses is left alone.
const REFUSED_PAUSE: Duration = Duration::from_secs(1);
/// How long one is left alone that let us wait.
const SLOW_PAUSE: Duration = Duration::from_secs(30);

impl Forwarder {
    /// None, if the driver hands nothing on.
    pub(super) fn new(config: &LogConfig, subject: &LogSubject) -> Option<Self> {
        let kind = match &config.driver {
            LogDriver::Syslog(syslog) => Kind::Syslog { syslog: syslog.clone(), hostname: hostname() },
            LogDriver::Journald => Kind::Journal,
            LogDriver::JsonFile | LogDriver::Local | LogDriver::None => return None,
        };
        let tag = subject.tag(&config.options);
        Some(Self { kind, tag, subject: subject.clone(), connection: None, next_try: Instant::now() })
    }

    /// Hands a line on, without its line end; gives it up if nobody takes it.
    pub(super) fn send(&mut self, stream: Stream, line: &[u8], at: Timestamp) {
        let line = line.strip_suffix(b"\n").unwrap_or(line);
        let message = match &self.kind {
            Kind::Syslog { syslog, hostname } => syslog_message(syslog, hostname, &self.tag, stream, line, at),
            Kind::Journal => journal_entry(&self.subject, &self.tag, stream, line, at),
        };
        // A server that has been started anew is reached again at once.
        for _ in 0..2 {
            if self.connection.is_none() && !self.connect() {
                return;
            }
            match self.connection.as_mut().map(|connection| connection.send(&message)) {
                Some(Err(error)) => {
                    self.connection = None;
                    if is_slow(&error) {
                        self.next_try = Instant::now() + SLOW_PAUSE;
                        return;
                    }
                }
                _ => return,
            }
        }
    }

    fn connect(&mut self) -> bool {
        if Instant::now() < self.next_try {
            return false;
        }
        let reached = match &self.kind {
            Kind::Syslog { syslog, .. } => Connection::to(&syslog.address),
            Kind::Journal => Connection::to_socket(Path::new(JOURNAL_SOCKET)),
        };
        match reached {
            Ok(connection) => self.connection = Some(connection),
            Err(error) => {
                self.next_try = Instant::now() + if is_slow(&error) { SLOW_PAUSE } else { REFUSED_PAUSE };
            }
        }
        self.connection.is_some()
    }
}

fn is_slow(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut)
}

/// A log's configuration with addresses for names: nothing is looked up where a container would wait for
/// it.
fn resolved(config: &LogConfig) -> io::Result<LogConfig> {
    let mut config = config.clone();
    if let LogDriver::Syslog(Syslog { address: SyslogAddress::Udp(address) | SyslogAddress::Tcp(address), .. }) =
        &mut config.driver
    {
        let found = address.to_socket_addrs().and_then(|mut all| {
            all.next().ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "the name has no address"))
        });
        let found =
            found.map_err(|error| io::Error::new(error.kind(), format!("log driver syslog: {address}: {error}")))?;
        *address = found.to_string();
    }
    Ok(config)
}

/// What a container's output is to be handed on by, if whoever it names can be reached now: with addresses
/// for names.
pub(crate) fn reachable(config: &LogConfig) -> io::Result<LogConfig> {
    let config = resolved(config)?;
    let (place, reached): (&dyn fmt::Display, _) = match &config.driver {
        LogDriver::Syslog(syslog) => (&syslog.address, Connection::to(&syslog.address)),
        LogDriver::Journald => (&JOURNAL_SOCKET, Connection::to_socket(Path::new(JOURNAL_SOCKET))),
        LogDriver::JsonFile | LogDriver::Local | LogDriver::None => return Ok(config),
    };
    if let Err(error) = reached {
        let reason = format!("log driver {}: {place}: {error}", config.driver.as_str());
        return Err(io::Error::new(error.kind(), reason));
    }
    Ok(config)
}

impl Connection {
    fn to(address: &SyslogAddress) -> io::Result<Self> {
        match address {
            SyslogAddress::Unix(path) => Self::to_socket(path),
            SyslogAddress::Udp(address) => {
                let socket = UdpSocket::bind("[::]:0").or_else(|_| UdpSocket::bind("0.0.0.0:0"))?;
                socket.connect(address)?;
                Ok(Self::Udp(socket))
            }
            SyslogAddress::Tcp(address) => {
                let target = address.to_socket_addrs()?.next();
                let target = target.ok_or_else(|| io::Error::other("the name has no address"))?;
                let stream = TcpStream::connect_timeout(&target, PATIENCE)?;
                stream.set_write_timeout(Some(PATIENCE))?;
                Ok(Self::Tcp(stream))
            }
        }
    }

    /// A socket of either kind.
    fn to_socket(path: &Path) -> io::Result<Self> {
        let socket = UnixDatagram::unbound()?;
        if let Err(error) = socket.connect(path) {
            if error.raw_os_error() != Some(libc::EPROTOTYPE) {
                return Err(error);
            }
            let stream = UnixStream::connect(path)?;
            stream.set_write_timeout(Some(PATIENCE))?;
            return Ok(Self::Stream(stream));
        }
        socket.set_write_timeout(Some(PATIENCE))?;
        Ok(Self::Datagrams(socket))
    }

    fn send(&mut self, message: &[u8]) -> io::Result<()> {
        match self {
            Self::Datagrams(socket) => socket.send(message).map(drop),
            Self::Udp(socket) => socket.send(message).map(drop),
            Self::Stream(socket) => socket.write_all(message),
            Self::Tcp(socket) => socket.write_all(message),
        }
    }
}

/// Severities of RFC 5424 table 2.
const fn severity(stream: Stream) -> u8 {
    match stream {
        Stream::Stdout => 6,
        Stream::Stderr => 3,
    }
}

fn syslog_message(syslog: &Syslog, hostname: &str, tag: &str, stream: Stream, line: &[u8], at: Timestamp) -> Vec<u8> {
    let priority = syslog.facility * 8 + severity(stream);
    let pid = std::process::id();
    let time = jiff::Timestamp::from_nanosecond(i128::from(at.as_nanos())).unwrap_or_default();
    let local = || time.to_zoned(TimeZone::system());
    let head = match syslog.format {
        SyslogFormat::Local => format!("<{priority}>{} {tag}[{pid}]: ", local().strftime("%b %e %H:%M:%S")),
        SyslogFormat::Rfc3164 => {
            format!("<{priority}>{} {hostname} {tag}[{pid}]: ", local().strftime("%b %e %H:%M:%S"))
        }
        SyslogFormat::Rfc5424 => format!("<{priority}>1 {time:.0} {hostname} {tag} {pid} {tag} - "),
        SyslogFormat::Rfc5424Micro => format!("<{priority}>1 {time:.6} {hostname} {tag} {pid} {tag} - "),
    };
    [head.as_bytes(), line, b"\n"].concat()
}

/// An entry of the journal's native protocol: `NAME=VALUE`, or for a value of several lines the name,
/// a length (64 bits, lower byte first) and the value.
fn journal_entry(subject: &LogSubject, tag: &str, stream: Stream, line: &[u8], at: Timestamp) -> Vec<u8> {
    let mut entry = Vec::with_capacity(line.len() + 512);
    let mut field = |name: &str, value: &[u8]| {
        entry.extend_from_slice(name.as_bytes());
        if value.contains(&b'\n') {
            entry.push(b'\n');
            entry.extend_from_slice(&(value.len() as u64).to_le_bytes());
        } else {
            entry.push(b'=');
        }
        entry.extend_from_slice(value);
        entry.push(b'\n');
    };
    field("MESSAGE", line);
    field("PRIORITY", severity(stream).to_string().as_bytes());
    field("SYSLOG_IDENTIFIER", tag.as_bytes());
    field("SYSLOG_TIMESTAMP", at.to_string().as_bytes());
    field("CONTAINER_ID", &subject.id.as_bytes()[..subject.id.len().min(12)]);
    field("CONTAINER_ID_FULL", subject.id.as_bytes());
    field("CONTAINER_NAME", subject.name.as_bytes());
    field("CONTAINER_TAG", tag.as_bytes());
    field("IMAGE_NAME", subject.image.as_bytes());
    for (name, value) in &subject.attributes {
        field(&journal_name(name), value.as_bytes());
    }
    entry
}

/// The journal takes capital letters, digits and underscores, and no digit or underscore in front.
fn journal_name(name: &str) -> String {
    let upper = name.to_ascii_uppercase();
    let name: String = upper.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '_' }).collect();
    name.trim_start_matches(|c: char| !c.is_ascii_alphabetic()).to_owned()
}

fn hostname() -> String {
    nix::unistd::gethostname().ok().and_then(|name| name.into_string().ok()).unwrap_or_else(|| "-".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn subject() -> LogSubject {
        LogSubject {
            id: "0123456789abcdef".into(),
            name: "web".into(),
            attributes: BTreeMap::from([("com.example.team".into(), "a\nb".into())]),
            ..LogSubject::default()
        }
    }

    #[test]
    fn a_tag_is_made_of_what_the_container_is_called() {
        let tag = |template: &str| subject().tag(&BTreeMap::from([("tag".into(), template.into())]));
        assert_eq!(tag("{{.Name}}/{{ .ID }}"), "web/0123456789ab");
        assert_eq!(tag(""), "0123456789ab");
    }

    #[test]
    fn a_line_is_told_as_each_format_has_it() {
        let line = |format| {
            let syslog = Syslog { address: SyslogAddress::Udp("h:1".into()), facility: 3, format };
            let at = Timestamp::from_nanos(1_700_000_000_123_456_789);
            String::from_utf8(syslog_message(&syslog, "host", "tag", Stream::Stderr, b"text", at)).unwrap()
        };
        let pid = std::process::id();
        assert_eq!(
            line(SyslogFormat::Rfc5424Micro),
            format!("<27>1 2023-11-14T22:13:20.123456Z host tag {pid} tag - text\n")
        );
        assert_eq!(line(SyslogFormat::Rfc5424), format!("<27>1 2023-11-14T22:13:20Z host tag {pid} tag - text\n"));
        assert!(line(SyslogFormat::Rfc3164).ends_with(&format!(" host tag[{pid}]: text\n")));
        assert!(line(SyslogFormat::Local).starts_with("<27>Nov 1"));
    }

    #[test]
    fn an_entry_of_the_journal_holds_values_of_several_lines() {
        let entry = journal_entry(&subject(), "tag", Stream::Stdout, b"text", Timestamp::from_nanos(0));
        let wanted = b"COM_EXAMPLE_TEAM\n\x03\0\0\0\0\0\0\0a\nb\n";
        assert!(entry.starts_with(b"MESSAGE=text\nPRIORITY=6\n") && entry.ends_with(wanted));
    }
}
