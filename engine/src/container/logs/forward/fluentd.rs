//! Lines for servers that take Fluentd's forward protocol 1, such as Fluentd and Fluent Bit.

use std::collections::BTreeMap;
use std::io;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use rmp::encode;
use serde::{Deserialize, Serialize};
use skep_api::Timestamp;

use super::connection::{Address, Connection, with_port};
use super::tls::Tls;
use super::{Line, LogSubject, Protocol};
use crate::container::logs::config::{LogConfigError, Options, parse_size};

/// How a Fluentd server is spoken to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fluentd {
    pub address: Address,
    /// Whether a container starts though nobody listens yet.
    pub is_async: bool,
    /// Whether times are told in nanoseconds rather than seconds.
    pub is_precise: bool,
    /// Whether each line counts as handed over only once the server says so.
    pub wants_ack: bool,
}

pub(in crate::container::logs) const OPTIONS: [&str; 11] = [
    "fluentd-address",
    "fluentd-async",
    "fluentd-async-connect",
    "fluentd-async-reconnect-interval",
    "fluentd-buffer-limit",
    "fluentd-max-retries",
    "fluentd-read-timeout",
    "fluentd-request-ack",
    "fluentd-retry-wait",
    "fluentd-sub-second-precision",
    "fluentd-write-timeout",
];

const PORT: u16 = 24224;

impl Fluentd {
    pub(in crate::container::logs) fn parse(options: &BTreeMap<String, String>) -> Result<Self, LogConfigError> {
        let options = Options(options);
        let address = address(options.get("fluentd-address"));
        let address = address.map_err(|rule| options.wrong("fluentd-address", rule))?;
        let truth = |key: &str| match options.get(key) {
            "" => Ok(false),
            text => text.parse().map_err(|_| options.wrong(key, "write true or false")),
        };
        for key in
            ["fluentd-retry-wait", "fluentd-async-reconnect-interval", "fluentd-write-timeout", "fluentd-read-timeout"]
        {
            let text = options.get(key);
            if !text.is_empty() && skep_api::units::parse_duration(text).is_none() {
                return Err(options.wrong(key, "write a time such as 500ms or 1s"));
            }
        }
        let retries = options.get("fluentd-max-retries");
        if !retries.is_empty() && retries.parse::<u32>().is_err() {
            return Err(options.wrong("fluentd-max-retries", "write a number from 0 up"));
        }
        let limit = options.get("fluentd-buffer-limit");
        if !limit.is_empty() && parse_size(limit).is_none() {
            return Err(options.wrong("fluentd-buffer-limit", "write a size such as 8m"));
        }
        Ok(Self {
            address,
            is_async: truth("fluentd-async")? || truth("fluentd-async-connect")?,
            is_precise: truth("fluentd-sub-second-precision")?,
            wants_ack: truth("fluentd-request-ack")?,
        })
    }
}

fn address(text: &str) -> Result<Address, &'static str> {
    let (scheme, rest) = text.split_once("://").unwrap_or(("tcp", text));
    let rest = if rest.is_empty() && scheme != "unix" { "127.0.0.1" } else { rest };
    let at = || with_port(rest, PORT).ok_or("write HOST or HOST:PORT");
    match scheme {
        "tcp" => at().map(Address::Tcp),
        "tls" => at().map(|address| {
            let tls = Tls::of(&address);
            Address::Tls(address, Box::new(tls))
        }),
        "unix" if rest.starts_with('/') => Ok(Address::Unix(rest.into())),
        _ => Err("write HOST:PORT, tcp://HOST:PORT, tls://HOST:PORT or unix:///PATH"),
    }
}

/// What speaks to one server.
pub(super) struct Speaker {
    fluentd: Fluentd,
    tag: String,
    /// What is the same in every record.
    common: BTreeMap<String, String>,
}

impl Speaker {
    pub(super) fn new(fluentd: &Fluentd, subject: &LogSubject, tag: String) -> Self {
        let mut common = subject.attributes.clone();
        common.insert("container_id".into(), subject.id.clone());
        common.insert("container_name".into(), format!("/{}", subject.name));
        Self { fluentd: fluentd.clone(), tag, common }
    }

    /// A message: `[tag, time, record]`, with what the server is to say if it is to say something.
    fn message(&self, line: &Line<'_>, chunk: Option<&str>) -> Vec<u8> {
        let mut record: BTreeMap<&str, &str> =
            self.common.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
        let text = String::from_utf8_lossy(line.text);
        record.insert("source", line.stream.as_str());
        record.insert("log", &text);
        let part = line.part.as_ref().map(super::Part::members);
        record.extend(part.iter().flatten().map(|(name, value)| (*name, value.as_str())));
        let option = chunk.map(|chunk| BTreeMap::from([("chunk", chunk)]));
        let mut packed = Vec::with_capacity(line.text.len() + 256);
        let mut pack = || -> io::Result<()> {
            encode::write_array_len(&mut packed, if option.is_some() { 4 } else { 3 })?;
            encode::write_str(&mut packed, &self.tag)?;
            self.pack_time(&mut packed, line.at)?;
            pack_map(&mut packed, &record)?;
            option.iter().try_for_each(|option| pack_map(&mut packed, option))
        };
        pack().expect("memory takes what is written");
        packed
    }

    /// Seconds, or seconds and nanoseconds as the protocol's own type.
    fn pack_time(&self, packed: &mut Vec<u8>, at: Timestamp) -> io::Result<()> {
        let nanos = at.as_nanos().max(0).cast_unsigned();
        let (seconds, rest) = (nanos / 1_000_000_000, nanos % 1_000_000_000);
        if !self.fluentd.is_precise {
            return Ok(encode::write_uint(packed, seconds).map(drop)?);
        }
        encode::write_ext_meta(packed, 8, 0)?;
        for half in [seconds, rest] {
            packed.extend_from_slice(&u32::try_from(half).unwrap_or(u32::MAX).to_be_bytes());
        }
        Ok(())
    }
}

fn pack_map(packed: &mut Vec<u8>, map: &BTreeMap<&str, &str>) -> io::Result<()> {
    encode::write_map_len(packed, u32::try_from(map.len()).map_err(io::Error::other)?)?;
    for (name, value) in map {
        encode::write_str(packed, name)?;
        encode::write_str(packed, value)?;
    }
    Ok(())
}

impl Protocol for Speaker {
    fn address(&self) -> Address {
        self.fluentd.address.clone()
    }

    fn tell(&mut self, connection: &mut Connection, line: &Line<'_>) -> io::Result<()> {
        let chunk = self.fluentd.wants_ack.then(|| BASE64_STANDARD.encode(rand::random::<[u8; 16]>()));
        connection.send(&self.message(line, chunk.as_deref()))?;
        let Some(chunk) = chunk else { return Ok(()) };
        let mut answer = Vec::new();
        pack_map(&mut answer, &BTreeMap::from([("ack", chunk.as_str())]))?;
        connection.await_answer(&answer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::container::logs::Stream;
    use crate::container::logs::forward::Part;

    fn speaker(options: &[(&str, &str)]) -> Speaker {
        let options = options.iter().map(|&(key, value)| (key.to_owned(), value.to_owned())).collect();
        let subject = LogSubject { id: "0123".into(), name: "web".into(), ..LogSubject::default() };
        Speaker::new(&Fluentd::parse(&options).unwrap(), &subject, "tag".into())
    }

    type Record = BTreeMap<String, String>;

    #[test]
    fn a_line_is_told_as_the_protocol_has_it() {
        let at = Timestamp::from_nanos(1_700_000_000_123_456_789);
        let part = Some(Part { id: 10, ordinal: 1, is_last: false });
        let line = Line { stream: Stream::Stdout, text: b"text", at, part };
        let message = speaker(&[]).message(&line, None);
        let (tag, time, record): (String, u64, Record) = rmp_serde::from_slice(&message).unwrap();
        assert_eq!((tag.as_str(), time), ("tag", 1_700_000_000));
        let wanted = [
            ("container_id", "0123"),
            ("container_name", "/web"),
            ("log", "text"),
            ("partial_id", "000000000000000a"),
            ("partial_last", "false"),
            ("partial_message", "true"),
            ("partial_ordinal", "1"),
            ("source", "stdout"),
        ];
        assert_eq!(record, wanted.map(|(name, value)| (name.to_owned(), value.to_owned())).into());
        // fixarray 3, fixstr 3, fixext 8 of type 0.
        let message = speaker(&[("fluentd-sub-second-precision", "true")]).message(&line, None);
        assert_eq!(message[..7], [0x93, 0xa3, b't', b'a', b'g', 0xd7, 0]);
        assert_eq!(message[7..15], [1_700_000_000_u32.to_be_bytes(), 123_456_789_u32.to_be_bytes()].concat());
        let message = speaker(&[("fluentd-request-ack", "true")]).message(&line, Some("c"));
        let (_, _, _, option): (String, u64, Record, Record) = rmp_serde::from_slice(&message).unwrap();
        assert_eq!(option["chunk"], "c");
    }

    #[test]
    fn addresses_and_options_are_read_or_refused() {
        let at = |text: &str| speaker(&[("fluentd-address", text)]).fluentd.address;
        assert_eq!(speaker(&[]).fluentd.address, Address::Tcp("127.0.0.1:24224".into()));
        assert_eq!(at("logs.example"), Address::Tcp("logs.example:24224".into()));
        assert_eq!(at("tcp://logs.example:1"), Address::Tcp("logs.example:1".into()));
        assert_eq!(at("unix:///run/fluentd.sock"), Address::Unix("/run/fluentd.sock".into()));
        assert!(matches!(at("tls://logs.example:1"), Address::Tls(_, tls) if tls.server == "logs.example"));
        for (key, value) in [
            ("fluentd-address", "http://h:1"),
            ("fluentd-address", "unix://run"),
            ("fluentd-async", "maybe"),
            ("fluentd-retry-wait", "soon"),
            ("fluentd-max-retries", "-1"),
            ("fluentd-buffer-limit", "much"),
        ] {
            let options = BTreeMap::from([(key.to_owned(), value.to_owned())]);
            assert!(Fluentd::parse(&options).unwrap_err().to_string().contains(key), "{key}={value}");
        }
    }
}
