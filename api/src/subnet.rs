//! IPv4 networks: `10.0.1.0/24`, and the arithmetic over them.

use std::fmt;
use std::net::Ipv4Addr;
use std::str::FromStr;

use bincode::{Decode, Encode};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A text that names no network.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no IPv4 network: write it as 10.0.1.0/24")]
pub struct ParseSubnetError(pub String);

/// An IPv4 network. The address is its first: bits beyond the prefix are zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode)]
pub struct Subnet {
    base: Ipv4Addr,
    prefix_len: u8,
}

impl Subnet {
    /// The network of `prefix_len` bits that `addr` lies in; `None` beyond 32 bits.
    #[must_use]
    pub fn new(addr: Ipv4Addr, prefix_len: u8) -> Option<Self> {
        (prefix_len <= 32).then(|| Self { base: Ipv4Addr::from(u32::from(addr) & mask(prefix_len)), prefix_len })
    }

    #[must_use]
    pub const fn base(self) -> Ipv4Addr {
        self.base
    }

    #[must_use]
    pub const fn prefix_len(self) -> u8 {
        self.prefix_len
    }

    /// How many addresses it has, the first and the last among them.
    #[must_use]
    pub const fn len(self) -> u64 {
        1 << (32 - self.prefix_len)
    }

    /// A network always has an address.
    #[must_use]
    pub const fn is_empty(self) -> bool {
        false
    }

    #[must_use]
    pub fn last(self) -> Ipv4Addr {
        Ipv4Addr::from(u32::from(self.base) | !mask(self.prefix_len))
    }

    /// The address `offset` behind the first; `None` outside.
    #[must_use]
    pub fn nth(self, offset: u64) -> Option<Ipv4Addr> {
        let offset = u32::try_from(offset).ok().filter(|&offset| u64::from(offset) < self.len())?;
        Some(Ipv4Addr::from(u32::from(self.base) + offset))
    }

    #[must_use]
    pub fn contains(self, addr: Ipv4Addr) -> bool {
        u32::from(addr) & mask(self.prefix_len) == u32::from(self.base)
    }

    #[must_use]
    pub fn overlaps(self, other: Self) -> bool {
        self.contains(other.base) || other.contains(self.base)
    }

    /// Its parts of `prefix_len` bits, in order; none if they would be larger than it.
    pub fn parts(self, prefix_len: u8) -> impl Iterator<Item = Self> {
        let count =
            if prefix_len < self.prefix_len || prefix_len > 32 { 0 } else { 1u64 << (prefix_len - self.prefix_len) };
        let step = 1u64 << (32 - prefix_len.min(32));
        (0..count).filter_map(move |number| Some(Self { base: self.nth(number * step)?, prefix_len }))
    }

    /// An address that hosts may have and `taken` does not name, looked for from `from` on and then
    /// from the start: what was given back last is used last.
    #[must_use]
    pub fn free_host(self, from: u64, taken: impl Fn(Ipv4Addr) -> bool) -> Option<Ipv4Addr> {
        // The first and the last address of a network are not for hosts.
        let hosts = 1..self.len().saturating_sub(1).max(1);
        let from = from.clamp(hosts.start, hosts.end);
        (from..hosts.end).chain(hosts.start..from).filter_map(|offset| self.nth(offset)).find(|&addr| !taken(addr))
    }

    /// How far `addr` lies behind the first address.
    #[must_use]
    pub fn offset(self, addr: Ipv4Addr) -> u64 {
        u64::from(u32::from(addr).saturating_sub(u32::from(self.base)))
    }
}

const fn mask(prefix_len: u8) -> u32 {
    if prefix_len == 0 { 0 } else { u32::MAX << (32 - prefix_len) }
}

impl fmt::Display for Subnet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.base, self.prefix_len)
    }
}

impl FromStr for Subnet {
    type Err = ParseSubnetError;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let parsed = text.split_once('/').and_then(|(addr, len)| Self::new(addr.parse().ok()?, len.parse().ok()?));
        parsed.ok_or_else(|| ParseSubnetError(text.to_owned()))
    }
}

impl Serialize for Subnet {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Subnet {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn subnet(text: &str) -> Subnet {
        text.parse().unwrap()
    }

    #[test]
    fn networks_are_read_and_written() {
        assert_eq!(subnet("10.0.1.7/24").to_string(), "10.0.1.0/24");
        assert_eq!(subnet("10.0.1.0/24").last(), Ipv4Addr::new(10, 0, 1, 255));
        for wrong in ["10.0.1.0", "10.0.1.0/33", "x/8", "fd00::/64"] {
            assert!(wrong.parse::<Subnet>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn parts_cover_a_pool_and_do_not_overlap() {
        let parts: Vec<_> = subnet("10.0.0.0/22").parts(24).map(|part| part.to_string()).collect();
        assert_eq!(parts, ["10.0.0.0/24", "10.0.1.0/24", "10.0.2.0/24", "10.0.3.0/24"]);
        assert_eq!(subnet("10.0.0.0/24").parts(16).count(), 0);
        assert!(subnet("10.0.0.0/16").overlaps(subnet("10.0.3.0/24")));
        assert!(!subnet("10.0.2.0/24").overlaps(subnet("10.0.3.0/24")));
    }

    #[test]
    fn a_full_network_gives_nothing_and_a_small_one_what_it_has() {
        let tiny = subnet("10.0.0.0/30");
        assert_eq!(tiny.free_host(0, |_| false), Some(Ipv4Addr::new(10, 0, 0, 1)));
        assert_eq!(tiny.free_host(2, |addr| addr == Ipv4Addr::new(10, 0, 0, 2)), Some(Ipv4Addr::new(10, 0, 0, 1)));
        assert_eq!(tiny.free_host(0, |_| true), None);
        assert_eq!(subnet("10.0.0.1/32").free_host(0, |_| false), None);
    }

    proptest! {
        #[test]
        fn a_free_host_lies_inside_and_is_never_taken(
            base in any::<u32>(), len in 24u8..=30, from in any::<u64>(), taken in proptest::collection::btree_set(0u64..256, 0..64)
        ) {
            let network = Subnet::new(Ipv4Addr::from(base), len).unwrap();
            let taken: std::collections::BTreeSet<_> = taken.into_iter().filter_map(|n| network.nth(n)).collect();
            match network.free_host(from, |addr| taken.contains(&addr)) {
                Some(addr) => {
                    prop_assert!(network.contains(addr) && !taken.contains(&addr));
                    prop_assert!(addr != network.base() && addr != network.last());
                }
                None => prop_assert!((1..network.len() - 1).all(|n| taken.contains(&network.nth(n).unwrap()))),
            }
        }
    }
}
