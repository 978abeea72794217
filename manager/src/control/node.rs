//! Nodes: admitted, changed, removed.

use skep_api::node::NodeStatus;
use skep_api::{Availability, Meta, Node, NodeDescription, NodeId, NodeRole, NodeSpec, NodeState, ObjectKey};
use skep_raft_store::{Tables, Transaction};

use super::{ControlError, Outcome, Reason};

pub(super) fn admit(
    tx: &mut Transaction,
    id: NodeId,
    role: NodeRole,
    availability: Availability,
) -> Result<Outcome, ControlError> {
    tx.create(Node {
        id,
        meta: Meta::default(),
        spec: NodeSpec { role, availability, ..NodeSpec::default() },
        description: NodeDescription::default(),
        status: NodeStatus::default(),
        raft: None,
        bulk_port: 0,
    });
    Ok(Outcome::Created(id.to_string()))
}

pub(super) fn update(
    tables: &Tables,
    tx: &mut Transaction,
    id: NodeId,
    version: u64,
    spec: NodeSpec,
) -> Result<Outcome, ControlError> {
    let node = tables.nodes.get(id).ok_or_else(|| ControlError::not_found("node", id))?;
    ControlError::check_version("node", version, &node.meta)?;
    if node.spec.role == NodeRole::Manager && spec.role == NodeRole::Worker {
        check_demotion(tables, id)?;
    }
    let mut node = (**node).clone();
    node.spec = spec;
    tx.update(node);
    Ok(Outcome::Done)
}

/// The managers that stay must be a majority of themselves.
fn check_demotion(tables: &Tables, id: NodeId) -> Result<(), ControlError> {
    let managers = tables.nodes.iter().filter(|node| node.raft.is_some() && node.spec.role == NodeRole::Manager);
    let rest: Vec<_> = managers.filter(|node| node.id != id).collect();
    if rest.is_empty() {
        return Err(ControlError::new(
            Reason::Invalid,
            format!(
                "attempting to demote the last manager of the swarm, which node {id} is: promote another one first"
            ),
        ));
    }
    let ready = rest.iter().filter(|node| node.status.state == NodeState::Ready).count();
    if ready < rest.len() / 2 + 1 {
        return Err(ControlError::new(
            Reason::Invalid,
            format!(
                "without node {id} only {ready} of {} managers would be reachable, and the swarm would lose its \
                 majority: bring managers back first",
                rest.len()
            ),
        ));
    }
    Ok(())
}

pub(super) fn remove(tables: &Tables, tx: &mut Transaction, id: NodeId, force: bool) -> Result<Outcome, ControlError> {
    let node = tables.nodes.get(id).ok_or_else(|| ControlError::not_found("node", id))?;
    let refuse = |message: String| Err(ControlError::new(Reason::Invalid, message));
    if node.raft.is_some() || node.spec.role == NodeRole::Manager {
        return refuse(format!(
            "node {id} is a cluster manager and is a member of the raft cluster. It must be demoted to worker before removal"
        ));
    }
    if node.status.state == NodeState::Ready && !force {
        return refuse(format!("node {id} is not down: let it leave the swarm first, or use --force"));
    }
    let mut cluster = tables.cluster().ok_or_else(ControlError::no_leader)?.as_ref().clone();
    cluster.removed_nodes.insert(id);
    tx.update(cluster);
    for attachment in tables.attachments.iter().filter(|attachment| attachment.node == id) {
        tx.delete(ObjectKey::NetworkAttachment(attachment.id), attachment.meta.version);
    }
    tx.delete(ObjectKey::Node(id), node.meta.version);
    Ok(Outcome::Done)
}
