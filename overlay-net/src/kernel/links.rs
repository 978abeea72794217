//! Containers' links to the overlay's namespace.

use std::collections::BTreeMap;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::fd::AsRawFd as _;
use std::sync::{Mutex, MutexGuard};

use rtnetlink::packet_route::address::{AddressAttribute, AddressFlags};
use rtnetlink::packet_route::link::{InfoData, InfoVeth, LinkAttribute};
use rtnetlink::packet_route::route::RouteScope;
use rtnetlink::{Handle, LinkUnspec, LinkVeth, RouteMessageBuilder};
use skep_api::{Ipv6Side, Subnet};
use skep_host_net::{
    LOOPBACK_INDEX, Netlink, Netns, Reach, add_existing_is_fine, add_ipv6_address, allow_ipv6_in, link_index,
};

use super::without_ipv6;
use crate::path::pump::{SEAL_LEN, SEGMENTS_MAX, SEND_LEN_MAX};

/// The name of a container's link in the overlay's namespace.
pub(crate) fn link_name(container: &str, link: u32) -> String {
    format!("skv{}{link}", &container[..container.len().min(9)])
}

/// A container's place in a network, as the kernel needs it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    /// The number of its link inside: eth0 is 0.
    pub(crate) link: u32,
    pub(crate) address: Ipv4Addr,
    pub(crate) subnet: Subnet,
    pub(crate) gateway: Ipv4Addr,
    pub(crate) v6: Option<Ipv6Side>,
    /// Whether nothing of the network gets out.
    pub(crate) internal: bool,
    /// The largest packet.
    pub(crate) mtu_bytes: u32,
    /// Whether what leaves the node passes through the data path.
    pub(crate) encrypted: bool,
}

impl Place {
    /// Its IPv6 side, and its address there.
    fn v6(&self) -> Option<(Ipv6Side, Ipv6Addr)> {
        self.v6.map(|side| (side, side.address(self.subnet, self.address)))
    }
}

/// Where containers' links are made and taken away: from several at once, each with its own container's.
#[derive(Debug)]
pub(crate) struct Links {
    netns: Netns,
    inside: Netlink,
    /// The kernel's numbers of those that are known.
    numbers: Mutex<BTreeMap<String, u32>>,
}

impl Links {
    pub(super) fn new(netns: Netns, inside: Netlink) -> Self {
        Self { netns, inside, numbers: Mutex::default() }
    }

    pub(super) const fn netns(&self) -> &Netns {
        &self.netns
    }

    pub(super) const fn inside(&self) -> &Netlink {
        &self.inside
    }

    fn numbers(&self) -> MutexGuard<'_, BTreeMap<String, u32>> {
        self.numbers.lock().expect("nobody panics while holding it")
    }

    /// The number of a link that is there.
    pub(super) async fn number(&self, name: &str) -> Option<u32> {
        let known = self.numbers().get(name).copied();
        if known.is_some() {
            return known;
        }
        let number = link_index(self.inside.handle(), name).await?;
        self.numbers().insert(name.to_owned(), number);
        Some(number)
    }

    /// Gives a container places: one link each.
    pub(crate) async fn attach(&self, container: &str, netns: &Netns, places: &[Place]) -> io::Result<()> {
        netns.run(without_ipv6).await?;
        for place in places {
            self.plug(container, netns, place).await.map_err(io::Error::other)?;
            if place.v6.is_some() {
                let (inside, within) = (link_name(container, place.link), format!("eth{}", place.link));
                allow_ipv6_in(&self.netns, inside).await?;
                allow_ipv6_in(netns, within).await?;
            }
            self.lead_to(container, place).await.map_err(io::Error::other)?;
        }
        let within = Netlink::open_in(netns).await?;
        configure_container(within.handle(), places).await.map_err(io::Error::other)
    }

    async fn plug(&self, container: &str, netns: &Netns, place: &Place) -> Result<(), rtnetlink::Error> {
        let handle = self.inside.handle();
        let (name, eth) = (link_name(container, place.link), format!("eth{}", place.link));
        if let Some(left_over) = link_index(handle, &name).await {
            handle.link().del(left_over).execute().await?;
        }
        let peer = LinkUnspec::new_with_name(&eth).mtu(place.mtu_bytes).setns_by_fd(netns.as_raw_fd());
        let peer = if place.encrypted {
            peer.append_extra_attribute(LinkAttribute::GsoMaxSize(batch_bytes(place.mtu_bytes)))
        } else {
            peer
        };
        let pair = LinkVeth::new(&name, &eth)
            .set_info_data(InfoData::Veth(InfoVeth::Peer(peer.build())))
            .mtu(place.mtu_bytes)
            .up();
        handle.link().add(pair.build()).execute().await
    }

    /// Leads packets for a container's place through its link.
    async fn lead_to(&self, container: &str, place: &Place) -> Result<(), rtnetlink::Error> {
        let handle = self.inside.handle();
        let name = link_name(container, place.link);
        let index = link_index(handle, &name).await.ok_or(rtnetlink::Error::RequestFailed)?;
        self.numbers().insert(name, index);
        handle.address().add(index, place.gateway.into(), 32).execute().await?;
        let to = RouteMessageBuilder::<Ipv4Addr>::new().destination_prefix(place.address, 32).output_interface(index);
        handle.route().add(to.scope(RouteScope::Link).build()).replace().execute().await?;
        let Some((side, address)) = place.v6() else { return Ok(()) };
        add_ipv6_address(handle, index, side.gateway, Reach::Shown(128)).await?;
        let to = RouteMessageBuilder::<Ipv6Addr>::new().destination_prefix(address, 128).output_interface(index);
        handle.route().add(to.build()).replace().execute().await
    }

    /// Takes a link of a container's away; one that is gone is no error.
    pub(crate) async fn detach(&self, container: &str, link: u32) -> io::Result<()> {
        let (handle, name) = (self.inside.handle(), link_name(container, link));
        self.numbers().remove(&name);
        if let Some(index) = link_index(handle, &name).await {
            // It may go with its namespace at this moment.
            drop(handle.link().del(index).execute().await);
        }
        Ok(())
    }
}

/// Addresses and routes inside a container.
async fn configure_container(handle: &Handle, places: &[Place]) -> Result<(), rtnetlink::Error> {
    handle.link().set(LinkUnspec::new_with_index(LOOPBACK_INDEX).up().build()).execute().await?;
    for place in places {
        let index = link_index(handle, &format!("eth{}", place.link)).await.ok_or(rtnetlink::Error::RequestFailed)?;
        handle.link().set(LinkUnspec::new_with_index(index).mtu(place.mtu_bytes).up().build()).execute().await?;
        // Shown with its network's size, yet everything goes by the gateway.
        let mut add = handle.address().add(index, place.address.into(), place.subnet.prefix_len());
        add.message_mut().attributes.push(AddressAttribute::Flags(AddressFlags::Noprefixroute));
        add.execute().await?;
        let gateway = RouteMessageBuilder::<Ipv4Addr>::new()
            .destination_prefix(place.gateway, 32)
            .output_interface(index)
            .scope(RouteScope::Link);
        handle.route().add(gateway.build()).execute().await?;
        let network = RouteMessageBuilder::<Ipv4Addr>::new()
            .destination_prefix(place.subnet.base(), place.subnet.prefix_len())
            .gateway(place.gateway)
            .output_interface(index)
            .pref_source(place.address);
        handle.route().add(network.build()).execute().await?;
        let Some((side, address)) = place.v6() else { continue };
        add_ipv6_address(handle, index, address, Reach::Shown(side.subnet.prefix_len())).await?;
        let gateway =
            RouteMessageBuilder::<Ipv6Addr>::new().destination_prefix(side.gateway, 128).output_interface(index);
        handle.route().add(gateway.build()).execute().await?;
        let network = RouteMessageBuilder::<Ipv6Addr>::new()
            .destination_prefix(side.subnet.base(), side.subnet.prefix_len())
            .gateway(side.gateway)
            .output_interface(index)
            .pref_source(address);
        handle.route().add(network.build()).execute().await?;
    }
    Ok(())
}

/// Leads what leads nowhere else through the first network that lets it out, unless it is led already.
pub(crate) async fn route_out(netns: &Netns, places: &[Place]) -> io::Result<()> {
    let outward = || places.iter().filter(|place| !place.internal);
    let within = Netlink::open_in(netns).await?;
    let routes = within.handle().route();
    if let Some(place) = outward().next() {
        let route = RouteMessageBuilder::<Ipv4Addr>::new().gateway(place.gateway).build();
        add_existing_is_fine(routes.add(route).execute().await).map_err(io::Error::other)?;
    }
    if let Some(side) = outward().find_map(|place| place.v6) {
        let route = RouteMessageBuilder::<Ipv6Addr>::new().gateway(side.gateway).build();
        add_existing_is_fine(routes.add(route).execute().await).map_err(io::Error::other)?;
    }
    Ok(())
}

/// The most that a container should hand to the kernel in one piece: what leaves the data path in one
/// call.
fn batch_bytes(mtu_bytes: u32) -> u32 {
    /// Addresses, ports and options of each packet.
    const HEADERS_LEN: u32 = 60;
    let sealed = mtu_bytes + u32::try_from(SEAL_LEN).unwrap_or(0);
    let count = u32::try_from(SEND_LEN_MAX / sealed as usize).unwrap_or(1).clamp(1, SEGMENTS_MAX as u32);
    count * mtu_bytes.saturating_sub(HEADERS_LEN)
}
