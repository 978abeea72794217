//! Where a container's output goes: log drivers and their options, as users write them.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::forward::fluentd::{self, Fluentd};
use super::forward::gelf::{self, Gelf};
use super::forward::splunk::{self, Splunk};
use super::forward::syslog::{self, Syslog};

/// How output is kept, and where else it goes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct LogConfig {
    pub driver: LogDriver,
    /// A file is closed and the next begun at this many bytes.
    pub max_size_bytes: u64,
    pub max_files: u32,
    /// Whether closed files are compressed.
    pub compress: bool,
    /// Whether nothing is kept here of what goes elsewhere.
    pub cache_disabled: bool,
    /// As they were given.
    pub options: BTreeMap<String, String>,
}

/// The driver, with what only that one has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LogDriver {
    /// JSON lines, as other programs read them.
    JsonFile,
    /// Shorter records, compressed once a file is closed.
    Local,
    /// A syslog server; kept here as well.
    Syslog(Syslog),
    /// The host's journal; kept here as well.
    Journald,
    /// A GELF server, such as Graylog or Logstash; kept here as well.
    Gelf(Gelf),
    /// A server of Fluentd's protocol; kept here as well.
    Fluentd(Fluentd),
    /// Splunk's HTTP Event Collector; kept here as well.
    Splunk(Splunk),
    None,
}

impl LogDriver {
    /// Every driver's name.
    pub const NAMES: [&str; 8] = ["fluentd", "gelf", "journald", "json-file", "local", "none", "splunk", "syslog"];

    #[must_use]
    pub const fn as_str(&self) -> &'static str {
        match self {
            Self::JsonFile => "json-file",
            Self::Local => "local",
            Self::Syslog(_) => "syslog",
            Self::Journald => "journald",
            Self::Gelf(_) => "gelf",
            Self::Fluentd(_) => "fluentd",
            Self::Splunk(_) => "splunk",
            Self::None => "none",
        }
    }
}

impl Default for LogConfig {
    /// Docker keeps everything for ever, which fills disks: here 5 files of 20 MB are kept.
    fn default() -> Self {
        Self {
            driver: LogDriver::JsonFile,
            max_size_bytes: 20_000_000,
            max_files: 5,
            compress: false,
            cache_disabled: false,
            options: BTreeMap::new(),
        }
    }
}

/// Why log options are refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LogConfigError {
    /// In the words that clients look for.
    #[error("logger: no log driver named '{0}' is registered")]
    Driver(String),
    #[error("unknown log opt '{key}' for {driver} log driver (its value is {value:?}): {known} are known")]
    Unknown { driver: &'static str, key: String, value: String, known: String },
    #[error("log option {key}={value:?} cannot be used: {rule}")]
    Option { key: String, value: String, rule: &'static str },
}

/// Options that say what is told beside each line, and those of the ways to hand it on.
const SHARED_OPTIONS: [&str; 7] = ["labels", "labels-regex", "env", "env-regex", "tag", "mode", "max-buffer-size"];
const CACHE_OPTIONS: [&str; 4] = ["cache-disabled", "cache-max-size", "cache-max-file", "cache-compress"];
const FILE_OPTIONS: [&str; 3] = ["max-size", "max-file", "compress"];

/// Options as they were given.
pub(super) struct Options<'a>(pub(super) &'a BTreeMap<String, String>);

impl<'a> Options<'a> {
    pub(super) fn get(&self, key: &str) -> &'a str {
        self.0.get(key).map_or("", String::as_str)
    }

    pub(super) fn wrong(&self, key: &str, rule: &'static str) -> LogConfigError {
        LogConfigError::Option { key: key.into(), value: self.get(key).into(), rule }
    }
}

impl LogConfig {
    /// Reads a driver's name and options; what is not said is as in `usual`.
    pub fn parse(driver: &str, options: &BTreeMap<String, String>, usual: &Self) -> Result<Self, LogConfigError> {
        let driver = if driver.is_empty() { usual.driver.as_str() } else { driver };
        let mut options = options.clone();
        if driver == usual.driver.as_str() {
            for (key, value) in &usual.options {
                options.entry(key.clone()).or_insert_with(|| value.clone());
            }
        }
        let mut config = Self::new(driver, &options)?;
        for (key, value) in &options {
            let wrong = |rule| LogConfigError::Option { key: key.clone(), value: value.clone(), rule };
            config.driver.check_known(key, value)?;
            config.set(key, value).map_err(wrong)?;
        }
        config.options = options;
        Ok(config)
    }

    fn new(driver: &str, options: &BTreeMap<String, String>) -> Result<Self, LogConfigError> {
        let driver = match driver {
            "json-file" => LogDriver::JsonFile,
            "local" => LogDriver::Local,
            "syslog" => LogDriver::Syslog(Syslog::parse(options)?),
            "journald" => LogDriver::Journald,
            "gelf" => LogDriver::Gelf(Gelf::parse(options)?),
            "fluentd" => LogDriver::Fluentd(Fluentd::parse(options)?),
            "splunk" => LogDriver::Splunk(Splunk::parse(options)?),
            "none" => LogDriver::None,
            other => return Err(LogConfigError::Driver(other.to_owned())),
        };
        let compress = !matches!(driver, LogDriver::JsonFile | LogDriver::None);
        Ok(Self { driver, compress, ..Self::default() })
    }

    fn set(&mut self, key: &str, value: &str) -> Result<(), &'static str> {
        let truth = || value.parse::<bool>().map_err(|_| "write true or false");
        match key {
            "max-size" | "cache-max-size" => {
                self.max_size_bytes = parse_size(value).ok_or("write a size such as 10m")?;
            }
            "max-file" | "cache-max-file" => {
                self.max_files = value.parse().ok().filter(|&count| count > 0).ok_or("write a number from 1 up")?;
            }
            "compress" | "cache-compress" => self.compress = truth()?,
            "cache-disabled" => self.cache_disabled = truth()?,
            // A line is kept here whatever becomes of it elsewhere, and nobody elsewhere is waited for as
            // long as `blocking` would: the two are the same.
            "mode" if value != "blocking" && value != "non-blocking" => return Err("write blocking or non-blocking"),
            "max-buffer-size" if parse_size(value).is_none() => return Err("write a size such as 4m"),
            "tag" if !is_template(value) => return Err("it is no template such as {{.Name}}/{{.ID}}"),
            "labels-regex" | "env-regex" if regex::Regex::new(value).is_err() => {
                return Err("it is no regular expression");
            }
            _ => {}
        }
        Ok(())
    }

    /// What is kept on this host, if anything.
    pub(crate) fn kept(&self) -> Option<FileFormat> {
        match self.driver {
            LogDriver::JsonFile => Some(FileFormat::Json),
            LogDriver::Local => Some(FileFormat::Binary),
            LogDriver::None => None,
            _ => (!self.cache_disabled).then_some(FileFormat::Binary),
        }
    }
}

/// How lines lie in files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FileFormat {
    Json,
    Binary,
}

impl LogDriver {
    /// Refuses what no driver of this kind has a meaning for.
    fn check_known(&self, key: &str, value: &str) -> Result<(), LogConfigError> {
        let (own, kept): (&[&str], &[&str]) = match self {
            Self::JsonFile | Self::Local => (&FILE_OPTIONS, &[]),
            Self::Syslog(_) => (&syslog::OPTIONS, &CACHE_OPTIONS),
            Self::Journald => (&[], &CACHE_OPTIONS),
            Self::Gelf(_) => (&gelf::OPTIONS, &CACHE_OPTIONS),
            Self::Fluentd(_) => (&fluentd::OPTIONS, &CACHE_OPTIONS),
            Self::Splunk(_) => (&splunk::OPTIONS, &CACHE_OPTIONS),
            Self::None => return Ok(()),
        };
        let known = [own, &SHARED_OPTIONS, kept].concat();
        if known.contains(&key) {
            return Ok(());
        }
        let (key, value, known) = (key.to_owned(), value.to_owned(), known.join(", "));
        Err(LogConfigError::Unknown { driver: self.as_str(), key, value, known })
    }
}

/// The fields that a tag may name.
pub(super) const TAG_FIELDS: [&str; 8] =
    ["ID", "FullID", "Name", "ImageID", "ImageFullID", "ImageName", "DaemonName", "Command"];

/// Whether every `{{.Field}}` of a tag is one we know.
fn is_template(text: &str) -> bool {
    let mut rest = text;
    while let Some((_, tail)) = rest.split_once("{{") {
        let Some((field, after)) = tail.split_once("}}") else { return false };
        if !field.trim().strip_prefix('.').is_some_and(|name| TAG_FIELDS.contains(&name)) {
            return false;
        }
        rest = after;
    }
    true
}

/// Reads `10m`, `512k`, `1g` or plain bytes; `-1` is no limit.
#[must_use]
pub fn parse_size(text: &str) -> Option<u64> {
    if text == "-1" {
        return Some(u64::MAX);
    }
    let lower = text.to_ascii_lowercase();
    let lower = lower.strip_suffix('b').unwrap_or(&lower);
    let (number, unit) = match lower.as_bytes().last()? {
        b'k' => (&lower[..lower.len() - 1], 1 << 10),
        b'm' => (&lower[..lower.len() - 1], 1 << 20),
        b'g' => (&lower[..lower.len() - 1], 1 << 30),
        _ => (lower, 1),
    };
    number.parse::<u64>().ok().filter(|&n| n > 0)?.checked_mul(unit)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::container::logs::forward::connection::Address;

    fn parse(driver: &str, options: &[(&str, &str)]) -> Result<LogConfig, LogConfigError> {
        let options = options.iter().map(|&(key, value)| (key.into(), value.into())).collect();
        LogConfig::parse(driver, &options, &LogConfig::default())
    }

    #[test]
    fn log_options_are_read_or_refused() {
        let config = parse("json-file", &[("max-size", "1m"), ("max-file", "2")]).unwrap();
        assert_eq!((config.max_size_bytes, config.max_files, config.compress), (1 << 20, 2, false));
        for (driver, key, value) in [
            ("json-file", "max-size", "big"),
            ("json-file", "max-file", "0"),
            ("json-file", "colour", "red"),
            ("local", "syslog-address", "udp://127.0.0.1"),
            ("journald", "max-size", "1m"),
            ("syslog", "syslog-address", "tcp+tls://"),
            ("json-file", "labels-regex", "("),
            ("gelf", "gelf-address", "h:1"),
            ("fluentd", "fluentd-async", "perhaps"),
            ("syslog", "syslog-address", "udp://"),
            ("syslog", "syslog-format", "cef"),
            ("syslog", "syslog-facility", "24"),
            ("syslog", "tag", "{{.Colour}}"),
            ("local", "compress", "maybe"),
            ("local", "mode", "fast"),
        ] {
            let error = parse(driver, &[(key, value)]).unwrap_err().to_string();
            assert!(error.contains(key) && error.contains(value), "{error}");
        }
        assert!(parse("etwlogs", &[]).is_err());
    }

    #[test]
    fn a_syslog_server_is_named_in_full_or_in_part() {
        let options = [("syslog-address", "udp://logs.example"), ("syslog-facility", "local3")];
        let LogDriver::Syslog(syslog) = parse("syslog", &options).unwrap().driver else { panic!("another driver") };
        assert_eq!((syslog.address, syslog.facility), (Address::Udp("logs.example:514".into()), 19));
        let LogDriver::Syslog(syslog) = parse("syslog", &[]).unwrap().driver else { panic!("another driver") };
        assert_eq!(syslog.address, Address::Unix("/dev/log".into()));
    }

    #[test]
    fn tls_is_spoken_with_the_certificates_that_are_named() {
        let address = ("syslog-address", "tcp+tls://logs.example:6514");
        let options = [address, ("syslog-tls-ca-cert", "/ca.pem"), ("syslog-tls-skip-verify", "true")];
        let LogDriver::Syslog(syslog) = parse("syslog", &options).unwrap().driver else { panic!("another driver") };
        let Address::Tls(at, tls) = syslog.address else { panic!("another way") };
        assert_eq!((at.as_str(), tls.server.as_str()), ("logs.example:6514", "logs.example"));
        assert_eq!((tls.authorities, tls.trusts_any), (Some("/ca.pem".into()), true));
        let half = parse("syslog", &[address, ("syslog-tls-key", "/key.pem")]).unwrap_err().to_string();
        assert!(half.contains("both syslog-tls-cert and syslog-tls-key"), "{half}");
    }

    #[test]
    fn a_container_takes_what_the_daemon_has_where_it_says_nothing() {
        let usual = parse("local", &[("max-size", "3m"), ("max-file", "7")]).unwrap();
        let options = BTreeMap::from([("max-file".to_owned(), "2".to_owned())]);
        let config = LogConfig::parse("", &options, &usual).unwrap();
        assert_eq!((config.driver.as_str(), config.max_size_bytes, config.max_files), ("local", 3 << 20, 2));
        let other = LogConfig::parse("json-file", &BTreeMap::new(), &usual).unwrap();
        assert_eq!(other.max_size_bytes, LogConfig::default().max_size_bytes);
    }
}
