//! What the devices to other nodes should know, and who speaks to whom past the rules.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use skep_api::overlay::{Fact, FactKey, OverlayNetwork};

use super::{Scene, address_in, kernel_port};
use crate::kernel::fast_path::{FastPathState, Via};
use crate::kernel::links::link_name;
use crate::kernel::plain::{self, PlainPeer, PlainState};
use crate::kernel::sealed::{SealedPeer, SealedState};
use crate::path::message::PeerIndex;
use crate::ruleset::Family;

/// Whose the addresses are that other nodes have in some networks.
pub(super) fn remote_addresses<'a>(
    scene: &'a Scene<'_>,
    of: impl Fn(&OverlayNetwork) -> bool + 'a,
) -> impl Iterator<Item = (IpAddr, PeerIndex)> + 'a {
    let remote = scene.holders().filter(move |(node, network, _)| *node != scene.own && of(network));
    remote.filter_map(|(node, _, address)| Some((address, *scene.indexes.get(&node)?)))
}

pub(super) fn plain_state(scene: &Scene<'_>) -> PlainState {
    if scene.networks().all(|network| network.encrypted) {
        return PlainState::default();
    }
    let own = scene.facts.get(&FactKey::Peer(scene.own)).and_then(|fact| match fact {
        Fact::Peer(peer) => peer.endpoint.parse::<SocketAddr>().ok(),
        _ => None,
    });
    let over_ipv6 = own.is_some_and(|own| own.is_ipv6());
    // One device speaks to hosts of one family.
    let peers: BTreeMap<PeerIndex, PlainPeer> = scene
        .peers()
        .filter(|(_, _, endpoint)| endpoint.is_ipv6() == over_ipv6)
        .map(|(index, peer, endpoint)| (index, PlainPeer { mac: plain::mac(peer.node), host: endpoint.ip() }))
        .collect();
    let addresses =
        remote_addresses(scene, |network| !network.encrypted).filter(|(_, index)| peers.contains_key(index));
    PlainState {
        needed: true,
        over_ipv6,
        port: scene.port + 1,
        own_mac: plain::mac(scene.own),
        addresses: addresses.collect(),
        peers,
    }
}

/// What passes through the kernel's own WireGuard: packets between containers. What comes in through published ports
/// has addresses of all the world, which WireGuard takes from one peer at most.
pub(super) fn sealed_state(scene: &Scene<'_>) -> SealedState {
    let able: BTreeMap<PeerIndex, SealedPeer> = scene
        .peers()
        .filter(|_| scene.in_kernel)
        .filter_map(|(index, peer, endpoint)| {
            let endpoint = SocketAddr::new(endpoint.ip(), peer.kernel_port?);
            Some((index, SealedPeer { key: *peer.keys.first()?, endpoint }))
        })
        .collect();
    let addresses: BTreeMap<IpAddr, PeerIndex> =
        remote_addresses(scene, |network| network.encrypted && !network.ingress)
            .filter(|(_, index)| able.contains_key(index))
            .collect();
    let holders: BTreeSet<PeerIndex> = addresses.values().copied().collect();
    SealedState {
        key: scene.keys.first().filter(|_| !holders.is_empty()).cloned(),
        port: kernel_port(scene.port),
        peers: able.into_iter().filter(|(index, _)| holders.contains(index)).collect(),
        addresses,
    }
}

/// Who speaks to whom by the fast path: containers of one network that are not on one node. What comes in through published
/// ports is led back by rules, and what passes through the kernel's own WireGuard by that.
pub(super) fn fast_path_state(scene: &Scene<'_>, plain: &PlainState, sealed: &SealedState) -> FastPathState {
    let mut state = FastPathState::default();
    for (id, place) in scene.locals.iter().flat_map(|(id, local)| local.places.iter().map(move |place| (id, place))) {
        let Some(network) = scene.network(place.network).filter(|network| !network.ingress) else { continue };
        for address in
            [Family::V4, Family::V6].into_iter().filter_map(|family| address_in(family, network, place.address))
        {
            state.locals.insert((link_name(id, place.link), address), network.id);
        }
    }
    for (node, network, address) in scene.holders().filter(|(_, network, _)| !network.ingress) {
        let via = match network.encrypted {
            _ if node == scene.own => None,
            true => Some(Via::Tunnel).filter(|_| !sealed.addresses.contains_key(&address)),
            false => plain.addresses.get(&address).map(|peer| Via::Plain(*peer)),
        };
        state.remotes.extend(via.map(|via| (address, (network.id, via))));
    }
    state
}
