//! The rules of the host's networks, as one text that `nft` reads: replacing a table is one step for
//! the kernel.

use std::collections::BTreeMap;

use crate::network::LocalNetwork;
use crate::network::lease::Lease;

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
}

const IPV4: Family = Family { table: TABLE, name: "ip", loopback: Some("127.0.0.0/8"), unpublished: "" };

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
    published: &str,
) -> String {
    let Family { table, name, loopback, unpublished } = family;
    let (mut masquerade, mut forward, mut direct, mut isolation) =
        (String::new(), String::new(), String::new(), String::new());
    for (network, subnet) in sides {
        let device = &network.device;
        if network.masquerade && !network.internal {
            masquerade += &format!("    {name} saddr {subnet} oifname != \"{device}\" masquerade\n");
        }
        // Containers are reached by their published ports; what comes for their own addresses from
        // elsewhere is refused before any port is led in.
        if !network.is_routed() {
            direct += &format!("    {name} daddr {subnet} iifname != {{ \"{device}\", \"lo\" }} drop\n");
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
    if !isolation.is_empty() {
        forward += "    ct state established,related accept\n    ct status dnat accept\n";
    }
    format!(
        "table {table} {{\n\
         \x20 chain publish {{\n{unpublished}{published}  }}\n\
         \x20 chain direct {{\n    type filter hook prerouting priority -300\n{direct}  }}\n\
         \x20 chain prerouting {{\n    type nat hook prerouting priority -100\n\
         \x20   fib daddr type local jump publish\n  }}\n\
         \x20 chain output {{\n    type nat hook output priority -100\n\
         \x20   fib daddr type local jump publish\n  }}\n\
         \x20 chain forward {{\n    type filter hook forward priority 0\n{forward}{isolation}  }}\n\
         \x20 chain postrouting {{\n    type nat hook postrouting priority 100\n{masquerade}  }}\n}}\n"
    )
}

fn published(networks: &BTreeMap<String, LocalNetwork>, leases: &BTreeMap<String, Lease>) -> String {
    let mut dnat = String::new();
    for lease in leases.values() {
        let outward = |network: &str| networks.get(network).is_some_and(|network| !network.internal);
        let own = lease.places.iter().filter(|place| outward(&place.network)).find_map(|place| place.address);
        for port in &lease.ports {
            let to = match (lease.through, own) {
                (Some(through), _) => through.to_string(),
                (None, Some(address)) => format!("{address}:{}", port.container_port),
                (None, None) => continue,
            };
            let at = if port.host_ip.is_unspecified() { String::new() } else { format!("ip daddr {} ", port.host_ip) };
            dnat += &format!("    {at}{} dport {} dnat to {to}\n", port.protocol.as_str(), port.host_port);
        }
    }
    dnat
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use skep_api::service::Protocol;

    use super::*;
    use crate::container::config::PublishedPort;
    use crate::network::lease::Held;
    use crate::network::{GATEWAY_MODE, Ipv4Side};

    #[test]
    fn rules_lead_ports_in_and_keep_networks_apart() {
        let network = |name: &str, subnet: &str| {
            (name.to_owned(), LocalNetwork::new(name, Some(Ipv4Side::new(subnet.parse().unwrap()))))
        };
        let mut networks = BTreeMap::from([network("one", "10.1.0.0/16"), network("two", "10.2.0.0/16")]);
        let port = PublishedPort {
            protocol: Protocol::Tcp,
            container_port: 80,
            host_ip: Ipv4Addr::LOCALHOST,
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
    }
}
