//! Packets as the kernel hands them over: one large TCP or UDP packet is cut into what fits a tunnel. What
//! comes out of one, [`merge`](super::merge) puts together again.
//!
//! The kernel hands over packets with unfinished checksums and far larger than any link takes
//! (virtio 1.2 §5.1.6); each large packet saved is a trip through its stack saved.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::ops::Range;

/// What stands before each frame of a TAP device with `IFF_VNET_HDR`.
pub(crate) const VNET_LEN: usize = 10;
pub(crate) const ETHERNET_LEN: usize = 14;
/// Everything before the IP packet.
pub(crate) const HEAD_LEN: usize = VNET_LEN + ETHERNET_LEN;

pub(super) const NEEDS_CSUM: u8 = 1;
const GSO_NONE: u8 = 0;
pub(super) const GSO_TCPV4: u8 = 1;
pub(super) const GSO_TCPV6: u8 = 4;
pub(super) const GSO_UDP_L4: u8 = 5;
/// Set beside the kind where congestion is signalled.
const GSO_ECN: u8 = 0x80;

pub(super) const PROTOCOL_TCP: u8 = 6;
pub(super) const PROTOCOL_UDP: u8 = 17;
const PROTOCOL_ICMP: u8 = 1;
const PROTOCOL_ICMPV6: u8 = 58;
/// IPv6's header; what may follow it before TCP or UDP is not counted.
pub(super) const IPV6_LEN: usize = 40;
pub(super) const TCP_CSUM_OFFSET: usize = 16;
pub(super) const UDP_CSUM_OFFSET: usize = 6;

const FIN: u8 = 0x01;
pub(super) const PSH: u8 = 0x08;
pub(super) const ACK: u8 = 0x10;
const CWR: u8 = 0x80;

/// The largest IP packet that is handed over.
pub(crate) const PACKET_LEN_MAX: usize = 65_535;

/// The fields of the virtio header.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct VnetHeader {
    pub(super) flags: u8,
    pub(super) gso_type: u8,
    pub(super) gso_size: u16,
    /// Counted from the start of the Ethernet header.
    pub(super) csum_start: u16,
    pub(super) csum_offset: u16,
}

pub(super) fn u16_at(bytes: &[u8], at: usize) -> usize {
    usize::from(u16::from_be_bytes([bytes[at], bytes[at + 1]]))
}

impl VnetHeader {
    /// Reads the header; `None` if the frame is too short to have one.
    pub(crate) fn read(frame: &[u8]) -> Option<Self> {
        let head = frame.get(..VNET_LEN)?;
        let field = |at: usize| u16::from_ne_bytes([head[at], head[at + 1]]);
        Some(Self {
            flags: head[0],
            gso_type: head[1],
            gso_size: field(4),
            csum_start: field(6),
            csum_offset: field(8),
        })
    }

    pub(super) fn write(self, frame: &mut [u8], header_len: usize) {
        frame[0] = self.flags;
        frame[1] = self.gso_type;
        let header_len = u16::try_from(header_len).unwrap_or(0);
        for (at, value) in [(2, header_len), (4, self.gso_size), (6, self.csum_start), (8, self.csum_offset)] {
            frame[at..at + 2].copy_from_slice(&value.to_ne_bytes());
        }
    }
}

/// A sum of 16-bit words as Internet checksums have it (RFC 1071), not yet folded. Words are taken as
/// they lie in memory: the result, written as it lies in memory, is right on every machine.
pub(super) type Sum = u64;

fn add(total: Sum, word: u64) -> Sum {
    // Sums of 32-bit words fold to the same as sums of 16-bit words.
    total + (word & 0xffff_ffff) + (word >> 32)
}

fn sum_rest(rest: &[u8]) -> Sum {
    let mut last = [0; 8];
    last[..rest.len()].copy_from_slice(rest);
    add(0, u64::from_ne_bytes(last))
}

pub(super) fn sum(bytes: &[u8]) -> Sum {
    let (words, rest) = bytes.as_chunks::<8>();
    words.iter().fold(sum_rest(rest), |total, word| add(total, u64::from_ne_bytes(*word)))
}

/// Copies and sums in one pass: both read every byte.
pub(super) fn copy_and_sum(to: &mut [u8], from: &[u8]) -> Sum {
    let (words, rest) = from.as_chunks::<8>();
    let (to_words, to_rest) = to.as_chunks_mut::<8>();
    let mut total = 0;
    for (to, word) in to_words.iter_mut().zip(words) {
        *to = *word;
        total = add(total, u64::from_ne_bytes(*word));
    }
    to_rest.copy_from_slice(rest);
    total + sum_rest(rest)
}

pub(super) fn fold(mut total: Sum) -> u16 {
    while total > 0xffff {
        total = (total & 0xffff) + (total >> 16);
    }
    u16::try_from(total).unwrap_or(0)
}

/// The part of a TCP or UDP checksum that covers addresses, protocol and length.
pub(super) fn pseudo_header(packet: &[u8], protocol: u8, len: usize) -> Sum {
    let len = u16::try_from(len).unwrap_or(u16::MAX);
    sum(&packet[address_range(packet)])
        + u64::from(u16::from_ne_bytes([0, protocol]))
        + u64::from(u16::from_ne_bytes(len.to_be_bytes()))
}

/// Where both addresses of a packet stand.
pub(super) const fn address_range(packet: &[u8]) -> Range<usize> {
    if is_ipv6(packet) { 8..IPV6_LEN } else { 12..20 }
}

pub(super) fn write_ipv4_checksum(packet: &mut [u8], header_len: usize) {
    packet[10..12].fill(0);
    let checksum = !fold(sum(&packet[..header_len]));
    packet[10..12].copy_from_slice(&checksum.to_ne_bytes());
}

/// The length of a packet's IP header; `None` if it is none.
pub(super) fn ip_header_len(packet: &[u8]) -> Option<usize> {
    let first = *packet.first()?;
    let len = match first >> 4 {
        4 => usize::from(first & 0x0f) * 4,
        6 => IPV6_LEN,
        _ => return None,
    };
    (len >= 20 && packet.len() >= len).then_some(len)
}

/// Whether a packet is one of IPv6, if it is any.
pub(crate) const fn is_ipv6(packet: &[u8]) -> bool {
    matches!(packet, [first, ..] if *first >> 4 == 6)
}

/// What follows a packet's IP header.
pub(super) const fn protocol(packet: &[u8]) -> u8 {
    if is_ipv6(packet) { packet[6] } else { packet[9] }
}

/// Where a packet comes from and goes to.
pub(crate) fn addresses(packet: &[u8]) -> Option<(IpAddr, IpAddr)> {
    ip_header_len(packet)?;
    if is_ipv6(packet) {
        let at = |at: usize| packet.get(at..)?.first_chunk::<16>().map(|bytes| Ipv6Addr::from(*bytes).into());
        return Some((at(8)?, at(24)?));
    }
    let at = |at: usize| packet.get(at..)?.first_chunk::<4>().map(|bytes| Ipv4Addr::from(*bytes).into());
    Some((at(12)?, at(16)?))
}

/// Whether a packet is an ICMP message.
pub(crate) fn is_icmp(packet: &[u8]) -> bool {
    let kind = if is_ipv6(packet) { PROTOCOL_ICMPV6 } else { PROTOCOL_ICMP };
    ip_header_len(packet).is_some() && protocol(packet) == kind
}

/// Hands every packet of a frame from the kernel to `emit`, finished and small enough for a link.
///
/// `packet` is the IP packet behind `header`; it is used up. `scratch` must hold one packet.
pub(crate) fn segment(header: VnetHeader, packet: &mut [u8], scratch: &mut [u8], mut emit: impl FnMut(&[u8])) {
    let Some(ip_len) = ip_header_len(packet) else { return };
    let transport = usize::from(header.csum_start).saturating_sub(ETHERNET_LEN);
    match header.gso_type & !GSO_ECN {
        GSO_NONE => {
            if header.flags & NEEDS_CSUM != 0 {
                let at = transport + usize::from(header.csum_offset);
                if transport < ip_len || at + 2 > packet.len() {
                    return;
                }
                // The field holds the pseudo header's sum already.
                let total = sum(&packet[transport..]);
                write_checksum(packet, protocol(packet), at, total);
            }
            emit(packet);
        }
        // What IPv6 has between its header and theirs is of every packet.
        _ if transport < ip_len => {}
        GSO_TCPV4 | GSO_TCPV6 if packet.len() >= transport + 20 => {
            segment_tcp(header, packet, transport, scratch, emit)
        }
        GSO_UDP_L4 if packet.len() >= transport + 8 => segment_udp(header, packet, transport, scratch, emit),
        _ => {}
    }
}

fn segment_tcp(header: VnetHeader, packet: &[u8], ip_len: usize, scratch: &mut [u8], mut emit: impl FnMut(&[u8])) {
    let tcp_len = usize::from(packet[ip_len + 12] >> 4) * 4;
    let head_len = ip_len + tcp_len;
    let size = usize::from(header.gso_size);
    if tcp_len < 20 || packet.len() < head_len || size == 0 || head_len + size > scratch.len() {
        return;
    }
    let sequence = u32::from_be_bytes([packet[ip_len + 4], packet[ip_len + 5], packet[ip_len + 6], packet[ip_len + 7]]);
    let id = u16::from_be_bytes([packet[4], packet[5]]);
    let flags = packet[ip_len + 13];
    let payload = &packet[head_len..];
    let count = payload.len().div_ceil(size).max(1);
    let mut offset: u32 = 0;
    let mut number: u16 = 0;
    for (index, part) in payload.chunks(size).enumerate() {
        let (out, payload_sum) = begin_segment(scratch, &packet[..head_len], part, ip_len, id.wrapping_add(number));
        out[ip_len + 4..ip_len + 8].copy_from_slice(&sequence.wrapping_add(offset).to_be_bytes());
        let mut own = flags;
        if index > 0 {
            own &= !CWR;
        }
        if index + 1 < count {
            own &= !(FIN | PSH);
        }
        out[ip_len + 13] = own;
        finish_transport(out, PROTOCOL_TCP, ip_len..head_len, payload_sum);
        emit(out);
        offset = offset.wrapping_add(u32::try_from(part.len()).unwrap_or(0));
        number = number.wrapping_add(1);
    }
}

fn segment_udp(header: VnetHeader, packet: &[u8], ip_len: usize, scratch: &mut [u8], mut emit: impl FnMut(&[u8])) {
    let head_len = ip_len + 8;
    let size = usize::from(header.gso_size);
    if size == 0 || head_len + size > scratch.len() {
        return;
    }
    let id = u16::from_be_bytes([packet[4], packet[5]]);
    let mut number: u16 = 0;
    for part in packet[head_len..].chunks(size) {
        let (out, payload_sum) = begin_segment(scratch, &packet[..head_len], part, ip_len, id.wrapping_add(number));
        let udp_len = u16::try_from(out.len() - ip_len).unwrap_or(u16::MAX);
        out[ip_len + 4..ip_len + 6].copy_from_slice(&udp_len.to_be_bytes());
        finish_transport(out, PROTOCOL_UDP, ip_len..head_len, payload_sum);
        emit(out);
        number = number.wrapping_add(1);
    }
}

/// Puts a part of a large packet behind that one's headers, as an IP packet of its own.
fn begin_segment<'a>(scratch: &'a mut [u8], head: &[u8], part: &[u8], ip_len: usize, id: u16) -> (&'a mut [u8], Sum) {
    let len = head.len() + part.len();
    let out = &mut scratch[..len];
    out[..head.len()].copy_from_slice(head);
    let payload_sum = copy_and_sum(&mut out[head.len()..], part);
    write_len(out, len);
    if !is_ipv6(out) {
        out[4..6].copy_from_slice(&id.to_be_bytes());
        write_ipv4_checksum(out, ip_len);
    }
    (out, payload_sum)
}

/// Writes the length of a packet into its header.
pub(super) fn write_len(packet: &mut [u8], len: usize) {
    let (at, len) = if is_ipv6(packet) { (4, len - IPV6_LEN) } else { (2, len) };
    packet[at..at + 2].copy_from_slice(&u16::try_from(len).unwrap_or(u16::MAX).to_be_bytes());
}

/// Writes the checksum of the transport header that lies at `header`, over it, payload and addresses.
pub(super) fn finish_transport(packet: &mut [u8], protocol: u8, header: Range<usize>, payload_sum: Sum) {
    let at = header.start + if protocol == PROTOCOL_TCP { TCP_CSUM_OFFSET } else { UDP_CSUM_OFFSET };
    packet[at..at + 2].fill(0);
    let pseudo = pseudo_header(packet, protocol, packet.len() - header.start);
    let total = pseudo + sum(&packet[header]) + payload_sum;
    write_checksum(packet, protocol, at, total);
}

fn write_checksum(packet: &mut [u8], protocol: u8, at: usize, total: Sum) {
    let checksum = !fold(total);
    // UDP writes zero for "none".
    let checksum = if checksum == 0 && protocol == PROTOCOL_UDP { u16::MAX } else { checksum };
    packet[at..at + 2].copy_from_slice(&checksum.to_ne_bytes());
}
