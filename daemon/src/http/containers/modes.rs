//! Whose namespaces a container is in.

use std::path::Path;

use skep_engine::{DEFAULT_NETWORK, NamespaceMode, NetworkMode, SharedMemory};

use super::create::CreateBody;
use crate::http::networks::joining::{joinable, mac_address};
use crate::http::networks::predefined_name;
use crate::http::{ApiError, State};

/// All of them, as a request says.
pub(super) struct Modes {
    pub(super) network: NetworkMode,
    pub(super) pid: NamespaceMode,
    pub(super) ipc: NamespaceMode,
    pub(super) shared_memory: SharedMemory,
    pub(super) uts: NamespaceMode,
}

impl Modes {
    pub(super) async fn read(state: &State, body: &CreateBody) -> Result<Self, ApiError> {
        let (engine, host) = (&state.engine, &body.host_config);
        // One that is not there yet may be when this one is started.
        let peer = |name: &str| engine.inspect(name).map_or_else(|_| name.to_owned(), |peer| peer.id);
        let mode = |flag: &str, text: &str| match text {
            "" | "private" | "shareable" | "none" => Ok(NamespaceMode::Private),
            "host" => Ok(NamespaceMode::Host),
            other => match other.strip_prefix("container:") {
                Some(name) if !name.is_empty() => Ok(NamespaceMode::Container(peer(name))),
                _ => Err(ApiError::bad_request(format!("invalid {flag} mode: {other}"))),
            },
        };
        let shared = host.network_mode.starts_with("container:");
        let endpoints = body.networking_config.endpoints_config.iter();
        let without_names = |(name, _): &(&String, _)| shared || predefined_name(name).is_some();
        endpoints.filter(without_names).try_for_each(|(_, endpoint)| endpoint.refuse_aliases())?;
        let network = match host.network_mode.as_str() {
            "host" => NetworkMode::Host,
            "none" => NetworkMode::None,
            other => match other.strip_prefix("container:") {
                Some("") => return Err(ApiError::bad_request("invalid network mode: container: names no container")),
                Some(name) => NetworkMode::Container(peer(name)),
                None => local_networks(state, other, body).await?,
            },
        };
        Ok(Self {
            network,
            pid: mode("PID", &host.pid_mode)?,
            ipc: mode("IPC", &host.ipc_mode)?,
            shared_memory: match host.ipc_mode.as_str() {
                "shareable" => SharedMemory::Shareable,
                "" if state.config.containers.shares_memory => SharedMemory::Shareable,
                "none" => SharedMemory::None,
                _ => SharedMemory::Private,
            },
            uts: mode("UTS", &host.uts_mode)?,
        })
    }
}

/// Places in networks: in the one that is named first, where `mac` is meant for, then in all that are
/// described.
async fn local_networks(state: &State, mode: &str, body: &CreateBody) -> Result<NetworkMode, ApiError> {
    let (described, mac) = (&body.networking_config, &body.mac_address);
    let mode = if matches!(mode, "" | "default") { DEFAULT_NETWORK } else { mode };
    let first = joinable(state, mode).await?;
    let mut places = vec![first.any_place()];
    for (name, endpoint) in &described.endpoints_config {
        // As the client has it for the default one.
        let name = if name == "default" { mode } else { name };
        let network = joinable(state, name).await?;
        let place = endpoint.place(&network)?;
        match places.iter_mut().find(|other| other.network == network.id()) {
            Some(other) => *other = place,
            None => places.push(place),
        }
    }
    if first.id() != DEFAULT_NETWORK && places[0].links.is_empty() {
        places[0].links = first.links(&body.host_config.links)?;
    }
    if let Some(mac) = mac_address(mac)? {
        places[0].mac.get_or_insert(mac);
    }
    Ok(if places == [first.any_place()] && first.id() == DEFAULT_NETWORK {
        NetworkMode::Bridge
    } else {
        NetworkMode::Local(places)
    })
}

/// Privileged containers see all cgroups where these are of version 1, as programs in them that run containers expect.
pub(super) fn cgroup_mode(text: &str, privileged: bool, sees_cgroups: bool) -> Result<NamespaceMode, ApiError> {
    match text {
        "" if privileged && !Path::new("/sys/fs/cgroup/cgroup.controllers").exists() => Ok(NamespaceMode::Host),
        "" if sees_cgroups => Ok(NamespaceMode::Host),
        "" | "private" => Ok(NamespaceMode::Private),
        "host" => Ok(NamespaceMode::Host),
        other => Err(ApiError::bad_request(format!("invalid cgroup namespace mode: {other}: use private or host"))),
    }
}
