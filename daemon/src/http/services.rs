//! Services.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Path, Query};
use axum::http::HeaderMap;
use axum::response::Response;
use serde::Deserialize;
use serde_json::{Value, json};
use skep_api::{SecretBytes, Service, ServiceMode, ServiceSpec, Task, TaskState};
use skep_manager::control::{Command, Outcome, ServiceChange};
use skep_raft_store::Tables;

use super::images::registry_auth;
use super::nodes::VersionQuery;
use super::swarm::is_on;
use super::{
    ApiError, State,
    json::{JsonBody, parse_service},
};
use crate::filters::Filters;
use crate::logs::{self, LogParams};

#[derive(Deserialize)]
pub(super) struct ListQuery {
    filters: Option<String>,
    #[serde(default)]
    status: String,
}

pub(super) async fn list(state: State, Query(query): Query<ListQuery>) -> Result<Json<Vec<Value>>, ApiError> {
    let known = ["id", "label", "mode", "name", "runtime"];
    let filters = Filters::parse(query.filters.as_deref(), &known).map_err(ApiError::bad_request)?;
    let tables = state.swarm.manager().await?.read().await?;
    let matching = tables.services.iter().filter(|service| {
        !service.removed
            && filters.any("id", |id| service.id.to_string().starts_with(id))
            && filters.any("name", |name| service.spec.name.starts_with(name))
            && filters.labels("label", &service.spec.labels)
            && filters.any("mode", |mode| mode == service.spec.mode.as_str())
            && filters.any("runtime", |runtime| runtime == "container")
    });
    let value = |service: &Arc<Service>| {
        let mut value = serde_json::to_value(&**service).unwrap_or_default();
        if is_on(&query.status) {
            value["ServiceStatus"] = status(service, &tables);
        }
        value
    };
    Ok(Json(matching.map(value).collect()))
}

/// How many tasks run, and how many should; and of a job, how many have done their part.
fn status(service: &Service, tables: &Tables) -> Value {
    let iteration = service.job_status.map(|status| status.iteration);
    let tasks: Vec<_> = tables.tasks_of_service(service.id).filter(|task| task.job_iteration == iteration).collect();
    let count = |counts: &dyn Fn(&Task) -> bool| tasks.iter().filter(|task| counts(task)).count() as u64;
    let live = |node: Option<skep_api::NodeId>| {
        node.and_then(|id| tables.nodes.get(id)).is_some_and(|node| node.status.state != skep_api::NodeState::Down)
    };
    let running =
        count(&|task| task.status.state == TaskState::Running && task.desired_state.is_wanted() && live(task.node_id));
    let desired = match service.spec.mode {
        ServiceMode::Replicated { replicas } => replicas,
        ServiceMode::Global => count(&|task| task.desired_state.is_wanted()),
        ServiceMode::ReplicatedJob { max_concurrent, .. } => max_concurrent,
        ServiceMode::GlobalJob => count(&|task| task.desired_state.is_wanted() && !task.is_done()),
    };
    json!({"RunningTasks": running, "DesiredTasks": desired, "CompletedTasks": count(&Task::is_done)})
}

/// Puts the credentials that came with a request where the workers find them.
fn set_registry_auth(spec: &mut ServiceSpec, auth: SecretBytes) {
    Arc::make_mut(&mut spec.task_template).container.registry_auth = auth;
}

pub(super) async fn create(
    state: State,
    headers: HeaderMap,
    body: JsonBody,
) -> Result<(axum::http::StatusCode, Json<Value>), ApiError> {
    let mut spec = parse_service(&body)?;
    set_registry_auth(&mut spec, registry_auth(&headers)?);
    let warnings = warnings(&spec);
    let outcome = state.swarm.manager().await?.execute(Command::CreateService { spec }).await?;
    Ok((axum::http::StatusCode::CREATED, Json(json!({"ID": created(outcome), "Warnings": warnings}))))
}

/// As clients expect it: none is `null`.
fn warnings(spec: &ServiceSpec) -> Option<Vec<String>> {
    Some(spec.warnings()).filter(|warnings| !warnings.is_empty())
}

pub(super) fn created(outcome: Outcome) -> String {
    match outcome {
        Outcome::Created(id) => id,
        Outcome::Done => String::new(),
    }
}

/// Finds a service by id, name, or the beginning of its id.
pub(super) fn find<'a>(tables: &'a Tables, name: &str) -> Result<&'a Arc<Service>, ApiError> {
    let live = |service: &&Arc<Service>| !service.removed;
    if let Some(service) = name.parse().ok().and_then(|id| tables.services.get(id)).filter(live) {
        return Ok(service);
    }
    if let Some(service) = tables.services.by_name(name) {
        return Ok(service);
    }
    let mut matching = tables.services.iter().filter(live).filter(|service| service.id.to_string().starts_with(name));
    match (matching.next(), matching.next()) {
        (Some(service), None) => Ok(service),
        (None, _) => Err(ApiError::not_found(format!("service {name} not found"))),
        (Some(_), Some(_)) => Err(ApiError::bad_request(format!("service {name} is ambiguous: use more of its id"))),
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct InspectQuery {
    #[serde(default)]
    insert_defaults: String,
}

pub(super) async fn inspect(
    state: State,
    Path(id): Path<String>,
    Query(query): Query<InspectQuery>,
) -> Result<Json<Value>, ApiError> {
    let tables = state.swarm.manager().await?.read().await?;
    let service = find(&tables, &id)?;
    let mut value = serde_json::to_value(&**service).unwrap_or_default();
    if is_on(&query.insert_defaults) {
        insert_defaults(&mut value);
    }
    Ok(Json(value))
}

/// Shows what is in force where the spec says nothing.
fn insert_defaults(value: &mut Value) {
    let update = json!({"Parallelism": 1, "FailureAction": "pause", "Monitor": 5_000_000_000i64,
        "MaxFailureRatio": 0, "Order": "stop-first"});
    let is_job = value.get("JobStatus").is_some();
    let spec = &mut value["Spec"];
    for (name, default) in [("UpdateConfig", &update), ("RollbackConfig", &update)] {
        if !is_job && spec.get(name).is_none() {
            spec[name] = default.clone();
        }
    }
    if spec["TaskTemplate"].get("RestartPolicy").is_none() {
        spec["TaskTemplate"]["RestartPolicy"] =
            json!({"Condition": "any", "Delay": 5_000_000_000i64, "MaxAttempts": 0});
    }
    if spec["TaskTemplate"]["ContainerSpec"].get("StopGracePeriod").is_none() {
        spec["TaskTemplate"]["ContainerSpec"]["StopGracePeriod"] = json!(10_000_000_000i64);
    }
}

pub(super) async fn remove(state: State, Path(id): Path<String>) -> Result<(), ApiError> {
    let manager = state.swarm.manager().await?;
    let id = find(&*manager.read().await?, &id)?.id;
    manager.execute(Command::RemoveService { id }).await?;
    Ok(())
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", default)]
#[derive(Default)]
pub(super) struct UpdateQuery {
    rollback: String,
    /// Whose credentials go on, if the request brings none: `spec` or `previous-spec`.
    registry_auth_from: String,
}

pub(super) async fn update(
    state: State,
    Path(id): Path<String>,
    Query(version): Query<VersionQuery>,
    Query(query): Query<UpdateQuery>,
    headers: HeaderMap,
    body: JsonBody,
) -> Result<Json<Value>, ApiError> {
    let manager = state.swarm.manager().await?;
    let tables = manager.read().await?;
    let before = find(&tables, &id)?;
    let id = before.id;
    let mut told = None;
    let change = match query.rollback.as_str() {
        "" => {
            let mut spec = parse_service(&body)?;
            let brought = registry_auth(&headers)?;
            let kept = match (query.registry_auth_from.as_str(), &before.previous_spec) {
                ("" | "spec", _) => &before.spec,
                ("previous-spec", Some(previous)) => previous,
                ("previous-spec", None) => {
                    return Err(ApiError::bad_request("service has no previous spec to take credentials from"));
                }
                (other, _) => {
                    return Err(ApiError::bad_request(format!(
                        "registryAuthFrom={other} is unknown: use spec or previous-spec"
                    )));
                }
            };
            let auth = if brought.is_empty() { kept.task_template.container.registry_auth.clone() } else { brought };
            set_registry_auth(&mut spec, auth);
            told = warnings(&spec);
            ServiceChange::Spec(Box::new(spec))
        }
        "previous" => ServiceChange::RollBack,
        other => return Err(ApiError::bad_request(format!("rollback={other} is unknown: use previous"))),
    };
    manager.execute(Command::UpdateService { id, version: version.version, change }).await?;
    Ok(Json(json!({"Warnings": told})))
}

pub(super) async fn logs(
    state: State,
    Path(id): Path<String>,
    Query(params): Query<LogParams>,
) -> Result<Response, ApiError> {
    let manager = state.swarm.manager().await?;
    let tables = manager.read().await?;
    let service = find(&tables, &id)?.id;
    let tasks = tables.tasks_of_service(service).cloned().collect();
    let more = params.follows().then_some((manager, service));
    logs::task_logs(&state, &tables, tasks, &params, more).await
}
