//! Volumes of the swarm.

use std::sync::Arc;

use serde_json::{Value, json};
use skep_api::container::Driver;
use skep_api::volume::ClusterVolumeSpec;
use skep_api::{Volume, VolumeSpec};
use skep_manager::control::{Command, Outcome};
use skep_raft_store::Tables;

use super::super::json::from_value;
use super::super::{ApiError, State};
use super::CreateBody;
use crate::filters::Filters;

/// Before this version there were none.
pub(super) const SINCE: u32 = 42;

pub(super) fn volume_json(volume: &Volume) -> Value {
    let Volume { id, meta, spec, info, publish_status, problem, .. } = volume;
    let mut cluster = json!({"ID": id, "Spec": spec.cluster});
    merge(&mut cluster, serde_json::to_value(meta).unwrap_or_default());
    if let Some(info) = info {
        cluster["Info"] = serde_json::to_value(info).unwrap_or_default();
    }
    if !publish_status.is_empty() {
        cluster["PublishStatus"] = serde_json::to_value(publish_status).unwrap_or_default();
    }
    let mut value = json!({
        "ClusterVolume": cluster, "CreatedAt": meta.created_at, "Driver": spec.driver.name, "Labels": spec.labels,
        "Mountpoint": "", "Name": spec.name, "Options": spec.driver.options, "Scope": "global",
    });
    if !problem.is_empty() {
        value["Status"] = json!({"Problem": problem});
    }
    value
}

fn merge(into: &mut Value, from: Value) {
    if let (Value::Object(into), Value::Object(from)) = (into, from) {
        into.extend(from);
    }
}

/// Those that this node, if it is a manager, knows of.
pub(super) async fn list(state: &State, filters: &Filters) -> Vec<Value> {
    let Ok(manager) = state.swarm.manager().await else { return Vec::new() };
    let Ok(tables) = manager.read().await else { return Vec::new() };
    let is_used = |volume: &Volume| !volume.publish_status.is_empty();
    let dangling = filters.flag("dangling").ok().flatten();
    let wanted = |volume: &&Arc<Volume>| {
        filters.any("name", |name| volume.spec.name.contains(name))
            && filters.labels("label", &volume.spec.labels)
            && filters.any("driver", |driver| volume.spec.driver.name == driver)
            && dangling.is_none_or(|dangling| dangling != is_used(volume))
    };
    tables.volumes.iter().filter(wanted).map(|volume| volume_json(volume)).collect()
}

pub(super) async fn create(state: &State, body: CreateBody) -> Result<Value, ApiError> {
    let mut cluster: ClusterVolumeSpec = from_value(body.cluster_volume_spec)?;
    // Clients name these whether there is something in them or not.
    cluster.capacity_range = cluster.capacity_range.filter(|range| *range != Default::default());
    cluster.accessibility_requirements = cluster
        .accessibility_requirements
        .filter(|wanted| !wanted.requisite.is_empty() || !wanted.preferred.is_empty());
    let driver = Driver { name: body.driver, options: body.driver_opts };
    let spec = VolumeSpec { name: body.name, labels: body.labels, driver, cluster };
    let manager = state.swarm.manager().await?;
    let Outcome::Created(id) = manager.execute(Command::CreateVolume { spec }).await? else { return Ok(Value::Null) };
    Ok(volume_json(find(&*manager.read().await?, &id).ok_or_else(|| not_found(&id))?))
}

/// Finds a volume by id, by name, or by the beginning of its id if that is one volume's alone.
fn find<'a>(tables: &'a Tables, name: &str) -> Option<&'a Arc<Volume>> {
    let by_id = name.parse().ok().and_then(|id| tables.volumes.get(id));
    by_id.or_else(|| tables.volumes.by_name(name)).or_else(|| {
        let mut matching = tables.volumes.iter().filter(|volume| volume.id.to_string().starts_with(name));
        matching.next().filter(|_| matching.next().is_none())
    })
}

pub(super) fn not_found(name: &str) -> ApiError {
    ApiError::not_found(format!("get {name}: no such volume"))
}

/// The one of that name; none as well if this node is no manager, and cannot know.
pub(super) async fn inspect(state: &State, name: &str) -> Option<Value> {
    let tables = state.swarm.manager().await.ok()?.read().await.ok()?;
    find(&tables, name).map(|volume| volume_json(volume))
}

/// Whether there was one to remove.
pub(super) async fn remove(state: &State, name: &str, force: bool) -> Result<bool, ApiError> {
    let Ok(manager) = state.swarm.manager().await else { return Ok(false) };
    let tables = manager.read().await?;
    let Some(volume) = find(&tables, name) else { return Ok(false) };
    manager.execute(Command::RemoveVolume { id: volume.id, force }).await?;
    Ok(true)
}

pub(super) async fn update(
    state: &State,
    name: &str,
    version: u64,
    cluster: ClusterVolumeSpec,
) -> Result<(), ApiError> {
    let manager = state.swarm.manager().await?;
    let tables = manager.read().await?;
    let volume = find(&tables, name).ok_or_else(|| not_found(name))?;
    let spec = VolumeSpec { cluster, ..volume.spec.clone() };
    manager.execute(Command::UpdateVolume { id: volume.id, version, spec }).await?;
    Ok(())
}
