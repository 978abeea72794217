//! The tunnels to other nodes, and which packets may pass them.
//!
//! A task's address belongs to the node that the managers say it runs on. Packets go to that node
//! alone, and are taken from that node alone: nobody speaks for addresses that are not theirs.

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use boringtun::noise::Tunn;
use boringtun::noise::rate_limiter::RateLimiter;
use boringtun::x25519::{PublicKey, StaticSecret};
use skep_api::{IpSubnet, NodeId, SecretBytes};

use super::frame;
use super::message::{PathState, PeerConfig, PeerIndex, PeerReport};
use crate::keys::private_key;

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

/// Another node, with the tunnels to it: one pair for each two keys that may meet.
pub(crate) struct Peer {
    pub(crate) node: NodeId,
    pub(crate) index: PeerIndex,
    /// The first is the one to be used; the others are there while a key changes.
    pairs: Vec<Arc<Pair>>,
    standing: Arc<Standing>,
}

/// One tunnel for what goes to a peer, and one for what comes from there.
///
/// Both have the same keys. What goes out passes the one whose handshakes we begin, what comes in the
/// one whose handshakes the peer begins, so the thread that seals and the thread that opens do not
/// wait for each other. A peer that uses one tunnel both ways is understood as well.
pub(crate) struct Pair {
    own_key: [u8; 32],
    their_key: [u8; 32],
    /// Tells it from the peer's other pairs.
    number: u8,
    outward: Mutex<Tunn>,
    inward: Mutex<Tunn>,
}

/// What is so of a peer whatever its keys.
struct Standing {
    /// Where it was heard from last, else where it is said to be.
    endpoint: Mutex<SocketAddr>,
    announced: Mutex<SocketAddr>,
    /// When a handshake was last begun because the peer had begun one.
    greeted: Mutex<Option<Instant>>,
    sent: AtomicU64,
    received: AtomicU64,
}

impl Pair {
    fn new(index: PeerIndex, number: u8, keys: &Keys, their_key: [u8; 32]) -> Self {
        let tunnel = |keepalive, direction: Direction| {
            Mutex::new(Tunn::new(
                keys.private.clone(),
                PublicKey::from(their_key),
                None,
                keepalive,
                tunnel_number(index, number, direction),
                Some(keys.limiter.clone()),
            ))
        };
        Self {
            own_key: *keys.public.as_bytes(),
            their_key,
            number,
            outward: tunnel(Some(KEEPALIVE_SECS), Direction::Outward),
            inward: tunnel(None, Direction::Inward),
        }
    }

    pub(crate) fn tunnel(&self, direction: Direction) -> MutexGuard<'_, Tunn> {
        let tunnel = match direction {
            Direction::Outward => &self.outward,
            Direction::Inward => &self.inward,
        };
        tunnel.lock().expect("nobody panics while holding it")
    }

    fn last_handshake(&self) -> Option<Duration> {
        self.tunnel(Direction::Outward).stats().0
    }
}

impl Peer {
    /// The peer as `config` has it; what `before` has of it goes on.
    fn new(index: PeerIndex, config: &PeerConfig, before: Option<&Self>, keys: &[Arc<Keys>]) -> Self {
        let held = before.map_or(&[][..], |before| &before.pairs);
        let mut pairs: Vec<Arc<Pair>> = Vec::new();
        for keys in keys {
            for &their_key in &config.keys {
                let of_both =
                    |pair: &&Arc<Pair>| pair.own_key == *keys.public.as_bytes() && pair.their_key == their_key;
                let known = held.iter().find(of_both).cloned();
                pairs.push(known.unwrap_or_else(|| {
                    let taken = |number: &u8| held.iter().chain(&pairs).any(|pair| pair.number == *number);
                    let number = (0..PAIRS_MAX).find(|number| !taken(number)).unwrap_or(0);
                    Arc::new(Pair::new(index, number, keys, their_key))
                }));
            }
        }
        let standing = before.map_or_else(
            || {
                Arc::new(Standing {
                    endpoint: Mutex::new(config.endpoint),
                    announced: Mutex::new(config.endpoint),
                    greeted: Mutex::default(),
                    sent: AtomicU64::new(0),
                    received: AtomicU64::new(0),
                })
            },
            |before| before.standing.clone(),
        );
        let peer = Self { node: config.node, index, pairs, standing };
        // Said to be elsewhere: the peer's own word comes later, if at all.
        if peer.announced() != config.endpoint {
            peer.announce(config.endpoint);
        }
        peer
    }

    /// The pair that what goes there passes: the first one, once it can.
    pub(crate) fn in_use(&self) -> Option<&Arc<Pair>> {
        match self.pairs.as_slice() {
            [only] => Some(only),
            pairs => pairs.iter().find(|pair| pair.last_handshake().is_some()).or_else(|| pairs.first()),
        }
    }

    /// The pair that is to be used.
    pub(crate) fn preferred(&self) -> Option<&Arc<Pair>> {
        self.pairs.first()
    }

    /// The tunnels that live: those that nobody speaks through begin nothing.
    pub(crate) fn live_tunnels(&self) -> impl Iterator<Item = MutexGuard<'_, Tunn>> {
        let begins = |at: usize, pair: &Pair| at == 0 || pair.last_handshake().is_some();
        self.pairs.iter().enumerate().flat_map(move |(at, pair)| {
            let outward = begins(at, pair).then_some(Direction::Outward);
            outward.into_iter().chain([Direction::Inward]).map(|direction| pair.tunnel(direction))
        })
    }

    pub(crate) fn endpoint(&self) -> SocketAddr {
        *self.standing.endpoint.lock().expect("nobody panics while holding it")
    }

    /// Whether it is time to answer a peer's handshake with one of our own; if so, it is taken as done.
    pub(crate) fn may_greet(&self) -> bool {
        let handshake = self.preferred().and_then(|pair| pair.last_handshake());
        let mut greeted = self.standing.greeted.lock().expect("nobody panics while holding it");
        let fresh = handshake.is_some_and(|since| since < GREETING_PAUSE)
            || greeted.is_some_and(|at| at.elapsed() < GREETING_PAUSE);
        if !fresh {
            *greeted = Some(Instant::now());
        }
        !fresh
    }

    /// Where the managers say it is.
    fn announced(&self) -> SocketAddr {
        *self.standing.announced.lock().expect("nobody panics while holding it")
    }

    /// The managers say that it is elsewhere now.
    fn announce(&self, endpoint: SocketAddr) {
        *self.standing.announced.lock().expect("nobody panics while holding it") = endpoint;
        self.move_to(endpoint);
    }

    /// Moves the tunnel to where the peer was heard from.
    pub(crate) fn move_to(&self, endpoint: SocketAddr) {
        *self.standing.endpoint.lock().expect("nobody panics while holding it") = endpoint;
    }

    pub(crate) fn count_sent(&self, bytes: usize) {
        self.standing.sent.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    pub(crate) fn count_received(&self, bytes: usize) {
        self.standing.received.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    fn report(&self) -> Option<PeerReport> {
        Some(PeerReport {
            node: self.node,
            public_key: self.preferred()?.their_key,
            endpoint: self.endpoint(),
            handshake_secs: self.in_use()?.last_handshake().map(|since| since.as_secs()),
            sent_bytes: self.standing.sent.load(Ordering::Relaxed),
            received_bytes: self.standing.received.load(Ordering::Relaxed),
        })
    }
}

/// Which of a pair's tunnels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Direction {
    Outward,
    Inward,
}

/// Pairs of one peer.
const PAIRS_MAX: u8 = 128;

/// What tells a tunnel from all others of this node in the messages of its peer (24 bits).
fn tunnel_number(index: PeerIndex, pair: u8, direction: Direction) -> u32 {
    u32::from(pair) << 17 | u32::from(index) << 1 | u32::from(direction == Direction::Inward)
}

/// A pair of keys of this node.
pub(crate) struct Keys {
    held: SecretBytes,
    pub(crate) private: StaticSecret,
    pub(crate) public: PublicKey,
    pub(crate) limiter: Arc<RateLimiter>,
}

/// Handshakes a second before senders must prove their address.
const HANDSHAKES_PER_SECOND: u64 = 200;

impl Keys {
    fn new(key: &SecretBytes) -> Option<Self> {
        let private = private_key(key)?;
        let public = PublicKey::from(&private);
        let limiter = Arc::new(RateLimiter::new(&public, HANDSHAKES_PER_SECOND));
        Some(Self { held: key.clone(), private, public, limiter })
    }
}

/// A peer's tunnel that a message belongs to.
pub(crate) type Addressed<'a> = (&'a Arc<Peer>, &'a Arc<Pair>, Direction);

/// All tunnels, as one value that is replaced as a whole.
#[derive(Default)]
pub(crate) struct Peers {
    keys: Vec<Arc<Keys>>,
    by_index: BTreeMap<PeerIndex, Arc<Peer>>,
    addresses: HashMap<IpAddr, PeerIndex>,
    subnets: Vec<IpSubnet>,
    gateways: Vec<IpAddr>,
    ingress: Vec<IpSubnet>,
}

impl Peers {
    /// The tunnels of `state`; those that `before` has and that stay the same go on.
    pub(crate) fn new(state: &PathState, before: &Self) -> Self {
        let keys = state.keys.iter().filter_map(|key| {
            let known = before.keys.iter().find(|keys| keys.held == *key).cloned();
            known.or_else(|| Keys::new(key).map(Arc::new))
        });
        let keys: Vec<Arc<Keys>> = keys.collect();
        let by_index = state.peers.iter().map(|(&index, config)| {
            let known = before.by_index.get(&index).filter(|peer| peer.node == config.node);
            (index, Arc::new(Peer::new(index, config, known.map(AsRef::as_ref), &keys)))
        });
        Self {
            by_index: by_index.collect(),
            keys,
            addresses: state.addresses.iter().map(|(&address, &index)| (address, index)).collect(),
            subnets: state.subnets.iter().copied().collect(),
            gateways: state.gateways.iter().copied().collect(),
            ingress: state.ingress.iter().copied().collect(),
        }
    }

    pub(crate) fn get(&self, index: PeerIndex) -> Option<&Arc<Peer>> {
        self.by_index.get(&index)
    }

    /// This node's own keys.
    pub(crate) fn keys(&self) -> &[Arc<Keys>] {
        &self.keys
    }

    /// The tunnel that a receiver's index in a message names, as we told it to the peer: the number of
    /// the tunnel, and behind it the session's.
    pub(crate) fn by_receiver(&self, receiver: u32) -> Option<Addressed<'_>> {
        let number = receiver >> 8;
        let direction = if number & 1 == 1 { Direction::Inward } else { Direction::Outward };
        let peer = self.get(PeerIndex::try_from(number >> 1 & u32::from(PeerIndex::MAX)).ok()?)?;
        let pair = peer.pairs.iter().find(|pair| u32::from(pair.number) == number >> 17)?;
        Some((peer, pair, direction))
    }

    /// The tunnel of two keys: what a peer begins passes the one inward.
    pub(crate) fn by_keys(&self, own: &Keys, theirs: &[u8; 32]) -> Option<Addressed<'_>> {
        let own = own.public.as_bytes();
        self.iter().find_map(|peer| {
            let pair = peer.pairs.iter().find(|pair| pair.own_key == *own && pair.their_key == *theirs)?;
            Some((peer, pair, Direction::Inward))
        })
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Arc<Peer>> {
        self.by_index.values()
    }

    pub(crate) fn reports(&self) -> Vec<PeerReport> {
        self.iter().filter_map(|peer| peer.report()).collect()
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
        foreign && self.ingress.iter().any(|ingress| ingress.contains(destination))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn packet(source: &str, destination: &str, protocol: u8) -> Vec<u8> {
        let ends = [source, destination].map(|text| text.parse::<IpAddr>().unwrap());
        match ends {
            [IpAddr::V4(source), IpAddr::V4(destination)] => {
                let mut packet = vec![0; 20];
                packet[0] = 0x45;
                packet[9] = protocol;
                packet[12..16].copy_from_slice(&source.octets());
                packet[16..20].copy_from_slice(&destination.octets());
                packet
            }
            [IpAddr::V6(source), IpAddr::V6(destination)] => {
                let mut packet = vec![0; 40];
                packet[0] = 0x60;
                packet[6] = protocol;
                packet[8..24].copy_from_slice(&source.octets());
                packet[24..40].copy_from_slice(&destination.octets());
                packet
            }
            _ => panic!("{source} and {destination} are of two families"),
        }
    }

    fn peer(number: u8) -> PeerConfig {
        PeerConfig {
            node: NodeId::from_u128(u128::from(number)),
            keys: vec![[number; 32]],
            endpoint: SocketAddr::from(([127, 0, 0, 1], 1)),
        }
    }

    /// Two networks of a family, by what their addresses begin with, of which ports are published through the first; and
    /// two peers, that have the second's addresses 2 and 3.
    #[track_caller]
    fn check_admission([entry, inner]: [&str; 2], subnets: [IpSubnet; 2], stranger: &str, (icmp, other): (u8, u8)) {
        let [gateway, first, second, local] = [1, 2, 3, 9].map(|host| format!("{inner}{host}"));
        let published = format!("{entry}9");
        let address = |text: &str| text.parse::<IpAddr>().unwrap();
        let state = PathState {
            peers: [(1, peer(1)), (2, peer(2))].into(),
            addresses: [(address(&first), 1), (address(&second), 2)].into(),
            subnets: subnets.into(),
            gateways: [address(&gateway)].into(),
            ingress: [subnets[0]].into(),
            keys: vec![key(7)],
            ..PathState::default()
        };
        let peers = Peers::new(&state, &Peers::default());
        let own = packet(&first, &local, 6);
        assert!(peers.admits(1, &own) && !peers.admits(2, &own));
        assert!(!peers.admits(1, &packet(&format!("{inner}7"), &local, 6)), "an address nobody has");
        assert!(peers.admits(1, &packet(stranger, &published, 6)), "a client from outside, to a port");
        assert!(!peers.admits(1, &packet(stranger, &local, 6)), "from outside into a network");
        assert!(peers.admits(1, &packet(&gateway, &local, icmp)), "a router's word");
        assert!(!peers.admits(1, &packet(&gateway, &local, 6)), "a router's connection");
        assert!(!peers.admits(1, &packet(&gateway, &local, other)), "a word of the other family");
        assert!(!peers.admits(1, &own[..own.len() - 1]), "one that is cut off");
        let to = |packet: &[u8]| peers.route(BY_ADDRESS, packet).map(|peer| peer.index);
        assert_eq!(to(&packet(&local, &second, 6)), Some(2));
        assert_eq!(to(&packet(&local, &format!("{inner}8"), 6)), None);
        assert_eq!(peers.route(1, &own).map(|peer| peer.index), Some(1));
    }

    #[test]
    fn a_node_speaks_for_its_own_tasks_alone() {
        let v4 = ["10.0.0.0/24", "10.0.1.0/24"].map(|text| IpSubnet::V4(text.parse().unwrap()));
        check_admission(["10.0.0.", "10.0.1."], v4, "192.0.2.1", (1, 58));
        let v6 = ["fd00::/64", "fd00:1::/64"].map(|text| IpSubnet::V6(text.parse().unwrap()));
        check_admission(["fd00::", "fd00:1::"], v6, "2001:db8::1", (58, 1));
    }

    fn key(number: u8) -> SecretBytes {
        SecretBytes::new(vec![number; 32])
    }

    fn one_peer(own: &[u8], theirs: &[u8]) -> PathState {
        let config = PeerConfig {
            node: NodeId::from_u128(1),
            keys: theirs.iter().map(|&number| [number; 32]).collect(),
            endpoint: SocketAddr::from(([127, 0, 0, 1], 1)),
        };
        let keys = own.iter().map(|&number| key(number)).collect();
        PathState { keys, peers: [(300, config)].into(), ..PathState::default() }
    }

    #[test]
    fn a_receiver_names_its_tunnel() {
        let peers = Peers::new(&one_peer(&[7], &[1, 2]), &Peers::default());
        for (at, pair) in peers.get(300).unwrap().pairs.iter().enumerate() {
            assert_eq!(usize::from(pair.number), at);
            for direction in [Direction::Outward, Direction::Inward] {
                let receiver = tunnel_number(300, pair.number, direction) << 8 | 5;
                let (peer, found, found_direction) = peers.by_receiver(receiver).unwrap();
                assert!(peer.index == 300 && Arc::ptr_eq(found, pair) && found_direction == direction);
            }
        }
        assert!(peers.by_receiver(tunnel_number(7, 0, Direction::Inward) << 8).is_none());
        assert!(peers.by_receiver(tunnel_number(300, 9, Direction::Inward) << 8).is_none());
    }

    #[test]
    fn tunnels_go_on_while_keys_change() {
        let pairs = |peers: &Peers| peers.get(300).unwrap().pairs.clone();
        let before = Peers::new(&one_peer(&[7], &[1]), &Peers::default());
        let during = Peers::new(&one_peer(&[8, 7], &[2, 1]), &before);
        assert_eq!(pairs(&during).len(), 4);
        assert!(Arc::ptr_eq(&pairs(&during)[3], &pairs(&before)[0]), "the old keys' tunnels are the same");
        let numbers: std::collections::BTreeSet<_> = pairs(&during).iter().map(|pair| pair.number).collect();
        assert_eq!(numbers.len(), 4, "each has a number of its own");
        let after = Peers::new(&one_peer(&[8], &[2]), &during);
        assert!(pairs(&after).len() == 1 && Arc::ptr_eq(&pairs(&after)[0], &pairs(&during)[0]));
        let own = after.keys()[0].clone();
        assert!(after.by_keys(&own, &[2; 32]).is_some() && after.by_keys(&own, &[1; 32]).is_none());
    }

    #[test]
    fn a_mac_names_its_peer() {
        assert_eq!(peer_of_mac(&mac(513)), Some(513));
        assert_eq!(peer_of_mac(&[0xff; 6]), None);
    }
}
