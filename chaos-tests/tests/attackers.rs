//! Who is refused, over real sockets: nodes without a certificate, with a worker's on a manager's
//! call, with an expired one, with one of another swarm, with one that was removed.

#![allow(clippy::unwrap_used, reason = "a test fails where it stands")]

use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use skep_api::grpc::control_client::ControlClient;
use skep_api::grpc::node_ca_client::NodeCaClient;
use skep_api::grpc::raft_client::RaftClient;
use skep_api::grpc::{
    CertificateRequest, ControlMessage, Heartbeat, JoinRaftRequest, ManagerMessage, RaftMessage, ReadIndexRequest,
    RootCertificateRequest, WorkerMessage, manager_message, worker_message,
};
use skep_api::{ClusterId, NodeId, NodeRole, session};
use skep_chaos_tests::{Host, Rig, take_turn, wait_until};
use skep_manager::transport::{Channels, channel, session_connection};
use skep_pki::{NodeIdentity, PendingIdentity, RootAuthority, Subject, TlsIdentity, pinned_client_config};
use tonic::transport::Channel;
use tonic::{Code, Status};

const MANAGER: &str = "10.77.0.1:2377";
/// What a client sees of a connection that the other side closes in, or right after, its handshake.
const CLOSED: [Code; 3] = [Code::Unavailable, Code::Unknown, Code::Cancelled];

/// Runs an attack from inside a host's network.
fn from_inside<T: Send>(host: &Host, attack: impl Future<Output = T> + Send) -> T {
    host.within_network(|| tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(attack))
}

fn identity(host: &Host) -> NodeIdentity {
    NodeIdentity::load(&host.data().join("swarm/certificates"), None).unwrap().unwrap()
}

fn with(identity: NodeIdentity) -> Channel {
    Channels::new(TlsIdentity::new(identity).unwrap()).to(MANAGER).unwrap()
}

/// A connection without any certificate.
fn without() -> Channel {
    let (config, _) = pinned_client_config(&[b"h2"]).unwrap();
    channel(MANAGER, Arc::new(config))
}

/// An identity made by a CA of the attacker's own, or by none at all.
fn forged(root: &RootAuthority, root_pem: &str, role: NodeRole, now: SystemTime) -> NodeIdentity {
    let pending = PendingIdentity::generate().unwrap();
    let subject = Subject { node: NodeId::random(), role, cluster: ClusterId::random() };
    let certificate = root.sign(&pending.request_pem().unwrap(), subject, Duration::from_secs(3600), now).unwrap();
    pending.certified(&certificate, root_pem).unwrap()
}

/// Tries every call that is for managers; returns what each came to.
async fn manager_calls(channel: Channel) -> Vec<(&'static str, Result<(), Status>)> {
    let mut raft = RaftClient::new(channel.clone());
    let mut control = ControlClient::new(channel);
    let raft_message = || RaftMessage { body: vec![1], ..RaftMessage::default() };
    vec![
        ("append", raft.append_entries(raft_message()).await.map(drop)),
        ("vote", raft.vote(raft_message()).await.map(drop)),
        ("pre-vote", raft.pre_vote(raft_message()).await.map(drop)),
        ("transfer", raft.transfer_leader(raft_message()).await.map(drop)),
        ("execute", control.execute(ControlMessage { body: vec![1] }).await.map(drop)),
        ("read-index", control.read_index(ReadIndexRequest {}).await.map(drop)),
        ("join-raft", control.join_raft(JoinRaftRequest { raft_id: 7, addr: MANAGER.into() }).await.map(drop)),
    ]
}

/// Begins a session; returns how the manager ends it.
async fn session_as(identity: Option<NodeIdentity>) -> Status {
    let connection = match identity {
        Some(identity) => Channels::new(TlsIdentity::new(identity).unwrap()).session(MANAGER).await,
        None => session_connection(pinned_client_config(&[session::ALPN]).unwrap().0.into(), MANAGER).await,
    };
    let (mut from_manager, mut to_manager) = session::split::<_, ManagerMessage>(connection.unwrap());
    let message = WorkerMessage { kind: Some(worker_message::Kind::Heartbeat(Heartbeat {})) };
    to_manager.send(&message).await.unwrap();
    match from_manager.next().await {
        Ok(Some(ManagerMessage { kind: Some(manager_message::Kind::End(end)) })) => {
            Status::new(end.code.into(), end.message)
        }
        other => panic!("the session is ended, not {other:?}"),
    }
}

#[track_caller]
fn all_refused(calls: &[(&str, Result<(), Status>)], codes: &[Code]) {
    for (call, result) in calls {
        match result {
            Err(status) if codes.contains(&status.code()) => {}
            other => panic!("{call} came to {other:?}, not {codes:?}"),
        }
    }
}

#[test]
fn only_nodes_of_the_swarm_in_the_right_role_are_heard() {
    take_turn!();
    let rig = Rig::swarm(3, 1);
    let (worker, attacker) = (identity(rig.host(2)), rig.host(3));

    let calls = from_inside(attacker, async { manager_calls(without()).await });
    all_refused(&calls, &[Code::Unauthenticated]);
    let refused = from_inside(attacker, session_as(None));
    assert_eq!(refused.code(), Code::Unauthenticated, "{refused}");
    let root = from_inside(attacker, async {
        NodeCaClient::new(without()).get_root_certificate(RootCertificateRequest {}).await
    });
    assert!(root.is_ok(), "the root certificate is for everyone: {root:?}");
    let no_proof = CertificateRequest {
        csr_pem: PendingIdentity::generate().unwrap().request_pem().unwrap().into_bytes(),
        join_token: String::new(),
        availability: String::new(),
    };
    let refused =
        from_inside(attacker, async { NodeCaClient::new(without()).issue_certificate(no_proof).await }).unwrap_err();
    assert_eq!(refused.code(), Code::Unauthenticated, "{refused}");

    let calls = from_inside(attacker, async { manager_calls(with(worker.clone())).await });
    all_refused(&calls, &[Code::PermissionDenied]);

    // Another swarm's CA, and our root's name on a certificate it never signed: no handshake.
    let now = SystemTime::now();
    let (other, _) = RootAuthority::generate(now).unwrap();
    let stranger = forged(&other, &worker.root_pem, NodeRole::Manager, now);
    let calls = from_inside(attacker, async { manager_calls(with(stranger)).await });
    all_refused(&calls, &CLOSED);
    let expired = forged(&other, &worker.root_pem, NodeRole::Manager, now - Duration::from_secs(10 * 24 * 3600));
    let calls = from_inside(attacker, async { manager_calls(with(expired)).await });
    all_refused(&calls, &CLOSED);

    // A node that was removed has a certificate that is still good, and is refused all the same.
    rig.host(2).stop_daemon();
    rig.host(1).ok(&["node", "rm", "--force", "n2"]);
    wait_until("the removed node is refused", Duration::from_secs(10), || {
        let refused = from_inside(attacker, session_as(Some(worker.clone())));
        (refused.code() == Code::PermissionDenied, refused.to_string())
    });
    let renewal = CertificateRequest {
        csr_pem: PendingIdentity::generate().unwrap().request_pem().unwrap().into_bytes(),
        join_token: String::new(),
        availability: String::new(),
    };
    let refused =
        from_inside(attacker, async { NodeCaClient::new(with(worker.clone())).issue_certificate(renewal).await });
    assert_eq!(refused.unwrap_err().code(), Code::PermissionDenied);
}
