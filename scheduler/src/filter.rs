//! What keeps a task off a node, and how that is told.

use std::collections::BTreeMap;

use skep_api::constraint::Constraint;
use skep_api::task::{Resources, TaskSpec};

use crate::place::Group;
use crate::view::NodeView;
use crate::volumes::{self, Volumes};

/// Why a node cannot take a task; in the order the filters are asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Obstacle {
    NotReady,
    Resources,
    Constraints,
    Platform,
    HostPort,
    Volumes,
    MaxReplicas,
}

impl Obstacle {
    /// The clause for `count` nodes, in the words that users of Swarm know.
    fn describe(self, count: usize) -> String {
        let nodes = if count == 1 { "1 node".to_owned() } else { format!("{count} nodes") };
        match self {
            Self::NotReady => format!("{nodes} not available for new tasks"),
            Self::Resources => format!("insufficient resources on {nodes}"),
            Self::Constraints => format!("scheduling constraints not satisfied on {nodes}"),
            Self::Platform => format!("unsupported platform on {nodes}"),
            Self::HostPort => format!("host-mode port already in use on {nodes}"),
            Self::Volumes => format!("cluster volumes not available on {nodes}"),
            Self::MaxReplicas => format!("max replicas per node limit exceeded on {nodes}"),
        }
    }
}

/// Puts the obstacles of all nodes into one sentence.
pub(crate) fn explain(obstacles: impl Iterator<Item = Obstacle>) -> String {
    let mut counts: BTreeMap<Obstacle, usize> = BTreeMap::new();
    for obstacle in obstacles {
        *counts.entry(obstacle).or_default() += 1;
    }
    if counts.is_empty() {
        return "no suitable node (the swarm has no nodes)".to_owned();
    }
    let clauses: Vec<_> = counts.into_iter().map(|(obstacle, count)| obstacle.describe(count)).collect();
    format!("no suitable node ({})", clauses.join("; "))
}

/// The filters of one group of tasks, read once from their spec.
pub(crate) struct Filters<'a> {
    constraints: Vec<Constraint>,
    reserved: Resources,
    max_replicas: u64,
    /// Those that the tasks could have; none if they ask for none.
    volumes: Option<&'a Volumes>,
    group: &'a Group,
}

impl<'a> Filters<'a> {
    pub(crate) fn new(volumes: &'a Volumes, group: &'a Group) -> Self {
        let spec: &TaskSpec = &group.occupant.spec;
        Self {
            // Specs are validated when they come in; what cannot be read now admits no node.
            constraints: spec.placement.constraints.iter().filter_map(|text| text.parse().ok()).collect(),
            reserved: spec.resources.reserved(),
            max_replicas: spec.placement.max_replicas,
            volumes: volumes::mounts(spec).next().map(|_| volumes),
            group,
        }
    }

    /// What stands against one more task on `node`, which has `count` of the service already.
    pub(crate) fn obstacle(&self, node: &NodeView, count: u64) -> Option<Obstacle> {
        if !node.node.takes_tasks() {
            return Some(Obstacle::NotReady);
        }
        self.obstacle_when_ready(node, count)
    }

    /// The same for a node that need not take new tasks, as for the check of a task that has one.
    pub(crate) fn obstacle_when_ready(&self, node: &NodeView, count: u64) -> Option<Obstacle> {
        let spec = &self.group.occupant.spec;
        if !node.fits(&self.reserved) {
            return Some(Obstacle::Resources);
        }
        if self.constraints.len() != spec.placement.constraints.len()
            || !self.constraints.iter().all(|constraint| constraint.admits(&node.node))
        {
            return Some(Obstacle::Constraints);
        }
        let platforms = &spec.placement.platforms;
        let platform = &node.node.description.platform;
        if !platforms.is_empty() && !platforms.iter().any(|wanted| wanted.runs_on(platform)) {
            return Some(Obstacle::Platform);
        }
        if !node.ports_free(&self.group.occupant.ports) {
            return Some(Obstacle::HostPort);
        }
        if self.volumes.is_some_and(|volumes| volumes.choose(&node.node, spec).is_none()) {
            return Some(Obstacle::Volumes);
        }
        (self.max_replicas != 0 && count >= self.max_replicas).then_some(Obstacle::MaxReplicas)
    }
}
