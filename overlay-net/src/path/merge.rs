//! Packets that came out of a tunnel one by one, put together again for the kernel: each large packet
//! saved is a trip through its stack saved.

use std::ops::Range;

use super::frame::{
    ACK, ETHERNET_LEN, GSO_TCPV4, GSO_TCPV6, GSO_UDP_L4, HEAD_LEN, IPV6_LEN, NEEDS_CSUM, PACKET_LEN_MAX, PROTOCOL_TCP,
    PROTOCOL_UDP, PSH, Sum, TCP_CSUM_OFFSET, UDP_CSUM_OFFSET, VNET_LEN, VnetHeader, address_range, copy_and_sum, fold,
    ip_header_len, is_ipv6, protocol, pseudo_header, sum, u16_at, write_ipv4_checksum, write_len,
};

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
const SEGMENT_HEAD_LEN_MAX: usize = 100;
const UDP_LEN: usize = 8;
/// Both ports.
const PORTS_LEN: usize = 4;
/// Datagrams in one frame; the kernel takes no more.
const UDP_SEGMENTS_MAX: usize = 64;

impl Segment {
    /// Reads a segment that may be put together with others: plain data, or a datagram. Whether its
    /// checksum is right shows when it is taken in.
    pub(crate) fn read(packet: &[u8]) -> Option<Self> {
        let ip_len = ip_header_len(packet)?;
        // Fragments of IPv6 say so in place of the protocol.
        let whole = if is_ipv6(packet) {
            u16_at(packet, 4) + IPV6_LEN == packet.len()
        } else {
            ip_len == 20 && u16_at(packet, 6) & 0x3fff == 0 && u16_at(packet, 2) == packet.len()
        };
        if !whole {
            return None;
        }
        match protocol(packet) {
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
        let sequence = u32::from_be_bytes(*packet.get(ip_len + 4..)?.first_chunk()?);
        Some(Self { protocol: PROTOCOL_TCP, head_len, ip_len, sequence, flags })
    }

    fn read_udp(packet: &[u8], ip_len: usize) -> Option<Self> {
        let head_len = ip_len + UDP_LEN;
        let whole = packet.len() > head_len && u16_at(packet, ip_len + 4) == packet.len() - ip_len;
        // Zero stands for "none": one that is put together with others would be given one.
        let has_checksum = whole && u16_at(packet, ip_len + UDP_CSUM_OFFSET) != 0;
        has_checksum.then_some(Self { protocol: PROTOCOL_UDP, head_len, ip_len, sequence: 0, flags: 0 })
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
        let addresses = address_range(packet);
        let ends = addresses.start..addresses.end + PORTS_LEN;
        // Ethernet's header tells IPv4 from IPv6.
        self.frame[VNET_LEN..HEAD_LEN] == *ethernet
            && held.len() >= ends.end
            && packet.len() >= ends.end
            && protocol(held) == protocol(packet)
            && held[ends.clone()] == packet[ends]
    }

    /// Whether a packet is the next of the same stream from the same peer.
    fn goes_on(&self, ethernet: &[u8; ETHERNET_LEN], packet: &[u8], next: Segment) -> bool {
        let Some(mine) = self.segment.filter(|_| !self.closed) else { return false };
        let held = &self.frame[HEAD_LEN..HEAD_LEN + mine.head_len];
        let (held_len, payload_len) = (self.len - HEAD_LEN, packet.len() - next.head_len);
        let same = |range: Range<usize>| held[range.clone()] == packet[range];
        let shared = self.is_of_stream(ethernet, packet)
            && next.head_len == mine.head_len
            && payload_len <= self.size
            && held_len + payload_len <= PACKET_LEN_MAX
            // Version, class and flow, hop limit; or type of service, time to live.
            && if is_ipv6(packet) { same(0..4) && same(7..8) } else { same(1..2) && same(8..9) };
        if mine.protocol == PROTOCOL_UDP {
            return shared && self.count < UDP_SEGMENTS_MAX;
        }
        let expected = mine.sequence.wrapping_add(u32::try_from(held_len - mine.head_len).unwrap_or(0));
        shared
            && next.sequence == expected
            // Acknowledgement, window, options.
            && same(next.ip_len + 8..next.ip_len + 12)
            && same(next.ip_len + 14..next.ip_len + 16)
            && same(next.ip_len + 20..next.head_len)
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
            let v6 = is_ipv6(packet);
            if !v6 {
                write_ipv4_checksum(packet, segment.ip_len);
            }
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
                gso_type: if udp {
                    GSO_UDP_L4
                } else if v6 {
                    GSO_TCPV6
                } else {
                    GSO_TCPV4
                },
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

    use super::super::frame::{finish_transport, segment};
    use super::*;

    const ETHERNET: [u8; ETHERNET_LEN] = [2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 8, 0];

    /// The version of IP that a packet is made of.
    #[derive(Clone, Copy, Debug)]
    enum Version {
        V4,
        V6,
    }
    use Version::{V4, V6};

    impl Version {
        const fn ip_len(self) -> usize {
            match self {
                V4 => 20,
                V6 => IPV6_LEN,
            }
        }
    }

    /// A packet with nothing behind its ports.
    fn ip(version: Version, protocol: u8, head_len: usize) -> Vec<u8> {
        let ip_len = version.ip_len();
        let mut packet = vec![0; ip_len + head_len];
        match version {
            V4 => {
                packet[0] = 0x45;
                packet[8] = 64;
                packet[9] = protocol;
                packet[12..20].copy_from_slice(&[10, 0, 1, 2, 10, 0, 1, 3]);
            }
            V6 => {
                packet[0] = 0x60;
                packet[6] = protocol;
                packet[7] = 64;
                packet[8] = 0xfd;
                packet[23] = 2;
                packet[24] = 0xfd;
                packet[39] = 3;
            }
        }
        packet[ip_len..ip_len + PORTS_LEN].copy_from_slice(&[0x12, 0x34, 0, 80]);
        packet
    }

    fn finish_ip(version: Version, packet: &mut [u8]) {
        write_len(packet, packet.len());
        if matches!(version, V4) {
            write_ipv4_checksum(packet, 20);
        }
    }

    /// A TCP packet with everything but its checksum.
    fn tcp(version: Version, payload: &[u8], flags: u8) -> Vec<u8> {
        let ip_len = version.ip_len();
        let mut packet = ip(version, PROTOCOL_TCP, 20);
        packet[ip_len + 4..ip_len + 8].copy_from_slice(&0xffff_ff00u32.to_be_bytes());
        packet[ip_len + 12] = 0x50;
        packet[ip_len + 13] = flags;
        packet.extend_from_slice(payload);
        finish_ip(version, &mut packet);
        packet
    }

    fn large(version: Version, payload: &[u8], size: u16) -> (VnetHeader, Vec<u8>) {
        let gso_type = if matches!(version, V4) { GSO_TCPV4 } else { GSO_TCPV6 };
        let csum_start = u16::try_from(ETHERNET_LEN + version.ip_len()).unwrap();
        let header = VnetHeader { flags: NEEDS_CSUM, gso_type, gso_size: size, csum_start, csum_offset: 16 };
        (header, tcp(version, payload, ACK))
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

    fn udp(version: Version, payload: &[u8]) -> Vec<u8> {
        let ip_len = version.ip_len();
        let mut packet = ip(version, PROTOCOL_UDP, UDP_LEN);
        packet.extend_from_slice(payload);
        finish_ip(version, &mut packet);
        let len = u16::try_from(packet.len() - ip_len).unwrap();
        packet[ip_len + 4..ip_len + 6].copy_from_slice(&len.to_be_bytes());
        finish_transport(&mut packet, PROTOCOL_UDP, ip_len..ip_len + UDP_LEN, sum(payload));
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
        fn what_is_cut_comes_together_again(
            payload in proptest::collection::vec(any::<u8>(), 1..20_000),
            size in 100u16..1400,
            version in prop_oneof![Just(V4), Just(V6)],
        ) {
            let (header, packet) = large(version, &payload, size);
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
            prop_assert_eq!(&frame[HEAD_LEN + version.ip_len() + 20..], &payload[..]);
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

    #[track_caller]
    fn check_stream(version: Version) {
        let ip_len = version.ip_len();
        let parts = {
            let (header, packet) = large(version, &[7; 3000], 1000);
            segments(header, packet)
        };
        let mut merged = begin(&parts[0]);
        let mut other = parts[1].clone();
        other[ip_len + 1] ^= 1;
        let mut damaged = parts[1].clone();
        damaged[ip_len + 80] ^= 1;
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
        assert_eq!(&frame[HEAD_LEN + ip_len + 20..], &[7; 3000], "what did not fit has left no trace");
    }

    #[test]
    fn only_the_next_of_the_same_stream_is_taken_in() {
        check_stream(V4);
        check_stream(V6);
    }

    #[track_caller]
    fn check_datagrams(version: Version) {
        let (udp, payload_at) = (|payload: &[u8]| udp(version, payload), version.ip_len() + UDP_LEN);
        let mut merged = begin(&udp(&[1; 500]));
        assert!(extend_in_place(&mut merged, &ETHERNET, &udp(&[2; 500])));
        assert!(!extend_in_place(&mut merged, &ETHERNET, &udp(&[3; 501])), "a longer one");
        let mut bare = udp(&[3; 500]);
        bare[payload_at - 2..payload_at].fill(0);
        assert!(!extend_in_place(&mut merged, &ETHERNET, &bare), "one without a checksum");
        assert!(merged.extend(&ETHERNET, &udp(&[3; 100])), "the last one may be shorter");
        assert!(!merged.extend(&ETHERNET, &udp(&[4; 100])), "and is the last");
        let frame = merged.finish().to_vec();
        let parts = segments(VnetHeader::read(&frame).unwrap(), frame[HEAD_LEN..].to_vec());
        let payloads: Vec<_> = parts.iter().map(|part| (part[payload_at], part.len() - payload_at)).collect();
        assert_eq!(payloads, [(1, 500), (2, 500), (3, 100)]);
        assert!(parts.iter().all(|part| is_intact(part)));
    }

    #[test]
    fn datagrams_of_one_size_become_one_frame() {
        check_datagrams(V4);
        check_datagrams(V6);
    }

    #[track_caller]
    fn check_unfinished(version: Version) {
        let ip_len = version.ip_len();
        let mut packet = tcp(version, &[1, 2, 3], ACK);
        let partial = fold(pseudo_header(&packet, PROTOCOL_TCP, packet.len() - ip_len));
        packet[ip_len + 16..ip_len + 18].copy_from_slice(&partial.to_ne_bytes());
        let csum_start = u16::try_from(ETHERNET_LEN + ip_len).unwrap();
        let header = VnetHeader { flags: NEEDS_CSUM, csum_start, csum_offset: 16, ..VnetHeader::default() };
        assert!(is_intact(&segments(header, packet)[0]), "its checksum is right");
    }

    #[test]
    fn an_unfinished_checksum_is_finished() {
        check_unfinished(V4);
        check_unfinished(V6);
    }

    #[test]
    fn what_ipv6_has_before_a_segment_is_of_every_part() {
        let (mut header, mut packet) = large(V6, &[7; 3000], 1000);
        // Hop-by-hop options (RFC 8200 §4.3) of eight bytes, then TCP.
        packet[6] = 0;
        packet.splice(IPV6_LEN..IPV6_LEN, [PROTOCOL_TCP, 0, 1, 4, 0, 0, 0, 0]);
        header.csum_start += 8;
        let parts = segments(header, packet);
        assert_eq!(parts.len(), 3);
        for part in &parts {
            assert_eq!((part[6], part[IPV6_LEN], part.len()), (0, PROTOCOL_TCP, 48 + 20 + 1000));
            let total = pseudo_header(part, PROTOCOL_TCP, part.len() - 48) + sum(&part[48..]);
            assert_eq!(fold(total), u16::MAX);
        }
    }
}
