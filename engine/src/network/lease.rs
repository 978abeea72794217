//! Who has which addresses and ports of the host's networks. Decides; touches nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Display;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};

use crate::container::config::PublishedPort;
use crate::network::LocalNetwork;

/// Ports that are picked when a container wants any.
const PICKED_PORTS: std::ops::RangeInclusive<u16> = 32768..=60999;

/// What one container has of the network.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Lease {
    /// Its places in the host's networks, in the order it joined them.
    pub(crate) places: Vec<Held>,
    /// Where its published ports lead if not to its place: the same port there, where somebody knows
    /// how to go on.
    pub(crate) through: Option<Ipv4Addr>,
    pub(crate) ports: Vec<PublishedPort>,
}

impl Lease {
    /// The first number that no link has.
    pub(crate) fn free_link(&self) -> u32 {
        (0..).find(|link| !self.places.iter().any(|place| place.link == *link)).unwrap_or(0)
    }

    /// Whether it is in networks that are not this host's alone.
    pub(crate) fn is_kept(&self, networks: &BTreeMap<String, LocalNetwork>) -> bool {
        self.places.iter().any(|place| !networks.contains_key(&place.network))
    }
}

/// A place in a network.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Held {
    pub(crate) network: String,
    /// None, where the network has IPv6 alone.
    pub(crate) address: Option<Ipv4Addr>,
    pub(crate) address_v6: Option<Ipv6Addr>,
    /// What its neighbours call it.
    pub(crate) names: Vec<String>,
    /// The number of its link inside: eth0 is 0.
    pub(crate) link: u32,
    /// What goes out goes through the network where this is highest.
    pub(crate) gateway_priority: i64,
}

/// The addresses that containers have in a network.
pub(crate) fn taken_addresses(leases: &BTreeMap<String, Lease>, network: &str) -> BTreeSet<Ipv4Addr> {
    let places = leases.values().flat_map(|lease| &lease.places);
    places.filter(|place| place.network == network).filter_map(|place| place.address).collect()
}

/// An address in a network: the one that is asked for, or a free one; none where the network has IPv6 alone.
pub(crate) fn pick_address(
    network: &LocalNetwork,
    taken: &BTreeSet<Ipv4Addr>,
    wanted: Option<Ipv4Addr>,
) -> io::Result<Option<Ipv4Addr>> {
    let name = &network.name;
    let Some(v4) = &network.v4 else {
        return match wanted {
            None => Ok(None),
            Some(address) => Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("address {address} cannot be had: network {name} has IPv6 alone"),
            )),
        };
    };
    let subnet = v4.subnet;
    let reserved = |address: Ipv4Addr| {
        address == v4.gateway || taken.contains(&address) || v4.reserved.values().any(|&other| other == address)
    };
    if let Some(address) = wanted {
        check_wanted(name, address, subnet, subnet.contains(address), reserved(address))?;
        return Ok(Some(address));
    }
    let pool = v4.range.unwrap_or(subnet);
    // The first and the last address of the subnet are nobody's, also where the range begins with it.
    let unusable = |address: Ipv4Addr| address == subnet.base() || address == subnet.last() || reserved(address);
    let free = (0..pool.len()).filter_map(|offset| pool.nth(offset)).find(|&address| !unusable(address));
    free.map(Some).ok_or_else(|| io::Error::other(format!("network {name} has no address left: remove containers")))
}

/// An IPv6 address in a network: the one that is asked for, or a free one; none where the network has no IPv6.
pub(crate) fn pick_address_v6(
    network: &LocalNetwork,
    leases: &BTreeMap<String, Lease>,
    wanted: Option<Ipv6Addr>,
) -> io::Result<Option<Ipv6Addr>> {
    let name = &network.name;
    let Some(v6) = &network.v6 else {
        return match wanted {
            None => Ok(None),
            Some(address) => Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("address {address} cannot be had: network {name} has no IPv6, make it with --ipv6"),
            )),
        };
    };
    let places = leases.values().flat_map(|lease| &lease.places).filter(|place| place.network == network.id);
    let others = v6.reserved.values().copied().chain([v6.gateway]);
    let taken: BTreeSet<Ipv6Addr> = places.filter_map(|place| place.address_v6).chain(others).collect();
    if let Some(address) = wanted {
        check_wanted(name, address, v6.subnet, v6.subnet.contains(address), taken.contains(&address))?;
        return Ok(Some(address));
    }
    // The first address of a subnet is its routers'.
    let range = v6.range.unwrap_or(v6.subnet);
    let mut candidates = (0..).map_while(|offset| range.nth(offset)).filter(|&address| address != v6.subnet.base());
    let free = candidates.find(|address| !taken.contains(address));
    free.map(Some)
        .ok_or_else(|| io::Error::other(format!("network {name} has no IPv6 address left: remove containers")))
}

/// Says why an address that is asked for cannot be had.
fn check_wanted(
    network: &str,
    address: impl Display,
    subnet: impl Display,
    within: bool,
    taken: bool,
) -> io::Result<()> {
    let (kind, why) = match (within, taken) {
        (true, false) => return Ok(()),
        (false, _) => {
            (io::ErrorKind::InvalidInput, format!("address {address} is not in network {network}, which is {subnet}"))
        }
        (true, true) => (
            io::ErrorKind::AddrInUse,
            format!("address {address} of network {network} is in use: Address already in use"),
        ),
    };
    Err(io::Error::new(kind, why))
}

/// The host's ports that are asked for, and free ones where any will do. `why_not` says why others than containers keep
/// one from being had.
pub(crate) fn pick_ports(
    leases: &BTreeMap<String, Lease>,
    ports: &[PublishedPort],
    why_not: impl Fn(&PublishedPort) -> Option<String>,
) -> io::Result<Vec<PublishedPort>> {
    let mut taken: Vec<_> = leases.values().flat_map(|lease| lease.ports.clone()).collect();
    for port in ports.iter().filter(|port| !port.is_open()) {
        if taken.iter().any(|other| collides(other, port)) {
            return Err(io::Error::new(
                io::ErrorKind::AddrInUse,
                format!(
                    "Bind for {} failed: port is already allocated: another container publishes it ({})",
                    SocketAddr::new(port.host_ip.unwrap_or_else(|| Ipv4Addr::UNSPECIFIED.into()), port.host_port),
                    port.protocol.as_str()
                ),
            ));
        }
        if let Some(why) = why_not(port) {
            return Err(io::Error::new(io::ErrorKind::AddrInUse, why));
        }
        taken.push(port.clone());
    }
    let mut pick = |port: &PublishedPort| {
        let range = if port.host_port == 0 { PICKED_PORTS } else { port.host_port..=port.host_port_last };
        let why = || format!("no port is left to publish from {} to {}", range.start(), range.end());
        let mut candidates =
            range.clone().map(|number| PublishedPort { host_port: number, host_port_last: 0, ..port.clone() });
        let is_taken = |candidate: &PublishedPort| taken.iter().any(|other| collides(other, candidate));
        let free = candidates.find(|candidate| !is_taken(candidate) && why_not(candidate).is_none());
        let free = free.ok_or_else(|| io::Error::new(io::ErrorKind::AddrInUse, why()))?;
        taken.push(free.clone());
        Ok(free)
    };
    ports.iter().map(|port| if port.is_open() { pick(port) } else { Ok(port.clone()) }).collect()
}

/// Whether two want the same port of the same address.
fn collides(a: &PublishedPort, b: &PublishedPort) -> bool {
    let meet = match (a.host_ip, b.host_ip) {
        (None, _) | (_, None) => true,
        (Some(a), Some(b)) => a == b || (a.is_ipv6() == b.is_ipv6() && (a.is_unspecified() || b.is_unspecified())),
    };
    a.protocol == b.protocol && a.host_port == b.host_port && meet
}

#[cfg(test)]
mod tests {
    use skep_api::service::Protocol;

    use super::*;
    use crate::network::Ipv4Side;
    use crate::network::Ipv6Side;

    fn port(host_port: u16) -> PublishedPort {
        let host_ip = None;
        PublishedPort { protocol: Protocol::Tcp, container_port: 80, host_ip, host_port, host_port_last: 0 }
    }

    #[test]
    fn addresses_are_given_once_and_those_asked_for_are_obeyed() {
        let network = LocalNetwork::new("n", Some(Ipv4Side::new("10.1.2.0/29".parse().unwrap())));
        let address = |last: u8| Ipv4Addr::new(10, 1, 2, last);
        let mut taken = BTreeSet::new();
        for last in 2..=6 {
            let picked = pick_address(&network, &taken, None).unwrap();
            assert_eq!(picked, Some(address(last)));
            taken.extend(picked);
        }
        assert!(pick_address(&network, &taken, None).unwrap_err().to_string().contains("no address left"));
        taken.remove(&address(4));
        assert_eq!(pick_address(&network, &taken, Some(address(4))).unwrap(), Some(address(4)));
        assert!(pick_address(&network, &taken, Some(address(1))).is_err(), "the gateway's");
        assert!(pick_address(&network, &taken, Some(Ipv4Addr::new(10, 9, 9, 9))).is_err());
        let v4 = network.v4.clone().unwrap();
        let v4 = Ipv4Side { range: Some("10.1.2.4/30".parse().unwrap()), ..v4 };
        let ranged = LocalNetwork { v4: Some(v4), ..network };
        assert_eq!(pick_address(&ranged, &BTreeSet::new(), None).unwrap(), Some(address(4)));
    }

    #[test]
    fn addresses_of_ipv6_are_given_once_where_there_are_some() {
        let mut network = LocalNetwork::new("n", Some(Ipv4Side::new("10.1.2.0/29".parse().unwrap())));
        let wanted: Ipv6Addr = "fd00::9".parse().unwrap();
        assert_eq!(pick_address_v6(&network, &BTreeMap::new(), None).unwrap(), None);
        assert!(pick_address_v6(&network, &BTreeMap::new(), Some(wanted)).is_err());
        network.v6 = Some(Ipv6Side::new("fd00::/64".parse().unwrap(), None));
        let mut leases = BTreeMap::new();
        for last in 2..5 {
            let picked = pick_address_v6(&network, &leases, None).unwrap();
            assert_eq!(picked, Some(Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, last)));
            let address = Ipv4Addr::new(10, 1, 2, 2);
            let place = Held {
                network: "n".into(),
                address: Some(address),
                address_v6: picked,
                names: Vec::new(),
                link: 0,
                gateway_priority: 0,
            };
            leases.insert(last.to_string(), Lease { places: vec![place], ..Lease::default() });
        }
        assert_eq!(pick_address_v6(&network, &leases, Some(wanted)).unwrap(), Some(wanted));
        for wrong in ["fd00::1", "fd00::3", "fd01::3"] {
            assert!(pick_address_v6(&network, &leases, Some(wrong.parse().unwrap())).is_err(), "{wrong}");
        }
    }

    fn any(_: &PublishedPort) -> Option<String> {
        None
    }

    #[test]
    fn ports_of_other_programs_are_not_taken() {
        let others = |port: &PublishedPort| (port.host_port < 9092).then(|| "somebody else's".to_owned());
        let none = BTreeMap::new();
        assert!(pick_ports(&none, &[port(9090)], others).unwrap_err().to_string().contains("somebody"));
        let range = PublishedPort { host_port_last: 9095, ..port(9090) };
        assert_eq!(pick_ports(&none, &[range], others).unwrap()[0].host_port, 9092);
    }

    #[test]
    fn ports_are_given_once_for_each_address() {
        let mut leases = BTreeMap::new();
        leases.insert("a".to_owned(), Lease { ports: vec![port(8080)], ..Lease::default() });
        assert!(
            pick_ports(&leases, &[port(8080)], any)
                .unwrap_err()
                .to_string()
                .contains("Bind for 0.0.0.0:8080 failed: port is already allocated")
        );
        let at = |last: u8| PublishedPort { host_ip: Some(Ipv4Addr::new(127, 0, 0, last).into()), ..port(9090) };
        leases.insert("b".to_owned(), Lease { ports: vec![at(1)], ..Lease::default() });
        let range = PublishedPort { host_port_last: 9092, ..port(9090) };
        let picked = pick_ports(&leases, &[range.clone(), port(9091)], any).unwrap();
        assert_eq!(picked.iter().map(|port| port.host_port).collect::<Vec<_>>(), [9092, 9091], "what is fixed first");
        assert!(
            pick_ports(&leases, &[range, port(9091), port(9092)], any)
                .unwrap_err()
                .to_string()
                .contains("9090 to 9092")
        );
        assert!(pick_ports(&leases, &[at(1)], any).is_err() && pick_ports(&leases, &[port(9090)], any).is_err());
        assert_eq!(pick_ports(&leases, &[at(2)], any).unwrap(), [at(2)]);
        let on = |address: &str| PublishedPort { host_ip: Some(address.parse().unwrap()), ..port(9090) };
        assert!(pick_ports(&leases, &[on("0.0.0.0")], any).is_err());
        assert_eq!(pick_ports(&leases, &[on("::1"), on("::2")], any).unwrap().len(), 2);
        assert!(pick_ports(&leases, &[on("::"), on("::1")], any).is_err());
        let picked = pick_ports(&leases, &[port(0), port(0)], any).unwrap();
        assert!(picked[0].host_port >= 32768 && picked[0] != picked[1]);
    }
}
