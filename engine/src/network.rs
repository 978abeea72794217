//! The networks of one host: bridges, a veth pair per place of a container, addresses, names,
//! masquerading to the outside, and published ports, all rules in one nftables table that is replaced
//! as a whole.

mod forwarder;
mod guard;
mod keeper;
pub(crate) mod lease;
mod links;
mod local;
mod names;
pub(crate) mod parent;
mod place;
mod ruleset;
mod v6;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use rtnetlink::{Handle, LinkMessageBuilder, LinkUnspec, RouteMessageBuilder};
use skep_api::Subnet;
use skep_host_net::{
    LOOPBACK_INDEX, Netlink, Netns, Reach, add_existing_is_fine, add_ipv6_address, allow_ipv6_in, forward_ipv6,
    has_ipv6, link_index,
};
use skep_name_server::NameServers;

pub use forwarder::forward_main;
pub(crate) use guard::guard;
pub use keeper::{Grant, Joining, KeeperReply, KeptNetwork, NetworkKeeper};
pub use local::{BridgeConfig, DEFAULT_NETWORK, HOST_BINDING, Ipv4Side, LocalNetwork, MTU};
pub(crate) use local::{GATEWAY_MODE, GATEWAY_MODE_V6, GatewayMode, HOST_SOURCE, HOST_SOURCE_V6};
pub use parent::Parent;
pub use place::{Endpoint, MacAddress, WantedPlace};
pub use v6::Ipv6Side;

use crate::container::config::PublishedPort;
use crate::container::id_map;
use crate::disk;
use crate::engine::HelperProgram;
use crate::network::forwarder::{Forwarder, why_not_free};
use crate::network::lease::{Held, Lease, pick_address, pick_address_v6, pick_ports, taken_addresses};
use crate::network::links::{eth, make_bridge, make_veth};
use crate::network::names::Links;
use crate::network::ruleset::{cleared, ruleset};

/// RFC 3927.
const LINK_LOCAL_PREFIX_LEN: u8 = 16;

impl Eq for PublishedPort {}

/// A container as the networks know it.
#[derive(Clone, Debug)]
pub(crate) struct Member<'a> {
    pub(crate) id: &'a str,
    /// What neighbours call it in every network.
    pub(crate) names: Vec<String>,
    pub(crate) ports: &'a [PublishedPort],
    pub(crate) resolvers: &'a [String],
    /// Whose namespaces are to be its own; none: the host's.
    pub(crate) user_namespace: Option<PathBuf>,
}

/// The host's networks and who is in them.
#[derive(Debug)]
pub(crate) struct Networks {
    /// Where those that users made are kept.
    dir: PathBuf,
    netns_dir: PathBuf,
    all: Mutex<BTreeMap<String, LocalNetwork>>,
    leases: Mutex<BTreeMap<String, Lease>>,
    /// The bridges' indexes, once they are set up.
    indexes: tokio::sync::Mutex<BTreeMap<String, u32>>,
    rules: tokio::sync::Mutex<()>,
    names: tokio::sync::Mutex<NameServers<String>>,
    resolvers: Mutex<BTreeMap<String, Vec<String>>>,
    /// What containers call others, network by network.
    links: Mutex<BTreeMap<String, Links>>,
    keeper: Mutex<Option<Arc<dyn NetworkKeeper>>>,
    helper: Arc<HelperProgram>,
    forwarder: Forwarder,
    /// Whether published ports are listened at.
    forwards: bool,
}

impl Networks {
    pub(crate) fn open(
        config: &BridgeConfig,
        dir: PathBuf,
        run_dir: &Path,
        helper: Arc<HelperProgram>,
        forwards: bool,
    ) -> io::Result<Self> {
        let netns_dir = run_dir.join("netns");
        fs::create_dir_all(&netns_dir)?;
        fs::create_dir_all(&dir)?;
        let subnet = Subnet::new(config.gateway, config.prefix_len)
            .ok_or_else(|| io::Error::other("the bridge's prefix length is not possible"))?;
        let v4 = Ipv4Side { gateway: config.gateway, range: config.range, ..Ipv4Side::new(subnet) };
        let default = LocalNetwork {
            device: config.name.clone(),
            v6: config.v6.clone(),
            apart: config.apart,
            options: config.options.clone(),
            ..LocalNetwork::new(DEFAULT_NETWORK, Some(v4))
        };
        let mut all = BTreeMap::from([(default.id.clone(), default)]);
        for entry in fs::read_dir(&dir)?.flatten() {
            match fs::read(entry.path()).map(|bytes| serde_json::from_slice::<LocalNetwork>(&bytes)) {
                Ok(Ok(network)) => drop(all.insert(network.id.clone(), network)),
                Ok(Err(error)) => {
                    tracing::error!(path = %entry.path().display(), %error, "a network's record is damaged: make it again");
                }
                Err(error) => return Err(error),
            }
        }
        Ok(Self {
            dir,
            netns_dir,
            all: Mutex::new(all),
            leases: Mutex::default(),
            indexes: tokio::sync::Mutex::default(),
            rules: tokio::sync::Mutex::default(),
            names: tokio::sync::Mutex::default(),
            resolvers: Mutex::default(),
            links: Mutex::default(),
            keeper: Mutex::default(),
            forwarder: Forwarder::new(helper.clone(), run_dir.to_owned()),
            forwards,
            helper,
        })
    }

    pub(crate) fn netns_path(&self, container: &str) -> PathBuf {
        self.netns_dir.join(container)
    }

    fn leases(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, Lease>> {
        self.leases.lock().expect("nobody panics while holding it")
    }

    fn all(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, LocalNetwork>> {
        self.all.lock().expect("nobody panics while holding it")
    }

    pub(crate) fn keeper(&self) -> Option<Arc<dyn NetworkKeeper>> {
        self.keeper.lock().expect("nobody panics while holding it").clone()
    }

    pub(crate) fn set_keeper(&self, keeper: Option<Arc<dyn NetworkKeeper>>) {
        *self.keeper.lock().expect("nobody panics while holding it") = keeper;
    }

    /// All networks of the host's, by id.
    pub(crate) fn list(&self) -> Vec<LocalNetwork> {
        self.all().values().cloned().collect()
    }

    pub(crate) fn get(&self, id: &str) -> Option<LocalNetwork> {
        self.all().get(id).cloned()
    }

    /// Keeps a new network; it is made once somebody joins it.
    pub(crate) fn add(&self, network: LocalNetwork) -> io::Result<()> {
        let bytes = serde_json::to_vec_pretty(&network)?;
        disk::write_whole(&self.dir.join(format!("{}.json", network.id)), &bytes)?;
        self.all().insert(network.id.clone(), network);
        Ok(())
    }

    /// Removes a network that nobody is in.
    pub(crate) async fn remove(&self, network: &LocalNetwork) -> io::Result<()> {
        let made = self.indexes.lock().await.remove(&network.id);
        fs::remove_file(self.dir.join(format!("{}.json", network.id)))?;
        self.all().remove(&network.id);
        let netlink = Netlink::open()?;
        // One of an earlier daemon's has no index here.
        let own = network.parent.as_ref().is_none_or(|parent| parent.own);
        if let Some(index) = made.or(link_index(netlink.handle(), &network.device).await).filter(|_| own) {
            netlink.handle().link().del(index).execute().await.map_err(io::Error::other)?;
        }
        // The table of IPv6 is written only for those that have it, and so would outlive the last of them.
        let gone = if network.v6.is_some() { cleared(v6::TABLE) } else { String::new() };
        self.write_rules_after(gone).await
    }

    /// Takes back what a running container had before the daemon's restart: its places, or what its
    /// ports lead through.
    pub(crate) fn adopt(
        &self,
        container: &str,
        endpoints: &[Endpoint],
        through: Option<Ipv4Addr>,
        ports: Vec<PublishedPort>,
        resolvers: &[String],
    ) {
        let held = |endpoint: &Endpoint| Held {
            network: endpoint.network.clone(),
            address: endpoint.address,
            address_v6: endpoint.address_v6,
            names: endpoint.names.clone(),
            link: endpoint.link,
            gateway_priority: endpoint.gateway_priority,
        };
        let places = endpoints.iter().map(held).collect();
        self.leases().insert(container.to_owned(), Lease { places, through, ports });
        self.resolvers.lock().expect("nobody panics while holding it").insert(container.to_owned(), resolvers.to_vec());
    }

    /// This host's addresses in its own networks, some of whose links are made when a container joins.
    fn gateways(&self) -> BTreeSet<IpAddr> {
        let all = self.all();
        let v4 = all.values().filter_map(|network| Some(network.v4.as_ref()?.gateway.into()));
        v4.chain(all.values().filter_map(|network| Some(network.v6.as_ref()?.gateway.into()))).collect()
    }

    /// Makes a namespace for a container that joins networks that are not this host's, and sets its
    /// ports aside.
    pub(crate) async fn prepare(&self, member: &Member<'_>) -> io::Result<Vec<PublishedPort>> {
        let gateways = self.gateways();
        let leased = {
            let mut leases = self.leases();
            let leased = pick_ports(&leases, member.ports, |port| why_not_had(port, &gateways))?;
            leases.insert(member.id.to_owned(), Lease { ports: leased.clone(), ..Lease::default() });
            leased
        };
        self.make_netns(member).await?;
        Ok(leased)
    }

    async fn make_netns(&self, member: &Member<'_>) -> io::Result<Netns> {
        let path = self.netns_path(member.id);
        let Some(owner) = member.user_namespace.clone() else { return Netns::create(&path).await };
        let (helper, pin) = (self.helper.clone(), path.clone());
        let pinned = tokio::task::spawn_blocking(move || id_map::pin_network(&helper, &owner, &pin));
        pinned.await.map_err(io::Error::other)??;
        Netns::open(&path)
    }

    /// Opens the ports that were set aside: they lead through `through`, or to the container's own place.
    pub(crate) async fn lead(&self, container: &str, through: Option<Ipv4Addr>) -> io::Result<()> {
        let published = {
            let mut leases = self.leases();
            let lease = leases.get_mut(container);
            lease.is_some_and(|lease| {
                let other = std::mem::replace(&mut lease.through, through) != through;
                other && !lease.ports.is_empty()
            })
        };
        if published { self.write_rules().await } else { Ok(()) }
    }

    /// Makes a namespace with nothing but its loopback.
    pub(crate) async fn isolate(&self, member: &Member<'_>) -> io::Result<()> {
        let netns = self.make_netns(member).await?;
        let netlink = Netlink::open_in(&netns).await?;
        let up = LinkUnspec::new_with_index(LOOPBACK_INDEX).up().build();
        netlink.handle().link().set(up).execute().await.map_err(io::Error::other)
    }

    /// Makes a container's namespace and gives it its places; room is left for those that were `granted`.
    pub(crate) async fn connect(
        &self,
        member: &Member<'_>,
        places: &[WantedPlace],
        granted: Vec<Endpoint>,
    ) -> io::Result<(Vec<Endpoint>, Vec<PublishedPort>)> {
        let connected = self.connect_all(member, places, granted).await;
        if connected.is_err() {
            // The first error is the one to tell.
            let _ = self.disconnect(member.id).await;
        }
        connected
    }

    async fn connect_all(
        &self,
        member: &Member<'_>,
        places: &[WantedPlace],
        granted: Vec<Endpoint>,
    ) -> io::Result<(Vec<Endpoint>, Vec<PublishedPort>)> {
        let gateways = self.gateways();
        let ports = {
            let all = self.all().clone();
            // In an internal network they lead nowhere until the container joins another.
            let leads = |place: &WantedPlace| {
                let leads = |network: &LocalNetwork| network.leads_ports(false) || network.leads_ports(true);
                all.get(&place.network).is_none_or(|network| network.internal || leads(network))
            };
            let mut leases = self.leases();
            let ports = match places.is_empty() || places.iter().any(leads) {
                true => pick_ports(&leases, member.ports, |port| why_not_had(port, &gateways))?,
                // They are opened at its own addresses, and none of the host's.
                false => member.ports.iter().map(|port| PublishedPort { host_port: 0, ..port.clone() }).collect(),
            };
            leases.insert(member.id.to_owned(), Lease { ports: ports.clone(), ..Lease::default() });
            ports
        };
        let resolvers = member.resolvers.to_vec();
        self.resolvers.lock().expect("nobody panics while holding it").insert(member.id.to_owned(), resolvers);
        let netns = self.make_netns(member).await?;
        let inside = Netlink::open_in(&netns).await?;
        let up = LinkUnspec::new_with_index(LOOPBACK_INDEX).up().build();
        inside.handle().link().set(up).execute().await.map_err(io::Error::other)?;
        let (mut endpoints, mut granted) = (Vec::new(), granted.into_iter());
        for place in places {
            let kept = if place.kept { granted.next() } else { None };
            endpoints.push(match kept {
                Some(endpoint) => self.make_room(member.id, endpoint),
                None => self.attach(member, place, &netns, inside.handle()).await?,
            });
        }
        if !ports.is_empty() {
            self.write_rules().await?;
        }
        self.serve_names().await;
        Ok((endpoints, ports))
    }

    /// Leaves room for a link that a keeper makes.
    pub(crate) fn make_room(&self, container: &str, endpoint: Endpoint) -> Endpoint {
        let mut leases = self.leases();
        let lease = leases.entry(container.to_owned()).or_default();
        let link = lease.free_link();
        let Endpoint { network, address, names, .. } = endpoint.clone();
        lease.places.push(Held { network, address, address_v6: None, names, link, gateway_priority: 0 });
        Endpoint { link, ..endpoint }
    }

    /// Whether a network of the host's lets a container's packets out.
    pub(crate) fn lets_out(&self, container: &str) -> bool {
        let (all, leases) = (self.all(), self.leases());
        let places = leases.get(container).into_iter().flat_map(|lease| &lease.places);
        places.filter_map(|place| all.get(&place.network)).any(|network| !network.internal)
    }

    /// Gives a running container one more place.
    pub(crate) async fn join(&self, member: &Member<'_>, place: &WantedPlace) -> io::Result<Endpoint> {
        let netns = Netns::open(&self.netns_path(member.id))?;
        let inside = Netlink::open_in(&netns).await?;
        let endpoint = self.attach(member, place, &netns, inside.handle()).await?;
        self.write_rules().await?;
        self.serve_names().await;
        Ok(endpoint)
    }

    /// Takes a place from a running container.
    pub(crate) async fn part(&self, container: &str, network: &str) -> io::Result<()> {
        let link = {
            let mut leases = self.leases();
            let Some(lease) = leases.get_mut(container) else { return Ok(()) };
            let at = lease.places.iter().position(|place| place.network == network);
            at.map(|at| lease.places.remove(at).link)
        };
        if let Some(link) = link {
            let netns = Netns::open(&self.netns_path(container))?;
            let inside = Netlink::open_in(&netns).await?;
            // A link that is gone needs no removal.
            if let Some(index) = link_index(inside.handle(), &eth(link)).await {
                inside.handle().link().del(index).execute().await.map_err(io::Error::other)?;
            }
            self.route_out(container, inside.handle()).await?;
        }
        self.write_rules().await?;
        self.serve_names().await;
        Ok(())
    }

    /// Makes the links of one place, and the routes that it brings.
    async fn attach(
        &self,
        member: &Member<'_>,
        place: &WantedPlace,
        netns: &Netns,
        inside: &Handle,
    ) -> io::Result<Endpoint> {
        let below = self.link_below(&place.network).await?;
        let network = self.get(&place.network).ok_or_else(|| io::Error::other("the network has just been removed"))?;
        let held = {
            let mut leases = self.leases();
            let address = pick_address(&network, &taken_addresses(&leases, &network.id), place.address)?;
            let address_v6 = pick_address_v6(&network, &leases, place.address_v6)?;
            let lease = leases.entry(member.id.to_owned()).or_default();
            let link = lease.free_link();
            let names = member.names.iter().chain(&place.aliases).cloned().collect();
            let (network, gateway_priority) = (network.id.clone(), place.gateway_priority);
            let held = Held { network, address, address_v6, names, link, gateway_priority };
            lease.places.push(held.clone());
            held
        };
        let first = held.address.map(IpAddr::from).or_else(|| held.address_v6.map(IpAddr::from));
        let mac =
            place.mac.or_else(|| first.map(MacAddress::of)).ok_or_else(|| io::Error::other("no address is given"))?;
        let made = async {
            match &network.parent {
                Some(parent) => parent.make_link(below, netns, held.link, mac).await?,
                None => make_veth(member, &network, below, netns, (held.link, mac)).await?,
            }
            let index =
                link_index(inside, &eth(held.link)).await.ok_or_else(|| io::Error::other("its link is gone"))?;
            let own = network.v4.as_ref().and_then(|v4| Some((held.address?, v4.subnet.prefix_len())));
            let beside = place.link_local.iter().map(|&address| (address, LINK_LOCAL_PREFIX_LEN));
            for (address, len) in own.into_iter().chain(beside) {
                inside.address().add(index, address.into(), len).execute().await.map_err(io::Error::other)?;
            }
            if let (Some(address), Some(v6)) = (held.address_v6, &network.v6) {
                allow_ipv6_in(netns, eth(held.link)).await?;
                let reach = Reach::Network(v6.subnet.prefix_len());
                add_ipv6_address(inside, index, address, reach).await.map_err(io::Error::other)?;
            }
            let up = LinkUnspec::new_with_index(index).up();
            let up = network.mtu().into_iter().fold(up, LinkMessageBuilder::mtu).build();
            inside.link().set(up).execute().await.map_err(io::Error::other)?;
            self.route_out(member.id, inside).await
        };
        if let Err(error) = made.await {
            if let Some(lease) = self.leases().get_mut(member.id) {
                lease.places.retain(|place| place.network != network.id);
            }
            return Err(error);
        }
        let Held { network, address, address_v6, names, link, gateway_priority } = held;
        Ok(Endpoint { network, address, address_v6, link, gateway_priority, names, mac: Some(mac), grant: None })
    }

    /// Leads what goes out through the network of the highest priority that lets it, or the first of those.
    async fn route_out(&self, container: &str, inside: &Handle) -> io::Result<()> {
        let (gateway, gateway_v6, has_priorities) = {
            let (all, leases) = (self.all(), self.leases());
            let mut places = leases.get(container).map(|lease| lease.places.clone()).unwrap_or_default();
            places.sort_by_key(|place| std::cmp::Reverse(place.gateway_priority));
            let has_priorities = places.iter().any(|place| place.gateway_priority != 0);
            let networks = places.iter().filter_map(|place| all.get(&place.network));
            let outward: Vec<_> = networks.filter(|network| !network.internal).collect();
            let v6 = outward.iter().find_map(|network| network.v6.as_ref()).map(|v6| v6.gateway);
            let v4 = outward.iter().find_map(|network| network.v4.as_ref()).map(|v4| v4.gateway);
            (v4, v6, has_priorities)
        };
        let v4 = gateway.map(|gateway| RouteMessageBuilder::<Ipv4Addr>::new().gateway(gateway).build());
        let v6 = gateway_v6.map(|gateway| RouteMessageBuilder::<Ipv6Addr>::new().gateway(gateway).build());
        for route in v4.into_iter().chain(v6) {
            // One that goes another way gives way to a priority, or if its link is gone with it.
            let request = inside.route().add(route);
            let request = if has_priorities { request.replace() } else { request };
            add_existing_is_fine(request.execute().await).map_err(io::Error::other)?;
        }
        Ok(())
    }

    /// Takes a container off all networks; doing so twice is harmless.
    pub(crate) async fn disconnect(&self, container: &str) -> io::Result<()> {
        let lease = self.leases().remove(container);
        self.resolvers.lock().expect("nobody panics while holding it").remove(container);
        self.set_links(container, &[]);
        let rules = match &lease {
            Some(lease) if !lease.ports.is_empty() => self.write_rules().await,
            _ => Ok(()),
        };
        if let Some(lease) = &lease {
            // What is not removed here goes with the namespace.
            drop(self.leave_parents(container, lease).await);
        }
        if lease.is_some_and(|lease| !lease.places.is_empty()) {
            self.serve_names().await;
        }
        // The namespace's ends of the veth pairs take the host's ends with them.
        let removed = Netns::remove(&self.netns_path(container));
        rules.and(removed)
    }

    /// Takes a container's links off those of the host's that they stand on: with the namespace the kernel would take
    /// them down in its own time, which may be seconds, and nobody else could have their addresses meanwhile.
    async fn leave_parents(&self, container: &str, lease: &Lease) -> io::Result<()> {
        let on_parent = |place: &&Held| self.get(&place.network).is_some_and(|network| network.parent.is_some());
        let links: Vec<u32> = lease.places.iter().filter(on_parent).map(|place| place.link).collect();
        if links.is_empty() {
            return Ok(());
        }
        let inside = Netlink::open_in(&Netns::open(&self.netns_path(container))?).await?;
        for link in links {
            if let Some(index) = link_index(inside.handle(), &eth(link)).await {
                inside.handle().link().del(index).execute().await.map_err(io::Error::other)?;
            }
        }
        Ok(())
    }

    /// Notes what a container calls its neighbours; that is served with the next change of who is where.
    pub(crate) fn set_links(&self, container: &str, places: &[WantedPlace]) {
        let linked = places.iter().filter(|place| !place.links.is_empty());
        let all: BTreeMap<_, _> = linked.map(|place| (place.network.clone(), place.links.clone())).collect();
        let mut links = self.links.lock().expect("nobody panics while holding it");
        if all.is_empty() {
            links.remove(container);
        } else {
            links.insert(container.to_owned(), all);
        }
    }

    /// Gives a container another name in its networks.
    pub(crate) async fn rename(&self, container: &str, old: &str, new: &str) {
        if let Some(lease) = self.leases().get_mut(container) {
            for name in lease.places.iter_mut().flat_map(|place| &mut place.names).filter(|name| *name == old) {
                new.clone_into(name);
            }
        }
        self.serve_names().await;
    }

    /// The index of the link that a network's containers are on, which is made if it is not there.
    async fn link_below(&self, id: &str) -> io::Result<u32> {
        let mut indexes = self.indexes.lock().await;
        if let Some(&index) = indexes.get(id) {
            return Ok(index);
        }
        let network =
            self.get(id).ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, format!("network {id} not found")))?;
        let netlink = Netlink::open()?;
        if let Some(parent) = &network.parent {
            // The host's links come and go: it is looked up each time.
            return parent.ensure(netlink.handle()).await;
        }
        let index = make_bridge(netlink.handle(), &network).await.map_err(io::Error::other)?;
        for (path, value) in [
            ("/proc/sys/net/ipv4/ip_forward".to_owned(), "1"),
            (format!("/proc/sys/net/ipv4/conf/{}/route_localnet", network.device), "1"),
        ] {
            fs::write(&path, value).map_err(|error| io::Error::new(error.kind(), format!("{path}: {error}")))?;
        }
        if network.v6.is_some() {
            forward_ipv6()?;
        }
        indexes.insert(id.to_owned(), index);
        drop(indexes);
        self.write_rules().await?;
        Ok(index)
    }

    async fn write_rules(&self) -> io::Result<()> {
        self.write_rules_after(String::new()).await
    }

    /// Has published ports listened at, as they are now.
    pub(crate) async fn listen_at_ports(&self) {
        let _one_at_a_time = self.rules.lock().await;
        let (networks, leases) = (self.all().clone(), self.leases().clone());
        self.listen_at(&networks, &leases).await;
    }

    async fn listen_at(&self, networks: &BTreeMap<String, LocalNetwork>, leases: &BTreeMap<String, Lease>) {
        // A daemon of before may have wanted it otherwise.
        let forwards = if self.forwards { forwarder::forwards(networks, leases, has_ipv6()) } else { BTreeSet::new() };
        self.forwarder.set(forwards).await;
    }

    /// Writes all rules, in one step with what comes first.
    async fn write_rules_after(&self, first: String) -> io::Result<()> {
        let _one_at_a_time = self.rules.lock().await;
        let (mut networks, leases) = (self.all().clone(), self.leases().clone());
        // What stands on another link is in that one's network.
        networks.retain(|_, network| network.parent.is_none());
        let rules = first + &ruleset(&networks, &leases) + &v6::ruleset(&networks, &leases);
        let applied = tokio::task::spawn_blocking(move || skep_host_net::apply(&rules));
        applied.await.map_err(io::Error::other)??;
        self.listen_at(&networks, &leases).await;
        Ok(())
    }
}
/// Why a port of this host's cannot be had, if it cannot.
fn why_not_had(port: &PublishedPort, gateways: &BTreeSet<IpAddr>) -> Option<String> {
    let is_to_come = port.host_ip.is_some_and(|ip| gateways.contains(&ip));
    if is_to_come { None } else { why_not_free(port, has_ipv6()) }
}
