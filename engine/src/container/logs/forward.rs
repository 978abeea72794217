//! Hands lines on to those who take them elsewhere.
//!
//! Nobody holds a container up for long: one that does not take a line within a second does not get it,
//! nor any other for half a minute. All of them are still in the container's own files.

pub(super) mod connection;
pub(super) mod fluentd;
pub(super) mod gelf;
mod journal;
pub(super) mod splunk;
pub(super) mod syslog;
mod tls;

use std::collections::BTreeMap;
use std::io;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use skep_api::Timestamp;

use self::connection::{Address, Connection};
use super::Stream;
use super::config::{LogConfig, LogDriver};

/// What is told of a container beside each of its lines.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct LogSubject {
    pub(crate) id: String,
    pub(crate) name: String,
    pub(crate) image: String,
    pub(crate) image_id: String,
    pub(crate) command: String,
    #[serde(default)]
    pub(crate) created: Timestamp,
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

/// Where a piece stands in a line that is too long to be told at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Part {
    /// The same for all pieces of a line.
    pub(super) id: u64,
    /// From 1.
    pub(super) ordinal: u32,
    pub(super) is_last: bool,
}

impl Part {
    /// What programs look for that put such lines together.
    fn members(&self) -> [(&'static str, String); 4] {
        [
            ("partial_message", "true".into()),
            ("partial_id", format!("{:016x}", self.id)),
            ("partial_ordinal", self.ordinal.to_string()),
            ("partial_last", self.is_last.to_string()),
        ]
    }
}

/// A line to be handed on, without its line end.
pub(super) struct Line<'a> {
    pub(super) stream: Stream,
    pub(super) text: &'a [u8],
    pub(super) at: Timestamp,
    pub(super) part: Option<Part>,
}

/// How somebody who takes lines is spoken to.
trait Protocol: Send {
    fn address(&self) -> Address;
    fn tell(&mut self, connection: &mut Connection, line: &Line<'_>) -> io::Result<()>;

    /// Whether whoever has just been reached takes lines at all.
    fn check(&self, _: &mut Connection) -> io::Result<()> {
        Ok(())
    }

    /// Hands over what was told and gathered.
    fn flush(&mut self, _: &mut Connection) -> io::Result<()> {
        Ok(())
    }

    /// Forgets what was gathered.
    fn give_up(&mut self) {}
}

/// None, if the driver hands nothing on.
fn protocol(config: &LogConfig, subject: &LogSubject) -> Option<Box<dyn Protocol>> {
    let tag = subject.tag(&config.options);
    Some(match &config.driver {
        LogDriver::Syslog(syslog) => Box::new(syslog::Speaker::new(syslog, tag)),
        LogDriver::Journald => Box::new(journal::Speaker { subject: subject.clone(), tag }),
        LogDriver::Gelf(gelf) => Box::new(gelf::Speaker::new(gelf, subject, &tag)),
        LogDriver::Fluentd(fluentd) => Box::new(fluentd::Speaker::new(fluentd, subject, tag)),
        LogDriver::Splunk(splunk) => Box::new(splunk::Speaker::new(splunk, subject, &config.options, tag)),
        LogDriver::JsonFile | LogDriver::Local | LogDriver::None => return None,
    })
}

/// The way to whoever takes lines elsewhere.
pub(super) struct Forwarder {
    protocol: Box<dyn Protocol>,
    connection: Option<Connection>,
    /// Not tried again before.
    next_try: Instant,
}

/// How long one that refuses is left alone.
const REFUSED_PAUSE: Duration = Duration::from_secs(1);
/// How long one is left alone that let us wait.
const SLOW_PAUSE: Duration = Duration::from_secs(30);

impl Forwarder {
    /// None, if the driver hands nothing on.
    pub(super) fn new(config: &LogConfig, subject: &LogSubject) -> Option<Self> {
        let protocol = protocol(config, subject)?;
        Some(Self { protocol, connection: None, next_try: Instant::now() })
    }

    /// Hands a line on; gives it up if nobody takes it.
    pub(super) fn send(&mut self, line: &Line<'_>) {
        self.attempt(|protocol, connection| protocol.tell(connection, line));
    }

    /// Hands over what was gathered of the lines before; gives it up if nobody takes it.
    pub(super) fn flush(&mut self) {
        self.attempt(|protocol, connection| protocol.flush(connection));
        self.protocol.give_up();
    }

    fn attempt(&mut self, mut tell: impl FnMut(&mut dyn Protocol, &mut Connection) -> io::Result<()>) {
        // A server that has been started anew is reached again at once.
        for _ in 0..2 {
            if self.connection.is_none() && !self.connect() {
                return;
            }
            let Some(connection) = &mut self.connection else { return };
            let Err(error) = tell(&mut *self.protocol, connection) else { return };
            self.connection = None;
            if is_slow(&error) {
                self.next_try = Instant::now() + SLOW_PAUSE;
                return;
            }
        }
    }

    fn connect(&mut self) -> bool {
        if Instant::now() < self.next_try {
            return false;
        }
        match Connection::to(&self.protocol.address()) {
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

/// What a container's output is to be handed on by, if whoever it names can be reached now: with addresses
/// for names. With `fluentd-async`, or without `splunk-verify-connection`, nobody has to be there yet.
pub(crate) fn reachable(config: &LogConfig) -> io::Result<LogConfig> {
    let Some(protocol) = protocol(config, &LogSubject::default()) else { return Ok(config.clone()) };
    let address = protocol.address();
    let is_async = match &config.driver {
        LogDriver::Fluentd(fluentd) => fluentd.is_async,
        LogDriver::Splunk(splunk) => splunk.is_unchecked,
        _ => false,
    };
    let reached = address.resolved().and_then(|resolved| {
        protocol.check(&mut Connection::to(&resolved)?)?;
        Ok(resolved)
    });
    let resolved = match reached {
        Ok(resolved) => resolved,
        Err(_) if is_async => address.resolved().unwrap_or(address),
        Err(error) => {
            let reason = format!("log driver {}: {address}: {error}", config.driver.as_str());
            return Err(io::Error::new(error.kind(), reason));
        }
    };
    let mut config = config.clone();
    match &mut config.driver {
        LogDriver::Syslog(syslog) => syslog.address = resolved,
        LogDriver::Gelf(gelf) => gelf.address = resolved,
        LogDriver::Fluentd(fluentd) => fluentd.address = resolved,
        LogDriver::Splunk(splunk) => splunk.address = resolved,
        LogDriver::JsonFile | LogDriver::Local | LogDriver::Journald | LogDriver::None => {}
    }
    Ok(config)
}

fn hostname() -> String {
    nix::unistd::gethostname().ok().and_then(|name| name.into_string().ok()).unwrap_or_else(|| "-".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tag_is_made_of_what_the_container_is_called() {
        let subject = LogSubject { id: "0123456789abcdef".into(), name: "web".into(), ..LogSubject::default() };
        let tag = |template: &str| subject.tag(&BTreeMap::from([("tag".into(), template.into())]));
        assert_eq!(tag("{{.Name}}/{{ .ID }}"), "web/0123456789ab");
        assert_eq!(tag(""), "0123456789ab");
    }
}
