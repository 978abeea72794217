//! What a node must know to carry the swarm's networks: facts, each under its key, streamed by the
//! managers. A node has only those of networks it takes part in.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, Ipv6Addr};

use sha2::{Digest as _, Sha256};
use skep_api_derive::Extensible;

use crate::encoding;
use crate::id::{AttachmentId, NetworkId, NodeId, ServiceId, TaskId};
use crate::ipv6::Ipv6Side;
use crate::service::PortConfig;
use crate::subnet::Subnet;

/// Names a fact; a newer fact of the same key replaces the older.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Extensible)]
pub enum FactKey {
    Peer(NodeId),
    Network(NetworkId),
    Service(ServiceId),
    Task(TaskId),
    Attachment(AttachmentId),
}

#[derive(Clone, Debug, PartialEq, Eq, Extensible)]
pub enum Fact {
    Peer(Peer),
    Network(OverlayNetwork),
    Service(OverlayService),
    Task(OverlayTask),
    Attachment(OverlayAttachment),
}

impl Fact {
    #[must_use]
    pub const fn key(&self) -> FactKey {
        match self {
            Self::Peer(peer) => FactKey::Peer(peer.node),
            Self::Network(network) => FactKey::Network(network.id),
            Self::Service(service) => FactKey::Service(service.id),
            Self::Task(task) => FactKey::Task(task.id),
            Self::Attachment(attachment) => FactKey::Attachment(attachment.id),
        }
    }
}

impl Fact {
    /// The networks that it is about; of peers, all.
    fn networks(&self) -> Vec<Option<NetworkId>> {
        match self {
            Self::Peer(_) => vec![None],
            Self::Network(network) => vec![Some(network.id)],
            Self::Service(service) => service.networks.iter().map(|joined| Some(joined.network)).collect(),
            Self::Task(task) => task.addresses.iter().map(|&(network, _)| Some(network)).collect(),
            Self::Attachment(attachment) => vec![Some(attachment.network)],
        }
    }

    fn digest(&self) -> u64 {
        let bytes = match self {
            // A host whose kernel has no IPv6 leaves that out.
            Self::Network(network) => encoding::encode(&Self::Network(OverlayNetwork { v6: None, ..network.clone() })),
            other => encoding::encode(other),
        };
        Sha256::digest(bytes).first_chunk().map_or(0, |first| u64::from_le_bytes(*first))
    }
}

/// What tells one set of facts from another, for each network: two sides that have the same facts have the same
/// digests, in whatever order they came to them. What is not of one network (peers) stands under none.
#[derive(Clone, Debug, Default, PartialEq, Eq, Extensible)]
pub struct Digests(BTreeMap<Option<NetworkId>, u64>);

impl Digests {
    pub fn add(&mut self, fact: &Fact) {
        self.change(fact, u64::wrapping_add);
    }

    /// Takes out a fact that was added.
    pub fn remove(&mut self, fact: &Fact) {
        self.change(fact, u64::wrapping_sub);
    }

    fn change(&mut self, fact: &Fact, by: fn(u64, u64) -> u64) {
        let digest = fact.digest();
        for network in fact.networks() {
            let sum = by(self.of(network), digest);
            match sum {
                0 => drop(self.0.remove(&network)),
                sum => drop(self.0.insert(network, sum)),
            }
        }
    }

    /// Of a network, or of what is of none.
    #[must_use]
    pub fn of(&self, network: Option<NetworkId>) -> u64 {
        self.0.get(&network).copied().unwrap_or(0)
    }

    /// The networks that another has otherwise.
    #[must_use]
    pub fn different(&self, other: &Self) -> Vec<Option<NetworkId>> {
        let all: std::collections::BTreeSet<_> = self.0.keys().chain(other.0.keys()).copied().collect();
        all.into_iter().filter(|&network| self.of(network) != other.of(network)).collect()
    }
}

impl<'a> FromIterator<&'a Fact> for Digests {
    fn from_iter<I: IntoIterator<Item = &'a Fact>>(facts: I) -> Self {
        let mut digests = Self::default();
        facts.into_iter().for_each(|fact| digests.add(fact));
        digests
    }
}

/// Another node, or this one.
#[derive(Clone, Debug, PartialEq, Eq, Extensible)]
pub struct Peer {
    pub node: NodeId,
    pub hostname: String,
    /// Public, X25519: the first is the one to speak to, the others are taken as well.
    pub keys: Vec<[u8; 32]>,
    /// `address:port` of its data path.
    pub endpoint: String,
    /// UDP, of its kernel's own WireGuard at the same address, if it has that.
    pub kernel_port: Option<u16>,
}

#[derive(Clone, Debug, PartialEq, Eq, Extensible)]
pub struct OverlayNetwork {
    pub id: NetworkId,
    pub name: String,
    pub subnet: Subnet,
    pub gateway: Ipv4Addr,
    pub v6: Option<Ipv6Side>,
    pub encrypted: bool,
    pub internal: bool,
    pub ingress: bool,
    pub mtu_bytes: Option<u32>,
}

impl OverlayNetwork {
    /// The IPv6 address of who has `host` here.
    #[must_use]
    pub fn address_v6(&self, host: Ipv4Addr) -> Option<Ipv6Addr> {
        self.v6.map(|side| side.address(self.subnet, host))
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Extensible)]
pub struct OverlayService {
    pub id: ServiceId,
    pub name: String,
    pub networks: Vec<ServiceNetwork>,
    /// What every node publishes for it.
    pub ports: Vec<PortConfig>,
}

/// A service in one network.
#[derive(Clone, Debug, PartialEq, Eq, Extensible)]
pub struct ServiceNetwork {
    pub network: NetworkId,
    /// Absent: its names stand for its tasks' addresses.
    pub vip: Option<Ipv4Addr>,
    pub aliases: Vec<String>,
}

/// A task that has addresses, from before it starts until it has ended.
#[derive(Clone, Debug, PartialEq, Eq, Extensible)]
pub struct OverlayTask {
    pub id: TaskId,
    pub service: ServiceId,
    /// `service.slot.task-id`.
    pub name: String,
    pub node: NodeId,
    pub addresses: Vec<(NetworkId, Ipv4Addr)>,
    /// Whether new connections are to reach it. What it has goes on either way.
    pub serving: bool,
}

/// A single container that has an address in a network.
#[derive(Clone, Debug, PartialEq, Eq, Extensible)]
pub struct OverlayAttachment {
    pub id: AttachmentId,
    pub node: NodeId,
    pub network: NetworkId,
    pub address: Ipv4Addr,
    /// Empty while its node is not there.
    pub names: Vec<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn task(id: u128, networks: &[u128], serving: bool) -> Fact {
        let addresses = networks.iter().map(|&id| (NetworkId::from_u128(id), Ipv4Addr::new(10, 0, 0, 2))).collect();
        let (service, node) = (ServiceId::from_u128(1), NodeId::from_u128(1));
        Fact::Task(OverlayTask { id: TaskId::from_u128(id), service, name: "a".into(), node, addresses, serving })
    }

    #[test]
    fn digests_tell_which_network_is_otherwise() {
        let facts = [task(1, &[1, 2], true), task(2, &[2], true), task(3, &[3], true)];
        let digests: Digests = facts.iter().collect();
        assert_eq!(digests, facts.iter().rev().collect(), "the order does not count");
        let mut other = digests.clone();
        other.remove(&facts[0]);
        other.add(&task(1, &[1, 2], false));
        let ids = |ids: &[u128]| ids.iter().map(|&id| Some(NetworkId::from_u128(id))).collect::<Vec<_>>();
        assert_eq!(digests.different(&other), ids(&[1, 2]));
        other.remove(&task(1, &[1, 2], false));
        other.add(&facts[0]);
        assert_eq!(digests, other);
        facts.iter().for_each(|fact| other.remove(fact));
        assert_eq!(other, Digests::default(), "nothing is left of what is gone");
    }
}
