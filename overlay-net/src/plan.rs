//! What this node's kernel and data path should do: (facts, the containers here) → everything, as
//! one value. It changes nothing and asks nobody.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;

use skep_api::overlay::{
    Fact, FactKey, OverlayAttachment, OverlayNetwork, OverlayService, OverlayTask, Peer, ServiceNetwork,
};
use skep_api::service::{PortConfig, Protocol};
use skep_api::{AttachmentId, NetworkId, NodeId, SecretBytes, ServiceId, TaskId};
use skep_name_server::Zone;

use crate::kernel::plain::{self, PlainPeer, PlainState};
use crate::kernel::{INSIDE, MESH_DEVICE, UPLINK, link_name};
use crate::path::DEVICE;
use crate::path::message::{PathState, PeerConfig, PeerIndex, ServedContainer, ZoneKey};
use crate::path::peers::mac;
use crate::ruleset::{Ruleset, spread};

/// A container of this node that has addresses in networks of the swarm.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct LocalContainer {
    pub(crate) netns: PathBuf,
    pub(crate) places: Vec<NetworkAddress>,
    /// What this node alone publishes for it.
    pub(crate) ports: Vec<LocalPort>,
    pub(crate) resolvers: Vec<std::net::IpAddr>,
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
}

/// Everything that should be.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Desired {
    pub(crate) path: PathState,
    pub(crate) plain: PlainState,
    /// Inside the overlay's namespace.
    pub(crate) inside: Ruleset,
    /// Outside, in the host's.
    pub(crate) outside: Ruleset,
    /// All addresses of tasks and containers that live: what is known of connections to others is to be forgotten.
    pub(crate) living: BTreeSet<Ipv4Addr>,
}

/// The facts, by kind.
pub(crate) struct Scene<'a> {
    pub(crate) own: NodeId,
    pub(crate) keys: &'a [SecretBytes],
    /// UDP, of the tunnels; the next one is VXLAN's.
    pub(crate) port: u16,
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

    fn services(&self) -> impl Iterator<Item = &OverlayService> {
        let id = ServiceId::from_u128;
        self.range(FactKey::Service(id(0)), FactKey::Service(id(u128::MAX))).filter_map(|fact| match fact {
            Fact::Service(service) => Some(service),
            _ => None,
        })
    }

    fn tasks(&self) -> impl Iterator<Item = &OverlayTask> {
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
    fn holders(&self) -> impl Iterator<Item = (NodeId, NetworkId, Ipv4Addr)> {
        let tasks = self.tasks().flat_map(|task| task.addresses.iter().map(|&(id, address)| (task.node, id, address)));
        tasks.chain(self.attachments().map(|held| (held.node, held.network, held.address)))
    }

    pub(crate) fn network(&self, id: NetworkId) -> Option<&OverlayNetwork> {
        match self.facts.get(&FactKey::Network(id))? {
            Fact::Network(network) => Some(network),
            _ => None,
        }
    }
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
    Desired {
        path: path_state(scene, &backends),
        plain: plain_state(scene),
        inside: inside(scene, &backends),
        outside: outside(scene),
        living,
    }
}

/// Whose the addresses are that other nodes have in networks that are encrypted, or in those that are not.
fn remote_addresses<'a>(scene: &'a Scene<'_>, encrypted: bool) -> impl Iterator<Item = (Ipv4Addr, PeerIndex)> + 'a {
    let of_kind = move |id: NetworkId| scene.network(id).is_some_and(|network| network.encrypted == encrypted);
    let remote = scene.holders().filter(move |&(node, network, _)| node != scene.own && of_kind(network));
    remote.filter_map(|(node, _, address)| Some((address, *scene.indexes.get(&node)?)))
}

fn plain_state(scene: &Scene<'_>) -> PlainState {
    if scene.networks().all(|network| network.encrypted) {
        return PlainState::default();
    }
    let peers = scene
        .peers()
        .map(|(index, peer, endpoint)| (index, PlainPeer { mac: plain::mac(peer.node), host: endpoint.ip() }));
    PlainState {
        needed: true,
        port: scene.port + 1,
        own_mac: plain::mac(scene.own),
        peers: peers.collect(),
        addresses: remote_addresses(scene, false).collect(),
    }
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
        addresses: remote_addresses(scene, true).collect(),
        subnets: tunnelled().map(|network| network.subnet).collect(),
        gateways: tunnelled().map(|network| network.gateway).collect(),
        ingress: scene.networks().find(|network| network.ingress).map(|network| network.subnet),
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

/// The names that hold in one network.
fn zone(scene: &Scene<'_>, network: &OverlayNetwork, backends: &Backends) -> Zone {
    let mut zone = Zone::default();
    let mut add = |name: &str, addresses: &[Ipv4Addr]| {
        let held = zone.names.entry(name.to_lowercase()).or_default();
        held.extend(addresses);
        held.sort_unstable();
        held.dedup();
    };
    for service in scene.services() {
        let Some(joined) = service.networks.iter().find(|joined| joined.network == network.id) else { continue };
        let tasks: Vec<Ipv4Addr> = backends.get(&(service.id, network.id)).into_iter().flatten().copied().collect();
        let own = joined.vip.map_or_else(|| tasks.clone(), |vip| vec![vip]);
        for name in std::iter::once(&service.name).chain(&joined.aliases) {
            add(name, &own);
            add(&format!("tasks.{name}"), &tasks);
        }
    }
    for task in scene.tasks() {
        for &(_, address) in task.addresses.iter().filter(|(id, _)| *id == network.id) {
            add(&task.name, &[address]);
        }
    }
    // What services and tasks are called is not to be had by calling a container so.
    let theirs: BTreeSet<String> = zone.names.keys().cloned().collect();
    for held in scene.attachments().filter(|held| held.network == network.id) {
        for name in held.names.iter().map(|name| name.to_lowercase()).filter(|name| !theirs.contains(name)) {
            zone.names.entry(name).or_default().push(held.address);
        }
    }
    zone.reverse = called(scene, network.id).map(|(at, name)| (at, format!("{name}.{}", network.name))).collect();
    zone
}

/// What each address of a network is called.
fn called<'a>(scene: &'a Scene<'_>, network: NetworkId) -> impl Iterator<Item = (Ipv4Addr, &'a String)> {
    let tasks = scene.tasks().flat_map(move |task| {
        let own = task.addresses.iter().filter(move |(id, _)| *id == network);
        own.map(|&(_, address)| (address, &task.name))
    });
    let containers = scene.attachments().filter(move |held| held.network == network);
    let services = scene.services().filter_map(move |service| {
        let vip = service.networks.iter().find(|joined| joined.network == network)?.vip?;
        Some((vip, &service.name))
    });
    tasks.chain(containers.filter_map(|held| Some((held.address, held.names.first()?)))).chain(services)
}

/// The rules of the overlay's namespace.
fn inside(scene: &Scene<'_>, backends: &Backends) -> Ruleset {
    let mut rules = Ruleset { table: "skep", frame: INSIDE_FRAME, ..Ruleset::default() };
    for network in scene.networks() {
        let subnet = network.subnet;
        rules.insert("same_network", format!("{subnet} . {subnet}"));
        if !network.encrypted {
            rules.insert("plain", subnet.to_string());
        }
        if network.ingress {
            rules.insert("entry", subnet.to_string());
        }
        if !network.internal {
            rules.insert("egress", subnet.to_string());
        }
    }
    for (id, local) in scene.locals {
        for &NetworkAddress { network, address, link } in &local.places {
            rules.insert("own", format!("\"{}\" . {address}", link_name(id, link)));
            rules.insert("itself", format!("{address} . {address}"));
            if let Some(network) = scene.network(network) {
                rules.map("gateway_of", address.to_string(), network.gateway.to_string());
            }
        }
        if let Some(NetworkAddress { address, .. }) = local.places.first() {
            for port in &local.ports {
                let name = format!("local-{}-{}", port.protocol.as_str(), port.host_port);
                publish(
                    &mut rules,
                    name,
                    port.protocol,
                    port.host_port,
                    &[format!("{address} . {}", port.container_port)],
                );
            }
        }
    }
    for &index in scene.indexes.values() {
        rules.map("peer_of", mac_text(index), index.to_string());
    }
    let entry = scene.networks().find(|network| network.ingress).map(|network| network.id);
    for service in scene.services() {
        for joined in &service.networks {
            virtual_address(&mut rules, service, joined, backends);
        }
        let tasks = entry.and_then(|entry| backends.get(&(service.id, entry)));
        for port in service.ports.iter().filter(|port| port.published_port != 0) {
            let target = |address: &Ipv4Addr| format!("{address} . {}", port.target_port);
            let targets: Vec<String> = tasks.into_iter().flatten().map(target).collect();
            let name = format!("port-{}-{}", port.protocol.as_str(), port.published_port);
            publish(&mut rules, name, port.protocol, port.published_port, &targets);
        }
    }
    rules
}

fn virtual_address(rules: &mut Ruleset, service: &OverlayService, joined: &ServiceNetwork, backends: &Backends) {
    let Some(vip) = joined.vip else { return };
    let tasks = backends.get(&(service.id, joined.network)).into_iter().flatten();
    let targets: Vec<String> = tasks.map(ToString::to_string).collect();
    rules.insert("vips", vip.to_string());
    if !targets.is_empty() {
        let name = format!("vip-{vip}").replace('.', "-");
        rules.map("virtual", vip.to_string(), format!("goto {name}"));
        rules.chains.insert(name, vec![spread(&targets)]);
    }
}

fn publish(rules: &mut Ruleset, name: String, protocol: Protocol, port: u16, targets: &[String]) {
    if !targets.is_empty() {
        rules.map("published", format!("{} . {port}", protocol.as_str()), format!("goto {name}"));
        let rule = format!("meta l4proto {} {}", protocol.as_str(), spread(targets));
        rules.chains.insert(name, vec![rule]);
    }
}

fn mac_text(index: PeerIndex) -> String {
    let bytes: Vec<String> = mac(index).iter().map(|byte| format!("{byte:02x}")).collect();
    bytes.join(":")
}

/// The rules of the host's own namespace: which of its ports lead into the overlay's.
fn outside(scene: &Scene<'_>) -> Ruleset {
    let mut rules = Ruleset { table: "skep_mesh", frame: OUTSIDE_FRAME, ..Ruleset::default() };
    for PortConfig { protocol, published_port, host_ip, .. } in scene.services().flat_map(|service| &service.ports) {
        let protocol = protocol.as_str();
        match host_ip {
            Some(address) => rules.insert("published_at", format!("{address} . {protocol} . {published_port}")),
            None => rules.insert("published", format!("{protocol} . {published_port}")),
        }
    }
    rules
}

/// What never changes inside. Packets from a container have its address; what comes in through
/// another node goes back through it; networks do not reach each other, least of all one that is
/// encrypted from outside its tunnels.
const INSIDE_FRAME: &str = r#"
  set own { type ifname . ipv4_addr; }
  set same_network { type ipv4_addr . ipv4_addr; flags interval; }
  set plain { type ipv4_addr; flags interval; }
  set entry { type ipv4_addr; flags interval; }
  set egress { type ipv4_addr; flags interval; }
  set itself { type ipv4_addr . ipv4_addr; }
  set vips { type ipv4_addr; }
  map gateway_of { type ipv4_addr : ipv4_addr; }
  map peer_of { type ether_addr : mark; }
  map virtual { type ipv4_addr : verdict; }
  map published { type inet_proto . inet_service : verdict; }
  chain spoofed {
    type filter hook prerouting priority -300
    iifname "skv*" iifname . ip saddr != @own drop
    iifname "plain0" ip saddr != @plain drop
    iifname "plain0" ip daddr != @plain drop
  }
  chain returning {
    type filter hook prerouting priority -150
    iifname "wire0" ct state new ct mark set ether saddr map @peer_of
    iifname != "wire0" ct direction reply ct mark != 0 meta mark set ct mark
  }
  chain translate {
    type nat hook prerouting priority -100
    ip daddr vmap @virtual
    iifname "uplink" ip daddr 169.254.77.2 meta l4proto . th dport vmap @published
  }
  chain reach {
    type filter hook forward priority 0; policy drop
    tcp flags syn tcp option maxseg size set rt mtu
    ct state established,related accept
    ip saddr . ip daddr @same_network ip daddr != @vips accept
    iifname "uplink" ct status dnat accept
    iifname "wire0" ct mark != 0 ip daddr @entry accept
    oifname "uplink" ip saddr @egress accept
    ip daddr @vips meta l4proto tcp reject with tcp reset
    ip daddr @vips reject
  }
  chain itself_again {
    type nat hook postrouting priority 100
    ip saddr . ip daddr @itself snat to ip saddr map @gateway_of
    oifname "uplink" masquerade
  }
"#;

const OUTSIDE_FRAME: &str = r#"
  set published { type inet_proto . inet_service; }
  set published_at { type ipv4_addr . inet_proto . inet_service; }
  chain enter {
    meta l4proto . th dport @published dnat to 169.254.77.2
    ip daddr . meta l4proto . th dport @published_at dnat to 169.254.77.2
  }
  chain arriving {
    type nat hook prerouting priority -101
    fib daddr type local jump enter
  }
  chain local {
    type nat hook output priority -101
    fib daddr type local jump enter
  }
  chain leaving {
    type nat hook postrouting priority 100
    iifname "skep-mesh" masquerade
    ip saddr 127.0.0.0/8 oifname "skep-mesh" masquerade
  }
"#;

const _: () = {
    // The frames name what the kernel module makes.
    assert!(DEVICE.len() == 5 && UPLINK.len() == 6 && MESH_DEVICE.len() == 9);
    assert!(INSIDE.octets()[2] == 77 && INSIDE.octets()[3] == 2);
};
