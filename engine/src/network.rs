//! The bridge network of one host: a bridge, a veth pair per container, addresses, masquerading to
//! the outside, and published ports, all in one nftables table that is replaced as a whole.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{self, Write as _};
use std::net::Ipv4Addr;
use std::os::fd::AsRawFd as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;

use futures::TryStreamExt as _;
use nix::mount::{MntFlags, umount2};
use rtnetlink::packet_route::link::{InfoData, InfoVeth, LinkMessage};
use rtnetlink::{Handle, LinkBridge, LinkUnspec, LinkVeth, RouteMessageBuilder, new_connection};

use crate::container::config::PublishedPort;
use crate::sys;

/// Ports that are picked when a container wants any.
const PICKED_PORTS: std::ops::RangeInclusive<u16> = 32768..=60999;

/// Every namespace begins with its loopback.
const LOOPBACK_INDEX: u32 = 1;
const ETH0_INDEX: u32 = 2;

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
    address: Ipv4Addr,
    ports: Vec<PublishedPort>,
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

    /// Takes back what a running container had before the daemon's restart.
    pub(crate) fn adopt(&self, container: &str, address: Ipv4Addr, ports: Vec<PublishedPort>) {
        self.leases().insert(container.to_owned(), Lease { address, ports });
    }

    /// Gives a container an address and its ports.
    fn lease(&self, container: &str, ports: &[PublishedPort]) -> io::Result<Lease> {
        let mut leases = self.leases();
        let used: BTreeSet<Ipv4Addr> = leases.values().map(|lease| lease.address).collect();
        let base = u32::from(self.config.gateway);
        let hosts = (1u32 << (32 - u32::from(self.config.prefix_len))) - 2;
        let address = (1..hosts)
            .map(|offset| Ipv4Addr::from(base + offset))
            .find(|address| !used.contains(address))
            .ok_or_else(|| io::Error::other("the bridge network has no address left: remove containers"))?;
        let mut taken: BTreeSet<_> =
            leases.values().flat_map(|lease| &lease.ports).map(|port| (port.protocol, port.host_port)).collect();
        let mut leased = Vec::new();
        for port in ports {
            let mut port = port.clone();
            if port.host_port == 0 {
                let free = PICKED_PORTS.into_iter().find(|&number| !taken.contains(&(port.protocol, number)));
                port.host_port = free.ok_or_else(|| io::Error::other("no port is left to publish"))?;
            }
            if !taken.insert((port.protocol, port.host_port)) {
                return Err(io::Error::new(
                    io::ErrorKind::AddrInUse,
                    format!("port {}/{} is published by another container", port.host_port, port.protocol.as_str()),
                ));
            }
            leased.push(port);
        }
        let lease = Lease { address, ports: leased };
        leases.insert(container.to_owned(), lease.clone());
        Ok(lease)
    }

    /// Makes a container's namespace and joins it to the bridge.
    pub(crate) async fn connect(
        &self,
        container: &str,
        ports: &[PublishedPort],
    ) -> io::Result<(Ipv4Addr, Vec<PublishedPort>)> {
        let bridge = *self.index.get_or_try_init(|| self.set_up()).await?;
        let lease = self.lease(container, ports)?;
        let joined = self.join(container, lease.address, bridge).await;
        let ruled = match joined {
            Ok(()) if !lease.ports.is_empty() => self.write_rules().await,
            other => other,
        };
        if let Err(error) = ruled {
            self.disconnect(container).await?;
            return Err(error);
        }
        Ok((lease.address, lease.ports))
    }

    /// Takes a container off the bridge; doing so twice is harmless.
    pub(crate) async fn disconnect(&self, container: &str) -> io::Result<()> {
        let lease = self.leases().remove(container);
        let rules = match lease {
            Some(lease) if !lease.ports.is_empty() => self.write_rules().await,
            _ => Ok(()),
        };
        let path = self.netns_path(container);
        // The namespace's end of the veth pair takes the host's end with it.
        match umount2(&path, MntFlags::MNT_DETACH) {
            Ok(()) | Err(nix::Error::EINVAL | nix::Error::ENOENT) => {}
            Err(error) => return rules.and_then(|()| Err(error.into())),
        }
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => rules.and(Err(error)),
            _ => rules,
        }
    }

    /// Makes the bridge and its rules, or takes up those that are there; returns the bridge's index.
    async fn set_up(&self) -> io::Result<u32> {
        let index = with_netlink(async |handle| self.make_bridge(handle).await).await?;
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
        let added = handle.address().add(index, self.config.gateway.into(), self.config.prefix_len).execute().await;
        if let Err(error) = added
            && !error.to_string().contains("File exists")
        {
            return Err(error);
        }
        handle.link().set(LinkUnspec::new_with_index(index).up().build()).execute().await?;
        Ok(index)
    }

    /// Makes the namespace, and a veth pair with one end on the bridge and the other inside as eth0.
    ///
    /// The pair is made where it belongs, in one step: a link that is moved to another namespace
    /// holds up every other change of the host's network for some 15 ms.
    async fn join(&self, container: &str, address: Ipv4Addr, bridge: u32) -> io::Result<()> {
        let netns = self.netns_path(container);
        let path = netns.clone();
        on_own_thread(move || sys::pin_new_netns(&path)).await?;
        let namespace = fs::File::open(&netns)?;
        let pair = veth_pair(&format!("veth{}", &container[..container.len().min(8)]), bridge, &namespace);
        with_netlink(async |handle| handle.link().add(pair).execute().await).await?;
        let (gateway, prefix_len) = (self.config.gateway, self.config.prefix_len);
        on_own_thread(move || {
            sys::enter_netns(&namespace)?;
            let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
            runtime.block_on(configure_inside(address, prefix_len, gateway))
        })
        .await
    }

    async fn write_rules(&self) -> io::Result<()> {
        let _one_at_a_time = self.rules.lock().await;
        let leases: Vec<_> = self.leases().values().cloned().collect();
        let rules = ruleset(&self.config, &leases);
        tokio::task::spawn_blocking(move || apply_rules(&rules)).await.map_err(io::Error::other)?
    }
}

/// Runs what changes the thread's namespace on a thread that ends with it.
async fn on_own_thread<T: Send + 'static>(work: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
    let (done, result) = tokio::sync::oneshot::channel();
    std::thread::Builder::new().name("netns".into()).spawn(move || drop(done.send(work())))?;
    result.await.map_err(io::Error::other)?
}

/// Talks to the kernel over a connection of its own, in the namespace of the calling thread.
async fn with_netlink<T>(work: impl AsyncFnOnce(&Handle) -> Result<T, rtnetlink::Error>) -> io::Result<T> {
    let (connection, handle, _) = new_connection()?;
    let driver = tokio::task::spawn(connection);
    let result = work(&handle).await;
    driver.abort();
    result.map_err(io::Error::other)
}

/// A pair of links: `host`, up and on `bridge`, and eth0 in `namespace`, which cannot be up before
/// the other is there.
fn veth_pair(host: &str, bridge: u32, namespace: &fs::File) -> LinkMessage {
    let inside = LinkUnspec::new_with_index(ETH0_INDEX).name("eth0").setns_by_fd(namespace.as_raw_fd());
    LinkVeth::new(host, "eth0")
        .set_info_data(InfoData::Veth(InfoVeth::Peer(inside.build())))
        .controller(bridge)
        .up()
        .build()
}

async fn configure_inside(address: Ipv4Addr, prefix_len: u8, gateway: Ipv4Addr) -> io::Result<()> {
    with_netlink(async |handle| {
        handle.address().add(ETH0_INDEX, address.into(), prefix_len).execute().await?;
        for index in [LOOPBACK_INDEX, ETH0_INDEX] {
            handle.link().set(LinkUnspec::new_with_index(index).up().build()).execute().await?;
        }
        let route = RouteMessageBuilder::<Ipv4Addr>::new().gateway(gateway).build();
        handle.route().add(route).execute().await
    })
    .await
}

/// The index of a link; `None` if there is none of that name.
async fn link_index(handle: &Handle, name: &str) -> Option<u32> {
    let mut links = handle.link().get().match_name(name.to_owned()).execute();
    Some(links.try_next().await.ok()??.header.index)
}

/// The whole table, as `nft` reads it. Replacing a table is one step for the kernel.
fn ruleset(config: &BridgeConfig, leases: &[Lease]) -> String {
    let BridgeConfig { name, gateway, prefix_len } = config;
    let network = u32::from(*gateway) & (u32::MAX << (32 - u32::from(*prefix_len)));
    let network = format!("{}/{prefix_len}", Ipv4Addr::from(network));
    let mut dnat = String::new();
    for lease in leases {
        for port in &lease.ports {
            let protocol = port.protocol.as_str();
            dnat +=
                &format!("    {protocol} dport {} dnat to {}:{}\n", port.host_port, lease.address, port.container_port);
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

fn apply_rules(rules: &str) -> io::Result<()> {
    let spawned = Command::new("nft")
        .args(["-f", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn();
    let mut nft = spawned.map_err(|error| {
        io::Error::new(error.kind(), format!("nft cannot be run, install the nftables package: {error}"))
    })?;
    if let Some(mut stdin) = nft.stdin.take() {
        stdin.write_all(rules.as_bytes())?;
    }
    let output = nft.wait_with_output()?;
    if output.status.success() {
        return Ok(());
    }
    Err(io::Error::other(format!("nft refused the rules: {}", String::from_utf8_lossy(&output.stderr))))
}

#[cfg(test)]
mod tests {
    use skep_api::service::Protocol;

    use super::*;

    fn port(host_port: u16) -> PublishedPort {
        PublishedPort { protocol: Protocol::Tcp, container_port: 80, host_port }
    }

    #[test]
    fn addresses_and_ports_are_given_once_and_come_back() {
        let dir = tempfile::tempdir().unwrap();
        let bridge = Bridge::new(BridgeConfig::default(), dir.path()).unwrap();
        let first = bridge.lease("a", &[port(8080)]).unwrap();
        assert_eq!(first.address, Ipv4Addr::new(172, 17, 0, 2));
        assert_eq!(bridge.lease("b", &[]).unwrap().address, Ipv4Addr::new(172, 17, 0, 3));
        assert_eq!(bridge.lease("c", &[port(8080)]).unwrap_err().kind(), io::ErrorKind::AddrInUse);
        assert_ne!(bridge.lease("d", &[port(0)]).unwrap().ports[0].host_port, 0);
        bridge.leases().remove("a");
        assert_eq!(bridge.lease("e", &[port(8080)]).unwrap().address, first.address);
    }

    #[test]
    fn the_ruleset_is_one_value() {
        let lease = Lease { address: Ipv4Addr::new(172, 17, 0, 2), ports: vec![port(8080)] };
        let rules = ruleset(&BridgeConfig::default(), &[lease]);
        assert!(rules.contains("tcp dport 8080 dnat to 172.17.0.2:80"), "{rules}");
        assert!(rules.contains("ip saddr 172.17.0.0/16 oifname != \"skep0\" masquerade"), "{rules}");
    }
}
