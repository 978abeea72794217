//! Single containers that join and leave networks: this host's, and the swarm's that are attachable.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, Ipv6Addr};

use axum::extract::Path;
use serde::Deserialize;
use skep_engine::{DEFAULT_NETWORK, EngineError, LocalNetwork, MacAddress, NetworkRef, WantedPlace};

use super::{Known, find};
use crate::http::{
    ApiError, State,
    json::{JsonBody, parse},
};

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
    pub(in crate::http) mac_address: String,
    driver_opts: BTreeMap<String, String>,
    gw_priority: i64,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct EndpointIpamBody {
    #[serde(rename = "IPv4Address")]
    ipv4_address: String,
    #[serde(rename = "IPv6Address")]
    ipv6_address: String,
    #[serde(rename = "LinkLocalIPs")]
    link_local: Vec<String>,
}

/// A network that a single container may join.
pub(in crate::http) enum Joinable {
    Local(Box<LocalNetwork>),
    /// The swarm's; whether it is there and attachable, a manager says where it is not known here.
    Swarm(NetworkRef),
}

impl Joinable {
    /// What places name it by.
    pub(in crate::http) fn id(&self) -> &str {
        match self {
            Self::Local(network) => &network.id,
            Self::Swarm(network) => &network.id,
        }
    }

    fn reference(&self) -> NetworkRef {
        match self {
            Self::Local(network) => {
                NetworkRef { id: network.id.clone(), name: network.name.clone(), kind: network.driver() }
            }
            Self::Swarm(network) => network.clone(),
        }
    }

    /// Reads `NAME[:ALIAS]`: what a container calls others in the network, and their names there.
    pub(in crate::http) fn links(&self, texts: &[String]) -> Result<BTreeMap<String, String>, ApiError> {
        if !texts.is_empty() && matches!(self, Self::Swarm(_)) {
            return Err(ApiError::unsupported(
                "links in networks of the swarm are not supported: use names and aliases",
            ));
        }
        let link = |text: &String| {
            let (name, alias) = skep_engine::link_parts(text)?;
            Ok((alias.to_owned(), name.to_owned()))
        };
        texts.iter().map(link).collect()
    }

    /// Any place in it.
    pub(in crate::http) fn any_place(&self) -> WantedPlace {
        let kept = matches!(self, Self::Swarm(_));
        WantedPlace { network: self.id().to_owned(), kept, ..WantedPlace::default() }
    }
}

impl EndpointBody {
    pub(in crate::http) fn refuse_aliases(&self) -> Result<(), ApiError> {
        if self.aliases.is_empty() {
            return Ok(());
        }
        Err(ApiError::bad_request("network-scoped alias is supported only for containers in user defined networks"))
    }

    /// The place in `network` that is asked for.
    pub(in crate::http) fn place(&self, network: &Joinable) -> Result<WantedPlace, ApiError> {
        let text = &self.ipam_config.ipv4_address;
        let address = (!text.is_empty())
            .then(|| text.parse().map_err(|_| ApiError::bad_request(format!("invalid IPv4 address: {text:?}"))))
            .transpose()?;
        let text = &self.ipam_config.ipv6_address;
        let address_v6 = (!text.is_empty())
            .then(|| {
                let address = text.parse().ok().filter(|address: &Ipv6Addr| address.to_ipv4_mapped().is_none());
                address.ok_or_else(|| ApiError::bad_request(format!("invalid IPv6 address: {text:?}")))
            })
            .transpose()?;
        if address_v6.is_some() && matches!(network, Joinable::Swarm(_)) {
            return Err(ApiError::bad_request(
                "IPv6 addresses in networks of the swarm follow from IPv4 ones: ask for one of those (--ip), the same \
                 number behind the IPv6 subnet goes with it",
            ));
        }
        let asks = address.is_some() || address_v6.is_some();
        if network.id() == DEFAULT_NETWORK && asks {
            return Err(ApiError::bad_request("user specified IP address is supported on user defined networks only"));
        }
        if network.id() == DEFAULT_NETWORK {
            self.refuse_aliases()?;
        }
        let mac = mac_address(&self.mac_address)?;
        if mac.is_some() && matches!(network, Joinable::Swarm(_)) {
            return Err(ApiError::unsupported("MAC addresses in networks of the swarm are not supported yet"));
        }
        if self.gw_priority != 0 && matches!(network, Joinable::Swarm(_)) {
            return Err(ApiError::unsupported(
                "priorities of gateways in networks of the swarm are not supported: what goes out of them has its own way",
            ));
        }
        let link_local = self.ipam_config.link_local.iter().map(|text| link_local(text)).collect::<Result<_, _>>()?;
        let driver_options = self.driver_opts.clone();
        let (aliases, links) = (self.aliases.clone(), network.links(&self.links)?);
        Ok(WantedPlace {
            aliases,
            links,
            address,
            address_v6,
            mac,
            link_local,
            driver_options,
            gateway_priority: self.gw_priority,
            ..network.any_place()
        })
    }
}

/// Reads a link's address; none if nothing is said.
pub(in crate::http) fn mac_address(text: &str) -> Result<Option<MacAddress>, ApiError> {
    if text.is_empty() { Ok(None) } else { text.parse().map(Some).map_err(ApiError::bad_request) }
}

fn link_local(text: &str) -> Result<Ipv4Addr, ApiError> {
    let address: Option<Ipv4Addr> = text.parse().ok();
    address.filter(Ipv4Addr::is_link_local).ok_or_else(|| {
        ApiError::bad_request(format!("invalid link-local address {text:?}: it is an IPv4 address of 169.254.0.0/16"))
    })
}

/// A network that a single container may join.
pub(in crate::http) async fn joinable(state: &State, name: &str) -> Result<Joinable, ApiError> {
    let of_swarm = |id: String, name: &str| Joinable::Swarm(NetworkRef { id, name: name.to_owned(), kind: "overlay" });
    match find(state, name).await {
        Ok(Known::Local(network)) => Ok(Joinable::Local(network)),
        Ok(Known::Predefined(0)) => Ok(Joinable::Local(state.engine.network(DEFAULT_NETWORK)?.into())),
        Ok(Known::Predefined(1)) => Err(ApiError::bad_request(
            "container cannot be disconnected from host network or connected to host network: run it with \
             --network=host, or another",
        )),
        Ok(Known::Predefined(_)) => Err(ApiError::bad_request(
            "container cannot be connected to multiple networks with one of the networks in private (none) mode",
        )),
        Ok(Known::Stored(network)) if !network.spec.attachable => Err(ApiError::forbidden(format!(
            "could not attach to network {name}: it is not manually attachable; make it with --attachable, or run a \
             service in it"
        ))),
        Ok(Known::Stored(network)) => Ok(of_swarm(network.id.to_string(), &network.spec.name)),
        Ok(Known::Told(network)) => Ok(of_swarm(network.id.to_string(), &network.name)),
        // A worker knows only the networks that it takes part in; its managers are asked at the start.
        Err(error) => match (state.swarm.active().await, state.swarm.manager().await) {
            (Some(_), Err(_)) if error.is_not_found() => Ok(of_swarm(name.to_owned(), name)),
            _ => Err(error),
        },
    }
}

pub(in crate::http) async fn connect(state: State, Path(name): Path<String>, body: JsonBody) -> Result<(), ApiError> {
    let body: ConnectBody = parse(&body)?;
    if super::predefined_name(&name).is_some() {
        body.endpoint_config.refuse_aliases()?;
    }
    let network = joinable(&state, &name).await?;
    let place = body.endpoint_config.place(&network)?;
    state.engine.connect_network(&network.reference(), &body.container, place).await?;
    Ok(())
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct DisconnectBody {
    container: String,
    force: bool,
}

pub(in crate::http) async fn disconnect(
    state: State,
    Path(name): Path<String>,
    body: JsonBody,
) -> Result<(), ApiError> {
    let body: DisconnectBody = parse(&body)?;
    let (network, unknown) = match joinable(&state, &name).await {
        Ok(network) => (network.reference(), None),
        // Such as one of a swarm that this host has left: its containers may still name it.
        Err(error) if error.is_not_found() => (NetworkRef { id: name.clone(), name, kind: "overlay" }, Some(error)),
        Err(error) => return Err(error),
    };
    match (state.engine.disconnect_network(&network, &body.container).await, unknown) {
        (Err(EngineError::NoContainer(_)), _) if body.force => Ok(()),
        (Err(EngineError::Forbidden(_)), Some(unknown)) => Err(unknown),
        (other, _) => Ok(other?),
    }
}
