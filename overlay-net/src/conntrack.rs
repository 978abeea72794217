//! Forgets connections to what is gone, so that their next packet is not sent where nobody is.

use std::collections::BTreeSet;
use std::io;
use std::net::Ipv4Addr;

use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, sendto, setsockopt, socket,
    sockopt,
};
use std::os::fd::{AsRawFd as _, OwnedFd};

/// From `linux/netfilter/nfnetlink.h` and `nfnetlink_conntrack.h`.
const SUBSYSTEM: u16 = 1 << 8;
const GET: u16 = SUBSYSTEM | 1;
const DELETE: u16 = SUBSYSTEM | 2;
const TUPLE_ORIGINAL: u16 = 1;
const TUPLE_REPLY: u16 = 2;
const TUPLE_IP: u16 = 1;
const IP_SOURCE: u16 = 1;
const IP_DESTINATION: u16 = 2;
const NESTED: u16 = 1 << 15;

const REQUEST: u16 = 0x01;
const ACKNOWLEDGE: u16 = 0x04;
const DUMP: u16 = 0x300;
const DONE: u16 = 3;
const ERROR: u16 = 2;
const HEADER_LEN: usize = 16;
/// Family, version, resource.
const GENERIC_LEN: usize = 4;
const BUFFER_LEN: usize = 64 << 10;

/// Removes every connection of the calling thread's namespace that one of `addresses` takes part in.
pub(crate) fn forget(addresses: &BTreeSet<Ipv4Addr>) -> io::Result<()> {
    let socket = socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkNetFilter)?;
    bind(socket.as_raw_fd(), &NetlinkAddr::new(0, 0))?;
    setsockopt(&socket, sockopt::RcvBuf, &(4 << 20))?;
    let doomed = list(&socket)?.into_iter().filter(|entry| entry.addresses.iter().any(|a| addresses.contains(a)));
    for entry in doomed {
        delete(&socket, &entry.replies)?;
    }
    Ok(())
}

/// One connection: what names it, and who takes part.
struct Entry {
    /// The attribute with the tuple of replies, as the kernel wrote it. The original direction's would
    /// also name a new connection that the client makes from the same port meanwhile.
    replies: Vec<u8>,
    addresses: Vec<Ipv4Addr>,
}

fn request(kind: u16, flags: u16, attributes: &[u8]) -> Vec<u8> {
    let len = HEADER_LEN + GENERIC_LEN + attributes.len();
    let mut message = Vec::with_capacity(len);
    message.extend_from_slice(&u32::try_from(len).unwrap_or(0).to_ne_bytes());
    message.extend_from_slice(&kind.to_ne_bytes());
    message.extend_from_slice(&(flags | REQUEST).to_ne_bytes());
    // Sequence and sender.
    message.extend_from_slice(&[0; 8]);
    message.extend_from_slice(&[u8::try_from(libc::AF_INET).unwrap_or(2), 0, 0, 0]);
    message.extend_from_slice(attributes);
    message
}

fn list(socket: &OwnedFd) -> io::Result<Vec<Entry>> {
    sendto(socket.as_raw_fd(), &request(GET, DUMP, &[]), &NetlinkAddr::new(0, 0), MsgFlags::empty())?;
    let mut entries = Vec::new();
    let mut buffer = vec![0; BUFFER_LEN];
    loop {
        let len = recv(socket.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
        for (kind, body) in messages(&buffer[..len]) {
            match kind {
                DONE => return Ok(entries),
                ERROR => return Err(io::Error::other("the kernel lists no connections")),
                _ => entries.extend(entry(body.get(GENERIC_LEN..).unwrap_or_default())),
            }
        }
    }
}

fn delete(socket: &OwnedFd, replies: &[u8]) -> io::Result<()> {
    let message = request(DELETE, ACKNOWLEDGE, replies);
    sendto(socket.as_raw_fd(), &message, &NetlinkAddr::new(0, 0), MsgFlags::empty())?;
    let mut buffer = vec![0; BUFFER_LEN];
    // That it ended by itself meanwhile is just as well.
    recv(socket.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
    Ok(())
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

/// The messages in what was received: kind and body.
fn messages(mut bytes: &[u8]) -> Vec<(u16, &[u8])> {
    let mut found = Vec::new();
    while let (Some(len), Some(kind)) = (bytes.first_chunk::<4>(), u16_at(bytes, 4)) {
        let Ok(len) = usize::try_from(u32::from_ne_bytes(*len)) else { break };
        let Some(body) = bytes.get(HEADER_LEN..len) else { break };
        found.push((kind, body));
        bytes = bytes.get(len.next_multiple_of(4)..).unwrap_or_default();
    }
    found
}

/// The attributes in `bytes`: kind, whole, and value.
fn attributes(mut bytes: &[u8]) -> Vec<(u16, &[u8], &[u8])> {
    let mut found = Vec::new();
    while let (Some(len), Some(kind)) = (u16_at(bytes, 0), u16_at(bytes, 2)) {
        let len = usize::from(len);
        let (Some(whole), Some(value)) = (bytes.get(..len), bytes.get(4..len)) else { break };
        found.push((kind & !NESTED, whole, value));
        bytes = bytes.get(len.next_multiple_of(4)..).unwrap_or_default();
    }
    found
}

fn entry(bytes: &[u8]) -> Option<Entry> {
    let attributes_of_entry = attributes(bytes);
    let find = |wanted: u16| attributes_of_entry.iter().find(|(kind, ..)| *kind == wanted);
    let (_, replies, _) = find(TUPLE_REPLY)?;
    let mut addresses = Vec::new();
    for (_, _, value) in [find(TUPLE_ORIGINAL), find(TUPLE_REPLY)].into_iter().flatten() {
        for (_, _, ip) in attributes(value).into_iter().filter(|(kind, ..)| *kind == TUPLE_IP) {
            let ends = attributes(ip).into_iter().filter(|(kind, ..)| matches!(*kind, IP_SOURCE | IP_DESTINATION));
            addresses.extend(ends.filter_map(|(_, _, octets)| <[u8; 4]>::try_from(octets).ok().map(Ipv4Addr::from)));
        }
    }
    Some(Entry { replies: replies.to_vec(), addresses })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
        let len = u16::try_from(4 + value.len()).unwrap();
        let mut bytes = [len.to_ne_bytes(), kind.to_ne_bytes()].concat();
        bytes.extend_from_slice(value);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    #[test]
    fn a_connection_is_read_with_both_its_ends() {
        let ip = |a: u8, b: u8| {
            let ends = [attribute(IP_SOURCE, &[10, 0, 0, a]), attribute(IP_DESTINATION, &[10, 0, 0, b])].concat();
            attribute(TUPLE_IP | NESTED, &ends)
        };
        let original = attribute(TUPLE_ORIGINAL | NESTED, &ip(1, 2));
        let replies = attribute(TUPLE_REPLY | NESTED, &ip(3, 1));
        let bytes = [original, replies.clone()].concat();
        let entry = entry(&bytes).unwrap();
        assert_eq!(entry.replies, replies);
        assert_eq!(entry.addresses.len(), 4);
        assert!(entry.addresses.contains(&Ipv4Addr::new(10, 0, 0, 3)));
        assert!(super::entry(&bytes[..3]).is_none());
    }
}
