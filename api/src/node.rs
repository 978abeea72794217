//! Nodes: the hosts of a swarm.

use std::collections::BTreeMap;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use skep_api_derive::Extensible;

use crate::id::NodeId;
use crate::object::Meta;
use crate::task::{Platform, Resources};
use crate::volume::NodeCsiInfo;

/// What a user says of a node.
#[derive(Clone, Debug, Default, PartialEq, Extensible, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct NodeSpec {
    #[serde(skip_serializing_if = "String::is_empty")]
    pub name: String,
    pub labels: BTreeMap<String, String>,
    pub role: NodeRole,
    pub availability: Availability,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Extensible, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NodeRole {
    #[default]
    Worker,
    Manager,
}

impl NodeRole {
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Worker => "worker",
            Self::Manager => "manager",
        }
    }

    /// The organisational unit of a certificate for this role.
    #[must_use]
    pub const fn organizational_unit(self) -> &'static str {
        match self {
            Self::Worker => "swarm-worker",
            Self::Manager => "swarm-manager",
        }
    }

    /// The role that a certificate's organisational unit names.
    #[must_use]
    pub fn from_organizational_unit(unit: &str) -> Option<Self> {
        [Self::Worker, Self::Manager].into_iter().find(|role| role.organizational_unit() == unit)
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Extensible, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Availability {
    /// Takes new tasks.
    #[default]
    #[serde(alias = "")]
    Active,
    /// Keeps its tasks and takes no new ones.
    Pause,
    /// Gives its tasks up.
    Drain,
}

/// A text that names no availability.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no availability: use active, pause or drain")]
pub struct ParseAvailabilityError(pub String);

impl FromStr for Availability {
    type Err = ParseAvailabilityError;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "" | "active" => Ok(Self::Active),
            "pause" => Ok(Self::Pause),
            "drain" => Ok(Self::Drain),
            other => Err(ParseAvailabilityError(other.to_owned())),
        }
    }
}

impl Availability {
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Active => "active",
            Self::Pause => "pause",
            Self::Drain => "drain",
        }
    }
}

/// What a node says of itself.
#[derive(Clone, Debug, Default, PartialEq, Extensible, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct NodeDescription {
    pub hostname: String,
    pub platform: Platform,
    pub resources: Resources,
    pub engine: EngineDescription,
    #[serde(rename = "TLSInfo")]
    pub tls: TlsInfo,
    /// How other nodes reach its data path; absent while it has none.
    #[serde(skip)]
    pub data_path: Option<DataPath>,
    /// The storage drivers that are there for it.
    #[added]
    #[serde(rename = "CSIInfo", skip_serializing_if = "Vec::is_empty")]
    pub csi: Vec<NodeCsiInfo>,
}

/// A node's end of the encrypted tunnels between nodes.
#[derive(Clone, Debug, PartialEq, Eq, Extensible)]
pub struct DataPath {
    /// Public, X25519: the first is the one to speak to, the others are taken as well.
    pub keys: Vec<[u8; 32]>,
    /// Empty: the address that the node's session comes from.
    pub addr: String,
    pub port: u16,
    /// UDP, of its kernel's own WireGuard, if it has that.
    pub kernel_port: Option<u16>,
}

impl NodeDescription {
    /// The node's side of a storage driver, if it is there.
    #[must_use]
    pub fn csi_driver(&self, name: &str) -> Option<&NodeCsiInfo> {
        self.csi.iter().find(|driver| driver.plugin_name == name)
    }

    /// The other name of the architecture: `amd64` for `x86_64`, `arm64` for `aarch64`.
    #[must_use]
    pub fn architecture_alias(&self) -> &str {
        match self.platform.architecture.as_str() {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            other => other,
        }
    }
}

#[derive(Clone, Debug, Default, PartialEq, Extensible, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct EngineDescription {
    pub engine_version: String,
    pub labels: BTreeMap<String, String>,
}

/// Which root a node trusts, so that a rotation can be followed.
#[derive(Clone, Debug, Default, PartialEq, Extensible, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct TlsInfo {
    pub trust_root: String,
    pub cert_issuer_subject: String,
    pub cert_issuer_public_key: String,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Extensible, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum NodeState {
    /// Not heard of since the leader took over.
    #[default]
    Unknown,
    Down,
    Ready,
}

impl NodeState {
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Unknown => "unknown",
            Self::Down => "down",
            Self::Ready => "ready",
        }
    }
}

/// What the leader knows of a node.
#[derive(Clone, Debug, Default, PartialEq, Extensible, Serialize)]
#[serde(rename_all = "PascalCase")]
pub struct NodeStatus {
    pub state: NodeState,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub message: String,
    /// The address that the node's session comes from.
    pub addr: String,
}

/// A manager's place in consensus.
#[derive(Clone, Debug, PartialEq, Eq, Extensible)]
pub struct RaftMember {
    /// Made anew at every promotion and never used twice.
    pub raft_id: u64,
    /// Where the manager's control port is reached.
    pub addr: String,
}

/// A node as it is stored.
#[derive(Clone, Debug, PartialEq, Extensible, Serialize)]
#[serde(rename_all = "PascalCase")]
pub struct Node {
    #[serde(rename = "ID")]
    pub id: NodeId,
    #[serde(flatten)]
    pub meta: Meta,
    pub spec: NodeSpec,
    pub description: NodeDescription,
    pub status: NodeStatus,
    /// Present while the node takes part in consensus.
    #[serde(skip)]
    pub raft: Option<RaftMember>,
    /// Port of the node's QUIC endpoint at [`NodeStatus::addr`].
    #[serde(skip)]
    pub bulk_port: u16,
}

impl Node {
    /// The role in force: a node counts as a manager while it takes part in consensus, as its
    /// user wishes it to be once the change has gone through.
    #[must_use]
    pub fn role(&self) -> NodeRole {
        if self.raft.is_some() { NodeRole::Manager } else { self.spec.role }
    }

    /// Whether new tasks may be placed here.
    #[must_use]
    pub fn takes_tasks(&self) -> bool {
        self.status.state == NodeState::Ready && self.spec.availability == Availability::Active
    }

    /// Whether tasks here must be replaced elsewhere.
    #[must_use]
    pub fn gives_up_tasks(&self) -> bool {
        self.status.state == NodeState::Down || self.spec.availability == Availability::Drain
    }
}

/// Made-up nodes for tests, here and in the crates above.
pub mod testing {
    use super::{Node, NodeDescription, NodeSpec, NodeState, NodeStatus};
    use crate::id::NodeId;
    use crate::object::Meta;
    use crate::task::{Platform, Resources};
    use crate::units::{ByteSize, NanoCpus};

    /// A ready worker with 4 CPUs and 8 GiB on linux/x86_64.
    #[must_use]
    pub fn node(number: u128) -> Node {
        Node {
            id: NodeId::from_u128(number),
            meta: Meta::default(),
            spec: NodeSpec::default(),
            description: NodeDescription {
                hostname: format!("n{number}"),
                platform: Platform { architecture: "x86_64".into(), os: "linux".into() },
                resources: Resources {
                    nano_cpus: NanoCpus(4_000_000_000),
                    memory_bytes: ByteSize(8 << 30),
                    ..Resources::default()
                },
                ..NodeDescription::default()
            },
            status: NodeStatus { state: NodeState::Ready, message: String::new(), addr: String::new() },
            raft: None,
            bulk_port: 0,
        }
    }
}
