//! IPv6 of a link and of a host: whether there is any, addresses, forwarding.

use std::fs;
use std::io;
use std::net::Ipv6Addr;
use std::path::Path;

use rtnetlink::Handle;
use rtnetlink::packet_route::address::{AddressAttribute, AddressFlags, AddressHeaderFlags};

use crate::{Netns, add_existing_is_fine};

const SETTINGS: &str = "/proc/sys/net/ipv6/conf";

/// Whether this host's kernel knows IPv6.
#[must_use]
pub fn has_ipv6() -> bool {
    Path::new(SETTINGS).exists()
}

/// Lets a link of the calling thread's namespace have IPv6 addresses; what neighbours say of routes is not heard, and
/// who has which address is known, so that nobody need be asked whether it is free.
pub fn allow_ipv6(link: &str) {
    for (setting, value) in [("accept_ra", "0"), ("accept_dad", "0"), ("disable_ipv6", "0")] {
        // Where the kernel has no IPv6, the address that comes next says so.
        let _ = fs::write(format!("{SETTINGS}/{link}/{setting}"), value);
    }
}

/// Lets a container's link, and its loopback, have IPv6 addresses.
pub async fn allow_ipv6_in(netns: &Netns, link: String) -> io::Result<()> {
    let allow_both = move || {
        allow_ipv6("lo");
        allow_ipv6(&link);
        Ok(())
    };
    netns.run(allow_both).await
}

/// How an address is shown, and what leads to its network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reach {
    /// The network is on the link.
    Network(u8),
    /// As one of a network of that size, but nothing leads to that by itself.
    Shown(u8),
}

/// Gives a link an address that can be used at once.
pub async fn add_ipv6_address(
    handle: &Handle,
    link: u32,
    address: Ipv6Addr,
    reach: Reach,
) -> Result<(), rtnetlink::Error> {
    let (Reach::Network(prefix_len) | Reach::Shown(prefix_len)) = reach;
    let mut request = handle.address().add(link, address.into(), prefix_len);
    let message = request.message_mut();
    message.header.flags |= AddressHeaderFlags::Nodad;
    if matches!(reach, Reach::Shown(_)) {
        message.attributes.push(AddressAttribute::Flags(AddressFlags::Nodad | AddressFlags::Noprefixroute));
    }
    add_existing_is_fine(request.execute().await)
}

/// Has the calling thread's namespace forward IPv6. It then heeds routers' advertisements no more, where it is not told
/// to go on with that.
pub fn forward_ipv6() -> io::Result<()> {
    let named = |path: &Path, error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", path.display()));
    let all = Path::new(SETTINGS).join("all/forwarding");
    if fs::read_to_string(&all).map_err(|error| named(&all, error))?.trim() == "1" {
        return Ok(());
    }
    for link in fs::read_dir(SETTINGS)?.flatten() {
        let heeds = link.path().join("accept_ra");
        if fs::read_to_string(&heeds).is_ok_and(|value| value.trim() == "1") {
            fs::write(&heeds, "2").map_err(|error| named(&heeds, error))?;
        }
    }
    fs::write(&all, "1").map_err(|error| named(&all, error))
}
