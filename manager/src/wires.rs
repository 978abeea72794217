//! How a manager's store reaches those of the others.

use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use skep_api::grpc::RaftMessage;
use skep_api::grpc::raft_client::RaftClient;
use skep_raft_store::{PeerError, Peers, RpcKind};
use tonic::Code;

use crate::transport::Channels;

/// The largest message that is taken.
pub(crate) const MESSAGE_LEN_MAX: usize = 64 << 20;

/// What the future of a [`BulkTransport`] brings.
pub type BulkReply<'a> = Pin<Box<dyn Future<Output = Result<Vec<u8>, String>> + Send + 'a>>;

/// Streams snapshots to other managers over QUIC; the daemon brings it.
pub trait BulkTransport: Send + Sync + 'static {
    /// Sends to the node whose control port is `addr`.
    fn send_snapshot<'a>(&'a self, addr: &'a str, header: Vec<u8>, parts: Vec<Bytes>) -> BulkReply<'a>;
}

/// The wires that the store uses.
#[derive(Clone)]
pub(crate) struct Wires {
    channels: Channels,
    bulk: Arc<dyn BulkTransport>,
    /// The swarm's, as this manager knows it.
    incarnation: Arc<AtomicU64>,
    /// Managers that could not be spoken to when last called, and whether they refused.
    silent: Arc<Mutex<BTreeMap<String, bool>>>,
}

/// A call that came to nothing.
struct Unheard {
    error: PeerError,
    /// Whether the other one is there, and does not listen.
    refuses: bool,
}

impl Wires {
    pub(crate) fn new(channels: Channels, bulk: Arc<dyn BulkTransport>) -> Self {
        Self { channels, bulk, incarnation: Arc::default(), silent: Arc::default() }
    }

    /// What messages say of the swarm's incarnation, for whoever knows it.
    pub(crate) fn incarnation(&self) -> Arc<AtomicU64> {
        self.incarnation.clone()
    }

    /// Tells once when a manager falls silent or refuses, and once when it answers again: calls are many.
    fn note<T>(&self, addr: &str, called: &Result<T, Unheard>) {
        let mut silent = self.silent.lock().expect("nobody panics while holding it");
        match called {
            Ok(_) if silent.remove(addr).is_some() => tracing::info!(manager = addr, "a manager answers again"),
            Err(Unheard { error, refuses }) if silent.insert(addr.to_owned(), *refuses) != Some(*refuses) => {
                let reason = &error.reason;
                tracing::warn!(
                    manager = addr,
                    reason,
                    "a manager {}",
                    if *refuses { "refuses" } else { "does not answer" }
                );
            }
            Ok(_) | Err(_) => {}
        }
    }

    async fn try_call(&self, addr: &str, kind: RpcKind, body: Vec<u8>, limit: Duration) -> Result<Vec<u8>, Unheard> {
        let unheard = |reason: String, refuses| {
            let error = PeerError { addr: addr.to_owned(), reason };
            Unheard { error, refuses }
        };
        let error = |reason: String| unheard(reason, false);
        let channel = self.channels.to(addr).map_err(|e| error(e.to_string()))?;
        let mut client = RaftClient::new(channel).max_decoding_message_size(MESSAGE_LEN_MAX);
        let message = RaftMessage { body, incarnation: self.incarnation.load(Ordering::Relaxed) };
        let call = async {
            match kind {
                RpcKind::AppendEntries => client.append_entries(message).await,
                RpcKind::Vote => client.vote(message).await,
                RpcKind::PreVote => client.pre_vote(message).await,
                RpcKind::TransferLeader => client.transfer_leader(message).await,
            }
        };
        match tokio::time::timeout(limit, call).await {
            Ok(Ok(reply)) => Ok(reply.into_inner().body),
            Ok(Err(status)) => Err(unheard(status.to_string(), status.code() == Code::FailedPrecondition)),
            Err(_) => Err(error(format!("no answer within {limit:?}"))),
        }
    }
}

impl Peers for Wires {
    async fn call(&self, addr: &str, kind: RpcKind, body: Vec<u8>, limit: Duration) -> Result<Vec<u8>, PeerError> {
        let called = self.try_call(addr, kind, body, limit).await;
        self.note(addr, &called);
        called.map_err(|unheard| unheard.error)
    }

    async fn send_snapshot(
        &self,
        addr: &str,
        header: Vec<u8>,
        parts: Vec<Bytes>,
        limit: Duration,
    ) -> Result<Vec<u8>, PeerError> {
        let error = |reason: String| PeerError { addr: addr.to_owned(), reason };
        match tokio::time::timeout(limit, self.bulk.send_snapshot(addr, header, parts)).await {
            Ok(sent) => sent.map_err(error),
            Err(_) => Err(error(format!("no answer within {limit:?}"))),
        }
    }
}
