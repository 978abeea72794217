//! The host's networks for its users, and containers that join and leave them while they run.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;
use std::time::Duration;

use skep_api::{Subnet, with_causes};

use super::pools::free_subnet;
use super::{Container, Engine, EngineError, disk_error, now};
use crate::container::config::{ContainerConfig, NetworkMode};
use crate::container::id_map::Shift;
use crate::container::state::ContainerState;
use crate::network::parent::{Mode, ModeError, is_link};
use crate::network::{
    DEFAULT_NETWORK, Endpoint, GATEWAY_MODE, GATEWAY_MODE_V6, GatewayMode, HOST_BINDING, HOST_SOURCE, HOST_SOURCE_V6,
    Ipv4Side, Ipv6Side, LocalNetwork, MTU, Member, Parent, WantedPlace,
};

/// A network to make.
#[derive(Clone, Debug, Default)]
pub struct LocalNetworkSpec {
    pub name: String,
    pub labels: BTreeMap<String, String>,
    pub options: BTreeMap<String, String>,
    pub ipam_options: BTreeMap<String, String>,
    pub attachable: bool,
    /// Whether it has no IPv4 addresses, whatever is said of them.
    pub ipv6_alone: bool,
    /// One that is free if absent.
    pub subnet: Option<Subnet>,
    pub range: Option<Subnet>,
    pub gateway: Option<Ipv4Addr>,
    pub reserved: BTreeMap<String, Ipv4Addr>,
    pub internal: bool,
    pub v6: Option<Ipv6Side>,
    /// Whether it stands on a link of the host's (macvlan) rather than on a bridge of its own.
    pub on_parent: bool,
}

/// Options of the macvlan driver.
const PARENT: &str = "parent";
const PARENT_MODE: &str = "macvlan_mode";

/// Options of the bridge driver that are known.
const DEVICE: &str = "com.docker.network.bridge.name";
const MASQUERADE: &str = "com.docker.network.bridge.enable_ip_masquerade";
/// Whether neighbours reach each other.
const NEIGHBOURS: &str = "com.docker.network.bridge.enable_icc";
/// What clients say that asks for nothing.
const DEFAULT_BRIDGE: &str = "com.docker.network.bridge.default_bridge";

/// As Docker has it.
const V6_LEN_MAX: u8 = 120;
/// How long a container that has ended may take to be taken down.
const TAKEN_DOWN_LIMIT: Duration = Duration::from_secs(5);

impl Engine {
    /// The host's networks, by id; the default one is `bridge`.
    #[must_use]
    pub fn networks(&self) -> Vec<LocalNetwork> {
        self.networks.list()
    }

    /// Finds a network of the host's by id, name, or the beginning of its id.
    pub fn network(&self, name: &str) -> Result<LocalNetwork, EngineError> {
        let all = self.networks.list();
        let exact = all.iter().find(|network| network.id == name || network.name == name);
        let found = exact.cloned().or_else(|| {
            let mut matching = all.iter().filter(|network| !name.is_empty() && network.id.starts_with(name));
            matching.next().filter(|_| matching.next().is_none()).cloned()
        });
        found.ok_or_else(|| EngineError::NoNetwork(name.to_owned()))
    }

    /// Makes a network of this host's.
    pub fn create_network(&self, spec: LocalNetworkSpec) -> Result<String, EngineError> {
        let all = self.networks.list();
        if all.iter().any(|network| network.name == spec.name)
            || matches!(spec.name.as_str(), "host" | "none" | "default")
        {
            return Err(EngineError::Conflict(format!("network with name {} already exists", spec.name)));
        }
        let subnet = match spec.subnet {
            _ if spec.ipv6_alone => None,
            Some(subnet) => Some(subnet),
            None => Some(free_subnet(&all, &self.config.pools).ok_or_else(|| {
                EngineError::Conflict(
                    "could not find an available address pool among the defaults: give --subnet".into(),
                )
            })?),
        };
        let overlapping = |subnet: &Subnet| {
            let others = all.iter().filter_map(|other| Some((other, other.v4.as_ref()?.subnet)));
            others.into_iter().find(|(_, other)| other.overlaps(*subnet)).map(|found| (*subnet, found))
        };
        if let Some((subnet, (other, its))) = subnet.as_ref().and_then(overlapping) {
            return Err(EngineError::Forbidden(format!(
                "Pool overlaps with other one on this address space: {subnet} with network {}, which is {its}",
                other.name
            )));
        }
        let v6_of = |network: &LocalNetwork| network.v6.as_ref().map(|v6| v6.subnet);
        if let Some(v6) = &spec.v6
            && let Some(other) = all.iter().find(|other| v6_of(other).is_some_and(|other| other.overlaps(v6.subnet)))
        {
            return Err(EngineError::Forbidden(format!(
                "Pool overlaps with other one on this address space: {} with network {}",
                v6.subnet, other.name
            )));
        }
        let network = network_of(spec, subnet)?;
        let parent = network.parent.as_ref().map(|parent| &parent.link);
        if let Some(other) = all.iter().find(|other| parent.is_some_and(|link| other.stands_on(link))) {
            return Err(EngineError::Forbidden(format!(
                "network {} is already using parent interface {}",
                other.name,
                parent.map_or("", String::as_str)
            )));
        }
        let id = network.id.clone();
        self.tell_network("create", &network);
        self.networks.add(network).map_err(disk_error("keeping the network"))?;
        Ok(id)
    }

    fn tell_network(&self, action: &str, network: &LocalNetwork) {
        let attributes = [("name", network.name.as_str()), ("type", network.driver())];
        let attributes = attributes.map(|(key, value)| (key.to_owned(), value.to_owned())).into();
        self.tell("network", action, &network.id, attributes);
    }

    /// The containers that run in a network, with their places.
    #[must_use]
    pub fn network_members(&self, id: &str) -> Vec<(String, String, Endpoint)> {
        let containers = self.lock();
        let mut members = Vec::new();
        for container in containers.values() {
            if let ContainerState::Running(running) = &*container.state.borrow() {
                let endpoint = running.endpoints.iter().find(|endpoint| endpoint.network == id);
                members.extend(endpoint.map(|e| (container.id.clone(), container.name(), e.clone())));
            }
        }
        members
    }

    /// Waits for members of a network that have ended but are still being taken down: who saw the end of one's output may
    /// go on to remove its network.
    async fn await_ended(&self, network: &str) {
        for (id, ..) in self.network_members(network) {
            let Ok(container) = self.find(&id) else { continue };
            if container.is_alive() {
                continue;
            }
            let mut state = container.state.subscribe();
            let down = state.wait_for(|state| !matches!(state, ContainerState::Running(_)));
            // What then still holds it is told.
            drop(tokio::time::timeout(TAKEN_DOWN_LIMIT, down).await);
        }
    }

    /// Removes a network that nobody is in.
    pub async fn remove_network(&self, name: &str) -> Result<(), EngineError> {
        let network = self.network(name)?;
        if network.id == DEFAULT_NETWORK {
            return Err(EngineError::Forbidden(format!("{name} is a pre-defined network and cannot be removed")));
        }
        self.await_ended(&network.id).await;
        if let Some((_, container, _)) = self.network_members(&network.id).first() {
            return Err(EngineError::Forbidden(format!(
                "error while removing network: network {} has active endpoints: disconnect {container} first",
                network.name
            )));
        }
        self.networks.remove(&network).await.map_err(disk_error(format!("removing network {name}")))?;
        self.tell_network("destroy", &network);
        Ok(())
    }

    /// Gives a container a place in one more network; at once if it runs.
    pub async fn connect_network(
        &self,
        network: &NetworkRef,
        container: &str,
        place: WantedPlace,
    ) -> Result<(), EngineError> {
        let container = self.find(container)?;
        let _one = container.operation.lock().await;
        let config = container.config();
        let mut places = places(&config.network).ok_or_else(|| {
            let rule = match &config.network {
                NetworkMode::None => {
                    "container cannot be connected to multiple networks with one of the networks in private (none) mode"
                }
                _ => {
                    "container sharing network namespace with another container or host cannot be connected to any \
                     other network"
                }
            };
            EngineError::Conflict(format!("{rule}: {} has the network {}", config.name, config.network.name()))
        })?;
        let at = places.iter().position(|other| network.is(&other.network));
        if at.is_some() && container.require_running().is_ok() {
            return Err(EngineError::Forbidden(format!(
                "endpoint with name {} already exists in network {}: the container is already attached to network {}",
                config.name, network.name, network.name
            )));
        }
        if container.require_running().is_ok() {
            let member = member(&container, &config);
            let doing = |error: std::io::Error| {
                EngineError::Conflict(format!(
                    "container {} cannot join network {}: {}",
                    config.name,
                    network.name,
                    with_causes(&error)
                ))
            };
            self.networks.set_links(&container.id, &[&places[..], std::slice::from_ref(&place)].concat());
            let endpoint = self.take_place(&member, &place).await.map_err(doing)?;
            container.change_endpoints(|endpoints| endpoints.push(endpoint));
            if let Err(error) = self.settle_kept(&container, &member).await {
                self.give_up_place(&container, network).await;
                return Err(doing(error));
            }
        }
        match at {
            Some(at) => places[at] = place,
            None => places.push(place),
        }
        self.keep_places(&container, places)?;
        self.tell_place("connect", network, &container.id);
        Ok(())
    }

    async fn take_place(&self, member: &Member<'_>, place: &WantedPlace) -> std::io::Result<Endpoint> {
        if !place.kept {
            return self.networks.join(member, place).await;
        }
        let granted = self.ask_keeper(member, std::slice::from_ref(place)).await?;
        let endpoint = granted.into_iter().next().ok_or_else(|| std::io::Error::other("no place was given"))?;
        Ok(self.networks.make_room(member.id, endpoint))
    }

    /// Takes back a place whose making failed; what fails as well is told and goes on.
    async fn give_up_place(&self, container: &Container, network: &NetworkRef) {
        if let Err(error) = self.leave_place(container, network).await {
            tracing::warn!(container = %container.id, network = network.name, %error, "a place was not taken back");
        }
    }

    /// Takes a container out of a network; at once if it runs.
    pub async fn disconnect_network(&self, network: &NetworkRef, container: &str) -> Result<(), EngineError> {
        let container = self.find(container)?;
        let _one = container.operation.lock().await;
        let config = container.config();
        let not_in = || {
            EngineError::Forbidden(format!("container {} is not connected to network {}", config.name, network.name))
        };
        let mut places = places(&config.network).ok_or_else(not_in)?;
        let at = places.iter().position(|place| network.is(&place.network)).ok_or_else(not_in)?;
        places.remove(at);
        if container.require_running().is_ok() {
            let doing = || disk_error(format!("taking container {} off network {}", config.name, network.name));
            self.leave_place(&container, network).await.map_err(doing())?;
            self.settle_kept(&container, &member(&container, &config)).await.map_err(doing())?;
        }
        self.keep_places(&container, places)?;
        self.tell_place("disconnect", network, &container.id);
        Ok(())
    }

    async fn leave_place(&self, container: &Container, network: &NetworkRef) -> std::io::Result<()> {
        let endpoints = container.endpoints();
        let endpoint = endpoints.iter().find(|endpoint| network.is(&endpoint.network));
        // Where this host has left its swarm, nobody keeps the network any more.
        if let (Some(kept), Some(keeper)) = (endpoint.filter(|held| held.grant.is_some()), self.networks.keeper()) {
            keeper.part(&container.id, &kept.network).await?;
        }
        self.networks.part(&container.id, endpoint.map_or(&network.id, |endpoint| &endpoint.network)).await?;
        container.change_endpoints(|endpoints| endpoints.retain(|endpoint| !network.is(&endpoint.network)));
        Ok(())
    }

    /// Brings whoever keeps networks of a running container in line with the places that it has now.
    pub(super) async fn settle_kept(&self, container: &Container, member: &Member<'_>) -> std::io::Result<()> {
        let ContainerState::Running(running) = container.state.borrow().clone() else { return Ok(()) };
        let through = self.join_kept(member, &running.endpoints, &running.ports).await?;
        container.state.send_modify(|state| {
            if let ContainerState::Running(running) = state {
                running.through = through;
            }
        });
        Ok(())
    }

    /// Calls a running container by its new name in the networks that somebody else keeps.
    pub(super) async fn rename_kept(&self, container: &Container, old: &str) {
        if container.endpoints().iter().all(|endpoint| endpoint.grant.is_none()) {
            return;
        }
        let config = container.config();
        container.change_endpoints(|endpoints| {
            for name in endpoints.iter_mut().flat_map(|endpoint| &mut endpoint.names).filter(|name| *name == old) {
                name.clone_from(&config.name);
            }
        });
        if let Err(error) = self.settle_kept(container, &member(container, &config)).await {
            tracing::warn!(container = %container.id, %error, "a container keeps its old name in networks of the swarm");
        }
    }

    /// Tells that a container that starts, or has ended, came to its networks of this host's, or left them.
    pub(super) fn tell_places(&self, action: &str, container: &Container) {
        for place in places(&container.config().network).unwrap_or_default() {
            if let Some(network) = self.networks.get(&place.network) {
                let (id, kind) = (network.id.clone(), network.driver());
                self.tell_place(action, &NetworkRef { id, name: network.name.clone(), kind }, &container.id);
            }
        }
    }

    fn tell_place(&self, action: &str, network: &NetworkRef, container: &str) {
        let attributes = [("name", network.name.as_str()), ("type", network.kind), ("container", container)];
        let attributes = attributes.map(|(key, value)| (key.to_owned(), value.to_owned())).into();
        self.tell("network", action, &network.id, attributes);
    }

    /// Where a container reaches its host: `through` the way out of the networks that others keep, by its first
    /// network's gateway, or else by the default one's.
    pub(super) fn host_gateway(&self, config: &ContainerConfig, through: Option<Ipv4Addr>) -> Vec<IpAddr> {
        if !self.config.host_gateways.is_empty() {
            return self.config.host_gateways.clone();
        }
        if config.network == NetworkMode::Host {
            return vec![Ipv4Addr::LOCALHOST.into()];
        }
        let places = places(&config.network).unwrap_or_default();
        let first = places.first().and_then(|place| self.networks.get(&place.network));
        let bridge = first.filter(|network| !network.internal && network.parent.is_none());
        let bridge = bridge.and_then(|network| network.host_address());
        vec![through.map(IpAddr::from).or(bridge).unwrap_or_else(|| self.bridge_gateway())]
    }

    /// Where containers of the default bridge reach their host.
    #[must_use]
    pub fn bridge_gateway(&self) -> IpAddr {
        self.config.host_gateways.first().copied().unwrap_or_else(|| self.config.bridge.gateway.into())
    }

    /// Whether ports of containers in a network are the host's by IPv4, or by IPv6; those that are not this host's are.
    #[must_use]
    pub fn leads_ports(&self, id: &str, v6: bool) -> bool {
        self.networks.get(id).is_none_or(|network| network.leads_ports(v6))
    }

    /// Whether what comes by IPv6 to ports of containers without it goes on by IPv4.
    #[must_use]
    pub fn passes_on_ipv6(&self) -> bool {
        self.config.userland_proxy && skep_host_net::has_ipv6()
    }

    /// The host's address that a container's ports are published on unless another is named.
    #[must_use]
    pub fn host_binding(&self, mode: &NetworkMode) -> Option<IpAddr> {
        let places = places(mode).unwrap_or_default();
        let network = places.first().and_then(|place| self.networks.get(&place.network));
        let address = network.and_then(|network| network.host_binding());
        address.filter(|address| !address.is_unspecified()).map(IpAddr::from)
    }

    pub(super) fn keep_places(&self, container: &Arc<Container>, places: Vec<WantedPlace>) -> Result<(), EngineError> {
        container.change(|config| config.network = NetworkMode::Local(places))?;
        if let Some(endpoint) = container.endpoints().first() {
            let doing = disk_error(format!("writing the hosts of container {}", container.id));
            let config = container.config();
            let host = self.host_gateway(&config, None);
            container.dirs.write_etc(&config, &endpoint.addresses(), &host).map_err(doing)?;
        }
        Ok(())
    }
}

/// A network, as its users name it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetworkRef {
    pub id: String,
    pub name: String,
    /// Its driver.
    pub kind: &'static str,
}

impl NetworkRef {
    /// Whether a place names this network.
    fn is(&self, network: &str) -> bool {
        network == self.id || network == self.name
    }
}

impl Container {
    /// Its places, if it runs.
    fn endpoints(&self) -> Vec<Endpoint> {
        self.state.borrow().endpoints().to_vec()
    }

    /// Where a container that runs is in a network; none if it is not there.
    pub(super) fn address_in(&self, network: &str) -> Option<Ipv4Addr> {
        self.endpoints().iter().find(|endpoint| endpoint.network == network).and_then(|endpoint| endpoint.address)
    }

    pub(super) fn change_endpoints(&self, change: impl FnOnce(&mut Vec<Endpoint>)) {
        self.state.send_modify(|state| {
            if let ContainerState::Running(running) = state {
                change(&mut running.endpoints);
            }
        });
    }
}

/// A container's places in the host's networks; `None` if it can have none.
pub(super) fn places(mode: &NetworkMode) -> Option<Vec<WantedPlace>> {
    match mode {
        NetworkMode::Bridge => Some(vec![WantedPlace { network: DEFAULT_NETWORK.into(), ..WantedPlace::default() }]),
        NetworkMode::Local(places) => Some(places.clone()),
        NetworkMode::Host | NetworkMode::None | NetworkMode::Container(_) | NetworkMode::Joined(_) => None,
    }
}

/// A container as its networks know it.
pub(super) fn member<'a>(container: &'a Container, config: &'a ContainerConfig) -> Member<'a> {
    Member {
        id: &container.id,
        names: vec![config.name.clone(), container.id[..12].to_owned()],
        ports: &config.ports,
        resolvers: &config.dns,
        user_namespace: container.dirs.shift.as_ref().map(Shift::user_namespace),
    }
}

/// Refuses an option whose value is not understood.
fn check_option(
    options: &BTreeMap<String, String>,
    key: &str,
    want: &str,
    fits: impl Fn(&str) -> bool,
) -> Result<(), EngineError> {
    match options.get(key) {
        Some(value) if !fits(value) => {
            Err(EngineError::Invalid(format!("network option {key}={value:?} cannot be used: write {want}")))
        }
        _ => Ok(()),
    }
}

/// Refuses options of the bridge driver that are unknown, or said in another way than is understood.
fn check_options(options: &BTreeMap<String, String>, internal: bool) -> Result<(), EngineError> {
    let invalid = |why: String| Err(EngineError::Invalid(why));
    for key in options.keys() {
        let known = [DEVICE, MASQUERADE, NEIGHBOURS, DEFAULT_BRIDGE, MTU, HOST_BINDING, HOST_SOURCE, HOST_SOURCE_V6]
            .into_iter()
            .chain([GATEWAY_MODE, GATEWAY_MODE_V6])
            .any(|known| known == key);
        if !known && key.starts_with("com.docker.network.") {
            return invalid(format!("network option {key} is not supported yet"));
        }
    }
    for key in [GATEWAY_MODE, GATEWAY_MODE_V6] {
        let words = GatewayMode::WORDS.map(|(word, _)| word);
        check_option(options, key, &words.join(", "), |mode| words.contains(&mode))?;
        if options.get(key).is_some_and(|mode| mode == "isolated") && !internal {
            return invalid(format!("network option {key}=isolated is for internal networks alone: add --internal"));
        }
    }
    check_option(options, HOST_SOURCE, "an IPv4 address", |text| text.parse::<Ipv4Addr>().is_ok())?;
    check_option(options, HOST_SOURCE_V6, "an IPv6 address", |text| text.parse::<Ipv6Addr>().is_ok())?;
    check_option(options, MTU, "a number from 68 to 65535", |text| {
        text.parse::<u32>().is_ok_and(|mtu| (68..=65535).contains(&mtu))
    })?;
    check_option(options, HOST_BINDING, "an IPv4 address", |text| text.parse::<Ipv4Addr>().is_ok())
}

/// The IPv4 addresses that a network asks for.
fn v4_of(spec: &LocalNetworkSpec, subnet: Subnet) -> Result<Ipv4Side, EngineError> {
    let invalid = |why: String| Err(EngineError::Invalid(why));
    if subnet.prefix_len() > 30 {
        return invalid(format!("subnet {subnet} has no room for containers: use /30 or larger"));
    }
    let mut v4 = Ipv4Side { range: spec.range, reserved: spec.reserved.clone(), ..Ipv4Side::new(subnet) };
    if let Some(gateway) = spec.gateway {
        if !subnet.contains(gateway) {
            return invalid(format!("no matching subnet for gateway {gateway}: it is not in {subnet}"));
        }
        v4.gateway = gateway;
    }
    if let Some(range) = spec.range.filter(|range| !(subnet.contains(range.base()) && subnet.contains(range.last()))) {
        return invalid(format!("no matching subnet for range {range}: it is not in {subnet}"));
    }
    Ok(v4)
}

/// A network that is asked for; without a subnet it has IPv6 alone.
fn network_of(spec: LocalNetworkSpec, subnet: Option<Subnet>) -> Result<LocalNetwork, EngineError> {
    let invalid = |why: String| Err(EngineError::Invalid(why));
    check_options(&spec.options, spec.internal)?;
    if subnet.is_none() && spec.v6.is_none() {
        return invalid("IPv4 or IPv6 must be enabled: a network has addresses of one of them at least".into());
    }
    let id = hex::encode(rand::random::<[u8; 32]>());
    let v4 = subnet.map(|subnet| v4_of(&spec, subnet)).transpose()?;
    let mut network = LocalNetwork::new(&id, v4);
    if let Some(v6) = spec.v6.as_ref().filter(|v6| !v6.subnet.contains(v6.gateway)) {
        return invalid(format!("no matching subnet for gateway {}: it is not in {}", v6.gateway, v6.subnet));
    }
    if let Some(v6) = &spec.v6 {
        if let Some(range) =
            v6.range.filter(|range| !v6.subnet.contains(range.base()) || range.prefix_len() < v6.subnet.prefix_len())
        {
            return invalid(format!("no matching subnet for range {range}: it is not in {}", v6.subnet));
        }
        if let Some(outside) = v6.reserved.values().find(|address| !v6.subnet.contains(**address)) {
            return invalid(format!("no matching subnet for aux-address {outside}: it is not in {}", v6.subnet));
        }
    }
    if let Some(v6) = spec.v6.as_ref().filter(|v6| v6.subnet.prefix_len() > V6_LEN_MAX) {
        return invalid(format!("subnet {} has no room for containers: use /{V6_LEN_MAX} or larger", v6.subnet));
    }
    if let Some(device) = spec.options.get(DEVICE) {
        let valid = (1..=15).contains(&device.len()) && !device.contains(['/', ' ', '"']);
        if !valid {
            return invalid(format!("{device:?} is no name of a link: it has 1 to 15 characters and no slash"));
        }
        network.device.clone_from(device);
    }
    if spec.on_parent {
        (network.device, network.parent) = on_parent(&id, &spec)?;
    }
    Ok(LocalNetwork {
        name: spec.name,
        created: now(),
        labels: spec.labels,
        masquerade: spec.options.get(MASQUERADE).is_none_or(|value| value != "false"),
        apart: spec.options.get(NEIGHBOURS).is_some_and(|value| value == "false"),
        options: spec.options,
        ipam_options: spec.ipam_options,
        attachable: spec.attachable,
        internal: spec.internal,
        v6: spec.v6,
        ..network
    })
}

/// A link of the host's for a network, or one of its own that leads nowhere, with that one's name.
fn on_parent(id: &str, spec: &LocalNetworkSpec) -> Result<(String, Option<Parent>), EngineError> {
    let option = |name: &str| spec.options.get(name).map_or("", String::as_str);
    let mode = match option(PARENT_MODE) {
        "" => Mode::default(),
        text => text.parse().map_err(|error: ModeError| EngineError::Invalid(error.to_string()))?,
    };
    let link = option(PARENT).to_owned();
    if link.is_empty() || spec.internal {
        let device = format!("dm-{}", &id[..12]);
        return Ok((device.clone(), Some(Parent { link: device, mode, own: true })));
    }
    if !is_link(&link) {
        return Err(EngineError::Invalid(format!(
            "the parent interface {link:?} is not there: name a link of this host's; one for a VLAN is to be made before"
        )));
    }
    Ok((String::new(), Some(Parent { link, mode, own: false })))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_does_not_fit_together_is_refused() {
        let subnet: Subnet = "10.1.0.0/24".parse().unwrap();
        let fails = |spec: LocalNetworkSpec, subnet: Subnet| network_of(spec, Some(subnet)).unwrap_err().to_string();
        let gateway = Some(Ipv4Addr::new(10, 2, 0, 1));
        assert!(fails(LocalNetworkSpec { gateway, ..Default::default() }, subnet).contains("10.2.0.1"));
        let range = Some("10.1.1.0/24".parse().unwrap());
        assert!(fails(LocalNetworkSpec { range, ..Default::default() }, subnet).contains("10.1.1.0/24"));
        assert!(fails(LocalNetworkSpec::default(), "10.1.0.0/31".parse().unwrap()).contains("/30"));
        let options = BTreeMap::from([("com.docker.network.bridge.colour".to_owned(), "red".to_owned())]);
        assert!(fails(LocalNetworkSpec { options, ..Default::default() }, subnet).contains("colour"));
    }
}
