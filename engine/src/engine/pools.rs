//! Where networks get subnets that name none.

use std::net::Ipv4Addr;

use skep_api::Subnet;

use crate::network::LocalNetwork;

/// A pool that networks get subnets of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AddressPool {
    pub base: Subnet,
    /// Of each of the subnets.
    pub prefix_len: u8,
}

impl AddressPool {
    /// As Docker has them, but for what the default bridge takes.
    #[must_use]
    pub fn usual() -> Vec<Self> {
        let pools = [
            (Ipv4Addr::new(172, 18, 0, 0), 15, 16),
            (Ipv4Addr::new(172, 20, 0, 0), 14, 16),
            (Ipv4Addr::new(192, 168, 0, 0), 16, 20),
        ];
        let pool = |(base, len, prefix_len)| Some(Self { base: Subnet::new(base, len)?, prefix_len });
        pools.into_iter().filter_map(pool).collect()
    }
}

/// A subnet that neither another network nor a route of the host's has.
pub(super) fn free_subnet(all: &[LocalNetwork], pools: &[AddressPool]) -> Option<Subnet> {
    let routes = std::fs::read_to_string("/proc/net/route").unwrap_or_default();
    let routed: Vec<Subnet> = routes.lines().skip(1).filter_map(route).collect();
    let pools = pools.iter();
    pools.flat_map(|pool| pool.base.parts(pool.prefix_len).collect::<Vec<_>>()).find(|subnet| {
        !all.iter()
            .filter_map(|n| n.v4.as_ref())
            .map(|v4| v4.subnet)
            .chain(routed.iter().copied())
            .any(|other| other.overlaps(*subnet))
    })
}

/// A line of /proc/net/route; the default route is nobody's subnet.
fn route(line: &str) -> Option<Subnet> {
    let fields: Vec<&str> = line.split_whitespace().collect();
    let number = |text: &str| u32::from_str_radix(text, 16).ok().map(u32::from_be);
    let (base, mask) = (number(fields.get(1)?)?, number(fields.get(7)?)?);
    (mask != 0).then(|| Subnet::new(Ipv4Addr::from(base), u8::try_from(mask.count_ones()).unwrap_or(32))).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::network::Ipv4Side;

    #[test]
    fn routes_are_read_and_their_subnets_avoided() {
        let line = "eth0\t00004D0A\t00000000\t0001\t0\t0\t0\t0000FFFF\t0\t0\t0";
        assert_eq!(route(line).unwrap().to_string(), "10.77.0.0/16");
        assert_eq!(route("eth0\t00000000\t0100000A\t0003\t0\t0\t0\t00000000\t0\t0\t0"), None);
        let first = free_subnet(&[], &AddressPool::usual()).unwrap();
        let taken = LocalNetwork::new("taken", Some(Ipv4Side::new(first)));
        assert!(!free_subnet(&[taken], &AddressPool::usual()).unwrap().overlaps(first));
    }
}
