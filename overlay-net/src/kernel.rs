//! Links, addresses and routes of the overlay: a namespace of its own, which a pair of links joins to
//! the host's, and one more pair for each place of a container in a network.
//!
//! Being apart from the host's, its addresses and rules clash with nothing the host has. Everything
//! is routed: a container reaches even its neighbours through its gateway, which every node has.

pub(crate) mod fast_path;
pub(crate) mod links;
pub(crate) mod plain;
pub(crate) mod sealed;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::AsRawFd as _;
use std::path::Path;
use std::sync::Arc;

use futures::TryStreamExt as _;
use rtnetlink::packet_route::link::{InfoData, InfoVeth, LinkAttribute, LinkFlags};
use rtnetlink::packet_route::neighbour::NeighbourState;
use rtnetlink::packet_route::route::RouteMessage;
use rtnetlink::packet_route::rule::RuleAction;
use rtnetlink::{Handle, LinkUnspec, LinkVeth, RouteMessageBuilder};
use skep_api::IpSubnet;
use skep_host_net::{
    LOOPBACK_INDEX, Netlink, Netns, Reach, add_existing_is_fine, add_ipv6_address, allow_ipv6, allow_ipv6_in,
    forward_ipv6, has_ipv6, link_index,
};

use crate::path::DEVICE;
use crate::path::message::PeerIndex;
use crate::path::peers::{BY_ADDRESS, OWN, mac};
use crate::ruleset::Family;
use fast_path::{FastPath, FastPathState, Out};
use links::Links;
use plain::{Plain, PlainState};
use sealed::{Sealed, SealedState};

/// The pair that joins the overlay's namespace to the host's: in the host's, and inside.
pub(crate) const MESH_DEVICE: &str = "skep-mesh";
pub(crate) const UPLINK: &str = "uplink";
const OUTSIDE: Ipv4Addr = Ipv4Addr::new(169, 254, 77, 1);
/// Where published ports of the host lead to.
pub(crate) const INSIDE: Ipv4Addr = Ipv4Addr::new(169, 254, 77, 2);
const UPLINK_PREFIX_LEN: u8 = 30;
/// The same of IPv6. They never leave the host, so that all hosts may have them.
const OUTSIDE_V6: Ipv6Addr = Ipv6Addr::new(0xfd73, 0x6b65, 0x7077, 0, 0, 0, 0, 1);
const INSIDE_V6: Ipv6Addr = Ipv6Addr::new(0xfd73, 0x6b65, 0x7077, 0, 0, 0, 0, 2);
const UPLINK_V6_PREFIX_LEN: u8 = 126;
/// The node's own address on the device to other nodes.
const WIRE: Ipv4Addr = Ipv4Addr::new(169, 254, 78, 1);
/// Return routes of what came in through a peer: a table for each.
const TABLE_BASE: u32 = 20_000;
/// Of the rules that lead there: before the main table.
const RULE_PRIORITY: u32 = 20_000;

/// Where published ports of the host lead to, in a family.
pub(crate) const fn inside_address(family: Family) -> IpAddr {
    match family {
        Family::V4 => IpAddr::V4(INSIDE),
        Family::V6 => IpAddr::V6(INSIDE_V6),
    }
}

/// The next hop that stands for a peer; of this node's own making.
fn next_hop(index: PeerIndex) -> Ipv4Addr {
    if index == BY_ADDRESS {
        return Ipv4Addr::new(169, 254, 79, 1);
    }
    let [high, low] = index.to_be_bytes();
    Ipv4Addr::new(169, 254, 128 + (high & 0x7f), low)
}

fn next_hop_v6(index: PeerIndex) -> Ipv6Addr {
    Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0x736b, index)
}

/// The overlay's part of the kernel.
pub(crate) struct Kernel {
    links: Arc<Links>,
    uplink: u32,
    wire: Option<u32>,
    plain: Plain,
    sealed: Sealed,
    fast_path: FastPath,
    mtu: Mtu,
    /// What was set up since this daemon took it over.
    peers: BTreeSet<PeerIndex>,
    subnets: BTreeSet<IpSubnet>,
}

impl Kernel {
    /// Makes the namespace and its link to the host's, or takes up those that are there.
    pub(crate) async fn open(netns: &Path) -> io::Result<Self> {
        let (netns, new) = Netns::ensure(netns).await?;
        netns.run(without_ipv6).await?;
        let (inside, outside) = (Netlink::open_in(&netns).await?, Netlink::open()?);
        let mtu = Mtu::of_host(outside.handle()).await?;
        if new || link_index(inside.handle(), UPLINK).await.is_none() {
            join(&outside, &inside, &netns).await.map_err(io::Error::other)?;
        }
        netns.run(|| set_all(&INSIDE_SYSCTLS)).await?;
        set_all(&OUTSIDE_SYSCTLS)?;
        if has_ipv6() {
            join_v6(&outside, &inside, &netns).await?;
        }
        let uplink = link_index(inside.handle(), UPLINK).await.ok_or_else(|| io::Error::other("no uplink"))?;
        let (peers, subnets) = (BTreeSet::new(), BTreeSet::new());
        Ok(Self {
            links: Arc::new(Links::new(netns, inside)),
            uplink,
            wire: None,
            plain: Plain::default(),
            sealed: Sealed::default(),
            fast_path: FastPath::default(),
            mtu,
            peers,
            subnets,
        })
    }

    pub(crate) const fn mtu(&self) -> Mtu {
        self.mtu
    }

    pub(crate) fn netns(&self) -> &Netns {
        self.links.netns()
    }

    /// Takes all of it away; what is gone already is no error.
    pub(crate) async fn remove(netns: &Path) -> io::Result<()> {
        let outside = Netlink::open()?;
        if let Some(index) = link_index(outside.handle(), MESH_DEVICE).await {
            outside.handle().link().del(index).execute().await.map_err(io::Error::other)?;
        }
        // The kernel clears namespaces away in its own time, and until then the next device of that kind would not be made.
        if let Ok(inside) = Netns::open(netns) {
            let inside = Netlink::open_in(&inside).await?;
            for device in [plain::DEVICE, sealed::DEVICE] {
                if let Some(index) = link_index(inside.handle(), device).await {
                    inside.handle().link().del(index).execute().await.map_err(io::Error::other)?;
                }
            }
        }
        Netns::remove(netns)
    }

    /// Sets the device to other nodes up, once the data path has made it.
    pub(crate) async fn set_up_wire(&mut self) -> io::Result<()> {
        let handle = self.links.inside().handle();
        let wire = link_index(handle, DEVICE).await.ok_or_else(|| io::Error::other("the data path made no device"))?;
        if has_ipv6() {
            allow_ipv6_in(self.links.netns(), DEVICE.to_owned()).await?;
        }
        self.configure_wire(handle, wire).await.map_err(io::Error::other)?;
        self.wire = Some(wire);
        // They went with the device, if it is new.
        self.peers.clear();
        self.subnets.clear();
        Ok(())
    }

    /// Fails if the device to other nodes is not the one that was set up.
    pub(crate) async fn check_wire(&self) -> io::Result<()> {
        let there = link_index(self.links.inside().handle(), DEVICE).await;
        if there.is_some() && there == self.wire { Ok(()) } else { Err(io::Error::other("its device is gone")) }
    }

    async fn configure_wire(&self, handle: &Handle, wire: u32) -> Result<(), rtnetlink::Error> {
        let link = LinkUnspec::new_with_index(wire).address(mac(OWN).to_vec()).mtu(self.mtu.tunnel_bytes).up();
        handle.link().set(link.build()).execute().await?;
        add_existing_is_fine(handle.address().add(wire, WIRE.into(), 32).execute().await)?;
        neighbour(handle, wire, BY_ADDRESS).await
    }

    /// Brings the ways to peers and networks in line.
    pub(crate) async fn set_routes(
        &mut self,
        peers: BTreeSet<PeerIndex>,
        subnets: BTreeSet<IpSubnet>,
    ) -> io::Result<()> {
        let Some(wire) = self.wire else { return Err(io::Error::other("the device to other nodes is not there")) };
        let handle = self.links.inside().handle();
        for &index in peers.difference(&self.peers) {
            neighbour(handle, wire, index).await.map_err(io::Error::other)?;
            return_route(handle, wire, index, index.into()).await.map_err(io::Error::other)?;
        }
        for &subnet in subnets.difference(&self.subnets) {
            handle.route().add(subnet_route(wire, subnet)).replace().execute().await.map_err(io::Error::other)?;
        }
        for &subnet in self.subnets.difference(&subnets) {
            // Gone with the device at the latest.
            drop(handle.route().del(subnet_route(wire, subnet)).execute().await);
        }
        // A peer that is gone keeps its number: its way leads nowhere and costs nothing.
        self.peers.extend(peers);
        self.subnets = subnets;
        Ok(())
    }

    /// Brings the ways of unencrypted networks in line.
    pub(crate) async fn set_plain(&mut self, wanted: PlainState) -> io::Result<()> {
        self.plain.set(self.links.inside(), self.links.netns(), self.mtu.plain_bytes, wanted).await
    }

    /// Brings the ways through the kernel's own WireGuard in line. It is never all there is: what fails is said, and
    /// everything passes through the data path.
    pub(crate) async fn set_sealed(&mut self, wanted: SealedState) {
        if let Err(error) =
            self.sealed.set(self.links.inside(), self.links.netns(), self.mtu.tunnel_bytes, wanted).await
        {
            tracing::warn!(%error, "packets pass through the data path, not through the kernel's WireGuard");
            self.sealed = Sealed::default();
            // Gone already is just as well.
            drop(
                self.sealed
                    .set(self.links.inside(), self.links.netns(), self.mtu.tunnel_bytes, SealedState::default())
                    .await,
            );
        }
    }

    /// Brings in line who speaks to whom by the fast path. There is always the long way.
    pub(crate) async fn set_fast_path(&mut self, wanted: &FastPathState) {
        let out = Out { tunnel: self.wire, plain: self.plain.number(), mtu: self.mtu };
        self.fast_path.set(&self.links, out, wanted).await;
    }

    pub(crate) const fn way_of_flows(&self) -> Option<&'static str> {
        self.fast_path.way()
    }

    /// Looks whom the kernel's own WireGuard reaches; `wanted` is set up anew if it is not there any more.
    pub(crate) async fn look_at_sealed(&mut self, wanted: &SealedState) {
        if let Err(error) = self.sealed.look(self.links.inside()).await {
            tracing::warn!(%error, "the kernel's WireGuard is set up anew");
            self.sealed = Sealed::default();
            self.set_sealed(wanted.clone()).await;
        }
    }

    /// The peers that the kernel's own WireGuard should reach, and whether it does.
    pub(crate) fn reached(&self) -> BTreeMap<PeerIndex, bool> {
        self.sealed.reached()
    }

    /// The containers' side of it, for whoever need not have all of it to itself.
    pub(crate) fn links(&self) -> Arc<Links> {
        self.links.clone()
    }

    pub(crate) fn uplink(&self) -> u32 {
        self.uplink
    }
}

/// Joins the overlay's namespace to the host's.
async fn join(outside: &Netlink, inside: &Netlink, netns: &Netns) -> Result<(), rtnetlink::Error> {
    if let Some(left_over) = link_index(outside.handle(), MESH_DEVICE).await {
        outside.handle().link().del(left_over).execute().await?;
    }
    let peer = LinkUnspec::new_with_name(UPLINK).setns_by_fd(netns.as_raw_fd());
    let pair = LinkVeth::new(MESH_DEVICE, UPLINK).set_info_data(InfoData::Veth(InfoVeth::Peer(peer.build()))).up();
    outside.handle().link().add(pair.build()).execute().await?;
    let index = link_index(outside.handle(), MESH_DEVICE).await.ok_or(rtnetlink::Error::RequestFailed)?;
    outside.handle().address().add(index, OUTSIDE.into(), UPLINK_PREFIX_LEN).execute().await?;
    let handle = inside.handle();
    let uplink = link_index(handle, UPLINK).await.ok_or(rtnetlink::Error::RequestFailed)?;
    for index in [LOOPBACK_INDEX, uplink] {
        handle.link().set(LinkUnspec::new_with_index(index).up().build()).execute().await?;
    }
    handle.address().add(uplink, INSIDE.into(), UPLINK_PREFIX_LEN).execute().await?;
    handle.route().add(RouteMessageBuilder::<Ipv4Addr>::new().gateway(OUTSIDE).build()).execute().await
}

/// The same for IPv6, which a namespace that was there before may lack.
async fn join_v6(outside: &Netlink, inside: &Netlink, netns: &Netns) -> io::Result<()> {
    tokio::task::spawn_blocking(|| {
        allow_ipv6(MESH_DEVICE);
        forward_ipv6()
    })
    .await
    .map_err(io::Error::other)??;
    netns.run(forward_ipv6).await?;
    allow_ipv6_in(netns, UPLINK.to_owned()).await?;
    let add = async {
        for (handle, device, address) in
            [(outside.handle(), MESH_DEVICE, OUTSIDE_V6), (inside.handle(), UPLINK, INSIDE_V6)]
        {
            let index = link_index(handle, device).await.ok_or(rtnetlink::Error::RequestFailed)?;
            add_ipv6_address(handle, index, address, Reach::Network(UPLINK_V6_PREFIX_LEN)).await?;
        }
        let out = RouteMessageBuilder::<Ipv6Addr>::new().gateway(OUTSIDE_V6).build();
        inside.handle().route().add(out).replace().execute().await
    };
    add.await.map_err(io::Error::other)
}

/// What leads to a network: its addresses are told apart by the data path.
fn subnet_route(wire: u32, subnet: IpSubnet) -> RouteMessage {
    match subnet {
        IpSubnet::V4(subnet) => RouteMessageBuilder::<Ipv4Addr>::new()
            .destination_prefix(subnet.base(), subnet.prefix_len())
            .gateway(next_hop(BY_ADDRESS))
            .output_interface(wire)
            .onlink()
            .build(),
        IpSubnet::V6(subnet) => RouteMessageBuilder::<Ipv6Addr>::new()
            .destination_prefix(subnet.base(), subnet.prefix_len())
            .gateway(next_hop_v6(BY_ADDRESS))
            .output_interface(wire)
            .onlink()
            .build(),
    }
}

/// The way back to a peer, for what came in through it by this device and has `mark` for that.
async fn return_route(handle: &Handle, device: u32, index: PeerIndex, mark: u32) -> Result<(), rtnetlink::Error> {
    let table = TABLE_BASE + mark;
    let back = RouteMessageBuilder::<Ipv4Addr>::new().gateway(next_hop(index)).output_interface(device).onlink();
    handle.route().add(back.table_id(table).build()).replace().execute().await?;
    let rule = handle.rule().add().v4().fw_mark(mark).table_id(table).priority(RULE_PRIORITY);
    add_existing_is_fine(rule.action(RuleAction::ToTable).execute().await)?;
    if !has_ipv6() {
        return Ok(());
    }
    let back =
        RouteMessageBuilder::<Ipv6Addr>::new().gateway(next_hop_v6(index)).output_interface(device).table_id(table);
    handle.route().add(back.build()).replace().execute().await?;
    let rule = handle.rule().add().v6().fw_mark(mark).table_id(table).priority(RULE_PRIORITY);
    add_existing_is_fine(rule.action(RuleAction::ToTable).execute().await)
}

async fn neighbour(handle: &Handle, wire: u32, index: PeerIndex) -> Result<(), rtnetlink::Error> {
    let v6 = has_ipv6().then(|| next_hop_v6(index).into());
    for hop in [Some(next_hop(index).into()), v6].into_iter().flatten() {
        let add = handle.neighbours().add(wire, hop).link_layer_address(&mac(index));
        add.state(NeighbourState::Permanent).replace().execute().await?;
    }
    Ok(())
}

/// Keeps links that come from having IPv6 addresses of their own making: those of networks that have IPv6 are let
/// have them one by one.
fn without_ipv6() -> io::Result<()> {
    let path = "/proc/sys/net/ipv6/conf/default/disable_ipv6";
    if Path::new(path).exists() { std::fs::write(path, "1") } else { Ok(()) }
}

/// Packets pass from one link to another, and come back by other ways than they went.
const INSIDE_SYSCTLS: [(&str, &str); 3] =
    [("net/ipv4/ip_forward", "1"), ("net/ipv4/conf/all/rp_filter", "0"), ("net/ipv4/conf/default/rp_filter", "0")];
const OUTSIDE_SYSCTLS: [(&str, &str); 3] = [
    ("net/ipv4/ip_forward", "1"),
    // What a process of the host sends to its own published port leaves as 127.0.0.1.
    ("net/ipv4/conf/skep-mesh/route_localnet", "1"),
    ("net/ipv4/conf/skep-mesh/rp_filter", "2"),
];

fn set_all(sysctls: &[(&str, &str)]) -> io::Result<()> {
    for (name, value) in sysctls {
        let path = format!("/proc/sys/{name}");
        let held = std::fs::read_to_string(&path).unwrap_or_default();
        if held.trim() != *value {
            std::fs::write(&path, value).map_err(|error| io::Error::new(error.kind(), format!("{path}: {error}")))?;
        }
    }
    Ok(())
}

/// The largest packets that pass to other nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Mtu {
    pub(crate) tunnel_bytes: u32,
    pub(crate) plain_bytes: u32,
}

impl Mtu {
    /// What the host's links take, less what a tunnel adds (80 bytes cover IPv6, UDP and the seal) or
    /// VXLAN does (70, likewise with IPv6).
    async fn of_host(outside: &Handle) -> io::Result<Self> {
        const TUNNEL_LEN: u32 = 80;
        const VXLAN_LEN: u32 = 70;
        let host = host_mtu_bytes(outside).await.map_err(io::Error::other)?.max(576 + TUNNEL_LEN);
        Ok(Self { tunnel_bytes: host - TUNNEL_LEN, plain_bytes: host - VXLAN_LEN })
    }
}

/// The smallest of what the links take that may lead to other nodes.
async fn host_mtu_bytes(outside: &Handle) -> Result<u32, rtnetlink::Error> {
    const USUAL: u32 = 1500;
    let mut links = outside.link().get().execute();
    let mut smallest = None;
    while let Some(link) = links.try_next().await? {
        let name = link.attributes.iter().find_map(|attribute| match attribute {
            LinkAttribute::IfName(name) => Some(name.as_str()),
            _ => None,
        });
        let mtu = link.attributes.iter().find_map(|attribute| match attribute {
            LinkAttribute::Mtu(bytes) => Some(*bytes),
            _ => None,
        });
        let up = link.header.flags.contains(LinkFlags::Up);
        // Bridges and pairs of containers lead to no other node.
        let foreign = ["lo", "skep", "docker", "veth", "br-", "skv"]
            .iter()
            .any(|prefix| name.is_none_or(|name| name.starts_with(prefix)));
        if let Some(mtu) = mtu.filter(|_| up && !foreign) {
            smallest = Some(smallest.map_or(mtu, |before: u32| before.min(mtu)));
        }
    }
    Ok(smallest.unwrap_or(USUAL))
}
