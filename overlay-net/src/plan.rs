//! What this node's kernel and data path should do: (facts, the containers here) → everything, as
//! one value. It changes nothing and asks nobody.

mod devices;
mod names;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::LazyLock;

use skep_api::overlay::{
    Fact, FactKey, OverlayAttachment, OverlayNetwork, OverlayService, OverlayTask, Peer, ServiceNetwork,
};
use skep_api::service::{PortConfig, Protocol};
use skep_api::{AttachmentId, IpSubnet, NetworkId, NodeId, SecretBytes, ServiceId, TaskId};
use skep_name_server::Zone;

use crate::kernel::fast_path::FastPathState;
use crate::kernel::links::link_name;
use crate::kernel::plain::{self, PlainState};
use crate::kernel::sealed::SealedState;
use crate::kernel::{MESH_DEVICE, UPLINK, inside_address};
use crate::path::DEVICE;
use crate::path::message::{PathState, PeerConfig, PeerIndex, ServedContainer, ZoneKey};
use crate::path::peers::mac;
use crate::ruleset::{Family, Part, Ruleset, Said, Spread, SpreadKey, Tables, Target};
use devices::{fast_path_state, plain_state, remote_addresses, sealed_state};
pub(crate) use names::names_of;
use names::zone;

/// A container of this node that has addresses in networks of the swarm.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct LocalContainer {
    pub(crate) netns: PathBuf,
    pub(crate) places: Vec<NetworkAddress>,
    /// What this node alone publishes for it.
    pub(crate) ports: Vec<LocalPort>,
    pub(crate) resolvers: Vec<IpAddr>,
    /// Whether what leads nowhere else leaves through a network here; if not, another lets it out.
    pub(crate) leads_out: bool,
    /// The names in its other networks.
    pub(crate) neighbours: Zone,
}

/// A container's place in a network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NetworkAddress {
    pub network: NetworkId,
    pub address: Ipv4Addr,
    /// The number of its link inside: eth0 is 0.
    pub link: u32,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LocalPort {
    pub protocol: Protocol,
    pub host_port: u16,
    pub container_port: u16,
    /// At every address of the host's, not at one that was named.
    pub everywhere: bool,
}

/// Everything that should be.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Desired {
    pub(crate) path: PathState,
    pub(crate) plain: PlainState,
    pub(crate) sealed: SealedState,
    pub(crate) fast_path: FastPathState,
    /// Inside the overlay's namespace.
    pub(crate) inside: Tables,
    /// Outside, in the host's.
    pub(crate) outside: Tables,
    /// All addresses of tasks and containers that live: what is known of connections to others is to be forgotten.
    pub(crate) living: BTreeSet<IpAddr>,
}

/// The facts, by kind.
pub(crate) struct Scene<'a> {
    pub(crate) own: NodeId,
    pub(crate) keys: &'a [SecretBytes],
    /// UDP, of the tunnels; the next one is VXLAN's, and the one after that of the kernel's own WireGuard.
    pub(crate) port: u16,
    /// Whether the kernel has WireGuard, and it is to be used.
    pub(crate) in_kernel: bool,
    pub(crate) facts: &'a BTreeMap<FactKey, Fact>,
    pub(crate) locals: &'a BTreeMap<String, LocalContainer>,
    pub(crate) indexes: &'a BTreeMap<NodeId, PeerIndex>,
}

impl Scene<'_> {
    /// The facts from one key to another: each kind's stand together.
    fn range(&self, first: FactKey, last: FactKey) -> impl Iterator<Item = &Fact> {
        self.facts.range(first..=last).map(|(_, fact)| fact)
    }

    /// The other nodes that can be reached.
    fn peers(&self) -> impl Iterator<Item = (PeerIndex, &Peer, SocketAddr)> {
        let id = NodeId::from_u128;
        self.range(FactKey::Peer(id(0)), FactKey::Peer(id(u128::MAX))).filter_map(|fact| match fact {
            Fact::Peer(peer) if peer.node != self.own => {
                Some((*self.indexes.get(&peer.node)?, peer, peer.endpoint.parse().ok()?))
            }
            _ => None,
        })
    }

    pub(crate) fn networks(&self) -> impl Iterator<Item = &OverlayNetwork> {
        let id = NetworkId::from_u128;
        self.range(FactKey::Network(id(0)), FactKey::Network(id(u128::MAX))).filter_map(|fact| match fact {
            Fact::Network(network) => Some(network),
            _ => None,
        })
    }

    pub(crate) fn services(&self) -> impl Iterator<Item = &OverlayService> {
        let id = ServiceId::from_u128;
        self.range(FactKey::Service(id(0)), FactKey::Service(id(u128::MAX))).filter_map(|fact| match fact {
            Fact::Service(service) => Some(service),
            _ => None,
        })
    }

    pub(crate) fn tasks(&self) -> impl Iterator<Item = &OverlayTask> {
        let id = TaskId::from_u128;
        self.range(FactKey::Task(id(0)), FactKey::Task(id(u128::MAX))).filter_map(|fact| match fact {
            Fact::Task(task) => Some(task),
            _ => None,
        })
    }

    fn attachments(&self) -> impl Iterator<Item = &OverlayAttachment> {
        let id = AttachmentId::from_u128;
        self.range(FactKey::Attachment(id(0)), FactKey::Attachment(id(u128::MAX))).filter_map(|fact| match fact {
            Fact::Attachment(attachment) => Some(attachment),
            _ => None,
        })
    }

    /// Every address that somebody has, with its network and its node.
    fn holders(&self) -> impl Iterator<Item = (NodeId, &OverlayNetwork, IpAddr)> {
        let tasks = self.tasks().flat_map(|task| task.addresses.iter().map(|&(id, address)| (task.node, id, address)));
        let held = tasks.chain(self.attachments().map(|held| (held.node, held.network, held.address)));
        held.filter_map(|(node, id, address)| Some((node, self.network(id)?, address))).flat_map(
            |(node, network, address)| {
                [Family::V4, Family::V6]
                    .into_iter()
                    .filter_map(move |family| Some((node, network, address_in(family, network, address)?)))
            },
        )
    }

    pub(crate) fn network(&self, id: NetworkId) -> Option<&OverlayNetwork> {
        match self.facts.get(&FactKey::Network(id))? {
            Fact::Network(network) => Some(network),
            _ => None,
        }
    }
}

/// The address in a family of who has `host` in a network, if the network is of that.
fn address_in(family: Family, network: &OverlayNetwork, host: Ipv4Addr) -> Option<IpAddr> {
    match family {
        Family::V4 => Some(host.into()),
        Family::V6 => network.address_v6(host).map(IpAddr::V6),
    }
}

fn subnet_in(family: Family, network: &OverlayNetwork) -> Option<IpSubnet> {
    match family {
        Family::V4 => Some(IpSubnet::V4(network.subnet)),
        Family::V6 => network.v6.map(|side| IpSubnet::V6(side.subnet)),
    }
}

fn gateway_in(family: Family, network: &OverlayNetwork) -> Option<IpAddr> {
    match family {
        Family::V4 => Some(network.gateway.into()),
        Family::V6 => network.v6.map(|side| side.gateway.into()),
    }
}

/// What `of` says of a network in each family.
fn of_both<T>(network: &OverlayNetwork, of: impl Fn(Family, &OverlayNetwork) -> Option<T>) -> impl Iterator<Item = T> {
    [of(Family::V4, network), of(Family::V6, network)].into_iter().flatten()
}

/// The tasks that take connections, by service and network.
type Backends = BTreeMap<(ServiceId, NetworkId), BTreeSet<Ipv4Addr>>;

pub(crate) fn plan(scene: &Scene<'_>) -> Desired {
    let mut backends = Backends::new();
    for task in scene.tasks().filter(|task| task.serving) {
        for &(network, address) in &task.addresses {
            backends.entry((task.service, network)).or_default().insert(address);
        }
    }
    let living = scene.holders().map(|(_, _, address)| address).collect();
    let v6 = scene.networks().any(|network| network.v6.is_some());
    let (plain, sealed) = (plain_state(scene), sealed_state(scene));
    Desired {
        path: path_state(scene, &backends),
        fast_path: fast_path_state(scene, &plain, &sealed),
        plain,
        sealed,
        inside: Tables {
            v4: inside(scene, &backends, Family::V4),
            v6: v6.then(|| inside(scene, &backends, Family::V6)),
        },
        outside: Tables { v4: outside(scene, Family::V4), v6: v6.then(|| outside(scene, Family::V6)) },
        living,
    }
}

/// The port of the kernel's own WireGuard, beside the tunnels'.
pub(crate) const fn kernel_port(port: u16) -> u16 {
    port + 2
}

fn path_state(scene: &Scene<'_>, backends: &Backends) -> PathState {
    let peers = scene
        .peers()
        .map(|(index, peer, endpoint)| (index, PeerConfig { node: peer.node, keys: peer.keys.clone(), endpoint }));
    let tunnelled = || scene.networks().filter(|network| network.encrypted);
    let zones = scene.networks().filter(|network| !network.ingress);
    PathState {
        keys: scene.keys.to_vec(),
        peers: peers.collect(),
        addresses: remote_addresses(scene, |network| network.encrypted).collect(),
        subnets: tunnelled().flat_map(|network| of_both(network, subnet_in)).collect(),
        gateways: tunnelled().flat_map(|network| of_both(network, gateway_in)).collect(),
        ingress: scene
            .networks()
            .filter(|network| network.ingress)
            .flat_map(|network| of_both(network, subnet_in))
            .collect(),
        zones: zones
            .map(|network| (ZoneKey::Network(network.id), zone(scene, network, backends)))
            .chain(scene.locals.iter().filter_map(|(id, local)| neighbours(id, local)))
            .collect(),
        served: scene.locals.iter().map(|(id, local)| (id.clone(), served(scene, id, local))).collect(),
    }
}

/// The names of what else a container sees, if there are any.
fn neighbours(id: &str, local: &LocalContainer) -> Option<(ZoneKey, Zone)> {
    let some = local.neighbours != Zone::default();
    some.then(|| (ZoneKey::Container(id.to_owned()), local.neighbours.clone()))
}

fn served(scene: &Scene<'_>, id: &str, local: &LocalContainer) -> ServedContainer {
    let joined = || local.places.iter().filter_map(|place| scene.network(place.network));
    let networks = joined().filter(|network| !network.ingress).map(|network| ZoneKey::Network(network.id));
    ServedContainer {
        netns: local.netns.clone(),
        networks: networks.chain(neighbours(id, local).map(|(key, _)| key)).collect(),
        forward: !local.leads_out || joined().any(|network| !network.internal),
        resolvers: local.resolvers.clone(),
    }
}

/// The rules of the overlay's namespace, for one family.
fn inside(scene: &Scene<'_>, backends: &Backends, family: Family) -> Ruleset {
    let mut rules = Ruleset { family, table: TABLE, frame: inside_frame(family), ..Ruleset::default() };
    for network in scene.networks() {
        let Some(subnet) = subnet_in(family, network) else { continue };
        rules.insert("same_network", [subnet.into(), subnet.into()]);
        if !network.encrypted {
            rules.insert("plain", [subnet.into()]);
        }
        if network.ingress {
            rules.insert("entry", [subnet.into()]);
            if !network.encrypted {
                rules.insert("plain_entry", [subnet.into()]);
            }
        }
        if !network.internal {
            rules.insert("egress", [subnet.into()]);
        }
    }
    for (id, local) in scene.locals {
        local_rules(scene, &mut rules, (id, local));
    }
    for (&node, &index) in scene.indexes {
        rules.map("peer_of", [Part::Mac(mac(index))], Said::Mark(index.into()));
        rules.map("peer_of", [Part::Mac(plain::mac(node))], Said::Mark(plain::mark(index)));
    }
    let entry = scene.networks().find(|network| network.ingress);
    for service in scene.services() {
        for joined in &service.networks {
            virtual_address(scene, &mut rules, (service, joined), backends);
        }
        let hosts = |network: &OverlayNetwork| backends.get(&(service.id, network.id));
        for port in service.ports.iter().filter(|port| port.published_port != 0) {
            if let Some((entry, hosts)) = entry.and_then(|entry| Some((entry, hosts(entry)?))) {
                let (name, spread) = port_chain(family, entry, port, hosts);
                publish(&mut rules, name, spread);
            }
        }
    }
    rules
}

/// What follows from a container that is here.
fn local_rules(scene: &Scene<'_>, rules: &mut Ruleset, (id, local): (&str, &LocalContainer)) {
    let family = rules.family;
    let own = |place: &NetworkAddress| {
        let network = scene.network(place.network)?;
        Some((network, address_in(family, network, place.address)?))
    };
    for place in &local.places {
        let Some((network, address)) = own(place) else { continue };
        rules.insert("own", [Part::Link(link_name(id, place.link)), address.into()]);
        rules.insert("itself", [address.into(), address.into()]);
        if let Some(gateway) = gateway_in(family, network) {
            rules.map("gateway_of", [address.into()], Said::Address(gateway));
        }
    }
    let Some((_, address)) = local.places.iter().find_map(own) else { return };
    for port in &local.ports {
        let name = format!("local-{}-{}", port.protocol.as_str(), port.host_port);
        let targets = vec![Target { address, port: Some(port.container_port) }];
        publish(rules, name, Spread { key: SpreadKey::Port(port.protocol, port.host_port), targets });
    }
}

fn virtual_address(
    scene: &Scene<'_>,
    rules: &mut Ruleset,
    (service, joined): (&OverlayService, &ServiceNetwork),
    backends: &Backends,
) {
    let Some(network) = scene.network(joined.network) else { return };
    let nobody = BTreeSet::new();
    let hosts = backends.get(&(service.id, joined.network)).unwrap_or(&nobody);
    let Some((vip, name, spread)) = virtual_chain(rules.family, network, joined, hosts) else { return };
    rules.insert("vips", [vip.into()]);
    if !spread.targets.is_empty() {
        rules.map("virtual", [vip.into()], Said::Goto(name.clone()));
        rules.chains.insert(name, spread);
    }
}

/// The chain of a service's virtual address, with the address, if it has one in the family.
pub(crate) fn virtual_chain(
    family: Family,
    network: &OverlayNetwork,
    joined: &ServiceNetwork,
    hosts: &BTreeSet<Ipv4Addr>,
) -> Option<(IpAddr, String, Spread)> {
    let vip = joined.vip.and_then(|vip| address_in(family, network, vip))?;
    let targets = hosts.iter().filter_map(|&host| address_in(family, network, host));
    let targets = targets.map(|address| Target { address, port: None }).collect();
    let name = format!("vip-{vip}").replace(['.', ':'], "-");
    Some((vip, name, Spread { key: SpreadKey::Address(vip), targets }))
}

/// The chain of a published port, which leads to `hosts` in the network that ports come in through.
pub(crate) fn port_chain(
    family: Family,
    entry: &OverlayNetwork,
    port: &PortConfig,
    hosts: &BTreeSet<Ipv4Addr>,
) -> (String, Spread) {
    let targets = hosts.iter().filter_map(|&host| address_in(family, entry, host));
    let targets = targets.map(|address| Target { address, port: Some(port.target_port) }).collect();
    let name = format!("port-{}-{}", port.protocol.as_str(), port.published_port);
    (name, Spread { key: SpreadKey::Port(port.protocol, port.published_port), targets })
}

fn publish(rules: &mut Ruleset, name: String, spread: Spread) {
    if let (SpreadKey::Port(protocol, port), false) = (spread.key, spread.targets.is_empty()) {
        rules.map("published", [Part::Protocol(protocol), Part::Port(port)], Said::Goto(name.clone()));
        rules.chains.insert(name, spread);
    }
}

/// The table of the overlay's namespace.
pub(crate) const TABLE: &str = "skep";
/// The table of the host's own namespace.
pub(crate) const MESH_TABLE: &str = "skep_mesh";

/// The rules of the host's own namespace, for one family: which of its ports lead into the overlay's.
fn outside(scene: &Scene<'_>, family: Family) -> Ruleset {
    let mut rules = Ruleset { family, table: MESH_TABLE, frame: outside_frame(family), ..Ruleset::default() };
    let entered = scene.networks().any(|network| network.ingress && subnet_in(family, network).is_some());
    let ports = scene.services().filter(|_| entered).flat_map(|service| &service.ports);
    for PortConfig { protocol, published_port, host_ip, .. } in ports {
        let [protocol, port] = [Part::Protocol(*protocol), Part::Port(*published_port)];
        match host_ip {
            Some(address) if family == Family::V4 => {
                rules.insert("published_at", [Part::Address(IpAddr::V4(*address)), protocol, port]);
            }
            // An address is not widened.
            Some(_) => {}
            None => rules.insert("published", [protocol, port]),
        }
    }
    // Those of IPv4 whoever joined the container leads in.
    let has_v6 = |local: &&LocalContainer| {
        local.places.iter().any(|place| scene.network(place.network).is_some_and(|network| network.v6.is_some()))
    };
    let locals = scene.locals.values().filter(has_v6).filter(|_| family == Family::V6);
    for port in locals.flat_map(|local| &local.ports).filter(|port| port.everywhere) {
        rules.insert("published", [Part::Protocol(port.protocol), Part::Port(port.host_port)]);
    }
    rules
}

/// A frame in the words of a family.
fn frame(template: &str, family: Family) -> String {
    let (neighbours, unpublished, from_loopback) = match family {
        Family::V4 => ("", "", "    ip saddr 127.0.0.0/8 oifname \"skep-mesh\" masquerade\n"),
        Family::V6 => (
            // Containers find their gateways so, and are found; one that lies harms its own link.
            "    iifname \"skv*\" icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert } accept\n",
            // No packet from ::1 may leave its host: who asks there is refused at once, and not kept waiting.
            "    ip6 daddr ::1 return\n",
            "",
        ),
    };
    template
        .replace("$address", family.address_type())
        .replace("$ip", family.name())
        .replace("$inside", &inside_address(family).to_string())
        .replace("    $neighbours\n", neighbours)
        .replace("    $unpublished\n", unpublished)
        .replace("    $from_loopback\n", from_loopback)
}

static INSIDE_FRAMES: LazyLock<[String; 2]> =
    LazyLock::new(|| [Family::V4, Family::V6].map(|family| frame(INSIDE_FRAME, family)));
static OUTSIDE_FRAMES: LazyLock<[String; 2]> =
    LazyLock::new(|| [Family::V4, Family::V6].map(|family| frame(OUTSIDE_FRAME, family)));

fn inside_frame(family: Family) -> &'static str {
    &INSIDE_FRAMES[family as usize]
}

fn outside_frame(family: Family) -> &'static str {
    &OUTSIDE_FRAMES[family as usize]
}

/// What never changes inside. Packets from a container have its address; what comes in through
/// another node goes back through it; networks do not reach each other, least of all one that is
/// encrypted from outside its tunnels: outside of them only an unencrypted ingress network takes packets of others,
/// and answers them.
const INSIDE_FRAME: &str = r#"
  set own { type ifname . $address; }
  set same_network { type $address . $address; flags interval; }
  set plain { type $address; flags interval; }
  set entry { type $address; flags interval; }
  set plain_entry { type $address; flags interval; }
  set egress { type $address; flags interval; }
  set itself { type $address . $address; }
  set vips { type $address; }
  map gateway_of { type $address : $address; }
  map peer_of { type ether_addr : mark; }
  map virtual { type $address : verdict; }
  map published { type inet_proto . inet_service : verdict; }
  chain spoofed {
    type filter hook prerouting priority -300
    $neighbours
    iifname "skv*" iifname . $ip saddr != @own drop
    iifname "plain0" $ip saddr != @plain $ip daddr != @plain_entry drop
    iifname "plain0" $ip daddr != @plain $ip saddr != @plain_entry drop
  }
  chain returning {
    type filter hook prerouting priority -150
    iifname "plain0" $ip daddr != @plain ct state != { established, related } drop
    iifname { "wire0", "plain0" } $ip daddr @entry ct state new ct mark set ether saddr map @peer_of
    iifname != { "wire0", "plain0" } ct direction reply ct mark != 0 meta mark set ct mark
  }
  chain translate {
    type nat hook prerouting priority -100
    $ip daddr vmap @virtual
    iifname "uplink" $ip daddr $inside meta l4proto . th dport vmap @published
  }
  chain reach {
    type filter hook forward priority 0; policy drop
    tcp flags syn tcp option maxseg size set rt mtu
    ct state established,related accept
    $ip saddr . $ip daddr @same_network $ip daddr != @vips accept
    iifname "uplink" ct status dnat accept
    iifname { "wire0", "plain0" } ct mark != 0 $ip daddr @entry accept
    oifname "uplink" $ip saddr @egress accept
    $ip daddr @vips meta l4proto tcp reject with tcp reset
    $ip daddr @vips reject
  }
  chain itself_again {
    type nat hook postrouting priority 100
    $ip saddr . $ip daddr @itself snat to $ip saddr map @gateway_of
    oifname "uplink" masquerade
  }
"#;

const OUTSIDE_FRAME: &str = r#"
  set published { type inet_proto . inet_service; }
  set published_at { type $address . inet_proto . inet_service; }
  chain enter {
    meta l4proto . th dport @published dnat to $inside
    $ip daddr . meta l4proto . th dport @published_at dnat to $inside
  }
  chain arriving {
    type nat hook prerouting priority -101
    fib daddr type local jump enter
  }
  chain local {
    type nat hook output priority -101
    $unpublished
    fib daddr type local jump enter
  }
  chain leaving {
    type nat hook postrouting priority 100
    iifname "skep-mesh" masquerade
    $from_loopback
  }
"#;

const _: () = {
    // The frames name what the kernel module makes.
    assert!(DEVICE.len() == 5 && UPLINK.len() == 6 && MESH_DEVICE.len() == 9);
};
