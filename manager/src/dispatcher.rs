//! The workers' sessions, held by the leader: who is alive, who runs what, and what they say of it.

mod assignments;
mod attachments;
mod facts;
mod holders;
mod statuses;

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

use skep_api::grpc::{
    AreYouThere, End, Heartbeat, HeartbeatPeriod, Hello, IAmHere, ManagerMessage, Managers, Redirect, Trust, Welcome,
    WorkerMessage, manager_message, worker_message,
};
use skep_api::node::NodeStatus;
use skep_api::{Node, NodeDescription, NodeId, NodeState, Timestamp, VolumeId, encoding, session};
use skep_pki::IssuerInfo;
use skep_raft_store::{Store, Tables, Transaction, UpdateError};
use tokio::sync::broadcast;
use tokio_util::sync::CancellationToken;
use tonic::Status;

use assignments::Assigned;
use facts::{ToldFacts, Touched};
use holders::Holders;
pub(crate) use statuses::StatusWriter;

use crate::authority::{Needs, check};
use crate::manager::Shared;
use crate::transport::{PeerInfo, PeerStream};
use crate::volumes;

/// Missed heartbeats after which a node counts as down.
const GRACE_PERIODS: u32 = 3;
const PERIOD_MIN: Duration = Duration::from_secs(1);
/// Workers per second of heartbeat period: the leader takes about this many beats a second.
const BEATS_PER_SECOND: u32 = 200;
/// How much longer a new leader waits for nodes to find it.
const TAKEOVER_GRACE: Duration = Duration::from_secs(4);
const HELLO_LIMIT: Duration = Duration::from_secs(5);
/// A worker that is there is heard more often: it asks when it hears nothing itself, and beats at times.
const SILENCE_MAX: Duration = Duration::from_secs(15);

type FromWorker = session::Incoming<PeerStream, WorkerMessage>;
type ToWorker = session::Outgoing<PeerStream>;

/// How often workers should say that they live: the more there are, the less often.
pub(crate) fn heartbeat_period(tables: &Tables) -> Duration {
    let asked = tables.cluster().map(|cluster| cluster.spec.dispatcher.heartbeat_period.duration());
    match asked {
        Some(asked) if !asked.is_zero() => asked,
        _ => {
            let workers = u32::try_from(tables.nodes.len()).unwrap_or(u32::MAX);
            PERIOD_MIN.max(Duration::from_secs(u64::from(workers / BEATS_PER_SECOND)))
        }
    }
}

/// The leader's sessions. Made anew at each election.
#[derive(Clone)]
pub(crate) struct Dispatcher {
    store: Store,
    statuses: StatusWriter,
    holders: Holders,
    deadlines: Arc<Mutex<BTreeMap<NodeId, Deadline>>>,
    stop: CancellationToken,
}

/// Until when a node must be heard of, and in which session.
#[derive(Clone, Copy, Debug)]
struct Deadline {
    at: Instant,
    session: u64,
}

impl Dispatcher {
    pub(crate) fn new(store: Store, stop: CancellationToken) -> Self {
        let tables = store.view();
        let grace = heartbeat_period(&tables) * GRACE_PERIODS + TAKEOVER_GRACE;
        let at = Instant::now() + grace;
        let deadlines = tables.nodes.iter().map(|node| (node.id, Deadline { at, session: 0 })).collect();
        let statuses = StatusWriter::spawn(store.clone(), stop.clone());
        Self { store, statuses, holders: Holders::default(), deadlines: Arc::new(Mutex::new(deadlines)), stop }
    }

    fn deadlines(&self) -> std::sync::MutexGuard<'_, BTreeMap<NodeId, Deadline>> {
        self.deadlines.lock().expect("nobody panics while holding it")
    }

    /// Marks nodes down that were not heard of in time; runs while this manager leads.
    pub(crate) async fn watch_deadlines(&self) {
        let mut tick = tokio::time::interval(Duration::from_millis(100));
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
        let mut last = Instant::now();
        loop {
            tick.tick().await;
            let now = Instant::now();
            let slept = now.duration_since(last);
            last = now;
            if slept > Duration::from_millis(500) {
                // This manager itself was held up: it cannot blame others for silence.
                self.deadlines().values_mut().for_each(|deadline| deadline.at += slept);
                continue;
            }
            let overdue: Vec<NodeId> = {
                let mut deadlines = self.deadlines();
                let overdue = deadlines.iter().filter(|(_, d)| d.at < now).map(|(&node, _)| node).collect::<Vec<_>>();
                deadlines.retain(|node, _| !overdue.contains(node));
                overdue
            };
            for node in overdue {
                self.mark(node, NodeState::Down, "heartbeat failure").await;
            }
        }
    }

    async fn mark(&self, id: NodeId, state: NodeState, message: &str) {
        let marked = self
            .store
            .update(|tables| {
                let mut transaction = Transaction::new(Timestamp::from_system(SystemTime::now()));
                if let Some(node) = tables.nodes.get(id).filter(|node| node.status.state != state) {
                    let mut node = (**node).clone();
                    node.status = NodeStatus { state, message: message.to_owned(), addr: node.status.addr };
                    transaction.update(node);
                }
                Ok::<_, std::convert::Infallible>((transaction, ()))
            })
            .await;
        match marked {
            Ok(()) => tracing::info!(node = %id, state = state.as_str(), message, "a node's state changed"),
            Err(error) => tracing::warn!(node = %id, %error, "a node's state could not be written"),
        }
    }

    /// Holds one worker's session until it ends. There may be thousands, which mostly wait: what they do at
    /// times has its memory for that time only.
    async fn session(
        &self,
        id: NodeId,
        addr: SocketAddr,
        mut from_worker: FromWorker,
        to_worker: &mut ToWorker,
    ) -> Result<(), Status> {
        let first = tokio::time::timeout(HELLO_LIMIT, next(&mut from_worker))
            .await
            .map_err(|_| Status::deadline_exceeded("the session began without a hello"))??;
        let Some(WorkerMessage { kind: Some(worker_message::Kind::Hello(hello)) }) = first else {
            return Err(Status::invalid_argument("a session begins with a hello"));
        };
        let session: u64 = rand::random();
        Box::pin(self.register(id, addr, hello)).await?;
        self.beat(id, session, true);
        self.holders.join(id, session);
        let ended = self.follow(id, session, &mut from_worker, to_worker).await;
        self.holders.leave(id, session);
        ended
    }

    /// Tells the worker what changes and takes what it says, until one of both goes.
    async fn follow(
        &self,
        id: NodeId,
        session: u64,
        from_worker: &mut FromWorker,
        to_worker: &mut ToWorker,
    ) -> Result<(), Status> {
        let mut commits = self.store.watch();
        let mut lowest = self.holders.lowest();
        let period = heartbeat_period(&self.store.view());
        let welcome = Welcome {
            session_id: format!("{session:016x}"),
            heartbeat_period: Some(HeartbeatPeriod { milliseconds: millis(period) }),
        };
        send(to_worker, manager_message::Kind::Welcome(welcome)).await?;
        let mut told = Told { period, ..Told::default() };
        let mut assigned = Assigned::default();
        let mut heard = tokio::time::Instant::now();
        Box::pin(self.tell_facts(id, session, &mut told, &Touched::everything(), to_worker)).await?;
        Box::pin(self.tell_changes(id, &mut assigned, &mut told, to_worker)).await?;
        loop {
            let waiting = assigned.waits_until();
            let silence = SILENCE_MAX.max(told.period * GRACE_PERIODS);
            tokio::select! {
                // What has come is looked at before anyone is called silent.
                biased;
                () = self.stop.cancelled() => return Err(Status::unavailable("this manager leads no more")),
                message = next(from_worker) => match message? {
                    None => return Ok(()),
                    Some(message) => {
                        heard = tokio::time::Instant::now();
                        Box::pin(self.handle(id, session, message, &mut told, to_worker)).await?;
                    }
                },
                commit = commits.recv() => {
                    let mut touched = Touched::default();
                    let mut tasks = false;
                    let mut next = match commit {
                        Err(broadcast::error::RecvError::Closed) => return Err(Status::unavailable("shutting down")),
                        Err(broadcast::error::RecvError::Lagged(_)) => Some(None),
                        Ok(commit) => Some(Some(commit)),
                    };
                    // Whatever else is there is told in one go.
                    while let Some(commit) = next {
                        tasks |= commit.as_ref().is_none_or(|commit| assignments::concerns(commit, id));
                        touched.note(commit.as_deref());
                        next = match commits.try_recv() {
                            Ok(commit) => Some(Some(commit)),
                            Err(broadcast::error::TryRecvError::Lagged(_)) => Some(None),
                            Err(_) => None,
                        };
                    }
                    let facts = !touched.is_empty();
                    if facts {
                        Box::pin(self.tell_facts(id, session, &mut told, &touched, to_worker)).await?;
                    }
                    if tasks || facts {
                        Box::pin(self.tell_changes(id, &mut assigned, &mut told, to_worker)).await?;
                    }
                }
                // Tasks whose end waited for other nodes may end now, or have waited long enough.
                _ = lowest.changed(), if waiting.is_some() => {
                    Box::pin(self.tell_changes(id, &mut assigned, &mut told, to_worker)).await?;
                }
                () = sleep_until(waiting) => {
                    Box::pin(self.tell_changes(id, &mut assigned, &mut told, to_worker)).await?;
                }
                () = tokio::time::sleep_until(heard + silence) => {
                    return Err(Status::deadline_exceeded("nothing was heard for too long"));
                }
            }
        }
    }

    /// Tells a worker what it does not know yet of the networks it takes part in.
    async fn tell_facts(
        &self,
        id: NodeId,
        session: u64,
        told: &mut Told,
        touched: &Touched,
        to_worker: &mut ToWorker,
    ) -> Result<(), Status> {
        let tables = self.store.view();
        for part in told.facts.update(&tables, id, touched) {
            told.unheld = Some(part.revision);
            send(to_worker, manager_message::Kind::Facts(part)).await?;
        }
        if told.unheld.is_none() {
            // Nothing of all that is new to it.
            self.holders.hold(id, session, told.facts.revision());
        }
        Ok(())
    }

    /// Writes down that the node is there, and what it says of itself.
    async fn register(&self, id: NodeId, addr: SocketAddr, hello: Hello) -> Result<(), Status> {
        let description = read_description(&hello.description)?;
        let bulk_port = u16::try_from(hello.bulk_port).map_err(|_| Status::invalid_argument("no such port"))?;
        self.change_node(id, |node| {
            let addr = seen_at(node, addr.ip()).to_string();
            let status = NodeStatus { state: NodeState::Ready, message: String::new(), addr };
            Node { description: description.clone(), bulk_port, status, ..node.clone() }
        })
        .await
    }

    async fn change_node(&self, id: NodeId, change: impl Fn(&Node) -> Node) -> Result<(), Status> {
        let changed = self.store.update(|tables| {
            let mut transaction = Transaction::new(Timestamp::from_system(SystemTime::now()));
            let node = tables.nodes.get(id).ok_or_else(|| {
                Status::permission_denied(format!("node {id} is not known to the swarm: it was removed"))
            })?;
            let now = change(node);
            if now != **node {
                transaction.update(now);
            }
            Ok((transaction, ()))
        });
        changed.await.map_err(|error| match error {
            UpdateError::Caller(status) => status,
            UpdateError::Propose(error) => Status::unavailable(error.to_string()),
        })
    }

    /// Moves the node's deadline on, if the session is the newest.
    fn beat(&self, id: NodeId, session: u64, new: bool) {
        let at = Instant::now() + heartbeat_period(&self.store.view()) * GRACE_PERIODS;
        let mut deadlines = self.deadlines();
        if new || deadlines.get(&id).is_some_and(|deadline| deadline.session == session) {
            deadlines.insert(id, Deadline { at, session });
        }
    }

    async fn handle(
        &self,
        id: NodeId,
        session: u64,
        message: WorkerMessage,
        told: &mut Told,
        to_worker: &mut ToWorker,
    ) -> Result<(), Status> {
        let current = self.deadlines().get(&id).map(|deadline| deadline.session);
        match current {
            Some(current) if current != session => return Err(Status::aborted("a newer session took over")),
            // It was given up as down; a new session brings it back.
            None => return Err(Status::aborted("the node was marked down: begin a new session")),
            Some(_) => self.beat(id, session, false),
        }
        match message.kind {
            Some(worker_message::Kind::Heartbeat(Heartbeat {})) => Ok(()),
            Some(worker_message::Kind::AreYouThere(AreYouThere {})) => {
                send(to_worker, manager_message::Kind::IAmHere(IAmHere {})).await
            }
            Some(worker_message::Kind::Statuses(batch)) => self.statuses.take(id, batch).await,
            Some(worker_message::Kind::Description(bytes)) => {
                let description = read_description(&bytes)?;
                self.change_node(id, |node| Node { description: description.clone(), ..node.clone() }).await
            }
            Some(worker_message::Kind::Attachments(wanted)) => {
                for reply in attachments::take(&self.store, id, wanted).await? {
                    send(to_worker, manager_message::Kind::Attachment(reply)).await?;
                }
                Ok(())
            }
            Some(worker_message::Kind::FactsHeld(held)) => {
                if told.unheld.is_some_and(|unheld| unheld <= held.revision) {
                    told.unheld = None;
                }
                self.holders.hold(id, session, held.revision);
                if held.digests.is_empty() {
                    return Ok(());
                }
                let digests =
                    encoding::decode(&held.digests).map_err(|error| Status::invalid_argument(error.to_string()))?;
                let otherwise = told.facts.otherwise(held.revision, &digests);
                if otherwise.is_empty() {
                    return Ok(());
                }
                tracing::warn!(node = %id, of = otherwise.join(", "), "a node has not what it was told: it is told anew");
                told.facts = ToldFacts::default();
                self.tell_facts(id, session, told, &Touched::everything(), to_worker).await
            }
            Some(worker_message::Kind::VolumesReleased(released)) => self.release_volumes(id, &released.ids).await,
            Some(worker_message::Kind::Hello(_)) => Err(Status::invalid_argument("unexpected message")),
            // What a later version says is for others.
            None => Ok(()),
        }
    }

    async fn release_volumes(&self, node: NodeId, ids: &[Vec<u8>]) -> Result<(), Status> {
        let ids: Vec<VolumeId> = ids.iter().filter_map(|id| VolumeId::from_bytes(id)).collect();
        let written = self.store.update(|tables| {
            let mut tx = Transaction::new(Timestamp::from_system(SystemTime::now()));
            volumes::released(tables, &mut tx, node, &ids);
            Ok::<_, std::convert::Infallible>((tx, ()))
        });
        written.await.map_err(|error| Status::unavailable(error.to_string()))
    }

    /// Tells a worker everything it does not know yet.
    async fn tell_changes(
        &self,
        id: NodeId,
        assigned: &mut Assigned,
        told: &mut Told,
        to_worker: &mut ToWorker,
    ) -> Result<(), Status> {
        let tables = self.store.view();
        let Some(node) = tables.nodes.get(id) else {
            return Err(Status::permission_denied(format!("node {id} was removed from the swarm")));
        };
        let lowest = *self.holders.lowest().borrow();
        let now = Timestamp::from_system(SystemTime::now());
        for part in assigned.update(&tables, id, |task| holders::must_wait(task, lowest, now)) {
            send(to_worker, manager_message::Kind::Assignments(part)).await?;
        }
        let managers: Vec<String> =
            tables.nodes.iter().filter_map(|n| n.raft.as_ref()).map(|r| r.addr.clone()).collect();
        if managers != told.managers {
            send(to_worker, manager_message::Kind::Managers(Managers { addrs: managers.clone() })).await?;
            told.managers = managers;
        }
        // A manager on its way out keeps its role until consensus has let it go.
        let role = (node.spec.role == skep_api::NodeRole::Manager || node.raft.is_none()).then_some(node.spec.role);
        if let Some(role) = role.filter(|_| role != told.role) {
            send(to_worker, manager_message::Kind::Role(role.organizational_unit().into())).await?;
            told.role = Some(role);
        }
        if let Some(cluster) = tables.cluster() {
            let (root, signing) = (&cluster.root_ca.certificate_pem, &cluster.signing_root().certificate_pem);
            if (root, signing) != (&told.trust.0, &told.trust.1) {
                let issuer = IssuerInfo::of_pem(signing).map_err(|error| Status::internal(error.to_string()))?;
                let trust =
                    Trust { root_certificate_pem: root.clone().into_bytes(), issuer_public_key: issuer.public_key };
                send(to_worker, manager_message::Kind::Trust(trust)).await?;
                told.trust = (root.clone(), signing.clone());
            }
        }
        let period = heartbeat_period(&tables);
        if period != told.period {
            let message = HeartbeatPeriod { milliseconds: millis(period) };
            send(to_worker, manager_message::Kind::HeartbeatPeriod(message)).await?;
            told.period = period;
        }
        Ok(())
    }
}

/// What a worker was told last.
#[derive(Default)]
struct Told {
    period: Duration,
    managers: Vec<String>,
    role: Option<skep_api::NodeRole>,
    /// The root certificates that are trusted and that sign.
    trust: (String, String),
    facts: ToldFacts,
    /// The newest revision that was sent and that the worker does not hold yet.
    unheld: Option<u64>,
}

/// Keys of a node that its peers hold at the same time.
const KEYS_MAX: usize = 2;

/// Where others reach a node whose session comes from `addr`: the leader's own comes from within its host, and it is
/// reached where it is a manager.
fn seen_at(node: &Node, addr: IpAddr) -> IpAddr {
    let as_manager = || node.raft.as_ref()?.addr.parse::<SocketAddr>().ok().map(|addr| addr.ip());
    if addr.is_loopback() { as_manager().unwrap_or(addr) } else { addr }
}

fn read_description(bytes: &[u8]) -> Result<NodeDescription, Status> {
    let description: NodeDescription =
        encoding::decode(bytes).map_err(|error| Status::invalid_argument(error.to_string()))?;
    let keys = description.data_path.as_ref().map_or(0, |path| path.keys.len());
    if keys > KEYS_MAX {
        return Err(Status::invalid_argument(format!("{keys} keys are too many: a node has {KEYS_MAX} at most")));
    }
    Ok(description)
}

/// Waits for a time; for ever if there is none.
async fn sleep_until(time: Option<Timestamp>) {
    match time {
        Some(time) => tokio::time::sleep(time.since(Timestamp::from_system(SystemTime::now()))).await,
        None => std::future::pending().await,
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

async fn next(from_worker: &mut FromWorker) -> Result<Option<WorkerMessage>, Status> {
    from_worker.next().await.map_err(|error| Status::cancelled(format!("the worker is gone: {error}")))
}

async fn send(to_worker: &mut ToWorker, kind: manager_message::Kind) -> Result<(), Status> {
    let message = ManagerMessage { kind: Some(kind) };
    to_worker.send(&message).await.map_err(|error| Status::cancelled(format!("the worker is gone: {error}")))
}

/// Serves one connection that a worker opened for its session, up to its last message.
pub(crate) async fn serve(shared: Arc<Shared>, stream: PeerStream) {
    let info = stream.info().clone();
    let (from_worker, mut to_worker) = session::split(stream);
    let last = match admitted(&shared, &info, from_worker, &mut to_worker).await {
        Ok(None) => return,
        Ok(Some(leader_addr)) => manager_message::Kind::Redirect(Redirect { leader_addr }),
        Err(status) => {
            tracing::debug!(addr = %info.addr, %status, "a session ended");
            manager_message::Kind::End(End { code: status.code().into(), message: status.message().to_owned() })
        }
    };
    // The worker may be gone already.
    drop(send(&mut to_worker, last).await);
}

/// Holds the session of a worker that may have one. Where the leader is, if it is not here.
async fn admitted(
    shared: &Shared,
    info: &PeerInfo,
    from_worker: FromWorker,
    to_worker: &mut ToWorker,
) -> Result<Option<String>, Status> {
    let peer = check(info.identity.as_ref(), Needs::AnyNode, &shared.store.view(), SystemTime::now())?;
    let Some(dispatcher) = shared.dispatcher() else { return Ok(Some(shared.whom_to_turn_to())) };
    dispatcher.session(peer.node(), info.addr, from_worker, to_worker).await.map(|()| None)
}
