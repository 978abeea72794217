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

/// A packet of a TCP stream, as far as putting it together with its neighbours needs it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Segment {
    head_len: usize,
    ip_len: usize,
    sequence: u32,
    flags: u8,
}

impl Segment {
    /// Reads a TCP segment that may be put together with others: plain data. Whether its checksum is
    /// right shows when it is copied.
    pub(crate) fn read(packet: &[u8]) -> Option<Self> {
        let ip_len = ipv4_header_len(packet)?;
        let fragment = u16_at(packet, 6) & 0x3fff;
        if packet[9] != PROTOCOL_TCP || ip_len != 20 || fragment != 0 || u16_at(packet, 2) != packet.len() {
            return None;
        }
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
        Some(Self { head_len, ip_len, sequence, flags })
    }

    fn is_intact(&self, packet: &[u8], payload_sum: Sum) -> bool {
        let pseudo = pseudo_header(packet, PROTOCOL_TCP, packet.len() - self.ip_len);
        fold(pseudo + sum(&packet[self.ip_len..self.head_len]) + payload_sum) == u16::MAX
    }
}

/// One frame for the kernel that grows while further segments fit behind it.
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
}

impl Merged {
    pub(crate) fn with_room() -> Self {
        let frame = vec![0; HEAD_LEN + PACKET_LEN_MAX].into_boxed_slice();
        Self { frame, len: 0, segment: None, size: 0, count: 0, closed: false }
    }

    /// Begins with a packet, which is `segment` if that may grow. A packet that is too long for the
    /// kernel is left out.
    pub(crate) fn begin(&mut self, ethernet: &[u8; ETHERNET_LEN], packet: &[u8], segment: Option<Segment>) {
        self.len = 0;
        let Some(room) = self.frame.get_mut(HEAD_LEN..HEAD_LEN + packet.len()) else { return };
        let head_len = segment.map_or(packet.len(), |segment| segment.head_len);
        room[..head_len].copy_from_slice(&packet[..head_len]);
        let payload_sum = copy_and_sum(&mut room[head_len..], &packet[head_len..]);
        self.frame[..VNET_LEN].fill(0);
        self.frame[VNET_LEN..HEAD_LEN].copy_from_slice(ethernet);
        self.len = HEAD_LEN + packet.len();
        self.segment = segment.filter(|segment| segment.is_intact(packet, payload_sum));
        self.size = packet.len() - head_len;
        self.count = 1;
        self.closed = self.segment.is_none_or(|segment| segment.flags & PSH != 0);
    }

    /// Takes a packet in, if it is the next of the same stream from the same peer.
    pub(crate) fn extend(&mut self, ethernet: &[u8; ETHERNET_LEN], packet: &[u8], next: Segment) -> bool {
        let Some(mine) = self.segment.filter(|_| !self.closed) else { return false };
        let held = &self.frame[HEAD_LEN..self.len];
        let payload_len = packet.len() - next.head_len;
        let expected = mine.sequence.wrapping_add(u32::try_from(held.len() - mine.head_len).unwrap_or(0));
        let same = self.frame[VNET_LEN..HEAD_LEN] == *ethernet
            && next.head_len == mine.head_len
            && next.sequence == expected
            && payload_len <= self.size
            && held.len() + payload_len <= PACKET_LEN_MAX
            // Type of service, time to live, addresses, ports, acknowledgement, window, options.
            && held[1] == packet[1]
            && held[8] == packet[8]
            && held[12..24] == packet[12..24]
            && held[28..32] == packet[28..32]
            && held[34..36] == packet[34..36]
            && held[40..mine.head_len] == packet[40..next.head_len];
        if !same {
            return false;
        }
        let end = self.len + payload_len;
        let payload_sum = copy_and_sum(&mut self.frame[self.len..end], &packet[next.head_len..]);
        if !next.is_intact(packet, payload_sum) {
            return false;
        }
        self.len = end;
        self.count += 1;
        self.closed = payload_len < self.size || next.flags & PSH != 0;
        self.frame[HEAD_LEN + mine.ip_len + 13] |= next.flags & PSH;
        true
    }

    /// The frame for the kernel.
    pub(crate) fn finish(&mut self) -> &[u8] {
        if let Some(segment) = self.segment.filter(|_| self.count > 1) {
            let packet = &mut self.frame[HEAD_LEN..self.len];
            let len = packet.len();
            write_len(packet, len);
            write_ipv4_checksum(packet, segment.ip_len);
            let at = segment.ip_len + TCP_CSUM_OFFSET;
            let partial = fold(pseudo_header(packet, PROTOCOL_TCP, len - segment.ip_len));
            packet[at..at + 2].copy_from_slice(&partial.to_ne_bytes());
            let header = VnetHeader {
                flags: NEEDS_CSUM,
                gso_type: GSO_TCPV4,
                gso_size: u16::try_from(self.size).unwrap_or(0),
                csum_start: u16::try_from(ETHERNET_LEN + segment.ip_len).unwrap_or(0),
                csum_offset: u16::try_from(TCP_CSUM_OFFSET).unwrap_or(0),
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

    fn extend(merged: &mut Merged, ethernet: &[u8; ETHERNET_LEN], packet: &[u8]) -> bool {
        Segment::read(packet).is_some_and(|next| merged.extend(ethernet, packet, next))
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
            let mut merged = Merged::with_room();
            merged.begin(&ETHERNET, &parts[0], Segment::read(&parts[0]));
            for part in &parts[1..] {
                prop_assert!(extend(&mut merged, &ETHERNET, part), "a part has a right checksum and is the next");
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
            let mut merged = Merged::with_room();
            merged.begin(&ETHERNET, &frame, Segment::read(&frame));
            extend(&mut merged, &ETHERNET, &frame);
            merged.finish();
        }
    }

    #[test]
    fn only_the_next_of_the_same_stream_is_taken_in() {
        let parts = {
            let (header, packet) = large(&[7; 3000], 1000);
            segments(header, packet)
        };
        let mut merged = Merged::with_room();
        merged.begin(&ETHERNET, &parts[0], Segment::read(&parts[0]));
        assert!(!extend(&mut merged, &ETHERNET, &parts[2]), "one is missing");
        let mut other = parts[1].clone();
        other[21] ^= 1;
        assert!(!extend(&mut merged, &ETHERNET, &other), "another port, and so a wrong checksum");
        let mut damaged = parts[1].clone();
        damaged[100] ^= 1;
        assert!(!extend(&mut merged, &ETHERNET, &damaged), "damaged");
        let mut peer = ETHERNET;
        peer[11] = 9;
        assert!(!extend(&mut merged, &peer, &parts[1]), "another peer");
        assert!(extend(&mut merged, &ETHERNET, &parts[1]));
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
