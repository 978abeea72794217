//! Lines for Splunk's HTTP Event Collector.

use std::collections::BTreeMap;
use std::io::{self, Write as _};

use flate2::Compression;
use flate2::write::GzEncoder;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::connection::{Address, Connection, with_port};
use super::tls::Tls;
use super::{Line, LogSubject, Protocol, hostname};
use crate::container::logs::config::{LogConfigError, Options};

/// How a collector is spoken to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Splunk {
    pub address: Address,
    /// As the URL has it, for the collector.
    host: String,
    pub format: SplunkFormat,
    /// Whether a container starts though nobody listens yet.
    pub is_unchecked: bool,
    /// How hard what is sent is compressed, 0 to 9; none: it is not.
    gzip_level: Option<u32>,
}

/// What becomes of a line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SplunkFormat {
    Inline,
    /// Lines that are JSON are told as what they say.
    Json,
    Raw,
}

pub(in crate::container::logs) const OPTIONS: [&str; 13] = [
    "splunk-caname",
    "splunk-capath",
    "splunk-format",
    "splunk-gzip",
    "splunk-gzip-level",
    "splunk-index",
    "splunk-index-acknowledgment",
    "splunk-insecureskipverify",
    "splunk-source",
    "splunk-sourcetype",
    "splunk-token",
    "splunk-url",
    "splunk-verify-connection",
];

/// The collector's own.
const PORT: u16 = 8088;
const PATH: &str = "/services/collector/event/1.0";
/// What a collector answers is short.
const ANSWER_LEN_MAX: usize = 16 << 10;
const ANSWER_HEADERS_MAX: usize = 32;

impl Splunk {
    pub(in crate::container::logs) fn parse(options: &BTreeMap<String, String>) -> Result<Self, LogConfigError> {
        let options = Options(options);
        if options.get("splunk-token").is_empty() {
            return Err(options.wrong("splunk-token", "it is required: the token of an HTTP Event Collector"));
        }
        let truth = |key: &str, usual: bool| match options.get(key) {
            "" => Ok(usual),
            text => text.parse().map_err(|_| options.wrong(key, "write true or false")),
        };
        if truth("splunk-index-acknowledgment", false)? {
            return Err(options.wrong("splunk-index-acknowledgment", "indexers are not asked whether they have it"));
        }
        let address = address(&options, truth("splunk-insecureskipverify", false)?);
        let (host, address) = address.map_err(|rule| options.wrong("splunk-url", rule))?;
        let format = match options.get("splunk-format") {
            "" | "inline" => SplunkFormat::Inline,
            "json" => SplunkFormat::Json,
            "raw" => SplunkFormat::Raw,
            _ => return Err(options.wrong("splunk-format", "write inline, json or raw")),
        };
        let level = match options.get("splunk-gzip-level") {
            "" | "-1" => Some(Compression::default().level()),
            text => text.parse().ok().filter(|level| *level <= 9),
        };
        let level = level.ok_or_else(|| options.wrong("splunk-gzip-level", "write a number from -1 to 9"))?;
        let gzip_level = truth("splunk-gzip", false)?.then_some(level);
        let is_unchecked = !truth("splunk-verify-connection", true)?;
        Ok(Self { address, host, format, is_unchecked, gzip_level })
    }
}

/// The host as the URL has it, and the way there.
fn address(options: &Options<'_>, trusts_any: bool) -> Result<(String, Address), &'static str> {
    const RULE: &str = "it is required: write https://HOST:PORT or http://HOST:PORT, without a path";
    let (scheme, rest) = options.get("splunk-url").split_once("://").ok_or(RULE)?;
    let host = rest.strip_suffix('/').unwrap_or(rest);
    let at = with_port(host, PORT).filter(|_| !host.contains(['/', '?', '@'])).ok_or(RULE)?;
    let address = match scheme {
        "http" => Address::Tcp(at),
        "https" => {
            let named = options.get("splunk-caname");
            let file = Some(options.get("splunk-capath")).filter(|path| !path.is_empty());
            let mut tls = Tls { authorities: file.map(Into::into), trusts_any, ..Tls::of(&at) };
            if !named.is_empty() {
                named.clone_into(&mut tls.server);
            }
            Address::Tls(at, Box::new(tls))
        }
        _ => return Err(RULE),
    };
    Ok((host.to_owned(), address))
}

/// What speaks to one collector. Lines that come together go together.
pub(super) struct Speaker {
    splunk: Splunk,
    token: String,
    /// What is the same in every event.
    common: serde_json::Map<String, Value>,
    tag: String,
    attributes: BTreeMap<String, String>,
    /// Events that are not told yet, one after the other.
    batch: Vec<u8>,
}

impl Speaker {
    pub(super) fn new(splunk: &Splunk, subject: &LogSubject, options: &BTreeMap<String, String>, tag: String) -> Self {
        let options = Options(options);
        let mut common = serde_json::Map::from_iter([("host".to_owned(), Value::from(hostname()))]);
        for name in ["source", "sourcetype", "index"] {
            let value = options.get(&format!("splunk-{name}"));
            if !value.is_empty() {
                common.insert(name.to_owned(), value.into());
            }
        }
        Self {
            splunk: splunk.clone(),
            token: options.get("splunk-token").to_owned(),
            common,
            // A tag that is asked to be empty is none.
            tag: if options.0.get("tag").is_some_and(String::is_empty) { String::new() } else { tag },
            attributes: subject.attributes.clone(),
            batch: Vec::new(),
        }
    }

    fn event(&self, line: &Line<'_>) -> Value {
        let text = String::from_utf8_lossy(line.text);
        let parsed = || serde_json::from_slice(line.text).unwrap_or_else(|_| Value::from(&*text));
        let told = match self.splunk.format {
            SplunkFormat::Inline => Value::from(&*text),
            SplunkFormat::Json => parsed(),
            SplunkFormat::Raw => {
                let pairs = self.attributes.iter().map(|(name, value)| format!("{name}={value}"));
                let tag = Some(self.tag.clone()).filter(|tag| !tag.is_empty());
                let words: Vec<String> = tag.into_iter().chain(pairs).chain([text.into_owned()]).collect();
                return words.join(" ").into();
            }
        };
        let mut event = json!({"line": told, "source": line.stream.as_str()});
        if !self.tag.is_empty() {
            event["tag"] = self.tag.as_str().into();
        }
        if !self.attributes.is_empty() {
            event["attrs"] = json!(self.attributes);
        }
        for (name, value) in line.part.iter().flat_map(|part| part.members()) {
            event[name] = value.into();
        }
        event
    }

    fn request(&self, method: &str, body: &[u8]) -> Vec<u8> {
        let Self { splunk, token, .. } = self;
        let encoding = if splunk.gzip_level.is_some() && !body.is_empty() { "Content-Encoding: gzip\r\n" } else { "" };
        let head = format!(
            "{method} {PATH} HTTP/1.1\r\nHost: {}\r\nAuthorization: Splunk {token}\r\nUser-Agent: skep\r\n\
             Content-Type: application/json\r\nContent-Length: {}\r\n{encoding}\r\n",
            splunk.host,
            body.len()
        );
        [head.as_bytes(), body].concat()
    }

    fn compressed(&self) -> io::Result<Vec<u8>> {
        let Some(level) = self.splunk.gzip_level else { return Ok(self.batch.clone()) };
        let mut to = GzEncoder::new(Vec::new(), Compression::new(level));
        to.write_all(&self.batch)?;
        to.finish()
    }
}

impl Protocol for Speaker {
    fn address(&self) -> Address {
        self.splunk.address.clone()
    }

    fn check(&self, connection: &mut Connection) -> io::Result<()> {
        connection.send(&self.request("OPTIONS", b""))?;
        read_answer(connection)
    }

    fn tell(&mut self, _: &mut Connection, line: &Line<'_>) -> io::Result<()> {
        // Collectors refuse events without content, and all that come with them.
        if line.text.trim_ascii().is_empty() {
            return Ok(());
        }
        let seconds = line.at.as_nanos() as f64 / 1e9;
        let mut message = self.common.clone();
        message.insert("time".into(), format!("{seconds:.6}").into());
        message.insert("event".into(), self.event(line));
        self.batch.extend_from_slice(Value::Object(message).to_string().as_bytes());
        Ok(())
    }

    fn flush(&mut self, connection: &mut Connection) -> io::Result<()> {
        if self.batch.is_empty() {
            return Ok(());
        }
        connection.send(&self.request("POST", &self.compressed()?))?;
        read_answer(connection)?;
        self.give_up();
        Ok(())
    }

    fn give_up(&mut self) {
        self.batch.clear();
    }
}

/// Reads an answer to its end, which must say that all is well.
fn read_answer(connection: &mut Connection) -> io::Result<()> {
    let wrong = |what: String| io::Error::new(io::ErrorKind::InvalidData, what);
    let mut answer = Vec::new();
    let (status, head_len, body_len) = loop {
        read_more(connection, &mut answer)?;
        let mut headers = [httparse::EMPTY_HEADER; ANSWER_HEADERS_MAX];
        let mut response = httparse::Response::new(&mut headers);
        let parsed = response.parse(&answer).map_err(|error| wrong(format!("the answer is no HTTP: {error}")))?;
        if let httparse::Status::Complete(head_len) = parsed {
            let length = response.headers.iter().find(|header| header.name.eq_ignore_ascii_case("content-length"));
            let length = length.and_then(|header| std::str::from_utf8(header.value).ok()?.trim().parse::<usize>().ok());
            break (response.code.unwrap_or(0), head_len, length);
        }
    };
    while answer.len() < head_len + body_len.unwrap_or(0) {
        read_more(connection, &mut answer)?;
    }
    match (status, body_len) {
        (200, Some(_)) => Ok(()),
        // Nobody can tell where it ends.
        (200, None) => Err(wrong("the answer has no length".into())),
        (status, _) => {
            let body = String::from_utf8_lossy(&answer[head_len..]).trim().to_owned();
            Err(wrong(format!("the collector answers {status}: {body}")))
        }
    }
}

fn read_more(connection: &mut Connection, answer: &mut Vec<u8>) -> io::Result<()> {
    let mut buffer = [0; 2048];
    match connection.read(&mut buffer)? {
        0 => Err(io::ErrorKind::UnexpectedEof.into()),
        _ if answer.len() > ANSWER_LEN_MAX => Err(io::ErrorKind::InvalidData.into()),
        len => {
            answer.extend_from_slice(&buffer[..len]);
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use skep_api::Timestamp;

    use super::*;
    use crate::container::logs::Stream;

    fn told(options: &[(&str, &str)], text: &str) -> Value {
        let all = [("splunk-token", "t"), ("splunk-url", "https://logs.example:1")];
        let options = all.iter().chain(options).map(|&(key, value)| (key.to_owned(), value.to_owned())).collect();
        let attributes = [("team".to_owned(), "bees".to_owned())].into();
        let subject = LogSubject { attributes, ..LogSubject::default() };
        let speaker = Speaker::new(&Splunk::parse(&options).unwrap(), &subject, &options, "tag".into());
        let at = Timestamp::from_nanos(1_700_000_000_123_456_789);
        speaker.event(&Line { stream: Stream::Stderr, text: text.as_bytes(), at, part: None })
    }

    #[test]
    fn a_line_is_told_as_each_format_has_it() {
        let attrs = json!({"team": "bees"});
        let inline = json!({"line": "{\"a\": 1}", "source": "stderr", "tag": "tag", "attrs": attrs});
        assert_eq!(told(&[], "{\"a\": 1}"), inline);
        assert_eq!(told(&[("splunk-format", "json")], "{\"a\": 1}")["line"], json!({"a": 1}));
        assert_eq!(told(&[("splunk-format", "json")], "text")["line"], "text");
        assert_eq!(told(&[("splunk-format", "raw")], "text"), "tag team=bees text");
        assert_eq!(told(&[("splunk-format", "raw"), ("tag", "")], "text"), "team=bees text");
    }

    #[test]
    fn options_are_read_or_refused() {
        let parse = |options: &[(&str, &str)]| {
            Splunk::parse(&options.iter().map(|&(key, value)| (key.to_owned(), value.to_owned())).collect())
        };
        let (token, url) = (("splunk-token", "t"), ("splunk-url", "https://logs.example"));
        let splunk = parse(&[token, url, ("splunk-capath", "/ca.pem"), ("splunk-caname", "splunk")]).unwrap();
        let Address::Tls(at, tls) = splunk.address else { panic!("another way") };
        assert_eq!((at.as_str(), tls.server.as_str()), ("logs.example:8088", "splunk"));
        assert_eq!(tls.authorities, Some("/ca.pem".into()));
        assert!(parse(&[url]).unwrap_err().to_string().contains("splunk-token"));
        for (key, value) in [
            ("splunk-url", "logs.example"),
            ("splunk-url", "https://logs.example/path"),
            ("splunk-format", "xml"),
            ("splunk-gzip", "yes"),
            ("splunk-gzip-level", "10"),
            ("splunk-index-acknowledgment", "true"),
        ] {
            let options = [token, url].into_iter().filter(|(other, _)| *other != key).chain([(key, value)]);
            let error = parse(&options.collect::<Vec<_>>()).unwrap_err().to_string();
            assert!(error.contains(key) && error.contains(value), "{error}");
        }
    }
}
