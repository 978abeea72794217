//! What is done to containers that are there.

use std::time::Duration;

use axum::Json;
use axum::extract::{Path, Query};
use axum::http::StatusCode;
use serde::Deserialize;
use serde_json::{Value, json};
use skep_engine::{ContainerState, RemoveOptions, ResourceLimits};

use super::create::{Resources, RestartPolicyBody, restart_policy};
use crate::filters::Filters;
use crate::http::json::{JsonBody, from_value, or_null, read};
use crate::http::swarm::is_on;
use crate::http::{ApiError, State};

pub(in crate::http) async fn start(state: State, Path(id): Path<String>) -> Result<StatusCode, ApiError> {
    if let ContainerState::Running(running) = state.engine.inspect(&id)?.state {
        if running.paused {
            return Err(ApiError::conflict("cannot start a paused container, try unpause instead"));
        }
        return Ok(StatusCode::NOT_MODIFIED);
    }
    state.engine.start(&id).await?;
    Ok(StatusCode::NO_CONTENT)
}

#[derive(Deserialize)]
pub(in crate::http) struct StopQuery {
    /// Seconds; -1: as long as it takes.
    t: Option<i64>,
    signal: Option<String>,
}

impl StopQuery {
    fn grace(&self) -> Option<Duration> {
        const FOREVER: Duration = Duration::from_secs(100 * 365 * 86_400);
        self.t.map(|seconds| u64::try_from(seconds).map_or(FOREVER, Duration::from_secs))
    }
}

pub(in crate::http) async fn stop(
    state: State,
    Path(id): Path<String>,
    Query(query): Query<StopQuery>,
) -> Result<StatusCode, ApiError> {
    if matches!(state.engine.inspect(&id)?.state, ContainerState::Exited(_) | ContainerState::Created) {
        return Ok(StatusCode::NOT_MODIFIED);
    }
    state.engine.stop_with(&id, query.signal.as_deref(), query.grace()).await?;
    Ok(StatusCode::NO_CONTENT)
}

pub(in crate::http) async fn restart(
    state: State,
    Path(id): Path<String>,
    Query(query): Query<StopQuery>,
) -> Result<StatusCode, ApiError> {
    state.engine.restart(&id, query.signal.as_deref(), query.grace()).await?;
    Ok(StatusCode::NO_CONTENT)
}

#[derive(Deserialize)]
pub(in crate::http) struct KillQuery {
    signal: Option<String>,
}

pub(in crate::http) async fn kill(
    state: State,
    Path(id): Path<String>,
    Query(query): Query<KillQuery>,
) -> Result<StatusCode, ApiError> {
    let signal = query.signal.as_deref().filter(|signal| !signal.is_empty()).unwrap_or("SIGKILL");
    state.engine.kill(&id, signal)?;
    if matches!(signal, "SIGKILL" | "KILL" | "9") {
        // As a user expects who asks at once whether it is gone.
        drop(tokio::time::timeout(Duration::from_secs(10), state.engine.wait(&id)).await);
    }
    Ok(StatusCode::NO_CONTENT)
}

pub(in crate::http) async fn pause(state: State, Path(id): Path<String>) -> Result<StatusCode, ApiError> {
    state.engine.pause(&id, true)?;
    Ok(StatusCode::NO_CONTENT)
}

pub(in crate::http) async fn unpause(state: State, Path(id): Path<String>) -> Result<StatusCode, ApiError> {
    state.engine.pause(&id, false)?;
    Ok(StatusCode::NO_CONTENT)
}

#[derive(Deserialize)]
pub(in crate::http) struct RenameQuery {
    #[serde(default)]
    name: String,
}

pub(in crate::http) async fn rename(
    state: State,
    Path(id): Path<String>,
    Query(query): Query<RenameQuery>,
) -> Result<StatusCode, ApiError> {
    let name = query.name.trim_start_matches('/');
    if name.is_empty() {
        return Err(ApiError::bad_request("a container cannot be without a name: give the new one"));
    }
    super::require_name(name)?;
    state.engine.rename(&id, name).await?;
    Ok(StatusCode::NO_CONTENT)
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "PascalCase", default)]
struct UpdateBody {
    restart_policy: Option<RestartPolicyBody>,
}

/// Changes limits and the restart policy; what is not named stays.
pub(in crate::http) async fn update(
    state: State,
    Path(id): Path<String>,
    body: JsonBody,
) -> Result<Json<Value>, ApiError> {
    let request = read(&body)?;
    let policy: UpdateBody = from_value(request.clone())?;
    let policy = policy.restart_policy.filter(|policy| !policy.is_empty());
    let restart = policy.as_ref().map(restart_policy).transpose()?;
    let container = state.engine.inspect(&id)?;
    if container.config.auto_remove && restart.is_some_and(|policy| policy != skep_engine::RestartPolicy::No) {
        return Err(ApiError::bad_request(
            "Restart policy cannot be updated because AutoRemove is enabled for the container",
        ));
    }
    require_one_way(&request, &container.config.limits)?;
    // The limits in force, with those on top that the request names.
    let mut limits = Resources::json_of(&container.config.limits);
    for (key, value) in request.as_object().into_iter().flatten() {
        // Of processes, none is as many as there may be.
        let says_nothing = (value == &json!(0) && key != "PidsLimit") || value == &json!("");
        if let Some(known) = limits.get_mut(key).filter(|_| !says_nothing) {
            *known = value.clone();
        }
    }
    let mut limits = from_value::<Resources>(limits)?.limits()?;
    limits.block.clone_from(&container.config.limits.block);
    state.engine.update(&container.id, limits, restart).await?;
    Ok(Json(json!({"Warnings": []})))
}

/// That CPU time stays limited in the way in which it was, as there are two.
fn require_one_way(request: &Value, now: &ResourceLimits) -> Result<(), ApiError> {
    let asks = |name: &str| request[name].as_i64().is_some_and(|value| value > 0);
    let conflicts = [
        (asks("NanoCpus") && now.cpu_period_micros > 0, "Nano CPUs", "CPU Period"),
        (asks("NanoCpus") && now.cpu_quota_micros > 0, "Nano CPUs", "CPU Quota"),
        (asks("CpuPeriod") && now.nano_cpus > 0, "CPU Period", "NanoCPUs"),
        (asks("CpuQuota") && now.nano_cpus > 0, "CPU Quota", "NanoCPUs"),
    ];
    match conflicts.into_iter().find(|(conflict, ..)| *conflict) {
        Some((_, new, old)) => Err(ApiError::bad_request(format!(
            "Conflicting options: {new} cannot be updated as {old} has already been set"
        ))),
        None => Ok(()),
    }
}

#[derive(Deserialize)]
pub(in crate::http) struct RemoveQuery {
    #[serde(default)]
    force: String,
    #[serde(default)]
    v: String,
}

/// Takes a link away, which is named by whose it is and its alias.
pub(in crate::http) async fn remove_link(
    state: State,
    Path((owner, alias)): Path<(String, String)>,
) -> Result<StatusCode, ApiError> {
    state.engine.remove_link(&format!("{owner}/{alias}"))?;
    Ok(StatusCode::NO_CONTENT)
}

pub(in crate::http) async fn remove(
    state: State,
    Path(id): Path<String>,
    Query(query): Query<RemoveQuery>,
) -> Result<StatusCode, ApiError> {
    let options = RemoveOptions { force: is_on(&query.force), volumes: is_on(&query.v) };
    state.engine.remove(&id, options).await?;
    Ok(StatusCode::NO_CONTENT)
}

#[derive(Deserialize)]
pub(in crate::http) struct PruneQuery {
    filters: Option<String>,
}

/// Removes all that have ended.
pub(in crate::http) async fn prune(state: State, Query(query): Query<PruneQuery>) -> Result<Json<Value>, ApiError> {
    let known = ["label", "label!", "until"];
    let filters = Filters::parse(query.filters.as_deref(), &known).map_err(ApiError::bad_request)?;
    let until = filters.until().map_err(ApiError::bad_request)?;
    let (mut deleted, mut bytes) = (Vec::new(), 0);
    for container in state.engine.list() {
        let at_rest = matches!(container.state, ContainerState::Created | ContainerState::Exited(_));
        let wanted = at_rest
            && filters.labels("label", &container.config.labels)
            && !filters.any_label("label!", &container.config.labels)
            && until.is_none_or(|until| container.created < until);
        // A task's container belongs to its service.
        if !wanted || container.config.labels.contains_key(skep_worker::TASK_ID_LABEL) {
            continue;
        }
        let size = state.engine.container_size(&container.id);
        if state.engine.remove(&container.id, RemoveOptions::default()).await.is_ok() {
            deleted.push(container.id);
            bytes += size;
        }
    }
    Ok(Json(json!({"ContainersDeleted": or_null(deleted), "SpaceReclaimed": bytes})))
}
