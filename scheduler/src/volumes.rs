//! Volumes of the swarm: which of them a task could have on a node.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use skep_api::container::{Mount, MountKind};
use skep_api::id::VolumeId;
use skep_api::node::Availability;
use skep_api::task::TaskSpec;
use skep_api::volume::{GROUP_PREFIX, Scope, Sharing, VolumeAttachment};
use skep_api::{Node, NodeId, Volume};

/// The volumes, and who uses them.
#[derive(Clone, Debug, Default)]
pub(crate) struct Volumes(BTreeMap<VolumeId, VolumeView>);

#[derive(Clone, Debug)]
struct VolumeView {
    volume: Arc<Volume>,
    /// By tasks: where, and whether to write.
    uses: Vec<(NodeId, bool)>,
}

/// The mounts of a task that are volumes of the swarm.
pub(crate) fn mounts(spec: &TaskSpec) -> impl Iterator<Item = &Mount> {
    spec.container.mounts.iter().filter(|mount| mount.kind == MountKind::Cluster)
}

impl Volumes {
    pub(crate) fn set(&mut self, volume: Arc<Volume>) {
        self.0.insert(volume.id, VolumeView { volume, uses: Vec::new() });
    }

    /// Counts what a task on `node` has.
    pub(crate) fn take(&mut self, node: NodeId, spec: &TaskSpec, attachments: &[VolumeAttachment]) {
        for attachment in attachments {
            let writes = !mounts(spec).any(|mount| mount.target == attachment.target && mount.read_only);
            if let Some(view) = self.0.get_mut(&attachment.id) {
                view.uses.push((node, writes));
            }
        }
    }

    /// One volume for each of the task's mounts; none if one of them finds no volume.
    pub(crate) fn choose(&self, node: &Node, spec: &TaskSpec) -> Option<Vec<VolumeAttachment>> {
        let mut chosen: Vec<VolumeAttachment> = Vec::new();
        for mount in mounts(spec) {
            let fits = |view: &&VolumeView| {
                view.volume.is_meant_by(&mount.source)
                    && !chosen.iter().any(|taken| taken.id == view.volume.id)
                    && view.obstacle(mount.read_only).is_none()
                    && view.can_be_on(node)
                    && self.has_room(view, node)
            };
            // One that is there already is the nearest.
            let here = |view: &&VolumeView| view.volume.status_on(node.id).is_some();
            let fitting = || self.0.values().filter(fits);
            let view = fitting().find(here).or_else(|| fitting().next())?;
            chosen.push(VolumeAttachment {
                id: view.volume.id,
                source: mount.source.clone(),
                target: mount.target.clone(),
            });
        }
        Some(chosen)
    }

    /// Whether the node's side of the storage driver takes one more volume.
    fn has_room(&self, wanted: &VolumeView, node: &Node) -> bool {
        let name = &wanted.volume.spec.driver.name;
        let most = node.description.csi_driver(name).map_or(0, |driver| driver.max_volumes_per_node);
        let is_here = |view: &VolumeView| {
            view.volume.status_on(node.id).is_some() || view.uses.iter().any(|&(user, _)| user == node.id)
        };
        if most == 0 || is_here(wanted) {
            return true;
        }
        let others = self.0.values().filter(|view| view.volume.spec.driver.name == *name && is_here(view)).count();
        i64::try_from(others).is_ok_and(|others| others < most)
    }

    /// What stands against a task's volumes on every node alike; none if it depends on the node.
    pub(crate) fn obstacle_everywhere(&self, spec: &TaskSpec) -> Option<String> {
        mounts(spec).find_map(|mount| {
            let mut meant = self.0.values().filter(|view| view.volume.is_meant_by(&mount.source)).peekable();
            if meant.peek().is_none() {
                return Some(match mount.source.strip_prefix(GROUP_PREFIX) {
                    Some(group) => format!("there is no cluster volume in group {group:?}"),
                    None => format!("there is no cluster volume {}", mount.source),
                });
            }
            let mut reasons = BTreeSet::new();
            for view in meant {
                reasons.insert(view.obstacle(mount.read_only).or_else(|| view.trouble())?);
            }
            Some(reasons.into_iter().collect::<Vec<_>>().join("; "))
        })
    }
}

impl VolumeView {
    /// What stands against one more task of it, wherever that is.
    fn obstacle(&self, read_only: bool) -> Option<String> {
        let (spec, name) = (&self.volume.spec.cluster, &self.volume.spec.name);
        if self.volume.pending_delete {
            return Some(format!("volume {name} is being removed"));
        }
        if self.volume.info.is_none() {
            let problem = &self.volume.problem;
            let why = if problem.is_empty() { String::new() } else { format!(": {problem}") };
            return Some(format!("volume {name} is not made yet{why}"));
        }
        match spec.availability {
            Availability::Active => {}
            Availability::Pause => return Some(format!("volume {name} is paused")),
            Availability::Drain => return Some(format!("volume {name} is drained")),
        }
        let mut uses = self.uses.iter();
        let clash = match spec.access_mode.sharing {
            Sharing::None => uses.next().is_some(),
            Sharing::ReadOnly if !read_only => return Some(format!("volume {name} can only be mounted read-only")),
            Sharing::OneWriter => !read_only && uses.any(|&(_, writes)| writes),
            Sharing::ReadOnly | Sharing::All => false,
        };
        clash.then(|| format!("volume {name} is in use by another task"))
    }

    /// What its storage driver could not do, though it is made.
    fn trouble(&self) -> Option<String> {
        let Volume { spec, problem, .. } = &*self.volume;
        (!problem.is_empty()).then(|| format!("volume {}: {problem}", spec.name))
    }

    /// Whether it can be reached from there, and need not be on one node alone that is another one.
    fn can_be_on(&self, node: &Node) -> bool {
        let elsewhere = || {
            self.volume.publish_status.iter().any(|status| status.node != node.id)
                || self.uses.iter().any(|&(user, _)| user != node.id)
        };
        let scope = self.volume.spec.cluster.access_mode.scope;
        self.volume.is_reached_from(node) && !(scope == Scope::Single && elsewhere())
    }
}
