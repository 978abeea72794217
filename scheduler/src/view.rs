//! What the scheduler knows of the cluster, kept up to date by its owner.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use skep_api::generic_resource::{GenericResource, count_of};
use skep_api::service::{PortConfig, Protocol};
use skep_api::task::{Resources, TaskSpec};
use skep_api::volume::VolumeAttachment;
use skep_api::{Node, NodeId, ServiceId, Volume};

use crate::volumes::Volumes;

/// A node's place in [`ClusterView`]; small, so that indexes stay small.
pub(crate) type NodeIndex = u32;

/// A node with what is left on it.
#[derive(Clone, Debug)]
pub(crate) struct NodeView {
    pub(crate) node: Arc<Node>,
    /// CPU and memory.
    pub(crate) reserved: Resources,
    /// How much of each kind of generic resource is reserved.
    generic: BTreeMap<String, i64>,
    pub(crate) tasks: u32,
    pub(crate) host_ports: BTreeSet<(Protocol, u16)>,
    /// Services whose tasks fail here again and again; other nodes are tried first.
    pub(crate) failing: BTreeSet<ServiceId>,
}

impl NodeView {
    /// Whether `wanted` fits beside what is reserved.
    pub(crate) fn fits(&self, wanted: &Resources) -> bool {
        let total = &self.node.description.resources;
        let fits_kind = |wanted: &GenericResource| {
            let kind = wanted.kind();
            let reserved = self.generic.get(kind).copied().unwrap_or(0);
            reserved + wanted.count() <= count_of(&total.generic, kind)
        };
        self.reserved.nano_cpus.0 + wanted.nano_cpus.0 <= total.nano_cpus.0
            && self.reserved.memory_bytes.0 + wanted.memory_bytes.0 <= total.memory_bytes.0
            && wanted.generic.iter().all(fits_kind)
    }

    /// Sets aside what so many tasks alike reserve, or takes it back.
    fn reserve(&mut self, occupant: &Occupant, times: i64) {
        let Some(reserved) = &occupant.spec.resources.reservations else { return };
        self.reserved.nano_cpus.0 += reserved.nano_cpus.0 * times;
        self.reserved.memory_bytes.0 += reserved.memory_bytes.0 * times;
        for resource in &reserved.generic {
            *self.generic.entry(resource.kind().to_owned()).or_default() += resource.count() * times;
        }
    }

    pub(crate) fn ports_free(&self, ports: &[PortConfig]) -> bool {
        fixed_ports(ports).all(|port| !self.host_ports.contains(&port))
    }
}

fn fixed_ports(ports: &[PortConfig]) -> impl Iterator<Item = (Protocol, u16)> + '_ {
    ports.iter().filter(|port| port.published_port != 0).map(|port| (port.protocol, port.published_port))
}

/// What a task takes up on its node.
#[derive(Clone, Debug)]
pub struct Occupant {
    pub service: ServiceId,
    pub spec: Arc<TaskSpec>,
    /// The host ports its node publishes for it.
    pub ports: Vec<PortConfig>,
}

/// The nodes, what runs on them, and the orders the scheduler needs them in.
#[derive(Clone, Debug, Default)]
pub struct ClusterView {
    nodes: Vec<Option<NodeView>>,
    free: Vec<NodeIndex>,
    by_id: BTreeMap<NodeId, NodeIndex>,
    by_load: BTreeSet<(u32, NodeIndex)>,
    by_service: BTreeMap<ServiceId, BTreeMap<NodeIndex, u32>>,
    pub(crate) volumes: Volumes,
}

impl ClusterView {
    /// Adds a node, or takes a newer look at one.
    pub fn set_node(&mut self, node: Arc<Node>) {
        if let Some(&index) = self.by_id.get(&node.id) {
            if let Some(view) = &mut self.nodes[index as usize] {
                view.node = node;
            }
            return;
        }
        let id = node.id;
        let view = NodeView {
            node,
            reserved: Resources::default(),
            generic: BTreeMap::new(),
            tasks: 0,
            host_ports: BTreeSet::new(),
            failing: BTreeSet::new(),
        };
        let index = self.free.pop().unwrap_or_else(|| {
            self.nodes.push(None);
            u32::try_from(self.nodes.len() - 1).expect("fewer than 2^32 nodes")
        });
        self.nodes[index as usize] = Some(view);
        self.by_id.insert(id, index);
        self.by_load.insert((0, index));
    }

    /// Forgets a node and what ran on it.
    pub fn remove_node(&mut self, id: NodeId) {
        let Some(index) = self.by_id.remove(&id) else { return };
        if let Some(view) = self.nodes[index as usize].take() {
            self.by_load.remove(&(view.tasks, index));
        }
        for counts in self.by_service.values_mut() {
            counts.remove(&index);
        }
        self.free.push(index);
    }

    /// Adds a volume that nobody uses yet.
    pub fn set_volume(&mut self, volume: Arc<Volume>) {
        self.volumes.set(volume);
    }

    /// Counts the volumes that a task has, beside the task itself.
    pub fn take_volumes(&mut self, node: NodeId, spec: &TaskSpec, attachments: &[VolumeAttachment]) {
        self.volumes.take(node, spec, attachments);
    }

    /// The volumes that a task would have on the node, one for each mount that is one; none if not all are to be had.
    #[must_use]
    pub fn choose_volumes(&self, node: NodeId, spec: &TaskSpec) -> Option<Vec<VolumeAttachment>> {
        self.volumes.choose(&self.node(self.find(node)?).node, spec)
    }

    /// Counts a task that runs, or is bound to run, on `node`.
    pub fn add_task(&mut self, node: NodeId, occupant: &Occupant) {
        if let Some(&index) = self.by_id.get(&node) {
            self.occupy(index, occupant, 1);
        }
    }

    /// Takes back what [`add_task`](Self::add_task) counted.
    pub fn remove_task(&mut self, node: NodeId, occupant: &Occupant) {
        let Some(&index) = self.by_id.get(&node) else { return };
        let Some(view) = &mut self.nodes[index as usize] else { return };
        view.reserve(occupant, -1);
        for port in fixed_ports(&occupant.ports) {
            view.host_ports.remove(&port);
        }
        let before = view.tasks;
        view.tasks = before.saturating_sub(1);
        let after = view.tasks;
        self.by_load.remove(&(before, index));
        self.by_load.insert((after, index));
        if let Some(counts) = self.by_service.get_mut(&occupant.service) {
            match counts.get_mut(&index) {
                Some(count) if *count > 1 => *count -= 1,
                _ => drop(counts.remove(&index)),
            }
            if counts.is_empty() {
                self.by_service.remove(&occupant.service);
            }
        }
    }

    /// Says whether tasks of `service` keep failing on `node`.
    pub fn set_failing(&mut self, node: NodeId, service: ServiceId, failing: bool) {
        let Some(view) = self.by_id.get(&node).and_then(|&index| self.nodes[index as usize].as_mut()) else { return };
        if failing {
            view.failing.insert(service);
        } else {
            view.failing.remove(&service);
        }
    }

    /// Counts `count` tasks alike on the node at `index`.
    pub(crate) fn occupy(&mut self, index: NodeIndex, occupant: &Occupant, count: u32) {
        let Some(view) = &mut self.nodes[index as usize] else { return };
        view.reserve(occupant, i64::from(count));
        view.host_ports.extend(fixed_ports(&occupant.ports));
        let before = view.tasks;
        view.tasks += count;
        self.by_load.remove(&(before, index));
        self.by_load.insert((before + count, index));
        *self.by_service.entry(occupant.service).or_default().entry(index).or_default() += count;
    }

    pub(crate) fn node(&self, index: NodeIndex) -> &NodeView {
        self.nodes[index as usize].as_ref().expect("an index in use names a node")
    }

    pub(crate) fn find(&self, id: NodeId) -> Option<NodeIndex> {
        self.by_id.get(&id).copied()
    }

    /// The nodes, least loaded first.
    pub(crate) fn by_load(&self) -> impl Iterator<Item = NodeIndex> + '_ {
        self.by_load.iter().map(|&(_, index)| index)
    }

    /// How many tasks of `service` each node has, where it has any.
    pub(crate) fn of_service(&self, service: ServiceId) -> BTreeMap<NodeIndex, u32> {
        self.by_service.get(&service).cloned().unwrap_or_default()
    }
}
