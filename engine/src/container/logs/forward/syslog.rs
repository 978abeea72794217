//! Lines for a syslog server.

use std::collections::BTreeMap;
use std::io;

use jiff::tz::TimeZone;
use serde::{Deserialize, Serialize};

use super::connection::{Address, Connection, with_port};
use super::tls::Tls;
use super::{Line, Protocol, hostname};
use crate::container::logs::Stream;
use crate::container::logs::config::{LogConfigError, Options};

/// How a syslog server is spoken to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Syslog {
    pub address: Address,
    /// RFC 5424 §6.2.1.
    pub facility: u8,
    pub format: SyslogFormat,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SyslogFormat {
    /// What a host's own programs send: RFC 3164 without a host name.
    Local,
    Rfc3164,
    Rfc5424,
    /// With microseconds.
    Rfc5424Micro,
}

pub(in crate::container::logs) const OPTIONS: [&str; 7] = [
    "syslog-address",
    "syslog-facility",
    "syslog-format",
    "syslog-tls-ca-cert",
    "syslog-tls-cert",
    "syslog-tls-key",
    "syslog-tls-skip-verify",
];

/// By their codes (RFC 5424 table 1), as syslog.h calls them.
const FACILITIES: [&str; 24] = [
    "kern", "user", "mail", "daemon", "auth", "syslog", "lpr", "news", "uucp", "cron", "authpriv", "ftp", "", "", "",
    "", "local0", "local1", "local2", "local3", "local4", "local5", "local6", "local7",
];
const DAEMON_FACILITY: u8 = 3;
const LOCAL_SOCKET: &str = "/dev/log";
const PORT: u16 = 514;

impl Syslog {
    pub(in crate::container::logs) fn parse(options: &BTreeMap<String, String>) -> Result<Self, LogConfigError> {
        let options = Options(options);
        let address = address(&options).map_err(|rule| options.wrong("syslog-address", rule))?;
        let format = match options.get("syslog-format") {
            "" => SyslogFormat::Local,
            "rfc3164" => SyslogFormat::Rfc3164,
            "rfc5424" => SyslogFormat::Rfc5424,
            "rfc5424micro" => SyslogFormat::Rfc5424Micro,
            _ => return Err(options.wrong("syslog-format", "write rfc3164, rfc5424 or rfc5424micro")),
        };
        let facility = match options.get("syslog-facility") {
            "" => Some(DAEMON_FACILITY),
            text => facility(text),
        };
        let facility =
            facility.ok_or_else(|| options.wrong("syslog-facility", "write a name such as daemon, or 0 to 23"))?;
        Ok(Self { address, facility, format })
    }
}

fn facility(text: &str) -> Option<u8> {
    let named = FACILITIES.iter().position(|&name| name == text).and_then(|code| u8::try_from(code).ok());
    named.or_else(|| text.parse().ok().filter(|&code| usize::from(code) < FACILITIES.len()))
}

fn address(options: &Options<'_>) -> Result<Address, &'static str> {
    let text = options.get("syslog-address");
    let at = |rest: &str| with_port(rest, PORT).ok_or("write HOST or HOST:PORT after the scheme");
    match text.split_once("://") {
        None if text.is_empty() => Ok(Address::Unix(LOCAL_SOCKET.into())),
        Some(("unix" | "unixgram", path)) if path.starts_with('/') => Ok(Address::Unix(path.into())),
        Some(("udp", rest)) => at(rest).map(Address::Udp),
        Some(("tcp", rest)) => at(rest).map(Address::Tcp),
        Some(("tcp+tls", rest)) => {
            let address = at(rest)?;
            let file = |key: &str| Some(options.get(key)).filter(|path| !path.is_empty()).map(Into::into);
            let identity = match (file("syslog-tls-cert"), file("syslog-tls-key")) {
                (Some(certificate), Some(key)) => Some((certificate, key)),
                (None, None) => None,
                _ => return Err("a certificate needs its key: give both syslog-tls-cert and syslog-tls-key"),
            };
            let tls = Tls {
                authorities: file("syslog-tls-ca-cert"),
                identity,
                // As in Docker, that it is there is enough.
                trusts_any: !options.get("syslog-tls-skip-verify").is_empty(),
                ..Tls::of(&address)
            };
            Ok(Address::Tls(address, Box::new(tls)))
        }
        _ => Err("write unix:///PATH, udp://HOST:PORT, tcp://HOST:PORT or tcp+tls://HOST:PORT"),
    }
}

/// Severities of RFC 5424 table 2.
pub(super) const fn severity(stream: Stream) -> u8 {
    match stream {
        Stream::Stdout => 6,
        Stream::Stderr => 3,
    }
}

/// What speaks to one server.
pub(super) struct Speaker {
    pub(super) syslog: Syslog,
    pub(super) hostname: String,
    pub(super) tag: String,
}

impl Speaker {
    pub(super) fn new(syslog: &Syslog, tag: String) -> Self {
        Self { syslog: syslog.clone(), hostname: hostname(), tag }
    }

    fn message(&self, line: &Line<'_>) -> Vec<u8> {
        let (hostname, tag) = (&self.hostname, &self.tag);
        let priority = self.syslog.facility * 8 + severity(line.stream);
        let pid = std::process::id();
        let time = jiff::Timestamp::from_nanosecond(i128::from(line.at.as_nanos())).unwrap_or_default();
        let local = || time.to_zoned(TimeZone::system());
        let head = match self.syslog.format {
            SyslogFormat::Local => format!("<{priority}>{} {tag}[{pid}]: ", local().strftime("%b %e %H:%M:%S")),
            SyslogFormat::Rfc3164 => {
                format!("<{priority}>{} {hostname} {tag}[{pid}]: ", local().strftime("%b %e %H:%M:%S"))
            }
            SyslogFormat::Rfc5424 => format!("<{priority}>1 {time:.0} {hostname} {tag} {pid} {tag} - "),
            SyslogFormat::Rfc5424Micro => format!("<{priority}>1 {time:.6} {hostname} {tag} {pid} {tag} - "),
        };
        let message = [head.as_bytes(), line.text, b"\n"].concat();
        let is_counted = matches!(self.syslog.format, SyslogFormat::Rfc5424 | SyslogFormat::Rfc5424Micro)
            && matches!(self.syslog.address, Address::Tls(..));
        // RFC 5425 §4.3.
        if is_counted { [format!("{} ", message.len()).as_bytes(), &message].concat() } else { message }
    }
}

impl Protocol for Speaker {
    fn address(&self) -> Address {
        self.syslog.address.clone()
    }

    fn tell(&mut self, connection: &mut Connection, line: &Line<'_>) -> io::Result<()> {
        connection.send(&self.message(line))
    }
}

#[cfg(test)]
mod tests {
    use skep_api::Timestamp;

    use super::*;

    #[test]
    fn a_line_is_told_as_each_format_has_it() {
        let line = |format| {
            let syslog = Syslog { address: Address::Udp("h:1".into()), facility: 3, format };
            let speaker = Speaker { syslog, hostname: "host".into(), tag: "tag".into() };
            let at = Timestamp::from_nanos(1_700_000_000_123_456_789);
            let line = Line { stream: Stream::Stderr, text: b"text", at, part: None };
            String::from_utf8(speaker.message(&line)).unwrap()
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
}
