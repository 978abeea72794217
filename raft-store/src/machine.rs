//! The replicated state machine: applies entries to [`Tables`] and tells watchers.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::Arc;

use arc_swap::ArcSwap;
use bytes::Bytes;
use futures::{Stream, TryStreamExt as _};
use openraft::storage::{EntryResponder, RaftLogStorage as _, RaftSnapshotBuilder, RaftStateMachine};
use openraft::{BasicNode, EntryPayload, Membership, OptionalSend, RaftLogReader as _};
use skep_api::Object;
use skep_api::encoding::{self, ListEncoder};
use tokio::sync::{broadcast, watch};

use crate::log::LogStore;
use crate::raft_types::{LogId, Proposal, RaftId, Snapshot, SnapshotMeta, SnapshotParts, StoredMembership, Types};
use crate::tables::Tables;
use crate::transaction::{Commit, Refusal, Transaction};

/// Commits a slow watcher may fall behind before it is told that it missed some.
const COMMITS_KEPT: usize = 4096;
/// A part of a snapshot holds objects up to about this many encoded bytes.
const PART_LEN: usize = 1 << 20;

/// What readers and watchers see of the state machine.
pub(crate) struct Published {
    pub(crate) tables: ArcSwap<Tables>,
    pub(crate) commits: broadcast::Sender<Arc<Commit>>,
    pub(crate) index: watch::Sender<u64>,
}

impl Published {
    pub(crate) fn new() -> Self {
        Self { tables: ArcSwap::default(), commits: broadcast::channel(COMMITS_KEPT).0, index: watch::channel(0).0 }
    }

    /// Shows `tables`, and then tells of what led to them.
    fn publish(&self, tables: Tables, commit: Option<Commit>) {
        let index = tables.index;
        self.tables.store(Arc::new(tables));
        self.index.send_replace(index);
        if let Some(commit) = commit {
            // Nobody watching is no error.
            drop(self.commits.send(Arc::new(commit)));
        }
    }
}

/// The state machine that openraft drives; the only writer of [`Published`].
pub(crate) struct Machine {
    tables: Tables,
    applied: Option<LogId>,
    membership: StoredMembership,
    published: Arc<Published>,
    disk: LogStore,
}

impl Machine {
    /// Starts from the snapshot on disk; the log behind it is replayed by openraft.
    pub(crate) fn load(disk: LogStore, published: Arc<Published>) -> io::Result<Self> {
        let mut machine =
            Self { tables: Tables::default(), applied: None, membership: StoredMembership::default(), published, disk };
        if let Some((meta, parts)) = machine.disk.load_snapshot::<SnapshotMeta>()? {
            machine.restore(&meta, &parts)?;
        }
        Ok(machine)
    }

    fn restore(&mut self, meta: &SnapshotMeta, parts: &[Bytes]) -> io::Result<()> {
        let mut tables = Tables::default();
        tables.index = meta.last_log_id.map_or(0, |id| id.index);
        for part in parts {
            let objects: Vec<Object> = encoding::decode(part).map_err(invalid)?;
            for object in objects {
                tables.restore(object).map_err(invalid)?;
            }
        }
        self.applied = meta.last_log_id;
        self.membership = meta.last_membership.clone();
        self.tables = tables.clone();
        self.published.publish(tables, None);
        Ok(())
    }

    /// Makes this member the only one. All of its log counts, whoever agreed to it, and `change` is made after that; a
    /// snapshot with the new membership stands for both from then on.
    pub(crate) async fn stand_alone(
        &mut self,
        id: RaftId,
        addr: &str,
        change: impl FnOnce(&Tables) -> Transaction + Send,
    ) -> io::Result<()> {
        let first = self.applied.map_or(0, |id| id.index + 1);
        for entry in self.disk.clone().try_get_log_entries(first..).await? {
            self.tables.index = entry.log_id.index;
            if let EntryPayload::Normal(proposal) = &entry.payload {
                // Who was refused then is refused now.
                drop(self.apply_entry(entry.log_id.index, proposal));
            }
            self.applied = Some(entry.log_id);
        }
        let last = self.applied.ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "the store is empty"))?;
        let transaction = change(&self.tables);
        self.tables.apply(last.index, transaction).map_err(invalid)?;
        let nodes = BTreeMap::from([(id, BasicNode::new(addr))]);
        let membership = Membership::new(vec![BTreeSet::from([id])], nodes).map_err(invalid)?;
        self.membership = StoredMembership::new(Some(last), membership);
        let meta = SnapshotMeta { last_log_id: Some(last), last_membership: self.membership.clone() };
        let parts = encode_parts(&self.tables);
        self.disk.save_snapshot(&meta, &parts).await?;
        self.disk.clone().purge(last).await?;
        self.published.publish(self.tables.clone(), None);
        Ok(())
    }

    fn apply_entry(&mut self, index: u64, proposal: &Proposal) -> Result<Commit, Refusal> {
        let transaction: Transaction =
            encoding::decode(&proposal.0).map_err(|error| Refusal::Unreadable(error.to_string()))?;
        let at = transaction.at;
        let changes = self.tables.apply(index, transaction)?;
        Ok(Commit { index, at, changes })
    }
}

fn invalid(error: impl std::error::Error + Send + Sync + 'static) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

impl RaftStateMachine<Types> for Machine {
    type SnapshotData = SnapshotParts;
    type SnapshotBuilder = SnapshotWriter;

    async fn applied_state(&mut self) -> io::Result<(Option<LogId>, StoredMembership)> {
        Ok((self.applied, self.membership.clone()))
    }

    async fn apply<Strm>(&mut self, mut entries: Strm) -> io::Result<()>
    where
        Strm: Stream<Item = Result<EntryResponder<Types>, io::Error>> + Unpin + OptionalSend,
    {
        while let Some((entry, responder)) = entries.try_next().await? {
            let index = entry.log_id.index;
            let (commit, outcome) = match entry.payload {
                EntryPayload::Blank => (None, Ok(index)),
                EntryPayload::Normal(proposal) => match self.apply_entry(index, &proposal) {
                    Ok(commit) => (Some(commit), Ok(index)),
                    Err(refusal) => (None, Err(refusal)),
                },
                EntryPayload::Membership(membership) => {
                    self.membership = StoredMembership::new(Some(entry.log_id), membership);
                    (None, Ok(index))
                }
            };
            self.applied = Some(entry.log_id);
            self.tables.index = index;
            self.published.publish(self.tables.clone(), commit);
            if let Some(responder) = responder {
                responder.send(outcome);
            }
        }
        Ok(())
    }

    async fn get_snapshot_builder(&mut self) -> SnapshotWriter {
        SnapshotWriter {
            tables: self.tables.clone(),
            meta: SnapshotMeta { last_log_id: self.applied, last_membership: self.membership.clone() },
            disk: self.disk.clone(),
        }
    }

    async fn install_snapshot(&mut self, meta: &SnapshotMeta, snapshot: SnapshotParts) -> io::Result<()> {
        self.restore(meta, &snapshot)?;
        self.disk.save_snapshot(meta, &snapshot).await
    }

    async fn get_current_snapshot(&mut self) -> io::Result<Option<Snapshot>> {
        let snapshot = self.disk.load_snapshot::<SnapshotMeta>()?;
        Ok(snapshot.map(|(meta, snapshot)| Snapshot { meta, snapshot }))
    }
}

/// Writes one snapshot from a copy of the tables, while entries go on being applied.
pub(crate) struct SnapshotWriter {
    tables: Tables,
    meta: SnapshotMeta,
    disk: LogStore,
}

impl RaftSnapshotBuilder<Types> for SnapshotWriter {
    type SnapshotData = SnapshotParts;

    async fn build_snapshot(&mut self) -> io::Result<Snapshot> {
        let tables = self.tables.clone();
        let parts = tokio::task::spawn_blocking(move || encode_parts(&tables)).await.map_err(io::Error::other)?;
        self.disk.save_snapshot(&self.meta, &parts).await?;
        Ok(Snapshot { meta: self.meta.clone(), snapshot: parts })
    }
}

fn encode_parts(tables: &Tables) -> SnapshotParts {
    let mut parts = Vec::new();
    let mut part = ListEncoder::default();
    for object in tables.objects() {
        part.push(&object);
        if part.len_bytes() >= PART_LEN {
            parts.push(std::mem::take(&mut part).finish().into());
        }
    }
    parts.push(part.finish().into());
    parts
}
