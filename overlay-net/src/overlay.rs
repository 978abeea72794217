//! The overlay of one node: takes facts and containers in, and keeps kernel and data path in line.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use skep_api::network::IPV6_MTU_BYTES_MIN;
use skep_api::overlay::{Digests, Fact, FactKey, OverlayNetwork};
use skep_api::{NetworkId, NodeId, SecretBytes};
use skep_host_net::{Netns, has_ipv6};
use skep_name_server::Zone;
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;

use crate::carrier::{Carrier, end_process, load_indexes, number_peers, save_indexes};
use crate::diagnosis::{Finding, in_kernel, tunnels};
use crate::kernel::links::{Links, Place, route_out};
use crate::kernel::{INSIDE, Kernel, Mtu};
use crate::keys::KeyRing;
use crate::path::PathConfig;
use crate::path::client::PathClient;
use crate::path::message::PeerIndex;
use crate::plan::{LocalContainer, LocalPort, MESH_TABLE, NetworkAddress, Scene, kernel_port, plan};
use crate::ruleset::{Ruleset, Tables};
use crate::serving::{Changed, turned};

/// How long a container's start may wait for the facts of its networks.
const FACTS_LIMIT: Duration = Duration::from_secs(30);
/// Pause after what went wrong.
const RETRY_PAUSE: Duration = Duration::from_millis(500);
/// How often kernel and data path are asked whether they still are as they were left.
const AUDIT_EVERY: Duration = Duration::from_secs(2);

/// How an overlay is set up.
#[derive(Clone, Debug)]
pub struct OverlayConfig {
    pub node: NodeId,
    /// What does not outlive a start of the host.
    pub run_dir: PathBuf,
    /// The node's private keys; made if there are none.
    pub keys: PathBuf,
    /// How long a key lasts; zero: for ever.
    pub key_period: Duration,
    /// The program that is its own data path.
    pub program: PathBuf,
    /// UDP, for the tunnels.
    pub port: u16,
    /// Whether the kernel's own WireGuard is used, where peers have it too.
    pub in_kernel: bool,
}

/// What a container joins.
#[derive(Clone, Debug)]
pub struct Joining {
    pub netns: PathBuf,
    pub places: Vec<NetworkAddress>,
    pub ports: Vec<LocalPort>,
    /// Whom to ask for names outside; the host's resolvers if empty.
    pub resolvers: Vec<IpAddr>,
    /// Whether what leads nowhere else leaves through these networks; if not, another lets it out.
    pub leads_out: bool,
    /// The names in its other networks.
    pub neighbours: Zone,
}

impl Joining {
    fn local(&self) -> LocalContainer {
        LocalContainer {
            netns: self.netns.clone(),
            places: self.places.clone(),
            ports: self.ports.clone(),
            resolvers: self.resolvers.clone(),
            leads_out: self.leads_out,
            neighbours: self.neighbours.clone(),
        }
    }
}

/// New facts from the managers.
#[derive(Clone, Debug, Default)]
pub struct FactsUpdate {
    pub revision: u64,
    /// It names everything: what it does not name is to go.
    pub complete: bool,
    pub facts: Vec<Fact>,
    pub removed: Vec<FactKey>,
}

#[derive(Default)]
struct Inputs {
    facts: BTreeMap<FactKey, Fact>,
    revision: u64,
    locals: BTreeMap<String, LocalContainer>,
    /// How many containers are joining.
    under_way: usize,
    /// In the facts, since they were put in force.
    changed: Changed,
}

/// The overlay of this node.
pub struct Overlay {
    config: OverlayConfig,
    keys: Mutex<KeyRing>,
    public_keys: watch::Sender<Vec<[u8; 32]>>,
    inputs: Mutex<Inputs>,
    news: Notify,
    /// The revision that kernel and data path hold.
    held: watch::Sender<u64>,
    carrier: tokio::sync::Mutex<Option<Carrier>>,
}

impl std::fmt::Debug for Overlay {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Overlay").field("config", &self.config).finish_non_exhaustive()
    }
}

impl Overlay {
    /// Reads the node's keys, or makes the first. Nothing else is made before a network is needed.
    pub fn open(config: OverlayConfig) -> io::Result<Arc<Self>> {
        let keys = KeyRing::open(&config.keys)?;
        Ok(Arc::new(Self {
            config,
            public_keys: watch::channel(keys.public()).0,
            keys: Mutex::new(keys),
            inputs: Mutex::default(),
            news: Notify::new(),
            held: watch::channel(0).0,
            carrier: tokio::sync::Mutex::default(),
        }))
    }

    /// What other nodes know this one's tunnels by: the first is the one in use.
    #[must_use]
    pub fn public_keys(&self) -> watch::Receiver<Vec<[u8; 32]>> {
        self.public_keys.subscribe()
    }

    fn keys(&self) -> MutexGuard<'_, KeyRing> {
        self.keys.lock().expect("nobody panics while holding it")
    }

    /// Makes the node's key anew, again and again.
    async fn rotate_keys(&self) {
        loop {
            let pause = self.keys().pause(self.config.key_period);
            let Some(pause) = pause else { return std::future::pending().await };
            tokio::time::sleep(pause).await;
            let stepped = {
                let mut keys = self.keys();
                keys.step().map(|()| keys.public())
            };
            match stepped {
                Ok(public) => {
                    tracing::info!(keys = public.len(), "the tunnels' keys change");
                    self.public_keys.send_replace(public);
                    self.news.notify_one();
                }
                Err(error) => {
                    tracing::error!(path = %self.config.keys.display(), %error, "the tunnels' key cannot be made anew");
                }
            }
        }
    }

    #[must_use]
    pub const fn port(&self) -> u16 {
        self.config.port
    }

    /// The port of the kernel's own WireGuard, if that is used.
    #[must_use]
    pub fn kernel_port(&self) -> Option<u16> {
        self.config.in_kernel.then(|| kernel_port(self.config.port))
    }

    /// The revision of the facts that kernel and data path hold.
    #[must_use]
    pub fn held(&self) -> watch::Receiver<u64> {
        self.held.subscribe()
    }

    fn inputs(&self) -> MutexGuard<'_, Inputs> {
        self.inputs.lock().expect("nobody panics while holding it")
    }

    /// What tells the facts that kernel and data path hold from others, with their revision; none while newer ones are
    /// still to be put in force, or there are none.
    #[must_use]
    pub fn digests(&self) -> Option<(u64, Digests)> {
        let held = *self.held.borrow();
        let inputs = self.inputs();
        let settled = inputs.revision == held && !inputs.facts.is_empty();
        settled.then(|| (held, inputs.facts.values().collect()))
    }

    /// The networks that this node takes part in, as far as it was told.
    #[must_use]
    pub fn networks(&self) -> Vec<OverlayNetwork> {
        let inputs = self.inputs();
        let networks = inputs.facts.values().filter_map(|fact| match fact {
            Fact::Network(network) => Some(network.clone()),
            _ => None,
        });
        networks.collect()
    }

    /// One of them.
    #[must_use]
    pub fn network(&self, id: NetworkId) -> Option<OverlayNetwork> {
        match self.inputs().facts.get(&FactKey::Network(id)) {
            Some(Fact::Network(network)) => Some(network.clone()),
            _ => None,
        }
    }

    /// Takes facts in; they are in force once [`held`](Self::held) says so.
    pub fn take(&self, update: FactsUpdate) {
        let mut inputs = self.inputs();
        let inputs_now = &mut *inputs;
        if update.complete || !update.removed.is_empty() {
            inputs_now.changed = Changed::Anything;
        }
        if update.complete {
            inputs_now.facts.clear();
        }
        for key in &update.removed {
            inputs_now.facts.remove(key);
        }
        for fact in update.facts.into_iter().map(possible) {
            inputs_now.changed.note(inputs_now.facts.get(&fact.key()), &fact);
            inputs_now.facts.insert(fact.key(), fact);
        }
        inputs.revision = update.revision;
        drop(inputs);
        self.news.notify_one();
    }

    /// Keeps everything in line until `stop`; what is in force then stays. What somebody else
    /// changed meanwhile is found and mended.
    pub async fn run(self: Arc<Self>, stop: CancellationToken) {
        let mut rotating = std::pin::pin!(self.rotate_keys());
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                () = &mut rotating => {}
                () = self.news.notified() => {}
                () = tokio::time::sleep(AUDIT_EVERY) => {
                    if self.is_as_it_was_left().await {
                        continue;
                    }
                }
            }
            while let Err(error) = self.bring_in_line().await {
                tracing::error!(%error, "the overlay network is not as it should be");
                tokio::select! {
                    () = stop.cancelled() => return,
                    () = tokio::time::sleep(RETRY_PAUSE) => {}
                }
            }
        }
    }

    /// Looks whether rules and data path still are what was put in force; if not, the next look begins
    /// from scratch.
    async fn is_as_it_was_left(&self) -> bool {
        let mut held = self.carrier.lock().await;
        let Some(carrier) = held.as_mut() else { return true };
        match carrier.audit().await {
            Ok(()) => true,
            Err(error) => {
                tracing::warn!(%error, "the overlay network was changed by somebody else: it is mended");
                *held = None;
                false
            }
        }
    }

    async fn bring_in_line(&self) -> io::Result<()> {
        let mut carrier = self.carrier.lock().await;
        let revision = self.apply(&mut carrier).await?;
        drop(carrier);
        self.held.send_replace(revision);
        Ok(())
    }

    /// Puts the newest inputs in force; returns their revision.
    async fn apply(&self, carrier: &mut Option<Carrier>) -> io::Result<u64> {
        if let Some(revision) = self.turn(carrier).await? {
            return Ok(revision);
        }
        let (facts, locals, revision) = {
            let mut inputs = self.inputs();
            inputs.changed = Changed::nothing();
            (inputs.facts.clone(), inputs.locals.clone(), inputs.revision)
        };
        let needed = facts.keys().any(|key| matches!(key, FactKey::Network(_)));
        if !needed {
            if revision > 0 && locals.is_empty() && self.inputs().under_way == 0 {
                self.take_down(carrier).await?;
            }
            return Ok(revision);
        }
        let applied = self.apply_to(carrier, &facts, &locals).await;
        if applied.is_err() {
            // Whatever is half done: the next try begins from what is really there.
            *carrier = None;
        }
        applied.map(|()| revision)
    }

    /// Puts in force that other tasks take connections, if nothing else is different; returns the revision then.
    async fn turn(&self, held: &mut Option<Carrier>) -> io::Result<Option<u64>> {
        let Some(carrier) = held else { return Ok(None) };
        let keys = self.keys().keys().to_vec();
        let (turned, revision) = {
            let mut inputs = self.inputs();
            let Changed::Serving(services) = inputs.changed.clone() else { return Ok(None) };
            if carrier.basis != (inputs.locals.clone(), keys.clone()) {
                return Ok(None);
            }
            let scene = self.scene(&keys, &inputs.facts, &inputs.locals, &carrier.indexes);
            let Some(turned) = turned(&scene, &services) else {
                return Ok(None);
            };
            inputs.changed = Changed::nothing();
            (turned, inputs.revision)
        };
        match carrier.turn(turned).await {
            Ok(true) => Ok(Some(revision)),
            Ok(false) => Ok(None),
            Err(error) => {
                *held = None;
                Err(error)
            }
        }
    }

    async fn apply_to(
        &self,
        carrier: &mut Option<Carrier>,
        facts: &BTreeMap<FactKey, Fact>,
        locals: &BTreeMap<String, LocalContainer>,
    ) -> io::Result<()> {
        let fresh = carrier.is_none();
        let carrier = match carrier {
            Some(carrier) => carrier,
            None => carrier.insert(self.set_up().await?),
        };
        number_peers(&mut carrier.indexes, facts, self.config.node);
        save_indexes(&self.indexes_file(), &carrier.indexes)?;
        let keys = self.keys().keys().to_vec();
        let desired = plan(&self.scene(&keys, facts, locals, &carrier.indexes));
        carrier.put_in_force(desired, fresh).await?;
        carrier.basis = (locals.clone(), keys);
        Ok(())
    }

    fn scene<'a>(
        &self,
        keys: &'a [SecretBytes],
        facts: &'a BTreeMap<FactKey, Fact>,
        locals: &'a BTreeMap<String, LocalContainer>,
        indexes: &'a BTreeMap<NodeId, PeerIndex>,
    ) -> Scene<'a> {
        let OverlayConfig { node: own, port, in_kernel, .. } = self.config;
        Scene { own, keys, port, in_kernel, facts, locals, indexes }
    }

    async fn set_up(&self) -> io::Result<Carrier> {
        fs::create_dir_all(&self.config.run_dir)?;
        let netns = self.netns_path();
        let mut kernel = Kernel::open(&netns).await?;
        let config = PathConfig { netns, socket: self.config.run_dir.join("datapath.sock"), port: self.config.port };
        let (path, new) = PathClient::open(&self.config.program, &self.config.run_dir, &config).await?;
        kernel.set_up_wire().await?;
        tracing::info!(new, uplink = kernel.uplink(), "the data path to other nodes is up");
        let indexes = load_indexes(&self.indexes_file());
        Carrier::new(kernel, path, indexes, self.frames_file()).await
    }

    /// Takes away all there is: no network is needed here.
    async fn take_down(&self, carrier: &mut Option<Carrier>) -> io::Result<()> {
        let there = carrier.take().is_some() || self.netns_path().exists();
        if !there {
            return Ok(());
        }
        let socket = self.config.run_dir.join("datapath.sock");
        end_process(&socket).await;
        Kernel::remove(&self.netns_path()).await?;
        let mesh = Tables { v4: Ruleset { table: MESH_TABLE, ..Ruleset::default() }, v6: None }.cleared();
        tokio::task::spawn_blocking(move || skep_host_net::apply(&mesh)).await.map_err(io::Error::other)??;
        for file in [socket, self.indexes_file(), self.frames_file()] {
            // Gone already is just as well.
            drop(fs::remove_file(file));
        }
        tracing::info!("no network of the swarm is needed here any more");
        Ok(())
    }

    fn netns_path(&self) -> PathBuf {
        self.config.run_dir.join("netns")
    }

    fn frames_file(&self) -> PathBuf {
        self.config.run_dir.join("rules.json")
    }

    fn indexes_file(&self) -> PathBuf {
        self.config.run_dir.join("peers.json")
    }

    /// Joins a container to its networks, or to those that are new to it; returns where the host's ports
    /// for it lead to.
    pub async fn attach(&self, container: &str, joining: &Joining) -> io::Result<Ipv4Addr> {
        tokio::time::timeout(FACTS_LIMIT, self.networks_of(joining)).await.map_err(|_| {
            io::Error::new(
                io::ErrorKind::TimedOut,
                format!("the managers told nothing of the container's networks within {FACTS_LIMIT:?}"),
            )
        })?;
        let _kept = UnderWay::new(self);
        let (links, mtu) = self.links().await?;
        let netns = Netns::open(&joining.netns)?;
        let places = places(&self.inputs().facts, &joining.places, mtu)
            .ok_or_else(|| io::Error::other("a network of the container's has just been removed"))?;
        let had = self.inputs().locals.get(container).map(|local| local.places.clone()).unwrap_or_default();
        let is_new = |place: &&Place| !had.iter().any(|had| had.link == place.link);
        let new: Vec<Place> = places.iter().filter(is_new).copied().collect();
        links.attach(container, &netns, &new).await?;
        if joining.leads_out {
            route_out(&netns, &places).await?;
        }
        self.inputs().locals.insert(container.to_owned(), joining.local());
        self.apply(&mut *self.carrier.lock().await).await?;
        Ok(INSIDE)
    }

    /// Where containers' links go. They are made while rules change: the kernel takes long over links.
    async fn links(&self) -> io::Result<(Arc<Links>, Mtu)> {
        let mut carrier = self.carrier.lock().await;
        self.apply(&mut carrier).await?;
        let held = carrier.as_ref().ok_or_else(|| io::Error::other("the networks are gone"))?;
        Ok((held.kernel.links(), held.kernel.mtu()))
    }

    /// Says what else a container sees has which names now.
    pub fn tell_names(&self, container: &str, neighbours: Zone) {
        if let Some(local) = self.inputs().locals.get_mut(container) {
            local.neighbours = neighbours;
            self.news.notify_one();
        }
    }

    /// Waits until the container's networks are known.
    async fn networks_of(&self, joining: &Joining) {
        let mut held = self.held();
        loop {
            let is_known = |place: &NetworkAddress| self.inputs().facts.contains_key(&FactKey::Network(place.network));
            if joining.places.iter().all(is_known) {
                return;
            }
            if held.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }

    /// Takes up a container that was joined before the daemon's restart.
    pub fn adopt(&self, container: &str, joining: &Joining) {
        self.inputs().locals.insert(container.to_owned(), joining.local());
        self.news.notify_one();
    }

    /// Takes a container off its networks; doing so twice is harmless.
    pub async fn detach(&self, container: &str) -> io::Result<()> {
        let Some(local) = self.inputs().locals.remove(container) else { return Ok(()) };
        self.unplug(container, local.places.iter().map(|place| place.link)).await
    }

    /// Takes a running container off one network; then it is served no names of it any more.
    pub async fn part(&self, container: &str, network: NetworkId) -> io::Result<()> {
        let parted: Vec<u32> = {
            let mut inputs = self.inputs();
            let Some(local) = inputs.locals.get_mut(container) else { return Ok(()) };
            let (parted, left) = local.places.iter().partition(|place| place.network == network);
            local.places = left;
            if local.places.is_empty() {
                inputs.locals.remove(container);
            }
            let parted: Vec<NetworkAddress> = parted;
            parted.iter().map(|place| place.link).collect()
        };
        self.unplug(container, parted.into_iter()).await?;
        self.bring_in_line().await
    }

    async fn unplug(&self, container: &str, links: impl Iterator<Item = u32>) -> io::Result<()> {
        let there = self.carrier.lock().await.as_ref().map(|carrier| carrier.kernel.links());
        if let Some(there) = there {
            for link in links {
                there.detach(container, link).await?;
            }
        }
        self.news.notify_one();
        Ok(())
    }

    /// Looks at everything that may be wrong here.
    pub async fn diagnose(&self) -> Vec<Finding> {
        let (facts, revision) = {
            let inputs = self.inputs();
            (inputs.facts.clone(), inputs.revision)
        };
        let held = *self.held.borrow();
        let behind = (held < revision)
            .then(|| format!("revision {held} is in force, {revision} was told: the daemon's log says what fails"));
        let mut findings = vec![Finding::new(format!("facts from the managers, revision {revision}"), behind)];
        let digests: Digests = facts.values().collect();
        findings.extend(facts.values().filter_map(|fact| match fact {
            Fact::Network(OverlayNetwork { id, name, .. }) => {
                Some(Finding::new(format!("network {name}, digest {:016x}", digests.of(Some(*id))), None))
            }
            _ => None,
        }));
        let mut carrier = self.carrier.lock().await;
        let Some(carrier) = carrier.as_mut() else {
            let needed = facts.keys().any(|key| matches!(key, FactKey::Network(_)));
            let problem = needed.then(|| "networks are needed here and not there yet".to_owned());
            findings.push(Finding::new("networks of this node", problem));
            return findings;
        };
        let audited = carrier.audit().await.err().map(|error| format!("{error}: it is mended within seconds"));
        findings.push(Finding::new("rules, device and data path", audited));
        match carrier.path.report().await {
            Ok(reports) => findings.extend(tunnels(self.config.node, &facts, &reports)),
            Err(error) => findings.push(Finding::new("tunnels", Some(error.to_string()))),
        }
        findings.extend(in_kernel(&facts, &carrier.indexes, &carrier.kernel.reached()));
        findings.extend(carrier.kernel.way_of_flows().map(|way| Finding::new(way, None)));
        findings
    }

    /// Takes everything away, whatever is needed: the node leaves its swarm.
    pub async fn close(&self) -> io::Result<()> {
        let mut carrier = self.carrier.lock().await;
        {
            let mut inputs = self.inputs();
            *inputs = Inputs { under_way: inputs.under_way, ..Inputs::default() };
        }
        self.take_down(&mut carrier).await
    }
}

/// Keeps the namespace where it is while a container joins it.
struct UnderWay<'a>(&'a Overlay);

impl<'a> UnderWay<'a> {
    fn new(overlay: &'a Overlay) -> Self {
        overlay.inputs().under_way += 1;
        Self(overlay)
    }
}

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        let mut inputs = self.0.inputs();
        inputs.under_way -= 1;
        // Nothing may be needed any more: it was not taken down meanwhile.
        if inputs.under_way == 0 && inputs.locals.is_empty() {
            self.0.news.notify_one();
        }
    }
}

/// A fact, as far as this host can have it so.
fn possible(fact: Fact) -> Fact {
    match fact {
        Fact::Network(network) if !has_ipv6() => Fact::Network(OverlayNetwork { v6: None, ..network }),
        other => other,
    }
}

/// The container's places, once all its networks are known.
fn places(facts: &BTreeMap<FactKey, Fact>, addresses: &[NetworkAddress], mtu: Mtu) -> Option<Vec<Place>> {
    let place = |at: &NetworkAddress| {
        let Some(Fact::Network(network)) = facts.get(&FactKey::Network(at.network)) else { return None };
        let (subnet, gateway) = (network.subnet, network.gateway);
        let passes = if network.encrypted { mtu.tunnel_bytes } else { mtu.plain_bytes };
        let mtu_bytes = network.mtu_bytes.map_or(passes, |asked| asked.min(passes));
        let v6 = network.v6.filter(|_| mtu_bytes >= IPV6_MTU_BYTES_MIN);
        let (internal, encrypted) = (network.internal, network.encrypted);
        Some(Place { link: at.link, address: at.address, subnet, gateway, v6, internal, mtu_bytes, encrypted })
    };
    addresses.iter().map(place).collect()
}
