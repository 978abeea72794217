//! What clients ask a swarm to change: checked, executed on the leader, answered.

mod cluster;
mod execute;
pub(crate) mod network;
mod node;
mod payload;
mod service;
mod volume;

use skep_api::{
    Availability, ClusterSpec, ConfigId, ConfigSpec, Extensible, Meta, NetworkId, NetworkSpec, NodeId, NodeRole,
    NodeSpec, SecretBytes, SecretId, SecretSpec, ServiceId, ServiceSpec, VolumeId, VolumeSpec,
};
use skep_raft_store::{ProposeError, Refusal, UpdateError};

pub(crate) use execute::execute;
pub use network::PREDEFINED as PREDEFINED_NETWORKS;

/// A change that a client asks for. Any manager takes it; the leader carries it out.
#[derive(Clone, Debug, PartialEq, Extensible)]
pub enum Command {
    UpdateCluster {
        version: u64,
        spec: ClusterSpec,
        rotate_worker_token: bool,
        rotate_manager_token: bool,
        rotate_unlock_key: bool,
        /// Of `spec.ca.signing_ca_cert`, if that is a new one.
        #[added]
        root_key: SecretBytes,
    },
    CreateService {
        spec: ServiceSpec,
    },
    UpdateService {
        id: ServiceId,
        version: u64,
        change: ServiceChange,
    },
    RemoveService {
        id: ServiceId,
    },
    UpdateNode {
        id: NodeId,
        version: u64,
        spec: NodeSpec,
    },
    RemoveNode {
        id: NodeId,
        force: bool,
    },
    CreateSecret {
        spec: SecretSpec,
    },
    UpdateSecret {
        id: SecretId,
        version: u64,
        spec: SecretSpec,
    },
    RemoveSecret {
        id: SecretId,
    },
    CreateConfig {
        spec: ConfigSpec,
    },
    UpdateConfig {
        id: ConfigId,
        version: u64,
        spec: ConfigSpec,
    },
    RemoveConfig {
        id: ConfigId,
    },
    CreateNetwork {
        spec: NetworkSpec,
    },
    RemoveNetwork {
        id: NetworkId,
    },
    /// From a manager's CA server: a node showed a valid token.
    AdmitNode {
        id: NodeId,
        role: NodeRole,
        availability: Availability,
    },
    CreateVolume {
        spec: VolumeSpec,
    },
    UpdateVolume {
        id: VolumeId,
        version: u64,
        spec: VolumeSpec,
    },
    RemoveVolume {
        id: VolumeId,
        force: bool,
    },
}

impl Command {
    /// Whether there is more to keep afterwards.
    const fn adds(&self) -> bool {
        match self {
            Self::CreateService { .. }
            | Self::UpdateService { .. }
            | Self::CreateSecret { .. }
            | Self::CreateConfig { .. }
            | Self::CreateNetwork { .. }
            | Self::CreateVolume { .. }
            | Self::AdmitNode { .. } => true,
            // What changes a few words, or makes room.
            Self::UpdateCluster { .. }
            | Self::UpdateNode { .. }
            | Self::UpdateSecret { .. }
            | Self::UpdateConfig { .. }
            | Self::RemoveService { .. }
            | Self::RemoveNode { .. }
            | Self::RemoveSecret { .. }
            | Self::RemoveConfig { .. }
            | Self::RemoveNetwork { .. }
            | Self::UpdateVolume { .. }
            | Self::RemoveVolume { .. } => false,
        }
    }
}

#[derive(Clone, Debug, PartialEq, Extensible)]
pub enum ServiceChange {
    Spec(Box<ServiceSpec>),
    /// Back to the spec before.
    RollBack,
}

/// What came of a command.
#[derive(Clone, Debug, PartialEq, Eq, Extensible)]
pub enum Outcome {
    Done,
    /// The id of what was created.
    Created(String),
}

/// The kinds of refusal a client is told apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Extensible)]
pub enum Reason {
    Invalid,
    NotFound,
    /// It exists, is in use, or is in a state that does not allow it.
    Conflict,
    /// It was changed since the client read it.
    Stale,
    Unsupported,
    /// Another leads, or soon will; nothing was done.
    NotLeader,
    /// Now is not the time: no leader, no majority.
    Unavailable,
    /// What stands in the way is just going.
    Settling,
}

/// Why a command was not carried out, in words for its user.
#[derive(Clone, Debug, PartialEq, Eq, Extensible, thiserror::Error)]
#[error("{message}")]
pub struct ControlError {
    pub reason: Reason,
    pub message: String,
}

/// The text clients know for a swarm without a leader.
pub const NO_LEADER: &str = "The swarm does not have a leader. It's possible that too few managers are online. \
                             Make sure more than half of the managers are online.";

impl ControlError {
    pub(crate) fn new(reason: Reason, message: impl ToString) -> Self {
        Self { reason, message: message.to_string() }
    }

    pub(crate) fn invalid(message: impl ToString) -> Self {
        Self::new(Reason::Invalid, message)
    }

    pub(crate) fn no_leader() -> Self {
        Self::new(Reason::Unavailable, NO_LEADER)
    }

    pub(crate) fn not_found(kind: &str, id: impl std::fmt::Display) -> Self {
        Self::new(Reason::NotFound, format!("{kind} {id} not found"))
    }

    /// Fails unless what the user declared is still as it was in the version that the user read. That the object
    /// itself has changed since, as its nodes and tasks did, is nobody's conflict.
    pub(crate) fn check_version(kind: &str, asked: u64, meta: &Meta) -> Result<(), Self> {
        if (meta.spec_version..=meta.version).contains(&asked) {
            return Ok(());
        }
        let found = meta.version;
        Err(Self::new(
            Reason::Stale,
            format!("update out of sequence: the {kind} has version {found}, not {asked}; read it again and repeat"),
        ))
    }
}

impl From<ProposeError> for ControlError {
    fn from(error: ProposeError) -> Self {
        match error {
            ProposeError::Refused(refusal) => refusal.into(),
            ProposeError::NotLeader { .. } => Self::new(Reason::NotLeader, error),
            ProposeError::TimedOut(_) | ProposeError::Stopped(_) => Self::new(Reason::Unavailable, error),
        }
    }
}

impl From<Refusal> for ControlError {
    fn from(refusal: Refusal) -> Self {
        let reason = match refusal {
            Refusal::Stale { .. } => Reason::Stale,
            Refusal::Missing(_) => Reason::NotFound,
            Refusal::Exists(_) => Reason::Conflict,
            Refusal::NameTaken { ref name, key } => {
                let kind = key.kind().to_lowercase();
                return Self::new(
                    Reason::Conflict,
                    format!(
                        "name conflicts with an existing object: {kind} {name} already exists; choose another name"
                    ),
                );
            }
            Refusal::TooLarge(_) | Refusal::Unreadable(_) => Reason::Invalid,
        };
        Self::new(reason, refusal)
    }
}

impl From<UpdateError<Self>> for ControlError {
    fn from(error: UpdateError<Self>) -> Self {
        match error {
            UpdateError::Propose(error) => error.into(),
            UpdateError::Caller(error) => error,
        }
    }
}
