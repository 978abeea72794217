//! The words all of Skep speaks: the object model (cluster, node, service, task, secret, config),
//! the ids, the two encodings (bincode inside, JSON of the Engine API outside) and the gRPC
//! services between nodes.
//!
//! The types are checked when they are made: a [`ServiceSpec`] that went through
//! [`validate`](service::ServiceSpec::validate) needs no second look inside. This crate never
//! waits, reads no clock, and knows of no other crate of Skep.

// What the derive makes names this crate as others do.
extern crate self as skep_api;

pub mod cause;
pub mod encoding;
pub mod escape;
pub mod id;
pub mod ipv6;
pub mod secret_bytes;
pub mod subnet;
pub mod template;
pub mod timestamp;
pub mod units;

pub mod name;

pub mod attachment;
pub mod cluster;
pub mod config;
pub mod constraint;
pub mod container;
pub mod expansion;
pub mod mode;
pub mod network;
pub mod node;
pub mod object;
pub mod overlay;
pub mod secret;
pub mod service;
pub mod task;
pub mod volume;

pub mod buildkit;
pub mod generic_resource;
pub mod grpc;
pub mod session;

pub use cause::with_causes;
pub use escape::escape;
pub use id::{AttachmentId, ClusterId, ConfigId, NetworkId, NodeId, SecretId, ServiceId, TaskId, VolumeId};
pub use ipv6::{IpSubnet, Ipv6Side, SubnetV6};
pub use object::{Meta, Object, ObjectKey};
pub use secret_bytes::SecretBytes;
pub use subnet::Subnet;
pub use timestamp::Timestamp;

pub use skep_api_derive::Extensible;

pub use attachment::{AttachmentGrant, AttachmentWish, NetworkAttachment};
pub use cluster::{Cluster, ClusterSpec};
pub use config::{Config, ConfigSpec};
pub use mode::{JobStatus, ServiceMode};
pub use network::{Network, NetworkSpec};
pub use node::{Availability, Node, NodeDescription, NodeRole, NodeSpec, NodeState};
pub use secret::{Secret, SecretSpec};
pub use service::{Service, ServiceSpec};
pub use task::{Task, TaskSpec, TaskState, TaskStatus};
pub use volume::{Volume, VolumeSpec};
