//! Getting a certificate: with a token from a manager whose root the token pins, or anew with the
//! certificate that is about to expire.

use std::sync::Arc;
use std::time::Duration;

use rustls::pki_types::UnixTime;
use skep_api::NodeRole;
use skep_api::grpc::node_ca_client::NodeCaClient;
use skep_api::grpc::{CertificateRequest, RootCertificateRequest};
use skep_manager::transport::{Channels, channel};
use skep_pki::{CaDigest, JoinToken, NodeIdentity, PendingIdentity, pinned_client_config};
use tonic::Code;

use super::{SwarmError, failed};

const RETRY_PAUSE: Duration = Duration::from_millis(300);
const CALL_LIMIT: Duration = Duration::from_secs(10);

/// Has a new node admitted; tries the managers again and again until `limit`.
pub(super) async fn join(
    managers: &[String],
    token: &JoinToken,
    token_text: &str,
    availability: &str,
    limit: Duration,
) -> Result<Admitted, SwarmError> {
    let deadline = tokio::time::Instant::now() + limit;
    loop {
        let mut last = String::new();
        for addr in managers {
            match try_join(addr, token, token_text, availability).await {
                Ok(admitted) => return Ok(admitted),
                Err(Attempt::Final(error)) => return Err(error),
                Err(Attempt::Retry(reason)) => last = format!("manager {addr}: {reason}"),
            }
        }
        if tokio::time::Instant::now() >= deadline {
            return Err(SwarmError::Failed {
                doing: "joining the swarm",
                reason: format!("no manager let this node in within {limit:?}; {last}"),
            });
        }
        tokio::time::sleep(RETRY_PAUSE).await;
    }
}

/// What a new node gets.
pub(super) struct Admitted {
    pub(super) identity: NodeIdentity,
    pub(super) data_path_port: u16,
}

enum Attempt {
    Final(SwarmError),
    Retry(String),
}

async fn try_join(addr: &str, token: &JoinToken, token_text: &str, availability: &str) -> Result<Admitted, Attempt> {
    let fatal = |error: &dyn std::fmt::Display| Attempt::Final(failed("joining the swarm")(error));
    let (config, seen) = pinned_client_config(&[b"h2"]).map_err(|error| fatal(&error))?;
    let mut client = NodeCaClient::new(channel(addr, Arc::new(config)));
    let root = within(client.get_root_certificate(RootCertificateRequest {})).await?;
    let root_pem = String::from_utf8_lossy(&root.certificate_pem).into_owned();
    // Invariant: the token is not sent before the manager has proved to be under the pinned root.
    let trusted = seen.is_manager_of(&root_pem, token.ca_digest(), UnixTime::now()).map_err(|error| fatal(&error))?;
    if !trusted {
        return Err(Attempt::Final(SwarmError::Refused(format!(
            "remote CA does not match fingerprint: the join token was made by another swarm (it pins CA {}, manager \
             {addr} shows CA {}); get the token from 'swarm join-token' on a manager of the swarm you mean",
            token.ca_digest(),
            CaDigest::of_pem(&root_pem)
        ))));
    }
    let pending = PendingIdentity::generate().map_err(|error| fatal(&error))?;
    let request = CertificateRequest {
        csr_pem: pending.request_pem().map_err(|error| fatal(&error))?.into_bytes(),
        join_token: token_text.trim().to_owned(),
        availability: availability.to_owned(),
    };
    let issued = within(client.issue_certificate(request)).await?;
    let certificate = String::from_utf8_lossy(&issued.certificate_pem).into_owned();
    let identity = pending.certified(&certificate, &root_pem).map_err(|error| fatal(&error))?;
    let data_path_port = u16::try_from(issued.data_path_port).map_err(|error| fatal(&error))?;
    Ok(Admitted { identity, data_path_port })
}

/// A call with a limit; what is refused for good is told apart from what may go better later.
async fn within<T>(call: impl Future<Output = Result<tonic::Response<T>, tonic::Status>>) -> Result<T, Attempt> {
    match tokio::time::timeout(CALL_LIMIT, call).await {
        Ok(Ok(response)) => Ok(response.into_inner()),
        Ok(Err(status)) => match status.code() {
            Code::PermissionDenied | Code::InvalidArgument | Code::Unauthenticated => {
                Err(Attempt::Final(SwarmError::Refused(status.message().to_owned())))
            }
            _ => Err(Attempt::Retry(status.message().to_owned())),
        },
        Err(_) => Err(Attempt::Retry(format!("no answer within {CALL_LIMIT:?}"))),
    }
}

/// Has the node's certificate renewed, in the role that the swarm gives it now; in `role` alone, if that is known: a manager
/// may be behind, and sign for another one.
pub(super) async fn renew(
    channels: &Channels,
    managers: &[String],
    root_pem: &str,
    role: Option<NodeRole>,
) -> anyhow::Result<NodeIdentity> {
    let mut last = anyhow::anyhow!("no manager is known");
    for addr in managers {
        let pending = PendingIdentity::generate()?;
        let csr_pem = pending.request_pem()?.into_bytes();
        let request = CertificateRequest { csr_pem, join_token: String::new(), availability: String::new() };
        let mut client = NodeCaClient::new(channels.to(addr)?);
        match tokio::time::timeout(CALL_LIMIT, client.issue_certificate(request)).await {
            Ok(Ok(issued)) => {
                let certificate = String::from_utf8_lossy(&issued.get_ref().certificate_pem).into_owned();
                let identity = pending.certified(&certificate, root_pem)?;
                if role.is_none_or(|role| role == identity.peer.role()) {
                    return Ok(identity);
                }
                last = anyhow::anyhow!("manager {addr} has not heard of the node's new role yet");
                continue;
            }
            Ok(Err(status)) => last = anyhow::anyhow!("manager {addr}: {}", status.message()),
            Err(_) => last = anyhow::anyhow!("manager {addr} gave no answer within {CALL_LIMIT:?}"),
        }
        channels.forget(addr);
    }
    Err(last)
}
