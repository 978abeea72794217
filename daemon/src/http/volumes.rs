//! Volumes of this host, and beside them those of the swarm.

mod cluster;

use std::collections::BTreeMap;

use axum::extract::{Path, Query};
use axum::http::StatusCode;
use axum::{Extension, Json};
use serde::Deserialize;
use serde_json::{Value, json};
use skep_api::volume::ClusterVolumeSpec;
use skep_engine::{EngineError, Volume};

use super::json::{JsonBody, parse};
use super::nodes::VersionQuery;
use super::{ApiError, AskedVersion, ForceQuery, State};
use crate::filters::Filters;

pub(super) fn volume_json(state: &State, volume: &Volume) -> Value {
    let labels = if volume.anonymous {
        let mut labels = volume.labels.clone();
        labels.insert("com.docker.volume.anonymous".into(), String::new());
        labels
    } else {
        volume.labels.clone()
    };
    json!({
        "Name": volume.name, "Driver": "local", "Mountpoint": state.engine.volume_dir(&volume.name),
        "CreatedAt": volume.created, "Labels": labels, "Scope": "local",
        "Options": if volume.options.is_empty() { Value::Null } else { json!(volume.options) },
    })
}

#[derive(Deserialize)]
pub(super) struct ListQuery {
    filters: Option<String>,
}

pub(super) async fn list(
    state: State,
    Query(query): Query<ListQuery>,
    version: Option<Extension<AskedVersion>>,
) -> Result<Json<Value>, ApiError> {
    let known = ["name", "label", "dangling", "driver"];
    let filters = Filters::parse(query.filters.as_deref(), &known).map_err(ApiError::bad_request)?;
    let dangling = filters.flag("dangling").map_err(ApiError::bad_request)?;
    let wanted = |volume: &Volume| {
        filters.any("name", |name| volume.name.contains(name))
            && filters.labels("label", &volume.labels)
            && filters.any("driver", |driver| driver == "local")
            && dangling.is_none_or(|dangling| state.engine.volume_users(&volume.name).is_empty() == dangling)
    };
    let mut volumes: Vec<_> = state
        .engine
        .volumes()
        .iter()
        .filter(|volume| wanted(volume))
        .map(|volume| volume_json(&state, volume))
        .collect();
    if version.is_none_or(|Extension(AskedVersion(minor))| minor >= cluster::SINCE) {
        volumes.extend(cluster::list(&state, &filters).await);
    }
    Ok(Json(json!({"Volumes": volumes, "Warnings": null})))
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "PascalCase", default)]
struct CreateBody {
    name: String,
    driver: String,
    driver_opts: BTreeMap<String, String>,
    labels: BTreeMap<String, String>,
    cluster_volume_spec: Value,
}

pub(super) async fn create(state: State, body: JsonBody) -> Result<(StatusCode, Json<Value>), ApiError> {
    let body: CreateBody = parse(&body)?;
    if !body.cluster_volume_spec.is_null() {
        return Ok((StatusCode::CREATED, Json(cluster::create(&state, body).await?)));
    }
    if !matches!(body.driver.as_str(), "" | "local") {
        let driver = body.driver;
        return Err(ApiError::not_found(format!(
            "volume driver {driver:?} is not there: use local, or make a cluster volume by a storage driver (--type, \
             --scope and so on)"
        )));
    }
    let volume = Volume { name: body.name, labels: body.labels, options: body.driver_opts, ..Volume::default() };
    let volume = state.engine.create_volume(volume)?;
    Ok((StatusCode::CREATED, Json(volume_json(&state, &volume))))
}

pub(super) async fn inspect(state: State, Path(name): Path<String>) -> Result<Json<Value>, ApiError> {
    match state.engine.volume(&name) {
        Ok(volume) => Ok(Json(volume_json(&state, &volume))),
        Err(error) => cluster::inspect(&state, &name).await.map(Json).ok_or_else(|| error.into()),
    }
}

pub(super) async fn remove(
    state: State,
    Path(name): Path<String>,
    Query(query): Query<ForceQuery>,
) -> Result<StatusCode, ApiError> {
    match state.engine.remove_volume(&name) {
        Err(EngineError::NoVolume(_)) if cluster::remove(&state, &name, query.is_on()).await? => {}
        Err(EngineError::NoVolume(_)) if query.is_on() => {}
        other => other?,
    }
    Ok(StatusCode::NO_CONTENT)
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct UpdateBody {
    spec: ClusterVolumeSpec,
}

pub(super) async fn update(
    state: State,
    Path(name): Path<String>,
    Query(query): Query<VersionQuery>,
    body: JsonBody,
) -> Result<(), ApiError> {
    let UpdateBody { spec } = parse(&body)?;
    if state.engine.volume(&name).is_ok() {
        return Err(ApiError::bad_request(format!(
            "volume {name} is one of this host alone: only volumes of the swarm can be updated"
        )));
    }
    cluster::update(&state, &name, query.version, spec).await
}

/// Before this version, pruning meant all volumes that no container has, and its clients say so to their users.
const PRUNES_ANONYMOUS_SINCE: u32 = 42;

pub(super) async fn prune(
    state: State,
    Query(query): Query<ListQuery>,
    version: Option<Extension<AskedVersion>>,
) -> Result<Json<Value>, ApiError> {
    let known = ["label", "label!", "all"];
    let filters = Filters::parse(query.filters.as_deref(), &known).map_err(ApiError::bad_request)?;
    let is_old = version.is_some_and(|Extension(AskedVersion(minor))| minor < PRUNES_ANONYMOUS_SINCE);
    let all = filters.flag("all").map_err(ApiError::bad_request)? == Some(true) || is_old;
    let wanted = |volume: &Volume| {
        // Those that were named are somebody's, unless all are meant.
        (all || volume.anonymous)
            && filters.labels("label", &volume.labels)
            && !filters.any_label("label!", &volume.labels)
    };
    let (names, bytes) = state.engine.prune_volumes(wanted);
    Ok(Json(json!({"VolumesDeleted": names, "SpaceReclaimed": bytes})))
}
