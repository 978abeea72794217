//! Gives new tasks their addresses; what needs none, or has them, waits for a node.

use skep_api::task::{Attachment, TaskStatus};
use skep_api::{Task, TaskState};
use skep_raft_store::Transaction;

use super::{Draft, Edit, Scene};
use crate::allocator::{self, Addresses};

/// Takes every task that is new to PENDING, or says why it stays.
pub(super) fn give(scene: &Scene<'_>, drafts: &mut [Draft], tx: &mut Transaction) {
    let is_new = |draft: &Draft| draft.is_live() && draft.task.status.state == TaskState::New;
    if !drafts.iter().any(is_new) {
        return;
    }
    let taken = drafts.iter().filter(|draft| draft.edit != Edit::Delete).map(|draft| draft.task.as_ref());
    let mut addresses = Addresses::read(scene.tables, taken);
    for draft in drafts.iter_mut().filter(|draft| is_new(draft)) {
        match attachments(scene, &draft.task, &mut addresses) {
            Ok(networks) => draft.change(|task| {
                task.networks = networks;
                task.status = TaskStatus {
                    timestamp: scene.now,
                    state: TaskState::Pending,
                    message: "pending task scheduling".into(),
                    ..TaskStatus::default()
                };
            }),
            // Said once, not at every look.
            Err(reason) if draft.task.status.error != reason => draft.change(|task| {
                task.status.timestamp = scene.now;
                task.status.error = reason;
            }),
            Err(_) => {}
        }
    }
    addresses.write(scene.tables, tx);
}

/// One address in each network that the task joins, the ingress network's first.
fn attachments(scene: &Scene<'_>, task: &Task, addresses: &mut Addresses) -> Result<Vec<Attachment>, String> {
    let mut networks = Vec::new();
    if !task.mesh_ports.is_empty() {
        networks.push(allocator::ingress(scene.tables).ok_or("there is no ingress network: make one")?);
    }
    for id in task.named_networks() {
        let network = scene.tables.networks.get(id);
        networks.push(network.ok_or_else(|| format!("network {id} is gone: update the service to use another"))?);
    }
    let take = |network: &std::sync::Arc<skep_api::Network>| {
        let address = addresses.take(network).ok_or_else(|| allocator::is_full(network))?;
        Ok(Attachment { network: network.id, address })
    };
    networks.into_iter().map(take).collect()
}
