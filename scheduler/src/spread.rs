//! Placement preferences: spread over the values of a label, and within each over the next one.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};

use crate::filter::Filters;
use crate::place::{Group, Rank, Taken};
use crate::view::{ClusterView, NodeIndex, NodeView};

/// The nodes of one group, as a tree of label values with nodes at its leaves.
pub(crate) struct SpreadTree<'a> {
    group: &'a Group,
    root: Branch<'a>,
}

/// Nodes that share a label's value.
struct Branch<'a> {
    /// Tasks of the service below.
    tasks: u64,
    children: Children<'a>,
}

enum Children<'a> {
    Values(BTreeMap<&'a str, Branch<'a>>),
    Nodes { heap: BinaryHeap<Reverse<Rank>>, taken: BTreeMap<NodeIndex, Taken<'a>> },
}

impl<'a> SpreadTree<'a> {
    pub(crate) fn new(view: &'a ClusterView, group: &'a Group, filters: &'a Filters<'a>) -> Self {
        let levels: Vec<&str> =
            group.occupant.spec.placement.preferences.iter().map(|p| p.spread.spread_descriptor.as_str()).collect();
        let mut root = Branch::new(&levels);
        let counts = view.of_service(group.occupant.service);
        for index in view.by_load() {
            let count = counts.get(&index).copied().unwrap_or(0);
            let taken = Taken::new(view.node(index), filters, group, count);
            root.insert(&levels, index, view.node(index), taken, count);
        }
        Self { group, root }
    }

    pub(crate) fn run(mut self) -> Vec<NodeIndex> {
        self.group.tasks.iter().map_while(|_| self.root.take()).collect()
    }
}

impl<'a> Branch<'a> {
    fn new(levels: &[&str]) -> Self {
        let children = if levels.is_empty() {
            Children::Nodes { heap: BinaryHeap::new(), taken: BTreeMap::new() }
        } else {
            Children::Values(BTreeMap::new())
        };
        Self { tasks: 0, children }
    }

    fn insert(&mut self, levels: &[&str], index: NodeIndex, node: &'a NodeView, taken: Taken<'a>, count: u32) {
        self.tasks += u64::from(count);
        match (&mut self.children, levels) {
            (Children::Values(values), [level, below @ ..]) => values
                .entry(label_value(node, level))
                .or_insert_with(|| Branch::new(below))
                .insert(below, index, node, taken, count),
            (Children::Nodes { heap, taken: all }, _) => {
                // A node that can take nothing still counts above: its tasks are the service's.
                if taken.obstacle().is_none() {
                    heap.push(Reverse(taken.rank(index)));
                    all.insert(index, taken);
                }
            }
            (Children::Values(_), []) => unreachable!("a branch with values has a level"),
        }
    }

    /// Takes the best node below, from the value that has the fewest tasks.
    fn take(&mut self) -> Option<NodeIndex> {
        let index = match &mut self.children {
            Children::Values(values) => {
                let mut order: Vec<_> = values.values_mut().collect();
                order.sort_by_key(|branch| branch.tasks);
                order.into_iter().find_map(Branch::take)?
            }
            Children::Nodes { heap, taken } => loop {
                let Reverse(rank) = heap.pop()?;
                let Some(node) = taken.get_mut(&rank.index) else { continue };
                if node.obstacle().is_none() {
                    node.take();
                    heap.push(Reverse(node.rank(rank.index)));
                    break rank.index;
                }
            },
        };
        self.tasks += 1;
        Some(index)
    }
}

/// A node without the label belongs to the empty value, as in Swarm.
fn label_value<'a>(node: &'a NodeView, descriptor: &str) -> &'a str {
    let spec = &node.node.spec.labels;
    let engine = &node.node.description.engine.labels;
    let value = match (descriptor.strip_prefix("node.labels."), descriptor.strip_prefix("engine.labels.")) {
        (Some(label), _) => spec.get(label),
        (None, Some(label)) => engine.get(label),
        (None, None) => None,
    };
    value.map_or("", String::as_str)
}
