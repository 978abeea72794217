//! Tasks: one run of one container, bound to one node for life.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use skep_api_derive::Extensible;

use crate::container::{ContainerSpec, Driver};
use crate::generic_resource::GenericResource;
use crate::id::{NetworkId, NodeId, ServiceId, TaskId};
use crate::object::Meta;
use crate::timestamp::Timestamp;
use crate::units::{ByteSize, NanoCpus, Nanos};
use crate::volume::VolumeAttachment;

/// Where a task stands. Both states of a task only move down this list.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Extensible, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TaskState {
    #[default]
    New,
    Pending,
    Assigned,
    Accepted,
    Preparing,
    Ready,
    Starting,
    Running,
    Complete,
    Shutdown,
    Failed,
    Rejected,
    /// Desired only: shut the task down and forget it.
    Remove,
    Orphaned,
}

impl TaskState {
    /// Whether the task has ended and never runs again.
    #[must_use]
    pub fn is_terminal(self) -> bool {
        self > Self::Running
    }

    /// As a desired state: whether the task is to run. Jobs' tasks are to be complete, others to be running.
    #[must_use]
    pub fn is_wanted(self) -> bool {
        self <= Self::Complete
    }

    /// The word of the Engine API.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::New => "new",
            Self::Pending => "pending",
            Self::Assigned => "assigned",
            Self::Accepted => "accepted",
            Self::Preparing => "preparing",
            Self::Ready => "ready",
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Complete => "complete",
            Self::Shutdown => "shutdown",
            Self::Failed => "failed",
            Self::Rejected => "rejected",
            Self::Remove => "remove",
            Self::Orphaned => "orphaned",
        }
    }
}

/// What a worker (or the scheduler, while no worker has it) says of a task.
#[derive(Clone, Debug, Default, PartialEq, Extensible, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct TaskStatus {
    pub timestamp: Timestamp,
    pub state: TaskState,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub message: String,
    /// Why the task waits or failed; empty while all is well.
    #[serde(rename = "Err", skip_serializing_if = "String::is_empty")]
    pub error: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub container_status: Option<ContainerStatus>,
    pub port_status: PortStatus,
}

#[derive(Clone, Debug, Default, PartialEq, Extensible, Serialize, Deserialize)]
#[serde(default)]
pub struct ContainerStatus {
    #[serde(rename = "ContainerID")]
    pub container_id: String,
    #[serde(rename = "PID")]
    pub pid: i32,
    #[serde(rename = "ExitCode")]
    pub exit_code: i32,
}

/// The ports that a task's node publishes for it.
#[derive(Clone, Debug, Default, PartialEq, Extensible, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct PortStatus {
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub ports: Vec<crate::service::PortConfig>,
}

/// What a task runs, and how. Shared between a service and its tasks.
#[derive(Clone, Debug, Default, PartialEq, Extensible, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct TaskSpec {
    #[serde(rename = "ContainerSpec")]
    pub container: ContainerSpec,
    #[serde(skip_serializing_if = "is_zero")]
    pub resources: ResourceRequirements,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub restart_policy: Option<RestartPolicy>,
    #[serde(skip_serializing_if = "is_zero")]
    pub placement: Placement,
    /// A counter; a change of it renews every task.
    pub force_update: u64,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub runtime: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub log_driver: Option<Driver>,
    /// The networks that the task joins.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub networks: Vec<NetworkAttachmentConfig>,
}

/// A network that the tasks of a service join.
#[derive(Clone, Debug, Default, PartialEq, Extensible, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct NetworkAttachmentConfig {
    /// The network's id; its name until the manager has looked it up.
    pub target: String,
    /// Further names of the service in that network.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub aliases: Vec<String>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub driver_opts: BTreeMap<String, String>,
}

/// A task's place in a network: the address is its own until it has ended.
#[derive(Clone, Debug, PartialEq, Eq, Extensible)]
pub struct Attachment {
    pub network: NetworkId,
    pub address: std::net::Ipv4Addr,
}

#[derive(Clone, Debug, Default, PartialEq, Extensible, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct ResourceRequirements {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub limits: Option<Limits>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reservations: Option<Resources>,
}

impl ResourceRequirements {
    /// What the scheduler sets aside on the node.
    #[must_use]
    pub fn reserved(&self) -> Resources {
        self.reservations.clone().unwrap_or_default()
    }
}

/// CPU and memory: a node's, or what a task reserves of it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Extensible, Serialize, Deserialize)]
#[serde(default)]
pub struct Resources {
    #[serde(rename = "NanoCPUs", skip_serializing_if = "NanoCpus::is_zero")]
    pub nano_cpus: NanoCpus,
    #[serde(rename = "MemoryBytes", skip_serializing_if = "ByteSize::is_zero")]
    pub memory_bytes: ByteSize,
    #[added]
    #[serde(rename = "GenericResources", skip_serializing_if = "Vec::is_empty")]
    pub generic: Vec<GenericResource>,
}

/// What a task may use at most.
#[derive(Clone, Debug, Default, PartialEq, Extensible, Serialize, Deserialize)]
#[serde(default)]
pub struct Limits {
    #[serde(rename = "NanoCPUs", skip_serializing_if = "NanoCpus::is_zero")]
    pub nano_cpus: NanoCpus,
    #[serde(rename = "MemoryBytes", skip_serializing_if = "ByteSize::is_zero")]
    pub memory_bytes: ByteSize,
    /// Processes; none if zero.
    #[serde(rename = "Pids", skip_serializing_if = "is_zero")]
    pub pids: i64,
}

/// When an ended task is replaced.
#[derive(Clone, Debug, Default, PartialEq, Extensible, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct RestartPolicy {
    pub condition: RestartCondition,
    /// 5 s if absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub delay: Option<Nanos>,
    /// Without limit if absent or zero.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_attempts: Option<u64>,
    /// Attempts older than this are forgotten; zero: none are.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub window: Option<Nanos>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Extensible, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RestartCondition {
    None,
    OnFailure,
    #[default]
    #[serde(alias = "")]
    Any,
}

/// Which nodes a task may run on, and which it likes.
#[derive(Clone, Debug, Default, PartialEq, Extensible, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct Placement {
    /// Each `key==value` or `key!=value`; see [`crate::constraint`].
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub constraints: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub preferences: Vec<PlacementPreference>,
    /// Tasks of the service on one node; no limit if zero.
    #[serde(skip_serializing_if = "is_zero")]
    pub max_replicas: u64,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub platforms: Vec<Platform>,
}

fn is_zero<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

#[derive(Clone, Debug, Default, PartialEq, Extensible, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct PlacementPreference {
    pub spread: SpreadOver,
}

/// Spread evenly over the values of a label, such as `node.labels.zone`.
#[derive(Clone, Debug, Default, PartialEq, Extensible, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct SpreadOver {
    pub spread_descriptor: String,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Extensible, Serialize, Deserialize)]
#[serde(default)]
pub struct Platform {
    #[serde(rename = "Architecture", skip_serializing_if = "String::is_empty")]
    pub architecture: String,
    #[serde(rename = "OS", skip_serializing_if = "String::is_empty")]
    pub os: String,
}

impl Platform {
    /// Whether a node of platform `node` runs what this names; `x86_64` and `amd64` are one.
    #[must_use]
    pub fn runs_on(&self, node: &Self) -> bool {
        let architecture = |text: &str| match text {
            "x86_64" => "amd64".to_owned(),
            "aarch64" => "arm64".to_owned(),
            other => other.to_owned(),
        };
        (self.os.is_empty() || self.os == node.os)
            && (self.architecture.is_empty() || architecture(&self.architecture) == architecture(&node.architecture))
    }
}

/// One run of a service's container.
#[derive(Clone, Debug, PartialEq, Extensible, Serialize)]
#[serde(rename_all = "PascalCase")]
pub struct Task {
    #[serde(rename = "ID")]
    pub id: TaskId,
    #[serde(flatten)]
    pub meta: Meta,
    pub labels: BTreeMap<String, String>,
    pub spec: Arc<TaskSpec>,
    #[serde(rename = "ServiceID")]
    pub service_id: ServiceId,
    /// The service's name when the task was made; containers and logs are named by it.
    #[serde(skip)]
    pub service_name: String,
    /// Ports that the task's node publishes for it (`mode=host`).
    #[serde(skip)]
    pub ports: Vec<crate::service::PortConfig>,
    pub slot: Slot,
    /// Its own ports that connections come to through the routing mesh.
    #[serde(skip)]
    pub mesh_ports: Vec<(crate::service::Protocol, u16)>,
    /// Its addresses, the ingress network's first; empty until they are given out, and for a task
    /// that joins no network of the swarm.
    #[serde(skip)]
    pub networks: Vec<Attachment>,
    #[serde(rename = "NodeID", skip_serializing_if = "Option::is_none")]
    pub node_id: Option<NodeId>,
    pub status: TaskStatus,
    pub desired_state: TaskState,
    /// The run of the job that it belongs to; none if its service is no job.
    #[serde(serialize_with = "crate::mode::indexed_if_any", skip_serializing_if = "Option::is_none")]
    pub job_iteration: Option<u64>,
    /// When the task was first seen running.
    #[serde(skip)]
    pub running_since: Option<Timestamp>,
    /// The swarm's for tasks that do not say, as it was when the task was made.
    #[added]
    #[serde(skip)]
    pub usual_log_driver: Option<Driver>,
    /// What it has of its node's generic resources.
    #[added]
    #[serde(rename = "AssignedGenericResources", skip_serializing_if = "Vec::is_empty")]
    pub assigned: Vec<GenericResource>,
    /// The volumes of the swarm that it was given with its node.
    #[added]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub volumes: Vec<VolumeAttachment>,
}

impl Task {
    /// Where its output goes; none: where its node's usually does.
    #[must_use]
    pub fn log_driver(&self) -> Option<&Driver> {
        self.spec.log_driver.as_ref().or(self.usual_log_driver.as_ref())
    }
}

/// What a task stands in for: a numbered replica, or a node (which the API shows as slot 0).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Extensible)]
pub enum Slot {
    Replica(u64),
    Node(NodeId),
}

impl Serialize for Slot {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Replica(number) => serializer.serialize_u64(*number),
            Self::Node(_) => serializer.serialize_u64(0),
        }
    }
}

impl Task {
    /// `service.slot`, or `service.node-id` for a global service.
    #[must_use]
    pub fn slot_name(&self) -> String {
        match self.slot {
            Slot::Replica(number) => format!("{}.{number}", self.service_name),
            Slot::Node(node) => format!("{}.{node}", self.service_name),
        }
    }

    /// `service.slot.task-id`: the name of the task and of its container.
    #[must_use]
    pub fn name(&self) -> String {
        format!("{}.{}", self.slot_name(), self.id)
    }

    /// The networks of the swarm that it joins by name, as the manager looked them up.
    pub fn named_networks(&self) -> impl Iterator<Item = NetworkId> + '_ {
        self.spec.networks.iter().filter_map(|wanted| wanted.target.parse().ok())
    }

    /// Whether the task has done its part of the job that it belongs to.
    #[must_use]
    pub fn is_done(&self) -> bool {
        self.desired_state == TaskState::Complete && self.status.state == TaskState::Complete
    }

    /// Whether the task should run and has not ended.
    #[must_use]
    pub fn is_runnable(&self) -> bool {
        self.desired_state.is_wanted() && !self.status.state.is_terminal()
    }
}
