//! The consensus library's types, filled in.

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::transaction::Refusal;

/// A manager's number in consensus: made anew at every promotion, never used twice.
pub type RaftId = u64;

/// An encoded [`Transaction`](crate::Transaction); opaque until it is applied.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Proposal(pub(crate) Bytes);

impl std::fmt::Display for Proposal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "proposal of {} bytes", self.0.len())
    }
}

/// What applying an entry came to.
pub(crate) type Outcome = Result<u64, Refusal>;

openraft::declare_raft_types!(
    pub(crate) Types:
        D = Proposal,
        R = Outcome,
        NodeId = RaftId,
        Node = openraft::BasicNode,
);

pub(crate) type Entry = openraft::alias::EntryOf<Types>;
pub(crate) type LogId = openraft::alias::LogIdOf<Types>;
pub(crate) type Vote = openraft::alias::VoteOf<Types>;
pub(crate) type StoredMembership = openraft::alias::StoredMembershipOf<Types>;
pub(crate) type SnapshotMeta = openraft::alias::SnapshotMetaOf<Types>;

/// A snapshot in parts, each an encoded list of objects of about 1 MiB.
pub(crate) type SnapshotParts = Vec<Bytes>;
pub(crate) type Snapshot = openraft::alias::SnapshotOf<Types, SnapshotParts>;
pub(crate) type Raft = openraft::Raft<Types, crate::machine::Machine>;
