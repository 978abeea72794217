//! The consensus library's network, carried by [`Peers`].

use std::future::Future;
use std::time::Duration;

use bytes::Bytes;
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
use skep_api::node::RaftMember;

use crate::peers::{PeerError, Peers, RpcKind};
use crate::raft_types::{RaftId, Snapshot, SnapshotMeta, SnapshotParts, Types, Vote};

/// The slowest link that managers get on with, in bytes a second: 1 Mbit/s, and a bit for headers.
const SLOWEST_LINK: u64 = 120_000;

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
    to: RaftMember,
}

impl<P: Peers> RaftNetworkFactory<Types> for PeerFactory<P> {
    type Network = PeerConnection<P>;

    async fn new_client(&mut self, target: RaftId, node: &BasicNode) -> PeerConnection<P> {
        PeerConnection { peers: self.0.clone(), to: RaftMember { raft_id: target, addr: node.addr.clone() } }
    }
}

impl<P: Peers> PeerConnection<P> {
    async fn call<Q, R>(&self, kind: RpcKind, request: &Q, option: &RPCOption) -> Result<R, RPCError<Types>>
    where
        Q: Serialize + Sync,
        R: DeserializeOwned,
    {
        let body = encoding::encode_serde(request);
        let limit = option.hard_ttl() + time_on_the_way(body.len());
        let reply = self.peers.call(&self.to, kind, body, limit).await.map_err(unreachable)?;
        decode_reply(&self.to.addr, &reply)
    }
}

/// How long so many bytes may be on their way: what is given up before it has arrived would be sent again for ever.
fn time_on_the_way(len: usize) -> Duration {
    Duration::from_micros(u64::try_from(len).unwrap_or(u64::MAX).saturating_mul(1_000_000) / SLOWEST_LINK)
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
        let parts = snapshot.snapshot;
        let limit = option.hard_ttl() + time_on_the_way(parts.iter().map(Bytes::len).sum());
        let sent = self.peers.send_snapshot(&self.to, header, parts, limit);
        tokio::select! {
            reply = sent => {
                let reply = reply.map_err(unreachable)?;
                Ok(decode_reply(&self.to.addr, &reply)?)
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
        Some(Backoff::new(std::iter::repeat(Duration::from_millis(100))))
    }
}
