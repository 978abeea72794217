//! The bridge network of one host: a bridge, a veth pair per container, addresses, masquerading to
//! the outside, and published ports, all in one nftables table that is replaced as a whole.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::AsRawFd as _;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use rtnetlink::packet_route::link::{InfoData, InfoVeth, LinkMessage};
use rtnetlink::{Handle, LinkBridge, LinkUnspec, LinkVeth, RouteMessageBuilder};
use skep_host_net::{LOOPBACK_INDEX, Netlink, Netns, add_existing_is_fine, link_index};

use crate::container::config::{JoinedNetwork, PublishedPort};

/// Ports that are picked when a container wants any.
const PICKED_PORTS: std::ops::RangeInclusive<u16> = 32768..=60999;

/// The first link of a container behind its loopback.
const ETH0_INDEX: u32 = 2;

/// Keeps networks that are not this host's alone; the engine hands it the containers that join them.
pub trait NetworkKeeper: Send + Sync + 'static {
    /// Gives a container its places; returns what the host's ports for it are to lead through.
    fn join<'a>(&'a self, container: &'a str, joining: Joining) -> KeeperReply<'a, Ipv4Addr>;
    /// Takes up a container that has its places from before the daemon's restart.
    fn adopt(&self, container: &str, joining: Joining);
    /// Takes a container out; one that is in none is no error.
    fn leave<'a>(&'a self, container: &'a str) -> KeeperReply<'a, ()>;
}

/// What a [`NetworkKeeper`] promises.
pub type KeeperReply<'a, T> = std::pin::Pin<Box<dyn Future<Output = io::Result<T>> + Send + 'a>>;

/// A container that joins networks.
#[derive(Clone, Debug)]
pub struct Joining {
    pub netns: PathBuf,
    pub networks: Vec<JoinedNetwork>,
    pub ports: Vec<PublishedPort>,
    /// Whom to ask for names of others; empty: as the host does.
    pub resolvers: Vec<String>,
}

/// How the bridge is set up.
#[derive(Clone, Debug)]
pub struct BridgeConfig {
    pub name: String,
    /// The first address of the bridge's network, with the prefix length.
    pub gateway: Ipv4Addr,
    pub prefix_len: u8,
}

impl Default for BridgeConfig {
    fn default() -> Self {
        Self { name: "skep0".into(), gateway: Ipv4Addr::new(172, 17, 0, 1), prefix_len: 16 }
    }
}

/// What one container has of the network.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Lease {
    target: Target,
    ports: Vec<PublishedPort>,
}

/// Where a container's published ports lead.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Target {
    /// To its port, at its address on the bridge.
    Bridge(Ipv4Addr),
    /// To the same port there, where somebody knows how to go on.
    Through(Ipv4Addr),
    /// Nowhere yet, or the host's own.
    Nowhere,
}

impl Eq for PublishedPort {}

/// The bridge and who is on it.
#[derive(Debug)]
pub(crate) struct Bridge {
    config: BridgeConfig,
    netns_dir: PathBuf,
    leases: Mutex<BTreeMap<String, Lease>>,
    /// The bridge's, once it is set up.
    index: tokio::sync::OnceCell<u32>,
    rules: tokio::sync::Mutex<()>,
}

impl Bridge {
    pub(crate) fn new(config: BridgeConfig, run_dir: &Path) -> io::Result<Self> {
        let netns_dir = run_dir.join("netns");
        fs::create_dir_all(&netns_dir)?;
        Ok(Self {
            config,
            netns_dir,
            leases: Mutex::default(),
            index: tokio::sync::OnceCell::new(),
            rules: tokio::sync::Mutex::default(),
        })
    }

    pub(crate) fn netns_path(&self, container: &str) -> PathBuf {
        self.netns_dir.join(container)
    }

    fn leases(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, Lease>> {
        self.leases.lock().expect("nobody panics while holding it")
    }

    /// Takes back what a running container had before the daemon's restart: its address on the
    /// bridge, or what its ports lead through.
    pub(crate) fn adopt(
        &self,
        container: &str,
        address: Ipv4Addr,
        through: Option<Ipv4Addr>,
        ports: Vec<PublishedPort>,
    ) {
        let target = through.map_or(Target::Bridge(address), Target::Through);
        self.leases().insert(container.to_owned(), Lease { target, ports });
    }

    /// Gives a container its ports.
    fn lease(&self, container: &str, target: Target, ports: &[PublishedPort]) -> io::Result<Vec<PublishedPort>> {
        let mut leases = self.leases();
        let leased = pick_ports(&leases, ports)?;
        leases.insert(container.to_owned(), Lease { target, ports: leased.clone() });
        Ok(leased)
    }

    /// Gives a container an address on the bridge and its ports.
    fn lease_address(&self, container: &str, ports: &[PublishedPort]) -> io::Result<(Ipv4Addr, Vec<PublishedPort>)> {
        let mut leases = self.leases();
        let used: BTreeSet<Ipv4Addr> = leases.values().filter_map(|lease| lease.target.bridge_address()).collect();
        let base = u32::from(self.config.gateway);
        let hosts = (1u32 << (32 - u32::from(self.config.prefix_len))) - 2;
        let address = (1..hosts)
            .map(|offset| Ipv4Addr::from(base + offset))
            .find(|address| !used.contains(address))
            .ok_or_else(|| io::Error::other("the bridge network has no address left: remove containers"))?;
        let leased = pick_ports(&leases, ports)?;
        leases.insert(container.to_owned(), Lease { target: Target::Bridge(address), ports: leased.clone() });
        Ok((address, leased))
    }

    /// Makes a namespace for a container that joins networks that are not this host's, and sets its
    /// ports aside.
    pub(crate) async fn prepare(&self, container: &str, ports: &[PublishedPort]) -> io::Result<Vec<PublishedPort>> {
        let leased = self.lease(container, Target::Nowhere, ports)?;
        Netns::create(&self.netns_path(container)).await?;
        Ok(leased)
    }

    /// Opens the ports that were set aside: they lead through `through`.
    pub(crate) async fn lead(&self, container: &str, through: Ipv4Addr) -> io::Result<()> {
        let published = {
            let mut leases = self.leases();
            let lease = leases.get_mut(container);
            lease.is_some_and(|lease| {
                lease.target = Target::Through(through);
                !lease.ports.is_empty()
            })
        };
        if published { self.write_rules().await } else { Ok(()) }
    }

    /// Makes a namespace with nothing but its loopback.
    pub(crate) async fn isolate(&self, container: &str) -> io::Result<()> {
        let netns = Netns::create(&self.netns_path(container)).await?;
        let netlink = Netlink::open_in(&netns).await?;
        let up = LinkUnspec::new_with_index(LOOPBACK_INDEX).up().build();
        netlink.handle().link().set(up).execute().await.map_err(io::Error::other)
    }

    /// Makes a container's namespace and joins it to the bridge.
    pub(crate) async fn connect(
        &self,
        container: &str,
        ports: &[PublishedPort],
    ) -> io::Result<(Ipv4Addr, Vec<PublishedPort>)> {
        let bridge = *self.index.get_or_try_init(|| self.set_up()).await?;
        let (address, leased) = self.lease_address(container, ports)?;
        let joined = self.join(container, address, bridge).await;
        let ruled = match joined {
            Ok(()) if !leased.is_empty() => self.write_rules().await,
            other => other,
        };
        if let Err(error) = ruled {
            self.disconnect(container).await?;
            return Err(error);
        }
        Ok((address, leased))
    }

    /// Takes a container off the bridge; doing so twice is harmless.
    pub(crate) async fn disconnect(&self, container: &str) -> io::Result<()> {
        let lease = self.leases().remove(container);
        let rules = match lease {
            Some(lease) if !lease.ports.is_empty() => self.write_rules().await,
            _ => Ok(()),
        };
        // The namespace's end of the veth pair takes the host's end with it.
        let removed = Netns::remove(&self.netns_path(container));
        rules.and(removed)
    }

    /// Makes the bridge and its rules, or takes up those that are there; returns the bridge's index.
    async fn set_up(&self) -> io::Result<u32> {
        let index = self.make_bridge(Netlink::open()?.handle()).await.map_err(io::Error::other)?;
        for (path, value) in [
            ("/proc/sys/net/ipv4/ip_forward".to_owned(), "1"),
            (format!("/proc/sys/net/ipv4/conf/{}/route_localnet", self.config.name), "1"),
        ] {
            fs::write(&path, value).map_err(|error| io::Error::new(error.kind(), format!("{path}: {error}")))?;
        }
        self.write_rules().await?;
        Ok(index)
    }

    async fn make_bridge(&self, handle: &Handle) -> Result<u32, rtnetlink::Error> {
        let name = &self.config.name;
        if link_index(handle, name).await.is_none() {
            handle.link().add(LinkBridge::new(name).build()).execute().await?;
        }
        let index = link_index(handle, name).await.ok_or(rtnetlink::Error::RequestFailed)?;
        let (gateway, prefix_len) = (self.config.gateway, self.config.prefix_len);
        add_existing_is_fine(handle.address().add(index, gateway.into(), prefix_len).execute().await)?;
        handle.link().set(LinkUnspec::new_with_index(index).up().build()).execute().await?;
        Ok(index)
    }

    /// Makes the namespace, and a veth pair with one end on the bridge and the other inside as eth0.
    ///
    /// The pair is made where it belongs, in one step: a link that is moved to another namespace
    /// holds up every other change of the host's network for some 15 ms.
    async fn join(&self, container: &str, address: Ipv4Addr, bridge: u32) -> io::Result<()> {
        let netns = Netns::create(&self.netns_path(container)).await?;
        let pair = veth_pair(&format!("veth{}", &container[..container.len().min(8)]), bridge, &netns);
        Netlink::open()?.handle().link().add(pair).execute().await.map_err(io::Error::other)?;
        let inside = Netlink::open_in(&netns).await?;
        self.configure(inside.handle(), address).await.map_err(io::Error::other)
    }

    /// Address and routes inside a container.
    async fn configure(&self, handle: &Handle, address: Ipv4Addr) -> Result<(), rtnetlink::Error> {
        handle.address().add(ETH0_INDEX, address.into(), self.config.prefix_len).execute().await?;
        for index in [LOOPBACK_INDEX, ETH0_INDEX] {
            handle.link().set(LinkUnspec::new_with_index(index).up().build()).execute().await?;
        }
        let route = RouteMessageBuilder::<Ipv4Addr>::new().gateway(self.config.gateway).build();
        handle.route().add(route).execute().await
    }

    async fn write_rules(&self) -> io::Result<()> {
        let _one_at_a_time = self.rules.lock().await;
        let leases: Vec<_> = self.leases().values().cloned().collect();
        let rules = ruleset(&self.config, &leases);
        tokio::task::spawn_blocking(move || skep_host_net::apply(&rules)).await.map_err(io::Error::other)?
    }
}

impl Target {
    fn bridge_address(self) -> Option<Ipv4Addr> {
        match self {
            Self::Bridge(address) => Some(address),
            Self::Through(_) | Self::Nowhere => None,
        }
    }
}

/// The host's ports that are asked for, and free ones where any will do.
fn pick_ports(leases: &BTreeMap<String, Lease>, ports: &[PublishedPort]) -> io::Result<Vec<PublishedPort>> {
    let mut taken: Vec<_> = leases.values().flat_map(|lease| lease.ports.clone()).collect();
    let mut leased = Vec::new();
    for port in ports {
        let mut port = port.clone();
        if port.host_port == 0 {
            let free = PICKED_PORTS.into_iter().find(|&number| {
                let candidate = PublishedPort { host_port: number, ..port.clone() };
                !taken.iter().any(|other| collides(other, &candidate))
            });
            port.host_port = free.ok_or_else(|| io::Error::other("no port is left to publish"))?;
        }
        if taken.iter().any(|other| collides(other, &port)) {
            return Err(io::Error::new(
                io::ErrorKind::AddrInUse,
                format!(
                    "port {}/{} is published by another container: port is already allocated",
                    port.host_port,
                    port.protocol.as_str()
                ),
            ));
        }
        taken.push(port.clone());
        leased.push(port);
    }
    Ok(leased)
}

/// Whether two want the same port of the same address.
fn collides(a: &PublishedPort, b: &PublishedPort) -> bool {
    let everywhere = a.host_ip.is_unspecified() || b.host_ip.is_unspecified();
    a.protocol == b.protocol && a.host_port == b.host_port && (everywhere || a.host_ip == b.host_ip)
}

/// A pair of links: `host`, up and on `bridge`, and eth0 in `namespace`, which cannot be up before
/// the other is there.
fn veth_pair(host: &str, bridge: u32, namespace: &Netns) -> LinkMessage {
    let inside = LinkUnspec::new_with_index(ETH0_INDEX).name("eth0").setns_by_fd(namespace.as_raw_fd());
    LinkVeth::new(host, "eth0")
        .set_info_data(InfoData::Veth(InfoVeth::Peer(inside.build())))
        .controller(bridge)
        .up()
        .build()
}

/// The whole table, as `nft` reads it. Replacing a table is one step for the kernel.
fn ruleset(config: &BridgeConfig, leases: &[Lease]) -> String {
    let BridgeConfig { name, gateway, prefix_len } = config;
    let network = u32::from(*gateway) & (u32::MAX << (32 - u32::from(*prefix_len)));
    let network = format!("{}/{prefix_len}", Ipv4Addr::from(network));
    let mut dnat = String::new();
    for lease in leases {
        for port in &lease.ports {
            let to = match lease.target {
                Target::Bridge(address) => format!("{address}:{}", port.container_port),
                Target::Through(address) => address.to_string(),
                Target::Nowhere => continue,
            };
            let (protocol, host_port) = (port.protocol.as_str(), port.host_port);
            let at = if port.host_ip.is_unspecified() { String::new() } else { format!("ip daddr {} ", port.host_ip) };
            dnat += &format!("    {at}{protocol} dport {host_port} dnat to {to}\n");
        }
    }
    format!(
        "table ip skep {{}}\ndelete table ip skep\ntable ip skep {{\n\
         \x20 chain publish {{\n{dnat}  }}\n\
         \x20 chain prerouting {{\n    type nat hook prerouting priority -100\n\
         \x20   fib daddr type local jump publish\n  }}\n\
         \x20 chain output {{\n    type nat hook output priority -100\n\
         \x20   fib daddr type local jump publish\n  }}\n\
         \x20 chain postrouting {{\n    type nat hook postrouting priority 100\n\
         \x20   ip saddr {network} oifname != \"{name}\" masquerade\n\
         \x20   ip saddr 127.0.0.0/8 oifname \"{name}\" masquerade\n\
         \x20   ip saddr {network} ip daddr {network} ct status dnat masquerade\n  }}\n}}\n"
    )
}

#[cfg(test)]
mod tests {
    use skep_api::service::Protocol;

    use super::*;

    fn port(host_port: u16) -> PublishedPort {
        PublishedPort { protocol: Protocol::Tcp, container_port: 80, host_ip: Ipv4Addr::UNSPECIFIED, host_port }
    }

    #[test]
    fn addresses_and_ports_are_given_once_and_come_back() {
        let dir = tempfile::tempdir().unwrap();
        let bridge = Bridge::new(BridgeConfig::default(), dir.path()).unwrap();
        let lease = |name: &str, ports: &[PublishedPort]| bridge.lease_address(name, ports);
        let (first, _) = lease("a", &[port(8080)]).unwrap();
        assert_eq!(first, Ipv4Addr::new(172, 17, 0, 2));
        assert_eq!(lease("b", &[]).unwrap().0, Ipv4Addr::new(172, 17, 0, 3));
        assert_eq!(lease("c", &[port(8080)]).unwrap_err().kind(), io::ErrorKind::AddrInUse);
        assert_ne!(lease("d", &[port(0)]).unwrap().1[0].host_port, 0);
        assert!(bridge.lease("f", Target::Nowhere, &[port(8080)]).is_err(), "ports are one space");
        bridge.leases().remove("a");
        assert_eq!(lease("e", &[port(8080)]).unwrap().0, first);
    }

    #[test]
    fn the_ruleset_is_one_value() {
        let lease = Lease { target: Target::Bridge(Ipv4Addr::new(172, 17, 0, 2)), ports: vec![port(8080)] };
        let joined = Lease { target: Target::Through(Ipv4Addr::new(169, 254, 77, 2)), ports: vec![port(9090)] };
        let rules = ruleset(&BridgeConfig::default(), &[lease, joined]);
        assert!(rules.contains("tcp dport 9090 dnat to 169.254.77.2\n"), "{rules}");
        assert!(rules.contains("tcp dport 8080 dnat to 172.17.0.2:80"), "{rules}");
        assert!(rules.contains("ip saddr 172.17.0.0/16 oifname != \"skep0\" masquerade"), "{rules}");
    }
}
