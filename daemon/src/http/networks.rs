//! Networks: the swarm's, and those that every host has of its own.

pub(super) mod create;
pub(super) mod diagnose;
pub(super) mod joining;

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::{Path, Query};
use axum::http::StatusCode;
use serde::Deserialize;
use serde_json::{Value, json};
use skep_api::overlay::OverlayNetwork;
use skep_api::{Network, NetworkId, Timestamp};
use skep_engine::{ContainerState, DEFAULT_NETWORK, Endpoint, Inspection, LocalNetwork, NetworkMode};
use skep_manager::control::{Command, Reason};
use skep_raft_store::Tables;

use super::json::or_null;
use super::swarm::is_on;
use super::{ApiError, State};
use crate::filters::Filters;

/// How long the removal of a network waits for tasks that are on their way out.
const SETTLING_LIMIT: Duration = Duration::from_secs(20);
const SETTLING_PAUSE: Duration = Duration::from_millis(100);

/// Networks that every host has: name, id, driver.
const PREDEFINED: [(&str, &str, &str); 3] = [
    ("bridge", "5b2c9e0f6a1d4c7b8e3f0a9d2c5b7e1f4a6d8c0b3e9f2a5d7c1b4e8f0a3d6c9b", "bridge"),
    ("host", "9d4f1b7c2e8a5d0f3b6c9e1a4d7f0b2c5e8a1d3f6b9c0e2a4d7f1b5c8e0a3d6f", "host"),
    ("none", "1e7a3c9f5b0d8e2a6c4f1b7d3e9a5c0f8b2d6e4a1c7f3b9d5e0a8c2f6b4d1e7a", "null"),
];

/// The name of a predefined network that a service refers to by the id we gave it.
pub(super) fn predefined_name(target: &str) -> Option<&'static str> {
    PREDEFINED.iter().find(|(name, id, _)| *name == target || *id == target).map(|(name, ..)| *name)
}

/// The id by which clients know a network of this host's.
pub(super) fn predefined_id(id: &str) -> &str {
    PREDEFINED.iter().find(|(name, ..)| *name == id).map_or(id, |(_, id, _)| id)
}

/// A network, wherever this host knows it from.
enum Known {
    Predefined(usize),
    /// One of this host's own, that a user made.
    Local(Box<LocalNetwork>),
    /// From the managers' own tables.
    Stored(Arc<Network>),
    /// From what the managers told this worker.
    Told(OverlayNetwork),
}

impl Known {
    fn id(&self) -> String {
        match self {
            Self::Predefined(index) => PREDEFINED[*index].1.to_owned(),
            Self::Local(network) => network.id.clone(),
            Self::Stored(network) => network.id.to_string(),
            Self::Told(network) => network.id.to_string(),
        }
    }

    fn name(&self) -> &str {
        match self {
            Self::Predefined(index) => PREDEFINED[*index].0,
            Self::Local(network) => &network.name,
            Self::Stored(network) => &network.spec.name,
            Self::Told(network) => &network.name,
        }
    }

    const fn scope(&self) -> &'static str {
        match self {
            Self::Predefined(_) | Self::Local(_) => "local",
            Self::Stored(_) | Self::Told(_) => "swarm",
        }
    }

    fn driver(&self) -> &str {
        match self {
            Self::Predefined(index) => PREDEFINED[*index].2,
            Self::Local(network) => network.driver(),
            Self::Stored(network) => &network.spec.driver.name,
            Self::Told(_) => "overlay",
        }
    }

    fn labels(&self) -> BTreeMap<String, String> {
        match self {
            Self::Stored(network) => network.spec.labels.clone(),
            Self::Local(network) => network.labels.clone(),
            Self::Predefined(_) | Self::Told(_) => BTreeMap::new(),
        }
    }

    fn json(&self) -> Value {
        let mut value = json!({
            "Name": self.name(), "Id": self.id(), "Created": Timestamp::NEVER, "Scope": self.scope(),
            "Driver": self.driver(), "EnableIPv4": true, "EnableIPv6": false,
            "IPAM": {"Driver": "default", "Options": null, "Config": []}, "Internal": false, "Attachable": false,
            "Ingress": false, "ConfigFrom": {"Network": ""}, "ConfigOnly": false, "Containers": {}, "Options": {},
            "Labels": self.labels(),
        });
        let details = match self {
            Self::Predefined(_) => json!({}),
            Self::Local(network) => local_details(network),
            Self::Stored(network) => json!({
                "Created": network.meta.created_at, "IPAM": ipam_json(network), "Internal": network.spec.internal,
                "Attachable": network.spec.attachable, "Ingress": network.spec.ingress,
                "Options": network.spec.driver.options, "EnableIPv6": network.v6.is_some(),
            }),
            Self::Told(network) => {
                let v4 = json!({"Subnet": network.subnet, "Gateway": network.gateway});
                json!({
                    "IPAM": {"Driver": "default", "Options": null, "Config": with_ipv6(v4, network.v6)},
                    "Internal": network.internal, "Ingress": network.ingress, "EnableIPv6": network.v6.is_some(),
                })
            }
        };
        if let (Value::Object(value), Value::Object(details)) = (&mut value, details) {
            value.extend(details);
        }
        value
    }
}

fn local_details(network: &LocalNetwork) -> Value {
    let config = |subnet: Value, gateway: Value, range: Value, reserved: Value| {
        let mut config = json!({"Subnet": subnet, "Gateway": gateway});
        if !range.is_null() {
            config["IPRange"] = range;
        }
        if reserved.as_object().is_some_and(|reserved| !reserved.is_empty()) {
            config["AuxiliaryAddresses"] = reserved;
        }
        config
    };
    let v4 = network.v4.as_ref();
    let v4 = v4.map(|v4| config(json!(v4.subnet), json!(v4.gateway), json!(v4.range), json!(v4.reserved)));
    let v6 = network.v6.as_ref();
    let v6 = v6.map(|v6| {
        config(
            v6.subnet_as_written.as_ref().map_or_else(|| json!(v6.subnet), |text| json!(text)),
            json!(v6.gateway),
            json!(v6.range),
            json!(v6.reserved),
        )
    });
    let configs: Vec<Value> = v4.into_iter().chain(v6).collect();
    json!({"Created": network.created, "Internal": network.internal, "Attachable": network.attachable,
        "Options": network.options, "EnableIPv4": network.v4.is_some(), "EnableIPv6": network.v6.is_some(),
        "IPAM": {"Driver": "default", "Options": ipam_options(&network.ipam_options), "Config": configs}})
}

fn ipam_json(network: &Network) -> Value {
    let mut config = json!({"Subnet": network.subnet, "Gateway": network.gateway});
    if let Some(range) = network.spec.ipam.range {
        config["IPRange"] = json!(range);
    }
    if !network.spec.ipam.reserved.is_empty() {
        config["AuxiliaryAddresses"] = json!(network.spec.ipam.reserved);
    }
    let options = ipam_options(&network.spec.ipam.options);
    json!({"Driver": "default", "Options": options, "Config": with_ipv6(config, network.v6)})
}

fn ipam_options(options: &BTreeMap<String, String>) -> Value {
    if options.is_empty() { Value::Null } else { json!(options) }
}

pub(super) fn with_ipv6(v4: Value, side: Option<skep_api::Ipv6Side>) -> Vec<Value> {
    let v6 = side.map(|side| json!({"Subnet": side.subnet, "Gateway": side.gateway}));
    std::iter::once(v4).chain(v6).collect()
}

/// Everything this host knows; the swarm's networks as a linearizable read has them, on a manager.
async fn known(state: &State) -> Result<Vec<Known>, ApiError> {
    let mut known: Vec<Known> = (0..PREDEFINED.len()).map(Known::Predefined).collect();
    let made = state.engine.networks().into_iter().filter(|network| network.id != DEFAULT_NETWORK);
    known.extend(made.map(|network| Known::Local(Box::new(network))));
    match state.swarm.manager().await {
        Ok(manager) => known.extend(manager.read().await?.networks.iter().cloned().map(Known::Stored)),
        Err(_) => {
            if let Some(node) = state.swarm.active().await {
                known.extend(node.overlay().networks().into_iter().map(Known::Told));
            }
        }
    }
    Ok(known)
}

#[derive(Deserialize)]
pub(super) struct ListQuery {
    filters: Option<String>,
}

pub(super) async fn list(state: State, Query(query): Query<ListQuery>) -> Result<Json<Vec<Value>>, ApiError> {
    let names = ["driver", "id", "label", "name", "scope", "type", "dangling"];
    let filters = Filters::parse(query.filters.as_deref(), &names).map_err(ApiError::bad_request)?;
    let dangling = filters.flag("dangling").map_err(ApiError::bad_request)?;
    let unused = |network: &Known| match network {
        Known::Local(network) => state.engine.network_members(&network.id).is_empty(),
        Known::Predefined(_) | Known::Stored(_) | Known::Told(_) => false,
    };
    let matching = |network: &&Known| {
        let kind = if matches!(network, Known::Predefined(_)) { "builtin" } else { "custom" };
        filters.any("driver", |driver| driver == network.driver())
            && filters.any("id", |id| network.id().starts_with(id))
            && filters.any("name", |name| network.name().contains(name))
            && filters.any("scope", |scope| scope == network.scope())
            && filters.any("type", |wanted| wanted == kind)
            && filters.labels("label", &network.labels())
            && dangling.is_none_or(|dangling| unused(network) == dangling)
    };
    Ok(Json(known(&state).await?.iter().filter(matching).map(Known::json).collect()))
}

/// Finds a network by id, name, or the beginning of its id.
async fn find(state: &State, name: &str) -> Result<Known, ApiError> {
    let mut networks = known(state).await?;
    let position = networks
        .iter()
        .position(|network| network.id() == name)
        .or_else(|| networks.iter().position(|network| network.name() == name));
    if let Some(position) = position {
        return Ok(networks.swap_remove(position));
    }
    let mut matching: Vec<usize> = (0..networks.len()).filter(|&n| networks[n].id().starts_with(name)).collect();
    match (matching.pop(), matching.is_empty()) {
        (Some(position), true) => Ok(networks.swap_remove(position)),
        (None, _) => Err(ApiError::not_found(format!("network {name} not found"))),
        (Some(_), false) => Err(ApiError::bad_request(format!("network {name} is ambiguous: use more of its id"))),
    }
}

#[derive(Deserialize)]
pub(super) struct InspectQuery {
    #[serde(default)]
    verbose: String,
    #[serde(default)]
    scope: String,
}

pub(super) async fn inspect(
    state: State,
    Path(name): Path<String>,
    Query(query): Query<InspectQuery>,
) -> Result<Json<Value>, ApiError> {
    let network = find(&state, &name).await?;
    // What every host has, services may ask for: clients look for it among the swarm's.
    let fits = query.scope.is_empty() || query.scope == network.scope() || matches!(network, Known::Predefined(_));
    if !fits {
        return Err(ApiError::not_found(format!("network {name} not found in scope {}", query.scope)));
    }
    let mut value = network.json();
    let id = match &network {
        Known::Predefined(0) => {
            let bridge = state.engine.network(DEFAULT_NETWORK)?;
            if let (Value::Object(value), Value::Object(details)) = (&mut value, local_details(&bridge)) {
                value.extend(details);
            }
            value["Options"] = json!({"com.docker.network.bridge.default_bridge": "true",
                "com.docker.network.bridge.enable_icc": (!bridge.apart).to_string()});
            value["Containers"] = members(&state, DEFAULT_NETWORK);
            return Ok(Json(value));
        }
        Known::Predefined(_) => return Ok(Json(value)),
        Known::Local(network) => {
            value["Containers"] = members(&state, &network.id);
            return Ok(Json(value));
        }
        Known::Stored(network) => network.id,
        Known::Told(network) => network.id,
    };
    value["Containers"] = containers(&state, id);
    if let Ok(manager) = state.swarm.manager().await {
        let tables = manager.view();
        value["Peers"] = peers(&tables, id);
        if is_on(&query.verbose) {
            value["Services"] = services(&tables, id);
        }
    }
    Ok(Json(value))
}

/// The containers in a network of this host's.
fn members(state: &State, id: &str) -> Value {
    let network = state.engine.network(id).ok();
    let v4 = network.as_ref().and_then(|network| network.v4.as_ref()).map_or(32, |v4| v4.subnet.prefix_len());
    let v6 = network.and_then(|network| network.v6).map_or(128, |v6| v6.subnet.prefix_len());
    let member = |(id, name, endpoint): (String, String, Endpoint)| {
        let address = endpoint.address.map(|address| format!("{address}/{v4}")).unwrap_or_default();
        let endpoint_id = super::containers::endpoint_id(&id, &endpoint.network);
        let address_v6 = endpoint.address_v6.map(|address| format!("{address}/{v6}")).unwrap_or_default();
        let mac = endpoint.mac.map(|mac| mac.to_string()).unwrap_or_default();
        let value = json!({"Name": name, "EndpointID": endpoint_id, "MacAddress": mac, "IPv4Address": address,
            "IPv6Address": address_v6});
        (id, value)
    };
    Value::Object(state.engine.network_members(id).into_iter().map(member).collect())
}

/// This host's containers in a network of the swarm.
fn containers(state: &State, network: NetworkId) -> Value {
    let id = network.to_string();
    let kept = state.engine.kept_network(&id);
    let value = |container: &Inspection, address: Ipv4Addr| {
        let prefix_len = kept.as_ref().map_or(32, |kept| kept.subnet.prefix_len());
        let v6 = kept.as_ref().and_then(|kept| Some((kept.v6?, kept.subnet)));
        let v6 = v6.map(|(side, v4)| format!("{}/{}", side.address(v4, address), side.subnet.prefix_len()));
        json!({"Name": container.config.name, "EndpointID": super::containers::endpoint_id(&container.id, &id),
            "MacAddress": "", "IPv4Address": format!("{address}/{prefix_len}"), "IPv6Address": v6.unwrap_or_default()})
    };
    let mut found = serde_json::Map::new();
    for container in state.engine.list() {
        let running = matches!(container.state, ContainerState::Running(_));
        let planned = match &container.config.network {
            NetworkMode::Joined(joined) if running => joined.iter().find(|place| place.id == id),
            _ => None,
        };
        let held = container.state.endpoints().iter().find(|held| held.network == id).and_then(|held| held.address);
        if let Some(address) = held.or_else(|| planned.map(|place| place.address)) {
            found.insert(container.id.clone(), value(&container, address));
        }
    }
    Value::Object(found)
}

/// The nodes that have tasks or containers in the network.
fn peers(tables: &Tables, network: NetworkId) -> Value {
    let joined = |task: &&Arc<skep_api::Task>| {
        !task.status.state.is_terminal() && task.networks.iter().any(|place| place.network == network)
    };
    let attached = tables.attachments.iter().filter(|held| held.network == network).map(|held| held.node);
    let of_tasks = tables.tasks.iter().filter(joined).filter_map(|task| task.node_id);
    let nodes: std::collections::BTreeSet<_> = of_tasks.chain(attached).collect();
    let nodes = nodes.into_iter().filter_map(|id| tables.nodes.get(id));
    nodes.map(|node| json!({"Name": node.description.hostname, "IP": node.status.addr})).collect()
}

/// The services in the network, with their tasks.
fn services(tables: &Tables, network: NetworkId) -> Value {
    let mut found = serde_json::Map::new();
    for service in tables.services.iter().filter(|service| !service.removed) {
        let vip = service.endpoint.virtual_ips.iter().find(|vip| vip.network == network);
        let tasks: Vec<Value> = tables
            .tasks_of_service(service.id)
            .filter(|task| !task.status.state.is_terminal())
            .filter_map(|task| {
                let place = task.networks.iter().find(|place| place.network == network)?;
                let host = task.node_id.and_then(|id| tables.nodes.get(id)).map(|node| node.status.addr.clone());
                Some(json!({"Name": task.name(), "EndpointID": task.id, "EndpointIP": place.address,
                    "Info": {"Host IP": host}, "State": task.status.state}))
            })
            .collect();
        if vip.is_some() || !tasks.is_empty() {
            let ports: Vec<String> = service
                .endpoint
                .ports
                .iter()
                .map(|port| format!("Target: {}, Publish: {}", port.target_port, port.published_port))
                .collect();
            let value = json!({"VIP": vip.map(|vip| vip.address), "Ports": ports, "LocalLBIndex": 0, "Tasks": tasks});
            found.insert(service.spec.name.clone(), value);
        }
    }
    Value::Object(found)
}

pub(super) async fn remove(state: State, Path(name): Path<String>) -> Result<StatusCode, ApiError> {
    let id = match find(&state, &name).await? {
        Known::Predefined(_) => {
            return Err(ApiError::forbidden(format!("{name} is a pre-defined network and cannot be removed")));
        }
        Known::Local(network) => {
            state.engine.remove_network(&network.id).await?;
            return Ok(StatusCode::NO_CONTENT);
        }
        Known::Stored(network) => network.id,
        Known::Told(network) => network.id,
    };
    // Clients remove a stack's services and then its networks, without waiting for the tasks' ends.
    let deadline = tokio::time::Instant::now() + SETTLING_LIMIT;
    loop {
        match state.swarm.manager().await?.execute(Command::RemoveNetwork { id }).await {
            Err(error) if error.reason == Reason::Settling && tokio::time::Instant::now() < deadline => {
                tokio::time::sleep(SETTLING_PAUSE).await;
            }
            other => {
                other?;
                return Ok(StatusCode::NO_CONTENT);
            }
        }
    }
}

/// Removes the networks that nobody uses.
pub(super) async fn prune(state: State, Query(query): Query<ListQuery>) -> Result<Json<Value>, ApiError> {
    let filters =
        Filters::parse(query.filters.as_deref(), &["label", "label!", "until"]).map_err(ApiError::bad_request)?;
    let until = filters.until().map_err(ApiError::bad_request)?;
    let mut deleted = Vec::new();
    for network in state.engine.networks() {
        let wanted = network.id != DEFAULT_NETWORK
            && filters.labels("label", &network.labels)
            && !filters.any_label("label!", &network.labels)
            && until.is_none_or(|until| network.created < until);
        // One that is in use stays.
        if wanted && state.engine.remove_network(&network.id).await.is_ok() {
            deleted.push(network.name);
        }
    }
    if let Ok(manager) = state.swarm.manager().await {
        let networks: Vec<_> = manager.read().await?.networks.iter().cloned().collect();
        for network in networks {
            let spared = network.spec.ingress || !filters.labels("label", &network.spec.labels);
            // One that is in use stays, as the manager decides.
            if !spared && manager.execute(Command::RemoveNetwork { id: network.id }).await.is_ok() {
                deleted.push(network.spec.name.clone());
            }
        }
    }
    Ok(Json(json!({"NetworksDeleted": or_null(deleted)})))
}
