//! How managers reach each other: the store says what to send, the manager brings the wires.

use std::future::Future;
use std::time::Duration;

use bytes::Bytes;

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

/// The wires between managers.
pub trait Peers: Clone + Send + Sync + 'static {
    /// Sends `body` to the manager at `addr` and brings its reply.
    fn call(
        &self,
        addr: &str,
        kind: RpcKind,
        body: Vec<u8>,
        limit: Duration,
    ) -> impl Future<Output = Result<Vec<u8>, PeerError>> + Send;

    /// Streams a snapshot to the manager at `addr` and brings its reply.
    fn send_snapshot(
        &self,
        addr: &str,
        header: Vec<u8>,
        parts: Vec<Bytes>,
        limit: Duration,
    ) -> impl Future<Output = Result<Vec<u8>, PeerError>> + Send;
}
