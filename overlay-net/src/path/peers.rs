//! The tunnels to other nodes, and which packets may pass them.
//!
//! A task's address belongs to the node that the managers say it runs on. Packets go to that node
//! alone, and are taken from that node alone: nobody speaks for addresses that are not theirs.

use std::collections::{BTreeMap, HashMap};
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use boringtun::noise::Tunn;
use boringtun::noise::rate_limiter::RateLimiter;
use boringtun::x25519::{PublicKey, StaticSecret};
use skep_api::{NodeId, Subnet};

use super::frame;
use super::message::{PathState, PeerConfig, PeerIndex, PeerReport};

/// Tunnels say nothing while nothing passes, but let NAT boxes remember them.
const KEEPALIVE_SECS: u16 = 25;
/// Two peers that greet each other stop at once.
const GREETING_PAUSE: Duration = Duration::from_millis(500);
/// The address of a frame's other end: our own, or a peer's by its index.
const MAC_PREFIX: [u8; 4] = [0x02, 0x73, 0x6b, 0x70];
/// Stands for "to whoever has the address".
pub(crate) const BY_ADDRESS: PeerIndex = PeerIndex::MAX;
/// Stands for this node.
pub(crate) const OWN: PeerIndex = 0;

/// The Ethernet address that stands for a peer on this node's device.
pub(crate) fn mac(index: PeerIndex) -> [u8; 6] {
    let [high, low] = index.to_be_bytes();
    let [a, b, c, d] = MAC_PREFIX;
    [a, b, c, d, high, low]
}

/// The peer that an Ethernet address stands for.
pub(crate) fn peer_of_mac(mac: &[u8]) -> Option<PeerIndex> {
    match mac {
        [a, b, c, d, high, low] if [*a, *b, *c, *d] == MAC_PREFIX => Some(PeerIndex::from_be_bytes([*high, *low])),
        _ => None,
    }
}

/// Another node: one tunnel for what goes there, and one for what comes from there.
///
/// Both have the same keys. What goes out passes the one whose handshakes we begin, what comes in the
/// one whose handshakes the peer begins, so the thread that seals and the thread that opens do not
/// wait for each other. A peer that uses one tunnel both ways is understood as well.
pub(crate) struct Peer {
    pub(crate) node: NodeId,
    pub(crate) index: PeerIndex,
    pub(crate) public_key: [u8; 32],
    outward: Mutex<Tunn>,
    inward: Mutex<Tunn>,
    /// Where it was heard from last, else where it is said to be.
    endpoint: Mutex<SocketAddr>,
    announced: Mutex<SocketAddr>,
    /// When a handshake was last begun because the peer had begun one.
    greeted: Mutex<Option<Instant>>,
    pub(crate) sent: AtomicU64,
    pub(crate) received: AtomicU64,
}

impl Peer {
    fn new(index: PeerIndex, config: &PeerConfig, keys: &Keys) -> Self {
        let tunnel = |keepalive, direction: Direction| {
            Mutex::new(Tunn::new(
                keys.private.clone(),
                PublicKey::from(config.public_key),
                None,
                keepalive,
                direction.tunnel_number(index),
                Some(keys.limiter.clone()),
            ))
        };
        Self {
            node: config.node,
            index,
            public_key: config.public_key,
            outward: tunnel(Some(KEEPALIVE_SECS), Direction::Outward),
            inward: tunnel(None, Direction::Inward),
            endpoint: Mutex::new(config.endpoint),
            announced: Mutex::new(config.endpoint),
            greeted: Mutex::default(),
            sent: AtomicU64::new(0),
            received: AtomicU64::new(0),
        }
    }

    pub(crate) fn tunnel(&self, direction: Direction) -> MutexGuard<'_, Tunn> {
        let tunnel = match direction {
            Direction::Outward => &self.outward,
            Direction::Inward => &self.inward,
        };
        tunnel.lock().expect("nobody panics while holding it")
    }

    pub(crate) fn endpoint(&self) -> SocketAddr {
        *self.endpoint.lock().expect("nobody panics while holding it")
    }

    /// Whether it is time to answer a peer's handshake with one of our own; if so, it is taken as done.
    pub(crate) fn may_greet(&self) -> bool {
        let (handshake, ..) = self.tunnel(Direction::Outward).stats();
        let mut greeted = self.greeted.lock().expect("nobody panics while holding it");
        let fresh = handshake.is_some_and(|since| since < GREETING_PAUSE)
            || greeted.is_some_and(|at| at.elapsed() < GREETING_PAUSE);
        if !fresh {
            *greeted = Some(Instant::now());
        }
        !fresh
    }

    /// Where the managers say it is.
    pub(crate) fn announced(&self) -> SocketAddr {
        *self.announced.lock().expect("nobody panics while holding it")
    }

    /// The managers say that it is elsewhere now.
    pub(crate) fn announce(&self, endpoint: SocketAddr) {
        *self.announced.lock().expect("nobody panics while holding it") = endpoint;
        self.move_to(endpoint);
    }

    /// Moves the tunnel to where the peer was heard from.
    pub(crate) fn move_to(&self, endpoint: SocketAddr) {
        *self.endpoint.lock().expect("nobody panics while holding it") = endpoint;
    }

    fn report(&self) -> PeerReport {
        let (handshake, ..) = self.tunnel(Direction::Outward).stats();
        PeerReport {
            node: self.node,
            public_key: self.public_key,
            endpoint: self.endpoint(),
            handshake_secs: handshake.map(|since| since.as_secs()),
            sent_bytes: self.sent.load(Ordering::Relaxed),
            received_bytes: self.received.load(Ordering::Relaxed),
        }
    }
}

/// Which of a peer's tunnels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Direction {
    Outward,
    Inward,
}

impl Direction {
    /// What tells a tunnel from all others of this node in the messages of its peer (24 bits).
    fn tunnel_number(self, index: PeerIndex) -> u32 {
        u32::from(index) << 1 | u32::from(self == Self::Inward)
    }
}

/// This node's keys.
pub(crate) struct Keys {
    pub(crate) private: StaticSecret,
    pub(crate) public: PublicKey,
    pub(crate) limiter: Arc<RateLimiter>,
}

/// Handshakes a second before senders must prove their address.
const HANDSHAKES_PER_SECOND: u64 = 200;

impl Keys {
    pub(crate) fn new(private: [u8; 32]) -> Self {
        let private = StaticSecret::from(private);
        let public = PublicKey::from(&private);
        Self { limiter: Arc::new(RateLimiter::new(&public, HANDSHAKES_PER_SECOND)), private, public }
    }
}

/// All tunnels, as one value that is replaced as a whole.
#[derive(Default)]
pub(crate) struct Peers {
    by_index: BTreeMap<PeerIndex, Arc<Peer>>,
    by_key: HashMap<[u8; 32], PeerIndex>,
    addresses: HashMap<Ipv4Addr, PeerIndex>,
    subnets: Vec<Subnet>,
    gateways: Vec<Ipv4Addr>,
    ingress: Option<Subnet>,
}

impl Peers {
    /// The tunnels of `state`; those that `before` has and that stay the same go on.
    pub(crate) fn new(state: &PathState, before: &Self, keys: &Keys) -> Self {
        let by_index = state.peers.iter().map(|(&index, config)| {
            let known = before.by_index.get(&index).filter(|peer| peer.public_key == config.public_key);
            let peer = known.cloned().unwrap_or_else(|| Arc::new(Peer::new(index, config, keys)));
            (index, peer)
        });
        let by_index: BTreeMap<_, _> = by_index.collect();
        Self {
            by_key: by_index.values().map(|peer| (peer.public_key, peer.index)).collect(),
            by_index,
            addresses: state.addresses.iter().map(|(&address, &index)| (address, index)).collect(),
            subnets: state.subnets.iter().copied().collect(),
            gateways: state.gateways.iter().copied().collect(),
            ingress: state.ingress,
        }
    }

    pub(crate) fn get(&self, index: PeerIndex) -> Option<&Arc<Peer>> {
        self.by_index.get(&index)
    }

    /// The tunnel that a receiver's index in a message names, as we told it to the peer: the number of
    /// the tunnel, and behind it the session's.
    pub(crate) fn by_receiver(&self, receiver: u32) -> Option<(&Arc<Peer>, Direction)> {
        let number = receiver >> 8;
        let direction = if number & 1 == 1 { Direction::Inward } else { Direction::Outward };
        Some((self.get(PeerIndex::try_from(number >> 1).ok()?)?, direction))
    }

    pub(crate) fn by_key(&self, key: &[u8; 32]) -> Option<&Arc<Peer>> {
        self.get(*self.by_key.get(key)?)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Arc<Peer>> {
        self.by_index.values()
    }

    pub(crate) fn reports(&self) -> Vec<PeerReport> {
        self.iter().map(|peer| peer.report()).collect()
    }

    /// Where a packet that the kernel addressed to `to` is to go.
    pub(crate) fn route(&self, to: PeerIndex, packet: &[u8]) -> Option<&Arc<Peer>> {
        if to != BY_ADDRESS {
            return self.get(to);
        }
        let (_, destination) = frame::addresses(packet)?;
        self.get(*self.addresses.get(&destination)?)
    }

    /// Whether a packet may come from `peer`: from a task of its own; from outside the swarm to where
    /// ports are published; or as a router's word about a packet.
    pub(crate) fn admits(&self, peer: PeerIndex, packet: &[u8]) -> bool {
        let Some((source, destination)) = frame::addresses(packet) else { return false };
        if self.addresses.get(&source) == Some(&peer) {
            return true;
        }
        if self.gateways.contains(&source) && frame::is_icmp(packet) {
            return true;
        }
        let foreign = !self.subnets.iter().any(|subnet| subnet.contains(source));
        foreign && self.ingress.is_some_and(|ingress| ingress.contains(destination))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn packet(source: [u8; 4], destination: [u8; 4], protocol: u8) -> Vec<u8> {
        let mut packet = vec![0; 20];
        packet[0] = 0x45;
        packet[9] = protocol;
        packet[12..16].copy_from_slice(&source);
        packet[16..20].copy_from_slice(&destination);
        packet
    }

    #[test]
    fn a_node_speaks_for_its_own_tasks_alone() {
        let peer = |number: u8| PeerConfig {
            node: NodeId::from_u128(u128::from(number)),
            public_key: [number; 32],
            endpoint: SocketAddr::new(Ipv4Addr::LOCALHOST.into(), 1),
        };
        let state = PathState {
            peers: [(1, peer(1)), (2, peer(2))].into(),
            addresses: [(Ipv4Addr::new(10, 0, 1, 2), 1), (Ipv4Addr::new(10, 0, 1, 3), 2)].into(),
            subnets: ["10.0.0.0/24".parse().unwrap(), "10.0.1.0/24".parse().unwrap()].into(),
            gateways: [Ipv4Addr::new(10, 0, 1, 1)].into(),
            ingress: Some("10.0.0.0/24".parse().unwrap()),
            ..PathState::default()
        };
        let peers = Peers::new(&state, &Peers::default(), &Keys::new([7; 32]));
        let own = packet([10, 0, 1, 2], [10, 0, 1, 9], 6);
        assert!(peers.admits(1, &own) && !peers.admits(2, &own));
        assert!(!peers.admits(1, &packet([10, 0, 1, 7], [10, 0, 1, 9], 6)), "an address nobody has");
        assert!(peers.admits(1, &packet([192, 0, 2, 1], [10, 0, 0, 9], 6)), "a client from outside, to a port");
        assert!(!peers.admits(1, &packet([192, 0, 2, 1], [10, 0, 1, 9], 6)), "from outside into a network");
        assert!(peers.admits(1, &packet([10, 0, 1, 1], [10, 0, 1, 9], 1)), "a router's word");
        assert!(!peers.admits(1, &packet([10, 0, 1, 1], [10, 0, 1, 9], 6)), "a router's connection");
        let to = |packet: &[u8]| peers.route(BY_ADDRESS, packet).map(|peer| peer.index);
        assert_eq!(to(&packet([10, 0, 1, 9], [10, 0, 1, 3], 6)), Some(2));
        assert_eq!(to(&packet([10, 0, 1, 9], [10, 0, 1, 8], 6)), None);
        assert_eq!(peers.route(1, &own).map(|peer| peer.index), Some(1));
    }

    #[test]
    fn a_receiver_names_its_tunnel() {
        let config = PeerConfig {
            node: NodeId::from_u128(1),
            public_key: [1; 32],
            endpoint: SocketAddr::new(Ipv4Addr::LOCALHOST.into(), 1),
        };
        let state = PathState { peers: [(300, config)].into(), ..PathState::default() };
        let peers = Peers::new(&state, &Peers::default(), &Keys::new([7; 32]));
        for direction in [Direction::Outward, Direction::Inward] {
            let receiver = direction.tunnel_number(300) << 8 | 5;
            assert_eq!(peers.by_receiver(receiver).map(|(peer, found)| (peer.index, found)), Some((300, direction)));
        }
        assert!(peers.by_receiver(Direction::Inward.tunnel_number(7) << 8).is_none());
    }

    #[test]
    fn a_mac_names_its_peer() {
        assert_eq!(peer_of_mac(&mac(513)), Some(513));
        assert_eq!(peer_of_mac(&[0xff; 6]), None);
    }
}
