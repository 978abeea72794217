//! The ways of networks whose user wants no encryption: one VXLAN device (RFC 7348) beside the one to
//! the tunnels, with everything it must know of other nodes written into it. Nothing is flooded.

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::AsRawFd as _;

use rtnetlink::packet_route::neighbour::{NeighbourFlags, NeighbourState};
use rtnetlink::packet_route::route::RouteMessage;
use rtnetlink::{Handle, LinkUnspec, LinkVxlan, RouteMessageBuilder};
use skep_api::NodeId;
use skep_host_net::{Netlink, Netns, add_existing_is_fine, allow_ipv6_in, has_ipv6, link_index};

use super::{WIRE, next_hop, next_hop_v6, return_route};
use crate::path::message::PeerIndex;

pub(crate) const DEVICE: &str = "plain0";
/// One network for the nodes among themselves; whose packets are whose, addresses tell.
const VNI: u32 = 4096;

/// What other nodes have of unencrypted networks.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct PlainState {
    pub(crate) needed: bool,
    /// Whether the nodes reach each other by IPv6.
    pub(crate) over_ipv6: bool,
    /// UDP.
    pub(crate) port: u16,
    pub(crate) own_mac: [u8; 6],
    pub(crate) peers: BTreeMap<PeerIndex, PlainPeer>,
    /// Whose addresses of other nodes' tasks are.
    pub(crate) addresses: BTreeMap<IpAddr, PeerIndex>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PlainPeer {
    pub(crate) mac: [u8; 6],
    pub(crate) host: IpAddr,
}

/// The address of a node's device; every node works it out alike.
pub(crate) fn mac(node: NodeId) -> [u8; 6] {
    let [.., a, b, c, d, e] = node.to_bytes();
    // Locally administered, one station.
    [0x06, a, b, c, d, e]
}

/// What connections are marked with that came in through a peer by this device.
pub(crate) fn mark(peer: PeerIndex) -> u32 {
    /// Above the marks of those that came by the tunnels.
    const BASE: u32 = 1 << 16;
    BASE + u32::from(peer)
}

/// The device, and what was written into it.
#[derive(Default)]
pub(crate) struct Plain {
    index: Option<u32>,
    applied: PlainState,
}

impl Plain {
    /// The device's, while there is one.
    pub(super) const fn number(&self) -> Option<u32> {
        self.index
    }

    /// Brings the device in line: made when it is needed first, gone when it is not.
    pub(crate) async fn set(
        &mut self,
        inside: &Netlink,
        netns: &Netns,
        mtu_bytes: u32,
        wanted: PlainState,
    ) -> io::Result<()> {
        if !wanted.needed {
            return self.remove(inside).await;
        }
        if self.applied == wanted {
            return Ok(());
        }
        if self.index.is_some() && self.applied.over_ipv6 != wanted.over_ipv6 {
            // The node has another address now.
            self.remove(inside).await?;
        }
        let adopted = self.index.is_none() && link_index(inside.handle(), DEVICE).await.is_some();
        let mut written = self.make_and_write(inside, netns, mtu_bytes, &wanted).await;
        if written.is_err() && adopted {
            // It does not say which family it is for, and may be of a time when the node had another address.
            self.remove(inside).await?;
            written = self.make_and_write(inside, netns, mtu_bytes, &wanted).await;
        }
        written?;
        self.applied = wanted;
        Ok(())
    }

    async fn make_and_write(
        &mut self,
        inside: &Netlink,
        netns: &Netns,
        mtu_bytes: u32,
        wanted: &PlainState,
    ) -> io::Result<()> {
        let index = match self.index {
            Some(index) => index,
            None => ensure_device(inside, netns, mtu_bytes, wanted).await?,
        };
        self.index = Some(index);
        self.write(inside.handle(), index, wanted).await.map_err(io::Error::other)
    }

    async fn remove(&mut self, inside: &Netlink) -> io::Result<()> {
        if let Some(index) = link_index(inside.handle(), DEVICE).await {
            inside.handle().link().del(index).execute().await.map_err(io::Error::other)?;
        }
        *self = Self::default();
        Ok(())
    }

    async fn write(&self, handle: &Handle, index: u32, wanted: &PlainState) -> Result<(), rtnetlink::Error> {
        for (&number, peer) in wanted.peers.iter().filter(|(n, peer)| self.applied.peers.get(n) != Some(peer)) {
            let there = handle.neighbours().add_bridge(index, &peer.mac).destination(peer.host);
            there.flags(NeighbourFlags::Own).replace().execute().await?;
            let v6 = has_ipv6().then(|| next_hop_v6(number).into());
            for hop in [Some(next_hop(number).into()), v6].into_iter().flatten() {
                let hop = handle.neighbours().add(index, hop).link_layer_address(&peer.mac);
                hop.state(NeighbourState::Permanent).replace().execute().await?;
            }
            return_route(handle, index, number, mark(number)).await?;
        }
        for (&address, &number) in wanted.addresses.iter().filter(|(a, n)| self.applied.addresses.get(a) != Some(n)) {
            handle.route().add(route(index, address, Some(number))).replace().execute().await?;
        }
        for &address in self.applied.addresses.keys().filter(|address| !wanted.addresses.contains_key(address)) {
            // Gone with the device at the latest.
            drop(handle.route().del(route(index, address, None)).execute().await);
        }
        Ok(())
    }
}

/// The way to an address through a peer; through any, if none is named.
fn route(device: u32, address: IpAddr, peer: Option<PeerIndex>) -> RouteMessage {
    match address {
        IpAddr::V4(address) => {
            let to = RouteMessageBuilder::<Ipv4Addr>::new().destination_prefix(address, 32).output_interface(device);
            peer.map_or_else(|| to.clone(), |peer| to.clone().gateway(next_hop(peer)).onlink()).build()
        }
        IpAddr::V6(address) => {
            let to = RouteMessageBuilder::<Ipv6Addr>::new().destination_prefix(address, 128).output_interface(device);
            peer.map_or_else(|| to.clone(), |peer| to.clone().gateway(next_hop_v6(peer)).onlink()).build()
        }
    }
}

/// Makes the device: inside, while its own packets pass through the host's namespace, where it is
/// asked for.
async fn ensure_device(inside: &Netlink, netns: &Netns, mtu_bytes: u32, wanted: &PlainState) -> io::Result<u32> {
    let handle = inside.handle();
    if link_index(handle, DEVICE).await.is_none() {
        let device = LinkVxlan::new(DEVICE, VNI).port(wanted.port).learning(false).address(wanted.own_mac.to_vec());
        let device = if wanted.over_ipv6 { device.local6(Ipv6Addr::UNSPECIFIED) } else { device };
        let device = device.setns_by_fd(netns.as_raw_fd()).build();
        Netlink::open()?.handle().link().add(device).execute().await.map_err(io::Error::other)?;
    }
    let index = link_index(handle, DEVICE).await.ok_or_else(|| io::Error::other("the VXLAN device was not made"))?;
    if has_ipv6() {
        allow_ipv6_in(netns, DEVICE.to_owned()).await?;
    }
    let link = LinkUnspec::new_with_index(index).mtu(mtu_bytes).up().build();
    handle.link().set(link).execute().await.map_err(io::Error::other)?;
    add_existing_is_fine(handle.address().add(index, WIRE.into(), 32).execute().await).map_err(io::Error::other)?;
    Ok(index)
}
