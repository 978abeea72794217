//! The rules of the host's networks, as one text that `nft` reads: replacing a table is one step for
//! the kernel.

use std::collections::BTreeMap;

use crate::network::LocalNetwork;
use crate::network::lease::Lease;

/// What the table is called, with its family.
pub(super) const TABLE: &str = "ip skep";

/// The whole table.
pub(crate) fn ruleset(networks: &BTreeMap<String, LocalNetwork>, leases: &BTreeMap<String, Lease>) -> String {
    let dnat = published(networks, leases);
    let (mut masquerade, mut forward, mut direct) = (String::new(), String::new(), String::new());
    for network in networks.values() {
        let (device, subnet) = (&network.device, network.subnet);
        if network.masquerade && !network.internal {
            masquerade += &format!("    ip saddr {subnet} oifname != \"{device}\" masquerade\n");
        }
        // Containers are reached by their published ports; what comes for their own addresses from
        // elsewhere is refused before any port is led in.
        if !network.is_routed() {
            direct += &format!("    ip daddr {subnet} iifname != {{ \"{device}\", \"lo\" }} drop\n");
        }
        masquerade += &format!("    ip saddr 127.0.0.0/8 oifname \"{device}\" masquerade\n");
        masquerade += &format!("    ip saddr {subnet} ip daddr {subnet} ct status dnat masquerade\n");
        if network.internal {
            forward += &format!("    iifname \"{device}\" oifname != \"{device}\" drop\n");
            forward += &format!("    oifname \"{device}\" iifname != \"{device}\" drop\n");
        }
    }
    // What a port leads to may be reached from everywhere; else networks do not see each other.
    let devices: Vec<_> = networks.values().map(|network| format!("\"{}\"", network.device)).collect();
    let mut isolation = String::new();
    if devices.len() > 1 {
        isolation += "    ct state established,related accept\n    ct status dnat accept\n";
        for network in networks.values() {
            let others: Vec<_> =
                devices.iter().filter(|device| **device != format!("\"{}\"", network.device)).cloned().collect();
            isolation += &format!("    iifname \"{}\" oifname {{ {} }} drop\n", network.device, others.join(", "));
        }
    }
    format!(
        "table {TABLE} {{}}\ndelete table {TABLE}\ntable {TABLE} {{\n\
         \x20 chain publish {{\n{dnat}  }}\n\
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
        let own = lease.places.iter().find(|place| outward(&place.network)).map(|place| place.address);
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
    use crate::network::GATEWAY_MODE;
    use crate::network::lease::Held;

    #[test]
    fn rules_lead_ports_in_and_keep_networks_apart() {
        let network = |name: &str, subnet: &str| (name.to_owned(), LocalNetwork::new(name, subnet.parse().unwrap()));
        let mut networks = BTreeMap::from([network("one", "10.1.0.0/16"), network("two", "10.2.0.0/16")]);
        let port = PublishedPort {
            protocol: Protocol::Tcp,
            container_port: 80,
            host_ip: Ipv4Addr::LOCALHOST,
            host_port: 8080,
        };
        let place = Held {
            network: "one".into(),
            address: Ipv4Addr::new(10, 1, 0, 2),
            address_v6: None,
            names: Vec::new(),
            link: 0,
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
