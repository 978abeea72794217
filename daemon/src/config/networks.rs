//! What the networks of this host are set up by.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};

use sha2::{Digest as _, Sha256};
use skep_api::{Subnet, SubnetV6};
use skep_engine::{AddressPool, BridgeConfig, HOST_BINDING, Ipv6Side, MTU};

use super::args::{ConfigFile, DaemonArgs};

/// The default bridge, and what other networks get that do not say.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct NetworkSettings {
    pub(crate) bridge: BridgeConfig,
    pub(crate) pools: Vec<AddressPool>,
    /// By driver.
    pub(crate) options: BTreeMap<String, BTreeMap<String, String>>,
    pub(crate) host_gateways: Vec<IpAddr>,
    pub(crate) userland_proxy: bool,
}

impl NetworkSettings {
    pub(super) fn read(args: &DaemonArgs, file: &ConfigFile, problems: &mut Vec<String>) -> Self {
        let mut pools = pools(args, file, problems);
        if pools.is_empty() {
            pools = AddressPool::usual();
        }
        let options = options(args, file, problems);
        let bridge = bridge(args, file, &pools, problems);
        let addresses = args.host_gateway_ips.iter().chain(&file.host_gateway_ip).chain(&file.host_gateway_ips);
        let mut host_gateways: Vec<IpAddr> = Vec::new();
        for text in addresses {
            match text.parse::<IpAddr>() {
                Ok(address) if host_gateways.iter().any(|other| other.is_ipv4() == address.is_ipv4()) => {
                    problems.push(format!("host-gateway-ip {text}: one address of each kind can be named"));
                }
                Ok(address) => host_gateways.push(address),
                Err(_) => problems.push(format!("host-gateway-ip {text:?} is no address")),
            }
        }
        let userland_proxy = args.userland_proxy.or(file.userland_proxy).unwrap_or(true);
        Self { bridge, pools, options, host_gateways, userland_proxy }
    }

    /// Adds what networks of a driver have that do not say.
    pub(crate) fn complete(&self, driver: &str, options: &mut BTreeMap<String, String>) {
        for (name, value) in self.options.get(driver).into_iter().flatten() {
            options.entry(name.clone()).or_insert_with(|| value.clone());
        }
    }
}

fn pools(args: &DaemonArgs, file: &ConfigFile, problems: &mut Vec<String>) -> Vec<AddressPool> {
    let of_file = file.default_address_pools.iter().map(|pool| format!("base={},size={}", pool.base, pool.size));
    let mut pools = Vec::new();
    for text in args.default_address_pools.iter().cloned().chain(of_file) {
        let field = |name: &str| text.split(',').find_map(|part| part.strip_prefix(name)?.strip_prefix('='));
        let base = field("base").and_then(|base| base.parse::<Subnet>().ok());
        let size = field("size").and_then(|size| size.parse::<u8>().ok()).filter(|size| (8..=29).contains(size));
        match (base, size) {
            (Some(base), Some(prefix_len)) if base.prefix_len() <= prefix_len => {
                pools.push(AddressPool { base, prefix_len });
            }
            _ => problems.push(format!(
                "default-address-pool {text:?} cannot be read: write base=172.30.0.0/16,size=24, the size no less than \
                 the base's"
            )),
        }
    }
    pools
}

/// `DRIVER=NAME=VALUE`
fn options(
    args: &DaemonArgs,
    file: &ConfigFile,
    problems: &mut Vec<String>,
) -> BTreeMap<String, BTreeMap<String, String>> {
    let mut options = file.default_network_opts.clone();
    for text in &args.default_network_opts {
        let parts = text.split_once('=').and_then(|(driver, option)| Some((driver, option.split_once('=')?)));
        match parts {
            Some((driver, (name, value))) => {
                drop(options.entry(driver.into()).or_default().insert(name.into(), value.into()));
            }
            None => problems.push(format!("default-network-opt {text:?} cannot be read: write DRIVER=NAME=VALUE")),
        }
    }
    options
}

/// The default bridge; of named pools it has the first subnet.
fn bridge(args: &DaemonArgs, file: &ConfigFile, pools: &[AddressPool], problems: &mut Vec<String>) -> BridgeConfig {
    let mut bridge = BridgeConfig { apart: args.icc.or(file.icc) == Some(false), ..BridgeConfig::default() };
    let is_named = !args.default_address_pools.is_empty() || !file.default_address_pools.is_empty();
    let first = pools.first().filter(|_| is_named).and_then(|pool| pool.base.parts(pool.prefix_len).next());
    if let Some(subnet) = first {
        bridge.gateway = subnet.nth(1).unwrap_or(bridge.gateway);
        bridge.prefix_len = subnet.prefix_len();
    }
    if let Some(text) = args.bip.as_ref().or(file.bip.as_ref()) {
        let parts = text.split_once('/').and_then(|(ip, len)| Some((ip.parse::<Ipv4Addr>().ok()?, len.parse().ok()?)));
        match parts.filter(|(_, len)| (8..=29).contains(len)) {
            Some((gateway, prefix_len)) => (bridge.gateway, bridge.prefix_len) = (gateway, prefix_len),
            None => problems
                .push(format!("bip {text:?} cannot be used: write an address and its subnet's length, 192.168.5.1/24")),
        }
    }
    let subnet = Subnet::new(bridge.gateway, bridge.prefix_len);
    if let Some(text) = args.fixed_cidr.as_ref().or(file.fixed_cidr.as_ref()) {
        bridge.range = text.parse::<Subnet>().ok();
        let fits = |range: Subnet| subnet.is_some_and(|all| all.contains(range.base()) && all.contains(range.last()));
        if !bridge.range.is_some_and(fits) {
            problems.push(format!("fixed-cidr {text:?} cannot be used: write a part of the default bridge's subnet"));
        }
    }
    if let Some(mtu) = args.mtu.or(file.mtu).filter(|mtu| *mtu != 0) {
        if !(68..=65535).contains(&mtu) {
            problems.push(format!("mtu {mtu} cannot be used: write 68 to 65535"));
        }
        bridge.options.insert(MTU.into(), mtu.to_string());
    }
    if let Some(ip) = args.ip.as_ref().or(file.ip.as_ref()) {
        if ip.parse::<Ipv4Addr>().is_err() {
            problems.push(format!("ip {ip:?} is no IPv4 address"));
        }
        bridge.options.insert(HOST_BINDING.into(), ip.clone());
    }
    let fixed_v6 = args.fixed_cidr_v6.as_ref().or(file.fixed_cidr_v6.as_ref());
    if args.ipv6.or(file.ipv6).unwrap_or(false) {
        match fixed_v6.map_or_else(|| Ok(own_subnet()), |text| text.parse::<SubnetV6>()) {
            Ok(subnet) => bridge.v6 = Some(Ipv6Side::new(subnet, None)),
            Err(error) => problems.push(format!("fixed-cidr-v6: {error}")),
        }
    } else if fixed_v6.is_some() {
        problems.push("fixed-cidr-v6 does nothing without ipv6: add it".into());
    }
    bridge
}

/// A subnet of unique local addresses (RFC 4193) that this host has at every start, and most likely no other.
fn own_subnet() -> SubnetV6 {
    let id = std::fs::read_to_string("/etc/machine-id").unwrap_or_default();
    let digest = Sha256::digest(format!("skep bridge {}", id.trim()));
    let groups: Vec<String> = digest[..7].chunks(2).map(hex).collect();
    let text = format!("fd{}:{}:{}:{}::/64", groups[3], groups[0], groups[1], groups[2]);
    text.parse().unwrap_or_else(|_| SubnetV6::unique_local())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(change: impl FnOnce(&mut DaemonArgs)) -> (NetworkSettings, String) {
        let (mut args, mut problems) = (DaemonArgs::default(), Vec::new());
        change(&mut args);
        let settings = NetworkSettings::read(&args, &ConfigFile::default(), &mut problems);
        (settings, problems.join("; "))
    }

    #[test]
    fn the_default_bridge_has_the_first_of_the_pools_or_what_is_said() {
        let (settings, problems) = read(|args| args.default_address_pools = vec!["base=10.99.0.0/16,size=24".into()]);
        assert_eq!(problems, "");
        assert_eq!((settings.bridge.gateway, settings.bridge.prefix_len), (Ipv4Addr::new(10, 99, 0, 1), 24));
        assert_eq!(settings.pools.len(), 1);
        let (settings, problems) = read(|args| {
            args.bip = Some("192.168.5.1/24".into());
            args.fixed_cidr = Some("192.168.5.128/25".into());
            args.mtu = Some(1400);
            args.ip = Some("127.0.0.1".into());
            args.ipv6 = Some(true);
        });
        assert_eq!(problems, "");
        assert_eq!((settings.bridge.gateway, settings.bridge.prefix_len), (Ipv4Addr::new(192, 168, 5, 1), 24));
        assert_eq!(settings.bridge.options[MTU], "1400");
        assert_eq!(settings.bridge.range.unwrap().to_string(), "192.168.5.128/25");
        let subnet = settings.bridge.v6.unwrap().subnet;
        assert!(subnet.to_string().starts_with("fd") && own_subnet() == subnet, "{subnet}");
    }

    #[test]
    fn settings_that_do_not_fit_are_named() {
        let (_, problems) = read(|args| {
            args.bip = Some("192.168.5.1".into());
            args.fixed_cidr = Some("10.0.0.0/8".into());
            args.default_address_pools = vec!["base=10.0.0.0/24,size=16".into()];
            args.fixed_cidr_v6 = Some("fd00::/64".into());
            args.host_gateway_ips = vec!["10.0.0.1".into(), "10.0.0.2".into()];
            args.default_network_opts = vec!["bridge".into()];
            args.mtu = Some(9);
        });
        for part in ["bip", "fixed-cidr \"", "size=16", "without ipv6", "one address of each kind", "DRIVER=", "mtu 9"]
        {
            assert!(problems.contains(part), "{part}: {problems}");
        }
    }
}
