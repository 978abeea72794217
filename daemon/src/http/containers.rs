//! Containers of this host.

pub(super) mod attach;
pub(super) mod change;
mod checks;
pub(super) mod create;
mod describe;
mod devices;
pub(super) mod files;
mod modes;
mod mounts;
mod ports;
mod security;
pub(super) mod watch;
pub(super) mod websocket;

use axum::extract::{Path, Query};
use axum::response::Response;
use axum::{Extension, Json};
use serde::Deserialize;
use serde_json::{Value, json};
use skep_engine::{ContainerState, Engine, Inspection, MountSource, NetworkMode, familiar};

pub(super) use describe::{endpoint_id, summary};

use super::swarm::is_on;
use super::{ApiError, AskedVersion, State};
use crate::filters::Filters;
use crate::logs::{self, LogParams};

/// Containers' names, as dockerd takes them.
fn require_name(name: &str) -> Result<(), ApiError> {
    let valid = name.len() > 1
        && name.starts_with(|first: char| first.is_ascii_alphanumeric())
        && name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-'));
    if valid {
        return Ok(());
    }
    Err(ApiError::bad_request(format!(
        "Invalid container name ({name}), only [a-zA-Z0-9][a-zA-Z0-9_.-] are allowed, two characters at least"
    )))
}

#[derive(Deserialize)]
pub(super) struct ListQuery {
    #[serde(default)]
    all: String,
    #[serde(default)]
    size: String,
    filters: Option<String>,
    limit: Option<i64>,
}

const FILTERS: [&str; 16] = [
    "id",
    "name",
    "label",
    "status",
    "ancestor",
    "health",
    "exited",
    "before",
    "since",
    "volume",
    "network",
    "publish",
    "expose",
    "is-task",
    "isolation",
    "driver",
];

pub(super) async fn list(state: State, Query(query): Query<ListQuery>) -> Result<Json<Vec<Value>>, ApiError> {
    let filters = Filters::parse(query.filters.as_deref(), &FILTERS).map_err(ApiError::bad_request)?;
    const STATES: [&str; 7] = ["created", "restarting", "running", "removing", "paused", "exited", "dead"];
    if let Some(unknown) = filters.values("status").find(|status| !STATES.contains(status)) {
        return Err(ApiError::bad_request(format!(
            "invalid filter 'status={unknown}': use one of {}",
            STATES.join(", ")
        )));
    }
    let created_of = |filter: &str| -> Result<_, ApiError> {
        let named = filters.values(filter).next().map(|name| state.engine.inspect(name)).transpose()?;
        Ok(named.map(|container| container.created))
    };
    let (before, since) = (created_of("before")?, created_of("since")?);
    let limit = query.limit.filter(|&limit| limit > 0).and_then(|limit| usize::try_from(limit).ok());
    let all = is_on(&query.all) || limit.is_some() || ["status", "exited"].iter().any(|name| filters.is_set(name));
    let mut containers: Vec<_> = state
        .engine
        .list()
        .into_iter()
        .filter(|c| all || matches!(c.state, ContainerState::Running(_) | ContainerState::Restarting(_)))
        .filter(|c| before.is_none_or(|at| c.created < at) && since.is_none_or(|at| c.created > at))
        .filter(|c| passes(&state.engine, c, &filters))
        .collect();
    containers.sort_by_key(|container| std::cmp::Reverse(container.created));
    containers.truncate(limit.unwrap_or(usize::MAX));
    let linked = state.engine.link_names();
    let mut rows: Vec<_> = containers.iter().map(|container| summary(&state.engine, container, &linked)).collect();
    if is_on(&query.size) {
        for (row, container) in rows.iter_mut().zip(&containers) {
            let own = state.engine.container_size(&container.id);
            row["SizeRw"] = json!(own);
            row["SizeRootFs"] = json!(own + image_size(&state, container));
        }
    }
    Ok(Json(rows))
}

pub(super) fn image_size(state: &State, container: &Inspection) -> u64 {
    state.engine.image(&container.config.image_id).map_or(0, |image| image.size_bytes)
}

fn passes(engine: &Engine, c: &Inspection, filters: &Filters) -> bool {
    let named = |pattern: &str| {
        let bare = pattern.trim_start_matches('/');
        match (bare.strip_prefix('^').map(|rest| rest.trim_start_matches('/')), bare.strip_suffix('$')) {
            (Some(start), Some(_)) => c.config.name == start.trim_end_matches('$'),
            (Some(start), None) => c.config.name.starts_with(start),
            (None, Some(end)) => c.config.name.ends_with(end),
            (None, None) => c.config.name.contains(bare),
        }
    };
    let exited = |code: &str| matches!(&c.state, ContainerState::Exited(exit) if exit.code.to_string() == code);
    let is_task = c.config.labels.contains_key(skep_worker::TASK_ID_LABEL);
    let has_volume = |wanted: &str| {
        c.config.mounts.iter().any(|mount| {
            mount.target == wanted
                || match &mount.source {
                    MountSource::Volume { name, .. } => name == wanted,
                    MountSource::Bind { path, .. } => path == wanted,
                    MountSource::Tmpfs { .. } | MountSource::Image { .. } => false,
                }
        })
    };
    let port = |wanted: &str| {
        let number = wanted.split('/').next().unwrap_or(wanted).to_owned();
        c.config
            .ports
            .iter()
            .any(|port| port.container_port.to_string() == number || port.host_port.to_string() == number)
    };
    let exposes = |wanted: &str| {
        c.config.exposed_ports.iter().any(|port| port == wanted || port.split('/').next() == Some(wanted))
    };
    filters.any("id", |id| c.id.starts_with(id))
        && filters.any("name", named)
        && filters.labels("label", &c.config.labels)
        && filters.any("status", |status| c.state.as_str() == status)
        && filters.any("exited", exited)
        && filters.any("ancestor", |image| {
            is_descendant(engine, c, image)
                || c.config.image == image
                || familiar(&c.config.image) == image
                || c.config.image_id == image
                || c.config.image_id.trim_start_matches("sha256:").starts_with(image)
        })
        && filters.any("health", |health| describe::health_of(c).as_str() == health)
        && filters.any("volume", has_volume)
        && filters.any("network", |network| in_network(engine, c, network))
        && filters.any("publish", port)
        && filters.any("expose", exposes)
        && filters.any("is-task", |wanted| is_on(wanted) == is_task)
}

/// Whether a container's image stands on another.
fn is_descendant(engine: &Engine, c: &Inspection, ancestor: &str) -> bool {
    match (engine.image(&c.config.image_id), engine.image(ancestor)) {
        (Ok(own), Ok(below)) => engine.stands_on(&own, &below),
        _ => false,
    }
}

/// A shorter beginning of an id is taken for a name.
const ID_LEN_MIN: usize = 4;

/// Whether a container is in a network, by its name or id.
fn in_network(engine: &Engine, c: &Inspection, wanted: &str) -> bool {
    match &c.config.network {
        NetworkMode::Local(places) => {
            let own = engine.network(wanted).ok();
            let mut granted = c.state.endpoints().iter().filter_map(|held| Some((&held.network, held.grant.as_ref()?)));
            places.iter().any(|place| own.as_ref().map_or(wanted, |own| &own.id) == place.network)
                || granted.any(|(id, grant)| id == wanted || grant.network_name == wanted)
        }
        NetworkMode::Joined(places) => places.iter().any(|place| place.id == wanted),
        other @ (NetworkMode::Bridge | NetworkMode::Host | NetworkMode::None | NetworkMode::Container(_)) => {
            let by_id = wanted.len() >= ID_LEN_MIN && super::networks::predefined_id(&other.name()).starts_with(wanted);
            by_id || super::networks::predefined_name(wanted).unwrap_or(wanted) == other.name()
        }
    }
}

/// Clients of an older version find a container's short id among what its networks call it.
const SHORT_IDS_NO_ALIASES_SINCE: u32 = 44;

#[derive(Deserialize)]
pub(super) struct InspectQuery {
    #[serde(default)]
    size: String,
}

pub(super) async fn inspect(
    state: State,
    Path(id): Path<String>,
    Query(query): Query<InspectQuery>,
    version: Option<Extension<AskedVersion>>,
) -> Result<Json<Value>, ApiError> {
    let container = state.engine.inspect(&id)?;
    let mut value = describe::whole(&state.engine, &container);
    if version.is_some_and(|Extension(AskedVersion(minor))| minor < SHORT_IDS_NO_ALIASES_SINCE) {
        describe::tell_short_id_among_aliases(&mut value);
    }
    if is_on(&query.size) {
        let own = state.engine.container_size(&container.id);
        value["SizeRw"] = json!(own);
        value["SizeRootFs"] = json!(own + image_size(&state, &container));
    }
    Ok(Json(value))
}

pub(super) async fn logs(
    state: State,
    Path(id): Path<String>,
    Query(params): Query<LogParams>,
) -> Result<Response, ApiError> {
    let query = params.query()?;
    let config = state.engine.inspect(&id)?.config;
    if !params.follows() {
        state.engine.await_first_words(&id).await;
    }
    let details = config.log_attributes().iter().map(|(name, value)| format!("{name}={value}")).collect::<Vec<_>>();
    let lines = state.engine.logs(&id, query.options())?;
    Ok(logs::container_logs(lines, params.raw(config.tty), details.join(",")))
}
