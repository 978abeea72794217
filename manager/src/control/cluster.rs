//! The swarm's own settings and tokens.

use skep_api::{ClusterSpec, SecretBytes};
use skep_pki::{CaDigest, JoinToken, UnlockKey};
use skep_raft_store::{Tables, Transaction};

use super::{ControlError, Outcome};

pub(super) struct Rotate {
    pub(super) worker: bool,
    pub(super) manager: bool,
    pub(super) unlock_key: bool,
}

pub(super) fn update(
    tables: &Tables,
    tx: &mut Transaction,
    version: u64,
    mut spec: ClusterSpec,
    rotate: Rotate,
) -> Result<Outcome, ControlError> {
    let cluster = tables.cluster().ok_or_else(ControlError::no_leader)?;
    ControlError::check_version("swarm", version, &cluster.meta)?;
    spec.validate().map_err(ControlError::invalid)?;
    if spec.name.is_empty() {
        "default".clone_into(&mut spec.name);
    }
    let mut cluster = (**cluster).clone();
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
