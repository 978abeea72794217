//! Which revision of the facts each node's kernel holds, and so which tasks no connection comes to
//! any more.
//!
//! A task that is to stop leaves the facts first; the node it runs on hears of its end once every
//! node with a session has taken that in, or after a while if one does not answer.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use skep_api::{NodeId, Task, TaskState, Timestamp};
use tokio::sync::watch;

/// How long a node that does not answer may hold up the end of a task.
pub(super) const WITHDRAW_LIMIT: Duration = Duration::from_secs(2);

/// The sessions, and how far each node has come.
#[derive(Clone)]
pub(super) struct Holders(Arc<Inner>);

struct Inner {
    nodes: Mutex<BTreeMap<NodeId, (u64, u64)>>,
    lowest: watch::Sender<u64>,
}

impl Default for Holders {
    fn default() -> Self {
        Self(Arc::new(Inner { nodes: Mutex::default(), lowest: watch::channel(u64::MAX).0 }))
    }
}

impl Holders {
    fn change(&self, change: impl FnOnce(&mut BTreeMap<NodeId, (u64, u64)>)) {
        let mut nodes = self.0.nodes.lock().expect("nobody panics while holding it");
        change(&mut nodes);
        let lowest = nodes.values().map(|&(_, held)| held).min().unwrap_or(u64::MAX);
        self.0.lowest.send_if_modified(|before| std::mem::replace(before, lowest) != lowest);
    }

    /// A new session of a node, which holds nothing for sure.
    pub(super) fn join(&self, node: NodeId, session: u64) {
        self.change(|nodes| {
            nodes.insert(node, (session, 0));
        });
    }

    /// The session is over: the node is waited for no more.
    pub(super) fn leave(&self, node: NodeId, session: u64) {
        self.change(|nodes| {
            if nodes.get(&node).is_some_and(|&(current, _)| current == session) {
                nodes.remove(&node);
            }
        });
    }

    /// The node holds everything up to `revision`.
    pub(super) fn hold(&self, node: NodeId, session: u64, revision: u64) {
        self.change(|nodes| {
            if let Some((current, held)) = nodes.get_mut(&node)
                && *current == session
            {
                *held = revision.max(*held);
            }
        });
    }

    /// What every node with a session holds at least, as it moves.
    pub(super) fn lowest(&self) -> watch::Receiver<u64> {
        self.0.lowest.subscribe()
    }
}

/// Whether a task's end must still wait for nodes that may send connections to it; if so, until when.
pub(super) fn must_wait(task: &Task, lowest: u64, now: Timestamp) -> Option<Timestamp> {
    let served = task.status.state == TaskState::Running && !task.networks.is_empty();
    let limit = task.meta.updated_at.plus(WITHDRAW_LIMIT);
    (served && !task.desired_state.is_wanted() && lowest < task.meta.version && now < limit).then_some(limit)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_slowest_node_with_a_session_counts() {
        let (a, b) = (NodeId::from_u128(1), NodeId::from_u128(2));
        let holders = Holders::default();
        let lowest = holders.lowest();
        holders.join(a, 1);
        holders.join(b, 1);
        holders.hold(a, 1, 7);
        assert_eq!(*lowest.borrow(), 0);
        holders.hold(b, 1, 5);
        assert_eq!(*lowest.borrow(), 5);
        // An older session says nothing of the new one.
        holders.join(b, 2);
        holders.hold(b, 1, 9);
        holders.leave(b, 1);
        assert_eq!(*lowest.borrow(), 0);
        holders.leave(b, 2);
        assert_eq!(*lowest.borrow(), 7);
    }
}
