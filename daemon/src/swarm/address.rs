//! The addresses a node listens on and is reached at.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use super::{CONTROL_PORT, SwarmError};

/// Reads `--listen-addr`: an address, an interface, each with or without a port.
pub(super) fn listen_addr(text: &str) -> Result<SocketAddr, SwarmError> {
    if text.is_empty() {
        return Ok(SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), CONTROL_PORT));
    }
    let (host, port) = split(text)?;
    Ok(SocketAddr::new(resolve(&host, "listen-addr")?, port))
}

/// Reads `--advertise-addr`, or picks the host's one address.
pub(super) fn advertise_addr(text: &str, listen: SocketAddr) -> Result<String, SwarmError> {
    if !text.is_empty() {
        let (host, _) = split(text)?;
        let addr = resolve(&host, "advertise-addr")?;
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

pub(super) fn resolve(host: &str, flag: &str) -> Result<IpAddr, SwarmError> {
    if let Ok(addr) = host.parse() {
        return Ok(addr);
    }
    let found = interface_addrs().into_iter().find(|(name, _)| name == host);
    found.map(|(_, addr)| addr).ok_or_else(|| {
        SwarmError::Invalid(format!("--{flag} {host:?} is neither an IP address nor an interface that has one"))
    })
}

/// IPv4 addresses of interfaces that may be reached from outside; container bridges are not.
fn interface_addrs() -> Vec<(String, IpAddr)> {
    let Ok(interfaces) = nix::ifaddrs::getifaddrs() else { return Vec::new() };
    interfaces
        .filter(|interface| !interface.flags.contains(nix::net::if_::InterfaceFlags::IFF_LOOPBACK))
        .filter(|interface| !["skep", "docker", "veth", "br-"].iter().any(|p| interface.interface_name.starts_with(p)))
        .filter_map(|interface| {
            let addr = interface.address?.as_sockaddr_in()?.ip();
            Some((interface.interface_name, addr.into()))
        })
        .collect()
}
