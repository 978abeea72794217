//! The node's life in a swarm: init, join, leave; and what follows from its role.

mod active;
mod address;
mod admission;
pub(crate) mod events;
mod locking;
mod recovery;
mod state;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use skep_api::cluster::{JoinTokens, RootCa};
use skep_api::generic_resource::GenericResource;
use skep_api::node::{EngineDescription, NodeStatus, TlsInfo};
use skep_api::task::{Platform, Resources};
use skep_api::units::{ByteSize, NanoCpus};
use skep_api::{
    Availability, Cluster, ClusterId, ClusterSpec, Meta, Node, NodeDescription, NodeId, NodeRole, NodeSpec, SecretBytes,
};
use skep_csi::Drivers;
use skep_engine::Engine;
use skep_manager::{Manager, ManagerError};
use skep_overlay_net::{Overlay, OverlayConfig};
use skep_pki::{JoinToken, KeyLock, LockError, NodeIdentity, PendingIdentity, RootAuthority, Subject, UnlockKey};
use skep_worker::{TASK_ID_LABEL, Volumes};
use tokio::sync::RwLock;

pub(crate) use active::ActiveNode;
use address::{advertise_addr, in_family_of, listen_addr};
use events::EventLog;
use locking::{LOCK_FILE, Locked};
use state::NodeStateFile;

/// Control traffic, TCP.
pub(crate) const CONTROL_PORT: u16 = 2377;
/// Bulk traffic, UDP.
pub(crate) const BULK_PORT: u16 = 7946;
const DATA_PATH_PORT: u16 = 4789;

/// How long a join waits before it says that it did not work.
/// How long a node that leaves waits for its volumes to be taken away.
const VOLUMES_LIMIT: Duration = Duration::from_secs(30);
const JOIN_LIMIT: Duration = Duration::from_secs(20);

/// What a user asks of `init`.
#[derive(Clone, Debug, Default)]
pub(crate) struct InitRequest {
    pub(crate) listen: String,
    pub(crate) advertise: String,
    pub(crate) availability: Availability,
    pub(crate) spec: ClusterSpec,
    pub(crate) pools: Vec<String>,
    pub(crate) subnet_size: u8,
    pub(crate) data_path_addr: String,
    pub(crate) data_path_port: u16,
}

/// What a user asks of `join`.
#[derive(Clone, Debug, Default)]
pub(crate) struct JoinRequest {
    pub(crate) listen: String,
    pub(crate) advertise: String,
    pub(crate) data_path_addr: String,
    pub(crate) availability: String,
    pub(crate) token: String,
    pub(crate) managers: Vec<String>,
}

/// Why the node's place in a swarm does not change.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SwarmError {
    #[error("This node is already part of a swarm. Use \"skep swarm leave\" to leave this swarm and join another one.")]
    AlreadyMember,
    #[error(
        "This node is not part of a swarm. Use \"skep swarm init\" to make it the first manager of one, or \
         \"skep swarm join\" to join one."
    )]
    NotMember,
    #[error(
        "This node is not a swarm manager. Worker nodes can't be used to view or modify cluster state. Please run this \
         command on a manager node or promote the current node to a manager."
    )]
    NotManager,
    #[error(
        "Swarm is encrypted and needs to be unlocked before it can be used. Please use \"docker swarm unlock\" or \
         \"skep swarm unlock\" to unlock it."
    )]
    Locked,
    #[error("swarm is not locked")]
    NotLocked,
    #[error("{0}")]
    Invalid(String),
    #[error("{0}")]
    Refused(String),
    #[error("this node's manager is away: {0}. Once that is mended it comes back by itself.")]
    ManagerAway(String),
    #[error("{doing} failed: {reason}")]
    Failed { doing: &'static str, reason: String },
}

pub(crate) fn failed(doing: &'static str) -> impl Fn(&dyn std::fmt::Display) -> SwarmError {
    move |reason| SwarmError::Failed { doing, reason: reason.to_string() }
}

/// How the node takes part in a swarm.
pub(crate) struct SwarmConfig {
    pub(crate) dir: PathBuf,
    /// What of the swarm does not outlive a start of the host.
    pub(crate) run_dir: PathBuf,
    /// Where its volumes are shown to tasks.
    pub(crate) volumes_dir: PathBuf,
    pub(crate) labels: std::collections::BTreeMap<String, String>,
    /// What it has beside CPU and memory that tasks can reserve.
    pub(crate) generic: Vec<GenericResource>,
    /// How long a key of its tunnels lasts.
    pub(crate) key_period: Duration,
    /// How often it tells other managers that it leads.
    pub(crate) heartbeat: Duration,
    /// Whether it uses its kernel's own WireGuard.
    pub(crate) in_kernel: bool,
}

/// The node's place in a swarm, or none.
pub(crate) struct Swarm {
    config: SwarmConfig,
    engine: Arc<Engine>,
    active: RwLock<Option<Arc<ActiveNode>>>,
    /// Whether it has a place that waits for the unlock key.
    is_locked: AtomicBool,
    events: EventLog,
    drivers: Drivers,
    volumes: Volumes,
    /// One change at a time.
    change: tokio::sync::Mutex<()>,
}

impl Swarm {
    /// Takes the node's place up again, if it has one.
    pub(crate) async fn resume(config: SwarmConfig, engine: Arc<Engine>) -> anyhow::Result<Arc<Self>> {
        let (active, events, change) = (RwLock::default(), EventLog::default(), tokio::sync::Mutex::default());
        let drivers = Drivers::new(&config.run_dir.join("csi"));
        let volumes = Volumes::new(engine.clone(), drivers.clone(), config.volumes_dir.clone());
        let is_locked = AtomicBool::new(false);
        let swarm = Self { config, engine, active, is_locked, events, drivers, volumes, change };
        if let Some(state) = NodeStateFile::load(&swarm.config.dir)? {
            if swarm.lock_file().exists() {
                tracing::warn!("this manager is locked: it waits for the swarm's unlock key ('swarm unlock')");
                swarm.is_locked.store(true, Ordering::Relaxed);
            } else {
                swarm.take_up(state, None, None).await?;
            }
        } else {
            // What was left when it left a swarm.
            let volumes = swarm.volumes.clone();
            tokio::spawn(async move { volumes.let_go(VOLUMES_LIMIT).await });
        }
        Ok(Arc::new(swarm))
    }

    /// Starts what this node is of its swarm; its manager alone, at an address, if the others are lost.
    async fn take_up(&self, state: NodeStateFile, locked: Option<Locked>, alone: Option<String>) -> anyhow::Result<()> {
        let identity =
            NodeIdentity::load(&self.certificates(), locked.as_ref().map(Locked::lock))?.ok_or_else(|| {
                anyhow::anyhow!(
                    "{} holds no certificate: restore it, or remove {} and join again",
                    self.certificates().display(),
                    self.config.dir.display()
                )
            })?;
        let node = ActiveNode::start(self, identity, state, locked)?;
        let started = match alone {
            None => node.start_manager_if_due().await,
            Some(addr) => node.start_manager_as(Some(addr)).await.map(drop),
        };
        match started {
            // What users need to make room works meanwhile.
            Err(error) if is_full_disk(&error) => node.set_failure(Some(format!("{error:#}"))),
            // The others are away, and may come back; this one tries again.
            Err(error) if matches!(error.downcast_ref(), Some(ManagerError::Join { .. })) => {
                node.set_failure(Some(format!("{error:#}")));
            }
            Err(error) => {
                node.stop().await;
                return Err(error);
            }
            Ok(()) => {}
        }
        node.start_agent();
        *self.active.write().await = Some(node);
        Ok(())
    }

    /// Opens this manager's keys with the swarm's unlock key, and takes its place up again.
    pub(crate) async fn unlock(&self, key: &str) -> Result<(), SwarmError> {
        let _one = self.change.lock().await;
        if !self.is_locked() {
            let is_member = self.active.read().await.is_some();
            return Err(if is_member { SwarmError::NotLocked } else { SwarmError::NotMember });
        }
        let wrong =
            |why: LockError| SwarmError::Invalid(format!("swarm could not be unlocked: invalid key provided: {why}"));
        let opens: UnlockKey = key.parse().map_err(wrong)?;
        let lock = KeyLock::load(&self.lock_file(), &opens).map_err(wrong)?;
        let doing = failed("unlocking the swarm");
        let state = NodeStateFile::load(&self.config.dir).map_err(|error| doing(&format!("{error:#}")))?;
        let state = state.ok_or_else(|| doing(&"the node's state is gone"))?;
        let taken_up = self.take_up(state, Some(Locked::new(lock, opens.expose())), None).await;
        taken_up.map_err(|error| doing(&format!("{error:#}")))?;
        self.is_locked.store(false, Ordering::Relaxed);
        Ok(())
    }

    /// Whether this node's place in its swarm waits for the unlock key.
    pub(crate) fn is_locked(&self) -> bool {
        self.is_locked.load(Ordering::Relaxed)
    }

    fn lock_file(&self) -> PathBuf {
        self.certificates().join(LOCK_FILE)
    }

    fn open_overlay(&self, state: &NodeStateFile) -> anyhow::Result<Arc<Overlay>> {
        Ok(Overlay::open(OverlayConfig {
            node: state.node,
            run_dir: self.config.run_dir.join("overlay"),
            keys: self.config.dir.join("overlay.key"),
            key_period: self.config.key_period,
            program: self.engine.program().to_owned(),
            port: state.data_path_port,
            in_kernel: self.config.in_kernel,
        })?)
    }

    /// Removes the containers of the swarm's tasks from this node, and their networks.
    async fn remove_containers(&self, overlay: &Overlay) {
        for container in self.engine.list() {
            if container.config.labels.contains_key(TASK_ID_LABEL)
                && let Err(error) =
                    self.engine.remove(&container.id, skep_engine::RemoveOptions { force: true, volumes: true }).await
            {
                tracing::warn!(container = container.id, %error, "a task's container could not be removed");
            }
        }
        self.engine.set_network_keeper(None);
        self.engine.leave_kept_networks().await;
        if let Err(error) = overlay.close().await {
            tracing::warn!(%error, "the overlay network left something behind");
        }
    }

    pub(crate) fn certificates(&self) -> PathBuf {
        self.config.dir.join("certificates")
    }

    /// The node's place; an error if it has none.
    pub(crate) async fn node(&self) -> Result<Arc<ActiveNode>, SwarmError> {
        let active = self.active.read().await.clone();
        match active {
            Some(node) if node.is_refused() => Err(SwarmError::Refused(
                "this node was removed from its swarm: use \"skep swarm leave\" and join again".into(),
            )),
            Some(node) => Ok(node),
            None if self.is_locked() => Err(SwarmError::Locked),
            None => Err(SwarmError::NotMember),
        }
    }

    pub(crate) async fn active(&self) -> Option<Arc<ActiveNode>> {
        self.active.read().await.clone()
    }

    /// What has happened in the swarm, as far as this node was a manager then.
    pub(crate) const fn events(&self) -> &EventLog {
        &self.events
    }

    /// The manager on this node; an error if it is none.
    pub(crate) async fn manager(&self) -> Result<Manager, SwarmError> {
        let none = || if self.is_locked() { SwarmError::Locked } else { SwarmError::NotManager };
        let active = self.active.read().await.clone().ok_or_else(none)?;
        active.manager().ok_or_else(|| active.manager_failure().map_or(SwarmError::NotManager, SwarmError::ManagerAway))
    }

    /// Makes this node the first manager of a new swarm; returns its id.
    pub(crate) async fn init(&self, request: InitRequest) -> Result<String, SwarmError> {
        let _one = self.change.lock().await;
        self.require_no_place().await?;
        let mut spec = request.spec.clone();
        spec.validate().map_err(|error| SwarmError::Invalid(error.to_string()))?;
        if spec.name.is_empty() {
            "default".clone_into(&mut spec.name);
        }
        let listen = listen_addr(&request.listen)?;
        let advertise = advertise_addr(&request.advertise, listen)?;
        let listen = in_family_of(listen, &advertise);
        let doing = failed("making the swarm");
        let now = SystemTime::now();
        let (root, root_key) = RootAuthority::generate(now).map_err(|error| doing(&error))?;
        let (node, cluster) = (NodeId::random(), ClusterId::random());
        let pending = PendingIdentity::generate().map_err(|error| doing(&error))?;
        let subject = Subject { node, role: NodeRole::Manager, cluster };
        let csr = pending.request_pem().map_err(|error| doing(&error))?;
        let life = spec.ca.node_cert_expiry.duration();
        let certificate = root.sign(&csr, subject, life, now).map_err(|error| doing(&error))?;
        let identity = pending.certified(&certificate, root.certificate_pem()).map_err(|error| doing(&error))?;
        let token = || SecretBytes::new(JoinToken::generate(root.digest()).expose().into_bytes());
        let cluster = Cluster {
            id: cluster,
            meta: Meta::default(),
            root_ca: RootCa {
                certificate_pem: root.certificate_pem().to_owned(),
                key_pem: root_key,
                cross_signed_pem: String::new(),
            },
            join_tokens: JoinTokens { worker: token(), manager: token() },
            unlock_key: match spec.encryption_config.auto_lock_managers {
                true => UnlockKey::generate().expose(),
                false => SecretBytes::default(),
            },
            removed_nodes: std::collections::BTreeSet::new(),
            data_path_port: check_data_path_port(request.data_path_port)?,
            default_addr_pool: if request.pools.is_empty() { vec!["10.0.0.0/8".into()] } else { request.pools },
            subnet_size: if request.subnet_size == 0 { 24 } else { request.subnet_size },
            incarnation: 0,
            next_root: None,
            spec,
        };
        let data_path = data_path(&request.data_path_addr, cluster.data_path_port)?;
        let state = NodeStateFile::new(node, listen, &advertise, vec![advertise.clone()], data_path);
        let first = Node {
            id: node,
            meta: Meta::default(),
            spec: NodeSpec { role: NodeRole::Manager, availability: request.availability, ..NodeSpec::default() },
            description: self.description(active::tls_info(&identity).map_err(|error| doing(&error))?),
            status: NodeStatus::default(),
            raft: None,
            bulk_port: BULK_PORT,
        };
        let started = self.found(identity, state, &advertise, cluster, first).await;
        if let Err(error) = started {
            self.wipe();
            return Err(doing(&format!("{error:#}")));
        }
        Ok(node.to_string())
    }

    async fn found(
        &self,
        identity: NodeIdentity,
        state: NodeStateFile,
        advertise: &str,
        cluster: Cluster,
        first: Node,
    ) -> anyhow::Result<()> {
        identity.save(&self.certificates(), None)?;
        state.save(&self.config.dir)?;
        let node = ActiveNode::start(self, identity, state, None)?;
        let manager = node.start_manager().await?;
        let unlock_key = cluster.unlock_key.clone();
        let founded = async {
            manager.bootstrap(advertise, cluster, first).await?;
            node.lock_keys(&unlock_key).await
        };
        if let Err(error) = founded.await {
            node.stop().await;
            return Err(error);
        }
        node.start_agent();
        node.await_ready(&manager).await;
        *self.active.write().await = Some(node);
        Ok(())
    }

    /// Joins a swarm with a token, which says in what role.
    pub(crate) async fn join(&self, request: JoinRequest) -> Result<(), SwarmError> {
        let _one = self.change.lock().await;
        self.require_no_place().await?;
        let token: JoinToken =
            request.token.parse().map_err(|error: skep_pki::JoinTokenError| SwarmError::Invalid(error.to_string()))?;
        request.availability.parse::<Availability>().map_err(|error| SwarmError::Invalid(error.to_string()))?;
        let listen = listen_addr(&request.listen)?;
        let as_seen = || format!(":{}", listen.port());
        let advertise = advertise_addr(&request.advertise, listen)
            .or_else(|error| if request.advertise.is_empty() { Ok(as_seen()) } else { Err(error) })?;
        if request.managers.is_empty() {
            return Err(SwarmError::Invalid("name a manager to join, as HOST:2377".into()));
        }
        let listen = in_family_of(in_family_of(listen, &advertise), &request.managers[0]);
        let managers: Vec<String> = request.managers.iter().map(|addr| with_port(addr)).collect();
        let admitted = admission::join(&managers, &token, &request.token, &request.availability, JOIN_LIMIT).await?;
        let peer = &admitted.identity.peer;
        let node_id = peer.node();
        // A worker is seen at the address that it connects from, also once that is another one.
        let moves = request.advertise.is_empty() && peer.role() == NodeRole::Worker;
        let advertise = if moves { as_seen() } else { advertise };
        let data_path = data_path(&request.data_path_addr, check_data_path_port(admitted.data_path_port)?)?;
        let state = NodeStateFile::new(node_id, listen, &advertise, managers, data_path);
        let started = self.enter(admitted.identity, state).await;
        if let Err(error) = started {
            self.wipe();
            return Err(failed("joining the swarm")(&format!("{error:#}")));
        }
        Ok(())
    }

    async fn enter(&self, identity: NodeIdentity, state: NodeStateFile) -> anyhow::Result<()> {
        identity.save(&self.certificates(), None)?;
        state.save(&self.config.dir)?;
        let node = ActiveNode::start(self, identity, state, None)?;
        if let Err(error) = node.start_manager_if_due().await {
            node.stop().await;
            return Err(error);
        }
        node.start_agent();
        *self.active.write().await = Some(node);
        Ok(())
    }

    /// Leaves the swarm; a manager only by force.
    pub(crate) async fn leave(&self, force: bool) -> Result<(), SwarmError> {
        let _one = self.change.lock().await;
        if self.is_locked() {
            return self.leave_locked(force).await;
        }
        let node = self.active.read().await.clone().ok_or(SwarmError::NotMember)?;
        if let Some(manager) = node.manager() {
            if !force {
                return Err(SwarmError::Refused(leave_warning(&manager)));
            }
            node.demote_self(&manager).await;
        }
        *self.active.write().await = None;
        node.stop().await;
        self.remove_containers(node.overlay()).await;
        self.volumes.let_go(VOLUMES_LIMIT).await;
        self.wipe();
        Ok(())
    }

    /// Gives the place up without its keys: the others hear nothing of it.
    async fn leave_locked(&self, force: bool) -> Result<(), SwarmError> {
        if !force {
            return Err(SwarmError::Refused(
                "Swarm is encrypted and locked. Unlock it first, or use `--force` to leave without telling the others, \
                 which then have to remove it (node rm --force)"
                    .into(),
            ));
        }
        let doing = failed("leaving the swarm");
        let state = NodeStateFile::load(&self.config.dir).map_err(|error| doing(&format!("{error:#}")))?;
        if let Some(state) = state {
            let overlay = self.open_overlay(&state).map_err(|error| doing(&format!("{error:#}")))?;
            self.remove_containers(&overlay).await;
        }
        self.volumes.let_go(VOLUMES_LIMIT).await;
        self.wipe();
        self.is_locked.store(false, Ordering::Relaxed);
        Ok(())
    }

    async fn require_no_place(&self) -> Result<(), SwarmError> {
        match self.active.read().await.is_some() {
            true => Err(SwarmError::AlreadyMember),
            false if self.is_locked() => Err(SwarmError::Locked),
            false => Ok(()),
        }
    }

    fn wipe(&self) {
        if let Err(error) = std::fs::remove_dir_all(&self.config.dir) {
            tracing::warn!(dir = %self.config.dir.display(), %error, "the node's place in the swarm was not wiped");
        }
    }

    /// Stops the swarm's part of the daemon; containers go on.
    pub(crate) async fn stop(&self) {
        if let Some(node) = self.active.write().await.take() {
            node.stop().await;
        }
    }

    /// What this node says of itself.
    pub(crate) fn description(&self, tls: TlsInfo) -> NodeDescription {
        let hostname = skep_engine::host_name();
        let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        NodeDescription {
            hostname,
            platform: Platform { architecture: std::env::consts::ARCH.into(), os: "linux".into() },
            resources: Resources {
                nano_cpus: NanoCpus(i64::try_from(cpus).unwrap_or(1) * 1_000_000_000),
                memory_bytes: ByteSize(memory_total()),
                generic: self.config.generic.clone(),
            },
            engine: EngineDescription { engine_version: crate::VERSION.into(), labels: self.config.labels.clone() },
            tls,
            // Known once the node has its place in the swarm.
            data_path: None,
            csi: Vec::new(),
        }
    }

    pub(crate) fn engine(&self) -> &Arc<Engine> {
        &self.engine
    }
}

fn is_full_disk(error: &anyhow::Error) -> bool {
    let kinds = error.chain().filter_map(|cause| cause.downcast_ref::<std::io::Error>()).map(std::io::Error::kind);
    kinds.into_iter().any(|kind| kind == std::io::ErrorKind::StorageFull)
}

/// The tunnels' port: as dockerd takes it, 1024 to 49151; the usual one for zero.
fn check_data_path_port(port: u16) -> Result<u16, SwarmError> {
    match port {
        0 => Ok(DATA_PATH_PORT),
        1024..=49151 => Ok(port),
        _ => Err(SwarmError::Invalid(format!("data-path-port {port} is not possible: 1024 to 49151 are"))),
    }
}

/// Where other nodes reach this one's tunnels; an empty address stands for the advertised one.
fn data_path(addr: &str, port: u16) -> Result<(String, u16), SwarmError> {
    let addr = if addr.is_empty() { String::new() } else { address::resolve_told(addr, "data-path-addr")?.to_string() };
    Ok((addr, port))
}

fn leave_warning(manager: &Manager) -> String {
    let managers = manager.store().members().len();
    let what = match managers {
        1 => "Removing the last manager erases all current state of the swarm. Use `--force` to ignore this message.",
        2 => "Leaving the swarm would leave 1 manager, which cannot stand a failure. Use `--force` to leave anyway.",
        _ => "Use `--force` to let this manager leave; demoting it first is the gentler way.",
    };
    format!("You are attempting to leave the swarm on a node that is participating as a manager. {what}")
}

fn with_port(addr: &str) -> String {
    let has_port =
        addr.parse::<SocketAddr>().is_ok() || addr.rsplit_once(':').is_some_and(|(host, _)| !host.contains(':'));
    if has_port { addr.to_owned() } else { format!("{addr}:{CONTROL_PORT}") }
}

/// The host's memory in bytes.
pub(crate) fn memory_total() -> i64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:"));
    line.and_then(|line| line.split_whitespace().next()?.parse::<i64>().ok()).unwrap_or(0) * 1024
}
