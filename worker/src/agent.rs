//! The worker's side of the session: keeps one with the leader, whoever that is, and runs what it
//! is given.

use std::collections::BTreeMap;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use skep_api::grpc::{
    AreYouThere, FactsHeld, Heartbeat, Hello, IAmHere, ManagerMessage, WorkerMessage, manager_message, worker_message,
};
use skep_api::node::TlsInfo;
use skep_api::volume::NodeCsiInfo;
use skep_api::{NodeDescription, NodeId, NodeRole, TaskId, TaskState, encoding, session};
use skep_engine::Engine;
use skep_overlay_net::Overlay;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::{AbortOnDropHandle, TaskTracker};
use tonic::Status;

use crate::assignments::{Inbox, Payloads, Update};
use crate::attachments::Attachments;
use crate::conversion::TASK_ID_LABEL;
use crate::images::Images;
use crate::networks::FactsInbox;
use crate::reporter::Reporter;
use crate::runner::Runner;
use crate::volumes::Volumes;

/// Pauses between attempts: the first, and the longest. A new leader waits a few seconds for its
/// workers before it gives them up: pauses and limits here must leave room for several attempts.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(50), Duration::from_millis(500));
/// How often what this node holds of networks is compared with what it was told.
const COMPARE_MILLIS: u64 = 2000;
const MESSAGES_AHEAD: usize = 64;
/// Of those, for what says that this node lives.
const MESSAGES_KEPT_FREE: usize = 16;
const WELCOME_LIMIT: Duration = Duration::from_secs(2);

/// What the future of a [`Connect`] brings.
pub type Connecting<'a> = Pin<Box<dyn Future<Output = io::Result<Box<dyn session::Connection>>> + Send + 'a>>;
type ToManager = mpsc::Sender<WorkerMessage>;

/// Connects to managers; the daemon brings the node's certificate into it.
pub trait Connect: Send + Sync + 'static {
    fn connect<'a>(&'a self, addr: &'a str) -> Connecting<'a>;
}

/// How an agent is set up.
pub struct AgentConfig {
    pub node: NodeId,
    pub description: NodeDescription,
    /// What the node says of its certificate, as it is at any time.
    pub tls: watch::Receiver<TlsInfo>,
    pub bulk_port: u16,
    pub managers: Vec<String>,
    pub engine: Arc<Engine>,
    pub overlay: Arc<Overlay>,
    pub attachments: Attachments,
    pub volumes: Volumes,
    pub connect: Arc<dyn Connect>,
}

impl std::fmt::Debug for AgentConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("AgentConfig").field("node", &self.node).finish_non_exhaustive()
    }
}

/// What the daemon hears from its agent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AgentEvent {
    /// These are the managers now.
    Managers(Vec<String>),
    /// The swarm wants the node in this role.
    Role(NodeRole),
    /// This root certificate is to be trusted, and the node's own one to be signed by this key (DER in base64).
    Trust { root_pem: String, issuer_public_key: String },
    /// The swarm refuses the node: it was removed.
    Refused(String),
}

/// Runs a node's tasks.
pub struct Agent {
    config: AgentConfig,
    payloads: Payloads,
    images: Images,
    reporter: Reporter,
    runners: BTreeMap<TaskId, watch::Sender<TaskState>>,
    tasks: TaskTracker,
    events: mpsc::Sender<AgentEvent>,
}

impl std::fmt::Debug for Agent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Agent").field("config", &self.config).finish_non_exhaustive()
    }
}

impl Agent {
    #[must_use]
    pub fn new(config: AgentConfig, events: mpsc::Sender<AgentEvent>) -> Self {
        Self {
            config,
            payloads: Payloads::default(),
            images: Images::default(),
            reporter: Reporter::default(),
            runners: BTreeMap::new(),
            tasks: TaskTracker::new(),
            events,
        }
    }

    /// Keeps a session until `stop`; containers go on whatever happens.
    pub async fn run(mut self, stop: CancellationToken) {
        let volumes = self.config.volumes.clone();
        let _watcher = AbortOnDropHandle::new(tokio::spawn(async move { volumes.watch_drivers().await }));
        let mut pause = BACKOFF.0;
        let mut next: Option<String> = None;
        let mut turn = 0;
        while !stop.is_cancelled() {
            let managers = &self.config.managers;
            if managers.is_empty() {
                return;
            }
            let target = next.take().unwrap_or_else(|| managers[turn % managers.len()].clone());
            turn += 1;
            let end = tokio::select! {
                () = stop.cancelled() => return,
                end = self.session(&target) => end,
            };
            match end {
                SessionEnd::Redirect(leader) if !leader.is_empty() && leader != target => {
                    next = Some(leader);
                    pause = BACKOFF.0;
                }
                SessionEnd::Lost { welcomed: true } => pause = BACKOFF.0,
                SessionEnd::Redirect(_) | SessionEnd::Lost { welcomed: false } => {}
                SessionEnd::Refused(why) => {
                    // The daemon may be on its way down.
                    drop(self.events.send(AgentEvent::Refused(why)).await);
                }
            }
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(pause) => {}
            }
            pause = (pause * 2).min(BACKOFF.1);
        }
    }

    async fn session(&mut self, addr: &str) -> SessionEnd {
        let mut welcomed = false;
        let ended = self.run_session(addr, &mut welcomed).await;
        match ended {
            Ok(end) => end,
            Err(status) => {
                tracing::debug!(manager = addr, %status, "the session ended");
                if status.code() == tonic::Code::PermissionDenied {
                    return SessionEnd::Refused(status.message().to_owned());
                }
                SessionEnd::Lost { welcomed }
            }
        }
    }

    async fn run_session(&mut self, addr: &str, welcomed: &mut bool) -> Result<SessionEnd, Status> {
        let connection = self.config.connect.connect(addr).await.map_err(lost)?;
        let (mut from_manager, writing) = session::split::<_, ManagerMessage>(connection);
        let (to_manager, messages) = mpsc::channel(MESSAGES_AHEAD);
        // Ends with the session; one that fails is noticed by whoever has something to send.
        let _writer = AbortOnDropHandle::new(tokio::spawn(write(writing, messages)));
        let mut news = News::new(&self.config, self.reporter.clone());
        let hello = Hello { description: news.description(), bulk_port: u32::from(self.config.bulk_port) };
        send(&to_manager, worker_message::Kind::Hello(hello))?;
        let mut inbox = Inbox::default();
        let mut facts = FactsInbox::default();
        let mut beat = tokio::time::interval(Duration::from_secs(1));
        let (mut heard, mut asked) = (tokio::time::Instant::now(), None);
        loop {
            // Never waits for the manager to take something: it may wait for this side to take something.
            let room = *welcomed && to_manager.capacity() > MESSAGES_KEPT_FREE;
            tokio::select! {
                // What has come is looked at before anyone is called silent.
                biased;
                _ = beat.tick(), if *welcomed => {
                    send(&to_manager, worker_message::Kind::Heartbeat(Heartbeat {}))?;
                }
                message = from_manager.next() => {
                    let Some(message) = message.map_err(lost)? else { return Ok(SessionEnd::Lost { welcomed: *welcomed }) };
                    (heard, asked) = (tokio::time::Instant::now(), None);
                    if let Some(manager_message::Kind::Facts(part)) = message.kind {
                        if let Some(update) = facts.take(part).map_err(|e| Status::invalid_argument(e.to_string()))? {
                            self.config.overlay.take(update);
                        }
                    } else if let Some(end) = self.handle(message, &mut inbox, &mut beat, welcomed).await? {
                        return Ok(end);
                    }
                }
                kind = news.next(), if room => send(&to_manager, kind)?,
                () = tokio::time::sleep_until(heard + session::SILENCE), if *welcomed && asked.is_none() => {
                    asked = Some(tokio::time::Instant::now());
                    send(&to_manager, worker_message::Kind::AreYouThere(AreYouThere {}))?;
                }
                () = tokio::time::sleep_until(asked.unwrap_or(heard) + session::ANSWER_LIMIT), if *welcomed && asked.is_some() => {
                    return Err(Status::deadline_exceeded("the manager is silent"));
                }
                () = tokio::time::sleep_until(heard + WELCOME_LIMIT), if !*welcomed => {
                    return Err(Status::deadline_exceeded("no welcome"));
                }
            }
        }
    }

    async fn handle(
        &mut self,
        message: ManagerMessage,
        inbox: &mut Inbox,
        beat: &mut tokio::time::Interval,
        welcomed: &mut bool,
    ) -> Result<Option<SessionEnd>, Status> {
        match message.kind {
            Some(manager_message::Kind::Redirect(redirect)) => {
                return Ok(Some(SessionEnd::Redirect(redirect.leader_addr)));
            }
            Some(manager_message::Kind::Welcome(welcome)) => {
                *welcomed = true;
                self.reporter.begin_session();
                self.config.attachments.begin_session();
                if let Some(period) = welcome.heartbeat_period {
                    *beat = interval(period.milliseconds);
                }
                tracing::info!(session = welcome.session_id, "the session with the leader is open");
            }
            Some(manager_message::Kind::HeartbeatPeriod(period)) => *beat = interval(period.milliseconds),
            Some(manager_message::Kind::Managers(managers)) => {
                self.config.managers.clone_from(&managers.addrs);
                self.tell(AgentEvent::Managers(managers.addrs)).await;
            }
            Some(manager_message::Kind::Role(unit)) => {
                if let Some(role) = NodeRole::from_organizational_unit(&unit) {
                    self.tell(AgentEvent::Role(role)).await;
                }
            }
            Some(manager_message::Kind::Trust(trust)) => {
                let root_pem = String::from_utf8_lossy(&trust.root_certificate_pem).into_owned();
                self.tell(AgentEvent::Trust { root_pem, issuer_public_key: trust.issuer_public_key }).await;
            }
            Some(manager_message::Kind::Assignments(part)) => {
                let update = inbox.take(part, &self.payloads).map_err(|e| Status::invalid_argument(e.to_string()))?;
                if let Some(update) = update {
                    self.apply(update);
                }
            }
            Some(manager_message::Kind::Attachment(reply)) => {
                self.config.attachments.take(&reply).map_err(|e| Status::invalid_argument(e.to_string()))?;
            }
            Some(manager_message::Kind::IAmHere(IAmHere {})) => {}
            Some(manager_message::Kind::End(end)) => return Err(Status::new(end.code.into(), end.message)),
            // Facts are taken before; what a later version says is for others.
            Some(manager_message::Kind::Facts(_)) | None => {}
        }
        Ok(None)
    }

    async fn tell(&self, event: AgentEvent) {
        // The daemon may be on its way down.
        drop(self.events.send(event).await);
    }

    /// Brings the runners in line with what is assigned.
    fn apply(&mut self, update: Update) {
        let named: std::collections::BTreeSet<TaskId> = update.tasks.iter().map(|task| task.id).collect();
        let mut removed = update.removed;
        if update.complete {
            removed.extend(self.runners.keys().filter(|id| !named.contains(id)));
            removed.extend(self.left_over().filter(|id| !named.contains(id)));
        }
        self.config.volumes.apply(update.complete, update.volumes, &update.removed_volumes);
        for task in update.tasks {
            let id = task.id;
            if let Some(desired) = self.runners.get(&id) {
                desired.send_if_modified(|before| {
                    let further = task.desired_state > *before;
                    *before = task.desired_state.max(*before);
                    further
                });
                continue;
            }
            let (sender, desired) = watch::channel(task.desired_state);
            self.runners.insert(id, sender);
            let runner = Runner {
                task,
                node: self.config.node,
                engine: self.config.engine.clone(),
                payloads: self.payloads.clone(),
                images: self.images.clone(),
                volumes: self.config.volumes.clone(),
                reporter: self.reporter.clone(),
                desired,
            };
            self.tasks.spawn(runner.run());
        }
        for id in removed {
            if let Some(desired) = self.runners.remove(&id) {
                desired.send_replace(TaskState::Remove);
            }
            self.reporter.forget(id);
            let engine = self.config.engine.clone();
            self.tasks.spawn(async move { remove_container(&engine, id).await });
        }
    }

    /// Tasks whose containers are here, whoever started them.
    fn left_over(&self) -> impl Iterator<Item = TaskId> {
        let containers = self.config.engine.list();
        containers.into_iter().filter_map(|container| container.config.labels.get(TASK_ID_LABEL)?.parse().ok())
    }
}

/// Removes what is left of a task that the managers have forgotten.
async fn remove_container(engine: &Engine, task: TaskId) {
    let label = task.to_string();
    let container =
        engine.list().into_iter().find(|container| container.config.labels.get(TASK_ID_LABEL) == Some(&label));
    if let Some(container) = container
        && let Err(error) =
            engine.remove(&container.id, skep_engine::RemoveOptions { force: true, volumes: true }).await
    {
        tracing::warn!(%task, %error, "a task's container could not be removed");
    }
}

enum SessionEnd {
    Redirect(String),
    Lost { welcomed: bool },
    Refused(String),
}

/// What a session's manager is to hear of, as it comes up.
struct News {
    description: NodeDescription,
    tls: watch::Receiver<TlsInfo>,
    overlay: Arc<Overlay>,
    keys: watch::Receiver<Vec<[u8; 32]>>,
    volumes: Volumes,
    drivers: watch::Receiver<Vec<NodeCsiInfo>>,
    held: watch::Receiver<u64>,
    compare: tokio::time::Interval,
    reporter: Reporter,
    attachments: Attachments,
}

impl News {
    fn new(config: &AgentConfig, reporter: Reporter) -> Self {
        let (overlay, attachments) = (config.overlay.clone(), config.attachments.clone());
        let (keys, held, compare) = (overlay.public_keys(), overlay.held(), interval(COMPARE_MILLIS));
        let (description, tls) = (config.description.clone(), config.tls.clone());
        let (volumes, drivers) = (config.volumes.clone(), config.volumes.drivers());
        Self { description, tls, overlay, keys, volumes, drivers, held, compare, reporter, attachments }
    }

    /// What this node says of itself, with its certificate, its tunnels' keys and its storage drivers as they are now.
    fn description(&mut self) -> Vec<u8> {
        self.description.tls.clone_from(&self.tls.borrow_and_update());
        self.description.csi.clone_from(&self.drivers.borrow_and_update());
        if let Some(path) = &mut self.description.data_path {
            path.keys.clone_from(&self.keys.borrow_and_update());
        }
        encoding::encode(&self.description)
    }

    /// Waits for the next; to wait in vain loses nothing.
    async fn next(&mut self) -> worker_message::Kind {
        loop {
            tokio::select! {
                changed = self.held.changed() => if changed.is_ok() {
                    let revision = *self.held.borrow_and_update();
                    return worker_message::Kind::FactsHeld(FactsHeld { revision, digests: Vec::new() });
                },
                _ = self.compare.tick() => if let Some((revision, digests)) = self.overlay.digests() {
                    let digests = encoding::encode(&digests);
                    return worker_message::Kind::FactsHeld(FactsHeld { revision, digests });
                },
                changed = self.keys.changed() => if changed.is_ok() {
                    return worker_message::Kind::Description(self.description());
                },
                changed = self.tls.changed() => if changed.is_ok() {
                    return worker_message::Kind::Description(self.description());
                },
                changed = self.drivers.changed() => if changed.is_ok() {
                    return worker_message::Kind::Description(self.description());
                },
                released = self.volumes.next_released() => return worker_message::Kind::VolumesReleased(released),
                batch = self.reporter.next_batch() => return worker_message::Kind::Statuses(batch),
                wishes = self.attachments.next_message() => return worker_message::Kind::Attachments(wishes),
            }
        }
    }
}

fn interval(milliseconds: u64) -> tokio::time::Interval {
    let mut interval = tokio::time::interval(Duration::from_millis(milliseconds.max(100)));
    interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    interval
}

fn send(to_manager: &ToManager, kind: worker_message::Kind) -> Result<(), Status> {
    let sent = to_manager.try_send(WorkerMessage { kind: Some(kind) });
    sent.map_err(|_| Status::unavailable("the manager takes nothing any more"))
}

/// Sends what there is to send, until it cannot.
async fn write(
    mut writing: session::Outgoing<Box<dyn session::Connection>>,
    mut messages: mpsc::Receiver<WorkerMessage>,
) {
    while let Some(message) = messages.recv().await {
        if let Err(error) = writing.send(&message).await {
            tracing::debug!(%error, "the session's connection takes nothing any more");
            return;
        }
    }
}

fn lost(error: io::Error) -> Status {
    Status::unavailable(error.to_string())
}
