//! The addresses a node listens on and is reached at.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};

use nix::ifaddrs::InterfaceAddress;
use nix::net::if_::InterfaceFlags;

use super::{CONTROL_PORT, SwarmError};

/// Reads `--listen-addr`: an address, an interface, each with or without a port.
pub(super) fn listen_addr(text: &str) -> Result<SocketAddr, SwarmError> {
    if text.is_empty() {
        return Ok(SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), CONTROL_PORT));
    }
    let (host, port) = split(text)?;
    Ok(SocketAddr::new(resolve(&host, "listen-addr")?, port))
}

/// Where to listen: if on all addresses of IPv4, and others come by IPv6, on those as well. Clients send `0.0.0.0` for
/// nothing.
pub(super) fn in_family_of(listen: SocketAddr, others: &str) -> SocketAddr {
    let all = listen.ip() == IpAddr::from(Ipv4Addr::UNSPECIFIED);
    match others.parse() {
        Ok(SocketAddr::V6(_)) if all => SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), listen.port()),
        _ => listen,
    }
}

/// Reads `--advertise-addr`, or picks the host's one address.
pub(super) fn advertise_addr(text: &str, listen: SocketAddr) -> Result<String, SwarmError> {
    if !text.is_empty() {
        let (host, _) = split(text)?;
        let addr = resolve_told(&host, "advertise-addr")?;
        let port = if text.parse::<SocketAddr>().is_ok() { split(text)?.1 } else { listen.port() };
        return Ok(SocketAddr::new(addr, port).to_string());
    }
    if !listen.ip().is_unspecified() {
        return Ok(listen.to_string());
    }
    let candidates = interface_addrs();
    match candidates.as_slice() {
        [(_, addr)] => Ok(SocketAddr::new(*addr, listen.port()).to_string()),
        [] => Err(SwarmError::Invalid(
            "could not choose an address to advertise since this host has none but loopback: specify one with \
             --advertise-addr"
                .into(),
        )),
        many => {
            let list: Vec<_> = many.iter().map(|(name, addr)| format!("{addr} on {name}")).collect();
            Err(SwarmError::Invalid(format!(
                "could not choose an IP address to advertise since this system has multiple addresses ({}): specify one \
                 with --advertise-addr",
                list.join(", ")
            )))
        }
    }
}

fn split(text: &str) -> Result<(String, u16), SwarmError> {
    if let Ok(addr) = text.parse::<SocketAddr>() {
        return Ok((addr.ip().to_string(), addr.port()));
    }
    if text.parse::<IpAddr>().is_ok() {
        return Ok((text.to_owned(), CONTROL_PORT));
    }
    match text.rsplit_once(':') {
        Some((host, port)) => {
            let port = port.parse().map_err(|_| SwarmError::Invalid(format!("{text:?}: {port:?} is no port")))?;
            Ok((host.to_owned(), port))
        }
        None => Ok((text.to_owned(), CONTROL_PORT)),
    }
}

/// This host's address as another one sees it, by the host's routes. Nothing is sent.
pub(super) fn seen_from(other: &str) -> Option<IpAddr> {
    let other: SocketAddr = other.parse().ok()?;
    let any: IpAddr = if other.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind(SocketAddr::new(any, 0)).ok()?;
    socket.connect(other).ok()?;
    socket.local_addr().ok().map(|addr| addr.ip())
}

/// As [`resolve`], for an address that others are told.
pub(super) fn resolve_told(host: &str, flag: &str) -> Result<IpAddr, SwarmError> {
    let addr = resolve(host, flag)?;
    if addr.is_unspecified() {
        let what = flag.trim_end_matches("-addr").replace('-', " ");
        return Err(SwarmError::Invalid(format!(
            "{what} address must be a non-zero IP address, or an interface (--{flag})"
        )));
    }
    Ok(addr)
}

fn resolve(host: &str, flag: &str) -> Result<IpAddr, SwarmError> {
    if let Ok(addr) = host.parse() {
        return Ok(addr);
    }
    // Whoever names one knows what it is for.
    let found = addrs_where(|interface| interface.interface_name == host).into_iter().next();
    found.map(|(_, addr)| addr).ok_or_else(|| {
        SwarmError::Invalid(format!("--{flag} {host:?} is neither an IP address nor an interface that has one"))
    })
}

/// Addresses of interfaces that may be reached from outside; container bridges are not.
fn interface_addrs() -> Vec<(String, IpAddr)> {
    addrs_where(|interface| {
        !interface.flags.contains(InterfaceFlags::IFF_LOOPBACK)
            && !["skep", "docker", "veth", "br-"].iter().any(|p| interface.interface_name.starts_with(p))
    })
}

/// Addresses of the interfaces that are `wanted`. Those of IPv6 count where there are none of IPv4.
fn addrs_where(wanted: impl Fn(&InterfaceAddress) -> bool) -> Vec<(String, IpAddr)> {
    let Ok(interfaces) = nix::ifaddrs::getifaddrs() else { return Vec::new() };
    let all: Vec<(String, IpAddr)> = interfaces
        .filter(wanted)
        .filter_map(|interface| {
            let address = interface.address?;
            let v4 = address.as_sockaddr_in().map(|v4| IpAddr::V4(v4.ip()));
            let v6 = || address.as_sockaddr_in6().map(|v6| v6.ip()).filter(|ip| !ip.is_unicast_link_local());
            Some((interface.interface_name, v4.or_else(|| v6().map(IpAddr::V6))?))
        })
        .collect();
    let (v4, v6): (Vec<_>, Vec<_>) = all.into_iter().partition(|(_, address): &(String, IpAddr)| address.is_ipv4());
    if v4.is_empty() { v6 } else { v4 }
}
