//! The rules of the host's networks, as one text that `nft` reads: replacing a table is one step for
//! the kernel.

use std::collections::BTreeMap;
use std::fmt::Display;

use crate::container::config::PublishedPort;
use crate::network::lease::Lease;
use crate::network::{GATEWAY_MODE, GatewayMode, HOST_SOURCE, LocalNetwork};

/// What the table of IPv4 is called, with its family.
pub(super) const TABLE: &str = "ip skep";

/// A family of addresses, as rules speak of it.
pub(super) struct Family {
    /// What the table is called, with the family.
    pub(super) table: &'static str,
    /// How an address of it is named in rules.
    pub(super) name: &'static str,
    /// The host's loopback, where packets from there can be led to containers.
    pub(super) loopback: Option<&'static str>,
    /// What comes before the ports that are published.
    pub(super) unpublished: &'static str,
    /// The option that has a network's mode, and the one that has the address of what it sends.
    pub(super) mode: &'static str,
    pub(super) source: &'static str,
}

impl Family {
    fn is_v6(&self) -> bool {
        self.name == "ip6"
    }
}

const IPV4: Family = Family {
    table: TABLE,
    name: "ip",
    loopback: Some("127.0.0.0/8"),
    unpublished: "",
    mode: GATEWAY_MODE,
    source: HOST_SOURCE,
};

/// The rules of ports that are published.
#[derive(Default)]
pub(super) struct Published {
    /// Those of the host that lead into containers.
    pub(super) led: String,
    /// Those of containers that are reached by their own addresses.
    pub(super) opened: String,
}

/// The whole table of IPv4.
pub(super) fn ruleset(networks: &BTreeMap<String, LocalNetwork>, leases: &BTreeMap<String, Lease>) -> String {
    let side = |network: &LocalNetwork| network.v4.as_ref().map(|v4| v4.subnet.to_string());
    let sides: Vec<_> = networks.values().filter_map(|network| Some((network, side(network)?))).collect();
    cleared(TABLE) + &table(&IPV4, networks, &sides, &published(networks, leases))
}

/// Has a table be gone, whether it was there or not.
pub(super) fn cleared(table: &str) -> String {
    format!("table {table} {{}}\ndelete table {table}\n")
}

/// The table of a family for the networks that have it, with their subnets.
pub(super) fn table(
    family: &Family,
    networks: &BTreeMap<String, LocalNetwork>,
    sides: &[(&LocalNetwork, String)],
    published: &Published,
) -> String {
    let Family { table, name, loopback, unpublished, mode, source } = family;
    let Published { led, opened } = published;
    let (mut masquerade, mut forward, mut direct, mut isolation) =
        (String::new(), String::new(), String::new(), String::new());
    let mut closed = String::new();
    for (network, subnet) in sides {
        let device = &network.device;
        let mode = network.gateway_mode(mode);
        if network.masquerade && !network.internal && mode != GatewayMode::Routed {
            let how =
                network.options.get(*source).map_or_else(|| "masquerade".into(), |source| format!("snat to {source}"));
            masquerade += &format!("    {name} saddr {subnet} oifname != \"{device}\" {how}\n");
        }
        match mode {
            // Containers are reached by their published ports; what comes for their own addresses from
            // elsewhere is refused before any port is led in.
            GatewayMode::Nat | GatewayMode::Isolated => {
                direct += &format!("    {name} daddr {subnet} iifname != {{ \"{device}\", \"lo\" }} drop\n");
            }
            GatewayMode::NatUnprotected => {}
            GatewayMode::Routed => {
                closed += &format!("    {name} daddr {subnet} meta l4proto {{ icmp, ipv6-icmp }} accept\n");
                closed += &format!("    oifname \"{device}\" iifname != \"{device}\" drop\n");
            }
        }
        if let Some(loopback) = loopback {
            masquerade += &format!("    {name} saddr {loopback} oifname \"{device}\" masquerade\n");
        }
        masquerade += &format!("    {name} saddr {subnet} {name} daddr {subnet} ct status dnat masquerade\n");
        if network.internal {
            forward += &format!("    iifname \"{device}\" oifname != \"{device}\" drop\n");
            forward += &format!("    oifname \"{device}\" iifname != \"{device}\" drop\n");
        }
        let others = networks.values().filter(|other| other.device != *device);
        let others: Vec<_> = others.map(|other| format!("\"{}\"", other.device)).collect();
        if !others.is_empty() {
            isolation += &format!("    iifname \"{device}\" oifname {{ {} }} drop\n", others.join(", "));
        }
    }
    // What a port leads to may be reached from everywhere; else networks do not see each other.
    if !isolation.is_empty() || !closed.is_empty() {
        forward += "    ct state established,related accept\n    ct status dnat accept\n";
    }
    format!(
        "table {table} {{\n\
         \x20 chain publish {{\n{unpublished}{led}  }}\n\
         \x20 chain direct {{\n    type filter hook prerouting priority -300\n{direct}  }}\n\
         \x20 chain prerouting {{\n    type nat hook prerouting priority -100\n\
         \x20   fib daddr type local jump publish\n  }}\n\
         \x20 chain output {{\n    type nat hook output priority -100\n\
         \x20   fib daddr type local jump publish\n  }}\n\
         \x20 chain forward {{\n    type filter hook forward priority 0\n{forward}{opened}{closed}{isolation}  }}\n\
         \x20 chain postrouting {{\n    type nat hook postrouting priority 100\n{masquerade}  }}\n}}\n"
    )
}

fn published(networks: &BTreeMap<String, LocalNetwork>, leases: &BTreeMap<String, Lease>) -> Published {
    let mut published = Published::default();
    for lease in leases.values() {
        let outward = |network: &str| networks.get(network).filter(|network| !network.internal);
        let own = lease.places.iter().find_map(|place| Some((outward(&place.network)?, place.address?)));
        if let (None, Some((network, address))) = (lease.through, own)
            && network.gateway_mode(GATEWAY_MODE) == GatewayMode::Routed
        {
            published.opened += &opened(&IPV4, address, &lease.ports);
            continue;
        }
        for port in lease.ports.iter().filter(|port| port.has_family(false)) {
            let to = match (lease.through, own) {
                (Some(through), _) => through.to_string(),
                (None, Some((_, address))) => format!("{address}:{}", port.container_port),
                (None, None) => continue,
            };
            let at = port.one_address().map(|address| format!("ip daddr {address} ")).unwrap_or_default();
            published.led += &format!("    {at}{} dport {} dnat to {to}\n", port.protocol.as_str(), port.host_port);
        }
    }
    published
}

/// Lets everybody reach a container's ports at its own address. One that was asked for at an address of the host's
/// stays closed: this would be wider.
pub(super) fn opened(family: &Family, address: impl Display, ports: &[PublishedPort]) -> String {
    let name = family.name;
    let ports = ports.iter().filter(|port| port.one_address().is_none() && port.has_family(family.is_v6()));
    let rule = |port: &PublishedPort| {
        format!("    {name} daddr {address} {} dport {} accept\n", port.protocol.as_str(), port.container_port)
    };
    ports.map(rule).collect()
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use skep_api::service::Protocol;

    use super::*;
    use crate::network::Ipv4Side;
    use crate::network::lease::Held;

    #[test]
    fn rules_lead_ports_in_and_keep_networks_apart() {
        let network = |name: &str, subnet: &str| {
            (name.to_owned(), LocalNetwork::new(name, Some(Ipv4Side::new(subnet.parse().unwrap()))))
        };
        let mut networks = BTreeMap::from([network("one", "10.1.0.0/16"), network("two", "10.2.0.0/16")]);
        let port = PublishedPort {
            protocol: Protocol::Tcp,
            container_port: 80,
            host_ip: Some(Ipv4Addr::LOCALHOST.into()),
            host_port: 8080,
            host_port_last: 0,
        };
        let place = Held {
            network: "one".into(),
            address: Some(Ipv4Addr::new(10, 1, 0, 2)),
            address_v6: None,
            names: Vec::new(),
            link: 0,
            gateway_priority: 0,
        };
        let leases =
            BTreeMap::from([("c".to_owned(), Lease { places: vec![place], through: None, ports: vec![port] })]);
        let rules = ruleset(&networks, &leases);
        assert!(rules.contains("ip daddr 127.0.0.1 tcp dport 8080 dnat to 10.1.0.2:80"), "{rules}");
        assert!(rules.contains("iifname \"br-one\" oifname { \"br-two\" } drop"), "{rules}");
        assert!(rules.contains("ip daddr 10.1.0.0/16 iifname != { \"br-one\", \"lo\" } drop"), "{rules}");
        networks.get_mut("one").unwrap().internal = true;
        networks.get_mut("two").unwrap().options.insert(GATEWAY_MODE.into(), "nat-unprotected".into());
        let rules = ruleset(&networks, &leases);
        assert!(!rules.contains("ip daddr 10.2.0.0/16 iifname"), "{rules}");
        assert!(!rules.contains("dport 8080"), "nothing leads into an internal network");
        assert!(rules.contains("iifname \"br-one\" oifname != \"br-one\" drop"), "{rules}");
        assert!(!rules.contains("ip saddr 10.1.0.0/16 oifname != \"br-one\" masquerade"), "{rules}");
        // Reached by its own address, at the port that is published and no other.
        let one = networks.get_mut("one").unwrap();
        one.internal = false;
        one.options.insert(GATEWAY_MODE.into(), "routed".into());
        let at_all = |lease: &Lease| Lease {
            ports: lease.ports.iter().map(|port| PublishedPort { host_ip: None, ..port.clone() }).collect(),
            ..lease.clone()
        };
        let rules = ruleset(&networks, &leases.iter().map(|(id, lease)| (id.clone(), at_all(lease))).collect());
        assert!(rules.contains("ip daddr 10.1.0.2 tcp dport 80 accept"), "{rules}");
        assert!(rules.contains("oifname \"br-one\" iifname != \"br-one\" drop"), "{rules}");
        assert!(!rules.contains("dport 8080") && !rules.contains("10.1.0.0/16 oifname"), "{rules}");
        assert!(!ruleset(&networks, &leases).contains("dport 80 accept"), "one of the host's address is not widened");
    }
}
