//! Bridges, and the pairs of links that lead from them into containers.

use std::io;
use std::os::fd::AsRawFd as _;

use rtnetlink::packet_route::link::{InfoData, InfoVeth, LinkMessage};
use rtnetlink::{Handle, LinkBridge, LinkBridgePort, LinkMessageBuilder, LinkUnspec, LinkVeth};
use skep_host_net::{
    Netlink, Netns, Reach, add_existing_is_fine, add_ipv6_address, allow_ipv6, link_address, link_index,
};

use super::{GATEWAY_MODE, GATEWAY_MODE_V6, GatewayMode, LocalNetwork, MacAddress, Member};

pub(super) async fn make_bridge(handle: &Handle, network: &LocalNetwork) -> Result<u32, rtnetlink::Error> {
    let name = &network.device;
    // A bridge that is told no address takes the lowest of its links': neighbours that know it would send to nobody
    // whenever a container comes or goes.
    let address = match link_address(handle, name).await {
        Some(address) => address,
        None => {
            let own = network.host_address().map(MacAddress::of).ok_or(rtnetlink::Error::RequestFailed)?;
            handle.link().add(LinkBridge::new(name).address(own.bytes().to_vec()).build()).execute().await?;
            own.bytes().to_vec()
        }
    };
    let index = link_index(handle, name).await.ok_or(rtnetlink::Error::RequestFailed)?;
    if let Some(v4) = network.v4.as_ref().filter(|_| network.gateway_mode(GATEWAY_MODE) != GatewayMode::Isolated) {
        let (gateway, prefix_len) = (v4.gateway.into(), v4.subnet.prefix_len());
        add_existing_is_fine(handle.address().add(index, gateway, prefix_len).execute().await)?;
    }
    match &network.v6 {
        Some(v6) if network.gateway_mode(GATEWAY_MODE_V6) != GatewayMode::Isolated => {
            allow_ipv6(name);
            add_ipv6_address(handle, index, v6.gateway, Reach::Network(v6.subnet.prefix_len())).await?;
        }
        Some(_) | None => without_ipv6(name),
    }
    let up = LinkUnspec::new_with_index(index).address(address).up();
    let up = network.mtu().into_iter().fold(up, LinkMessageBuilder::mtu).build();
    handle.link().set(up).execute().await?;
    Ok(index)
}

/// Takes IPv6 off a link of the host's: a container's router advertisements are heard by nobody.
fn without_ipv6(link: &str) {
    // Not there where the kernel has no IPv6.
    let _ = std::fs::write(format!("/proc/sys/net/ipv6/conf/{link}/disable_ipv6"), "1");
}

/// Says how a bridge treats this link: `apart`, it hands on nothing between it and others that are apart; `back`, it
/// hands on to the link what has come from it.
async fn set_port(handle: &Handle, link: &str, apart: bool, back: bool) -> Result<(), rtnetlink::Error> {
    let index = link_index(handle, link).await.ok_or(rtnetlink::Error::RequestFailed)?;
    handle.link().set_port(LinkBridgePort::new(index).isolated(apart).hairpin(back).build()).execute().await
}

/// What a container's link is called inside.
pub(super) fn eth(link: u32) -> String {
    format!("eth{link}")
}

/// The first link of a container has a short name on the host; further ones say which they are.
fn link_suffix(link: u32) -> String {
    if link == 0 { String::new() } else { format!("-{link}") }
}

/// Makes the pair of links that leads from a bridge into a container.
pub(super) async fn make_veth(
    member: &Member<'_>,
    network: &LocalNetwork,
    bridge: u32,
    namespace: &Netns,
    (link, mac): (u32, MacAddress),
) -> io::Result<()> {
    let host = format!("veth{}{}", &member.id[..member.id.len().min(8)], link_suffix(link));
    let pair = veth_pair(&host, bridge, namespace, link, (mac, network.mtu()));
    let outside = Netlink::open()?;
    if let Some(index) = link_index(outside.handle(), &host).await {
        // Of the container's last run: the kernel takes a namespace and its links down in its own
        // time. It may be gone by now.
        let _ = outside.handle().link().del(index).execute().await;
    }
    outside.handle().link().add(pair).execute().await.map_err(io::Error::other)?;
    without_ipv6(&host);
    // Where the kernel has bridges filter (br_netfilter), what a container sends to a port of the host's that is its own is
    // turned round within the bridge.
    let publishes = !member.ports.is_empty();
    if network.apart || publishes {
        set_port(outside.handle(), &host, network.apart, publishes).await.map_err(io::Error::other)?;
    }
    Ok(())
}

/// A pair of links: `host`, up and on `bridge`, and ethN in `namespace`, which cannot be up before the
/// other is there.
///
/// The pair is made where it belongs, in one step: a link that is moved to another namespace holds up
/// every other change of the host's network for some 15 ms.
fn veth_pair(
    host: &str,
    bridge: u32,
    namespace: &Netns,
    link: u32,
    (mac, mtu): (MacAddress, Option<u32>),
) -> LinkMessage {
    let inside = eth(link);
    let peer = LinkUnspec::new_with_name(&inside).setns_by_fd(namespace.as_raw_fd()).address(mac.bytes().to_vec());
    let pair = mtu.into_iter().fold(LinkVeth::new(host, &inside), LinkMessageBuilder::mtu);
    pair.set_info_data(InfoData::Veth(InfoVeth::Peer(peer.build()))).controller(bridge).up().build()
}
