//! Tasks.

use axum::Json;
use axum::extract::{Path, Query};
use axum::response::Response;
use serde::Deserialize;
use serde_json::{Value, json};
use skep_api::{Task, TaskState};
use skep_raft_store::Tables;

use super::{ApiError, State};
use crate::filters::Filters;
use crate::logs::{self, LogParams};

#[derive(Deserialize)]
pub(super) struct ListQuery {
    filters: Option<String>,
}

pub(super) async fn list(state: State, Query(query): Query<ListQuery>) -> Result<Json<Vec<Value>>, ApiError> {
    let known = ["desired-state", "id", "label", "name", "node", "service", "_up-to-date", "runtime"];
    let filters = Filters::parse(query.filters.as_deref(), &known).map_err(ApiError::bad_request)?;
    for wish in filters.values("desired-state") {
        if !matches!(wish, "running" | "shutdown" | "accepted") {
            return Err(ApiError::bad_request(format!(
                "invalid filter 'desired-state={wish}': use running, shutdown or accepted"
            )));
        }
    }
    let tables = state.swarm.manager().await?.read().await?;
    let services: Option<Vec<_>> = filters.is_set("service").then(|| {
        filters.values("service").filter_map(|name| super::services::find(&tables, name).ok().map(|s| s.id)).collect()
    });
    let nodes: Option<Vec<_>> = filters.is_set("node").then(|| {
        filters.values("node").filter_map(|name| super::nodes::find(&tables, name).ok().map(|n| n.id)).collect()
    });
    let matching = tables.tasks.iter().filter(|task| {
        services.as_ref().is_none_or(|services| services.contains(&task.service_id))
            && nodes.as_ref().is_none_or(|nodes| task.node_id.is_some_and(|node| nodes.contains(&node)))
            && filters.any("id", |id| task.id.to_string().starts_with(id))
            && filters.any("name", |name| task.slot_name().starts_with(name) || task.service_name == name)
            && filters.labels("label", &task.spec.container.labels)
            && filters.any("desired-state", |wish| desired_matches(task, wish))
            && filters.any("_up-to-date", |wish| is_up_to_date(task, &tables) == (wish == "true"))
            && filters.any("runtime", |runtime| runtime == "container")
            && task.desired_state != TaskState::Remove
    });
    Ok(Json(matching.map(|task| task_json(task, &tables)).collect()))
}

/// A task with its places in networks, which are told with all there is to know of each.
fn task_json(task: &Task, tables: &Tables) -> Value {
    let mut value = serde_json::to_value(task).unwrap_or_default();
    let attachments = task.networks.iter().filter_map(|place| {
        let network = tables.networks.get(place.network)?;
        let v4 = format!("{}/{}", place.address, network.subnet.prefix_len());
        let v6 = network
            .v6
            .map(|side| format!("{}/{}", side.address(network.subnet, place.address), side.subnet.prefix_len()));
        Some(json!({
            "Network": {
                "ID": network.id, "Version": {"Index": network.meta.version}, "CreatedAt": network.meta.created_at,
                "UpdatedAt": network.meta.updated_at,
                "Spec": {"Name": network.spec.name, "Labels": network.spec.labels, "Ingress": network.spec.ingress,
                    "Attachable": network.spec.attachable, "Internal": network.spec.internal, "Scope": "swarm",
                    "DriverConfiguration": {"Name": "overlay"}},
                "DriverState": {"Name": "overlay", "Options": network.spec.driver.options},
                "IPAMOptions": {"Driver": {"Name": "default"},
                    "Configs": super::networks::with_ipv6(
                        json!({"Subnet": network.subnet, "Gateway": network.gateway}), network.v6)},
            },
            "Addresses": std::iter::once(v4).chain(v6).collect::<Vec<_>>(),
        }))
    });
    let attachments: Vec<Value> = attachments.collect();
    if !attachments.is_empty() {
        value["NetworksAttachments"] = json!(attachments);
    }
    value
}

fn desired_matches(task: &Task, wish: &str) -> bool {
    match wish {
        "running" => task.desired_state.is_wanted() && !task.is_done(),
        "accepted" => task.desired_state == TaskState::Accepted,
        _ => !task.desired_state.is_wanted(),
    }
}

fn is_up_to_date(task: &Task, tables: &Tables) -> bool {
    tables.services.get(task.service_id).is_some_and(|service| service.spec.task_template == task.spec)
}

fn find<'a>(tables: &'a Tables, name: &str) -> Result<&'a std::sync::Arc<Task>, ApiError> {
    if let Some(task) = name.parse().ok().and_then(|id| tables.tasks.get(id)) {
        return Ok(task);
    }
    let mut matching = tables.tasks.iter().filter(|task| task.id.to_string().starts_with(name) || task.name() == name);
    match (matching.next(), matching.next()) {
        (Some(task), None) => Ok(task),
        (None, _) => Err(ApiError::not_found(format!("task {name} not found"))),
        (Some(_), Some(_)) => Err(ApiError::bad_request(format!("task {name} is ambiguous: use more of its id"))),
    }
}

pub(super) async fn inspect(state: State, Path(id): Path<String>) -> Result<Json<Value>, ApiError> {
    let tables = state.swarm.manager().await?.read().await?;
    Ok(Json(task_json(find(&tables, &id)?, &tables)))
}

pub(super) async fn logs(
    state: State,
    Path(id): Path<String>,
    Query(params): Query<LogParams>,
) -> Result<Response, ApiError> {
    let tables = state.swarm.manager().await?.read().await?;
    let task = find(&tables, &id)?.clone();
    logs::task_logs(&state, &tables, vec![task], &params, None).await
}
