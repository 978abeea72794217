//! A container's places in networks: as they are asked for, and as it has them.

use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::Grant;

/// A place in a network that is asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WantedPlace {
    /// The network's id; what its keeper finds it by, if it has one.
    pub network: String,
    /// What neighbours call it beside its name.
    pub aliases: Vec<String>,
    /// What it alone calls its neighbours, and their names.
    #[serde(default)]
    pub links: BTreeMap<String, String>,
    pub address: Option<Ipv4Addr>,
    #[serde(default)]
    pub address_v6: Option<Ipv6Addr>,
    /// Made from the address if absent.
    #[serde(default)]
    pub mac: Option<MacAddress>,
    /// Addresses that it has beside, of 169.254.0.0/16.
    #[serde(default)]
    pub link_local: Vec<Ipv4Addr>,
    /// What goes out goes through the network where this is highest; of several, through the first.
    #[serde(default)]
    pub gateway_priority: i64,
    /// Kept for whoever asks; they change nothing.
    #[serde(default)]
    pub driver_options: BTreeMap<String, String>,
    /// Whether the network is not this host's alone, but a [`NetworkKeeper`](super::NetworkKeeper)'s.
    #[serde(default)]
    pub kept: bool,
}

/// A place in a network that a running container has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Endpoint {
    pub network: String,
    /// None, where the network has IPv6 alone.
    pub address: Option<Ipv4Addr>,
    #[serde(default)]
    pub address_v6: Option<Ipv6Addr>,
    /// The number of its link inside: eth0 is 0.
    pub link: u32,
    #[serde(default)]
    pub gateway_priority: i64,
    pub names: Vec<String>,
    /// None, where somebody else made the link.
    #[serde(default)]
    pub mac: Option<MacAddress>,
    /// What a [`NetworkKeeper`](super::NetworkKeeper) said of a place that it was asked for.
    #[serde(default)]
    pub grant: Option<Grant>,
}

impl Endpoint {
    /// What the container is reached at.
    pub(crate) fn addresses(&self) -> Vec<IpAddr> {
        self.address.map(IpAddr::from).into_iter().chain(self.address_v6.map(IpAddr::from)).collect()
    }
}

/// A link's address on its bridge.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct MacAddress([u8; 6]);

impl MacAddress {
    /// The one that goes with an address: whoever has the address next has it, too, so that neighbours
    /// that remember it are right.
    #[must_use]
    pub fn of(address: impl Into<IpAddr>) -> Self {
        let [a, b, c, d] = match address.into() {
            IpAddr::V4(address) => address.octets(),
            // Neighbours differ in the last bytes.
            IpAddr::V6(address) => address.to_bits().to_be_bytes()[12..].try_into().unwrap_or_default(),
        };
        Self([0x02, 0x42, a, b, c, d])
    }

    pub(super) fn bytes(self) -> [u8; 6] {
        self.0
    }
}

impl fmt::Display for MacAddress {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, f] = self.0;
        write!(out, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}")
    }
}

/// Why a text is no MAC address that a link can have.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("invalid MAC address {0:?}: write six bytes as 02:42:ac:11:00:02, the first of them even")]
pub struct MacAddressError(String);

impl FromStr for MacAddress {
    type Err = MacAddressError;

    fn from_str(text: &str) -> Result<Self, MacAddressError> {
        let wrong = || MacAddressError(text.to_owned());
        let bytes = text.split([':', '-']).map(|byte| u8::from_str_radix(byte, 16).map_err(|_| wrong()));
        let bytes: [u8; 6] = bytes.collect::<Result<Vec<_>, _>>()?.try_into().map_err(|_| wrong())?;
        // Addresses of groups, and none at all, are nobody's.
        if bytes[0] & 1 == 1 || bytes == [0; 6] { Err(wrong()) } else { Ok(Self(bytes)) }
    }
}

impl TryFrom<String> for MacAddress {
    type Error = MacAddressError;

    fn try_from(text: String) -> Result<Self, MacAddressError> {
        text.parse()
    }
}

impl From<MacAddress> for String {
    fn from(mac: MacAddress) -> Self {
        mac.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mac_addresses_are_read_as_they_are_written() {
        let mac: MacAddress = "02:42:AC-11:00:02".parse().unwrap();
        assert_eq!(mac, MacAddress::of(Ipv4Addr::new(172, 17, 0, 2)));
        assert_eq!(mac.to_string(), "02:42:ac:11:00:02");
        for wrong in ["", "02:42", "03:00:00:00:00:01", "00:00:00:00:00:00", "02:42:ac:11:00:02:03", "x:1:2:3:4:5"] {
            assert!(wrong.parse::<MacAddress>().is_err(), "{wrong}");
        }
    }
}
