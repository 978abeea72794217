//! What is said to and by the kernel's packet filter over netlink (`linux/netfilter/nfnetlink.h`).

use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};

use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, getsockname, recv, sendto,
    setsockopt, socket, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike as _};

use crate::nft::close_in_time;

/// Of each message.
pub const HEADER_LEN: usize = 16;
/// What a message's body begins with: family, version, resource.
pub const GENERIC_LEN: usize = 4;
/// Marks of an attribute's kind: it holds others; it is in network order.
const MARKS: u16 = 1 << 15 | 1 << 14;

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

/// The messages in what was received: kind and body.
#[must_use]
pub fn messages(bytes: &[u8]) -> Vec<(u16, &[u8])> {
    told(bytes).into_iter().map(|(kind, _, body)| (kind, body)).collect()
}

/// The messages in what was received: kind, whose doing it tells of (the port of its socket), and body.
#[must_use]
pub fn told(mut bytes: &[u8]) -> Vec<(u16, u32, &[u8])> {
    let mut found = Vec::new();
    while let (Some(len), Some(kind), Some(port)) = (u32_at(bytes, 0), u16_at(bytes, 4), u32_at(bytes, PORT_AT)) {
        let Ok(len) = usize::try_from(len) else { break };
        let Some(body) = bytes.get(HEADER_LEN..len) else { break };
        found.push((kind, port, body));
        bytes = bytes.get(len.next_multiple_of(4)..).unwrap_or_default();
    }
    found
}

/// The attributes in `bytes`: kind, whole, and value.
#[must_use]
pub fn attributes(mut bytes: &[u8]) -> Vec<(u16, &[u8], &[u8])> {
    let mut found = Vec::new();
    while let (Some(len), Some(kind)) = (u16_at(bytes, 0), u16_at(bytes, 2)) {
        let len = usize::from(len);
        let (Some(whole), Some(value)) = (bytes.get(..len), bytes.get(4..len)) else { break };
        found.push((kind & !MARKS, whole, value));
        bytes = bytes.get(len.next_multiple_of(4)..).unwrap_or_default();
    }
    found
}

/// An attribute.
#[must_use]
pub fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let len = u16::try_from(4 + value.len()).unwrap_or(u16::MAX);
    let mut bytes = [len.to_ne_bytes(), kind.to_ne_bytes()].concat();
    bytes.extend_from_slice(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

/// An attribute that is a text.
#[must_use]
pub fn text(kind: u16, value: &str) -> Vec<u8> {
    attribute(kind, &[value.as_bytes(), &[0]].concat())
}

/// An attribute that is a number.
#[must_use]
pub fn number(kind: u16, value: u32) -> Vec<u8> {
    attribute(kind, &value.to_be_bytes())
}

/// An attribute that holds others.
#[must_use]
pub fn nested(kind: u16, parts: &[Vec<u8>]) -> Vec<u8> {
    attribute(kind | 1 << 15, &parts.concat())
}

const REQUEST: u16 = 0x01;
/// Asks for an answer also if all went well.
pub const ACKNOWLEDGE: u16 = 0x04;
/// The kind of an answer that says how it went: its body begins with an error's number, or zero.
pub const ERROR: u16 = 2;

/// Opens a connection to the packet filter of the calling thread's namespace.
pub fn open() -> io::Result<OwnedFd> {
    let protocol = SockProtocol::NetlinkNetFilter;
    let socket = socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, protocol)?;
    bind(socket.as_raw_fd(), &NetlinkAddr::new(0, 0))?;
    Ok(socket)
}

/// Sends messages to the kernel.
pub fn send(socket: &OwnedFd, messages: &[u8]) -> io::Result<()> {
    sendto(socket.as_raw_fd(), messages, &NetlinkAddr::new(0, 0), MsgFlags::empty())?;
    Ok(())
}

/// A message that asks for something; `generic` is what its body begins with.
#[must_use]
pub fn request(kind: u16, flags: u16, sequence: u32, generic: [u8; GENERIC_LEN], attributes: &[u8]) -> Vec<u8> {
    let len = HEADER_LEN + GENERIC_LEN + attributes.len();
    let mut message = Vec::with_capacity(len);
    message.extend_from_slice(&u32::try_from(len).unwrap_or(0).to_ne_bytes());
    message.extend_from_slice(&kind.to_ne_bytes());
    message.extend_from_slice(&(flags | REQUEST).to_ne_bytes());
    message.extend_from_slice(&sequence.to_ne_bytes());
    // The sender, which the kernel knows.
    message.extend_from_slice(&[0; 4]);
    message.extend_from_slice(&generic);
    message.extend_from_slice(attributes);
    message
}

const BATCH_BEGIN: u16 = 16;
const BATCH_END: u16 = 17;
/// The subsystem of tables, chains and rules.
const NFTABLES: u16 = 10;
const BATCH_GENERIC: [u8; GENERIC_LEN] = [0, 0, NFTABLES.to_be_bytes()[0], NFTABLES.to_be_bytes()[1]];
/// Where a message's flags stand, and its sender's port.
const FLAGS_AT: usize = 6;
const PORT_AT: usize = 12;
const ANSWER_LIMIT_SECS: i64 = 10;
/// In bytes; what is more is refused.
const BATCH_LEN_MAX: usize = 16 << 20;

/// Changes to rules that take place together or not at all.
#[derive(Clone, Debug, Default)]
pub struct Batch {
    bytes: Vec<u8>,
    /// Where the last change begins.
    last: usize,
    count: u32,
}

impl Batch {
    /// One of the packet filter's messages on a table of `family`.
    pub fn push(&mut self, kind: u16, flags: u16, family: u8, attributes: &[Vec<u8>]) {
        if self.count == 0 {
            self.write(BATCH_BEGIN, 0, BATCH_GENERIC, &[]);
        }
        self.last = self.bytes.len();
        self.write(NFTABLES << 8 | kind, flags, [family, 0, 0, 0], &attributes.concat());
    }

    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.count == 0
    }

    fn write(&mut self, kind: u16, flags: u16, generic: [u8; GENERIC_LEN], attributes: &[u8]) {
        self.bytes.extend_from_slice(&request(kind, flags, self.count, generic, attributes));
        self.count += 1;
    }

    /// The whole, with the word that the last change be acknowledged.
    fn finish(mut self) -> Vec<u8> {
        let flags = self.last + FLAGS_AT;
        for (flag, wanted) in self.bytes.iter_mut().skip(flags).zip(ACKNOWLEDGE.to_ne_bytes()) {
            *flag |= wanted;
        }
        self.write(BATCH_END, 0, BATCH_GENERIC, &[]);
        self.bytes
    }
}

/// A connection to the packet filter of the namespace that it was opened in.
#[derive(Debug)]
pub struct PacketFilter(Option<OwnedFd>);

impl PacketFilter {
    pub fn open() -> io::Result<Self> {
        let socket = open()?;
        setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::seconds(ANSWER_LIMIT_SECS))?;
        // All changes of a batch go in one message.
        setsockopt(&socket, sockopt::SndBufForce, &BATCH_LEN_MAX)?;
        Ok(Self(Some(socket)))
    }

    /// What tells its doings from others'.
    pub fn port(&self) -> io::Result<u32> {
        let Some(socket) = &self.0 else { return Ok(0) };
        Ok(getsockname::<NetlinkAddr>(socket.as_raw_fd())?.pid())
    }

    /// Has the changes take place; returns once they have.
    pub fn commit(&self, batch: Batch) -> io::Result<()> {
        let Some(socket) = &self.0 else { return Ok(()) };
        if batch.is_empty() {
            return Ok(());
        }
        send(socket, &batch.finish())?;
        let mut buffer = vec![0; 16 << 10];
        loop {
            let len = recv(socket.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
            for (kind, body) in messages(&buffer[..len]) {
                let code = body.first_chunk().map_or(0, |code| i32::from_ne_bytes(*code));
                match (kind, code) {
                    (ERROR, 0) => return Ok(()),
                    (ERROR, code) => return Err(io::Error::from_raw_os_error(-code)),
                    _ => {}
                }
            }
        }
    }
}

impl Drop for PacketFilter {
    fn drop(&mut self) {
        if let Some(socket) = self.0.take() {
            close_in_time(socket);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_batch_is_read_as_it_was_written() {
        let mut batch = Batch::default();
        assert!(batch.is_empty());
        batch.push(6, 0x400, 2, &[text(1, "skep"), nested(4, &[number(1, 7)])]);
        batch.push(8, 0, 10, &[]);
        let bytes = batch.finish();
        let written: Vec<u16> = messages(&bytes).iter().map(|(kind, _)| *kind).collect();
        assert_eq!(written, [BATCH_BEGIN, NFTABLES << 8 | 6, NFTABLES << 8 | 8, BATCH_END]);
        let (_, body) = messages(&bytes)[1];
        assert_eq!(body[..GENERIC_LEN], [2, 0, 0, 0]);
        let parts = attributes(&body[GENERIC_LEN..]);
        assert_eq!((parts[0].0, parts[0].2), (1, &b"skep\0"[..]));
        assert_eq!(attributes(parts[1].2)[0].2, 7u32.to_be_bytes());
        let flags: Vec<u16> = [20, 20 + 20 + 12 + 12].iter().map(|at| u16_at(&bytes, at + FLAGS_AT).unwrap()).collect();
        assert_eq!(flags, [REQUEST | 0x400, REQUEST | ACKNOWLEDGE], "the last one is acknowledged");
    }
}
