//! What one node must know of the swarm's networks, and the messages that bring it there from what
//! it was told before.
//!
//! Invariant: a node is told of networks that it takes part in, and of what is in them; nothing else.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use skep_api::grpc;
use skep_api::overlay::{
    Fact, FactKey, OverlayAttachment, OverlayNetwork, OverlayService, OverlayTask, Peer, ServiceNetwork,
};
use skep_api::service::PortConfig;
use skep_api::{
    NetworkAttachment, NetworkId, Node, NodeId, NodeState, Object, ObjectKey, Service, Task, TaskState, encoding,
};
use skep_raft_store::{Commit, Tables};

use crate::allocator;

/// A message is closed once it holds about this many bytes.
const PART_LEN: usize = 512 << 10;

/// Whether a commit may change what nodes are told.
pub(super) fn concerns(commit: &Commit) -> bool {
    commit.changes.iter().any(|change| match change.key {
        ObjectKey::Task(_) => {
            let joins = |object: &Option<Object>| match object {
                Some(Object::Task(task)) => !task.networks.is_empty(),
                _ => false,
            };
            joins(&change.before) || joins(&change.after)
        }
        ObjectKey::Node(_) | ObjectKey::Network(_) | ObjectKey::Service(_) | ObjectKey::NetworkAttachment(_) => true,
        ObjectKey::Cluster(_) | ObjectKey::Secret(_) | ObjectKey::Config(_) => false,
    })
}

/// What a node was told last.
#[derive(Debug, Default)]
pub(super) struct ToldFacts {
    begun: bool,
    facts: BTreeMap<FactKey, Fact>,
}

impl ToldFacts {
    /// The messages that are missing; empty if nothing is.
    pub(super) fn update(&mut self, tables: &Tables, node: NodeId) -> Vec<grpc::Facts> {
        let now = facts_of(tables, node);
        // A node that takes part in nothing needs no complete set of nothing, but after a restart of
        // its manager it may hold what is no longer so.
        let complete = !self.begun;
        self.begun = true;
        let empty = || grpc::Facts { complete, revision: tables.index, ..grpc::Facts::default() };
        let (mut parts, mut open, mut len) = (Vec::new(), empty(), 0);
        for fact in now.values().filter(|fact| self.facts.get(&fact.key()) != Some(fact)) {
            let bytes = encoding::encode(fact);
            if len > 0 && len + bytes.len() > PART_LEN {
                parts.push(std::mem::replace(&mut open, empty()));
                len = 0;
            }
            len += bytes.len();
            open.facts.push(bytes);
        }
        let gone = self.facts.keys().filter(|key| !now.contains_key(key));
        open.removed.extend(gone.map(encoding::encode));
        if complete || !open.facts.is_empty() || !open.removed.is_empty() || !parts.is_empty() {
            open.last = true;
            parts.push(open);
        }
        self.facts = now;
        parts
    }
}

/// Everything that `node` should know.
fn facts_of(tables: &Tables, node: NodeId) -> BTreeMap<FactKey, Fact> {
    let networks = networks_of(tables, node);
    if networks.is_empty() {
        return BTreeMap::new();
    }
    let ids: BTreeSet<NetworkId> = networks.iter().map(|network| network.id).collect();
    let peers = tables.nodes.iter().filter_map(|node| peer(node)).map(Fact::Peer);
    let services = tables.services.iter().filter_map(|service| service_fact(tables, service, &ids)).map(Fact::Service);
    let tasks = tables.tasks.iter().filter_map(|task| task_fact(tables, task, &ids)).map(Fact::Task);
    let attachments = tables.attachments.iter().filter(|attachment| ids.contains(&attachment.network));
    let attachments = attachments.map(|attachment| Fact::Attachment(attachment_fact(tables, attachment)));
    let networks = networks.into_iter().map(Fact::Network);
    networks.chain(peers).chain(services).chain(tasks).chain(attachments).map(|fact| (fact.key(), fact)).collect()
}

/// The networks of the node's tasks and single containers, and the ingress network as soon as any port is published.
fn networks_of(tables: &Tables, node: NodeId) -> Vec<OverlayNetwork> {
    let live = tables.tasks_of_node(node).filter(|task| !task.status.state.is_terminal());
    let mut ids: BTreeSet<NetworkId> = live.flat_map(|task| &task.networks).map(|joined| joined.network).collect();
    ids.extend(tables.attachments.iter().filter(|attachment| attachment.node == node).map(|held| held.network));
    let opens = |service: &Arc<Service>| !service.removed && service.spec.ingress_ports().next().is_some();
    if tables.services.iter().any(opens) {
        ids.extend(allocator::ingress(tables).map(|network| network.id));
    }
    let fact = |network: &Arc<skep_api::Network>| OverlayNetwork {
        id: network.id,
        name: network.spec.name.clone(),
        subnet: network.subnet,
        gateway: network.gateway,
        encrypted: network.is_encrypted(),
        internal: network.spec.internal,
        ingress: network.spec.ingress,
        mtu_bytes: network.mtu_bytes(),
    };
    ids.into_iter().filter_map(|id| tables.networks.get(id)).map(fact).collect()
}

fn peer(node: &Node) -> Option<Peer> {
    let path = node.description.data_path.as_ref()?;
    let addr = if path.addr.is_empty() { &node.status.addr } else { &path.addr };
    let addr: IpAddr = addr.parse().ok()?;
    Some(Peer {
        node: node.id,
        hostname: node.description.hostname.clone(),
        keys: path.keys.clone(),
        endpoint: std::net::SocketAddr::new(addr, path.port).to_string(),
    })
}

fn service_fact(tables: &Tables, service: &Service, networks: &BTreeSet<NetworkId>) -> Option<OverlayService> {
    let spec = &service.spec;
    let vip_in = |network: NetworkId| {
        service.endpoint.virtual_ips.iter().find(|vip| vip.network == network).map(|vip| vip.address)
    };
    let named = spec.task_template.networks.iter().filter_map(|wanted| {
        let network: NetworkId = wanted.target.parse().ok()?;
        let joined = ServiceNetwork { network, vip: vip_in(network), aliases: wanted.aliases.clone() };
        networks.contains(&network).then_some(joined)
    });
    let ports: Vec<PortConfig> = if service.removed { Vec::new() } else { ingress_ports(service) };
    let ingress = (!ports.is_empty()).then(|| allocator::ingress(tables)).flatten();
    let ingress = ingress.map(|n| ServiceNetwork { network: n.id, vip: vip_in(n.id), aliases: Vec::new() });
    let joined: Vec<_> = named.chain(ingress).collect();
    let fact = OverlayService { id: service.id, name: spec.name.clone(), networks: joined, ports };
    (!fact.networks.is_empty()).then_some(fact)
}

fn ingress_ports(service: &Service) -> Vec<PortConfig> {
    let ports = service.endpoint.ports.iter();
    ports.filter(|port| port.publish_mode == skep_api::service::PublishMode::Ingress).cloned().collect()
}

fn task_fact(tables: &Tables, task: &Task, networks: &BTreeSet<NetworkId>) -> Option<OverlayTask> {
    let node = task.node_id.filter(|_| !task.status.state.is_terminal())?;
    let joined = task.networks.iter().filter(|joined| networks.contains(&joined.network));
    let addresses: Vec<_> = joined.map(|joined| (joined.network, joined.address)).collect();
    let reached = tables.nodes.get(node).is_some_and(|node| node.status.state != NodeState::Down);
    let serving = reached && task.status.state == TaskState::Running && task.desired_state <= TaskState::Running;
    let fact = OverlayTask { id: task.id, service: task.service_id, name: task.name(), node, addresses, serving };
    (!fact.addresses.is_empty()).then_some(fact)
}

/// Nobody is called by name whose node is not there.
fn attachment_fact(tables: &Tables, attachment: &NetworkAttachment) -> OverlayAttachment {
    let NetworkAttachment { id, node, network, address, .. } = *attachment;
    let reached = tables.nodes.get(node).is_some_and(|node| node.status.state != NodeState::Down);
    OverlayAttachment { id, node, network, address, names: if reached { attachment.names.clone() } else { Vec::new() } }
}
