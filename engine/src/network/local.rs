//! What a network of this host's is.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};

use serde::{Deserialize, Serialize};
use skep_api::{Subnet, Timestamp};

use super::{Ipv6Side, Parent};

/// The network that every host has.
pub const DEFAULT_NETWORK: &str = "bridge";

/// The options that say how a network is reached by each family, as Docker calls them.
pub(crate) const GATEWAY_MODE: &str = "com.docker.network.bridge.gateway_mode_ipv4";
pub(crate) const GATEWAY_MODE_V6: &str = "com.docker.network.bridge.gateway_mode_ipv6";
/// The host's addresses that packets from a network have outside, by family.
pub(crate) const HOST_SOURCE: &str = "com.docker.network.host_ipv4";
pub(crate) const HOST_SOURCE_V6: &str = "com.docker.network.host_ipv6";

/// How a network's containers are reached from outside of the host by one family of addresses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum GatewayMode {
    /// By the host's address at published ports alone; what they send has the host's address.
    #[default]
    Nat,
    /// By their own addresses, too, at every port.
    NatUnprotected,
    /// By their own addresses alone, at published ports; what they send has those.
    Routed,
    /// Not even by the host, which has no address there.
    Isolated,
}

impl GatewayMode {
    /// Every mode's word.
    pub(crate) const WORDS: [(&str, Self); 4] = [
        ("nat", Self::Nat),
        ("nat-unprotected", Self::NatUnprotected),
        ("routed", Self::Routed),
        ("isolated", Self::Isolated),
    ];
}

/// How many bytes a packet of a network's may have.
pub const MTU: &str = "com.docker.network.driver.mtu";
/// The host's address that ports are published on unless another is named.
pub const HOST_BINDING: &str = "com.docker.network.bridge.host_binding_ipv4";

/// How the default bridge is set up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BridgeConfig {
    pub name: String,
    /// The first address of the bridge's network, with the prefix length.
    pub gateway: Ipv4Addr,
    pub prefix_len: u8,
    /// Where addresses are picked; the whole subnet if absent.
    pub range: Option<Subnet>,
    /// None: it has IPv4 alone.
    pub v6: Option<Ipv6Side>,
    /// Whether its containers do not reach each other.
    pub apart: bool,
    /// As for a network that is made.
    pub options: BTreeMap<String, String>,
}

impl Default for BridgeConfig {
    fn default() -> Self {
        Self {
            name: "skep0".into(),
            gateway: Ipv4Addr::new(172, 17, 0, 1),
            prefix_len: 16,
            range: None,
            v6: None,
            apart: false,
            options: BTreeMap::new(),
        }
    }
}

/// A network of this host's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LocalNetwork {
    pub id: String,
    pub name: String,
    pub created: Timestamp,
    pub labels: BTreeMap<String, String>,
    pub options: BTreeMap<String, String>,
    /// Told again, and without a meaning here.
    #[serde(default)]
    pub ipam_options: BTreeMap<String, String>,
    /// The same.
    #[serde(default)]
    pub attachable: bool,
    /// None: it has IPv6 alone.
    #[serde(flatten)]
    pub v4: Option<Ipv4Side>,
    /// Whether nothing of it gets out, nor anything in.
    pub internal: bool,
    /// Whether what gets out has the host's address.
    pub masquerade: bool,
    /// Whether its containers do not reach each other.
    #[serde(default)]
    pub apart: bool,
    /// The name of the network's own link on the host; none if it has none.
    pub device: String,
    /// The link that its containers stand on; none: a bridge of its own.
    #[serde(default)]
    pub parent: Option<Parent>,
    /// None: it has IPv4 alone.
    #[serde(default)]
    pub v6: Option<Ipv6Side>,
}

/// A network's IPv4 addresses.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ipv4Side {
    pub subnet: Subnet,
    /// Where addresses are picked; the whole subnet if absent.
    pub range: Option<Subnet>,
    pub gateway: Ipv4Addr,
    /// Addresses that are somebody else's, by name.
    pub reserved: BTreeMap<String, Ipv4Addr>,
}

impl Ipv4Side {
    /// On a subnet, with its first address for the gateway.
    #[must_use]
    pub fn new(subnet: Subnet) -> Self {
        let gateway = subnet.nth(1).unwrap_or_else(|| subnet.base());
        Self { subnet, range: None, gateway, reserved: BTreeMap::new() }
    }
}

impl LocalNetwork {
    /// The usual network with these addresses.
    #[must_use]
    pub fn new(id: &str, v4: Option<Ipv4Side>) -> Self {
        Self {
            id: id.to_owned(),
            name: id.to_owned(),
            created: Timestamp::NEVER,
            labels: BTreeMap::new(),
            options: BTreeMap::new(),
            ipam_options: BTreeMap::new(),
            attachable: false,
            v4,
            internal: false,
            masquerade: true,
            apart: false,
            // The kernel takes 15 bytes.
            device: format!("br-{}", &id[..id.len().min(12)]),
            parent: None,
            v6: None,
        }
    }

    /// How it is reached by the family whose mode stands in the option `key`.
    pub(crate) fn gateway_mode(&self, key: &str) -> GatewayMode {
        let word = self.options.get(key).map(String::as_str);
        GatewayMode::WORDS
            .iter()
            .find(|(known, _)| Some(*known) == word)
            .map_or_else(GatewayMode::default, |found| found.1)
    }

    /// Whether ports of its containers are led in at the host's addresses by the family whose mode stands in the option
    /// `key`.
    pub(crate) fn is_translated(&self, key: &str) -> bool {
        self.gateway_mode(key) != GatewayMode::Routed
    }

    /// Whether ports of its containers are the host's by IPv4, or by IPv6.
    pub(crate) fn leads_ports(&self, v6: bool) -> bool {
        let (there, mode) = match v6 {
            true => (self.v6.is_some(), self.gateway_mode(GATEWAY_MODE_V6)),
            false => (self.v4.is_some(), self.gateway_mode(GATEWAY_MODE)),
        };
        there && !self.internal && mode != GatewayMode::Routed
    }

    /// What its containers reach the host by: IPv4, where they have it.
    pub(crate) fn host_address(&self) -> Option<IpAddr> {
        let v4 = self.v4.as_ref().map(|v4| v4.gateway.into());
        v4.or_else(|| self.v6.as_ref().map(|v6| v6.gateway.into()))
    }

    /// How many bytes a packet may have, if that is said.
    pub(super) fn mtu(&self) -> Option<u32> {
        self.options.get(MTU)?.parse().ok()
    }

    /// The host's address that ports are published on unless another is named.
    #[must_use]
    pub fn host_binding(&self) -> Option<Ipv4Addr> {
        self.options.get(HOST_BINDING)?.parse().ok()
    }

    /// What dockerd calls the way its containers are linked.
    #[must_use]
    pub const fn driver(&self) -> &'static str {
        if self.parent.is_some() { "macvlan" } else { "bridge" }
    }

    pub(crate) fn stands_on(&self, link: &str) -> bool {
        self.parent.as_ref().is_some_and(|parent| parent.link == link)
    }

    pub(super) fn has_names(&self) -> bool {
        self.id != DEFAULT_NETWORK
    }
}
