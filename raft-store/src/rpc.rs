//! The consensus library's network, carried by [`Peers`].

use std::future::Future;

use openraft::errors::{RPCError, ReplicationClosed, StreamingError, Unreachable};
use openraft::network::{Backoff, RPCOption, RaftNetworkFactory, v2::RaftNetworkV2};
use openraft::raft::TransferLeaderResponse;
use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, SnapshotResponse, TransferLeaderRequest, VoteRequest, VoteResponse,
};
use openraft::{BasicNode, OptionalSend};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use skep_api::encoding;

use crate::peers::{PeerError, Peers, RpcKind};
use crate::raft_types::{RaftId, Snapshot, SnapshotMeta, SnapshotParts, Types, Vote};

/// What precedes a snapshot's parts on the wire.
#[derive(Debug, Serialize, Deserialize)]
pub struct SnapshotHeader {
    pub(crate) vote: Vote,
    pub(crate) meta: SnapshotMeta,
}

/// Makes a [`PeerConnection`] for each other manager.
pub(crate) struct PeerFactory<P>(pub(crate) P);

/// One other manager, as openraft calls it.
pub(crate) struct PeerConnection<P> {
    peers: P,
    addr: String,
}

impl<P: Peers> RaftNetworkFactory<Types> for PeerFactory<P> {
    type Network = PeerConnection<P>;

    async fn new_client(&mut self, _target: RaftId, node: &BasicNode) -> PeerConnection<P> {
        PeerConnection { peers: self.0.clone(), addr: node.addr.clone() }
    }
}

impl<P: Peers> PeerConnection<P> {
    async fn call<Q, R>(&self, kind: RpcKind, request: &Q, option: &RPCOption) -> Result<R, RPCError<Types>>
    where
        Q: Serialize + Sync,
        R: DeserializeOwned,
    {
        let body = encoding::encode_serde(request);
        let reply = self.peers.call(&self.addr, kind, body, option.hard_ttl()).await.map_err(unreachable)?;
        decode_reply(&self.addr, &reply)
    }
}

/// A reply is the result as the other side encoded it, its error as text.
fn decode_reply<R: DeserializeOwned>(addr: &str, reply: &[u8]) -> Result<R, RPCError<Types>> {
    let failed = |reason: String| unreachable(PeerError { addr: addr.to_owned(), reason });
    let result: Result<R, String> = encoding::decode_serde(reply).map_err(|error| failed(error.to_string()))?;
    result.map_err(failed)
}

fn unreachable(error: PeerError) -> RPCError<Types> {
    RPCError::Unreachable(Unreachable::new(&error))
}

impl<P: Peers> RaftNetworkV2<Types> for PeerConnection<P> {
    type SnapshotData = SnapshotParts;

    async fn append_entries(
        &mut self,
        rpc: AppendEntriesRequest<Types>,
        option: RPCOption,
    ) -> Result<AppendEntriesResponse<Types>, RPCError<Types>> {
        self.call(RpcKind::AppendEntries, &rpc, &option).await
    }

    async fn vote(
        &mut self,
        rpc: VoteRequest<Types>,
        option: RPCOption,
    ) -> Result<VoteResponse<Types>, RPCError<Types>> {
        self.call(RpcKind::Vote, &rpc, &option).await
    }

    async fn pre_vote(
        &mut self,
        rpc: VoteRequest<Types>,
        option: RPCOption,
    ) -> Result<VoteResponse<Types>, RPCError<Types>> {
        self.call(RpcKind::PreVote, &rpc, &option).await
    }

    async fn full_snapshot(
        &mut self,
        vote: Vote,
        snapshot: Snapshot,
        cancel: impl Future<Output = ReplicationClosed> + OptionalSend + 'static,
        option: RPCOption,
    ) -> Result<SnapshotResponse<Types>, StreamingError<Types>> {
        let header = encoding::encode_serde(&SnapshotHeader { vote, meta: snapshot.meta });
        let sent = self.peers.send_snapshot(&self.addr, header, snapshot.snapshot, option.hard_ttl());
        tokio::select! {
            reply = sent => {
                let reply = reply.map_err(unreachable)?;
                Ok(decode_reply(&self.addr, &reply)?)
            }
            closed = cancel => Err(closed.into()),
        }
    }

    async fn transfer_leader(
        &mut self,
        req: TransferLeaderRequest<Types>,
        option: RPCOption,
    ) -> Result<TransferLeaderResponse<Types>, RPCError<Types>> {
        self.call(RpcKind::TransferLeader, &req, &option).await
    }

    fn backoff(&self) -> Option<Backoff> {
        // A peer that is back is found again within a heartbeat or two.
        Some(Backoff::new(std::iter::repeat(std::time::Duration::from_millis(100))))
    }
}
