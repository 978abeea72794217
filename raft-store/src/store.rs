//! The store as its users see it: propose, read, watch, and who leads.

use std::collections::{BTreeMap, BTreeSet};
use std::io::ErrorKind;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use openraft::async_runtime::WatchReceiver as _;
use openraft::errors::{ChangeMembershipError, ClientWriteError, Fatal, RaftError};
use openraft::{BasicNode, ChangeMembers, Instant as _, ReadPolicy, SnapshotPolicy};
use skep_api::{encoding, with_causes};
use tokio::sync::{RwLock, broadcast, watch};

use crate::activity::{Activity, ActivityCounts};
use crate::log::LogStore;
use crate::machine::{Machine, Published};
use crate::peers::{OtherMember, Peers, RpcKind};
use crate::raft_types::{Proposal, Raft, RaftId, Snapshot, Types};
use crate::rpc::{PeerFactory, SnapshotHeader};
use crate::seal::DataKey;
use crate::tables::Tables;
use crate::transaction::{Commit, Refusal, Transaction};

/// How a store is opened.
#[derive(Debug, Clone)]
pub struct StoreConfig {
    pub raft_id: RaftId,
    /// Where log, votes and snapshots lie.
    pub dir: PathBuf,
    pub key: DataKey,
    pub heartbeat: Duration,
    /// A follower stands for election after one to two times this without a heartbeat.
    pub election_timeout: Duration,
    /// Log entries between snapshots.
    pub snapshot_interval: u64,
    /// Log entries kept behind a snapshot for slow followers.
    pub log_entries_kept: u64,
}

/// Why a store does not open.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error("the replicated store in {dir} cannot be used; if other managers run, let this one leave and join again")]
    Unusable {
        dir: PathBuf,
        #[source]
        cause: std::io::Error,
    },
    #[error("the disk of the replicated store in {dir} is full: free some space there")]
    Full {
        dir: PathBuf,
        #[source]
        cause: std::io::Error,
    },
    #[error("consensus did not start: {0}")]
    Raft(String),
}

/// Why a proposal did not go through.
#[derive(Debug, thiserror::Error)]
pub enum ProposeError {
    #[error(transparent)]
    Refused(Refusal),
    /// Nothing was done.
    #[error("this manager is not the leader")]
    NotLeader { leader_addr: Option<String> },
    #[error("the swarm did not agree within {0:?}: the outcome is not known; look before you repeat")]
    TimedOut(Duration),
    #[error("consensus changed on the way ({0}): the outcome is not known; look before you repeat")]
    Stopped(String),
}

/// Why [`Store::update`] did not go through: the store's reason or the caller's own.
#[derive(Debug, thiserror::Error)]
pub enum UpdateError<E> {
    #[error(transparent)]
    Propose(#[from] ProposeError),
    #[error(transparent)]
    Caller(E),
}

/// Who leads, as this manager knows it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Leadership {
    pub term: u64,
    pub is_leader: bool,
    pub leader: Option<RaftId>,
    pub leader_addr: Option<String>,
    /// Why this manager takes part no more, such as a disk that is full. What is on disk is whole: a store that
    /// is opened anew goes on from there.
    pub failure: Option<String>,
}

/// A handle on the replicated store; clones share it.
#[derive(Clone)]
pub struct Store {
    raft: Raft,
    published: Arc<Published>,
    leadership: watch::Receiver<Leadership>,
    activity: Arc<Activity>,
    dir: PathBuf,
    /// Held for reading by a proposal under way, for writing while leadership is handed over.
    handover: Arc<RwLock<()>>,
    heartbeat: Duration,
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Store").field("index", &self.view().index).finish_non_exhaustive()
    }
}

/// How long a proposal may wait for a majority.
const PROPOSE_LIMIT: Duration = Duration::from_secs(10);
/// How long to wait while another change of the membership is under way.
const CHANGE_PAUSE: Duration = Duration::from_millis(20);
/// A member that acknowledged one of the last so many heartbeats can take over.
const HEARTBEATS_LATELY: u32 = 10;
/// A leader whose last so many heartbeats no majority acknowledged leads no more; far more than others need for an election.
const HEARTBEATS_UNHEARD: u32 = 60;
/// How often a transaction is made anew when others were faster.
const UPDATE_TRIES: usize = 32;

/// The address of a store that is to be the only one, and what changes with that.
type Alone<'a> = (&'a str, Box<dyn FnOnce(&Tables) -> Transaction + Send>);

impl Store {
    /// Opens the store in `config.dir`, verifies it, and takes part in consensus.
    pub async fn open<P: Peers>(config: StoreConfig, peers: P) -> Result<Self, OpenError> {
        Self::open_as(config, peers, None).await
    }

    /// The same, after a majority was lost for good: this store, at `addr`, is the only one from now on. `change` is
    /// made with that, in one.
    ///
    /// The others must not come back as what they were: a majority of them would go on without this one.
    pub async fn open_alone<P: Peers>(
        config: StoreConfig,
        peers: P,
        addr: &str,
        change: impl FnOnce(&Tables) -> Transaction + Send + 'static,
    ) -> Result<Self, OpenError> {
        Self::open_as(config, peers, Some((addr, Box::new(change)))).await
    }

    async fn open_as<P: Peers>(config: StoreConfig, peers: P, alone: Option<Alone<'_>>) -> Result<Self, OpenError> {
        let unusable = |cause: std::io::Error| match cause.kind() {
            ErrorKind::StorageFull => OpenError::Full { dir: config.dir.clone(), cause },
            _ => OpenError::Unusable { dir: config.dir.clone(), cause },
        };
        let (dir, key, heartbeat) = (config.dir.clone(), config.key.clone(), config.heartbeat);
        let published = Arc::new(Published::new());
        let (disk, mut machine) = tokio::task::spawn_blocking({
            let published = published.clone();
            move || {
                let disk = LogStore::open(&dir, &key)?;
                let machine = Machine::load(disk.clone(), published)?;
                Ok((disk, machine))
            }
        })
        .await
        .map_err(std::io::Error::other)
        .flatten()
        .map_err(unusable)?;
        if let Some((addr, change)) = alone {
            machine.stand_alone(config.raft_id, addr, change).await.map_err(unusable)?;
        }
        let raft_config = Arc::new(raft_config(&config).map_err(|error| OpenError::Raft(error.to_string()))?);
        let (activity, disk_failure) = (disk.activity.clone(), disk.failure.clone());
        let raft = Raft::new(config.raft_id, raft_config, PeerFactory(peers), disk, machine)
            .await
            .map_err(|error| OpenError::Raft(error.to_string()))?;
        let leadership = follow_leadership(&raft, disk_failure, config.heartbeat * HEARTBEATS_UNHEARD);
        Ok(Self { raft, published, leadership, activity, dir: config.dir, handover: Arc::default(), heartbeat })
    }

    /// The room that is left where the log lies, in bytes.
    pub fn room_bytes(&self) -> std::io::Result<u64> {
        let room = nix::sys::statvfs::statvfs(&self.dir)?;
        Ok(room.blocks_available().saturating_mul(room.fragment_size()))
    }

    /// What this manager's log has done since it was opened.
    #[must_use]
    pub fn activity(&self) -> ActivityCounts {
        self.activity.counts()
    }

    /// The state as this manager has applied it. For a linearizable read, wait for
    /// [`read_index`](Self::read_index) first.
    #[must_use]
    pub fn view(&self) -> Arc<Tables> {
        self.published.tables.load_full()
    }

    /// Every commit from now on. A watcher that lags is told so and should look at the view anew.
    #[must_use]
    pub fn watch(&self) -> broadcast::Receiver<Arc<Commit>> {
        self.published.commits.subscribe()
    }

    /// The index that the view has: for those who look at the view itself and may miss what was there in between.
    #[must_use]
    pub fn applied(&self) -> watch::Receiver<u64> {
        self.published.index.subscribe()
    }

    #[must_use]
    pub fn leadership(&self) -> watch::Receiver<Leadership> {
        self.leadership.clone()
    }

    /// Replicates and applies `transaction`; returns the index it has.
    pub async fn propose(&self, transaction: &Transaction) -> Result<u64, ProposeError> {
        let Ok(_under_way) = self.handover.try_read() else {
            return Err(ProposeError::NotLeader { leader_addr: None });
        };
        let proposal = Proposal(encoding::encode(transaction).into());
        let write = tokio::time::timeout(PROPOSE_LIMIT, self.raft.client_write(proposal));
        match write.await {
            Err(_) => Err(ProposeError::TimedOut(PROPOSE_LIMIT)),
            Ok(Ok(response)) => response.data.map_err(ProposeError::Refused),
            Ok(Err(RaftError::APIError(ClientWriteError::ForwardToLeader(forward)))) => {
                Err(ProposeError::NotLeader { leader_addr: forward.leader_node.map(|node| node.addr) })
            }
            Ok(Err(error)) => Err(ProposeError::Stopped(error.to_string())),
        }
    }

    /// Makes a transaction from the current view and proposes it; made anew if the view was
    /// overtaken. An empty transaction is not proposed.
    pub async fn update<T, E>(
        &self,
        mut make: impl FnMut(&Tables) -> Result<(Transaction, T), E>,
    ) -> Result<T, UpdateError<E>> {
        let mut tries = 0;
        loop {
            let (transaction, value) = make(&self.view()).map_err(UpdateError::Caller)?;
            if transaction.is_empty() {
                return Ok(value);
            }
            tries += 1;
            match self.propose(&transaction).await {
                Ok(_) => return Ok(value),
                Err(ProposeError::Refused(Refusal::Stale { .. } | Refusal::Missing(_))) if tries < UPDATE_TRIES => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// The index a linearizable read must have seen; only the leader can tell.
    pub async fn read_index(&self) -> Result<u64, ProposeError> {
        let read = tokio::time::timeout(PROPOSE_LIMIT, self.raft.get_read_log_id(ReadPolicy::ReadIndex));
        match read.await {
            Err(_) => Err(ProposeError::TimedOut(PROPOSE_LIMIT)),
            Ok(Ok((read, _))) => Ok(read.index()),
            Ok(Err(_)) => Err(ProposeError::NotLeader { leader_addr: self.leadership.borrow().leader_addr.clone() }),
        }
    }

    /// Waits until this manager has applied `index`; false if it takes longer than `limit`.
    pub async fn wait_applied(&self, index: u64, limit: Duration) -> bool {
        let mut applied = self.applied();
        let reached = tokio::time::timeout(limit, applied.wait_for(|&applied| applied >= index)).await;
        matches!(reached, Ok(Ok(_)))
    }

    /// The member that this manager is.
    #[must_use]
    pub fn raft_id(&self) -> RaftId {
        *self.raft.node_id()
    }

    /// Makes this the first manager of a new swarm.
    pub async fn initialize(&self, addr: &str) -> Result<(), ProposeError> {
        let members = BTreeMap::from([(self.raft_id(), BasicNode::new(addr))]);
        self.raft.initialize(members).await.map_err(|error| ProposeError::Stopped(error.to_string()))
    }

    /// The managers in consensus: id and address, voters first.
    #[must_use]
    pub fn members(&self) -> Vec<(RaftId, String)> {
        let metrics = self.raft.metrics().borrow_watched().clone();
        metrics.membership_config.membership().nodes().map(|(&id, node)| (id, node.addr.clone())).collect()
    }

    /// The members that answered the leader lately. Empty on a follower.
    #[must_use]
    pub fn reachable(&self, within: Duration) -> BTreeSet<RaftId> {
        let metrics = self.raft.metrics().borrow_watched().clone();
        let acked = metrics.heartbeat.iter().flatten().filter_map(|(&id, at)| {
            let at = at.as_ref()?;
            (at.elapsed() < within).then_some(id)
        });
        acked.chain(std::iter::once(metrics.id)).collect()
    }

    /// Takes a manager into consensus: as a learner until it has caught up, then as a voter.
    pub async fn add_member(&self, id: RaftId, addr: &str) -> Result<(), ProposeError> {
        let node = BasicNode::new(addr);
        // Returns once the learner has caught up.
        when_unchanging(|| self.raft.add_learner(id, node.clone(), true)).await?;
        let voter = || ChangeMembers::AddVoterIds(BTreeSet::from([id]));
        when_unchanging(|| self.raft.change_membership(voter(), false)).await
    }

    /// Takes a manager out of consensus.
    pub async fn remove_member(&self, id: RaftId) -> Result<(), ProposeError> {
        let gone = || ChangeMembers::RemoveVoters(BTreeSet::from([id]));
        when_unchanging(|| self.raft.change_membership(gone(), false)).await
    }

    /// Hands leadership to the member that has the most of the log; returns once another leads,
    /// or after `limit`. Proposals under way are finished first, as the outcome of one that is
    /// caught between two leaders could not be told; new ones are refused meanwhile.
    pub async fn transfer_leadership(&self, limit: Duration) -> bool {
        let Ok(_alone) = tokio::time::timeout(limit, self.handover.write()).await else { return false };
        let metrics = self.raft.metrics().borrow_watched().clone();
        let replication = metrics.replication.unwrap_or_default();
        let Some(target) = successor(metrics.id, &replication, &self.reachable(self.heartbeat * HEARTBEATS_LATELY))
        else {
            return false;
        };
        if self.raft.trigger().transfer_leader(target).await.is_err() {
            return false;
        }
        let mut leadership = self.leadership.clone();
        let handed = tokio::time::timeout(limit, leadership.wait_for(|now| !now.is_leader && now.leader.is_some()));
        handed.await.is_ok()
    }

    /// Answers another manager's call to the member `to`, which must be this one: body in, body out.
    pub async fn handle_rpc(&self, to: RaftId, kind: RpcKind, body: &[u8]) -> Result<Vec<u8>, OtherMember> {
        self.is_meant(to)?;
        Ok(match kind {
            RpcKind::AppendEntries => match encoding::decode_serde(body) {
                Ok(request) => reply(self.raft.append_entries(request).await),
                Err(error) => reply::<(), _>(Err(error)),
            },
            RpcKind::Vote => match encoding::decode_serde(body) {
                Ok(request) => reply(self.raft.vote(request).await),
                Err(error) => reply::<(), _>(Err(error)),
            },
            RpcKind::PreVote => match encoding::decode_serde(body) {
                Ok(request) => reply(self.raft.pre_vote(request).await),
                Err(error) => reply::<(), _>(Err(error)),
            },
            RpcKind::TransferLeader => match encoding::decode_serde(body) {
                Ok(request) => reply(self.raft.handle_transfer_leader(request).await),
                Err(error) => reply::<(), _>(Err(error)),
            },
        })
    }

    /// Takes a snapshot that another manager streamed to the member `to`: header and parts in, reply out.
    pub async fn handle_snapshot(&self, to: RaftId, header: &[u8], parts: Vec<Bytes>) -> Result<Vec<u8>, OtherMember> {
        self.is_meant(to)?;
        Ok(match encoding::decode_serde::<SnapshotHeader>(header) {
            Ok(SnapshotHeader { vote, meta }) => {
                reply(self.raft.install_full_snapshot(vote, Snapshot { meta, snapshot: parts }).await)
            }
            Err(error) => reply::<(), _>(Err(error)),
        })
    }

    /// Invariant: a member answers for itself alone. Else one that took the address of another would vote twice, and be
    /// counted on for what only the other has.
    fn is_meant(&self, to: RaftId) -> Result<(), OtherMember> {
        let own = self.raft_id();
        if to == own { Ok(()) } else { Err(OtherMember { to, own }) }
    }

    /// Asks for a snapshot now.
    pub async fn take_snapshot(&self) {
        if let Err(error) = self.raft.trigger().snapshot().await {
            tracing::warn!(%error, "no snapshot was taken");
        }
    }

    /// Leaves consensus' loop; what is durable stays.
    pub async fn shutdown(&self) {
        if let Err(error) = self.raft.shutdown().await {
            tracing::warn!(%error, "consensus did not stop cleanly");
        }
    }
}

/// Who is to lead after `own`: of those that answer, if any do, the one with the most of the log.
fn successor<L: Ord>(own: RaftId, replication: &BTreeMap<RaftId, L>, reachable: &BTreeSet<RaftId>) -> Option<RaftId> {
    let others = replication.iter().filter(|(id, _)| **id != own);
    others.max_by_key(|(id, matched)| (reachable.contains(id), *matched)).map(|(&id, _)| id)
}

fn reply<T: serde::Serialize, E: std::fmt::Display>(result: Result<T, E>) -> Vec<u8> {
    encoding::encode_serde(&result.map_err(|error| error.to_string()))
}

/// Changes the membership; another change under way is waited for.
async fn when_unchanging<F, T>(mut change: impl FnMut() -> F) -> Result<(), ProposeError>
where
    F: Future<Output = Result<T, RaftError<Types, ClientWriteError<Types>>>>,
{
    let deadline = tokio::time::Instant::now() + PROPOSE_LIMIT;
    loop {
        match change().await {
            Ok(_) => return Ok(()),
            Err(RaftError::APIError(ClientWriteError::ChangeMembershipError(ChangeMembershipError::InProgress(_))))
                if tokio::time::Instant::now() < deadline =>
            {
                tokio::time::sleep(CHANGE_PAUSE).await;
            }
            Err(error) => return Err(change_error(error)),
        }
    }
}

fn change_error(error: RaftError<Types, ClientWriteError<Types>>) -> ProposeError {
    match error {
        RaftError::APIError(ClientWriteError::ForwardToLeader(forward)) => {
            ProposeError::NotLeader { leader_addr: forward.leader_node.map(|node| node.addr) }
        }
        other => ProposeError::Stopped(other.to_string()),
    }
}

fn raft_config(config: &StoreConfig) -> Result<openraft::Config, openraft::ConfigError> {
    let millis = |duration: Duration| u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
    openraft::Config {
        cluster_name: "skep".into(),
        heartbeat_interval: millis(config.heartbeat),
        election_timeout_min: millis(config.election_timeout),
        election_timeout_max: millis(config.election_timeout * 2),
        snapshot_policy: SnapshotPolicy::LogsSinceLast(config.snapshot_interval),
        max_in_snapshot_log_to_keep: config.log_entries_kept,
        install_snapshot_timeout: 60_000,
        enable_pre_vote: Some(true),
        ..openraft::Config::default()
    }
    .validate()
}

/// Follows the consensus library's metrics and tells only when leadership changes. A leader that no majority has answered
/// for `lapse` leads nobody: another may do so by now.
fn follow_leadership(raft: &Raft, disk_failure: Arc<OnceLock<String>>, lapse: Duration) -> watch::Receiver<Leadership> {
    let mut metrics = raft.metrics();
    let (told, leadership) = watch::channel(Leadership::default());
    tokio::spawn(async move {
        let mut led_since = tokio::time::Instant::now();
        loop {
            let (is_leading, now) = {
                let metrics = metrics.borrow_watched();
                let failure = metrics.running_state.as_ref().err().filter(|fatal| !matches!(fatal, Fatal::Stopped));
                let nodes = metrics.membership_config.membership();
                let is_leading = metrics.state.is_leader();
                if !is_leading {
                    led_since = tokio::time::Instant::now();
                }
                let answered = metrics.last_quorum_acked.map_or(Duration::MAX, |at| at.elapsed());
                let unheard = answered.min(led_since.elapsed());
                let is_heard = !is_leading || nodes.voter_ids().count() < 2 || unheard < lapse;
                let leader = metrics.current_leader.filter(|_| failure.is_none() && is_heard);
                let now = Leadership {
                    term: metrics.current_term,
                    is_leader: is_leading && leader == Some(metrics.id),
                    leader,
                    leader_addr: leader.and_then(|id| nodes.get_node(&id)).map(|node| node.addr.clone()),
                    failure: failure.map(|fatal| disk_failure.get().cloned().unwrap_or_else(|| with_causes(fatal))),
                };
                (is_leading, now)
            };
            told.send_if_modified(|before| {
                let changed = *before != now;
                *before = now;
                changed
            });
            // Silence alone changes no metric.
            let look_again = if is_leading { lapse / 4 } else { Duration::MAX };
            let changed = tokio::time::timeout(look_again, metrics.changed()).await;
            if matches!(changed, Ok(Err(_))) || told.is_closed() {
                return;
            }
        }
    });
    leadership
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_member_that_answers_and_has_the_most_leads_next() {
        let replication = BTreeMap::from([(1, 7), (2, 6), (3, 7)]);
        let all = BTreeSet::from([1, 2, 3]);
        assert_eq!(successor(1, &replication, &all), Some(3));
        assert_eq!(successor(3, &replication, &all), Some(1));
        assert_eq!(successor(3, &replication, &BTreeSet::from([2, 3])), Some(2), "1 does not answer");
        assert_eq!(successor(1, &BTreeMap::from([(1, 7)]), &all), None);
    }
}
