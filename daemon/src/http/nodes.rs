//! Nodes.

use std::time::Duration;

use axum::Json;
use axum::extract::{Path, Query};
use serde::Deserialize;
use serde_json::{Value, json};
use skep_api::{Node, NodeSpec, NodeState};
use skep_manager::Manager;
use skep_manager::control::Command;
use skep_raft_store::Tables;

use super::{
    ApiError, ForceQuery, State,
    json::{JsonBody, parse},
};
use crate::filters::Filters;

/// A manager that the leader has not heard for so long is told to be unreachable.
const REACHABLE_WITHIN: Duration = Duration::from_secs(3);

fn node_json(node: &Node, manager: &Manager) -> Value {
    let mut value = serde_json::to_value(node).unwrap_or_default();
    if let Some(raft) = &node.raft {
        let leader = manager.store().leadership().borrow().leader == Some(raft.raft_id);
        let reachable = if manager.is_leader() {
            manager.store().reachable(REACHABLE_WITHIN).contains(&raft.raft_id)
        } else {
            leader || node.status.state == NodeState::Ready
        };
        value["ManagerStatus"] = json!({
            "Leader": leader, "Reachability": if reachable { "reachable" } else { "unreachable" }, "Addr": raft.addr,
        });
    }
    value
}

#[derive(Deserialize)]
pub(super) struct ListQuery {
    filters: Option<String>,
}

pub(super) async fn list(state: State, Query(query): Query<ListQuery>) -> Result<Json<Vec<Value>>, ApiError> {
    let known = ["id", "name", "label", "node.label", "membership", "role"];
    let filters = Filters::parse(query.filters.as_deref(), &known).map_err(ApiError::bad_request)?;
    let manager = state.swarm.manager().await?;
    let tables = manager.read().await?;
    let matching = tables.nodes.iter().filter(|node| {
        filters.any("id", |id| node.id.to_string().starts_with(id))
            && filters.any("name", |name| node.description.hostname.starts_with(name))
            && filters.labels("label", &node.description.engine.labels)
            && filters.labels("node.label", &node.spec.labels)
            && filters.any("membership", |membership| membership == "accepted")
            && filters.any("role", |role| role == node.role().as_str())
    });
    Ok(Json(matching.map(|node| node_json(node, &manager)).collect()))
}

/// Finds a node by id, by the beginning of it, or by hostname if that is one node's alone.
pub(super) fn find<'a>(tables: &'a Tables, name: &str) -> Result<&'a std::sync::Arc<Node>, ApiError> {
    if let Some(node) = name.parse().ok().and_then(|id| tables.nodes.get(id)) {
        return Ok(node);
    }
    let named: Vec<_> = tables.nodes.iter().filter(|node| node.description.hostname == name).collect();
    let found = if named.is_empty() {
        tables.nodes.iter().filter(|node| node.id.to_string().starts_with(name)).collect()
    } else {
        named
    };
    match found.as_slice() {
        [node] => Ok(node),
        [] => Err(ApiError::not_found(format!("node {name} not found"))),
        many => {
            Err(ApiError::bad_request(format!("node {name} is ambiguous ({} matches found): use its id", many.len())))
        }
    }
}

pub(super) async fn inspect(state: State, Path(id): Path<String>) -> Result<Json<Value>, ApiError> {
    let manager = state.swarm.manager().await?;
    let tables = manager.read().await?;
    Ok(Json(node_json(find(&tables, &id)?, &manager)))
}

pub(super) async fn remove(
    state: State,
    Path(id): Path<String>,
    Query(query): Query<ForceQuery>,
) -> Result<(), ApiError> {
    let manager = state.swarm.manager().await?;
    let id = find(&*manager.read().await?, &id)?.id;
    manager.execute(Command::RemoveNode { id, force: query.is_on() }).await?;
    Ok(())
}

#[derive(Deserialize)]
pub(super) struct VersionQuery {
    pub(super) version: u64,
}

pub(super) async fn update(
    state: State,
    Path(id): Path<String>,
    Query(query): Query<VersionQuery>,
    body: JsonBody,
) -> Result<(), ApiError> {
    let manager = state.swarm.manager().await?;
    let spec: NodeSpec = parse(&body)?;
    let id = find(&*manager.read().await?, &id)?.id;
    manager.execute(Command::UpdateNode { id, version: query.version, spec }).await?;
    Ok(())
}
