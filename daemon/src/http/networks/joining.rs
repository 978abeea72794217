//! Single containers that join and leave networks of this host.

use axum::body::Bytes;
use axum::extract::Path;
use serde::Deserialize;
use skep_engine::{DEFAULT_NETWORK, EngineError, LocalNetwork, LocalPlace};

use super::{Known, find};
use crate::http::{ApiError, State, json::parse};

#[derive(Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct ConnectBody {
    container: String,
    endpoint_config: EndpointBody,
}

/// What a container asks of its place in a network.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub(in crate::http) struct EndpointBody {
    #[serde(rename = "IPAMConfig")]
    ipam_config: EndpointIpamBody,
    aliases: Vec<String>,
    links: Vec<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct EndpointIpamBody {
    #[serde(rename = "IPv4Address")]
    ipv4_address: String,
    #[serde(rename = "IPv6Address")]
    ipv6_address: String,
}

impl EndpointBody {
    /// The place in `network`, which is known by its id.
    pub(in crate::http) fn place(&self, network: &LocalNetwork) -> Result<LocalPlace, ApiError> {
        if !self.links.is_empty() {
            return Err(ApiError::unsupported("links are not supported: use names and aliases"));
        }
        if !self.ipam_config.ipv6_address.is_empty() {
            return Err(ApiError::unsupported("IPv6 addresses in bridge networks are not supported yet"));
        }
        let text = &self.ipam_config.ipv4_address;
        let address = (!text.is_empty())
            .then(|| text.parse().map_err(|_| ApiError::bad_request(format!("invalid IPv4 address: {text:?}"))))
            .transpose()?;
        let named = network.id != DEFAULT_NETWORK;
        if !named && (address.is_some() || !self.aliases.is_empty()) {
            return Err(ApiError::bad_request(
                "user specified IP address and network-scoped aliases are supported on user-defined networks only",
            ));
        }
        Ok(LocalPlace { network: network.id.clone(), aliases: self.aliases.clone(), address })
    }
}

/// A network of this host's that a single container may join.
pub(in crate::http) async fn joinable(state: &State, name: &str) -> Result<LocalNetwork, ApiError> {
    match find(state, name).await? {
        Known::Local(network) => Ok(network),
        Known::Predefined(0) => Ok(state.engine.network(DEFAULT_NETWORK)?),
        Known::Predefined(_) => Err(ApiError::forbidden(format!(
            "container cannot be connected to network {name}: it is had from the start or not at all"
        ))),
        Known::Stored(_) | Known::Told(_) => Err(ApiError::unsupported(format!(
            "network {name} is the swarm's: joining single containers to it is not supported yet; use a service"
        ))),
    }
}

pub(in crate::http) async fn connect(state: State, Path(name): Path<String>, body: Bytes) -> Result<(), ApiError> {
    let body: ConnectBody = parse(&body)?;
    let network = joinable(&state, &name).await?;
    let place = body.endpoint_config.place(&network)?;
    state.engine.connect_network(&network.id, &body.container, place).await?;
    Ok(())
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct DisconnectBody {
    container: String,
    force: bool,
}

pub(in crate::http) async fn disconnect(state: State, Path(name): Path<String>, body: Bytes) -> Result<(), ApiError> {
    let body: DisconnectBody = parse(&body)?;
    let network = joinable(&state, &name).await?;
    match state.engine.disconnect_network(&network.id, &body.container).await {
        Err(EngineError::NoContainer(_) | EngineError::Forbidden(_)) if body.force => Ok(()),
        other => Ok(other?),
    }
}
