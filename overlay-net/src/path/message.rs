//! What the daemon and the data path's process say to each other, over a socket between them:
//! a length, then a message in the versioned encoding.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use bincode::{Decode, Encode};
use skep_api::{IpSubnet, NetworkId, NodeId, SecretBytes, encoding};
use skep_name_server::{Served, Zone};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};

/// Peers are numbered from 1 by each node for itself.
pub(crate) type PeerIndex = u16;

/// The largest message.
const MESSAGE_LEN_MAX: u32 = 64 << 20;

/// Another node, as the tunnels need it.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub(crate) struct PeerConfig {
    pub(crate) node: NodeId,
    /// The first is the one to speak to, the others are taken as well.
    pub(crate) keys: Vec<[u8; 32]>,
    pub(crate) endpoint: SocketAddr,
}

/// What has names of its own.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Encode, Decode)]
pub(crate) enum ZoneKey {
    Network(NetworkId),
    /// What one container alone sees.
    Container(String),
}

/// A container that is served names.
pub(crate) type ServedContainer = Served<ZoneKey>;

/// All that the data path should do.
#[derive(Clone, Debug, Default, PartialEq, Eq, Encode, Decode)]
pub(crate) struct PathState {
    /// This node's own, the one in use first.
    pub(crate) keys: Vec<SecretBytes>,
    pub(crate) peers: BTreeMap<PeerIndex, PeerConfig>,
    /// Whose addresses of other nodes' tasks are.
    pub(crate) addresses: BTreeMap<IpAddr, PeerIndex>,
    pub(crate) subnets: BTreeSet<IpSubnet>,
    pub(crate) gateways: BTreeSet<IpAddr>,
    /// Where connections from outside the swarm may go.
    pub(crate) ingress: BTreeSet<IpSubnet>,
    pub(crate) zones: BTreeMap<ZoneKey, Zone>,
    pub(crate) served: BTreeMap<String, ServedContainer>,
}

/// From the daemon.
#[derive(Clone, Debug, Encode, Decode)]
pub(crate) enum ToPath {
    /// In place of all before.
    Replace(Box<PathState>),
    Change(Box<PathChange>),
    /// Answered with [`FromPath::Synced`] once all before is in force.
    Sync(u64),
    Report,
}

/// What is different; absent parts stay as they are.
#[derive(Clone, Debug, Default, PartialEq, Eq, Encode, Decode)]
pub(crate) struct PathChange {
    pub(crate) keys: Option<Vec<SecretBytes>>,
    pub(crate) peers: Option<BTreeMap<PeerIndex, PeerConfig>>,
    /// None: the address is nobody's any more.
    pub(crate) addresses: BTreeMap<IpAddr, Option<PeerIndex>>,
    pub(crate) networks: Option<(BTreeSet<IpSubnet>, BTreeSet<IpAddr>, BTreeSet<IpSubnet>)>,
    pub(crate) zones: BTreeMap<ZoneKey, Option<Zone>>,
    /// Of zones that go on.
    pub(crate) names: BTreeMap<ZoneKey, Names>,
    pub(crate) served: BTreeMap<String, Option<ServedContainer>>,
}

/// Names that stand for other addresses now.
#[derive(Clone, Debug, Default, PartialEq, Eq, Encode, Decode)]
pub(crate) struct Names {
    pub(crate) v4: BTreeMap<String, Vec<Ipv4Addr>>,
    pub(crate) v6: BTreeMap<String, Vec<Ipv6Addr>>,
}

impl Names {
    /// Writes them into their zone.
    pub(crate) fn write(&self, zone: &mut Zone) {
        zone.names.extend(self.v4.clone());
        zone.names_v6.extend(self.v6.clone());
    }
}

impl PathChange {
    /// What is different, if that is nothing but names.
    pub(crate) fn names_alone(&self) -> Option<&BTreeMap<ZoneKey, Names>> {
        let Self { keys: None, peers: None, addresses, networks: None, zones, names, served } = self else {
            return None;
        };
        (addresses.is_empty() && zones.is_empty() && served.is_empty()).then_some(names)
    }
}

/// From the data path.
#[derive(Clone, Debug, Encode, Decode)]
pub(crate) enum FromPath {
    /// The device is there.
    Ready,
    Synced(u64),
    Report(Vec<PeerReport>),
}

/// How a tunnel does.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub(crate) struct PeerReport {
    pub(crate) node: NodeId,
    /// The peer's, that is spoken to.
    pub(crate) public_key: [u8; 32],
    pub(crate) endpoint: SocketAddr,
    /// Since the last handshake; none if there was none.
    pub(crate) handshake_secs: Option<u64>,
    pub(crate) sent_bytes: u64,
    pub(crate) received_bytes: u64,
}

impl PathState {
    /// What leads from this state to `next`; `None` if nothing does.
    pub(crate) fn change_to(&self, next: &Self) -> Option<PathChange> {
        let networks = |state: &Self| (state.subnets.clone(), state.gateways.clone(), state.ingress.clone());
        let change = PathChange {
            keys: (self.keys != next.keys).then(|| next.keys.clone()),
            peers: (self.peers != next.peers).then(|| next.peers.clone()),
            addresses: changes(&self.addresses, &next.addresses),
            networks: (networks(self) != networks(next)).then(|| networks(next)),
            zones: changes(&self.zones, &next.zones),
            names: BTreeMap::new(),
            served: changes(&self.served, &next.served),
        };
        (change != PathChange::default()).then_some(change)
    }

    pub(crate) fn apply(&mut self, change: PathChange) {
        if let Some(keys) = change.keys {
            self.keys = keys;
        }
        if let Some(peers) = change.peers {
            self.peers = peers;
        }
        if let Some((subnets, gateways, ingress)) = change.networks {
            (self.subnets, self.gateways, self.ingress) = (subnets, gateways, ingress);
        }
        merge(&mut self.addresses, change.addresses);
        merge(&mut self.zones, change.zones);
        for (key, names) in &change.names {
            if let Some(zone) = self.zones.get_mut(key) {
                names.write(zone);
            }
        }
        merge(&mut self.served, change.served);
    }
}

fn changes<K: Ord + Clone, V: Clone + PartialEq>(
    before: &BTreeMap<K, V>,
    after: &BTreeMap<K, V>,
) -> BTreeMap<K, Option<V>> {
    let gone = before.keys().filter(|key| !after.contains_key(key)).map(|key| (key.clone(), None));
    let new = after.iter().filter(|(key, value)| before.get(key) != Some(value));
    gone.chain(new.map(|(key, value)| (key.clone(), Some(value.clone())))).collect()
}

fn merge<K: Ord, V>(map: &mut BTreeMap<K, V>, changes: BTreeMap<K, Option<V>>) {
    for (key, value) in changes {
        match value {
            Some(value) => drop(map.insert(key, value)),
            None => drop(map.remove(&key)),
        }
    }
}

/// Writes one message.
pub(crate) async fn send<T: Encode>(stream: &mut (impl AsyncWrite + Unpin), message: &T) -> io::Result<()> {
    let bytes = encoding::encode(message);
    let len = u32::try_from(bytes.len()).map_err(io::Error::other)?;
    stream.write_u32(len).await?;
    stream.write_all(&bytes).await?;
    stream.flush().await
}

/// Reads one message; `None` once the other side has gone.
pub(crate) async fn receive<T: Decode<()>>(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<Option<T>> {
    let len = match stream.read_u32().await {
        Ok(len) if len <= MESSAGE_LEN_MAX => len,
        Ok(len) => return Err(io::Error::new(io::ErrorKind::InvalidData, format!("a message of {len} bytes"))),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        Err(error) => return Err(error),
    };
    let mut bytes = vec![0; usize::try_from(len).map_err(io::Error::other)?];
    stream.read_exact(&mut bytes).await?;
    encoding::decode(&bytes).map(Some).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_leads_from_one_state_to_the_next() {
        let peer = |port: u16| PeerConfig {
            node: NodeId::from_u128(1),
            keys: vec![[1; 32]],
            endpoint: SocketAddr::new([127, 0, 0, 1].into(), port),
        };
        let before = PathState {
            peers: [(1, peer(1))].into(),
            addresses: [(IpAddr::from([10, 0, 1, 2]), 1), (IpAddr::from([10, 0, 1, 3]), 1)].into(),
            zones: [(ZoneKey::Network(NetworkId::from_u128(1)), Zone::default())].into(),
            ..PathState::default()
        };
        let mut after = before.clone();
        after.peers.insert(2, peer(2));
        after.addresses.remove(&IpAddr::from([10, 0, 1, 2]));
        after.addresses.insert(IpAddr::from([10, 0, 1, 4]), 2);
        after.zones.clear();
        after.subnets.insert(IpSubnet::V4("10.0.1.0/24".parse().unwrap()));
        assert_eq!(before.change_to(&before), None);
        let mut state = before.clone();
        state.apply(before.change_to(&after).unwrap());
        assert_eq!(state, after);
    }
}
