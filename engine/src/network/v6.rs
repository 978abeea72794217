//! The IPv6 side of a network that has one: its addresses, and rules in a table of their own.

use std::collections::BTreeMap;
use std::net::Ipv6Addr;

use serde::{Deserialize, Serialize};
use skep_api::SubnetV6;

use super::lease::Lease;
use super::ruleset::{Family, Published, cleared, opened, table};
use super::{GATEWAY_MODE_V6, GatewayMode, HOST_SOURCE_V6, LocalNetwork};

/// What the table is called, with its family.
pub(super) const TABLE: &str = "ip6 skep";

/// No packet from ::1 may leave its host: who asks there is refused at once, and not kept waiting.
const IPV6: Family = Family {
    table: TABLE,
    name: "ip6",
    loopback: None,
    unpublished: "    ip6 daddr ::1 return\n",
    mode: GATEWAY_MODE_V6,
    source: HOST_SOURCE_V6,
};

/// A network's IPv6 addresses.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ipv6Side {
    pub subnet: SubnetV6,
    /// As its user wrote it: clients that compare know no other form.
    #[serde(default)]
    pub subnet_as_written: Option<String>,
    pub gateway: Ipv6Addr,
    /// Whence containers get theirs; none: from anywhere in it.
    #[serde(default)]
    pub range: Option<SubnetV6>,
    /// Those that no container gets, by what they are for.
    #[serde(default)]
    pub reserved: BTreeMap<String, Ipv6Addr>,
}

impl Ipv6Side {
    /// On a subnet, with its first address after the routers' for the gateway if none is asked for.
    #[must_use]
    pub fn new(subnet: SubnetV6, gateway: Option<Ipv6Addr>) -> Self {
        let gateway = gateway.or_else(|| subnet.nth(1)).unwrap_or_else(|| subnet.base());
        Self { subnet, subnet_as_written: None, gateway, range: None, reserved: BTreeMap::new() }
    }
}

/// The table, as `ruleset` of IPv4 has it; nothing where no network has IPv6, as not every kernel has rules for it.
pub(super) fn ruleset(networks: &BTreeMap<String, LocalNetwork>, leases: &BTreeMap<String, Lease>) -> String {
    let side = |network: &LocalNetwork| network.v6.as_ref().map(|v6| v6.subnet.to_string());
    let sides: Vec<_> = networks.values().filter_map(|network| Some((network, side(network)?))).collect();
    if sides.is_empty() {
        return String::new();
    }
    cleared(TABLE) + &table(&IPV6, networks, &sides, &published(networks, leases))
}

/// Ports of all of the host's addresses, led to those that have an IPv6 address.
fn published(networks: &BTreeMap<String, LocalNetwork>, leases: &BTreeMap<String, Lease>) -> Published {
    let mut published = Published::default();
    for lease in leases.values() {
        let outward = |network: &str| networks.get(network).filter(|network| !network.internal);
        let own = lease.places.iter().find_map(|place| Some((outward(&place.network)?, place.address_v6?)));
        let Some((network, address)) = own else { continue };
        if network.gateway_mode(GATEWAY_MODE_V6) == GatewayMode::Routed {
            published.opened += &opened(&IPV6, address, &lease.ports);
            continue;
        }
        for port in lease.ports.iter().filter(|port| port.has_family(true)) {
            let (protocol, number, to) = (port.protocol.as_str(), port.host_port, port.container_port);
            let at = port.one_address().map(|address| format!("ip6 daddr {address} ")).unwrap_or_default();
            published.led += &format!("    {at}{protocol} dport {number} dnat to [{address}]:{to}\n");
        }
    }
    published
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use skep_api::service::Protocol;

    use super::*;
    use crate::container::config::PublishedPort;
    use crate::network::Ipv4Side;
    use crate::network::lease::Held;

    #[test]
    fn rules_are_there_for_networks_with_ipv6_alone() {
        let network = |name: &str, subnet: &str| {
            (name.to_owned(), LocalNetwork::new(name, Some(Ipv4Side::new(subnet.parse().unwrap()))))
        };
        let mut networks = BTreeMap::from([network("one", "10.1.0.0/16"), network("two", "10.2.0.0/16")]);
        assert_eq!(ruleset(&networks, &BTreeMap::new()), "");
        let side = Ipv6Side::new("fd00:1::/64".parse().unwrap(), None);
        assert_eq!(side.gateway.to_string(), "fd00:1::1");
        networks.get_mut("one").unwrap().v6 = Some(side);
        let at = |host_ip| PublishedPort {
            protocol: Protocol::Tcp,
            container_port: 80,
            host_ip,
            host_port: 8080,
            host_port_last: 0,
        };
        let place = Held {
            network: "one".into(),
            address: Some(Ipv4Addr::new(10, 1, 0, 2)),
            address_v6: Some("fd00:1::2".parse().unwrap()),
            names: Vec::new(),
            link: 0,
            gateway_priority: 0,
        };
        let one = Some("2001:db8::1".parse().unwrap());
        let ports = vec![
            at(None),
            PublishedPort { host_port: 9090, ..at(Some(Ipv4Addr::LOCALHOST.into())) },
            PublishedPort { host_port: 9191, ..at(one) },
        ];
        let leases = BTreeMap::from([("c".to_owned(), Lease { places: vec![place], through: None, ports })]);
        let rules = ruleset(&networks, &leases);
        assert!(rules.contains("tcp dport 8080 dnat to [fd00:1::2]:80"), "{rules}");
        assert!(rules.contains("ip6 daddr 2001:db8::1 tcp dport 9191 dnat to [fd00:1::2]:80"), "{rules}");
        assert!(!rules.contains("9090"), "an IPv4 address is not widened: {rules}");
        assert!(rules.contains("ip6 daddr fd00:1::/64 iifname != { \"br-one\", \"lo\" } drop"), "{rules}");
        assert!(rules.contains("iifname \"br-one\" oifname { \"br-two\" } drop"), "{rules}");
    }

    #[test]
    fn records_are_read_whatever_addresses_a_network_has() {
        let both = LocalNetwork {
            v6: Some(Ipv6Side::new("fd00::/64".parse().unwrap(), None)),
            ..LocalNetwork::new("n", Some(Ipv4Side::new("10.1.0.0/16".parse().unwrap())))
        };
        let record = serde_json::to_value(&both).unwrap();
        assert_eq!(record["subnet"], "10.1.0.0/16", "as before there were networks of IPv6 alone");
        for network in [LocalNetwork { v4: None, ..both.clone() }, LocalNetwork { v6: None, ..both.clone() }, both] {
            let record = serde_json::to_string(&network).unwrap();
            assert_eq!(serde_json::from_str::<LocalNetwork>(&record).unwrap(), network);
        }
    }
}
