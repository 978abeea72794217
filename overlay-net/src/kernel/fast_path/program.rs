//! The programs of the fast path, and how what they look up is laid out.
//!
//! A *flow* is what a container here and one of another node say to each other from one port to another. Packets of flows
//! that are known are handed on at once; all others pass through the rules, and so do those that begin or end a
//! connection. A flow is learnt where its packet leaves for the other node, behind the rules: from a container's own
//! address to one that some other node has in the same network, and translated by nobody on the way. For that, the
//! packet is marked with its port before it meets them. (What leaves for a virtual address is not marked: its answers have
//! to be translated back. And the kernel changes the port of a connection where another has the same that was
//! translated, which is no reason to refuse it, but to let it take the long way.)
//!
//! Each flow has the epoch in which it was learnt: nothing that was taken from what it was made of, before the epoch
//! changed, is used after it. And it is known for so long that the kernel has not forgotten it either in the meantime.

use std::net::IpAddr;

use skep_api::NetworkId;

use super::assembler::{Assembler, FRAME, Helper, R0, R1, R2, R3, R4, R5, R6, R7, R8, R9, Reg, When, Width};

/// Of a packet, as a program sees it (`struct __sk_buff`).
mod packet {
    pub(super) const LEN: i16 = 0;
    pub(super) const MARK: i16 = 8;
    pub(super) const PROTOCOL: i16 = 16;
    /// By which link it came in.
    pub(super) const CAME_BY: i16 = 36;
    pub(super) const LINK: i16 = 40;
    pub(super) const DATA: i16 = 76;
    pub(super) const DATA_END: i16 = 80;
    /// Of a packet that is to be cut; zero of any other.
    pub(super) const SEGMENT_LEN: i16 = 176;
}

/// Of frames.
const ETHER_LEN: i16 = 14;
const IPV4_LEN: i16 = 20;
const IPV6_LEN: i16 = 40;
const TCP: i32 = 6;
const UDP: i32 = 17;
/// In TCP's flags: what begins or ends a connection (RFC 9293 §3.1).
const FIN_SYN_RST: i32 = 0x07;

/// On packets of flows that are not known yet: above their port.
const MARK: i32 = 0x736b_0000;
/// How long a flow is known, in units of 2^30 ns: less than the kernel remembers datagrams without an answer, which is
/// 30 s.
const KNOWN_FOR: i32 = 18;
const KNOWN_UNIT: i32 = 30;

pub(super) const LOCAL_KEY_LEN: usize = 24;
pub(super) const LOCAL_LEN: usize = 8;
pub(super) const REMOTE_KEY_LEN: usize = 16;
pub(super) const REMOTE_LEN: usize = 48;
pub(super) const FLOW_KEY_LEN: usize = 40;
pub(super) const FLOW_LEN: usize = 56;

/// What a container has: by its link and its address, the network.
pub(super) fn local_key(link: u32, address: IpAddr) -> [u8; LOCAL_KEY_LEN] {
    let mut key = [0; LOCAL_KEY_LEN];
    key[..4].copy_from_slice(&link.to_ne_bytes());
    key[8..].copy_from_slice(&remote_key(address));
    key
}

pub(super) fn local(network: NetworkId) -> [u8; LOCAL_LEN] {
    let bytes = network.to_bytes();
    // It is random throughout: half of it tells one from another.
    std::array::from_fn(|at| bytes[at + LOCAL_LEN])
}

/// An address of either family.
pub(super) fn remote_key(address: IpAddr) -> [u8; REMOTE_KEY_LEN] {
    match address {
        IpAddr::V4(address) => address.to_ipv6_mapped().octets(),
        IpAddr::V6(address) => address.octets(),
    }
}

/// How an address of another node's is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Remote {
    pub(super) network: NetworkId,
    /// The link to other nodes, and whom to send to on it.
    pub(super) link: u32,
    pub(super) next_hop: IpAddr,
    pub(super) mtu_bytes: u32,
    /// Whether what has no connection takes the long way out: it does not wait for those who are to carry it, and what
    /// hands more to them than they can carry leaves them no time to.
    pub(super) connections_only: bool,
}

impl Remote {
    /// In words of the kernel: the network, the link, the longest frame, the longest segment, whether connections
    /// alone, and the next hop with its family (`struct bpf_redir_neigh`).
    pub(super) fn bytes(&self) -> [u8; REMOTE_LEN] {
        let (family, headers_len) = match self.next_hop {
            IpAddr::V4(_) => (libc::AF_INET, 40),
            IpAddr::V6(_) => (libc::AF_INET6, 60),
        };
        let frame_len = self.mtu_bytes + ETHER_LEN.unsigned_abs() as u32;
        let segment_len = self.mtu_bytes.saturating_sub(headers_len);
        let words = [self.link, frame_len, segment_len, self.connections_only.into(), family.cast_unsigned()];
        let mut bytes = [0; REMOTE_LEN];
        bytes[..8].copy_from_slice(&local(self.network));
        for (word, to) in words.iter().zip(bytes[8..28].chunks_exact_mut(4)) {
            to.copy_from_slice(&word.to_ne_bytes());
        }
        match self.next_hop {
            IpAddr::V4(hop) => bytes[28..32].copy_from_slice(&hop.octets()),
            IpAddr::V6(hop) => bytes[28..44].copy_from_slice(&hop.octets()),
        }
        bytes
    }
}

/// In a remote, and in a flow, which is a copy of one with the epoch in place of the network, and behind it the
/// container's link and when it was learnt.
const EPOCH: i16 = 0;
const OUT: i16 = 8;
const FRAME_LEN: i16 = 12;
const SEGMENT_LEN: i16 = 16;
/// Of a flow: whether its packets take the long way out.
const CONNECTIONS_ONLY: i16 = 20;
const NEXT_HOP: i16 = 24;
const LINK: i16 = 44;
const LEARNT: i16 = 48;
const NEXT_HOP_LEN: i16 = 20;

/// A program's own memory.
const KEY: i16 = -(FLOW_KEY_LEN as i16);
const KEY_LOCAL: i16 = KEY;
const KEY_REMOTE: i16 = KEY + 16;
const KEY_PORTS: i16 = KEY + 32;
const KEY_PROTOCOL: i16 = KEY + 36;
const LOCAL_KEY: i16 = KEY - LOCAL_KEY_LEN as i16;
const FLOW: i16 = LOCAL_KEY - FLOW_LEN as i16;

/// The maps, by the numbers that programs know them by.
#[derive(Clone, Copy, Debug)]
pub(super) struct Maps {
    pub(super) locals: i32,
    pub(super) remotes: i32,
    pub(super) flows: i32,
    pub(super) epoch: i32,
}

/// Where packets go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// From a container here.
    Out,
    /// To one.
    In,
}

/// Sees what leaves a container: hands packets of flows to the link that leads to the other node, and marks what may
/// become one.
pub(super) fn leaving(maps: Maps) -> Vec<u64> {
    let mut code = Assembler::default();
    read(&mut code, Way::Out);
    find(&mut code, maps, "unknown");
    // One who uses another's address is no part of its flow.
    same(&mut code, LINK, packet::LINK, "unknown");
    code.load(Width::Word, R1, R7, CONNECTIONS_ONLY);
    code.jump_if(R1, When::Different, 0, "pass");
    code.load(Width::Word, R1, R6, packet::SEGMENT_LEN);
    code.jump_if(R1, When::Equal, 0, "whole");
    code.load(Width::Word, R2, R7, SEGMENT_LEN);
    code.jump_if_reg(R1, When::Greater, R2, "pass");
    code.jump("go");
    code.place("whole");
    code.load(Width::Word, R1, R6, packet::LEN);
    code.load(Width::Word, R2, R7, FRAME_LEN);
    code.jump_if_reg(R1, When::Greater, R2, "pass");
    code.place("go");
    code.load(Width::Word, R1, R7, OUT);
    code.copy(R2, R7);
    code.add(R2, NEXT_HOP.into());
    code.set(R3, NEXT_HOP_LEN.into());
    code.set(R4, 0);
    code.call(Helper::RedirectToNeighbour);
    code.exit();

    code.place("unknown");
    look_up(&mut code, maps.remotes, KEY_REMOTE);
    code.jump_if(R0, When::Equal, 0, "pass");
    mark(&mut code);
    code.store(Width::Word, R6, packet::MARK, R2);
    pass(&mut code);
    code.finish()
}

/// Sees what leaves for other nodes, behind the rules: learns flows.
pub(super) fn learning(maps: Maps) -> Vec<u64> {
    let mut code = Assembler::default();
    read(&mut code, Way::Out);
    code.load(Width::Word, R1, R6, packet::MARK);
    mark(&mut code);
    code.jump_if_reg(R1, When::Different, R2, "pass");
    code.set(R1, 0);
    code.store(Width::Word, R6, packet::MARK, R1);
    note_epoch(&mut code, maps);
    learn(&mut code, maps);
    pass(&mut code);
    code.finish()
}

/// Sees what comes in from other nodes: hands packets of flows to their containers.
pub(super) fn arriving(maps: Maps) -> Vec<u64> {
    let mut code = Assembler::default();
    read(&mut code, Way::In);
    find(&mut code, maps, "pass");
    // What belongs into a tunnel comes out of it, or not at all.
    same(&mut code, OUT, packet::LINK, "pass");
    code.load(Width::Word, R1, R7, LINK);
    code.set(R2, 0);
    code.call(Helper::RedirectToPeer);
    code.exit();
    pass(&mut code);
    code.finish()
}

/// Takes the epoch into the flow in the making.
fn note_epoch(code: &mut Assembler, maps: Maps) {
    code.map_value(R1, maps.epoch);
    code.load(Width::Double, R1, R1, 0);
    code.store(Width::Double, FRAME, FLOW + EPOCH, R1);
}

/// Goes on only with a flow that is known, in `R7`.
fn find(code: &mut Assembler, maps: Maps, otherwise: &'static str) {
    note_epoch(code, maps);
    look_up(code, maps.flows, KEY);
    code.jump_if(R0, When::Equal, 0, otherwise);
    code.copy(R7, R0);
    code.load(Width::Double, R1, R7, EPOCH);
    code.load(Width::Double, R2, FRAME, FLOW + EPOCH);
    code.jump_if_reg(R1, When::Different, R2, otherwise);
    code.call(Helper::CoarseTime);
    code.load(Width::Double, R1, R7, LEARNT);
    code.subtract(R0, R1);
    code.shift_right(R0, KNOWN_UNIT);
    code.jump_if(R0, When::Greater, KNOWN_FOR, otherwise);
}

/// The mark of the packet whose flow was read, in `R2`.
fn mark(code: &mut Assembler) {
    code.load(Width::Half, R2, FRAME, KEY_PORTS);
    code.add(R2, MARK);
}

/// Goes on only if a word of a flow's is one of the packet's.
fn same(code: &mut Assembler, at: i16, of_packet: i16, otherwise: &'static str) {
    code.load(Width::Word, R1, R7, at);
    code.load(Width::Word, R2, R6, of_packet);
    code.jump_if_reg(R1, When::Different, R2, otherwise);
}

/// Leaves the packet to whatever sees it next.
fn pass(code: &mut Assembler) {
    /// `TCX_NEXT`
    const NEXT: i32 = -1;
    code.place("pass");
    code.set(R0, NEXT);
    code.exit();
}

/// Reads the packet's addresses and ports as a flow's key. From here on `R6` is the packet, and `R9` its protocol.
fn read(code: &mut Assembler, way: Way) {
    code.copy(R6, R1);
    code.load(Width::Word, R7, R6, packet::DATA);
    code.load(Width::Word, R8, R6, packet::DATA_END);
    code.load(Width::Word, R1, R6, packet::PROTOCOL);
    let ether_type = |number: u16| i32::from(number.to_be());
    code.jump_if(R1, When::Equal, ether_type(0x0800), "ipv4");
    code.jump_if(R1, When::Equal, ether_type(0x86dd), "ipv6");
    code.jump("pass");
    let (from, to) = match way {
        Way::Out => (KEY_LOCAL, KEY_REMOTE),
        Way::In => (KEY_REMOTE, KEY_LOCAL),
    };

    code.place("ipv4");
    within(code, R7, ETHER_LEN + IPV4_LEN + 8);
    code.load(Width::Byte, R1, R7, ETHER_LEN);
    // Without options, and whole.
    code.jump_if(R1, When::Different, 0x45, "pass");
    code.load(Width::Half, R1, R7, ETHER_LEN + 6);
    code.jump_if(R1, When::AnyOf, i32::from(0x3fff_u16.to_be()), "pass");
    code.load(Width::Byte, R9, R7, ETHER_LEN + 9);
    for (key, at) in [(from, 12), (to, 16)] {
        code.store_value(Width::Double, FRAME, key, 0);
        code.store_value(Width::Word, FRAME, key + 8, 0x0000_ffff_u32.to_be().cast_signed());
        code.load(Width::Word, R1, R7, ETHER_LEN + at);
        code.store(Width::Word, FRAME, key + 12, R1);
    }
    code.copy(R5, R7);
    code.add(R5, (ETHER_LEN + IPV4_LEN).into());
    code.jump("ports");

    code.place("ipv6");
    within(code, R7, ETHER_LEN + IPV6_LEN + 8);
    // Whatever stands between the addresses and the ports is none of these.
    code.load(Width::Byte, R9, R7, ETHER_LEN + 6);
    for (key, at) in [(from, 8), (to, 24)] {
        for word in [0, 4, 8, 12] {
            code.load(Width::Word, R1, R7, ETHER_LEN + at + word);
            code.store(Width::Word, FRAME, key + word, R1);
        }
    }
    code.copy(R5, R7);
    code.add(R5, (ETHER_LEN + IPV6_LEN).into());

    code.place("ports");
    code.load(Width::Word, R4, R5, 0);
    code.jump_if(R9, When::Equal, UDP, "keyed");
    code.jump_if(R9, When::Different, TCP, "pass");
    within(code, R5, 14);
    code.load(Width::Byte, R1, R5, 13);
    code.jump_if(R1, When::AnyOf, FIN_SYN_RST, "pass");

    code.place("keyed");
    if way == Way::In {
        code.swap_halves(R4, R3);
    }
    code.store(Width::Word, FRAME, KEY_PORTS, R4);
    code.store(Width::Word, FRAME, KEY_PROTOCOL, R9);
}

/// Goes on only if the packet has `len` bytes at hand from where a register leads.
fn within(code: &mut Assembler, start: Reg, len: i16) {
    code.copy(R1, start);
    code.add(R1, len.into());
    code.jump_if_reg(R1, When::Greater, R8, "pass");
}

fn look_up(code: &mut Assembler, map: i32, key: i16) {
    code.map(R1, map);
    code.copy(R2, FRAME);
    code.add(R2, key.into());
    code.call(Helper::MapLookup);
}

/// Learns the flow, if it is one.
fn learn(code: &mut Assembler, maps: Maps) {
    code.load(Width::Word, R1, R6, packet::CAME_BY);
    code.store(Width::Word, FRAME, LOCAL_KEY, R1);
    code.store(Width::Word, FRAME, FLOW + LINK, R1);
    code.store_value(Width::Word, FRAME, LOCAL_KEY + 4, 0);
    for word in [0, 8] {
        code.load(Width::Double, R1, FRAME, KEY_LOCAL + word);
        code.store(Width::Double, FRAME, LOCAL_KEY + 8 + word, R1);
    }
    look_up(code, maps.locals, LOCAL_KEY);
    code.jump_if(R0, When::Equal, 0, "pass");
    code.load(Width::Double, R7, R0, 0);
    look_up(code, maps.remotes, KEY_REMOTE);
    code.jump_if(R0, When::Equal, 0, "pass");
    code.load(Width::Double, R1, R0, 0);
    code.jump_if_reg(R1, When::Different, R7, "pass");
    for word in (OUT..LINK).step_by(size_of::<u32>()) {
        code.load(Width::Word, R1, R0, word);
        code.store(Width::Word, FRAME, FLOW + word, R1);
    }
    code.load(Width::Word, R1, R0, CONNECTIONS_ONLY);
    code.jump_if(R9, When::Different, TCP, "noted");
    code.set(R1, 0);
    code.place("noted");
    code.store(Width::Word, FRAME, FLOW + CONNECTIONS_ONLY, R1);
    code.call(Helper::CoarseTime);
    code.store(Width::Double, FRAME, FLOW + LEARNT, R0);
    code.map(R1, maps.flows);
    code.copy(R2, FRAME);
    code.add(R2, KEY.into());
    code.copy(R3, FRAME);
    code.add(R3, FLOW.into());
    code.set(R4, 0);
    code.call(Helper::MapUpdate);
}
