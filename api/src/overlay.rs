//! What a node must know to carry the swarm's networks: facts, each under its key, streamed by the
//! managers. A node has only those of networks it takes part in.

use std::net::{Ipv4Addr, Ipv6Addr};

use bincode::{Decode, Encode};

use crate::id::{AttachmentId, NetworkId, NodeId, ServiceId, TaskId};
use crate::ipv6::Ipv6Side;
use crate::service::PortConfig;
use crate::subnet::Subnet;

/// Names a fact; a newer fact of the same key replaces the older.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode)]
pub enum FactKey {
    Peer(NodeId),
    Network(NetworkId),
    Service(ServiceId),
    Task(TaskId),
    Attachment(AttachmentId),
}

#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
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

/// Another node, or this one.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Peer {
    pub node: NodeId,
    pub hostname: String,
    /// Public, X25519: the first is the one to speak to, the others are taken as well.
    pub keys: Vec<[u8; 32]>,
    /// `address:port` of its data path.
    pub endpoint: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
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

#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct OverlayService {
    pub id: ServiceId,
    pub name: String,
    pub networks: Vec<ServiceNetwork>,
    /// What every node publishes for it.
    pub ports: Vec<PortConfig>,
}

/// A service in one network.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct ServiceNetwork {
    pub network: NetworkId,
    /// Absent: its names stand for its tasks' addresses.
    pub vip: Option<Ipv4Addr>,
    pub aliases: Vec<String>,
}

/// A task that has addresses, from before it starts until it has ended.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
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
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct OverlayAttachment {
    pub id: AttachmentId,
    pub node: NodeId,
    pub network: NetworkId,
    pub address: Ipv4Addr,
    /// Empty while its node is not there.
    pub names: Vec<String>,
}
