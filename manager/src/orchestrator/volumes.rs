//! Volumes of the swarm: says on which nodes each has to be, as its tasks come and go.
//!
//! A volume is on a node from the time a task that has it is placed there until the last such task has ended. A node that
//! is not heard of has none in this sense: whether it can be made to let go is the storage driver's affair
//! (`crate::volumes`).

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use skep_api::NodeId;
use skep_api::id::VolumeId;
use skep_api::volume::{PublishState, PublishStatus, Volume};
use skep_raft_store::Transaction;

use super::placement::occupies;
use super::{Draft, Scene};

/// Writes what is different from what the tasks need.
pub(super) fn follow(scene: &Scene<'_>, drafts: &[Draft], transaction: &mut Transaction) {
    if scene.tables.volumes.is_empty() {
        return;
    }
    let mut users: BTreeMap<VolumeId, BTreeSet<NodeId>> = BTreeMap::new();
    for draft in drafts.iter().filter(|draft| occupies(draft)) {
        let Some(node) = draft.task.node_id.filter(|&node| !scene.is_lost(node)) else { continue };
        for attachment in &draft.task.volumes {
            users.entry(attachment.id).or_default().insert(node);
        }
    }
    let nobody = BTreeSet::new();
    for volume in scene.tables.volumes.iter() {
        let nodes = users.get(&volume.id).unwrap_or(&nobody);
        let statuses = statuses(scene, volume, nodes);
        if statuses != volume.publish_status {
            transaction.update(Volume { publish_status: statuses, ..Volume::clone(volume) });
        }
    }
}

fn statuses(scene: &Scene<'_>, volume: &Arc<Volume>, users: &BTreeSet<NodeId>) -> Vec<PublishStatus> {
    let mut statuses = volume.publish_status.clone();
    for status in &mut statuses {
        let is_there = scene.nodes.contains_key(&status.node);
        status.state = match status.state {
            PublishState::Published if !users.contains(&status.node) => PublishState::PendingNodeUnpublish,
            // The node was never told, but the storage driver may have been.
            PublishState::PendingPublish if !users.contains(&status.node) => PublishState::PendingControllerUnpublish,
            state => state,
        };
        // A node that was removed from the swarm is its user's word that it is no more.
        if status.state == PublishState::PendingNodeUnpublish && !is_there {
            status.state = PublishState::PendingControllerUnpublish;
        }
    }
    for &node in users.iter().filter(|&&node| volume.status_on(node).is_none()) {
        let driver = scene.nodes.get(&node).and_then(|node| node.description.csi_driver(&volume.spec.driver.name));
        let driver_node = driver.map(|driver| driver.node_id.clone()).unwrap_or_default();
        let (state, publish_context) = (PublishState::PendingPublish, BTreeMap::new());
        statuses.push(PublishStatus { node, driver_node, state, publish_context });
    }
    statuses
}
