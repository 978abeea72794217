//! Volumes of the swarm: declared, set aside, given up. Their storage drivers are asked by `crate::volumes`.

use std::sync::Arc;

use skep_api::id::VolumeId;
use skep_api::volume::VolumeSpecError;
use skep_api::{Meta, NodeId, NodeState, ObjectKey, Volume, VolumeSpec};
use skep_raft_store::{Tables, Transaction};

use super::{ControlError, Outcome, Reason};

impl From<VolumeSpecError> for ControlError {
    fn from(error: VolumeSpecError) -> Self {
        Self::invalid(error)
    }
}

pub(super) fn create(tables: &Tables, tx: &mut Transaction, mut spec: VolumeSpec) -> Result<Outcome, ControlError> {
    spec.validate()?;
    for wanted in &mut spec.cluster.secrets {
        let by_id = wanted.secret.parse().ok().and_then(|id| tables.secrets.get(id));
        let secret = by_id.or_else(|| tables.secrets.by_name(&wanted.secret)).ok_or_else(|| {
            ControlError::invalid(format!(
                "volume {}: secret {} does not exist: create it first",
                spec.name, wanted.secret
            ))
        })?;
        wanted.secret = secret.id.to_string();
    }
    let id = VolumeId::random();
    tx.create(Volume {
        id,
        meta: Meta::default(),
        spec,
        info: None,
        publish_status: Vec::new(),
        pending_delete: false,
        problem: String::new(),
    });
    Ok(Outcome::Created(id.to_string()))
}

pub(super) fn update(
    tables: &Tables,
    tx: &mut Transaction,
    id: VolumeId,
    version: u64,
    spec: VolumeSpec,
) -> Result<Outcome, ControlError> {
    let before = find(tables, id)?;
    ControlError::check_version("volume", version, &before.meta)?;
    let mut volume = Volume::clone(before);
    volume.spec.cluster.availability = spec.cluster.availability;
    if volume.spec != spec {
        return Err(ControlError::invalid(format!(
            "volume {}: only its availability can be changed: make another volume for the rest",
            before.spec.name
        )));
    }
    tx.update(volume);
    Ok(Outcome::Done)
}

/// Gives a volume up: it goes once its storage driver has deleted it. By force it is forgotten at once, whatever the
/// driver has; tasks that run, on nodes that are heard of, stand against either.
pub(super) fn remove(
    tables: &Tables,
    tx: &mut Transaction,
    id: VolumeId,
    force: bool,
) -> Result<Outcome, ControlError> {
    let before = find(tables, id)?;
    let users: Vec<_> = tables
        .tasks
        .iter()
        .filter(|task| !task.status.state.is_terminal() && task.volumes.iter().any(|attached| attached.id == id))
        .filter(|task| !force || !task.node_id.is_some_and(|node| is_lost(tables, node)))
        .map(|task| task.name())
        .collect();
    if let Some(user) = users.first() {
        return Err(ControlError::new(
            Reason::Conflict,
            format!(
                "volume {} is in use by {} task(s), {user} among them: drain it (volume update --availability drain), or \
                 remove their services first",
                before.spec.name,
                users.len()
            ),
        ));
    }
    if force {
        tx.delete(ObjectKey::Volume(id), before.meta.version);
        return Ok(Outcome::Done);
    }
    tx.update(Volume { pending_delete: true, ..Volume::clone(before) });
    Ok(Outcome::Done)
}

fn is_lost(tables: &Tables, node: NodeId) -> bool {
    tables.nodes.get(node).is_none_or(|node| node.status.state == NodeState::Down)
}

fn find(tables: &Tables, id: VolumeId) -> Result<&Arc<Volume>, ControlError> {
    tables.volumes.get(id).ok_or_else(|| ControlError::not_found("volume", id))
}
