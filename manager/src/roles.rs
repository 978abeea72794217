//! Keeps consensus in step with the roles that users gave: who was demoted or removed leaves it.
//! (Who was promoted enters by asking, once it has its new certificate.)

use std::time::{Duration, SystemTime};

use skep_api::{NodeId, NodeRole, Timestamp};
use skep_raft_store::{ProposeError, Store, Transaction, UpdateError};

const HANDOVER_LIMIT: Duration = Duration::from_secs(3);

/// Lets one demoted manager go. Returns whether there was one.
pub(crate) async fn release_next(store: &Store) -> Result<bool, ProposeError> {
    let tables = store.view();
    let mut demoted = tables.nodes.iter().filter(|node| node.spec.role == NodeRole::Worker);
    let leaving = demoted.find_map(|node| Some((node.id, node.raft.as_ref()?.raft_id)));
    let Some((node, raft_id)) = leaving else { return Ok(false) };
    let released = release(store, node, raft_id).await;
    released.inspect_err(|error| tracing::warn!(%node, %error, "a demoted manager could not leave consensus yet"))?;
    Ok(true)
}

async fn release(store: &Store, id: NodeId, raft_id: u64) -> Result<(), ProposeError> {
    if store.leadership().borrow().leader == Some(raft_id) {
        // Another has to let this one go.
        store.transfer_leadership(HANDOVER_LIMIT).await;
        return Err(ProposeError::NotLeader { leader_addr: None });
    }
    if store.members().iter().any(|(member, _)| *member == raft_id) {
        store.remove_member(raft_id).await?;
    }
    let cleared = store.update(|tables| {
        let mut transaction = Transaction::new(Timestamp::from_system(SystemTime::now()));
        if let Some(node) = tables.nodes.get(id) {
            let mut node = (**node).clone();
            node.raft = None;
            transaction.update(node);
        }
        Ok::<_, std::convert::Infallible>((transaction, ()))
    });
    cleared.await.map_err(|error| match error {
        UpdateError::Propose(error) => error,
        UpdateError::Caller(never) => match never {},
    })
}
