//! Gives out subnets, addresses and ports. It remembers nothing: what is taken is read off the
//! objects that have it, so nothing can leak, and a new leader needs no hand-over.
//!
//! Invariant: whoever gives out addresses of a network changes that network's cursor in the same
//! transaction. Two writers at the same time thus clash, and the later one looks again.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;
use std::sync::Arc;

use skep_api::service::{PortConfig, Protocol, PublishMode};
use skep_api::{Cluster, Ipv6Side, Network, NetworkId, NetworkSpec, Service, ServiceId, Subnet, SubnetV6, Task};
use skep_raft_store::{Tables, Transaction};

use crate::control::{ControlError, Reason};

/// The ports that are picked for services that name none.
const PICKED_PORTS: std::ops::RangeInclusive<u16> = 30_000..=32_767;

/// Picks a network's subnet and gateway, or checks those that were asked for.
pub(crate) fn subnet(
    others: &[&Network],
    cluster: &Cluster,
    spec: &NetworkSpec,
) -> Result<(Subnet, Ipv4Addr), ControlError> {
    let clash = |wanted: &Subnet| others.iter().map(|other| other.subnet).find(|taken| taken.overlaps(*wanted));
    let subnet = match spec.ipam.subnet {
        Some(subnet) => match clash(&subnet) {
            Some(taken) => {
                return Err(ControlError::new(
                    Reason::Conflict,
                    format!("subnet {subnet} overlaps with {taken}, which another network has: choose another"),
                ));
            }
            None => subnet,
        },
        None => {
            let pools = cluster.default_addr_pool.iter().filter_map(|pool| pool.parse::<Subnet>().ok());
            let mut parts = pools.flat_map(|pool| pool.parts(cluster.subnet_size));
            parts.find(|part| clash(part).is_none()).ok_or_else(|| {
                ControlError::new(
                    Reason::Conflict,
                    format!(
                        "no subnet of /{} is left in the address pools ({}): remove networks, or name one with --subnet",
                        cluster.subnet_size,
                        cluster.default_addr_pool.join(", ")
                    ),
                )
            })?
        }
    };
    let reserved: Vec<Ipv4Addr> = spec.ipam.reserved.values().copied().collect();
    let first = || subnet.free_host(0, |addr| reserved.contains(&addr));
    let gateway = spec.ipam.gateway.or_else(first).ok_or_else(|| {
        ControlError::invalid(format!("subnet {subnet} has no address left for a gateway: reserve fewer"))
    })?;
    Ok((subnet, gateway))
}

/// Picks a network's IPv6 subnet, or checks the one that was asked for.
pub(crate) fn ipv6_side(
    others: &[&Network],
    spec: &NetworkSpec,
    subnet: Subnet,
    gateway: Ipv4Addr,
) -> Result<Ipv6Side, ControlError> {
    let wanted = spec.ipam.subnet_v6.unwrap_or_else(SubnetV6::unique_local);
    let taken = others.iter().filter_map(|other| Some((other, other.v6?.subnet)));
    if let Some((other, taken)) = taken.into_iter().find(|(_, taken)| taken.overlaps(wanted)) {
        let name = &other.spec.name;
        return Err(ControlError::new(
            Reason::Conflict,
            format!("subnet {wanted} overlaps with {taken}, which network {name} has: choose another"),
        ));
    }
    Ipv6Side::new(wanted, spec.ipam.gateway_v6, subnet, gateway).map_err(ControlError::invalid)
}

/// The addresses of the swarm's networks, as one writer gives them out.
#[derive(Debug, Default)]
pub(crate) struct Addresses {
    used: BTreeMap<NetworkId, BTreeSet<Ipv4Addr>>,
    cursors: BTreeMap<NetworkId, u64>,
}

impl Addresses {
    /// Reads off services, tasks and single containers what is taken.
    pub(crate) fn read<'a>(tables: &Tables, tasks: impl Iterator<Item = &'a Task>) -> Self {
        let mut used: BTreeMap<NetworkId, BTreeSet<Ipv4Addr>> =
            tables.networks.iter().map(|network| (network.id, network.reserved())).collect();
        for vip in tables.services.iter().flat_map(|service| &service.endpoint.virtual_ips) {
            used.entry(vip.network).or_default().insert(vip.address);
        }
        for attachment in tasks.filter(|task| !task.status.state.is_terminal()).flat_map(|task| &task.networks) {
            used.entry(attachment.network).or_default().insert(attachment.address);
        }
        for attachment in tables.attachments.iter() {
            used.entry(attachment.network).or_default().insert(attachment.address);
        }
        Self { used, cursors: BTreeMap::new() }
    }

    /// Takes the one address of `network` that is asked for.
    pub(crate) fn claim(&mut self, network: &Network, address: Ipv4Addr) -> Result<Ipv4Addr, String> {
        let (name, subnet) = (&network.spec.name, network.subnet);
        if !subnet.contains(address) || [subnet.base(), subnet.last()].contains(&address) {
            return Err(format!("address {address} is none of network {name}'s, which is {subnet}: choose another"));
        }
        self.touch(network);
        if !self.used.entry(network.id).or_default().insert(address) {
            return Err(format!("address {address} of network {name} is in use: choose another, or leave it open"));
        }
        Ok(address)
    }

    /// Takes an address of `network`; none if it is full.
    pub(crate) fn take(&mut self, network: &Network) -> Option<Ipv4Addr> {
        let used = self.used.entry(network.id).or_default();
        let cursor = self.cursors.get(&network.id).copied().unwrap_or(network.cursor);
        let range = network.range();
        let ends = [network.subnet.base(), network.subnet.last()];
        let address = if range == network.subnet {
            range.free_host(cursor, |addr| used.contains(&addr))?
        } else {
            // Every address of a part is a host's, but for the ends of the whole.
            let offsets = (cursor..range.len()).chain(0..cursor.min(range.len()));
            offsets.filter_map(|n| range.nth(n)).find(|addr| !used.contains(addr) && !ends.contains(addr))?
        };
        used.insert(address);
        self.cursors.insert(network.id, range.offset(address) + 1);
        Some(address)
    }

    /// Makes this writer clash with whoever else gives out something of `network`.
    pub(crate) fn touch(&mut self, network: &Network) {
        self.cursors.entry(network.id).or_insert(network.cursor);
    }

    /// Writes down how far it came.
    pub(crate) fn write(self, tables: &Tables, tx: &mut Transaction) {
        for (id, cursor) in self.cursors {
            if let Some(network) = tables.networks.get(id) {
                tx.update(Network { cursor, ..(**network).clone() });
            }
        }
    }
}

/// Says that a network has no address left.
pub(crate) fn is_full(network: &Network) -> String {
    format!(
        "no address is left in network {} ({}): remove tasks, or use a network with a larger subnet",
        network.spec.name,
        network.range()
    )
}

/// The network that published ports come in through.
pub(crate) fn ingress(tables: &Tables) -> Option<&Arc<Network>> {
    tables.networks.iter().find(|network| network.spec.ingress)
}

/// A service's ports with the numbers they get; those it had before stay.
pub(crate) fn ports(
    tables: &Tables,
    service: ServiceId,
    before: &[PortConfig],
    wanted: &[PortConfig],
) -> Result<Vec<PortConfig>, ControlError> {
    let others = || tables.services.iter().filter(|other| !other.removed && other.id != service);
    let mut taken: BTreeSet<(Protocol, u16)> = BTreeSet::new();
    let fixed = others().flat_map(|other| &other.endpoint.ports).chain(wanted).filter(|port| port.published_port != 0);
    taken.extend(fixed.map(|port| (port.protocol, port.published_port)));
    let mut ports = Vec::new();
    for port in wanted {
        let mut port = port.clone();
        match port.publish_mode {
            PublishMode::Host => {}
            PublishMode::Ingress if port.published_port == 0 => {
                let same = |old: &&PortConfig| {
                    old.publish_mode == PublishMode::Ingress
                        && (old.protocol, old.target_port) == (port.protocol, port.target_port)
                        && PICKED_PORTS.contains(&old.published_port)
                        && !taken.contains(&(old.protocol, old.published_port))
                };
                let kept = before.iter().find(same).map(|old| old.published_port);
                let free = || PICKED_PORTS.into_iter().find(|&number| !taken.contains(&(port.protocol, number)));
                port.published_port = kept.or_else(free).ok_or_else(|| {
                    ControlError::new(Reason::Conflict, "no port from 30000 to 32767 is left: name one to publish")
                })?;
                taken.insert((port.protocol, port.published_port));
            }
            PublishMode::Ingress => {}
        }
        if let Some((other, theirs)) = others().find_map(|other| clash(other, &port).map(|theirs| (other, theirs))) {
            let how = match theirs {
                PublishMode::Ingress => "as an ingress port",
                PublishMode::Host => "as a host-published port",
            };
            return Err(ControlError::invalid(format!(
                "port '{}' is already in use by service '{}' ({}) {how}: publish another",
                port.published_port, other.spec.name, other.id
            )));
        }
        ports.push(port);
    }
    Ok(ports)
}

/// How `service` has the port that `wanted` would have. Host-mode ports of two services are the
/// scheduler's to keep apart.
fn clash(service: &Service, wanted: &PortConfig) -> Option<PublishMode> {
    let same = |port: &&PortConfig| {
        let apart = port.host_ip.is_some() && wanted.host_ip.is_some() && port.host_ip != wanted.host_ip;
        let both_host = port.publish_mode == PublishMode::Host && wanted.publish_mode == PublishMode::Host;
        wanted.published_port != 0
            && (port.protocol, port.published_port) == (wanted.protocol, wanted.published_port)
            && !apart
            && !both_host
    };
    service.endpoint.ports.iter().find(same).map(|port| port.publish_mode)
}

#[cfg(test)]
mod tests {
    use skep_api::Meta;

    use super::*;

    fn network(subnet: &str, range: Option<&str>) -> Network {
        let subnet: Subnet = subnet.parse().unwrap();
        let mut spec = NetworkSpec::default();
        spec.ipam.range = range.map(|range| range.parse().unwrap());
        let gateway = subnet.nth(1).unwrap();
        Network { id: NetworkId::from_u128(1), meta: Meta::default(), spec, subnet, gateway, v6: None, cursor: 0 }
    }

    #[track_caller]
    fn check(network: &Network, count: usize, want: &[&str]) {
        let mut addresses = Addresses::default();
        addresses.used.insert(network.id, network.reserved());
        let got: Vec<_> = (0..count).map_while(|_| addresses.take(network)).map(|addr| addr.to_string()).collect();
        assert_eq!(got, want);
    }

    #[test]
    fn addresses_are_given_once_until_none_is_left() {
        check(&network("10.0.1.0/29", None), 9, &["10.0.1.2", "10.0.1.3", "10.0.1.4", "10.0.1.5", "10.0.1.6"]);
        check(&network("10.0.1.0/24", Some("10.0.1.128/31")), 9, &["10.0.1.128", "10.0.1.129"]);
        check(&network("10.0.1.0/29", Some("10.0.1.6/31")), 9, &["10.0.1.6"]);
    }

    #[test]
    fn what_was_given_back_last_is_used_last() {
        let mut network = network("10.0.1.0/29", None);
        network.cursor = 5;
        check(&network, 3, &["10.0.1.5", "10.0.1.6", "10.0.1.2"]);
    }
}
