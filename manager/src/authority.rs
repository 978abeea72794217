//! Who may call what: decided from the peer's certificate and the swarm's own list of nodes.

use std::time::SystemTime;

use skep_api::{NodeRole, Timestamp};
use skep_pki::PeerIdentity;
use skep_raft_store::Tables;
use tonic::Status;

/// What a call asks of its caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Needs {
    Manager,
    AnyNode,
}

/// Checks the caller of one call. `tables` may be behind; a removed node is then found a moment
/// later, when its session ends.
pub(crate) fn check(
    peer: Option<&PeerIdentity>,
    needs: Needs,
    tables: &Tables,
    now: SystemTime,
) -> Result<PeerIdentity, Status> {
    let peer = peer.ok_or_else(|| Status::unauthenticated("a node certificate is needed: join the swarm first"))?;
    let node = peer.node();
    if !peer.is_valid_at(now) {
        return Err(Status::unauthenticated(format!(
            "the certificate of node {node} is valid from {} to {}, and it is {} here: compare the clocks of this manager and of that node",
            peer.not_before,
            peer.not_after,
            Timestamp::from_system(now)
        )));
    }
    if let Some(cluster) = tables.cluster() {
        if cluster.id != peer.subject.cluster {
            return Err(Status::permission_denied(format!("node {node} belongs to another swarm")));
        }
        if cluster.removed_nodes.contains(&node) {
            return Err(Status::permission_denied(format!("node {node} was removed from the swarm")));
        }
    }
    match (needs, peer.role()) {
        (Needs::AnyNode, _) | (Needs::Manager, NodeRole::Manager) => Ok(*peer),
        (Needs::Manager, NodeRole::Worker) => {
            Err(Status::permission_denied(format!("node {node} is a worker: this call is for managers")))
        }
    }
}
