//! What one worker should hold, and the messages that bring it there from what it holds.
//!
//! Invariant: a worker is sent the tasks bound to it, the secrets and configs that those of them use which are not over,
//! and the volumes that are published to it; nothing else.

use std::collections::{BTreeMap, BTreeSet};

use skep_api::grpc::Assignments;
use skep_api::volume::{PublishState, PublishStatus, VolumeAssignment, VolumeInfo};
use skep_api::{
    ConfigId, NodeId, Object, ObjectKey, SecretId, Task, TaskId, TaskState, Timestamp, Volume, VolumeId, encoding,
};
use skep_raft_store::{Commit, Tables};

/// A message is closed once it holds about this many bytes.
const PART_LEN: usize = 512 << 10;

/// Whether a commit changes anything a worker is told.
pub(super) fn concerns(commit: &Commit, node: NodeId) -> bool {
    commit.changes.iter().any(|change| match change.key {
        ObjectKey::Task(_) => {
            let of_node = |object: &Option<Object>| match object {
                Some(Object::Task(task)) => task.node_id == Some(node),
                _ => false,
            };
            of_node(&change.before) || of_node(&change.after)
        }
        ObjectKey::Volume(_) => {
            let of_node = |object: &Option<Object>| match object {
                Some(Object::Volume(volume)) => volume.status_on(node).is_some(),
                _ => false,
            };
            of_node(&change.before) || of_node(&change.after)
        }
        ObjectKey::Node(_) | ObjectKey::Cluster(_) => true,
        ObjectKey::Service(_)
        | ObjectKey::Secret(_)
        | ObjectKey::Config(_)
        | ObjectKey::Network(_)
        | ObjectKey::NetworkAttachment(_) => false,
    })
}

/// What a worker holds by now.
#[derive(Debug, Default)]
pub(super) struct Assigned {
    begun: bool,
    tasks: BTreeMap<TaskId, TaskState>,
    secrets: BTreeSet<SecretId>,
    configs: BTreeSet<ConfigId>,
    /// Each with whether the worker is to have it, or to let go of it.
    volumes: BTreeMap<VolumeId, bool>,
    waits_until: Option<Timestamp>,
}

impl Assigned {
    /// When a task's end that waits is told at the latest; none if none waits.
    pub(super) fn waits_until(&self) -> Option<Timestamp> {
        self.waits_until
    }

    /// The messages that are missing; empty if nothing is. `must_wait` says of a task that is to end
    /// until when that is to be kept back.
    pub(super) fn update(
        &mut self,
        tables: &Tables,
        node: NodeId,
        must_wait: impl Fn(&Task) -> Option<Timestamp>,
    ) -> Vec<Assignments> {
        let complete = !self.begun;
        self.begun = true;
        let mut parts = Parts::new(complete);
        let mine: Vec<_> = tables.tasks_of_node(node).filter(|task| task.status.state >= TaskState::Assigned).collect();
        let (secrets, configs) = used_payloads(mine.iter().copied().map(AsRef::as_ref));
        // Payloads come before the tasks that need them.
        for secret in secrets.difference(&self.secrets).filter_map(|&id| tables.secrets.get(id)) {
            parts.push(|part| &mut part.secrets, encoding::encode(&**secret));
        }
        for config in configs.difference(&self.configs).filter_map(|&id| tables.configs.get(id)) {
            parts.push(|part| &mut part.configs, encoding::encode(&**config));
        }
        self.tell_volumes(tables, node, &mut parts);
        let mut tasks = BTreeMap::new();
        self.waits_until = None;
        for task in mine {
            if let Some(&told) = self.tasks.get(&task.id)
                && told.is_wanted()
                && let Some(until) = must_wait(task)
            {
                self.waits_until = Some(self.waits_until.map_or(until, |earliest| earliest.min(until)));
                tasks.insert(task.id, told);
                continue;
            }
            if self.tasks.get(&task.id) != Some(&task.desired_state) {
                parts.push(|part| &mut part.tasks, encoding::encode(&**task));
            }
            tasks.insert(task.id, task.desired_state);
        }
        for gone in self.tasks.keys().filter(|id| !tasks.contains_key(id)) {
            parts.push(|part| &mut part.removed_tasks, gone.to_bytes().to_vec());
        }
        for gone in self.secrets.difference(&secrets) {
            parts.push(|part| &mut part.removed_secrets, gone.to_bytes().to_vec());
        }
        for gone in self.configs.difference(&configs) {
            parts.push(|part| &mut part.removed_configs, gone.to_bytes().to_vec());
        }
        self.tasks = tasks;
        self.secrets = secrets;
        self.configs = configs;
        parts.finish()
    }

    fn tell_volumes(&mut self, tables: &Tables, node: NodeId, parts: &mut Parts) {
        let mut now = BTreeMap::new();
        for volume in tables.volumes.iter() {
            let Some(status) = volume.status_on(node) else { continue };
            match (status.state, &volume.info) {
                (PublishState::Published, Some(info)) => {
                    if self.volumes.get(&volume.id) != Some(&true) {
                        let assignment = volume_assignment(tables, volume, info, status);
                        parts.push(|part| &mut part.volumes, encoding::encode(&assignment));
                    }
                    now.insert(volume.id, true);
                }
                (PublishState::PendingNodeUnpublish, _) => {
                    if self.volumes.get(&volume.id) != Some(&false) {
                        parts.push(|part| &mut part.removed_volumes, volume.id.to_bytes().to_vec());
                    }
                    now.insert(volume.id, false);
                }
                (PublishState::PendingPublish | PublishState::PendingControllerUnpublish, _)
                | (PublishState::Published, None) => {}
            }
        }
        // Those that are no more, by force, or were taken from the node meanwhile.
        for (&gone, _) in self.volumes.iter().filter(|&(id, &held)| held && !now.contains_key(id)) {
            parts.push(|part| &mut part.removed_volumes, gone.to_bytes().to_vec());
        }
        self.volumes = now;
    }
}

/// What a worker needs of a volume, with what its storage driver keeps secret.
fn volume_assignment(tables: &Tables, volume: &Volume, info: &VolumeInfo, status: &PublishStatus) -> VolumeAssignment {
    VolumeAssignment {
        id: volume.id,
        name: volume.spec.name.clone(),
        driver: volume.spec.driver.name.clone(),
        volume_id: info.volume_id.clone(),
        access_mode: volume.spec.cluster.access_mode.clone(),
        volume_context: info.volume_context.clone(),
        publish_context: status.publish_context.clone(),
        secrets: crate::volumes::secrets(tables, volume),
    }
}

fn used_payloads<'a>(tasks: impl Iterator<Item = &'a Task>) -> (BTreeSet<SecretId>, BTreeSet<ConfigId>) {
    let mut used = (BTreeSet::new(), BTreeSet::new());
    for task in tasks.filter(|task| task.is_runnable()) {
        used.0.extend(task.spec.container.secrets.iter().map(|reference| reference.secret_id));
        used.1.extend(task.spec.container.configs.iter().map(|reference| reference.config_id));
    }
    used
}

/// Cuts a set into messages.
struct Parts {
    complete: bool,
    done: Vec<Assignments>,
    open: Assignments,
    len: usize,
}

impl Parts {
    fn new(complete: bool) -> Self {
        Self { complete, done: Vec::new(), open: Assignments { complete, ..Assignments::default() }, len: 0 }
    }

    fn push(&mut self, list: impl FnOnce(&mut Assignments) -> &mut Vec<Vec<u8>>, item: Vec<u8>) {
        if self.len > 0 && self.len + item.len() > PART_LEN {
            let next = Assignments { complete: self.complete, ..Assignments::default() };
            self.done.push(std::mem::replace(&mut self.open, next));
            self.len = 0;
        }
        self.len += item.len();
        list(&mut self.open).push(item);
    }

    fn finish(mut self) -> Vec<Assignments> {
        if self.len > 0 || self.complete {
            self.open.last = true;
            self.done.push(self.open);
        }
        self.done
    }
}
