//! Volumes of this host.

use std::collections::BTreeMap;

use axum::extract::{Path, Query};
use axum::http::StatusCode;
use axum::{Extension, Json};
use serde::Deserialize;
use serde_json::{Value, json};
use skep_engine::{EngineError, Volume};

use super::json::{JsonBody, parse};
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

pub(super) async fn list(state: State, Query(query): Query<ListQuery>) -> Result<Json<Value>, ApiError> {
    let known = ["name", "label", "dangling", "driver"];
    let filters = Filters::parse(query.filters.as_deref(), &known).map_err(ApiError::bad_request)?;
    let dangling = filters.flag("dangling").map_err(ApiError::bad_request)?;
    let wanted = |volume: &Volume| {
        filters.any("name", |name| volume.name.contains(name))
            && filters.labels("label", &volume.labels)
            && filters.any("driver", |driver| driver == "local")
            && dangling.is_none_or(|dangling| state.engine.volume_users(&volume.name).is_empty() == dangling)
    };
    let volumes: Vec<_> = state
        .engine
        .volumes()
        .iter()
        .filter(|volume| wanted(volume))
        .map(|volume| volume_json(&state, volume))
        .collect();
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
    if !matches!(body.driver.as_str(), "" | "local") {
        let driver = body.driver;
        return Err(ApiError::not_found(format!("volume driver {driver:?} is not there: use local")));
    }
    if !body.cluster_volume_spec.is_null() {
        return Err(ApiError::unsupported("cluster volumes are not supported yet: use local ones"));
    }
    let volume = Volume { name: body.name, labels: body.labels, options: body.driver_opts, ..Volume::default() };
    let volume = state.engine.create_volume(volume)?;
    Ok((StatusCode::CREATED, Json(volume_json(&state, &volume))))
}

pub(super) async fn inspect(state: State, Path(name): Path<String>) -> Result<Json<Value>, ApiError> {
    let volume = state.engine.volume(&name)?;
    Ok(Json(volume_json(&state, &volume)))
}

pub(super) async fn remove(
    state: State,
    Path(name): Path<String>,
    Query(query): Query<ForceQuery>,
) -> Result<StatusCode, ApiError> {
    match state.engine.remove_volume(&name) {
        Err(EngineError::NoVolume(_)) if query.is_on() => {}
        other => other?,
    }
    Ok(StatusCode::NO_CONTENT)
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
