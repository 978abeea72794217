//! Lines for servers that take GELF, the Graylog Extended Log Format 1.1.

use std::collections::BTreeMap;
use std::io::{self, Write as _};

use flate2::Compression;
use flate2::write::{GzEncoder, ZlibEncoder};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::connection::{Address, Connection, with_port};
use super::syslog::severity;
use super::{Line, LogSubject, Protocol, hostname};
use crate::container::logs::config::{LogConfigError, Options};

/// How a GELF server is spoken to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gelf {
    pub address: Address,
    pub compression: GelfCompression,
    /// 0 to 9.
    pub level: u32,
}

/// How datagrams are compressed; streams never are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum GelfCompression {
    Gzip,
    Zlib,
    None,
}

pub(in crate::container::logs) const OPTIONS: [&str; 5] = [
    "gelf-address",
    "gelf-compression-type",
    "gelf-compression-level",
    "gelf-tcp-max-reconnect",
    "gelf-tcp-reconnect-delay",
];

/// The registered port.
const PORT: u16 = 12201;
/// The fastest.
const USUAL_LEVEL: u32 = 1;
/// What a datagram may hold to cross the internet whole.
const DATAGRAM_LEN_MAX: usize = 1420;
/// What begins a part of a message in several datagrams, and how many there may be.
const PART_MAGIC: [u8; 2] = [0x1e, 0x0f];
const PART_HEAD_LEN: usize = 12;
const PARTS_MAX: usize = 128;

impl Gelf {
    pub(in crate::container::logs) fn parse(options: &BTreeMap<String, String>) -> Result<Self, LogConfigError> {
        let options = Options(options);
        let address = match options.get("gelf-address").split_once("://") {
            Some(("udp", rest)) => with_port(rest, PORT).map(Address::Udp),
            Some(("tcp", rest)) => with_port(rest, PORT).map(Address::Tcp),
            _ => None,
        };
        let address = address
            .ok_or_else(|| options.wrong("gelf-address", "it is required: write udp://HOST:PORT or tcp://HOST:PORT"))?;
        let is_udp = matches!(address, Address::Udp(_));
        for key in OPTIONS {
            let fits = if key.starts_with("gelf-tcp-") { !is_udp } else { is_udp || key == "gelf-address" };
            if options.0.contains_key(key) && !fits {
                return Err(options.wrong(key, "gelf-compression-* is for UDP, gelf-tcp-* for TCP"));
            }
        }
        for key in ["gelf-tcp-max-reconnect", "gelf-tcp-reconnect-delay"] {
            if !options.get(key).is_empty() && options.get(key).parse::<u32>().is_err() {
                return Err(options.wrong(key, "write a number from 0 up"));
            }
        }
        let compression = match options.get("gelf-compression-type") {
            "" | "gzip" => GelfCompression::Gzip,
            "zlib" => GelfCompression::Zlib,
            "none" => GelfCompression::None,
            _ => return Err(options.wrong("gelf-compression-type", "write gzip, zlib or none")),
        };
        let level = match options.get("gelf-compression-level") {
            "" | "-1" => Some(USUAL_LEVEL),
            text => text.parse().ok().filter(|level| *level <= 9),
        };
        let level = level.ok_or_else(|| options.wrong("gelf-compression-level", "write a number from -1 to 9"))?;
        Ok(Self { address, compression, level })
    }

    fn compressed(&self, message: &[u8]) -> io::Result<Vec<u8>> {
        let level = Compression::new(self.level);
        match self.compression {
            GelfCompression::Gzip => {
                let mut to = GzEncoder::new(Vec::new(), level);
                to.write_all(message)?;
                to.finish()
            }
            GelfCompression::Zlib => {
                let mut to = ZlibEncoder::new(Vec::new(), level);
                to.write_all(message)?;
                to.finish()
            }
            GelfCompression::None => Ok(message.to_vec()),
        }
    }
}

/// What speaks to one server.
pub(super) struct Speaker {
    gelf: Gelf,
    /// What is the same in every message.
    common: serde_json::Map<String, Value>,
}

impl Speaker {
    pub(super) fn new(gelf: &Gelf, subject: &LogSubject, tag: &str) -> Self {
        let own = json!({
            "version": "1.1", "host": hostname(), "_container_id": subject.id, "_container_name": subject.name,
            "_image_id": subject.image_id, "_image_name": subject.image, "_command": subject.command, "_tag": tag,
            "_created": subject.created.to_string(),
        });
        let attributes = subject.attributes.iter().map(|(name, value)| {
            let underscore = if name.starts_with('_') { "" } else { "_" };
            (format!("{underscore}{name}"), Value::from(value.as_str()))
        });
        let own = own.as_object().cloned().unwrap_or_default();
        Self { gelf: gelf.clone(), common: own.into_iter().chain(attributes).collect() }
    }

    fn message(&self, line: &Line<'_>) -> Vec<u8> {
        let mut message = self.common.clone();
        message.insert("short_message".into(), String::from_utf8_lossy(line.text).into());
        let millis = line.at.as_nanos() / 1_000_000;
        message.insert("timestamp".into(), json!(millis as f64 / 1000.0));
        message.insert("level".into(), severity(line.stream).into());
        for (name, value) in line.part.iter().flat_map(|part| part.members()) {
            message.insert(format!("_{name}"), value.into());
        }
        Value::Object(message).to_string().into_bytes()
    }
}

impl Protocol for Speaker {
    fn address(&self) -> Address {
        self.gelf.address.clone()
    }

    fn tell(&mut self, connection: &mut Connection, line: &Line<'_>) -> io::Result<()> {
        let mut message = self.message(line);
        if !matches!(self.gelf.address, Address::Udp(_)) {
            message.push(0);
            return connection.send(&message);
        }
        let message = self.gelf.compressed(&message)?;
        datagrams(&message, rand::random()).iter().try_for_each(|datagram| connection.send(datagram))
    }
}

/// A message in as many datagrams as it takes; none if those are more than may be.
fn datagrams(message: &[u8], id: u64) -> Vec<Vec<u8>> {
    if message.len() <= DATAGRAM_LEN_MAX {
        return vec![message.to_vec()];
    }
    let parts: Vec<_> = message.chunks(DATAGRAM_LEN_MAX - PART_HEAD_LEN).collect();
    if parts.len() > PARTS_MAX {
        return Vec::new();
    }
    let count = parts.len();
    let part = |(number, part): (usize, &&[u8])| {
        let place = [number, count].map(|number| u8::try_from(number).unwrap_or(u8::MAX));
        [&PART_MAGIC[..], &id.to_be_bytes(), &place, part].concat()
    };
    parts.iter().enumerate().map(part).collect()
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use skep_api::Timestamp;

    use super::*;
    use crate::container::logs::Stream;
    use crate::container::logs::forward::Part;

    #[test]
    fn a_message_says_what_graylog_asks_for() {
        let options = BTreeMap::from([("gelf-address".to_owned(), "udp://127.0.0.1".to_owned())]);
        let gelf = Gelf::parse(&options).unwrap();
        assert_eq!(gelf.address, Address::Udp("127.0.0.1:12201".into()));
        let attributes = BTreeMap::from([("team".into(), "bees".into())]);
        let subject = LogSubject { name: "web".into(), id: "0123".into(), attributes, ..LogSubject::default() };
        let speaker = Speaker::new(&gelf, &subject, "tag");
        let part = Some(Part { id: 10, ordinal: 2, is_last: true });
        let at = Timestamp::from_nanos(1_700_000_000_123_456_789);
        let line = Line { stream: Stream::Stderr, text: b"text", at, part };
        let message: Value = serde_json::from_slice(&speaker.message(&line)).unwrap();
        for (name, want) in [
            ("version", json!("1.1")),
            ("short_message", json!("text")),
            ("timestamp", json!(1_700_000_000.123)),
            ("level", json!(3)),
            ("_container_name", json!("web")),
            ("_tag", json!("tag")),
            ("_team", json!("bees")),
            ("_partial_ordinal", json!("2")),
            ("_partial_last", json!("true")),
        ] {
            assert_eq!(message[name], want, "{name}");
        }
        let packed = gelf.compressed(b"text").unwrap();
        let mut plain = String::new();
        flate2::read::GzDecoder::new(&packed[..]).read_to_string(&mut plain).unwrap();
        assert_eq!(plain, "text");
    }

    #[test]
    fn long_messages_go_in_several_datagrams() {
        assert_eq!(datagrams(&[1; 1420], 7), [vec![1; 1420]]);
        let parts = datagrams(&[1; 2000], 7);
        assert_eq!(parts.len(), 2);
        assert_eq!(parts[1][..PART_HEAD_LEN], [0x1e, 0x0f, 0, 0, 0, 0, 0, 0, 0, 7, 1, 2]);
        assert_eq!(parts.iter().map(|part| part.len() - PART_HEAD_LEN).sum::<usize>(), 2000);
        assert!(datagrams(&vec![1; 1 << 20], 7).is_empty());
    }

    #[test]
    fn options_that_do_not_fit_the_way_are_refused() {
        for (options, wrong) in [
            (&[("gelf-tcp-max-reconnect", "3")][..], "gelf-address"),
            (&[("gelf-address", "http://h:1")], "gelf-address"),
            (&[("gelf-address", "udp://h:1"), ("gelf-tcp-max-reconnect", "3")], "gelf-tcp-max-reconnect"),
            (&[("gelf-address", "tcp://h:1"), ("gelf-compression-type", "gzip")], "gelf-compression-type"),
            (&[("gelf-address", "udp://h:1"), ("gelf-compression-type", "lz4")], "gelf-compression-type"),
            (&[("gelf-address", "udp://h:1"), ("gelf-compression-level", "10")], "gelf-compression-level"),
        ] {
            let options = options.iter().map(|&(key, value)| (key.to_owned(), value.to_owned())).collect();
            assert!(Gelf::parse(&options).unwrap_err().to_string().contains(wrong));
        }
    }
}
