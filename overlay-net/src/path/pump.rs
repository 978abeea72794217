//! Moves packets: from the device through the tunnels to the network, and back.
//!
//! One thread each way and one for the tunnels' timers. Packets go in batches: what the kernel hands
//! over as one large packet is sealed under one lock and leaves in one call, and what comes in
//! together is opened together and handed to the kernel as few large packets.

use std::fs::File;
use std::io::{self, IoSliceMut, Read as _, Write as _};
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use boringtun::noise::handshake::parse_handshake_anon;
use boringtun::noise::{Packet, Tunn, TunnResult};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use quinn_udp::{RecvMeta, Transmit, UdpSockRef, UdpSocketState};

use super::frame::{ETHERNET_LEN, HEAD_LEN, PACKET_LEN_MAX, VNET_LEN, VnetHeader, is_ipv6, segment};
use super::merge::Merged;
use super::message::PeerIndex;
use super::peers::{Addressed, Direction, Keys, OWN, Peer, Peers, mac, peer_of_mac};

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
const ETHERTYPE_IPV6: [u8; 2] = [0x86, 0xdd];

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
    peers: ArcSwap<Peers>,
    pub(crate) drops: Drops,
}

impl Pump {
    pub(crate) fn new(tap: File, socket: UdpSocket) -> io::Result<Arc<Self>> {
        let state = UdpSocketState::new(UdpSockRef::from(&socket))?;
        for grown in [
            state.set_recv_buffer_size(UdpSockRef::from(&socket), SOCKET_BUFFER_LEN),
            state.set_send_buffer_size(UdpSockRef::from(&socket), SOCKET_BUFFER_LEN),
        ] {
            // The host's limit stands; it is slower then, not wrong.
            drop(grown);
        }
        Ok(Arc::new(Self { tap, socket, state, peers: ArcSwap::default(), drops: Drops::default() }))
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
        let next = Arc::new(Peers::new(state, &before));
        self.peers.store(next.clone());
        let mut scratch = [0; HANDSHAKE_LEN];
        for peer in next.iter() {
            let known = before.get(peer.index).and_then(|old| old.preferred());
            let goes_on = known.zip(peer.preferred()).is_some_and(|(old, new)| Arc::ptr_eq(old, new));
            if !goes_on {
                // Whoever spoke with us before this process began would speak on in vain for 15 s; and a new
                // key is used as soon as there is a session of it.
                self.greet(peer, &mut scratch);
            }
        }
    }

    /// Begins a handshake for what goes to a peer.
    fn greet(&self, peer: &Peer, scratch: &mut [u8]) {
        let endpoint = peer.endpoint();
        let Some(pair) = peer.preferred() else { return };
        let mut tunnel = pair.tunnel(Direction::Outward);
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
        let mut lull = Lull::default();
        loop {
            match (&self.tap).read(&mut frame) {
                Ok(len) => {
                    lull.end();
                    self.seal(&mut frame[..len], &mut scratch, &mut batch);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // Only now does what has gathered leave: small packets that come together go together.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    batch.flush(|to, contents, size| self.send(to, contents, size));
                    lull.pass(&self.tap);
                }
                // The device is gone, and with it what this process is for.
                Err(_) => std::process::exit(1),
            }
        }
    }

    /// Takes one frame from the kernel.
    fn seal(&self, frame: &mut [u8], scratch: &mut [u8], batch: &mut SealedBatch) {
        let Some(header) = VnetHeader::read(frame) else { return };
        if frame.len() <= HEAD_LEN || frame[VNET_LEN + 12..HEAD_LEN] != ethertype(&frame[HEAD_LEN..]) {
            return;
        }
        let Some(to) = peer_of_mac(&frame[VNET_LEN..VNET_LEN + 6]) else { return };
        let packet = &mut frame[HEAD_LEN..];
        let peers = self.peers.load();
        let Some(peer) = peers.route(to, packet) else {
            self.drops.unroutable.fetch_add(1, Ordering::Relaxed);
            return;
        };
        let send = |to, contents: &[u8], size| self.send(to, contents, size);
        batch.turn_to(peer.endpoint(), send);
        let Some(pair) = peer.in_use() else { return };
        let mut tunnel = pair.tunnel(Direction::Outward);
        let mut sent = 0;
        segment(header, packet, scratch, |part| {
            sent += part.len();
            batch.seal(&mut tunnel, part, send);
        });
        drop(tunnel);
        peer.count_sent(sent);
    }

    fn open_all(&self) {
        let mut storage = vec![vec![0; SCRATCH_LEN]; RECEIVED_MAX];
        let mut metas = [RecvMeta::default(); RECEIVED_MAX];
        let mut opener = Opener::new();
        let mut lull = Lull::default();
        loop {
            let mut buffers: Vec<IoSliceMut<'_>> = storage.iter_mut().map(|buffer| IoSliceMut::new(buffer)).collect();
            let received = match self.state.recv(UdpSockRef::from(&self.socket), &mut buffers, &mut metas) {
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    lull.pass(&self.socket);
                    continue;
                }
                // Such as a peer's port that is closed.
                Err(_) => continue,
            };
            for (meta, buffer) in metas.iter().zip(&storage).take(received) {
                let from = SocketAddr::new(meta.addr.ip().to_canonical(), meta.addr.port());
                for datagram in buffer[..meta.len].chunks(meta.stride.max(1)) {
                    self.open(datagram, from, &mut opener);
                }
            }
            opener.flush(&self.tap);
            lull.end();
        }
    }

    /// Takes one datagram.
    fn open(&self, datagram: &[u8], from: SocketAddr, opener: &mut Opener) {
        let peers = self.peers.load();
        let Ok(parsed) = Tunn::parse_incoming_packet(datagram) else { return };
        match parsed {
            Packet::PacketData(data) => {
                if let Some(addressed) = peers.by_receiver(data.receiver_idx) {
                    self.open_data(&peers, addressed, (datagram, from), opener);
                }
            }
            other => {
                let begins = matches!(other, Packet::HandshakeInit(_));
                if let Some(addressed) = self.sender(&peers, &other, (datagram, from), &mut opener.scratch) {
                    self.take_handshake(addressed, (datagram, from), begins, &mut opener.scratch);
                }
            }
        }
    }

    /// Opens a packet where it is to lie if it goes on with what came before.
    fn open_data(
        &self,
        peers: &Peers,
        (peer, pair, direction): Addressed<'_>,
        (datagram, from): (&[u8], SocketAddr),
        opener: &mut Opener,
    ) {
        let place = opener.place(datagram.len(), &self.tap);
        let opened = match pair.tunnel(direction).decapsulate(Some(from.ip()), datagram, opener.room(place)) {
            TunnResult::WriteToTunnelV4(packet, _) | TunnResult::WriteToTunnelV6(packet, _) => Some(packet.len()),
            // Nothing else follows data; what is none of ours, or came before, is dropped.
            _ => None,
        };
        let Some(len) = opened else { return opener.give_up(place) };
        peer.move_to(from);
        peer.count_received(len);
        if peers.admits(peer.index, opener.packet(place, len)) {
            opener.take(place, peer.index, len, &self.tap);
        } else {
            self.drops.refused.fetch_add(1, Ordering::Relaxed);
            opener.give_up(place);
        }
    }

    fn take_handshake(
        &self,
        (peer, pair, direction): Addressed<'_>,
        (datagram, from): (&[u8], SocketAddr),
        begins: bool,
        scratch: &mut [u8],
    ) {
        let mut tunnel = pair.tunnel(direction);
        let mut input = datagram;
        while let TunnResult::WriteToNetwork(reply) = tunnel.decapsulate(Some(from.ip()), input, scratch) {
            // Only who has the peer's key gets this far.
            peer.move_to(from);
            self.send(from, reply, reply.len());
            if begins {
                drop(tunnel);
                self.greet_back(peer, scratch);
                return;
            }
            // What waited for the handshake follows.
            input = &[];
        }
    }

    /// The tunnel that a message of a handshake belongs to.
    fn sender<'a>(
        &self,
        peers: &'a Peers,
        message: &Packet<'_>,
        (datagram, from): (&[u8], SocketAddr),
        scratch: &mut [u8],
    ) -> Option<Addressed<'a>> {
        match message {
            Packet::HandshakeInit(_) => {
                // It says whom of us it is for; while our key changes we are two.
                peers.keys().iter().find_map(|keys| self.initiator(peers, keys, (datagram, from), scratch))
            }
            Packet::HandshakeResponse(response) => peers.by_receiver(response.receiver_idx),
            Packet::PacketCookieReply(reply) => peers.by_receiver(reply.receiver_idx),
            Packet::PacketData(data) => peers.by_receiver(data.receiver_idx),
        }
    }

    /// Who begins a handshake with one of our keys.
    fn initiator<'a>(
        &self,
        peers: &'a Peers,
        keys: &Keys,
        (datagram, from): (&[u8], SocketAddr),
        scratch: &mut [u8],
    ) -> Option<Addressed<'a>> {
        // Costly to look into: senders in great number must prove their address first.
        match keys.limiter.verify_packet(Some(from.ip()), datagram, scratch) {
            Ok(Packet::HandshakeInit(init)) => {
                let half = parse_handshake_anon(&keys.private, &keys.public, &init).ok()?;
                peers.by_keys(keys, &half.peer_static_public)
            }
            Err(TunnResult::WriteToNetwork(cookie)) => {
                self.send(from, cookie, cookie.len());
                None
            }
            _ => None,
        }
    }

    fn keep_time(&self) {
        let mut scratch = vec![0; SCRATCH_LEN];
        loop {
            std::thread::sleep(TIMER_PERIOD);
            let peers = self.peers.load();
            peers.keys().iter().for_each(|keys| keys.limiter.reset_count());
            for peer in peers.iter() {
                let endpoint = peer.endpoint();
                for mut tunnel in peer.live_tunnels() {
                    if let TunnResult::WriteToNetwork(message) = tunnel.update_timers(&mut scratch) {
                        self.send(endpoint, message, message.len());
                    }
                }
            }
        }
    }
}

/// What Ethernet calls an IP packet.
const fn ethertype(packet: &[u8]) -> [u8; 2] {
    if is_ipv6(packet) { ETHERTYPE_IPV6 } else { ETHERTYPE_IPV4 }
}

fn wait(file: &impl AsFd, flags: PollFlags) {
    // Interrupted or not, the caller tries again.
    let _ = poll(&mut [PollFd::new(file.as_fd(), flags)], PollTimeout::from(1000u16));
}

/// The time in which nothing comes.
///
/// To sleep and be woken takes tens of microseconds, so what is expected to come soon is waited for
/// awake, with the processor left to whoever wants it. Whether it comes soon is judged by how it was before.
#[derive(Default)]
struct Lull {
    began: Option<Instant>,
    awake: bool,
    /// How often in a row it was waited in vain.
    in_vain: u32,
    /// Lulls to sleep through before the next one is waited for awake.
    sleeps: u32,
}

/// How long a lull is waited for awake.
const AWAKE_LIMIT: Duration = Duration::from_micros(100);
/// Of so many lulls one is waited for awake, if it never is of use.
const IN_VAIN_MAX: u32 = 7;

impl Lull {
    /// Lets a moment pass; returns when it is worth to look again.
    fn pass(&mut self, file: &impl AsFd) {
        let began = *self.began.get_or_insert_with(|| {
            self.awake = self.sleeps == 0;
            self.sleeps = self.sleeps.saturating_sub(1);
            Instant::now()
        });
        if self.awake && began.elapsed() < AWAKE_LIMIT {
            return std::thread::yield_now();
        }
        if std::mem::take(&mut self.awake) {
            self.in_vain = (self.in_vain + 1).min(IN_VAIN_MAX);
            self.sleeps = 1 << self.in_vain;
        }
        wait(file, PollFlags::POLLIN);
    }

    /// Something came.
    fn end(&mut self) {
        if self.began.take().is_some() && std::mem::take(&mut self.awake) {
            self.in_vain = 0;
        }
    }
}

/// Sealed datagrams of one size to one place that lie one behind another, to leave in one call.
struct SealedBatch {
    buffer: Vec<u8>,
    to: SocketAddr,
    len: usize,
    size: usize,
    count: usize,
}

impl SealedBatch {
    fn new() -> Self {
        let nowhere = SocketAddr::from(([0; 4], 0));
        Self { buffer: vec![0; SEND_LEN_MAX + SCRATCH_LEN], to: nowhere, len: 0, size: 0, count: 0 }
    }

    /// What is sealed next goes to `to`.
    fn turn_to(&mut self, to: SocketAddr, send: impl Fn(SocketAddr, &[u8], usize)) {
        if self.to != to {
            self.flush(send);
            self.to = to;
        }
    }

    fn seal(&mut self, tunnel: &mut Tunn, packet: &[u8], send: impl Fn(SocketAddr, &[u8], usize)) {
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
            TunnResult::WriteToNetwork(handshake) => send(self.to, handshake, handshake.len()),
            TunnResult::Done
            | TunnResult::Err(_)
            | TunnResult::WriteToTunnelV4(..)
            | TunnResult::WriteToTunnelV6(..) => {}
        }
    }

    fn flush(&mut self, send: impl Fn(SocketAddr, &[u8], usize)) {
        if self.count > 0 {
            send(self.to, &self.buffer[..self.len], self.size);
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

/// Where a packet is opened.
#[derive(Clone, Copy, Debug)]
enum OpenedAt {
    /// Right behind the last frame, which it may go on with.
    Behind,
    /// At the beginning of a new one.
    Anew,
}

impl Opener {
    fn new() -> Self {
        let merged = (0..MERGED_MAX).map(|_| Merged::with_room(SEAL_LEN)).collect();
        Self { scratch: vec![0; SCRATCH_LEN], merged, used: 0 }
    }

    /// Chooses where a datagram of `len` bytes is to be opened.
    fn place(&mut self, len: usize, tap: &File) -> OpenedAt {
        let last = self.merged[..self.used].last_mut();
        if last.is_some_and(|last| last.cover(len)) {
            return OpenedAt::Behind;
        }
        self.make_room(tap);
        OpenedAt::Anew
    }

    fn make_room(&mut self, tap: &File) {
        if self.used == self.merged.len() {
            self.flush(tap);
        }
    }

    fn room(&mut self, place: OpenedAt) -> &mut [u8] {
        match place {
            OpenedAt::Behind => self.merged[self.used - 1].behind(),
            OpenedAt::Anew => self.merged[self.used].room(),
        }
    }

    fn packet(&mut self, place: OpenedAt, len: usize) -> &[u8] {
        match place {
            OpenedAt::Behind => self.merged[self.used - 1].packet_behind(len),
            OpenedAt::Anew => &self.merged[self.used].room()[..len],
        }
    }

    /// What was opened goes nowhere.
    fn give_up(&mut self, place: OpenedAt) {
        if matches!(place, OpenedAt::Behind) {
            self.merged[self.used - 1].uncover();
        }
    }

    /// Takes the packet of `len` bytes that was opened at `place` and came from `peer`.
    fn take(&mut self, place: OpenedAt, peer: PeerIndex, len: usize, tap: &File) {
        let mut ethernet = [0; ETHERNET_LEN];
        ethernet[..6].copy_from_slice(&mac(OWN));
        ethernet[6..12].copy_from_slice(&mac(peer));
        ethernet[12..].copy_from_slice(&ethertype(self.packet(place, len)));
        if matches!(place, OpenedAt::Behind) {
            let last = &mut self.merged[self.used - 1];
            if last.extend_in_place(&ethernet, len) {
                return;
            }
            self.scratch[..len].copy_from_slice(last.packet_behind(len));
            last.uncover();
            self.make_room(tap);
            self.merged[self.used].room()[..len].copy_from_slice(&self.scratch[..len]);
        }
        let (begun, rest) = self.merged.split_at_mut(self.used);
        let packet = &rest[0].room()[..len];
        // Only the newest one of a stream may grow, or packets would overtake each other.
        let newest = begun.iter_mut().rev().find(|merged| merged.is_of_stream(&ethernet, packet));
        if newest.is_some_and(|merged| merged.extend(&ethernet, packet)) {
            return;
        }
        self.merged[self.used].begin(&ethernet, len);
        self.used += 1;
    }

    fn flush(&mut self, mut tap: &File) {
        for merged in &mut self.merged[..self.used] {
            // A frame that the kernel does not take is lost like any packet.
            drop(tap.write(merged.finish()));
        }
        self.used = 0;
    }
}
