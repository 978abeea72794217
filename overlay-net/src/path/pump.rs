//! Moves packets: from the device through the tunnels to the network, and back.
//!
//! One thread each way and one for the tunnels' timers. Packets go in batches: what the kernel hands
//! over as one large packet is sealed under one lock and leaves in one call, and what comes in
//! together is opened together and handed to the kernel as few large packets.

use std::fs::File;
use std::io::{self, IoSliceMut, Read as _, Write as _};
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::AsFd as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use arc_swap::ArcSwap;
use boringtun::noise::handshake::parse_handshake_anon;
use boringtun::noise::{Packet, Tunn, TunnResult};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use quinn_udp::{RecvMeta, Transmit, UdpSockRef, UdpSocketState};

use super::frame::{ETHERNET_LEN, HEAD_LEN, Merged, PACKET_LEN_MAX, Segment, VNET_LEN, VnetHeader, segment};
use super::message::PeerIndex;
use super::peers::{Direction, Keys, OWN, Peer, Peers, mac, peer_of_mac};

/// What a tunnel adds to a packet: type, receiver, counter, tag.
pub(crate) const SEAL_LEN: usize = 32;
/// Datagrams that leave in one call.
pub(crate) const SEGMENTS_MAX: usize = 64;
/// The largest payload of one call; beyond it the kernel refuses.
pub(crate) const SEND_LEN_MAX: usize = 65_000;
/// A tunnel's own messages fit, and so does any packet that fits a link.
const SCRATCH_LEN: usize = 66_000;
/// The longest of a handshake's messages (WireGuard §5.4).
const HANDSHAKE_LEN: usize = 148;
/// Large packets that are put together at the same time.
const MERGED_MAX: usize = 64;
const SOCKET_BUFFER_LEN: usize = 4 << 20;
const TIMER_PERIOD: Duration = Duration::from_millis(250);
const ETHERTYPE_IPV4: [u8; 2] = [0x08, 0x00];

/// Datagrams, or what the kernel put together of several, that are taken in one call. More would not
/// stay in the processor's cache until they are opened.
const RECEIVED_MAX: usize = 8;

/// Packets that went nowhere.
#[derive(Debug, Default)]
pub(crate) struct Drops {
    /// Addressed to nobody we know.
    pub(crate) unroutable: AtomicU64,
    /// From a peer that may not send them.
    pub(crate) refused: AtomicU64,
}

/// What the threads share.
pub(crate) struct Pump {
    tap: File,
    socket: UdpSocket,
    state: UdpSocketState,
    keys: Keys,
    peers: ArcSwap<Peers>,
    pub(crate) drops: Drops,
}

impl Pump {
    pub(crate) fn new(tap: File, socket: UdpSocket, private_key: [u8; 32]) -> io::Result<Arc<Self>> {
        let state = UdpSocketState::new(UdpSockRef::from(&socket))?;
        for grown in [
            state.set_recv_buffer_size(UdpSockRef::from(&socket), SOCKET_BUFFER_LEN),
            state.set_send_buffer_size(UdpSockRef::from(&socket), SOCKET_BUFFER_LEN),
        ] {
            // The host's limit stands; it is slower then, not wrong.
            drop(grown);
        }
        let keys = Keys::new(private_key);
        Ok(Arc::new(Self { tap, socket, state, keys, peers: ArcSwap::default(), drops: Drops::default() }))
    }

    /// Starts the threads; they run as long as the process.
    pub(crate) fn start(self: &Arc<Self>) -> io::Result<()> {
        for (name, run) in [
            ("seal", Self::seal_all as fn(&Self)),
            ("open", Self::open_all as fn(&Self)),
            ("timers", Self::keep_time as fn(&Self)),
        ] {
            let pump = self.clone();
            std::thread::Builder::new().name(name.into()).spawn(move || run(&pump))?;
        }
        Ok(())
    }

    pub(crate) fn peers(&self) -> arc_swap::Guard<Arc<Peers>> {
        self.peers.load()
    }

    /// Puts a new set of tunnels in force.
    pub(crate) fn replace_peers(&self, state: &super::message::PathState) {
        let before = self.peers.load();
        let next = Peers::new(state, &before, &self.keys);
        for peer in next.iter() {
            // Said to be elsewhere: the peer's own word comes later, if at all.
            if before.get(peer.index).is_some_and(|old| Arc::ptr_eq(old, peer))
                && let Some(config) = state.peers.get(&peer.index)
                && peer.announced() != config.endpoint
            {
                peer.announce(config.endpoint);
            }
        }
        let next = Arc::new(next);
        self.peers.store(next.clone());
        let mut scratch = [0; HANDSHAKE_LEN];
        for peer in next.iter().filter(|peer| before.get(peer.index).is_none_or(|old| !Arc::ptr_eq(old, peer))) {
            // Whoever spoke with us before this process began would speak on in vain for 15 s.
            self.greet(peer, &mut scratch);
        }
    }

    /// Begins a handshake for what goes to a peer.
    fn greet(&self, peer: &Peer, scratch: &mut [u8]) {
        let endpoint = peer.endpoint();
        let mut tunnel = peer.tunnel(Direction::Outward);
        if let TunnResult::WriteToNetwork(message) = tunnel.format_handshake_initiation(scratch, true) {
            self.send(endpoint, message, message.len());
        }
    }

    /// A peer that begins a handshake may have lost what it knew of us: ours is begun anew, unless that
    /// was done just now.
    fn greet_back(&self, peer: &Peer, scratch: &mut [u8]) {
        if peer.may_greet() {
            self.greet(peer, scratch);
        }
    }

    /// Sends datagrams of `size` bytes each (the last may be shorter) that lie one behind another.
    fn send(&self, to: SocketAddr, contents: &[u8], size: usize) {
        let transmit = Transmit {
            destination: to,
            ecn: None,
            contents,
            segment_size: (contents.len() > size).then_some(size),
            src_ip: None,
        };
        loop {
            match self.state.try_send(UdpSockRef::from(&self.socket), &transmit) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => wait(&self.socket, PollFlags::POLLOUT),
                // As on any network, what cannot be sent is lost; who needs it sends it again.
                Ok(()) | Err(_) => return,
            }
        }
    }

    fn seal_all(&self) {
        let mut frame = vec![0; HEAD_LEN + PACKET_LEN_MAX + 1];
        let mut scratch = vec![0; SCRATCH_LEN];
        let mut batch = SealedBatch::new();
        loop {
            let len = match (&self.tap).read(&mut frame) {
                Ok(len) => len,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                // The device is gone, and with it what this process is for.
                Err(_) => std::process::exit(1),
            };
            let frame = &mut frame[..len];
            let Some(header) = VnetHeader::read(frame) else { continue };
            if len < HEAD_LEN || frame[VNET_LEN + 12..HEAD_LEN] != ETHERTYPE_IPV4 {
                continue;
            }
            let Some(to) = peer_of_mac(&frame[VNET_LEN..VNET_LEN + 6]) else { continue };
            let packet = &mut frame[HEAD_LEN..];
            let peers = self.peers.load();
            let Some(peer) = peers.route(to, packet) else {
                self.drops.unroutable.fetch_add(1, Ordering::Relaxed);
                continue;
            };
            let endpoint = peer.endpoint();
            let mut tunnel = peer.tunnel(Direction::Outward);
            segment(header, packet, &mut scratch, |part| {
                peer.sent.fetch_add(part.len() as u64, Ordering::Relaxed);
                batch.seal(&mut tunnel, part, |contents, size| self.send(endpoint, contents, size));
            });
            drop(tunnel);
            batch.flush(|contents, size| self.send(endpoint, contents, size));
        }
    }

    fn open_all(&self) {
        let mut storage = vec![vec![0; SCRATCH_LEN]; RECEIVED_MAX];
        let mut metas = [RecvMeta::default(); RECEIVED_MAX];
        let mut opener = Opener::new();
        loop {
            let mut buffers: Vec<IoSliceMut<'_>> = storage.iter_mut().map(|buffer| IoSliceMut::new(buffer)).collect();
            let received = match self.state.recv(UdpSockRef::from(&self.socket), &mut buffers, &mut metas) {
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    wait(&self.socket, PollFlags::POLLIN);
                    continue;
                }
                // Such as a peer's port that is closed.
                Err(_) => continue,
            };
            for (meta, buffer) in metas.iter().zip(&storage).take(received) {
                for datagram in buffer[..meta.len].chunks(meta.stride.max(1)) {
                    self.open(datagram, meta.addr, &mut opener);
                }
            }
            opener.flush(&self.tap);
            if received < RECEIVED_MAX {
                // Most likely there is no more: asking would be a call for nothing.
                wait(&self.socket, PollFlags::POLLIN);
            }
        }
    }

    /// Takes one datagram.
    fn open(&self, datagram: &[u8], from: SocketAddr, opener: &mut Opener) {
        let peers = self.peers.load();
        let Some((peer, direction)) = self.sender(&peers, datagram, from, &mut opener.scratch) else { return };
        let begins = matches!(Tunn::parse_incoming_packet(datagram), Ok(Packet::HandshakeInit(_)));
        let mut tunnel = peer.tunnel(direction);
        let mut input = datagram;
        loop {
            match tunnel.decapsulate(Some(from.ip()), input, &mut opener.scratch) {
                TunnResult::WriteToNetwork(reply) => {
                    // Only who has the peer's key gets this far.
                    peer.move_to(from);
                    self.send(from, reply, reply.len());
                    if begins {
                        drop(tunnel);
                        self.greet_back(peer, &mut opener.scratch);
                        return;
                    }
                    // What waited for the handshake follows.
                    input = &[];
                }
                TunnResult::WriteToTunnelV4(packet, _) => {
                    peer.move_to(from);
                    peer.received.fetch_add(packet.len() as u64, Ordering::Relaxed);
                    let range = packet.len();
                    if peers.admits(peer.index, &opener.scratch[..range]) {
                        opener.take(peer.index, range, &self.tap);
                    } else {
                        self.drops.refused.fetch_add(1, Ordering::Relaxed);
                    }
                    return;
                }
                TunnResult::Done | TunnResult::Err(_) | TunnResult::WriteToTunnelV6(..) => return,
            }
        }
    }

    /// The tunnel that a datagram belongs to.
    fn sender<'a>(
        &self,
        peers: &'a Peers,
        datagram: &[u8],
        from: SocketAddr,
        scratch: &mut [u8],
    ) -> Option<(&'a Arc<Peer>, Direction)> {
        match Tunn::parse_incoming_packet(datagram).ok()? {
            Packet::HandshakeInit(_) => {
                // Costly to look into: senders in great number must prove their address first.
                match self.keys.limiter.verify_packet(Some(from.ip()), datagram, scratch) {
                    Ok(Packet::HandshakeInit(init)) => {
                        let half = parse_handshake_anon(&self.keys.private, &self.keys.public, &init).ok()?;
                        peers.by_key(&half.peer_static_public).map(|peer| (peer, Direction::Inward))
                    }
                    Err(TunnResult::WriteToNetwork(cookie)) => {
                        self.send(from, cookie, cookie.len());
                        None
                    }
                    _ => None,
                }
            }
            Packet::HandshakeResponse(response) => peers.by_receiver(response.receiver_idx),
            Packet::PacketCookieReply(reply) => peers.by_receiver(reply.receiver_idx),
            Packet::PacketData(data) => peers.by_receiver(data.receiver_idx),
        }
    }

    fn keep_time(&self) {
        let mut scratch = vec![0; SCRATCH_LEN];
        loop {
            std::thread::sleep(TIMER_PERIOD);
            self.keys.limiter.reset_count();
            for peer in self.peers.load().iter() {
                for direction in [Direction::Outward, Direction::Inward] {
                    let endpoint = peer.endpoint();
                    let mut tunnel = peer.tunnel(direction);
                    if let TunnResult::WriteToNetwork(message) = tunnel.update_timers(&mut scratch) {
                        self.send(endpoint, message, message.len());
                    }
                }
            }
        }
    }
}

fn wait(socket: &UdpSocket, flags: PollFlags) {
    // Interrupted or not, the caller tries again.
    let _ = poll(&mut [PollFd::new(socket.as_fd(), flags)], PollTimeout::from(1000u16));
}

/// Sealed datagrams of one size that lie one behind another, to leave in one call.
struct SealedBatch {
    buffer: Vec<u8>,
    len: usize,
    size: usize,
    count: usize,
}

impl SealedBatch {
    fn new() -> Self {
        Self { buffer: vec![0; SEND_LEN_MAX + SCRATCH_LEN], len: 0, size: 0, count: 0 }
    }

    fn seal(&mut self, tunnel: &mut Tunn, packet: &[u8], send: impl Fn(&[u8], usize)) {
        let sealed_len = packet.len() + SEAL_LEN;
        let full = self.len + sealed_len > SEND_LEN_MAX || self.count == SEGMENTS_MAX;
        if self.count > 0 && (full || sealed_len > self.size) {
            self.flush(&send);
        }
        match tunnel.encapsulate(packet, &mut self.buffer[self.len..]) {
            TunnResult::WriteToNetwork(sealed) if sealed.len() == sealed_len => {
                if self.count == 0 {
                    self.size = sealed_len;
                }
                self.len += sealed_len;
                self.count += 1;
                // Only the last one may be shorter.
                if sealed_len < self.size {
                    self.flush(send);
                }
            }
            // There is no session yet: a handshake begins, and the packet waits inside the tunnel.
            TunnResult::WriteToNetwork(handshake) => send(handshake, handshake.len()),
            TunnResult::Done
            | TunnResult::Err(_)
            | TunnResult::WriteToTunnelV4(..)
            | TunnResult::WriteToTunnelV6(..) => {}
        }
    }

    fn flush(&mut self, send: impl Fn(&[u8], usize)) {
        if self.count > 0 {
            send(&self.buffer[..self.len], self.size);
        }
        (self.len, self.size, self.count) = (0, 0, 0);
    }
}

/// Opened packets on their way to the device.
struct Opener {
    scratch: Vec<u8>,
    merged: Vec<Merged>,
    used: usize,
}

impl Opener {
    fn new() -> Self {
        let merged = (0..MERGED_MAX).map(|_| Merged::with_room()).collect();
        Self { scratch: vec![0; SCRATCH_LEN], merged, used: 0 }
    }

    /// Takes the packet in `scratch[..len]`, which came from `peer`.
    fn take(&mut self, peer: PeerIndex, len: usize, tap: &File) {
        let mut ethernet = [0; ETHERNET_LEN];
        ethernet[..6].copy_from_slice(&mac(OWN));
        ethernet[6..12].copy_from_slice(&mac(peer));
        ethernet[12..].copy_from_slice(&ETHERTYPE_IPV4);
        let packet = &self.scratch[..len];
        let segment = Segment::read(packet);
        // The stream's own is among the last ones begun.
        let mut open = self.merged[..self.used].iter_mut().rev();
        if segment.is_some_and(|segment| open.any(|merged| merged.extend(&ethernet, packet, segment))) {
            return;
        }
        if self.used == self.merged.len() {
            write_all(&mut self.merged, tap);
            self.used = 0;
        }
        self.merged[self.used].begin(&ethernet, packet, segment);
        self.used += 1;
    }

    fn flush(&mut self, tap: &File) {
        write_all(&mut self.merged[..self.used], tap);
        self.used = 0;
    }
}

fn write_all(merged: &mut [Merged], mut tap: &File) {
    for merged in merged {
        // A frame that the kernel does not take is lost like any packet.
        drop(tap.write(merged.finish()));
    }
}
