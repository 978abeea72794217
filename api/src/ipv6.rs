//! The IPv6 side of the swarm's networks: addresses that follow from IPv4 ones, so that nobody need give
//! them out, stream them or give them back.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use bincode::{Decode, Encode};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::subnet::Subnet;

/// A text that names no network.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no IPv6 network: write it as fd00:1::/64")]
pub struct ParseSubnetV6Error(pub String);

/// An IPv6 network. The address is its first: bits beyond the prefix are zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode)]
pub struct SubnetV6 {
    base: Ipv6Addr,
    prefix_len: u8,
}

impl SubnetV6 {
    /// The network of `prefix_len` bits that `addr` lies in; `None` beyond 128 bits.
    #[must_use]
    pub fn new(addr: Ipv6Addr, prefix_len: u8) -> Option<Self> {
        (prefix_len <= 128).then(|| Self { base: Ipv6Addr::from(u128::from(addr) & mask(prefix_len)), prefix_len })
    }

    /// One that is nobody else's, as chance has it (RFC 4193).
    #[must_use]
    pub fn unique_local() -> Self {
        const PREFIX_LEN: u8 = 64;
        let chosen = u128::from(rand::random::<u64>() & ((1 << 56) - 1));
        Self { base: Ipv6Addr::from((0xfd << 56 | chosen) << 64), prefix_len: PREFIX_LEN }
    }

    #[must_use]
    pub const fn base(self) -> Ipv6Addr {
        self.base
    }

    #[must_use]
    pub const fn prefix_len(self) -> u8 {
        self.prefix_len
    }

    /// The address `offset` behind the first; `None` outside.
    #[must_use]
    pub fn nth(self, offset: u128) -> Option<Ipv6Addr> {
        u128::from(self.base).checked_add(offset).map(Ipv6Addr::from).filter(|&addr| self.contains(addr))
    }

    #[must_use]
    pub fn contains(self, addr: Ipv6Addr) -> bool {
        u128::from(addr) & mask(self.prefix_len) == u128::from(self.base)
    }

    #[must_use]
    pub fn overlaps(self, other: Self) -> bool {
        self.contains(other.base) || other.contains(self.base)
    }

    fn offset(self, addr: Ipv6Addr) -> u128 {
        u128::from(addr) - u128::from(self.base)
    }
}

const fn mask(prefix_len: u8) -> u128 {
    if prefix_len == 0 { 0 } else { u128::MAX << (128 - prefix_len) }
}

impl fmt::Display for SubnetV6 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.base, self.prefix_len)
    }
}

impl FromStr for SubnetV6 {
    type Err = ParseSubnetV6Error;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let parsed = text.split_once('/').and_then(|(addr, len)| Self::new(addr.parse().ok()?, len.parse().ok()?));
        parsed.ok_or_else(|| ParseSubnetV6Error(text.to_owned()))
    }
}

impl Serialize for SubnetV6 {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for SubnetV6 {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// The IPv6 side of a network that has `subnet` as well: who has its n-th address has this one's n-th.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode)]
pub struct Ipv6Side {
    pub subnet: SubnetV6,
    pub gateway: Ipv6Addr,
}

impl Ipv6Side {
    /// The side of a network with the IPv4 addresses of `v4`, of which `gateway_v4` is the gateway's. Says why
    /// not if its addresses are too few, or the gateway's would be a task's as well.
    pub fn new(subnet: SubnetV6, gateway: Option<Ipv6Addr>, v4: Subnet, gateway_v4: Ipv4Addr) -> Result<Self, String> {
        if 128 - subnet.prefix_len < 32 - v4.prefix_len() {
            return Err(format!("subnet {subnet} has fewer addresses than {v4}: choose a larger one"));
        }
        let follows = address(subnet, v4, gateway_v4);
        let gateway = gateway.unwrap_or(follows);
        if !subnet.contains(gateway) || gateway == subnet.base {
            return Err(format!("gateway {gateway} is no host's address in subnet {subnet}"));
        }
        if gateway != follows && subnet.offset(gateway) < u128::from(v4.len()) {
            return Err(format!(
                "gateway {gateway} would be a task's address, too, as those follow from {v4}: choose {follows}, or one \
                 behind the first {} of subnet {subnet}",
                v4.len()
            ));
        }
        Ok(Self { subnet, gateway })
    }

    /// The address of who has `host` in `v4`.
    #[must_use]
    pub fn address(self, v4: Subnet, host: Ipv4Addr) -> Ipv6Addr {
        address(self.subnet, v4, host)
    }

    /// Which address in `v4` leads to `addr`; none if none does.
    #[must_use]
    pub fn host(self, v4: Subnet, addr: Ipv6Addr) -> Option<Ipv4Addr> {
        self.subnet.contains(addr).then(|| self.subnet.offset(addr)).and_then(|n| v4.nth(u64::try_from(n).ok()?))
    }
}

fn address(subnet: SubnetV6, v4: Subnet, host: Ipv4Addr) -> Ipv6Addr {
    Ipv6Addr::from(u128::from(subnet.base) + u128::from(v4.offset(host)))
}

/// A network of either kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode)]
pub enum IpSubnet {
    V4(Subnet),
    V6(SubnetV6),
}

impl IpSubnet {
    #[must_use]
    pub fn contains(self, addr: IpAddr) -> bool {
        match (self, addr) {
            (Self::V4(subnet), IpAddr::V4(addr)) => subnet.contains(addr),
            (Self::V6(subnet), IpAddr::V6(addr)) => subnet.contains(addr),
            (Self::V4(_), IpAddr::V6(_)) | (Self::V6(_), IpAddr::V4(_)) => false,
        }
    }
}

impl FromStr for IpSubnet {
    type Err = ParseSubnetV6Error;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        text.parse().map(Self::V4).or_else(|_| text.parse().map(Self::V6))
    }
}

impl fmt::Display for IpSubnet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::V4(subnet) => subnet.fmt(f),
            Self::V6(subnet) => subnet.fmt(f),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GATEWAY_V4: Ipv4Addr = Ipv4Addr::new(10, 5, 0, 1);

    fn side(subnet: &str, gateway: Option<&str>) -> Result<Ipv6Side, String> {
        let gateway = gateway.map(|text| text.parse().unwrap());
        Ipv6Side::new(subnet.parse().unwrap(), gateway, "10.5.0.0/24".parse().unwrap(), GATEWAY_V4)
    }

    #[test]
    fn addresses_follow_from_ipv4_and_lead_back() {
        let v4 = "10.5.0.0/24".parse().unwrap();
        let side = side("fd00:5::7/64", None).unwrap();
        assert_eq!((side.subnet.to_string(), side.gateway.to_string()), ("fd00:5::/64".into(), "fd00:5::1".into()));
        let host = Ipv4Addr::new(10, 5, 0, 200);
        let address = side.address(v4, host);
        assert_eq!(address.to_string(), "fd00:5::c8");
        assert_eq!(side.host(v4, address), Some(host));
        assert_eq!(side.host(v4, "fd00:5::1:0".parse().unwrap()), None);
        assert_eq!(side.host(v4, "fd00:6::2".parse().unwrap()), None);
    }

    #[test]
    fn what_would_give_an_address_twice_is_refused() {
        let refused = |subnet: &str, gateway: Option<&str>| side(subnet, gateway).unwrap_err();
        assert!(refused("fd00:5::/121", None).contains("fewer addresses than 10.5.0.0/24"));
        assert!(refused("fd00:5::/64", Some("fd00:5::7")).contains("choose fd00:5::1"));
        assert!(refused("fd00:5::/64", Some("fd00:6::1")).contains("no host's address"));
        assert_eq!(side("fd00:5::/120", None).unwrap().gateway.to_string(), "fd00:5::1");
        assert_eq!(side("fd00:5::/64", Some("fd00:5::1:0")).unwrap().gateway.to_string(), "fd00:5::1:0");
    }

    #[test]
    fn networks_are_read_and_chosen() {
        for wrong in ["fd00::", "fd00::/129", "10.0.0.0/8", "x/64"] {
            assert!(wrong.parse::<SubnetV6>().is_err(), "{wrong}");
        }
        let [one, other] = [SubnetV6::unique_local(), SubnetV6::unique_local()];
        let subnet: SubnetV6 = "fd00::4/126".parse().unwrap();
        let hosts: Vec<String> = (0..).map_while(|n| subnet.nth(n)).map(|addr| addr.to_string()).collect();
        assert_eq!(hosts, ["fd00::4", "fd00::5", "fd00::6", "fd00::7"]);
        assert!(!one.overlaps(other) && one.base().segments()[0] >> 8 == 0xfd);
        assert!(IpSubnet::V6(one).contains(one.base().into()) && !IpSubnet::V6(one).contains(GATEWAY_V4.into()));
    }
}
