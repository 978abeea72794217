//! The placement itself.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};

use skep_api::generic_resource::GenericResource;
use skep_api::volume::VolumeAttachment;
use skep_api::{NodeId, TaskId};

use crate::filter::{Filters, Obstacle, explain};
use crate::spread::SpreadTree;
use crate::view::{ClusterView, NodeIndex, NodeView, Occupant};
use crate::volumes;

/// Pending tasks of one service that are alike.
#[derive(Clone, Debug)]
pub struct Group {
    pub occupant: Occupant,
    pub tasks: Vec<TaskId>,
}

/// What [`place`] decided.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    pub placements: Vec<(TaskId, NodeId)>,
    /// The volumes of the swarm that placed tasks have there, of those that ask for any.
    pub volumes: BTreeMap<TaskId, Vec<VolumeAttachment>>,
    pub refusals: Vec<Refusal>,
}

/// Tasks that must wait, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    pub tasks: Vec<TaskId>,
    pub reason: String,
}

/// Decides where the tasks of each group go, and counts them in `view`. Changes nothing else.
pub fn place(view: &mut ClusterView, groups: &[Group]) -> Plan {
    let mut plan = Plan::default();
    for group in groups {
        if volumes::mounts(&group.occupant.spec).next().is_none() {
            place_group(view, group, &mut plan);
            continue;
        }
        // What one of them takes, the next may not have.
        for &task in &group.tasks {
            place_group(view, &Group { occupant: group.occupant.clone(), tasks: vec![task] }, &mut plan);
        }
    }
    plan
}

fn place_group(view: &mut ClusterView, group: &Group, plan: &mut Plan) {
    let spec = &group.occupant.spec;
    let chosen = choose(view, group);
    let placed = chosen.len();
    let mut counts: BTreeMap<NodeIndex, u32> = BTreeMap::new();
    for (&task, index) in group.tasks.iter().zip(chosen) {
        let node = view.node(index).node.id;
        plan.placements.push((task, node));
        *counts.entry(index).or_default() += 1;
        if let Some(attachments) = view.choose_volumes(node, spec).filter(|attachments| !attachments.is_empty()) {
            view.take_volumes(node, spec, &attachments);
            plan.volumes.insert(task, attachments);
        }
    }
    for (index, count) in counts {
        view.occupy(index, &group.occupant, count);
    }
    if placed < group.tasks.len() {
        plan.refusals.push(Refusal { tasks: group.tasks[placed..].to_vec(), reason: refusal(view, group) });
    }
}

/// The nodes for the tasks of a group that find one.
fn choose(view: &ClusterView, group: &Group) -> Vec<NodeIndex> {
    let filters = Filters::new(&view.volumes, group);
    if group.occupant.spec.placement.preferences.is_empty() {
        Round::new(view, group, &filters).run()
    } else {
        SpreadTree::new(view, group, &filters).run()
    }
}

fn refusal(view: &ClusterView, group: &Group) -> String {
    let filters = Filters::new(&view.volumes, group);
    let counts = view.of_service(group.occupant.service);
    let reason = explain(view.by_load().filter_map(|index| {
        let count = counts.get(&index).copied().unwrap_or(0);
        filters.obstacle(view.node(index), u64::from(count))
    }));
    with_volumes(view, group, reason)
}

/// The reason with what stands against the group's volumes on every node alike.
fn with_volumes(view: &ClusterView, group: &Group, reason: String) -> String {
    match view.volumes.obstacle_everywhere(&group.occupant.spec) {
        Some(obstacle) => format!("{reason}: {obstacle}"),
        None => reason,
    }
}

/// Whether the one node that a task is meant for takes it (a global service's).
pub fn check_node(view: &ClusterView, node: NodeId, group: &Group) -> Result<(), String> {
    let filters = Filters::new(&view.volumes, group);
    match view.find(node) {
        None => Err("no suitable node (the task's node left the swarm)".to_owned()),
        Some(index) => {
            let obstacle = filters.obstacle(view.node(index), 0);
            obstacle.map_or(Ok(()), |obstacle| Err(with_volumes(view, group, explain(std::iter::once(obstacle)))))
        }
    }
}

/// What a node has taken in this round, on top of what the view counts.
pub(crate) struct Taken<'a> {
    node: &'a NodeView,
    filters: &'a Filters<'a>,
    group: &'a Group,
    of_service: u32,
    here: u32,
}

impl<'a> Taken<'a> {
    pub(crate) fn new(node: &'a NodeView, filters: &'a Filters<'a>, group: &'a Group, of_service: u32) -> Self {
        Self { node, filters, group, of_service, here: 0 }
    }

    /// What stands against one more task, with those of this round counted.
    pub(crate) fn obstacle(&self) -> Option<Obstacle> {
        if self.here == 0 {
            return self.filters.obstacle(self.node, u64::from(self.of_service));
        }
        let fixed_port = self.group.occupant.ports.iter().any(|port| port.published_port != 0);
        if fixed_port {
            return Some(Obstacle::HostPort);
        }
        let reserved = self.group.occupant.spec.resources.reserved();
        let max = self.group.occupant.spec.placement.max_replicas;
        if max != 0 && u64::from(self.of_service + self.here) >= max {
            return Some(Obstacle::MaxReplicas);
        }
        let times = i64::from(self.here) + 1;
        let all = skep_api::task::Resources {
            nano_cpus: skep_api::units::NanoCpus(reserved.nano_cpus.0 * times),
            memory_bytes: skep_api::units::ByteSize(reserved.memory_bytes.0 * times),
            generic: reserved.generic.iter().map(|resource| times_as_many(resource, times)).collect(),
        };
        (!self.node.fits(&all)).then_some(Obstacle::Resources)
    }

    pub(crate) fn take(&mut self) {
        self.here += 1;
    }

    /// Nodes with the smallest rank are filled first.
    pub(crate) fn rank(&self, index: NodeIndex) -> Rank {
        Rank {
            failing: self.node.failing.contains(&self.group.occupant.service),
            of_service: self.of_service + self.here,
            load: self.node.tasks + self.here,
            index,
        }
    }
}

fn times_as_many(resource: &GenericResource, times: i64) -> GenericResource {
    GenericResource::Discrete { kind: resource.kind().to_owned(), value: resource.count() * times }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Rank {
    failing: bool,
    of_service: u32,
    load: u32,
    pub(crate) index: NodeIndex,
}

/// Places one group without preferences: first on nodes that have no task of the service, least
/// loaded first, then again and again on whichever has the fewest.
struct Round<'a> {
    view: &'a ClusterView,
    group: &'a Group,
    filters: &'a Filters<'a>,
    taken: BTreeMap<NodeIndex, Taken<'a>>,
    heap: BinaryHeap<Reverse<Rank>>,
    chosen: Vec<NodeIndex>,
}

impl<'a> Round<'a> {
    fn new(view: &'a ClusterView, group: &'a Group, filters: &'a Filters<'a>) -> Self {
        Self { view, group, filters, taken: BTreeMap::new(), heap: BinaryHeap::new(), chosen: Vec::new() }
    }

    fn run(mut self) -> Vec<NodeIndex> {
        let counts = self.view.of_service(self.group.occupant.service);
        for (&index, &count) in &counts {
            self.enter(index, count);
        }
        for index in self.view.by_load() {
            if self.chosen.len() == self.group.tasks.len() {
                break;
            }
            if !counts.contains_key(&index) {
                self.visit(index);
            }
        }
        while self.chosen.len() < self.group.tasks.len() {
            let Some(Reverse(rank)) = self.heap.pop() else { break };
            let Some(taken) = self.taken.get_mut(&rank.index) else { continue };
            if taken.obstacle().is_some() {
                continue;
            }
            taken.take();
            self.chosen.push(rank.index);
            self.heap.push(Reverse(taken.rank(rank.index)));
        }
        self.chosen
    }

    /// A node without a task of the service: it is the best there is, unless the service fails there.
    fn visit(&mut self, index: NodeIndex) {
        let mut taken = Taken::new(self.view.node(index), self.filters, self.group, 0);
        if taken.obstacle().is_some() {
            return;
        }
        if !taken.rank(index).failing {
            taken.take();
            self.chosen.push(index);
        }
        self.heap.push(Reverse(taken.rank(index)));
        self.taken.insert(index, taken);
    }

    fn enter(&mut self, index: NodeIndex, count: u32) {
        let taken = Taken::new(self.view.node(index), self.filters, self.group, count);
        self.heap.push(Reverse(taken.rank(index)));
        self.taken.insert(index, taken);
    }
}
