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
use skep_api::node::RaftMember;
use skep_raft_store::{PeerError, Peers, RpcKind, Store};
use tonic::Code;

use crate::transport::Channels;

/// The largest message that is taken.
pub(crate) const MESSAGE_LEN_MAX: usize = 64 << 20;

/// What every message of consensus says beside its body.
#[derive(Clone, Copy, Debug)]
pub struct Envelope {
    /// The member that it is for; zero from builds that did not say.
    pub to: u64,
    /// The sender's [`Cluster::incarnation`](skep_api::Cluster); zero if it knows of none yet.
    pub incarnation: u64,
}

impl Envelope {
    /// The member that takes it at `store`'s address.
    #[must_use]
    pub fn addressee(&self, store: &Store) -> u64 {
        if self.to == 0 { store.raft_id() } else { self.to }
    }

    /// The incarnation that `store` is of, if it is another one. Invariant: what a swarm agrees on after its recovery is
    /// not overwritten by what was before it.
    #[must_use]
    pub fn other_incarnation(&self, store: &Store) -> Option<u64> {
        let own = store.view().cluster().map(|cluster| cluster.incarnation);
        own.filter(|&own| own != self.incarnation)
    }
}

/// What the future of a [`BulkTransport`] brings.
pub type BulkReply<'a> = Pin<Box<dyn Future<Output = Result<Vec<u8>, String>> + Send + 'a>>;

/// Streams snapshots to other managers over QUIC; the daemon brings it.
pub trait BulkTransport: Send + Sync + 'static {
    /// Sends to the node whose control port is `addr`.
    fn send_snapshot<'a>(
        &'a self,
        addr: &'a str,
        envelope: Envelope,
        header: Vec<u8>,
        parts: Vec<Bytes>,
    ) -> BulkReply<'a>;
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
    /// Where a manager of a later incarnation was met.
    recovered: Arc<Mutex<Option<String>>>,
}

/// A call that came to nothing.
struct Unheard {
    error: PeerError,
    /// Whether the other one is there, and does not listen.
    refuses: bool,
}

impl Wires {
    pub(crate) fn new(channels: Channels, bulk: Arc<dyn BulkTransport>) -> Self {
        Self { channels, bulk, incarnation: Arc::default(), silent: Arc::default(), recovered: Arc::default() }
    }

    /// Has messages say that this manager is of that incarnation of the swarm.
    pub(crate) fn set_incarnation(&self, incarnation: u64) {
        self.incarnation.store(incarnation, Ordering::Relaxed);
    }

    /// A manager of this swarm since it was recovered without this one, if any was met.
    pub(crate) fn recovered(&self) -> Option<String> {
        self.recovered.lock().expect("nobody panics while holding it").clone()
    }

    fn envelope(&self, to: &RaftMember) -> Envelope {
        Envelope { to: to.raft_id, incarnation: self.incarnation.load(Ordering::Relaxed) }
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

    async fn try_call(
        &self,
        member: &RaftMember,
        kind: RpcKind,
        body: Vec<u8>,
        limit: Duration,
    ) -> Result<Vec<u8>, Unheard> {
        let unheard = |reason: String, refuses| {
            let error = PeerError { addr: member.addr.clone(), reason };
            Unheard { error, refuses }
        };
        let error = |reason: String| unheard(reason, false);
        let channel = self.channels.to(&member.addr).map_err(|e| error(e.to_string()))?;
        let mut client = RaftClient::new(channel).max_decoding_message_size(MESSAGE_LEN_MAX);
        let Envelope { to, incarnation } = self.envelope(member);
        let message = RaftMessage { body, incarnation, to };
        let call = async {
            match kind {
                RpcKind::AppendEntries => client.append_entries(message).await,
                RpcKind::Vote => client.vote(message).await,
                RpcKind::PreVote => client.pre_vote(message).await,
                RpcKind::TransferLeader => client.transfer_leader(message).await,
            }
        };
        match tokio::time::timeout(limit, call).await {
            Ok(Ok(reply)) if reply.get_ref().incarnation == incarnation => Ok(reply.into_inner().body),
            Ok(Ok(reply)) => {
                let is_later = reply.get_ref().incarnation > incarnation;
                if is_later {
                    *self.recovered.lock().expect("nobody panics while holding it") = Some(member.addr.clone());
                }
                let reason = if is_later {
                    "the swarm was recovered without this manager, which is of before that: let this one leave and join again, \
                     or stay without a leader, and it becomes a worker there"
                } else {
                    "it is of before the swarm was recovered: let it leave and join again"
                };
                Err(unheard(reason.to_owned(), true))
            }
            Ok(Err(status)) => Err(unheard(status.to_string(), status.code() == Code::FailedPrecondition)),
            Err(_) => Err(error(format!("no answer within {limit:?}"))),
        }
    }
}

impl Peers for Wires {
    async fn call(&self, to: &RaftMember, kind: RpcKind, body: Vec<u8>, limit: Duration) -> Result<Vec<u8>, PeerError> {
        let called = self.try_call(to, kind, body, limit).await;
        self.note(&to.addr, &called);
        called.map_err(|unheard| unheard.error)
    }

    async fn send_snapshot(
        &self,
        to: &RaftMember,
        header: Vec<u8>,
        parts: Vec<Bytes>,
        limit: Duration,
    ) -> Result<Vec<u8>, PeerError> {
        let error = |reason: String| PeerError { addr: to.addr.clone(), reason };
        let sent = self.bulk.send_snapshot(&to.addr, self.envelope(to), header, parts);
        match tokio::time::timeout(limit, sent).await {
            Ok(sent) => sent.map_err(error),
            Err(_) => Err(error(format!("no answer within {limit:?}"))),
        }
    }
}
