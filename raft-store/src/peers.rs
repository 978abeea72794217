//! How managers reach each other: the store says what to send, the manager brings the wires.

use std::future::Future;
use std::time::Duration;

use bytes::Bytes;
use skep_api::node::RaftMember;

use crate::raft_types::RaftId;

/// Which of the consensus library's calls a message is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RpcKind {
    AppendEntries,
    Vote,
    PreVote,
    TransferLeader,
}

/// A peer that could not be asked.
#[derive(Debug, thiserror::Error)]
#[error("manager {addr} is not reached: {reason}")]
pub struct PeerError {
    pub addr: String,
    pub reason: String,
}

/// A message for a member that this one is not: two members never speak for each other, whatever address they are at.
#[derive(Debug, thiserror::Error)]
#[error("raft member {to:x} is not at this address any more, {own:x} is: have the one that is gone removed")]
pub struct OtherMember {
    pub to: RaftId,
    pub own: RaftId,
}

/// The wires between managers.
pub trait Peers: Clone + Send + Sync + 'static {
    /// Sends `body` to a manager and brings its reply.
    fn call(
        &self,
        to: &RaftMember,
        kind: RpcKind,
        body: Vec<u8>,
        limit: Duration,
    ) -> impl Future<Output = Result<Vec<u8>, PeerError>> + Send;

    /// Streams a snapshot to a manager and brings its reply.
    fn send_snapshot(
        &self,
        to: &RaftMember,
        header: Vec<u8>,
        parts: Vec<Bytes>,
        limit: Duration,
    ) -> impl Future<Output = Result<Vec<u8>, PeerError>> + Send;
}
