//! Lines for the host's journal.

use std::io;

use super::connection::{Address, Connection};
use super::syslog::severity;
use super::{Line, LogSubject, Protocol};

pub(super) const SOCKET: &str = "/run/systemd/journal/socket";

/// What speaks to the journal.
pub(super) struct Speaker {
    pub(super) subject: LogSubject,
    pub(super) tag: String,
}

impl Speaker {
    /// An entry of the journal's native protocol: `NAME=VALUE`, or for a value of several lines the name,
    /// a length (64 bits, lower byte first) and the value.
    fn entry(&self, line: &Line<'_>) -> Vec<u8> {
        let subject = &self.subject;
        let mut entry = Vec::with_capacity(line.text.len() + 512);
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
        field("MESSAGE", line.text);
        field("PRIORITY", severity(line.stream).to_string().as_bytes());
        field("SYSLOG_IDENTIFIER", self.tag.as_bytes());
        field("SYSLOG_TIMESTAMP", line.at.to_string().as_bytes());
        field("CONTAINER_ID", &subject.id.as_bytes()[..subject.id.len().min(12)]);
        field("CONTAINER_ID_FULL", subject.id.as_bytes());
        field("CONTAINER_NAME", subject.name.as_bytes());
        field("CONTAINER_TAG", self.tag.as_bytes());
        field("IMAGE_NAME", subject.image.as_bytes());
        for (name, value) in line.part.iter().flat_map(|part| part.members()) {
            field(&format!("CONTAINER_{}", name.to_ascii_uppercase()), value.as_bytes());
        }
        for (name, value) in &subject.attributes {
            field(&field_name(name), value.as_bytes());
        }
        entry
    }
}

impl Protocol for Speaker {
    fn address(&self) -> Address {
        Address::Unix(SOCKET.into())
    }

    fn tell(&mut self, connection: &mut Connection, line: &Line<'_>) -> io::Result<()> {
        connection.send(&self.entry(line))
    }
}

/// The journal takes capital letters, digits and underscores, and no digit or underscore in front.
fn field_name(name: &str) -> String {
    let upper = name.to_ascii_uppercase();
    let name: String = upper.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '_' }).collect();
    name.trim_start_matches(|c: char| !c.is_ascii_alphabetic()).to_owned()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use skep_api::Timestamp;

    use super::*;
    use crate::container::logs::Stream;

    #[test]
    fn an_entry_holds_values_of_several_lines() {
        let attributes = BTreeMap::from([("com.example.team".into(), "a\nb".into())]);
        let speaker = Speaker { subject: LogSubject { attributes, ..LogSubject::default() }, tag: "tag".into() };
        let line = Line { stream: Stream::Stdout, text: b"text", at: Timestamp::from_nanos(0), part: None };
        let entry = speaker.entry(&line);
        let wanted = b"COM_EXAMPLE_TEAM\n\x03\0\0\0\0\0\0\0a\nb\n";
        assert!(entry.starts_with(b"MESSAGE=text\nPRIORITY=6\n") && entry.ends_with(wanted));
    }
}
