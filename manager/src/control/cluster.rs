//! The swarm's own settings and tokens.

use std::time::SystemTime;

use skep_api::cluster::RootCa;
use skep_api::{Cluster, ClusterSpec, SecretBytes, Timestamp};
use skep_pki::{CaDigest, CaError, JoinToken, RootAuthority, UnlockKey};
use skep_raft_store::{Tables, Transaction};

use super::{ControlError, Outcome};

pub(super) struct Rotate {
    pub(super) worker: bool,
    pub(super) manager: bool,
    pub(super) unlock_key: bool,
    /// Of a root certificate that the spec brings.
    pub(super) root_key: SecretBytes,
    pub(super) now: Timestamp,
}

pub(super) fn update(
    tables: &Tables,
    tx: &mut Transaction,
    version: u64,
    mut spec: ClusterSpec,
    rotate: &Rotate,
) -> Result<Outcome, ControlError> {
    let cluster = tables.cluster().ok_or_else(ControlError::no_leader)?;
    ControlError::check_version("swarm", version, &cluster.meta)?;
    spec.validate().map_err(ControlError::invalid)?;
    if spec.name.is_empty() {
        "default".clone_into(&mut spec.name);
    }
    let mut cluster = (**cluster).clone();
    cluster.next_root = next_root(&cluster, &spec, rotate)?;
    cluster.spec = spec;
    let digest = CaDigest::of_pem(&cluster.root_ca.certificate_pem);
    let token = || SecretBytes::new(JoinToken::generate(digest).expose().into_bytes());
    if rotate.worker {
        cluster.join_tokens.worker = token();
    }
    if rotate.manager {
        cluster.join_tokens.manager = token();
    }
    cluster.unlock_key = match cluster.spec.encryption_config.auto_lock_managers {
        false => SecretBytes::default(),
        true if rotate.unlock_key || cluster.unlock_key.is_empty() => UnlockKey::generate().expose(),
        true => cluster.unlock_key,
    };
    tx.update(cluster);
    Ok(Outcome::Done)
}

/// The root that nodes are to have certificates of next, if another than the one in force.
fn next_root(cluster: &Cluster, spec: &ClusterSpec, rotate: &Rotate) -> Result<Option<RootCa>, ControlError> {
    let brought = spec.ca.signing_ca_cert.trim();
    let now = SystemTime::UNIX_EPOCH + rotate.now.since(Timestamp::from_nanos(0));
    let unfit = |error: CaError| ControlError::invalid(skep_api::with_causes(&error));
    if brought.is_empty() != rotate.root_key.is_empty() {
        let known = [&cluster.root_ca, cluster.signing_root()].map(|root| root.certificate_pem.trim());
        if brought.is_empty() {
            return Err(ControlError::invalid("a root key is given without its certificate: give both (--ca-cert)"));
        }
        // Whoever changes something else sends back what was told.
        if known.contains(&brought) || brought == cluster.spec.ca.signing_ca_cert.trim() {
            return Ok(cluster.next_root.clone());
        }
        return Err(ControlError::invalid("a root certificate is given without its key: give both (--ca-key)"));
    }
    let (root, key_pem) = if !brought.is_empty() {
        (RootAuthority::import(brought, &rotate.root_key, now).map_err(unfit)?, rotate.root_key.clone())
    } else if spec.ca.force_rotate != cluster.spec.ca.force_rotate {
        RootAuthority::generate(now).map_err(unfit)?
    } else {
        return Ok(cluster.next_root.clone());
    };
    if root.certificate_pem() == cluster.root_ca.certificate_pem {
        // Back to what all trust anyway.
        return Ok(None);
    }
    let before = &cluster.root_ca;
    let before = RootAuthority::load(&before.certificate_pem, &before.key_pem).map_err(unfit)?;
    let cross_signed_pem = before.cross_sign(&root, now).map_err(unfit)?;
    Ok(Some(RootCa { certificate_pem: root.certificate_pem().to_owned(), key_pem, cross_signed_pem }))
}
