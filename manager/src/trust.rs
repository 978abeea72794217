//! Brings a change of the root certificate to its end: once every node has a certificate of the next root, that one is what
//! they trust.

use std::convert::Infallible;
use std::time::SystemTime;

use skep_api::{Cluster, SecretBytes, Timestamp};
use skep_pki::{CaDigest, IssuerInfo, JoinToken};
use skep_raft_store::{Store, Tables, Transaction, UpdateError};

/// Puts the next root certificate in force if it is time for it.
pub(crate) async fn complete_change(store: &Store) -> Result<(), UpdateError<Infallible>> {
    if completed(&store.view()).is_none() {
        return Ok(());
    }
    let done = store.update(|tables| {
        let mut transaction = Transaction::new(Timestamp::from_system(SystemTime::now()));
        if let Some(cluster) = completed(tables) {
            tracing::info!(root = %CaDigest::of_pem(&cluster.root_ca.certificate_pem), "the swarm has another root certificate");
            transaction.update(cluster);
        }
        Ok((transaction, ()))
    });
    done.await.inspect_err(|error| tracing::warn!(%error, "the next root certificate could not be put in force yet"))
}

/// The swarm with its next root in force, if it is time for it. Join tokens name the root, so there are new ones.
fn completed(tables: &Tables) -> Option<Cluster> {
    let cluster = tables.cluster()?;
    let next = cluster.next_root.clone()?;
    let issuer = IssuerInfo::of_pem(&next.certificate_pem).ok()?;
    let has_it = |node: &skep_api::Node| node.description.tls.cert_issuer_public_key == issuer.public_key;
    if !tables.nodes.iter().all(|node| has_it(node)) {
        return None;
    }
    let mut cluster = (**cluster).clone();
    let digest = CaDigest::of_pem(&next.certificate_pem);
    let token = || SecretBytes::new(JoinToken::generate(digest).expose().into_bytes());
    (cluster.join_tokens.worker, cluster.join_tokens.manager) = (token(), token());
    cluster.root_ca = next;
    cluster.next_root = None;
    Some(cluster)
}
