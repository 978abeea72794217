//! Packets as they pass between the kernel and the tunnels: one large TCP or UDP packet is cut into
//! what fits a tunnel, and what comes out of one is put together again.
//!
//! The kernel hands over packets with unfinished checksums and far larger than any link takes
//! (virtio 1.2 §5.1.6); each large packet saved is a trip through its stack saved.

/// What stands before each frame of a TAP device with `IFF_VNET_HDR`.
pub(crate) const VNET_LEN: usize = 10;
pub(crate) const ETHERNET_LEN: usize = 14;
/// Everything before the IP packet.
pub(crate) const HEAD_LEN: usize = VNET_LEN + ETHERNET_LEN;

const NEEDS_CSUM: u8 = 1;
const GSO_NONE: u8 = 0;
const GSO_TCPV4: u8 = 1;
const GSO_UDP_L4: u8 = 5;
/// Set beside the kind where congestion is signalled.
const GSO_ECN: u8 = 0x80;

const PROTOCOL_TCP: u8 = 6;
const PROTOCOL_UDP: u8 = 17;
const TCP_CSUM_OFFSET: usize = 16;
const UDP_CSUM_OFFSET: usize = 6;

const FIN: u8 = 0x01;
const PSH: u8 = 0x08;
const ACK: u8 = 0x10;
const CWR: u8 = 0x80;

/// The largest IP packet.
pub(crate) const PACKET_LEN_MAX: usize = 65_535;

/// The fields of the virtio header.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct VnetHeader {
    flags: u8,
    gso_type: u8,
    gso_size: u16,
    /// Counted from the start of the Ethernet header.
    csum_start: u16,
    csum_offset: u16,
}

fn u16_at(bytes: &[u8], at: usize) -> usize {
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

    fn write(self, frame: &mut [u8], header_len: usize) {
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
type Sum = u64;

fn add(total: Sum, word: u64) -> Sum {
    // Sums of 32-bit words fold to the same as sums of 16-bit words.
    total + (word & 0xffff_ffff) + (word >> 32)
}

fn sum_rest(rest: &[u8]) -> Sum {
    let mut last = [0; 8];
    last[..rest.len()].copy_from_slice(rest);
    add(0, u64::from_ne_bytes(last))
}

fn sum(bytes: &[u8]) -> Sum {
    let (words, rest) = bytes.as_chunks::<8>();
    words.iter().fold(sum_rest(rest), |total, word| add(total, u64::from_ne_bytes(*word)))
}

/// Copies and sums in one pass: both read every byte.
fn copy_and_sum(to: &mut [u8], from: &[u8]) -> Sum {
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

fn fold(mut total: Sum) -> u16 {
    while total > 0xffff {
        total = (total & 0xffff) + (total >> 16);
    }
    u16::try_from(total).unwrap_or(0)
}

/// The part of a TCP or UDP checksum that covers addresses, protocol and length.
fn pseudo_header(packet: &[u8], protocol: u8, len: usize) -> Sum {
    let len = u16::try_from(len).unwrap_or(u16::MAX);
    sum(&packet[12..20])
        + u64::from(u16::from_ne_bytes([0, protocol]))
        + u64::from(u16::from_ne_bytes(len.to_be_bytes()))
}

fn write_ipv4_checksum(packet: &mut [u8], header_len: usize) {
    packet[10..12].fill(0);
    let checksum = !fold(sum(&packet[..header_len]));
    packet[10..12].copy_from_slice(&checksum.to_ne_bytes());
}

/// The length of an IPv4 packet's header; `None` if it is no IPv4 packet.
fn ipv4_header_len(packet: &[u8]) -> Option<usize> {
    let first = *packet.first()?;
    let len = usize::from(first & 0x0f) * 4;
    (first >> 4 == 4 && len >= 20 && packet.len() >= len).then_some(len)
}

/// Where an IPv4 packet comes from and goes to.
pub(crate) fn addresses(packet: &[u8]) -> Option<(std::net::Ipv4Addr, std::net::Ipv4Addr)> {
    ipv4_header_len(packet)?;
    let at = |at: usize| std::net::Ipv4Addr::new(packet[at], packet[at + 1], packet[at + 2], packet[at + 3]);
    Some((at(12), at(16)))
}

/// Whether a packet is an ICMP message.
pub(crate) fn is_icmp(packet: &[u8]) -> bool {
    ipv4_header_len(packet).is_some() && packet[9] == 1
}

/// Hands every packet of a frame from the kernel to `emit`, finished and small enough for a link.
///
/// `packet` is the IP packet behind `header`; it is used up. `scratch` must hold one packet.
pub(crate) fn segment(header: VnetHeader, packet: &mut [u8], scratch: &mut [u8], mut emit: impl FnMut(&[u8])) {
    let Some(ip_len) = ipv4_header_len(packet) else { return };
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
                write_checksum(packet, at, total);
            }
            emit(packet);
        }
        GSO_TCPV4 if packet.len() >= ip_len + 20 => segment_tcp(header, packet, ip_len, scratch, emit),
        GSO_UDP_L4 if packet.len() >= ip_len + 8 => segment_udp(header, packet, ip_len, scratch, emit),
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
        finish_transport(out, ip_len, head_len, ip_len + TCP_CSUM_OFFSET, payload_sum);
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
        finish_transport(out, ip_len, head_len, ip_len + UDP_CSUM_OFFSET, payload_sum);
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
    out[4..6].copy_from_slice(&id.to_be_bytes());
    write_ipv4_checksum(out, ip_len);
    (out, payload_sum)
}

fn write_len(packet: &mut [u8], len: usize) {
    packet[2..4].copy_from_slice(&u16::try_from(len).unwrap_or(u16::MAX).to_be_bytes());
}

/// Writes the checksum of a transport header at `at`, over header, payload and addresses.
fn finish_transport(packet: &mut [u8], ip_len: usize, head_len: usize, at: usize, payload_sum: Sum) {
    packet[at..at + 2].fill(0);
    let pseudo = pseudo_header(packet, packet[9], packet.len() - ip_len);
    let total = pseudo + sum(&packet[ip_len..head_len]) + payload_sum;
    write_checksum(packet, at, total);
}

fn write_checksum(packet: &mut [u8], at: usize, total: Sum) {
    let checksum = !fold(total);
    // UDP writes zero for "none".
    let checksum = if checksum == 0 && packet[9] == PROTOCOL_UDP { u16::MAX } else { checksum };
    packet[at..at + 2].copy_from_slice(&checksum.to_ne_bytes());
}

/// A packet of a TCP or UDP stream, as far as putting it together with its neighbours needs it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Segment {
    protocol: u8,
    head_len: usize,
    ip_len: usize,
    /// TCP's; zero else.
    sequence: u32,
    flags: u8,
}

/// Addresses, ports and all options: what the longest header of a segment takes.
const SEGMENT_HEAD_LEN_MAX: usize = 80;
const UDP_HEAD_LEN: usize = 28;
/// Datagrams in one frame; the kernel takes no more.
const UDP_SEGMENTS_MAX: usize = 64;

impl Segment {
    /// Reads a segment that may be put together with others: plain data, or a datagram. Whether its
    /// checksum is right shows when it is taken in.
    pub(crate) fn read(packet: &[u8]) -> Option<Self> {
        let ip_len = ipv4_header_len(packet)?;
        let fragment = u16_at(packet, 6) & 0x3fff;
        if ip_len != 20 || fragment != 0 || u16_at(packet, 2) != packet.len() {
            return None;
        }
        match packet[9] {
            PROTOCOL_TCP => Self::read_tcp(packet, ip_len),
            PROTOCOL_UDP => Self::read_udp(packet, ip_len),
            _ => None,
        }
    }

    fn read_tcp(packet: &[u8], ip_len: usize) -> Option<Self> {
        let tcp_len = usize::from(*packet.get(ip_len + 12)? >> 4) * 4;
        let head_len = ip_len + tcp_len;
        if tcp_len < 20 || packet.len() <= head_len {
            return None;
        }
        let flags = packet[ip_len + 13];
        if flags & !(ACK | PSH) != 0 || flags & ACK == 0 {
            return None;
        }
        let sequence = u32::from_be_bytes([packet[24], packet[25], packet[26], packet[27]]);
        Some(Self { protocol: PROTOCOL_TCP, head_len, ip_len, sequence, flags })
    }

    fn read_udp(packet: &[u8], ip_len: usize) -> Option<Self> {
        let whole = packet.len() > UDP_HEAD_LEN && u16_at(packet, ip_len + 4) == packet.len() - ip_len;
        // Zero stands for "none": one that is put together with others would be given one.
        let has_checksum = whole && u16_at(packet, ip_len + UDP_CSUM_OFFSET) != 0;
        has_checksum.then_some(Self { protocol: PROTOCOL_UDP, head_len: UDP_HEAD_LEN, ip_len, sequence: 0, flags: 0 })
    }

    fn is_intact(&self, packet: &[u8], payload_sum: Sum) -> bool {
        let pseudo = pseudo_header(packet, self.protocol, packet.len() - self.ip_len);
        fold(pseudo + sum(&packet[self.ip_len..self.head_len]) + payload_sum) == u16::MAX
    }

    const fn csum_offset(&self) -> usize {
        if self.protocol == PROTOCOL_TCP { TCP_CSUM_OFFSET } else { UDP_CSUM_OFFSET }
    }
}

/// One frame for the kernel that grows while further segments fit behind it.
///
/// What comes next is best opened right [`behind`](Self::behind) what is there: if it goes on with the
/// stream, no byte of it is moved again.
#[derive(Debug)]
pub(crate) struct Merged {
    /// [`HEAD_LEN`] bytes, then the IP packet, `len` bytes in all; the rest is room.
    frame: Box<[u8]>,
    len: usize,
    /// None: the packet stands for itself.
    segment: Option<Segment>,
    size: usize,
    count: usize,
    closed: bool,
    /// What the headers of the packet behind stand on.
    covered: [u8; SEGMENT_HEAD_LEN_MAX],
}

impl Merged {
    /// `slack` bytes may be written behind any packet.
    pub(crate) fn with_room(slack: usize) -> Self {
        let frame = vec![0; HEAD_LEN + PACKET_LEN_MAX + slack].into_boxed_slice();
        let covered = [0; SEGMENT_HEAD_LEN_MAX];
        Self { frame, len: 0, segment: None, size: 0, count: 0, closed: false, covered }
    }

    /// Where a packet may be put that the frame is to begin with.
    pub(crate) fn room(&mut self) -> &mut [u8] {
        &mut self.frame[HEAD_LEN..]
    }

    /// Begins with the packet of `len` bytes that was put in its [`room`](Self::room).
    pub(crate) fn begin(&mut self, ethernet: &[u8; ETHERNET_LEN], len: usize) {
        let packet = &self.frame[HEAD_LEN..HEAD_LEN + len];
        let read = Segment::read(packet).filter(|read| read.is_intact(packet, sum(&packet[read.head_len..])));
        self.frame[..VNET_LEN].fill(0);
        self.frame[VNET_LEN..HEAD_LEN].copy_from_slice(ethernet);
        self.len = HEAD_LEN + len;
        self.segment = read;
        self.size = read.map_or(0, |segment| len - segment.head_len);
        self.count = 1;
        self.closed = read.is_none_or(|segment| segment.flags & PSH != 0);
    }

    /// Makes room for `len` bytes of a packet that is expected to go on with the stream; says whether
    /// any can.
    pub(crate) fn cover(&mut self, len: usize) -> bool {
        let Some(segment) = self.segment.filter(|_| !self.closed) else { return false };
        let at = self.len - segment.head_len;
        if at + len > self.frame.len() {
            return false;
        }
        self.covered[..segment.head_len].copy_from_slice(&self.frame[at..self.len]);
        true
    }

    /// The room behind: its headers lie on the end of what is there.
    pub(crate) fn behind(&mut self) -> &mut [u8] {
        let at = self.len - self.segment.map_or(0, |segment| segment.head_len);
        &mut self.frame[at..]
    }

    /// The packet of `len` bytes that was put [`behind`](Self::behind).
    pub(crate) fn packet_behind(&self, len: usize) -> &[u8] {
        let at = self.len - self.segment.map_or(0, |segment| segment.head_len);
        &self.frame[at..at + len]
    }

    /// Takes the packet in that was put behind, if it does go on with the stream; else it must be taken
    /// elsewhere before [`uncover`](Self::uncover).
    pub(crate) fn extend_in_place(&mut self, ethernet: &[u8; ETHERNET_LEN], len: usize) -> bool {
        let packet = self.packet_behind(len);
        let Some(next) = Segment::read(packet) else { return false };
        let intact = || next.is_intact(packet, sum(&packet[next.head_len..]));
        if !self.goes_on(ethernet, packet, next) || !intact() {
            return false;
        }
        self.uncover();
        self.grow(len - next.head_len, next);
        true
    }

    /// Puts back what the packet behind has covered.
    pub(crate) fn uncover(&mut self) {
        if let Some(segment) = self.segment {
            self.frame[self.len - segment.head_len..self.len].copy_from_slice(&self.covered[..segment.head_len]);
        }
    }

    /// Takes a packet in from elsewhere, if it is the next of the same stream from the same peer.
    pub(crate) fn extend(&mut self, ethernet: &[u8; ETHERNET_LEN], packet: &[u8]) -> bool {
        let Some(next) = Segment::read(packet) else { return false };
        if !self.goes_on(ethernet, packet, next) {
            return false;
        }
        let payload = &packet[next.head_len..];
        let payload_sum = copy_and_sum(&mut self.frame[self.len..self.len + payload.len()], payload);
        if !next.is_intact(packet, payload_sum) {
            return false;
        }
        self.grow(payload.len(), next);
        true
    }

    /// Whether a packet has the addresses and ports of this one, and comes from the same peer.
    pub(crate) fn is_of_stream(&self, ethernet: &[u8; ETHERNET_LEN], packet: &[u8]) -> bool {
        let held = &self.frame[HEAD_LEN..self.len];
        self.frame[VNET_LEN..HEAD_LEN] == *ethernet
            && held.len() >= 24
            && packet.len() >= 24
            && held[9] == packet[9]
            && held[12..24] == packet[12..24]
    }

    /// Whether a packet is the next of the same stream from the same peer.
    fn goes_on(&self, ethernet: &[u8; ETHERNET_LEN], packet: &[u8], next: Segment) -> bool {
        let Some(mine) = self.segment.filter(|_| !self.closed) else { return false };
        let held = &self.frame[HEAD_LEN..HEAD_LEN + mine.head_len];
        let (held_len, payload_len) = (self.len - HEAD_LEN, packet.len() - next.head_len);
        let shared = self.frame[VNET_LEN..HEAD_LEN] == *ethernet
            && next.protocol == mine.protocol
            && next.head_len == mine.head_len
            && payload_len <= self.size
            && held_len + payload_len <= PACKET_LEN_MAX
            // Type of service, time to live, addresses, ports.
            && held[1] == packet[1]
            && held[8] == packet[8]
            && held[12..24] == packet[12..24];
        if mine.protocol == PROTOCOL_UDP {
            return shared && self.count < UDP_SEGMENTS_MAX;
        }
        let expected = mine.sequence.wrapping_add(u32::try_from(held_len - mine.head_len).unwrap_or(0));
        shared
            && next.sequence == expected
            // Acknowledgement, window, options.
            && held[28..32] == packet[28..32]
            && held[34..36] == packet[34..36]
            && held[40..mine.head_len] == packet[40..next.head_len]
    }

    fn grow(&mut self, payload_len: usize, next: Segment) {
        self.len += payload_len;
        self.count += 1;
        self.closed = payload_len < self.size || next.flags & PSH != 0;
        if next.protocol == PROTOCOL_TCP {
            self.frame[HEAD_LEN + next.ip_len + 13] |= next.flags & PSH;
        }
    }

    /// The frame for the kernel.
    pub(crate) fn finish(&mut self) -> &[u8] {
        if let Some(segment) = self.segment.filter(|_| self.count > 1) {
            let packet = &mut self.frame[HEAD_LEN..self.len];
            let len = packet.len();
            write_len(packet, len);
            write_ipv4_checksum(packet, segment.ip_len);
            let udp = segment.protocol == PROTOCOL_UDP;
            if udp {
                let udp_len = u16::try_from(len - segment.ip_len).unwrap_or(u16::MAX);
                packet[segment.ip_len + 4..segment.ip_len + 6].copy_from_slice(&udp_len.to_be_bytes());
            }
            let at = segment.ip_len + segment.csum_offset();
            let partial = fold(pseudo_header(packet, segment.protocol, len - segment.ip_len));
            packet[at..at + 2].copy_from_slice(&partial.to_ne_bytes());
            let header = VnetHeader {
                flags: NEEDS_CSUM,
                gso_type: if udp { GSO_UDP_L4 } else { GSO_TCPV4 },
                gso_size: u16::try_from(self.size).unwrap_or(0),
                csum_start: u16::try_from(ETHERNET_LEN + segment.ip_len).unwrap_or(0),
                csum_offset: u16::try_from(segment.csum_offset()).unwrap_or(0),
            };
            header.write(&mut self.frame, ETHERNET_LEN + segment.head_len);
        }
        &self.frame[..self.len]
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ETHERNET: [u8; ETHERNET_LEN] = [2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 8, 0];

    /// A TCP packet with everything but its checksums.
    fn tcp(payload: &[u8], flags: u8) -> Vec<u8> {
        let mut packet = vec![0; 40];
        packet[0] = 0x45;
        packet[8] = 64;
        packet[9] = PROTOCOL_TCP;
        packet[12..20].copy_from_slice(&[10, 0, 1, 2, 10, 0, 1, 3]);
        packet[20..24].copy_from_slice(&[0x12, 0x34, 0, 80]);
        packet[24..28].copy_from_slice(&0xffff_ff00u32.to_be_bytes());
        packet[32] = 0x50;
        packet[33] = flags;
        packet.extend_from_slice(payload);
        let len = packet.len();
        write_len(&mut packet, len);
        write_ipv4_checksum(&mut packet, 20);
        packet
    }

    fn large(payload: &[u8], size: u16) -> (VnetHeader, Vec<u8>) {
        let header =
            VnetHeader { flags: NEEDS_CSUM, gso_type: GSO_TCPV4, gso_size: size, csum_start: 34, csum_offset: 16 };
        (header, tcp(payload, ACK))
    }

    fn begin(packet: &[u8]) -> Merged {
        let mut merged = Merged::with_room(2048);
        merged.room()[..packet.len()].copy_from_slice(packet);
        merged.begin(&ETHERNET, packet.len());
        merged
    }

    /// As what was opened right behind the stream.
    fn extend_in_place(merged: &mut Merged, ethernet: &[u8; ETHERNET_LEN], packet: &[u8]) -> bool {
        if !merged.cover(packet.len()) {
            return false;
        }
        merged.behind()[..packet.len()].copy_from_slice(packet);
        let taken = merged.extend_in_place(ethernet, packet.len());
        if !taken {
            assert_eq!(merged.packet_behind(packet.len()), packet);
            merged.uncover();
        }
        taken
    }

    fn udp(payload: &[u8]) -> Vec<u8> {
        let mut packet = tcp(&[], 0)[..UDP_HEAD_LEN].to_vec();
        packet[9] = PROTOCOL_UDP;
        packet.extend_from_slice(payload);
        let len = packet.len();
        write_len(&mut packet, len);
        write_ipv4_checksum(&mut packet, 20);
        packet[24..26].copy_from_slice(&u16::try_from(len - 20).unwrap().to_be_bytes());
        finish_transport(&mut packet, 20, UDP_HEAD_LEN, 20 + UDP_CSUM_OFFSET, sum(payload));
        packet
    }

    fn is_intact(packet: &[u8]) -> bool {
        Segment::read(packet).is_some_and(|segment| segment.is_intact(packet, sum(&packet[segment.head_len..])))
    }

    fn segments(header: VnetHeader, mut packet: Vec<u8>) -> Vec<Vec<u8>> {
        let mut out = Vec::new();
        segment(header, &mut packet, &mut [0; 2048], |part| out.push(part.to_vec()));
        out
    }

    proptest! {
        #[test]
        fn what_is_cut_comes_together_again(payload in proptest::collection::vec(any::<u8>(), 1..20_000), size in 100u16..1400) {
            let (header, packet) = large(&payload, size);
            let parts = segments(header, packet);
            prop_assert_eq!(parts.len(), payload.len().div_ceil(usize::from(size)));
            let mut merged = begin(&parts[0]);
            for (number, part) in parts[1..].iter().enumerate() {
                let taken = if number % 2 == 0 {
                    extend_in_place(&mut merged, &ETHERNET, part)
                } else {
                    merged.extend(&ETHERNET, part)
                };
                prop_assert!(taken, "a part has a right checksum and is the next");
            }
            let frame = merged.finish();
            prop_assert_eq!(&frame[HEAD_LEN + 40..], &payload[..]);
            if parts.len() > 1 {
                let header = VnetHeader::read(frame).unwrap();
                prop_assert_eq!(usize::from(header.gso_size), payload.len().min(usize::from(size)));
                prop_assert_eq!(segments(header, frame[HEAD_LEN..].to_vec()).len(), parts.len());
            }
        }

        #[test]
        fn no_frame_makes_it_stumble(frame in proptest::collection::vec(any::<u8>(), 0..200)) {
            if let Some(header) = VnetHeader::read(&frame) {
                let mut packet = frame.get(HEAD_LEN..).unwrap_or_default().to_vec();
                segment(header, &mut packet, &mut [0; 2048], |_| {});
            }
            let mut merged = begin(&frame);
            merged.extend(&ETHERNET, &frame);
            extend_in_place(&mut merged, &ETHERNET, &frame);
            merged.finish();
        }
    }

    #[test]
    fn only_the_next_of_the_same_stream_is_taken_in() {
        let parts = {
            let (header, packet) = large(&[7; 3000], 1000);
            segments(header, packet)
        };
        let mut merged = begin(&parts[0]);
        let mut other = parts[1].clone();
        other[21] ^= 1;
        let mut damaged = parts[1].clone();
        damaged[100] ^= 1;
        let mut peer = ETHERNET;
        peer[11] = 9;
        for extend in [Merged::extend, extend_in_place as fn(&mut Merged, &[u8; ETHERNET_LEN], &[u8]) -> bool] {
            assert!(!extend(&mut merged, &ETHERNET, &parts[2]), "one is missing");
            assert!(!extend(&mut merged, &ETHERNET, &other), "another port, and so a wrong checksum");
            assert!(!extend(&mut merged, &ETHERNET, &damaged), "damaged");
            assert!(!extend(&mut merged, &peer, &parts[1]), "another peer");
        }
        assert!(extend_in_place(&mut merged, &ETHERNET, &parts[1]));
        assert!(merged.extend(&ETHERNET, &parts[2]));
        let frame = merged.finish();
        assert_eq!(&frame[HEAD_LEN + 40..], &[7; 3000], "what did not fit has left no trace");
    }

    #[test]
    fn datagrams_of_one_size_become_one_frame() {
        let mut merged = begin(&udp(&[1; 500]));
        assert!(extend_in_place(&mut merged, &ETHERNET, &udp(&[2; 500])));
        assert!(!extend_in_place(&mut merged, &ETHERNET, &udp(&[3; 501])), "a longer one");
        let mut bare = udp(&[3; 500]);
        bare[26..28].fill(0);
        assert!(!extend_in_place(&mut merged, &ETHERNET, &bare), "one without a checksum");
        assert!(merged.extend(&ETHERNET, &udp(&[3; 100])), "the last one may be shorter");
        assert!(!merged.extend(&ETHERNET, &udp(&[4; 100])), "and is the last");
        let frame = merged.finish().to_vec();
        let parts = segments(VnetHeader::read(&frame).unwrap(), frame[HEAD_LEN..].to_vec());
        let payloads: Vec<_> = parts.iter().map(|part| (part[28], part.len() - 28)).collect();
        assert_eq!(payloads, [(1, 500), (2, 500), (3, 100)]);
        assert!(parts.iter().all(|part| is_intact(part)));
    }

    #[test]
    fn an_unfinished_checksum_is_finished() {
        let mut packet = tcp(&[1, 2, 3], ACK);
        let len = packet.len();
        let partial = fold(pseudo_header(&packet, PROTOCOL_TCP, len - 20));
        packet[36..38].copy_from_slice(&partial.to_ne_bytes());
        let header = VnetHeader { flags: NEEDS_CSUM, csum_start: 34, csum_offset: 16, ..VnetHeader::default() };
        let parts = segments(header, packet);
        assert!(is_intact(&parts[0]), "its checksum is right");
    }
}
