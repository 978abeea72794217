//! Secrets and configs: the same operations on two kinds.

use axum::Json;
use axum::extract::{Path, Query};
use axum::http::StatusCode;
use serde::Deserialize;
use serde_json::{Value, json};
use skep_api::object::Record;
use skep_api::{Config, Secret};
use skep_manager::control::{Command, Outcome};
use skep_raft_store::Table;

use super::nodes::VersionQuery;
use super::services::created;
use super::{
    ApiError, State,
    json::{JsonBody, parse},
};
use crate::filters::Filters;

#[derive(Deserialize)]
pub(super) struct ListQuery {
    filters: Option<String>,
}

const FILTERS: [&str; 4] = ["id", "name", "names", "label"];

/// What both kinds have.
trait Named: Record {
    const KIND: &'static str;
    fn name(&self) -> &str;
    fn labels(&self) -> &std::collections::BTreeMap<String, String>;
    fn id_text(&self) -> String;
}

impl Named for Secret {
    const KIND: &'static str = "secret";
    fn name(&self) -> &str {
        &self.spec.name
    }
    fn labels(&self) -> &std::collections::BTreeMap<String, String> {
        &self.spec.labels
    }
    fn id_text(&self) -> String {
        self.id.to_string()
    }
}

impl Named for Config {
    const KIND: &'static str = "config";
    fn name(&self) -> &str {
        &self.spec.name
    }
    fn labels(&self) -> &std::collections::BTreeMap<String, String> {
        &self.spec.labels
    }
    fn id_text(&self) -> String {
        self.id.to_string()
    }
}

fn select<T: Named + serde::Serialize>(table: &Table<T>, query: &ListQuery) -> Result<Json<Vec<Value>>, ApiError> {
    let filters = Filters::parse(query.filters.as_deref(), &FILTERS).map_err(ApiError::bad_request)?;
    let matching = table.iter().filter(|object| {
        filters.any("id", |id| object.id_text().starts_with(id))
            && filters.any("name", |name| object.name().starts_with(name))
            && filters.any("names", |name| object.name() == name)
            && filters.labels("label", object.labels())
    });
    Ok(Json(matching.map(|object| serde_json::to_value(&**object).unwrap_or_default()).collect()))
}

/// Finds an object by id, name, or the beginning of its id.
fn find<'a, T: Named>(table: &'a Table<T>, name: &str) -> Result<&'a std::sync::Arc<T>, ApiError> {
    let exact = table.iter().find(|object| object.id_text() == name);
    if let Some(object) = exact.or_else(|| table.by_name(name)) {
        return Ok(object);
    }
    let mut matching = table.iter().filter(|object| object.id_text().starts_with(name));
    match (matching.next(), matching.next()) {
        (Some(object), None) => Ok(object),
        (None, _) => Err(ApiError::not_found(format!("{} {name} not found", T::KIND))),
        (Some(_), Some(_)) => {
            Err(ApiError::bad_request(format!("{} {name} is ambiguous: use more of its id", T::KIND)))
        }
    }
}

pub(super) async fn list_secrets(state: State, Query(query): Query<ListQuery>) -> Result<Json<Vec<Value>>, ApiError> {
    select(&state.swarm.manager().await?.read().await?.secrets, &query)
}

pub(super) async fn create_secret(state: State, body: JsonBody) -> Result<(StatusCode, Json<Value>), ApiError> {
    let command = Command::CreateSecret { spec: parse(&body)? };
    let outcome = state.swarm.manager().await?.execute(command).await?;
    Ok((StatusCode::CREATED, Json(id_of(outcome))))
}

pub(super) async fn inspect_secret(state: State, Path(id): Path<String>) -> Result<Json<Value>, ApiError> {
    let tables = state.swarm.manager().await?.read().await?;
    Ok(Json(serde_json::to_value(&**find(&tables.secrets, &id)?).unwrap_or_default()))
}

pub(super) async fn remove_secret(state: State, Path(id): Path<String>) -> Result<StatusCode, ApiError> {
    let manager = state.swarm.manager().await?;
    let id = find(&manager.read().await?.secrets, &id)?.id;
    manager.execute(Command::RemoveSecret { id }).await?;
    Ok(StatusCode::NO_CONTENT)
}

pub(super) async fn update_secret(
    state: State,
    Path(id): Path<String>,
    Query(query): Query<VersionQuery>,
    body: JsonBody,
) -> Result<(), ApiError> {
    let manager = state.swarm.manager().await?;
    let id = find(&manager.read().await?.secrets, &id)?.id;
    manager.execute(Command::UpdateSecret { id, version: query.version, spec: parse(&body)? }).await?;
    Ok(())
}

pub(super) async fn list_configs(state: State, Query(query): Query<ListQuery>) -> Result<Json<Vec<Value>>, ApiError> {
    select(&state.swarm.manager().await?.read().await?.configs, &query)
}

/// Docker's daemon says `ID` where the API's description has `Id`. Clients look for that, and some take both for one twice.
fn id_of(outcome: Outcome) -> Value {
    json!({ "ID": created(outcome) })
}

pub(super) async fn create_config(state: State, body: JsonBody) -> Result<(StatusCode, Json<Value>), ApiError> {
    let command = Command::CreateConfig { spec: parse(&body)? };
    let outcome = state.swarm.manager().await?.execute(command).await?;
    Ok((StatusCode::CREATED, Json(id_of(outcome))))
}

pub(super) async fn inspect_config(state: State, Path(id): Path<String>) -> Result<Json<Value>, ApiError> {
    let tables = state.swarm.manager().await?.read().await?;
    Ok(Json(serde_json::to_value(&**find(&tables.configs, &id)?).unwrap_or_default()))
}

pub(super) async fn remove_config(state: State, Path(id): Path<String>) -> Result<StatusCode, ApiError> {
    let manager = state.swarm.manager().await?;
    let id = find(&manager.read().await?.configs, &id)?.id;
    manager.execute(Command::RemoveConfig { id }).await?;
    Ok(StatusCode::NO_CONTENT)
}

pub(super) async fn update_config(
    state: State,
    Path(id): Path<String>,
    Query(query): Query<VersionQuery>,
    body: JsonBody,
) -> Result<(), ApiError> {
    let manager = state.swarm.manager().await?;
    let id = find(&manager.read().await?.configs, &id)?.id;
    manager.execute(Command::UpdateConfig { id, version: query.version, spec: parse(&body)? }).await?;
    Ok(())
}
