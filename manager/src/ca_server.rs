//! Signs certificates: for nodes that join with a token, and for nodes that renew.

use std::time::SystemTime;

use skep_api::grpc::{CertificateRequest, IssuedCertificate};
use skep_api::{Availability, NodeId, NodeRole, Timestamp};
use skep_pki::{JoinToken, PeerIdentity, RootAuthority, Subject};
use skep_raft_store::Tables;
use tonic::Status;

use crate::control::Command;

/// What a request comes to.
#[derive(Debug)]
pub(crate) enum Decision {
    /// The node is known: sign for it.
    Renew(Subject),
    /// The token is good: admit the node first.
    Admit { command: Box<Command>, subject: Subject },
}

/// Decides about a request from its proof: a valid certificate of ours, or a join token.
pub(crate) fn decide(
    request: &CertificateRequest,
    peer: Option<&PeerIdentity>,
    tables: &Tables,
    now: SystemTime,
) -> Result<Decision, Status> {
    let cluster = tables.cluster().ok_or_else(|| Status::unavailable(crate::control::NO_LEADER))?;
    if request.join_token.is_empty() {
        let peer = crate::authority::check(peer, crate::authority::Needs::AnyNode, tables, now)?;
        let node = tables
            .nodes
            .get(peer.node())
            .ok_or_else(|| Status::permission_denied(format!("node {} is not known to the swarm", peer.node())))?;
        // Invariant: the role is what the swarm wants of the node, never what it asks for.
        let subject = Subject { node: node.id, role: node.spec.role, cluster: cluster.id };
        return Ok(Decision::Renew(subject));
    }
    let role = role_of_token(&request.join_token, tables)?;
    let availability: Availability = request
        .availability
        .parse()
        .map_err(|error: skep_api::node::ParseAvailabilityError| Status::invalid_argument(error.to_string()))?;
    let id = NodeId::random();
    Ok(Decision::Admit {
        command: Box::new(Command::AdmitNode { id, role, availability }),
        subject: Subject { node: id, role, cluster: cluster.id },
    })
}

fn role_of_token(text: &str, tables: &Tables) -> Result<NodeRole, Status> {
    let refused = || {
        Status::permission_denied(
            "a valid join token is necessary to join this cluster: this one is wrong or was rotated; get the one in force \
             from 'swarm join-token'",
        )
    };
    let token: JoinToken = text.parse().map_err(|_| refused())?;
    let cluster = tables.cluster().ok_or_else(refused)?;
    let tokens = [(&cluster.join_tokens.manager, NodeRole::Manager), (&cluster.join_tokens.worker, NodeRole::Worker)];
    let matching = tokens.into_iter().find(|(ours, _)| {
        String::from_utf8_lossy(ours.expose()).parse::<JoinToken>().is_ok_and(|ours| ours.matches(&token))
    });
    matching.map(|(_, role)| role).ok_or_else(refused)
}

/// Signs with the swarm's root, or with the one that is to become it.
pub(crate) fn sign(
    request: &CertificateRequest,
    subject: Subject,
    tables: &Tables,
    now: SystemTime,
) -> Result<IssuedCertificate, Status> {
    let cluster = tables.cluster().ok_or_else(|| Status::unavailable(crate::control::NO_LEADER))?;
    let internal = |error: skep_pki::CaError| Status::internal(error.to_string());
    let signing = cluster.signing_root();
    let root = RootAuthority::load(&signing.certificate_pem, &signing.key_pem).map_err(internal)?;
    let csr = String::from_utf8_lossy(&request.csr_pem);
    let life = cluster.spec.ca.node_cert_expiry.duration();
    let certificate =
        root.sign(&csr, subject, life, now).map_err(|error| Status::invalid_argument(error.to_string()))?;
    tracing::info!(node = %subject.node, role = subject.role.as_str(), at = %Timestamp::from_system(now), "a certificate was issued");
    Ok(IssuedCertificate {
        certificate_pem: (certificate + &signing.cross_signed_pem).into_bytes(),
        root_certificate_pem: cluster.root_ca.certificate_pem.clone().into_bytes(),
        data_path_port: u32::from(cluster.data_path_port),
    })
}
