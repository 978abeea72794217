//! One manager, assembled: store, services, and the leader's work while it leads.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

use skep_api::grpc::control_client::ControlClient;
use skep_api::grpc::control_server::ControlServer;
use skep_api::grpc::node_ca_server::NodeCaServer;
use skep_api::grpc::raft_server::RaftServer;
use skep_api::grpc::{ControlMessage, JoinRaftRequest, ReadIndexRequest};
use skep_api::node::RaftMember;
use skep_api::{Cluster, Node, NodeId, NodeRole, Timestamp, encoding};
use skep_csi::Drivers;
use skep_pki::{KeyLock, TlsIdentity};
use skep_raft_store::{DataKey, OpenError, ProposeError, Store, StoreConfig, Tables, Transaction, UpdateError};
use tokio::net::TcpListener;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::Status;
use tonic::transport::Server;

use crate::control::{self, Command, ControlError, Outcome};
use crate::dispatcher::{self, Dispatcher};
use crate::leader;
use crate::rpc::Services;
use crate::transport::{Accepted, Channels, accept};
use crate::wires::{BulkTransport, MESSAGE_LEN_MAX, Wires};

/// Heartbeats without which a follower begins to think of another leader.
const MISSED_HEARTBEATS: u32 = 2;
/// How long a command waits for a leader.
const LEADER_LIMIT: Duration = Duration::from_secs(5);
const LEADER_PAUSE: Duration = Duration::from_millis(20);
const READ_LIMIT: Duration = Duration::from_secs(5);
/// Looks at whether a snapshot is due are at least this far apart.
const SNAPSHOT_PAUSE: Duration = Duration::from_millis(100);
const FORWARD_LIMIT: Duration = Duration::from_secs(15);
/// How long an answer of a leader that was just replaced may still be on its way.
const LAST_WORDS: Duration = Duration::from_millis(20);
/// The key of the store, beside it.
const DATA_KEY: &str = "data.key";
const HANDOVER_LIMIT: Duration = Duration::from_secs(2);
/// A swarm that was recovered without this manager is the one to turn to after so long without a leader: far more than
/// an election takes, so that a majority of before which goes on is not torn.
const FORSAKEN_AFTER: Duration = Duration::from_secs(10);
/// How a manager is set up.
pub struct ManagerConfig {
    pub node: NodeId,
    pub raft_id: u64,
    pub tls: Arc<TlsIdentity>,
    /// Log, snapshots and their key.
    pub dir: PathBuf,
    /// What the key is locked by, if the swarm is.
    pub lock: Option<KeyLock>,
    pub listen: SocketAddr,
    pub bulk: Arc<dyn BulkTransport>,
    /// How often a leader says that it leads, and what managers have to answer within.
    pub heartbeat: Duration,
    pub snapshot_interval: u64,
    pub log_entries_kept: u64,
    /// The storage drivers that are asked while this manager leads.
    pub drivers: Drivers,
    /// Set if the others are lost for good: this manager goes on alone, at this address.
    pub alone: Option<String>,
}

impl std::fmt::Debug for ManagerConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ManagerConfig").field("node", &self.node).field("listen", &self.listen).finish_non_exhaustive()
    }
}

/// Why a manager does not start.
#[derive(Debug, thiserror::Error)]
pub enum ManagerError {
    #[error("{addr} cannot be listened on: is another daemon running, or is the address not this host's?")]
    Listen {
        addr: SocketAddr,
        #[source]
        cause: std::io::Error,
    },
    #[error(transparent)]
    Store(#[from] OpenError),
    #[error(transparent)]
    Key(#[from] skep_raft_store::DataKeyError),
    #[error("the node's certificate cannot be used")]
    Tls(#[from] skep_pki::TlsError),
    #[error("{0} cannot be made")]
    Dir(PathBuf, #[source] std::io::Error),
    #[error("the swarm could not be written down: {0}")]
    Bootstrap(ControlError),
    #[error("manager {addr} did not let this one in: {reason}")]
    Join { addr: String, reason: String },
}

/// Why a read cannot be answered.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{}", control::NO_LEADER)]
pub struct ReadError;

/// What a manager's parts share.
pub(crate) struct Shared {
    pub(crate) store: Store,
    pub(crate) tls: Arc<TlsIdentity>,
    channels: Channels,
    wires: Wires,
    drivers: Drivers,
    /// Since when this manager knows of no leader.
    forsaken: Mutex<Option<Instant>>,
    dispatcher: Mutex<Option<Dispatcher>>,
    tasks: TaskTracker,
    stop: CancellationToken,
}

impl Shared {
    pub(crate) fn dispatcher(&self) -> Option<Dispatcher> {
        self.dispatcher.lock().expect("nobody panics while holding it").clone()
    }

    pub(crate) fn leader_addr(&self) -> Option<String> {
        self.store.leadership().borrow().leader_addr.clone()
    }

    /// Where a node should turn to that has come to this manager while another leads: to the leader; to the swarm that was
    /// recovered without this manager, once that has had no leader of its own for long; nowhere.
    pub(crate) fn whom_to_turn_to(&self) -> String {
        let forsaken = *self.forsaken.lock().expect("nobody panics while holding it");
        let recovered = || self.wires.recovered().filter(|_| forsaken.is_some_and(|at| at.elapsed() >= FORSAKEN_AFTER));
        self.leader_addr().or_else(recovered).unwrap_or_default()
    }

    pub(crate) async fn execute_here(&self, command: Command) -> Result<Outcome, ControlError> {
        control::execute(&self.store, command, Timestamp::from_system(SystemTime::now())).await
    }

    /// Has a command carried out by whoever leads.
    pub(crate) async fn execute(&self, command: Command) -> Result<Outcome, ControlError> {
        let deadline = tokio::time::Instant::now() + LEADER_LIMIT;
        loop {
            let leadership = self.store.leadership().borrow().clone();
            let attempt = if leadership.is_leader && self.dispatcher().is_some() {
                match self.execute_here(command.clone()).await {
                    Err(error) if error.reason == control::Reason::NotLeader => Ok(None),
                    result => result.map(Some),
                }
            } else {
                match leadership.leader_addr.filter(|_| !leadership.is_leader) {
                    Some(addr) => self.forward(&addr, &command).await,
                    None => Ok(None),
                }
            };
            match attempt {
                Ok(Some(outcome)) => return Ok(outcome),
                Ok(None) if tokio::time::Instant::now() < deadline => tokio::time::sleep(LEADER_PAUSE).await,
                Ok(None) => return Err(ControlError::no_leader()),
                Err(error) => return Err(error),
            }
        }
    }

    /// Asks another manager; `None` if it does not lead, or is not reached, and so did nothing.
    async fn forward(&self, addr: &str, command: &Command) -> Result<Option<Outcome>, ControlError> {
        let Ok(channel) = self.channels.to(addr) else { return Ok(None) };
        let mut client = ControlClient::new(channel).max_decoding_message_size(MESSAGE_LEN_MAX);
        let call = client.execute(ControlMessage { body: encoding::encode(command) });
        let answer = tokio::select! {
            answer = tokio::time::timeout(FORWARD_LIMIT, call) => answer,
            () = async {
                self.leader_moves_from(addr).await;
                tokio::time::sleep(LAST_WORDS).await;
            } => {
                return Err(ControlError::new(
                    control::Reason::Unavailable,
                    "the leader was lost while it carried this out: look whether it was done before you repeat it",
                ));
            }
        };
        match answer {
            Ok(Ok(reply)) => {
                let result: Result<Outcome, ControlError> = encoding::decode(&reply.into_inner().body)
                    .map_err(|error| ControlError::new(control::Reason::Unavailable, error))?;
                result.map(Some)
            }
            Ok(Err(status)) if status.code() == tonic::Code::FailedPrecondition => Ok(None),
            Ok(Err(status)) if is_connect_error(&status) => Ok(None),
            Ok(Err(status)) => Err(ControlError::new(control::Reason::Unavailable, status.message())),
            Err(_) => Err(ControlError::new(
                control::Reason::Unavailable,
                format!("the leader at {addr} did not answer within {FORWARD_LIMIT:?}: look before you repeat"),
            )),
        }
    }

    /// The tables as a linearizable read must see them.
    pub(crate) async fn read(&self) -> Result<Arc<Tables>, ReadError> {
        let deadline = tokio::time::Instant::now() + LEADER_LIMIT;
        loop {
            if let Some(index) = self.read_index().await
                && self.store.wait_applied(index, READ_LIMIT).await
            {
                return Ok(self.store.view());
            }
            if tokio::time::Instant::now() >= deadline {
                return Err(ReadError);
            }
            tokio::time::sleep(LEADER_PAUSE).await;
        }
    }

    async fn read_index(&self) -> Option<u64> {
        let leadership = self.store.leadership().borrow().clone();
        if leadership.is_leader {
            return tokio::time::timeout(READ_LIMIT, self.store.read_index()).await.ok()?.ok();
        }
        let addr = leadership.leader_addr?;
        let mut client = ControlClient::new(self.channels.to(&addr).ok()?);
        let call = tokio::time::timeout(READ_LIMIT, client.read_index(ReadIndexRequest {}));
        tokio::select! {
            reply = call => Some(reply.ok()?.ok()?.into_inner().index),
            // A leader that is gone gives no answer, and another can.
            () = self.leader_moves_from(&addr) => None,
        }
    }

    /// Waits until this manager knows another leader than the one at `addr`, or none.
    async fn leader_moves_from(&self, addr: &str) {
        let mut leadership = self.store.leadership();
        // An error says that the store closes: whoever waits is told by other means.
        if leadership.wait_for(|now| now.leader_addr.as_deref() != Some(addr)).await.is_err() {
            std::future::pending().await
        }
    }

    /// Takes a node with a manager's certificate into consensus; only the leader can.
    pub(crate) async fn join_raft(&self, id: NodeId, raft_id: u64, addr: &str) -> Result<(), Status> {
        let leadership = self.store.leadership().borrow().clone();
        if !leadership.is_leader {
            let leader = leadership.leader_addr.ok_or_else(|| Status::unavailable(control::NO_LEADER))?;
            // The caller goes to the leader itself.
            return Err(Status::failed_precondition(leader));
        }
        let wanted = self.store.view().nodes.get(id).map(|node| node.spec.role);
        if wanted != Some(NodeRole::Manager) {
            return Err(Status::permission_denied(format!("node {id} is not to be a manager: promote it first")));
        }
        let unavailable = |error: ProposeError| Status::unavailable(error.to_string());
        self.store.add_member(raft_id, addr).await.map_err(unavailable)?;
        let member = RaftMember { raft_id, addr: addr.to_owned() };
        let noted = self.store.update(|tables| {
            let mut transaction = Transaction::new(Timestamp::from_system(SystemTime::now()));
            let node = tables.nodes.get(id).ok_or_else(|| Status::not_found(format!("node {id}")))?;
            transaction.update(Node { raft: Some(member.clone()), ..(**node).clone() });
            Ok::<_, Status>((transaction, ()))
        });
        noted.await.map_err(|error| match error {
            UpdateError::Caller(status) => status,
            UpdateError::Propose(error) => unavailable(error),
        })
    }

    /// Tells the wires which incarnation of the swarm this manager is of, as soon as it knows: a recovery alone changes
    /// it, and that begins with a store that is opened anew.
    async fn learn_incarnation(self: Arc<Self>) {
        let mut applied = self.store.applied();
        loop {
            if let Some(cluster) = self.store.view().cluster() {
                self.wires.set_incarnation(cluster.incarnation);
                return;
            }
            tokio::select! {
                () = self.stop.cancelled() => return,
                changed = applied.changed() => if changed.is_err() { return },
            }
        }
    }

    /// Takes snapshots as often as the swarm's settings say, where that is more often than the store
    /// does by itself.
    async fn take_snapshots(self: Arc<Self>) {
        let mut applied = self.store.applied();
        let mut last = self.store.view().index;
        loop {
            tokio::select! {
                () = self.stop.cancelled() => return,
                changed = applied.changed() => if changed.is_err() { return },
            }
            let view = self.store.view();
            let interval = view.cluster().map_or(u64::MAX, |cluster| cluster.spec.raft.snapshot_interval);
            if view.index.saturating_sub(last) >= interval {
                last = view.index;
                self.store.take_snapshot().await;
                tracing::info!(index = last, "a snapshot is taken");
            }
            tokio::time::sleep(SNAPSHOT_PAUSE).await;
        }
    }

    /// Waits until this manager, which was just elected, has applied all that was acknowledged before:
    /// on less it would decide what was decided already.
    async fn catch_up(&self) {
        loop {
            if let Ok(index) = self.store.read_index().await
                && self.store.wait_applied(index, READ_LIMIT).await
            {
                return;
            }
            tokio::time::sleep(LEADER_PAUSE).await;
        }
    }

    fn note_leader(&self, is_known: bool) {
        let mut forsaken = self.forsaken.lock().expect("nobody panics while holding it");
        // Terms go on without a leader.
        *forsaken = if is_known { None } else { forsaken.or_else(|| Some(Instant::now())) };
    }

    /// Does the leader's work whenever this manager leads.
    async fn follow_leadership(self: Arc<Self>) {
        let mut leadership = self.store.leadership();
        loop {
            let term = leadership.borrow_and_update().clone();
            self.note_leader(term.leader.is_some());
            let ready = term.is_leader
                && tokio::select! {
                    () = self.catch_up() => true,
                    _ = leadership.wait_for(|now| !now.is_leader || now.term != term.term) => continue,
                    () = self.stop.cancelled() => return,
                };
            if ready {
                let stop = self.stop.child_token();
                let dispatcher = Dispatcher::new(self.store.clone(), stop.clone());
                *self.dispatcher.lock().expect("nobody panics while holding it") = Some(dispatcher.clone());
                tracing::info!(term = term.term, "this manager leads");
                let work =
                    tokio::spawn(leader::lead(self.store.clone(), dispatcher, self.drivers.clone(), stop.clone()));
                let over = leadership.wait_for(|now| !now.is_leader || now.term != term.term);
                tokio::select! {
                    _ = over => {}
                    () = self.stop.cancelled() => {}
                }
                *self.dispatcher.lock().expect("nobody panics while holding it") = None;
                stop.cancel();
                drop(work.await);
                tracing::info!(term = term.term, "this manager leads no more");
            }
            tokio::select! {
                () = self.stop.cancelled() => return,
                changed = leadership.changed() => if changed.is_err() { return },
            }
        }
    }
}

/// What the swarm's state becomes when `node` alone goes on: the other managers are workers if they come back.
fn recover(tables: &Tables, node: NodeId, own: &RaftMember) -> Transaction {
    let mut transaction = Transaction::new(Timestamp::from_system(SystemTime::now()));
    if let Some(cluster) = tables.cluster() {
        transaction.update(Cluster { incarnation: cluster.incarnation + 1, ..(**cluster).clone() });
    }
    for manager in tables.nodes.iter().filter(|node| node.raft.is_some()) {
        let mut changed = (**manager).clone();
        if manager.id == node {
            changed.raft = Some(own.clone());
        } else {
            changed.raft = None;
            changed.spec.role = NodeRole::Worker;
        }
        transaction.update(changed);
    }
    transaction
}

fn is_connect_error(status: &Status) -> bool {
    status.code() == tonic::Code::Unavailable && status.message().contains("connect")
}

/// A manager that runs.
#[derive(Clone)]
pub struct Manager {
    shared: Arc<Shared>,
    raft_id: u64,
}

impl std::fmt::Debug for Manager {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Manager").field("raft_id", &self.raft_id).finish_non_exhaustive()
    }
}

impl Manager {
    /// Has the key of the store in `dir` locked by another lock, or by none.
    pub fn lock_store(dir: &Path, before: Option<&KeyLock>, after: Option<&KeyLock>) -> Result<(), ManagerError> {
        let path = dir.join(DATA_KEY);
        Ok(DataKey::load_or_create(&path, before)?.save(&path, after)?)
    }

    /// Opens the store and listens. The first manager then [`bootstrap`](Self::bootstrap)s the
    /// swarm, a further one [`join`](Self::join)s it, one that restarts does neither.
    pub async fn start(config: ManagerConfig) -> Result<Self, ManagerError> {
        std::fs::create_dir_all(&config.dir).map_err(|cause| ManagerError::Dir(config.dir.clone(), cause))?;
        let key = DataKey::load_or_create(&config.dir.join(DATA_KEY), config.lock.as_ref())?;
        let channels = Channels::new(config.tls.clone());
        let store_config = StoreConfig {
            raft_id: config.raft_id,
            dir: config.dir.join("store"),
            key,
            heartbeat: config.heartbeat,
            election_timeout: config.heartbeat * MISSED_HEARTBEATS,
            snapshot_interval: config.snapshot_interval,
            log_entries_kept: config.log_entries_kept,
        };
        let listener = TcpListener::bind(config.listen)
            .await
            .map_err(|cause| ManagerError::Listen { addr: config.listen, cause })?;
        let wires = Wires::new(channels.clone(), config.bulk);
        let store = match &config.alone {
            None => Store::open(store_config, wires.clone()).await?,
            Some(addr) => {
                let own = RaftMember { raft_id: config.raft_id, addr: addr.clone() };
                Store::open_alone(store_config, wires.clone(), addr, move |tables| recover(tables, config.node, &own))
                    .await?
            }
        };
        let shared = Arc::new(Shared {
            store,
            tls: config.tls.clone(),
            channels,
            drivers: config.drivers,
            wires,
            forsaken: Mutex::new(Some(Instant::now())),
            dispatcher: Mutex::default(),
            tasks: TaskTracker::new(),
            stop: CancellationToken::new(),
        });
        let Accepted { grpc, mut sessions } = accept(listener, &config.tls, shared.stop.clone())?;
        let services = Services(shared.clone());
        let server = Server::builder()
            .add_service(NodeCaServer::new(services.clone()))
            .add_service(RaftServer::new(services.clone()).max_decoding_message_size(MESSAGE_LEN_MAX))
            .add_service(ControlServer::new(services).max_decoding_message_size(MESSAGE_LEN_MAX));
        let stopped = shared.stop.clone().cancelled_owned();
        shared.tasks.spawn(async move {
            if let Err(error) = server.serve_with_incoming_shutdown(ReceiverStream::new(grpc), stopped).await {
                tracing::error!(%error, "the control port stopped");
            }
        });
        let serving = shared.clone();
        shared.tasks.spawn(async move {
            // Ends when nothing is accepted any more.
            while let Some(stream) = sessions.recv().await {
                serving.tasks.spawn(dispatcher::serve(serving.clone(), stream));
            }
        });
        shared.tasks.spawn(shared.clone().follow_leadership());
        shared.tasks.spawn(shared.clone().take_snapshots());
        shared.tasks.spawn(shared.clone().learn_incarnation());
        Ok(Self { shared, raft_id: config.raft_id })
    }

    /// Begins a new swarm with this node as its only manager.
    pub async fn bootstrap(&self, addr: &str, cluster: Cluster, node: Node) -> Result<(), ManagerError> {
        let failed = |error: ProposeError| ManagerError::Bootstrap(error.into());
        self.shared.store.initialize(addr).await.map_err(failed)?;
        let mut leadership = self.shared.store.leadership();
        let led = tokio::time::timeout(LEADER_LIMIT, leadership.wait_for(|now| now.is_leader)).await.is_ok();
        if !led {
            return Err(ManagerError::Bootstrap(ControlError::no_leader()));
        }
        let mut transaction = Transaction::new(Timestamp::from_system(SystemTime::now()));
        let ingress = control::network::make(&[], &cluster, skep_api::NetworkSpec::ingress());
        transaction.create(ingress.map_err(ManagerError::Bootstrap)?);
        transaction.create(cluster);
        let member = RaftMember { raft_id: self.raft_id, addr: addr.to_owned() };
        transaction.create(Node { raft: Some(member), ..node });
        self.shared.store.propose(&transaction).await.map_err(failed)?;
        Ok(())
    }

    /// Asks the swarm, by any of its managers, to take this one into consensus.
    pub async fn join(&self, via: &[String], addr: &str, limit: Duration) -> Result<(), ManagerError> {
        let deadline = tokio::time::Instant::now() + limit;
        let mut targets: Vec<String> = via.to_vec();
        let mut last = String::from("no manager is known");
        while let Some(target) = targets.first().cloned() {
            let mut client = ControlClient::new(self.shared.channels.to(&target)?);
            let request = JoinRaftRequest { raft_id: self.raft_id, addr: addr.to_owned() };
            match tokio::time::timeout(FORWARD_LIMIT, client.join_raft(request)).await {
                Ok(Ok(_)) => return Ok(()),
                Ok(Err(status)) if status.code() == tonic::Code::FailedPrecondition => {
                    // It names the leader.
                    targets.insert(0, status.message().to_owned());
                }
                Ok(Err(status)) => {
                    last = status.message().to_owned();
                    targets.rotate_left(1);
                }
                Err(_) => targets.rotate_left(1),
            }
            if tokio::time::Instant::now() >= deadline {
                break;
            }
            tokio::time::sleep(LEADER_PAUSE * 5).await;
        }
        Err(ManagerError::Join { addr: via.join(", "), reason: last })
    }

    /// Has a command carried out, wherever the leader is.
    pub async fn execute(&self, command: Command) -> Result<Outcome, ControlError> {
        self.shared.execute(command).await
    }

    /// The shared state, linearizable: it holds every change acknowledged before the call.
    pub async fn read(&self) -> Result<Arc<Tables>, ReadError> {
        self.shared.read().await
    }

    /// The shared state as far as this manager has it.
    #[must_use]
    pub fn view(&self) -> Arc<Tables> {
        self.shared.store.view()
    }

    /// The store itself, for watching and for what comes over QUIC.
    #[must_use]
    pub fn store(&self) -> &Store {
        &self.shared.store
    }

    /// Waits until this manager takes part no more; says why. It is to be stopped, and may be started anew.
    pub async fn failed(&self) -> String {
        let mut leadership = self.shared.store.leadership();
        let failed = leadership.wait_for(|now| now.failure.is_some()).await;
        match failed.map(|now| now.failure.clone()) {
            Ok(Some(failure)) => failure,
            // The store was closed.
            Ok(None) | Err(_) => std::future::pending().await,
        }
    }

    #[must_use]
    pub const fn raft_id(&self) -> u64 {
        self.raft_id
    }

    #[must_use]
    pub fn is_leader(&self) -> bool {
        self.shared.dispatcher().is_some()
    }

    /// Hands leadership over if this manager leads, then stops. Tasks go on.
    pub async fn stop(&self) {
        if self.shared.store.leadership().borrow().is_leader && self.shared.store.members().len() > 1 {
            let handed = self.shared.store.transfer_leadership(HANDOVER_LIMIT).await;
            tracing::info!(handed, "leadership was handed over");
        }
        self.shared.stop.cancel();
        self.shared.store.shutdown().await;
        self.shared.tasks.close();
        drop(tokio::time::timeout(HANDOVER_LIMIT, self.shared.tasks.wait()).await);
    }
}
