//! Networks of the swarm: overlays that tasks on any node share.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, Ipv6Addr};

use skep_api_derive::Extensible;

use crate::container::Driver;
use crate::id::NetworkId;
use crate::ipv6::{Ipv6Side, SubnetV6};
use crate::name::{NameError, check_network_name};
use crate::object::Meta;
use crate::subnet::Subnet;

/// The network that published ports come in through; made with the swarm.
pub const INGRESS_NAME: &str = "ingress";
/// The driver's option that says whether traffic between nodes is encrypted.
const ENCRYPTED: &str = "encrypted";
const MTU: &str = "com.docker.network.driver.mtu";
/// Fewer addresses than gateway, one VIP and one task need are of no use.
const PREFIX_LEN_MAX: u8 = 29;
/// What every link with IPv6 must take (RFC 8200 §5).
pub const IPV6_MTU_BYTES_MIN: u32 = 1280;
const MTU_BYTES: std::ops::RangeInclusive<u32> = 576..=65_000;

/// What a user declares of a network.
#[derive(Clone, Debug, Default, PartialEq, Extensible)]
pub struct NetworkSpec {
    pub name: String,
    pub labels: BTreeMap<String, String>,
    pub driver: Driver,
    pub ipam: Ipam,
    /// Whether it has IPv6 addresses as well.
    pub ipv6: bool,
    /// Nothing goes from it to the outside.
    pub internal: bool,
    /// Single containers may join it, too.
    pub attachable: bool,
    pub ingress: bool,
}

/// Which addresses a network should have; what is left open is picked.
#[derive(Clone, Debug, Default, PartialEq, Extensible)]
pub struct Ipam {
    pub driver: String,
    pub options: BTreeMap<String, String>,
    pub subnet: Option<Subnet>,
    /// The part of the subnet that tasks get addresses of.
    pub range: Option<Subnet>,
    pub gateway: Option<Ipv4Addr>,
    /// Addresses that are somebody else's.
    pub reserved: BTreeMap<String, Ipv4Addr>,
    pub subnet_v6: Option<SubnetV6>,
    pub gateway_v6: Option<Ipv6Addr>,
}

/// A network as it is stored.
#[derive(Clone, Debug, PartialEq, Extensible)]
pub struct Network {
    pub id: NetworkId,
    pub meta: Meta,
    pub spec: NetworkSpec,
    pub subnet: Subnet,
    pub gateway: Ipv4Addr,
    pub v6: Option<Ipv6Side>,
    /// Where the next address is looked for. A hint: which addresses are taken is read off the
    /// services and tasks that have them, so none can leak. Its change makes two writers that give
    /// out addresses of one network at the same time notice each other.
    pub cursor: u64,
}

impl Network {
    /// Whether traffic between nodes is encrypted: unless the user said no.
    #[must_use]
    pub fn is_encrypted(&self) -> bool {
        self.spec.is_encrypted()
    }

    /// The largest packet, if the user set it.
    #[must_use]
    pub fn mtu_bytes(&self) -> Option<u32> {
        self.spec.mtu_bytes()
    }

    /// The addresses that neither a service nor a task may have.
    #[must_use]
    pub fn reserved(&self) -> BTreeSet<Ipv4Addr> {
        self.spec.ipam.reserved.values().copied().chain([self.gateway]).collect()
    }

    /// The IPv6 address of who has `host` here.
    #[must_use]
    pub fn address_v6(&self, host: Ipv4Addr) -> Option<Ipv6Addr> {
        self.v6.map(|side| side.address(self.subnet, host))
    }

    /// Where addresses are given out from.
    #[must_use]
    pub fn range(&self) -> Subnet {
        self.spec.ipam.range.unwrap_or(self.subnet)
    }
}

/// Why a network is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NetworkSpecError {
    #[error(transparent)]
    Name(#[from] NameError),
    #[error("{what} is not supported yet{instead}")]
    Unsupported { what: String, instead: &'static str },
    #[error("{0}")]
    Invalid(String),
}

fn invalid(message: String) -> NetworkSpecError {
    NetworkSpecError::Invalid(message)
}

impl NetworkSpec {
    /// The network that published ports come in through.
    #[must_use]
    pub fn ingress() -> Self {
        let (name, driver) = (INGRESS_NAME.to_owned(), Driver::named("overlay"));
        Self { name, driver, ingress: true, ipv6: true, ..Self::default() }
    }

    /// The largest packet, if the user set it.
    #[must_use]
    pub fn mtu_bytes(&self) -> Option<u32> {
        self.driver.options.get(MTU).and_then(|text| text.parse().ok())
    }

    #[must_use]
    pub fn is_encrypted(&self) -> bool {
        !matches!(self.driver.options.get(ENCRYPTED).map(String::as_str), Some("false" | "0" | "no"))
    }

    /// Checks all that can be known without the swarm's other networks.
    pub fn validate(&self) -> Result<(), NetworkSpecError> {
        check_network_name(&self.name)?;
        let unsupported = |what: &str, instead| NetworkSpecError::Unsupported { what: what.to_owned(), instead };
        if self.driver.name != "overlay" {
            return Err(unsupported(&format!("network driver {:?} for a swarm", self.driver.name), ": use overlay"));
        }
        if !matches!(self.ipam.driver.as_str(), "" | "default") {
            return Err(unsupported(&format!("IPAM driver {:?}", self.ipam.driver), ": use default"));
        }
        if self.ingress && self.attachable {
            return Err(invalid("an ingress network cannot be attachable: choose one of the two".into()));
        }
        if self.ingress && self.internal {
            return Err(invalid("an ingress network cannot be internal: ports are published through it".into()));
        }
        match self.driver.options.get(ENCRYPTED).map(String::as_str) {
            None | Some("" | "true" | "1" | "yes" | "false" | "0" | "no") => {}
            Some(other) => return Err(invalid(format!("option encrypted={other:?} is neither true nor false"))),
        }
        if let Some(text) = self.driver.options.get(MTU)
            && !text.parse().is_ok_and(|mtu: u32| MTU_BYTES.contains(&mtu))
        {
            return Err(invalid(format!("option {MTU}={text:?} is no packet size from 576 to 65000 bytes")));
        }
        if self.ipv6 && self.mtu_bytes().is_some_and(|bytes| bytes < IPV6_MTU_BYTES_MIN) {
            return Err(invalid(format!(
                "IPv6 takes packets of {IPV6_MTU_BYTES_MIN} bytes: set {MTU} to as many or more"
            )));
        }
        self.validate_addresses()
    }

    fn validate_addresses(&self) -> Result<(), NetworkSpecError> {
        let Ipam { subnet, range, gateway, reserved, subnet_v6, gateway_v6, .. } = &self.ipam;
        if let Some(subnet) = subnet_v6.filter(|_| !self.ipv6) {
            return Err(invalid(format!("subnet {subnet} is of IPv6: ask for that by EnableIPv6 (--ipv6)")));
        }
        if let Some(gateway) = gateway_v6.filter(|_| subnet_v6.is_none()) {
            return Err(invalid(format!("gateway {gateway} needs an IPv6 --subnet beside it")));
        }
        let Some(subnet) = subnet else {
            if range.is_some() || gateway.is_some() || !reserved.is_empty() {
                return Err(invalid("--ip-range, --gateway and --aux-address need --subnet beside them".into()));
            }
            return Ok(());
        };
        if !(8..=PREFIX_LEN_MAX).contains(&subnet.prefix_len()) {
            return Err(invalid(format!("subnet {subnet} is not possible: from /8 to /{PREFIX_LEN_MAX} are")));
        }
        if let Some(range) = range
            && !(subnet.contains(range.base()) && range.prefix_len() >= subnet.prefix_len())
        {
            return Err(invalid(format!("--ip-range {range} does not lie in subnet {subnet}")));
        }
        for (what, addr) in
            gateway.iter().map(|addr| ("gateway", addr)).chain(reserved.values().map(|a| ("address", a)))
        {
            if !subnet.contains(*addr) || *addr == subnet.base() || *addr == subnet.last() {
                return Err(invalid(format!("{what} {addr} is no host's address in subnet {subnet}")));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(change: impl FnOnce(&mut NetworkSpec), want: &str) {
        let mut spec = NetworkSpec { name: "n".into(), driver: Driver::named("overlay"), ..NetworkSpec::default() };
        change(&mut spec);
        let got = spec.validate().map_or_else(|error| error.to_string(), |()| "ok".to_owned());
        assert!(got.contains(want), "{got:?} should say {want:?}");
    }

    #[test]
    fn networks_are_checked_at_the_edge() {
        let subnet = |text: &str| Some(text.parse().unwrap());
        check(|_| {}, "ok");
        check(|spec| spec.name.clear(), "needs a name");
        check(|spec| spec.driver.name = "weave".into(), "weave");
        check(|spec| spec.ipam.subnet = subnet("10.5.0.0/30"), "/8 to /29");
        check(|spec| spec.ipam.gateway = Some(Ipv4Addr::new(10, 5, 0, 1)), "--subnet");
        check(
            |spec| {
                spec.ipam.subnet = subnet("10.5.0.0/24");
                spec.ipam.gateway = Some(Ipv4Addr::new(10, 6, 0, 1));
            },
            "10.6.0.1",
        );
        check(
            |spec| {
                spec.ipam.subnet = subnet("10.5.0.0/24");
                spec.ipam.range = subnet("10.5.1.0/25");
            },
            "does not lie in",
        );
        check(|spec| drop(spec.driver.options.insert("encrypted".into(), "maybe".into())), "neither true nor false");
        check(|spec| spec.ipam.subnet_v6 = Some("fd00::/64".parse().unwrap()), "--ipv6");
        check(|spec| spec.ipam.gateway_v6 = Some("fd00::1".parse().unwrap()), "--subnet");
        let with_mtu = |bytes: &'static str| {
            move |spec: &mut NetworkSpec| {
                spec.ipv6 = true;
                drop(spec.driver.options.insert(MTU.into(), bytes.into()));
            }
        };
        check(with_mtu("1279"), "IPv6 takes packets of 1280 bytes");
        check(with_mtu("1280"), "ok");
    }

    #[test]
    fn traffic_is_encrypted_unless_the_user_says_no() {
        let with = |value: Option<&str>| {
            let mut spec = NetworkSpec::default();
            spec.driver.options.extend(value.map(|value| ("encrypted".to_owned(), value.to_owned())));
            spec.is_encrypted()
        };
        assert!(with(None) && with(Some("")) && with(Some("true")));
        assert!(!with(Some("false")));
    }
}
