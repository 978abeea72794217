//! A node that is in a swarm: its identity, its agent, and its manager while it is one.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use skep_api::node::{DataPath, TlsInfo};
use skep_api::session::Connection;
use skep_api::{NodeDescription, NodeId, NodeRole, SecretBytes};
use skep_csi::Drivers;
use skep_engine::Engine;
use skep_manager::control::Command;
use skep_manager::transport::Channels;
use skep_manager::{Manager, ManagerConfig};
use skep_overlay_net::Overlay;
use skep_pki::{CaDigest, NodeIdentity, TlsIdentity};
use skep_worker::{Agent, AgentConfig, AgentEvent, Attachments, Connect, Connecting, SwarmNetworks, Volumes};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use super::address::seen_from;
use super::admission;
use super::events::EventLog;
use super::locking::Locked;
use super::state::NodeStateFile;
use super::{BULK_PORT, Swarm};
use crate::bulk::Bulk;

const EVENTS_AHEAD: usize = 16;
const JOIN_LIMIT: Duration = Duration::from_secs(20);
const DEMOTE_LIMIT: Duration = Duration::from_secs(5);
const READY_LIMIT: Duration = Duration::from_secs(5);
const READY_PAUSE: Duration = Duration::from_millis(10);
/// Before a manager that failed is started anew.
const RESTART_PAUSE: Duration = Duration::from_secs(2);
/// Until the managers have heard of the role that one of them told the node.
const ROLE_LIMIT: Duration = Duration::from_secs(10);
const ROLE_PAUSE: Duration = Duration::from_millis(100);
const RENEW_RETRY: Duration = Duration::from_secs(30);
/// Certificates of another root are fetched within so long, and tried again after so long.
const REISSUE_SPREAD: Duration = Duration::from_millis(500);
const REISSUE_RETRY: Duration = Duration::from_secs(2);
const SNAPSHOT_INTERVAL: u64 = 10_000;
const LOG_ENTRIES_KEPT: u64 = 500;

/// A member of a swarm.
pub(crate) struct ActiveNode {
    dir: PathBuf,
    pub(super) certificates: PathBuf,
    pub(super) tls: Arc<TlsIdentity>,
    /// What its keys are locked by on disk, if they are. Held while they are written.
    pub(super) locked: tokio::sync::Mutex<Option<Locked>>,
    channels: Channels,
    engine: Arc<Engine>,
    description: NodeDescription,
    state: Mutex<NodeStateFile>,
    pub(super) manager: watch::Sender<Option<Manager>>,
    /// Why this node's manager is away, if it is.
    failure: Mutex<Option<String>>,
    bulk: Bulk,
    /// Of its manager, if it is one.
    heartbeat: Duration,
    events: EventLog,
    overlay: Arc<Overlay>,
    drivers: Drivers,
    volumes: Volumes,
    /// What the swarm is told of the certificate.
    told: watch::Sender<TlsInfo>,
    /// The key that the swarm wants it signed by; empty as long as none was told.
    wanted_issuer: watch::Sender<String>,
    refused: Mutex<Option<String>>,
    /// Held while the role changes; no new one is taken once the node stops.
    role: tokio::sync::Mutex<()>,
    pub(super) stop: CancellationToken,
}

struct Dialer(Channels);

impl Connect for Dialer {
    fn connect<'a>(&'a self, addr: &'a str) -> Connecting<'a> {
        Box::pin(async {
            let stream = self.0.session(addr).await?;
            Ok(Box::new(stream) as Box<dyn Connection>)
        })
    }
}

/// What joining begins is done by then.
const JOINED_PAUSE: Duration = Duration::from_secs(1);

impl ActiveNode {
    /// Takes up the identity; opens the bulk endpoint, nothing else yet.
    pub(super) fn start(
        swarm: &Swarm,
        identity: NodeIdentity,
        state: NodeStateFile,
        locked: Option<Locked>,
    ) -> anyhow::Result<Arc<Self>> {
        let overlay = swarm.open_overlay(&state)?;
        let told = tls_info(&identity)?;
        let mut description = swarm.description(told.clone());
        let (port, kernel_port) = (overlay.port(), overlay.kernel_port());
        description.data_path = Some(DataPath { keys: Vec::new(), addr: state.tunnel_addr(), port, kernel_port });
        let tls = TlsIdentity::new(identity)?;
        let bulk_addr = SocketAddr::new(state.listen.ip(), BULK_PORT);
        let bulk = Bulk::listen(bulk_addr, tls.clone(), swarm.engine().clone())?;
        Ok(Arc::new(Self {
            dir: swarm.config.dir.clone(),
            heartbeat: swarm.config.heartbeat,
            events: swarm.events.clone(),
            certificates: swarm.certificates(),
            locked: tokio::sync::Mutex::new(locked),
            channels: Channels::new(tls.clone()),
            tls,
            engine: swarm.engine().clone(),
            description,
            state: Mutex::new(state),
            manager: watch::Sender::default(),
            failure: Mutex::default(),
            bulk,
            overlay,
            drivers: swarm.drivers.clone(),
            volumes: swarm.volumes.clone(),
            told: watch::Sender::new(told),
            wanted_issuer: watch::Sender::default(),
            refused: Mutex::default(),
            role: tokio::sync::Mutex::default(),
            stop: CancellationToken::new(),
        }))
    }

    pub(crate) fn id(&self) -> NodeId {
        self.tls.peer().node()
    }

    /// Whether its certificate says so, whatever its manager does.
    pub(super) fn is_manager(&self) -> bool {
        self.tls.peer().role() == NodeRole::Manager
    }

    pub(crate) fn state(&self) -> NodeStateFile {
        self.state.lock().expect("nobody panics while holding it").clone()
    }

    pub(crate) fn manager(&self) -> Option<Manager> {
        self.manager.borrow().clone()
    }

    /// Why this node's manager is away, if it should be there.
    pub(crate) fn manager_failure(&self) -> Option<String> {
        self.failure.lock().expect("nobody panics while holding it").clone()
    }

    pub(super) fn set_failure(&self, failure: Option<String>) {
        *self.failure.lock().expect("nobody panics while holding it") = failure;
    }

    pub(crate) fn overlay(&self) -> &Arc<Overlay> {
        &self.overlay
    }

    pub(crate) fn bulk(&self) -> &Bulk {
        &self.bulk
    }

    pub(crate) fn is_refused(&self) -> bool {
        self.refused.lock().expect("nobody panics while holding it").is_some()
    }

    fn change_state(&self, change: impl FnOnce(&mut NodeStateFile)) {
        let mut state = self.state.lock().expect("nobody panics while holding it");
        change(&mut state);
        if let Err(error) = state.save(&self.dir) {
            tracing::error!(dir = %self.dir.display(), %error, "the node's state could not be saved");
        }
    }

    pub(super) fn raft_dir(&self) -> PathBuf {
        self.dir.join("raft")
    }

    /// Starts the manager of this node; it is in no consensus by that alone.
    pub(super) async fn start_manager(&self) -> anyhow::Result<Manager> {
        self.start_manager_as(None).await
    }

    /// The same; alone from now on, at the advertised address, if the others are lost.
    pub(super) async fn start_manager_as(&self, alone: Option<String>) -> anyhow::Result<Manager> {
        let state = self.state();
        let snapshot_interval = std::env::var("SKEP_SNAPSHOT_INTERVAL").ok().and_then(|n| n.parse().ok());
        let manager = Manager::start(ManagerConfig {
            node: self.id(),
            raft_id: state.raft_id,
            tls: self.tls.clone(),
            dir: self.raft_dir(),
            lock: self.locked.lock().await.as_ref().map(|locked| locked.lock().clone()),
            listen: state.listen,
            bulk: Arc::new(self.bulk.clone()),
            heartbeat: self.heartbeat,
            snapshot_interval: snapshot_interval.unwrap_or(SNAPSHOT_INTERVAL),
            log_entries_kept: LOG_ENTRIES_KEPT,
            drivers: self.drivers.clone(),
            alone,
        })
        .await?;
        self.bulk.serve_store(Some(manager.store().clone()));
        tokio::spawn(self.events.clone().follow(manager.store().watch()));
        self.manager.send_replace(Some(manager.clone()));
        self.set_failure(None);
        self.change_state(|state| state.in_raft = true);
        Ok(manager)
    }

    /// Starts the manager if the certificate says that this node is one, and joins consensus if it
    /// never did.
    pub(super) async fn start_manager_if_due(&self) -> anyhow::Result<()> {
        if self.tls.peer().role() != NodeRole::Manager || self.manager().is_some() {
            return Ok(());
        }
        let before = self.state();
        let manager = self.start_manager().await?;
        if before.in_raft {
            return Ok(());
        }
        let joined = tokio::select! {
            joined = manager.join(&before.managers, &before.advertise, JOIN_LIMIT) => joined.map_err(Into::into),
            () = self.stop.cancelled() => Err(anyhow::anyhow!("the node stops")),
        };
        if joined.is_err() {
            self.stop_manager().await;
            self.change_state(|state| state.in_raft = false);
        }
        joined
    }

    async fn stop_manager(&self) {
        let manager = self.manager.send_replace(None);
        self.bulk.serve_store(None);
        if let Some(manager) = manager {
            manager.stop().await;
        }
    }

    /// Starts the agent, and the watch over the certificate's life.
    pub(super) fn start_agent(self: &Arc<Self>) {
        let (events, from_agent) = mpsc::channel(EVENTS_AHEAD);
        let attachments = Attachments::default();
        let config = AgentConfig {
            node: self.id(),
            description: self.description.clone(),
            tls: self.told.subscribe(),
            bulk_port: BULK_PORT,
            managers: self.known_managers(),
            engine: self.engine.clone(),
            overlay: self.overlay.clone(),
            attachments: attachments.clone(),
            volumes: self.volumes.clone(),
            connect: Arc::new(Dialer(self.channels.clone())),
        };
        let networks = SwarmNetworks { overlay: self.overlay.clone(), attachments };
        self.engine.set_network_keeper(Some(Arc::new(networks)));
        tokio::spawn(self.overlay.clone().run(self.stop.clone()));
        tokio::spawn(Agent::new(config, events).run(self.stop.clone()));
        tokio::spawn(Self::follow(Arc::clone(self), from_agent));
        tokio::spawn(Self::keep_certificate(Arc::clone(self)));
        tokio::spawn(Self::keep_manager(Arc::clone(self)));
        tokio::spawn(Self::keep_locked(Arc::clone(self)));
        tokio::spawn(async {
            // Joining took far more of the program than being a member does. A convenience, no condition.
            tokio::time::sleep(JOINED_PAUSE).await;
            drop(skep_engine::let_go_of_code());
        });
    }

    /// Where others reach this node; empty if that cannot be told now.
    pub(crate) fn addr(&self) -> String {
        let state = self.state();
        match state.advertise.parse::<SocketAddr>() {
            Ok(addr) => addr.ip().to_string(),
            Err(_) => {
                let seen = state.managers.iter().find_map(|manager| seen_from(manager));
                seen.map(|addr| addr.to_string()).unwrap_or_default()
            }
        }
    }

    /// The managers to turn to, this node's own first.
    fn known_managers(&self) -> Vec<String> {
        let state = self.state();
        let own = self.manager().map(|_| {
            let port = state.listen.port();
            let ip =
                if state.listen.ip().is_unspecified() { "127.0.0.1".to_owned() } else { state.listen.ip().to_string() };
            format!("{ip}:{port}")
        });
        own.into_iter().chain(state.managers).collect()
    }

    /// Does what follows from what the agent hears.
    async fn follow(self: Arc<Self>, mut events: mpsc::Receiver<AgentEvent>) {
        loop {
            let event = tokio::select! {
                () = self.stop.cancelled() => return,
                event = events.recv() => event,
            };
            match event {
                None => return,
                Some(AgentEvent::Managers(managers)) => self.change_state(|state| state.managers = managers),
                Some(AgentEvent::Role(role)) => {
                    if let Err(error) = self.take_role(role).await {
                        tracing::error!(
                            role = role.as_str(),
                            error = format!("{error:#}"),
                            "the role could not be taken"
                        );
                    }
                }
                Some(AgentEvent::Trust { root_pem, issuer_public_key }) => {
                    if let Err(error) = self.trust(&root_pem).await {
                        tracing::error!(
                            error = format!("{error:#}"),
                            "the swarm's root certificate could not be taken"
                        );
                    }
                    self.wanted_issuer.send_replace(issuer_public_key);
                }
                Some(AgentEvent::Refused(why)) => {
                    tracing::error!(why, "the swarm refuses this node");
                    *self.refused.lock().expect("nobody panics while holding it") = Some(why);
                }
            }
        }
    }

    /// Renews the certificate for a new role, and starts or stops the manager with it.
    async fn take_role(&self, role: NodeRole) -> anyhow::Result<()> {
        let _one = self.role.lock().await;
        if self.stop.is_cancelled() {
            return Ok(());
        }
        if self.tls.peer().role() != role {
            let deadline = tokio::time::Instant::now() + ROLE_LIMIT;
            while let Err(error) = self.renew(Some(role)).await {
                anyhow::ensure!(tokio::time::Instant::now() < deadline && !self.stop.is_cancelled(), "{error:#}");
                tokio::time::sleep(ROLE_PAUSE).await;
            }
            tracing::info!(role = role.as_str(), "the node has a certificate for its new role");
        }
        match role {
            NodeRole::Manager => {
                if self.manager().is_none() {
                    self.change_state(|state| {
                        state.raft_id = rand::random();
                        state.in_raft = false;
                    });
                    self.start_manager_if_due().await?;
                }
            }
            NodeRole::Worker => {
                // One that failed is there no more, but its store is.
                if self.raft_dir().exists() {
                    self.stop_manager().await;
                    self.set_failure(None);
                    std::fs::remove_dir_all(self.raft_dir())?;
                    self.change_state(|state| state.in_raft = false);
                }
                // A worker starts by itself.
                self.lock_keys(&SecretBytes::default()).await?;
            }
        }
        Ok(())
    }

    /// Starts the manager anew where it failed, as on a disk that was full for a while.
    async fn keep_manager(self: Arc<Self>) {
        let mut manager = self.manager.subscribe();
        loop {
            let current = manager.borrow_and_update().clone();
            let failure = async {
                match current {
                    Some(manager) => manager.failed().await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = self.stop.cancelled() => return,
                changed = manager.changed() => if changed.is_err() { return },
                failure = failure => {
                    tracing::error!(failure, "this node's manager cannot go on: it is tried again and again");
                    self.set_failure(Some(failure));
                    let _one = self.role.lock().await;
                    self.stop_manager().await;
                }
                () = tokio::time::sleep(RESTART_PAUSE), if self.manager_failure().is_some() => {
                    let _one = self.role.lock().await;
                    let started = self.start_manager_if_due().await;
                    self.set_failure(started.err().map(|error| format!("{error:#}")));
                }
            }
        }
    }

    async fn renew(&self, role: Option<NodeRole>) -> anyhow::Result<()> {
        let root_pem = self.tls.identity().root_pem;
        let mut managers = self.known_managers();
        if role.is_some() {
            // The one that told the role knows of it; this node's own, which may have no leader, knows last.
            managers.reverse();
        }
        let identity = admission::renew(&self.channels, &managers, &root_pem, role).await?;
        self.take_identity(|_| identity).await?;
        // What is connected from now on shows the new certificate.
        self.channels.forget_all();
        Ok(())
    }

    /// Trusts another root from the next handshake on.
    async fn trust(&self, root_pem: &str) -> anyhow::Result<()> {
        if self.tls.identity().root_pem == root_pem {
            return Ok(());
        }
        self.take_identity(|before| before.with_root(root_pem)).await?;
        tracing::info!(root = %CaDigest::of_pem(root_pem), "the node trusts another root certificate");
        Ok(())
    }

    /// Puts another identity in place of the one before, in memory once it is on disk.
    async fn take_identity(&self, change: impl FnOnce(NodeIdentity) -> NodeIdentity) -> anyhow::Result<()> {
        let locked = self.locked.lock().await;
        let identity = change(self.tls.identity());
        let told = tls_info(&identity)?;
        identity.save(&self.certificates, locked.as_ref().map(Locked::lock))?;
        self.tls.replace(identity)?;
        self.told.send_replace(told);
        Ok(())
    }

    /// Whether the swarm wants the certificate signed by another root.
    fn has_old_issuer(&self) -> bool {
        let wanted = self.wanted_issuer.borrow();
        !wanted.is_empty() && *wanted != self.told.borrow().cert_issuer_public_key
    }

    /// Renews the certificate in time, again and again, and when the swarm's root changes.
    async fn keep_certificate(self: Arc<Self>) {
        let mut wanted = self.wanted_issuer.subscribe();
        let mut retry = Duration::ZERO;
        loop {
            let due = match self.has_old_issuer() {
                // The nodes of a swarm do not all come at once.
                true => REISSUE_SPREAD.mul_f64(rand::random()),
                false => self.tls.identity().renew_after(SystemTime::now(), rand::random()),
            };
            tokio::select! {
                () = self.stop.cancelled() => return,
                changed = wanted.changed() => if changed.is_ok() { continue } else { return },
                () = tokio::time::sleep(due.max(retry)) => {}
            }
            retry = Duration::ZERO;
            let is_urgent = self.has_old_issuer();
            if let Err(error) = self.renew(None).await {
                tracing::warn!(error = format!("{error:#}"), "the certificate could not be renewed yet");
                retry = RENEW_RETRY;
            }
            if is_urgent && self.has_old_issuer() {
                // A manager that did not know yet of the next root may have signed it.
                retry = REISSUE_RETRY;
            }
        }
    }

    /// Waits until the swarm counts on this node, the first of all: what is read of it from then on stays.
    pub(super) async fn await_ready(&self, manager: &Manager) {
        let ready = async {
            loop {
                let state =
                    manager.read().await.ok().and_then(|tables| Some(tables.nodes.get(self.id())?.status.state));
                if state.is_some_and(|state| state == skep_api::NodeState::Ready) {
                    return;
                }
                tokio::time::sleep(READY_PAUSE).await;
            }
        };
        if tokio::time::timeout(READY_LIMIT, ready).await.is_err() {
            tracing::warn!("the swarm is made, but this node's agent has not reported to it yet");
        }
    }

    /// Lets this manager out of consensus in good order before it leaves, if that can be.
    pub(super) async fn demote_self(&self, manager: &Manager) {
        if manager.store().members().len() < 2 {
            return;
        }
        let demoted = tokio::time::timeout(DEMOTE_LIMIT, async {
            let tables = manager.read().await.ok()?;
            let node = tables.nodes.get(self.id())?;
            let spec = skep_api::NodeSpec { role: NodeRole::Worker, ..node.spec.clone() };
            manager.execute(Command::UpdateNode { id: node.id, version: node.meta.version, spec }).await.ok()?;
            while manager.store().members().iter().any(|(id, _)| *id == manager.raft_id()) {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            Some(())
        });
        if !matches!(demoted.await, Ok(Some(()))) {
            tracing::warn!("this manager leaves without the others' consent: remove it there with 'node demote'");
        }
    }

    /// Stops agent and manager; containers go on.
    pub(super) async fn stop(&self) {
        self.stop.cancel();
        let _one = self.role.lock().await;
        self.stop_manager().await;
        self.bulk.close().await;
    }
}

/// What a node tells of its certificate.
pub(super) fn tls_info(identity: &NodeIdentity) -> anyhow::Result<TlsInfo> {
    let issuer = identity.issuer()?;
    Ok(TlsInfo {
        trust_root: identity.root_pem.clone(),
        cert_issuer_subject: issuer.subject,
        cert_issuer_public_key: issuer.public_key,
    })
}
