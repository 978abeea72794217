//! What the leader asks the controllers of storage drivers: to make volumes, to let nodes have them, to take them away and
//! to delete them.
//!
//! What is to be done follows from the stored volumes alone, and each call may be made twice: a new leader begins where
//! the last one stopped. What a driver refuses is tried again, more and more seldom, and why is written into the volume.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use skep_api::volume::{PublishState, VolumeInfo};
use skep_api::{NodeId, NodeState, ObjectKey, Timestamp, Volume, VolumeId};
use skep_csi::{CsiError, Drivers, Secrets};
use skep_raft_store::{Store, Tables, Transaction};
use tokio::task::JoinSet;
use tokio::time::Instant;

/// Pauses before a call that failed is made again: the first, and the longest.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(30));
/// How long changes are gathered for one look.
const LOOK_PAUSE: Duration = Duration::from_millis(10);
const CALLS_AT_ONCE: usize = 16;
/// What is kept of a driver's reason.
const PROBLEM_CHARS_MAX: usize = 500;

/// Something to ask of a driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Step {
    Create,
    Delete,
    Publish(NodeId),
    Unpublish(NodeId),
    /// Takes the volume from a node that is not heard of, if the driver can do that without the node.
    Fence(NodeId),
}

type Call = (VolumeId, Step);

/// What came of a call.
enum Answer {
    Created(VolumeInfo),
    Published(BTreeMap<String, String>),
    Done,
    /// Nothing can be done before something changes: what that is.
    Waits(String),
}

/// Asks for what is to be done, for as long as this manager leads.
pub(crate) async fn keep(store: &Store, drivers: &Drivers) {
    let mut applied = store.applied();
    let mut calls: JoinSet<(Call, Result<Answer, CsiError>)> = JoinSet::new();
    // One call for a volume at a time.
    let mut running: BTreeSet<VolumeId> = BTreeSet::new();
    let mut later: BTreeMap<Call, (Instant, Duration)> = BTreeMap::new();
    loop {
        applied.mark_unchanged();
        let tables = store.view();
        let wanted = wanted(&tables);
        later.retain(|call, _| wanted.contains_key(call));
        let now = Instant::now();
        for (&call, volume) in &wanted {
            let waits = later.get(&call).is_some_and(|(at, _)| *at > now);
            if !waits && running.len() < CALLS_AT_ONCE && running.insert(call.0) {
                let (drivers, volume, tables) = (drivers.clone(), volume.clone(), tables.clone());
                calls.spawn(async move { (call, ask(&drivers, &tables, &volume, call.1).await) });
            }
        }
        let next = later.values().map(|(at, _)| *at).filter(|at| *at > now).min();
        tokio::select! {
            changed = applied.changed() => {
                if changed.is_err() {
                    return;
                }
                tokio::time::sleep(LOOK_PAUSE).await;
            }
            Some(Ok((call, answer))) = calls.join_next(), if !calls.is_empty() => {
                running.remove(&call.0);
                let failed = match write(store, call, &answer).await {
                    Ok(()) => !matches!(answer, Ok(Answer::Created(_) | Answer::Published(_) | Answer::Done)),
                    Err(_) => true,
                };
                if failed {
                    let pause = later.get(&call).map_or(BACKOFF.0, |(_, pause)| (*pause * 2).min(BACKOFF.1));
                    later.insert(call, (Instant::now() + pause, pause));
                } else {
                    later.remove(&call);
                }
            }
            () = sleep_until(next) => {}
        }
    }
}

async fn sleep_until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}

/// All that is to be asked, by what the volumes are and should be.
fn wanted(tables: &Tables) -> BTreeMap<Call, Arc<Volume>> {
    let mut wanted = BTreeMap::new();
    for volume in tables.volumes.iter() {
        let mut want = |step| wanted.insert((volume.id, step), volume.clone());
        if volume.pending_delete && volume.publish_status.is_empty() {
            want(Step::Delete);
        } else if volume.info.is_none() && !volume.pending_delete {
            want(Step::Create);
        }
        for status in &volume.publish_status {
            let is_lost = tables.nodes.get(status.node).is_some_and(|node| node.status.state == NodeState::Down);
            match status.state {
                PublishState::PendingPublish => drop(want(Step::Publish(status.node))),
                PublishState::PendingControllerUnpublish => drop(want(Step::Unpublish(status.node))),
                PublishState::PendingNodeUnpublish if is_lost => drop(want(Step::Fence(status.node))),
                PublishState::PendingNodeUnpublish | PublishState::Published => {}
            }
        }
    }
    wanted
}

async fn ask(drivers: &Drivers, tables: &Tables, volume: &Volume, step: Step) -> Result<Answer, CsiError> {
    let Some(info) = &volume.info else {
        return match step {
            Step::Create => {
                let driver = drivers.connect(&volume.spec.driver.name).await?;
                driver.create(volume, secrets(tables, volume)).await.map(Answer::Created)
            }
            // No driver ever said that it is there.
            Step::Delete | Step::Unpublish(_) | Step::Fence(_) => Ok(Answer::Done),
            Step::Publish(_) => Ok(Answer::Waits(String::new())),
        };
    };
    let driver = drivers.connect(&volume.spec.driver.name).await?;
    let secrets = secrets(tables, volume);
    match step {
        Step::Create => Ok(Answer::Done),
        Step::Delete => driver.delete(info, secrets).await.map(|()| Answer::Done),
        Step::Publish(node) => match driver_s_name_of(volume, node) {
            Some(name) => driver.controller_publish(volume, info, name, secrets).await.map(Answer::Published),
            None => Ok(Answer::Waits(format!("storage driver {} is not on node {node}", driver.name()))),
        },
        Step::Fence(node) if !driver.controls().await?.publishes => Ok(Answer::Waits(format!(
            "node {node} is not heard of, and storage driver {} cannot take a volume from it: bring it back, or remove it \
             from the swarm",
            driver.name()
        ))),
        Step::Unpublish(node) | Step::Fence(node) => {
            // Without a name it would be taken from all nodes; and it was never given to one without.
            let Some(name) = driver_s_name_of(volume, node) else { return Ok(Answer::Done) };
            driver.controller_unpublish(info, name, secrets).await.map(|()| Answer::Done)
        }
    }
}

fn driver_s_name_of(volume: &Volume, node: NodeId) -> Option<&str> {
    volume.status_on(node).map(|status| status.driver_node.as_str()).filter(|name| !name.is_empty())
}

/// What a volume's storage driver gets to know of the swarm's secrets.
pub(crate) fn secrets(tables: &Tables, volume: &Volume) -> Secrets {
    let secret = |(key, id): (&str, _)| Some((key.to_owned(), tables.secrets.get(id)?.spec.data.clone()));
    volume.secrets().filter_map(secret).collect()
}

/// Writes down what came of a call, if that is still of interest.
async fn write(store: &Store, (id, step): Call, answer: &Result<Answer, CsiError>) -> Result<(), ()> {
    let problem = match answer {
        Ok(Answer::Waits(reason)) => reason.clone(),
        Ok(_) => String::new(),
        Err(error) => error.to_string().chars().take(PROBLEM_CHARS_MAX).collect(),
    };
    if !problem.is_empty() {
        tracing::debug!(volume = %id, ?step, problem, "a storage driver did not do what it was asked");
    }
    let written = store.update(|tables| {
        let mut tx = Transaction::new(Timestamp::from_system(SystemTime::now()));
        let Some(before) = tables.volumes.get(id) else { return Ok((tx, ())) };
        if matches!((answer, step), (Ok(Answer::Done), Step::Delete)) {
            tx.delete(ObjectKey::Volume(id), before.meta.version);
            return Ok((tx, ()));
        }
        let volume = after(before, step, answer, &problem);
        if volume != **before {
            tx.update(volume);
        }
        Ok::<_, std::convert::Infallible>((tx, ()))
    });
    written.await.map_err(|error| tracing::debug!(volume = %id, %error, "a volume's state could not be written"))
}

fn after(before: &Volume, step: Step, answer: &Result<Answer, CsiError>, problem: &str) -> Volume {
    let mut volume = Volume { problem: problem.to_owned(), ..before.clone() };
    match (step, answer) {
        (Step::Create, Ok(Answer::Created(info))) => volume.info = Some(info.clone()),
        (Step::Publish(node), Ok(Answer::Published(context))) => {
            let mut statuses = volume.publish_status.iter_mut();
            let status = statuses.find(|s| s.node == node && s.state == PublishState::PendingPublish);
            if let Some(status) = status {
                status.state = PublishState::Published;
                status.publish_context.clone_from(context);
            }
        }
        (Step::Unpublish(node), Ok(Answer::Done)) => volume
            .publish_status
            .retain(|status| status.node != node || status.state != PublishState::PendingControllerUnpublish),
        (Step::Fence(node), Ok(Answer::Done)) => volume
            .publish_status
            .retain(|status| status.node != node || status.state != PublishState::PendingNodeUnpublish),
        _ => {}
    }
    volume
}

/// A node says that it has let go of volumes.
pub(crate) fn released(tables: &Tables, tx: &mut Transaction, node: NodeId, ids: &[VolumeId]) {
    for before in ids.iter().filter_map(|&id| tables.volumes.get(id)) {
        let mut volume = Volume::clone(before);
        let mut statuses = volume.publish_status.iter_mut();
        let status = statuses.find(|s| s.node == node && s.state == PublishState::PendingNodeUnpublish);
        if let Some(status) = status {
            status.state = PublishState::PendingControllerUnpublish;
            tx.update(volume);
        }
    }
}
