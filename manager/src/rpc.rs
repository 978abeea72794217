//! The gRPC services: each call is checked against its caller's certificate, then handed on.

use std::sync::Arc;
use std::time::SystemTime;

use skep_api::encoding;
use skep_api::grpc::control_server::Control;
use skep_api::grpc::node_ca_server::NodeCa;
use skep_api::grpc::raft_server::Raft;
use skep_api::grpc::{
    CertificateRequest, ControlMessage, IssuedCertificate, JoinRaftReply, JoinRaftRequest, RaftMessage, ReadIndexReply,
    ReadIndexRequest, RootCertificate, RootCertificateRequest,
};
use skep_pki::PeerIdentity;
use skep_raft_store::RpcKind;
use tonic::{Request, Response, Status};

use crate::authority::{Needs, check};
use crate::ca_server::{self, Decision};
use crate::control::{Command, Reason};
use crate::manager::Shared;
use crate::transport::PeerInfo;
use crate::wires::Envelope;

/// All services of one manager.
#[derive(Clone)]
pub(crate) struct Services(pub(crate) Arc<Shared>);

impl Services {
    fn caller<T>(&self, request: &Request<T>, needs: Needs) -> Result<(PeerIdentity, PeerInfo), Status> {
        let info = info(request)?;
        let peer = check(info.identity.as_ref(), needs, &self.0.store.view(), SystemTime::now())?;
        Ok((peer, info))
    }

    async fn raft(&self, kind: RpcKind, request: Request<RaftMessage>) -> Result<Response<RaftMessage>, Status> {
        self.caller(&request, Needs::Manager)?;
        let message = request.into_inner();
        let (store, envelope) = (&self.0.store, Envelope { to: message.to, incarnation: message.incarnation });
        if let Some(incarnation) = envelope.other_incarnation(store) {
            return Ok(Response::new(RaftMessage { incarnation, ..RaftMessage::default() }));
        }
        let answered = store.handle_rpc(envelope.addressee(store), kind, &message.body).await;
        let body = answered.map_err(|error| Status::failed_precondition(error.to_string()))?;
        Ok(Response::new(RaftMessage { body, incarnation: message.incarnation, to: 0 }))
    }
}

fn info<T>(request: &Request<T>) -> Result<PeerInfo, Status> {
    request.extensions().get::<PeerInfo>().cloned().ok_or_else(|| Status::internal("the connection has no peer"))
}

#[tonic::async_trait]
impl NodeCa for Services {
    async fn get_root_certificate(
        &self,
        _request: Request<RootCertificateRequest>,
    ) -> Result<Response<RootCertificate>, Status> {
        // The one that join tokens name; this manager itself may follow it a moment later.
        let root_pem = self.0.store.view().cluster().map(|cluster| cluster.root_ca.certificate_pem.clone());
        let certificate_pem = root_pem.unwrap_or_else(|| self.0.tls.identity().root_pem).into_bytes();
        Ok(Response::new(RootCertificate { certificate_pem }))
    }

    async fn issue_certificate(
        &self,
        request: Request<CertificateRequest>,
    ) -> Result<Response<IssuedCertificate>, Status> {
        let info = info(&request)?;
        let request = request.into_inner();
        // Tokens and roles must be those in force, wherever the request comes in.
        let tables = self.0.read().await.map_err(|error| Status::unavailable(error.to_string()))?;
        let subject = match ca_server::decide(&request, info.identity.as_ref(), &tables, SystemTime::now())? {
            Decision::Renew(subject) => subject,
            Decision::Admit { command, subject } => {
                self.0.execute(*command).await.map_err(|error| Status::unavailable(error.message))?;
                subject
            }
        };
        Ok(Response::new(ca_server::sign(&request, subject, &tables, SystemTime::now())?))
    }
}

#[tonic::async_trait]
impl Raft for Services {
    async fn append_entries(&self, request: Request<RaftMessage>) -> Result<Response<RaftMessage>, Status> {
        self.raft(RpcKind::AppendEntries, request).await
    }
    async fn vote(&self, request: Request<RaftMessage>) -> Result<Response<RaftMessage>, Status> {
        self.raft(RpcKind::Vote, request).await
    }
    async fn pre_vote(&self, request: Request<RaftMessage>) -> Result<Response<RaftMessage>, Status> {
        self.raft(RpcKind::PreVote, request).await
    }
    async fn transfer_leader(&self, request: Request<RaftMessage>) -> Result<Response<RaftMessage>, Status> {
        self.raft(RpcKind::TransferLeader, request).await
    }
}

#[tonic::async_trait]
impl Control for Services {
    async fn execute(&self, request: Request<ControlMessage>) -> Result<Response<ControlMessage>, Status> {
        self.caller(&request, Needs::Manager)?;
        let command: Command = encoding::decode(&request.into_inner().body)
            .map_err(|error| Status::invalid_argument(error.to_string()))?;
        if self.0.dispatcher().is_none() {
            return Err(Status::failed_precondition("this manager is not the leader"));
        }
        let result = self.0.execute_here(command).await;
        if let Err(error) = &result
            && error.reason == Reason::NotLeader
        {
            return Err(Status::failed_precondition(&error.message));
        }
        Ok(Response::new(ControlMessage { body: encoding::encode(&result) }))
    }

    async fn read_index(&self, request: Request<ReadIndexRequest>) -> Result<Response<ReadIndexReply>, Status> {
        self.caller(&request, Needs::Manager)?;
        let index = self.0.store.read_index().await.map_err(|error| Status::failed_precondition(error.to_string()))?;
        Ok(Response::new(ReadIndexReply { index }))
    }

    async fn join_raft(&self, request: Request<JoinRaftRequest>) -> Result<Response<JoinRaftReply>, Status> {
        let (peer, info) = self.caller(&request, Needs::Manager)?;
        let request = request.into_inner();
        // `:2377` stands for the address the caller is seen at.
        let addr = match request.addr.strip_prefix(':') {
            Some(port) => format!("{}:{port}", info.addr.ip()),
            None => request.addr,
        };
        self.0.join_raft(peer.node(), request.raft_id, &addr).await?;
        let managers = self.0.store.members().into_iter().map(|(_, addr)| addr).collect();
        Ok(Response::new(JoinRaftReply { managers }))
    }
}
