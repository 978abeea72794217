//! The swarm itself: its settings, its certificate authority, its join tokens.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use skep_api_derive::Extensible;

use crate::container::Driver;
use crate::id::{ClusterId, NodeId};
use crate::object::Meta;
use crate::secret_bytes::SecretBytes;
use crate::units::Nanos;

/// The settings that `swarm update` changes.
#[derive(Clone, Debug, Default, PartialEq, Extensible, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct ClusterSpec {
    pub name: String,
    pub labels: BTreeMap<String, String>,
    pub orchestration: OrchestrationConfig,
    pub raft: RaftConfig,
    pub dispatcher: DispatcherConfig,
    #[serde(rename = "CAConfig")]
    pub ca: CaConfig,
    pub encryption_config: EncryptionConfig,
    #[added]
    pub task_defaults: TaskDefaults,
}

#[derive(Clone, Debug, PartialEq, Extensible, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct OrchestrationConfig {
    /// Tasks kept per slot, the live one among them; negative: all.
    pub task_history_retention_limit: i64,
}

impl Default for OrchestrationConfig {
    fn default() -> Self {
        Self { task_history_retention_limit: 5 }
    }
}

#[derive(Clone, Debug, PartialEq, Extensible, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct RaftConfig {
    /// Log entries between snapshots.
    pub snapshot_interval: u64,
    pub keep_old_snapshots: u64,
    /// Log entries kept behind a snapshot, so that a slow follower needs no snapshot.
    pub log_entries_for_slow_followers: u64,
    pub election_tick: i64,
    pub heartbeat_tick: i64,
}

impl Default for RaftConfig {
    fn default() -> Self {
        Self {
            snapshot_interval: 10_000,
            keep_old_snapshots: 0,
            log_entries_for_slow_followers: 500,
            election_tick: 10,
            heartbeat_tick: 1,
        }
    }
}

#[derive(Clone, Debug, Default, PartialEq, Extensible, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct DispatcherConfig {
    /// Zero: adapts to the number of workers, from 1 s up.
    pub heartbeat_period: Nanos,
}

#[derive(Clone, Debug, PartialEq, Extensible, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct CaConfig {
    pub node_cert_expiry: Nanos,
    /// Counts wishes for another root certificate: a change of it is one.
    #[added]
    pub force_rotate: u64,
    /// The root that a user brought; empty: the swarm's own. Its key comes beside the spec, and is never told.
    #[added]
    #[serde(rename = "SigningCACert", skip_serializing_if = "String::is_empty")]
    pub signing_ca_cert: String,
}

impl Default for CaConfig {
    fn default() -> Self {
        Self { node_cert_expiry: Nanos::from_secs(90 * 24 * 3600), force_rotate: 0, signing_ca_cert: String::new() }
    }
}

/// The shortest life of a node's certificate.
pub const NODE_CERT_EXPIRY_MIN: Nanos = Nanos::from_secs(3600);

#[derive(Clone, Debug, Default, PartialEq, Extensible, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct EncryptionConfig {
    /// Whether managers that start anew need the unlock key.
    pub auto_lock_managers: bool,
}

/// What tasks have whose services do not say.
#[derive(Clone, Debug, Default, PartialEq, Extensible, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct TaskDefaults {
    /// None: that of the task's node.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub log_driver: Option<Driver>,
}

/// Why the swarm's settings are refused.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum ClusterSpecError {
    #[error("cert-expiry of {0:?} is too short: a certificate lives at least 1 hour")]
    CertExpiry(std::time::Duration),
    #[error("a snapshot interval of 0 is not possible: set at least 1 entry")]
    SnapshotInterval,
    #[error("a heartbeat period of {0:?} is not possible: set 100 ms to 1 minute, or 0 to let it adapt")]
    HeartbeatPeriod(std::time::Duration),
}

impl ClusterSpec {
    pub fn validate(&self) -> Result<(), ClusterSpecError> {
        if self.ca.node_cert_expiry < NODE_CERT_EXPIRY_MIN {
            return Err(ClusterSpecError::CertExpiry(self.ca.node_cert_expiry.duration()));
        }
        if self.raft.snapshot_interval == 0 {
            return Err(ClusterSpecError::SnapshotInterval);
        }
        let period = self.dispatcher.heartbeat_period;
        if !period.is_zero() && !(100_000_000..=60_000_000_000).contains(&period.0) {
            return Err(ClusterSpecError::HeartbeatPeriod(period.duration()));
        }
        Ok(())
    }
}

/// The tokens that let a node in.
#[derive(Clone, Debug, PartialEq, Extensible)]
pub struct JoinTokens {
    pub worker: SecretBytes,
    pub manager: SecretBytes,
}

/// The certificate authority. Its key is replicated, so that every manager can take over.
#[derive(Clone, Debug, PartialEq, Extensible)]
pub struct RootCa {
    pub certificate_pem: String,
    pub key_pem: SecretBytes,
    /// The same name and key, signed by the root before; empty for the first. It goes with every certificate that this
    /// root signs, for nodes that were away when it came.
    #[added]
    pub cross_signed_pem: String,
}

/// The swarm as it is stored; there is exactly one.
#[derive(Clone, Debug, PartialEq, Extensible)]
pub struct Cluster {
    pub id: ClusterId,
    pub meta: Meta,
    pub spec: ClusterSpec,
    pub root_ca: RootCa,
    pub join_tokens: JoinTokens,
    /// What opens managers' keys after their start, as users write it; empty if managers are not locked.
    pub unlock_key: SecretBytes,
    /// Nodes that were removed: their certificates are refused though still valid.
    pub removed_nodes: BTreeSet<NodeId>,
    pub data_path_port: u16,
    pub default_addr_pool: Vec<String>,
    pub subnet_size: u8,
    /// Counts recoveries from the loss of a majority: managers of before are not listened to.
    #[added]
    pub incarnation: u64,
    /// The root that signs by now, and is trusted once all nodes have certificates of it; none: the root itself.
    #[added]
    pub next_root: Option<RootCa>,
}

impl Cluster {
    /// What signs certificates.
    #[must_use]
    pub fn signing_root(&self) -> &RootCa {
        self.next_root.as_ref().unwrap_or(&self.root_ca)
    }
}
