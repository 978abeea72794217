//! What one node must know of the swarm's networks, and the messages that bring it there from what
//! it was told before.
//!
//! Invariant: a node is told of networks that it takes part in, and of what is in them; nothing else.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use skep_api::grpc;
use skep_api::overlay::{
    Digests, Fact, FactKey, OverlayAttachment, OverlayNetwork, OverlayService, OverlayTask, Peer, ServiceNetwork,
};
use skep_api::service::PortConfig;
use skep_api::{
    Network, NetworkAttachment, NetworkId, Node, NodeId, NodeState, Object, ObjectKey, Service, Task, TaskState,
    encoding,
};
use skep_raft_store::{Change, Commit, Tables};

use crate::allocator;

/// A message is closed once it holds about this many bytes.
const PART_LEN: usize = 512 << 10;

/// What commits may have changed of what nodes are told. To look at that alone costs the same however
/// much there is besides.
#[derive(Debug, Default)]
pub(super) struct Touched {
    /// Whatever there is.
    everything: bool,
    keys: BTreeSet<FactKey>,
    /// Nodes that are down now, or back.
    nodes: BTreeSet<NodeId>,
    /// The last commit that is in here.
    index: u64,
}

impl Touched {
    pub(super) fn everything() -> Self {
        Self { everything: true, ..Self::default() }
    }

    /// Takes a commit in; `None`: some were missed.
    pub(super) fn note(&mut self, commit: Option<&Commit>) {
        let Some(commit) = commit else {
            self.everything = true;
            return;
        };
        self.index = self.index.max(commit.index);
        for change in &commit.changes {
            self.note_change(change);
        }
    }

    fn note_change(&mut self, change: &Change) {
        match (change.key, &change.before, &change.after) {
            (ObjectKey::Task(id), before, after) => {
                let joins = |object: &Option<Object>| match object {
                    Some(Object::Task(task)) => !task.networks.is_empty(),
                    _ => false,
                };
                if joins(before) || joins(after) {
                    self.keys.insert(FactKey::Task(id));
                }
            }
            (ObjectKey::Service(id), ..) => drop(self.keys.insert(FactKey::Service(id))),
            (ObjectKey::NetworkAttachment(id), ..) => drop(self.keys.insert(FactKey::Attachment(id))),
            (ObjectKey::Node(id), before, after) => {
                let is_down = |object: &Option<Object>| match object {
                    Some(Object::Node(node)) => node.status.state == NodeState::Down,
                    _ => true,
                };
                self.keys.insert(FactKey::Peer(id));
                if is_down(before) != is_down(after) {
                    self.nodes.insert(id);
                }
            }
            // With every address that is given out, a hint in its network changes, and nothing else.
            (ObjectKey::Network(_), Some(Object::Network(before)), Some(Object::Network(after)))
                if network_fact(before) == network_fact(after) => {}
            (ObjectKey::Network(_), ..) => self.everything = true,
            (ObjectKey::Cluster(_) | ObjectKey::Secret(_) | ObjectKey::Config(_) | ObjectKey::Volume(_), ..) => {}
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        !self.everything && self.keys.is_empty() && self.nodes.is_empty()
    }

    /// The keys of all that may be different.
    fn all_keys(&self, tables: &Tables) -> BTreeSet<FactKey> {
        let of_nodes = self.nodes.iter().flat_map(|&node| {
            let tasks = tables.tasks_of_node(node).map(|task| FactKey::Task(task.id));
            let attachments = tables.attachments.iter().filter(move |held| held.node == node);
            tasks.chain(attachments.map(|held| FactKey::Attachment(held.id)))
        });
        self.keys.iter().copied().chain(of_nodes).collect()
    }
}

/// What a node was told last.
#[derive(Debug, Default)]
pub(super) struct ToldFacts {
    begun: bool,
    networks: BTreeSet<NetworkId>,
    facts: BTreeMap<FactKey, Fact>,
    /// Of the facts.
    digests: Digests,
    /// Everything up to this commit is in there.
    revision: u64,
    /// Of the last message that was necessary.
    sent: u64,
}

impl ToldFacts {
    pub(super) const fn revision(&self) -> u64 {
        self.revision
    }

    /// The messages that are missing; empty if nothing is.
    pub(super) fn update(&mut self, tables: &Tables, node: NodeId, touched: &Touched) -> Vec<grpc::Facts> {
        let networks = networks_of(tables, node);
        let ids: BTreeSet<NetworkId> = networks.iter().map(|network| network.id).collect();
        // A node that takes part in nothing needs no complete set of nothing, but after a restart of
        // its manager it may hold what is no longer so.
        let complete = !self.begun;
        let anew = complete || touched.everything || ids != self.networks;
        let now: BTreeMap<FactKey, Option<Fact>> = if anew {
            let facts = all_facts(tables, networks, &ids);
            let gone = self.facts.keys().filter(|key| !facts.contains_key(key)).map(|&key| (key, None));
            gone.collect::<Vec<_>>().into_iter().chain(facts.into_iter().map(|(key, fact)| (key, Some(fact)))).collect()
        } else if ids.is_empty() {
            BTreeMap::new()
        } else {
            touched.all_keys(tables).into_iter().map(|key| (key, fact(tables, key, &ids))).collect()
        };
        self.begun = true;
        self.networks = ids;
        // The tables may be ahead of the commits that were looked at.
        self.revision = self.revision.max(if anew { tables.index } else { touched.index });
        let mut parts = Parts::new(complete, self.revision);
        for (key, fact) in now {
            match fact {
                Some(fact) if self.facts.get(&key) != Some(&fact) => {
                    parts.push(&fact);
                    self.digests.add(&fact);
                    if let Some(before) = self.facts.insert(key, fact) {
                        self.digests.remove(&before);
                    }
                }
                None => {
                    if let Some(before) = self.facts.remove(&key) {
                        self.digests.remove(&before);
                        parts.remove(key);
                    }
                }
                Some(_) => {}
            }
        }
        let parts = parts.finish();
        self.sent = parts.last().map_or(self.sent, |part| part.revision);
        parts
    }

    /// The names of networks of which a node that holds `revision` has not what it was told.
    pub(super) fn otherwise(&self, revision: u64, digests: &Digests) -> Vec<String> {
        // What it does not hold yet cannot be compared.
        let different = if revision == self.sent { self.digests.different(digests) } else { Vec::new() };
        let name = |network: Option<NetworkId>| match network.map(|id| (id, self.facts.get(&FactKey::Network(id)))) {
            Some((_, Some(Fact::Network(network)))) => format!("network {}", network.name),
            Some((id, _)) => format!("network {id}"),
            None => "the nodes".to_owned(),
        };
        different.into_iter().map(name).collect()
    }
}

/// Cuts a set into messages.
struct Parts {
    done: Vec<grpc::Facts>,
    open: grpc::Facts,
    len: usize,
}

impl Parts {
    fn new(complete: bool, revision: u64) -> Self {
        Self { done: Vec::new(), open: grpc::Facts { complete, revision, ..grpc::Facts::default() }, len: 0 }
    }

    fn push(&mut self, fact: &Fact) {
        let bytes = encoding::encode(fact);
        if self.len > 0 && self.len + bytes.len() > PART_LEN {
            let (complete, revision) = (self.open.complete, self.open.revision);
            let next = grpc::Facts { complete, revision, ..grpc::Facts::default() };
            self.done.push(std::mem::replace(&mut self.open, next));
            self.len = 0;
        }
        self.len += bytes.len();
        self.open.facts.push(bytes);
    }

    fn remove(&mut self, key: FactKey) {
        self.open.removed.push(encoding::encode(&key));
    }

    fn finish(mut self) -> Vec<grpc::Facts> {
        let open = &self.open;
        if open.complete || !open.facts.is_empty() || !open.removed.is_empty() || !self.done.is_empty() {
            self.open.last = true;
            self.done.push(self.open);
        }
        self.done
    }
}

/// Everything that a node in `networks` should know, whose ids are `ids`.
fn all_facts(tables: &Tables, networks: Vec<OverlayNetwork>, ids: &BTreeSet<NetworkId>) -> BTreeMap<FactKey, Fact> {
    if networks.is_empty() {
        return BTreeMap::new();
    }
    let peers = tables.nodes.iter().map(|node| FactKey::Peer(node.id));
    let services = tables.services.iter().map(|service| FactKey::Service(service.id));
    let tasks = tables.tasks.iter().map(|task| FactKey::Task(task.id));
    let attachments = tables.attachments.iter().map(|held| FactKey::Attachment(held.id));
    let others = peers.chain(services).chain(tasks).chain(attachments);
    let others = others.filter_map(|key| fact(tables, key, ids));
    networks.into_iter().map(Fact::Network).chain(others).map(|fact| (fact.key(), fact)).collect()
}

/// What a node in `networks` should know under a key, if anything.
fn fact(tables: &Tables, key: FactKey, networks: &BTreeSet<NetworkId>) -> Option<Fact> {
    match key {
        FactKey::Peer(id) => peer(tables.nodes.get(id)?).map(Fact::Peer),
        FactKey::Network(id) => tables.networks.get(id).map(|network| Fact::Network(network_fact(network))),
        FactKey::Service(id) => service_fact(tables, tables.services.get(id)?, networks).map(Fact::Service),
        FactKey::Task(id) => task_fact(tables, tables.tasks.get(id)?, networks).map(Fact::Task),
        FactKey::Attachment(id) => {
            let held = tables.attachments.get(id).filter(|held| networks.contains(&held.network))?;
            Some(Fact::Attachment(attachment_fact(tables, held)))
        }
    }
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
    ids.into_iter().filter_map(|id| tables.networks.get(id)).map(|network| network_fact(network)).collect()
}

fn network_fact(network: &Network) -> OverlayNetwork {
    OverlayNetwork {
        id: network.id,
        name: network.spec.name.clone(),
        subnet: network.subnet,
        gateway: network.gateway,
        v6: network.v6,
        encrypted: network.is_encrypted(),
        internal: network.spec.internal,
        ingress: network.spec.ingress,
        mtu_bytes: network.mtu_bytes(),
    }
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
        kernel_port: path.kernel_port,
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
    let serving = reached && task.status.state == TaskState::Running && task.desired_state.is_wanted();
    let fact = OverlayTask { id: task.id, service: task.service_id, name: task.name(), node, addresses, serving };
    (!fact.addresses.is_empty()).then_some(fact)
}

/// Nobody is called by name whose node is not there.
fn attachment_fact(tables: &Tables, attachment: &NetworkAttachment) -> OverlayAttachment {
    let NetworkAttachment { id, node, network, address, .. } = *attachment;
    let reached = tables.nodes.get(node).is_some_and(|node| node.status.state != NodeState::Down);
    OverlayAttachment { id, node, network, address, names: if reached { attachment.names.clone() } else { Vec::new() } }
}

#[cfg(test)]
mod tests {
    use skep_api::task::{Attachment, Slot};
    use skep_api::{Meta, NetworkSpec, ServiceId, Subnet, TaskId, TaskStatus, Timestamp};
    use skep_raft_store::Transaction;

    use super::*;

    /// Applies a change and returns it as it is told to watchers.
    fn commit(tables: &mut Tables, change: impl FnOnce(&Tables, &mut Transaction)) -> Commit {
        let mut tx = Transaction::new(Timestamp::NEVER);
        change(tables, &mut tx);
        let before = tables.clone();
        let index = tables.index + 1;
        let keys: Vec<ObjectKey> = tx
            .actions
            .iter()
            .map(|action| match action {
                skep_raft_store::Action::Create(object) | skep_raft_store::Action::Update(object) => object.key(),
                skep_raft_store::Action::Delete(key, _) => *key,
            })
            .collect();
        tables.apply_for_test(index, tx).unwrap();
        let change = |key: ObjectKey| Change { key, before: before.get(key), after: tables.get(key) };
        Commit { index, at: Timestamp::NEVER, changes: keys.into_iter().map(change).collect() }
    }

    fn network(id: u128) -> Network {
        let subnet: Subnet = format!("10.0.{id}.0/24").parse().unwrap();
        let spec = NetworkSpec { name: format!("n{id}"), ..NetworkSpec::default() };
        let (id, gateway) = (NetworkId::from_u128(id), subnet.nth(1).unwrap());
        Network { id, meta: Meta::default(), spec, subnet, gateway, v6: None, cursor: 0 }
    }

    fn task(id: u128, node: u128, network: u128) -> Task {
        Task {
            id: TaskId::from_u128(id),
            service_id: ServiceId::from_u128(1),
            node_id: Some(NodeId::from_u128(node)),
            networks: vec![Attachment {
                network: NetworkId::from_u128(network),
                address: std::net::Ipv4Addr::new(10, 0, 1, u8::try_from(id).unwrap()),
            }],
            status: TaskStatus { state: TaskState::Running, ..TaskStatus::default() },
            desired_state: TaskState::Running,
            job_iteration: None,
            meta: Meta::default(),
            labels: BTreeMap::new(),
            spec: Arc::default(),
            service_name: "web".into(),
            ports: Vec::new(),
            slot: Slot::Replica(1),
            mesh_ports: Vec::new(),
            running_since: None,
            usual_log_driver: None,
            assigned: Vec::new(),
            volumes: Vec::new(),
        }
    }

    /// Two followers of the same node: one looks at what was touched, the other at everything.
    #[derive(Default)]
    struct Followers {
        tables: Tables,
        touching: ToldFacts,
    }

    impl Followers {
        fn tell(&mut self, change: impl FnOnce(&Tables, &mut Transaction)) -> (usize, usize) {
            let commit = commit(&mut self.tables, change);
            let mut touched = Touched::default();
            touched.note(Some(&commit));
            let node = NodeId::from_u128(1);
            let parts = self.touching.update(&self.tables, node, &touched);
            let mut whole = ToldFacts::default();
            whole.update(&self.tables, node, &Touched::everything());
            assert_eq!(self.touching.facts, whole.facts, "both are told the same");
            assert_eq!(self.touching.digests, self.touching.facts.values().collect());
            (parts.iter().map(|part| part.facts.len()).sum(), parts.iter().map(|part| part.removed.len()).sum())
        }
    }

    #[test]
    fn what_is_told_after_a_change_is_what_it_changed() {
        let mut followers = Followers::default();
        followers.tell(|_, tx| {
            tx.create(network(1));
            tx.create(network(2));
        });
        assert_eq!(followers.tell(|_, tx| tx.create(task(5, 2, 1))), (0, 0), "it takes part in nothing yet");
        assert_eq!(followers.tell(|_, tx| tx.create(task(6, 1, 1))), (3, 0), "the network and both tasks");
        assert_eq!(followers.tell(|_, tx| tx.create(task(7, 2, 1))), (1, 0));
        assert_eq!(followers.tell(|_, tx| tx.create(task(8, 2, 2))), (0, 0), "another network's");
        let hint = |tables: &Tables, tx: &mut Transaction| {
            let network = tables.networks.get(NetworkId::from_u128(1)).unwrap();
            tx.update(Network { cursor: 9, ..(**network).clone() });
        };
        assert_eq!(followers.tell(hint), (0, 0));
        let ended = |tables: &Tables, tx: &mut Transaction| {
            let task = tables.tasks.get(TaskId::from_u128(7)).unwrap();
            let status = TaskStatus { state: TaskState::Failed, ..TaskStatus::default() };
            tx.update(Task { status, ..(**task).clone() });
        };
        assert_eq!(followers.tell(ended), (0, 1));
        let last = |tables: &Tables, tx: &mut Transaction| {
            let task = tables.tasks.get(TaskId::from_u128(6)).unwrap();
            tx.delete(ObjectKey::Task(task.id), task.meta.version);
        };
        assert_eq!(followers.tell(last), (0, 3), "nothing is needed any more");
    }

    #[test]
    fn a_commit_that_was_not_looked_at_is_not_said_to_be_told() {
        let mut followers = Followers::default();
        followers.tell(|_, tx| {
            tx.create(network(1));
            tx.create(task(6, 1, 1));
        });
        let held = followers.touching.revision();
        let seen = commit(&mut followers.tables, |_, tx| tx.create(task(7, 2, 1)));
        commit(&mut followers.tables, |_, tx| tx.create(task(8, 2, 1)));
        let mut touched = Touched::default();
        touched.note(Some(&seen));
        let parts = followers.touching.update(&followers.tables, NodeId::from_u128(1), &touched);
        assert_eq!((parts[0].revision, parts[0].facts.len()), (held + 1, 1));
    }

    #[test]
    fn a_node_that_has_something_else_is_found_out() {
        let mut followers = Followers::default();
        followers.tell(|_, tx| {
            tx.create(network(1));
            tx.create(task(6, 1, 1));
        });
        let told = &followers.touching;
        let mut held = told.digests.clone();
        assert!(told.otherwise(told.sent, &held).is_empty());
        let wrong =
            OverlayTask { serving: false, ..task_fact(&followers.tables, &task(6, 1, 1), &told.networks).unwrap() };
        held.add(&Fact::Task(wrong));
        assert_eq!(told.otherwise(told.sent, &held), ["network n1"]);
        assert!(told.otherwise(told.sent - 1, &held).is_empty(), "it may not hold the newest yet");
    }
}
