//! What the leader alone does, from its election until another takes over.

use std::time::{Duration, SystemTime};

use skep_api::{TaskId, Timestamp};
use skep_csi::Drivers;
use skep_raft_store::{Store, Transaction};
use tokio::sync::broadcast;
use tokio_util::sync::CancellationToken;

use crate::dispatcher::Dispatcher;
use crate::{orchestrator, roles, trust, volumes};

/// How long to wait before trying again what the store refused.
const RETRY_PAUSE: Duration = Duration::from_millis(100);
/// The same for nodes' roles and their trust.
const ROLE_PAUSE: Duration = Duration::from_millis(500);
/// How long changes of nodes are gathered for one look.
const LOOK_PAUSE: Duration = Duration::from_millis(10);
/// More actions than this are written in several entries.
const ACTIONS_AT_ONCE: usize = 2000;

/// Runs the leader's loops until `stop`.
pub(crate) async fn lead(store: Store, dispatcher: Dispatcher, drivers: Drivers, stop: CancellationToken) {
    tokio::select! {
        () = stop.cancelled() => {}
        () = orchestrate(&store) => {}
        () = dispatcher.watch_deadlines() => {}
        () = follow_nodes(&store) => {}
        () = volumes::keep(&store, &drivers) => {}
    }
}

/// Keeps consensus and trust in step with what is written of the nodes. That changes seldom while other things may change
/// thousands of times a second: there is one look for all of a [`LOOK_PAUSE`].
async fn follow_nodes(store: &Store) {
    let mut applied = store.applied();
    loop {
        applied.mark_unchanged();
        let pause = match (roles::release_next(store).await, trust::complete_change(store).await) {
            (Ok(true), Ok(())) => continue,
            (Ok(false), Ok(())) => {
                if applied.changed().await.is_err() {
                    return;
                }
                LOOK_PAUSE
            }
            (Err(_), _) | (_, Err(_)) => ROLE_PAUSE,
        };
        tokio::time::sleep(pause).await;
    }
}

/// Looks at everything whenever something changed or a time has come, until nothing is left to do.
async fn orchestrate(store: &Store) {
    let mut commits = store.watch();
    loop {
        let now = Timestamp::from_system(SystemTime::now());
        let plan = orchestrator::plan(&store.view(), now, &mut TaskId::random);
        if !plan.transaction.is_empty() {
            if let Err(error) = write(store, plan.transaction).await {
                tracing::debug!(%error, "the plan was overtaken");
                tokio::time::sleep(RETRY_PAUSE).await;
            }
            continue;
        }
        let pause = plan.look_again.map_or(Duration::from_secs(3600), |at| at.since(now));
        tokio::select! {
            commit = commits.recv() => {
                if let Err(broadcast::error::RecvError::Closed) = commit {
                    return;
                }
                // Whatever else is there was seen by the next look, too.
                while commits.try_recv().is_ok() {}
            }
            () = tokio::time::sleep(pause) => {}
        }
    }
}

/// Writes a plan; a stale part is planned anew from the new state.
async fn write(store: &Store, transaction: Transaction) -> Result<(), skep_raft_store::ProposeError> {
    for actions in transaction.actions.chunks(ACTIONS_AT_ONCE) {
        store.propose(&Transaction { at: transaction.at, actions: actions.to_vec() }).await?;
    }
    Ok(())
}
