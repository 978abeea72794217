//! Where a container stands, in memory and on disk.

use serde::{Deserialize, Serialize};
use skep_api::Timestamp;

use crate::container::health::HealthStatus;

/// A container's state, with what only that state has.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum ContainerState {
    Created,
    Running(Running),
    /// It has ended, and will be started again after a while.
    Restarting(Exit),
    Exited(Exit),
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Running {
    /// The container's first process, as the host numbers it.
    pub pid: i32,
    pub shim_pid: i32,
    /// The shim's start, in the kernel's ticks: tells it from a later process of the same number.
    pub shim_start_ticks: u64,
    pub started_at: Timestamp,
    /// Its first; the loopback's if it has none of its own.
    pub address: std::net::Ipv4Addr,
    /// Its places in the host's networks.
    #[serde(default)]
    pub endpoints: Vec<crate::network::Endpoint>,
    /// What its ports lead through, if it is not on the bridge.
    #[serde(default)]
    pub through: Option<std::net::Ipv4Addr>,
    /// The ports in force, with those that were picked.
    pub ports: Vec<crate::container::config::PublishedPort>,
    pub health: HealthStatus,
    /// Whether all its processes are held.
    #[serde(default)]
    pub paused: bool,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Exit {
    /// 0–255; 128 + n after signal n.
    pub code: i32,
    pub started_at: Timestamp,
    pub finished_at: Timestamp,
    pub oom_killed: bool,
    /// Why it never ran, or how its end was lost; empty otherwise.
    pub error: String,
}

impl ContainerState {
    /// Its places in networks; none unless it runs.
    #[must_use]
    pub fn endpoints(&self) -> &[crate::network::Endpoint] {
        match self {
            Self::Running(running) => &running.endpoints,
            Self::Created | Self::Restarting(_) | Self::Exited(_) => &[],
        }
    }

    /// The Engine API's word.
    #[must_use]
    pub const fn as_str(&self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Running(running) if running.paused => "paused",
            Self::Running(_) => "running",
            Self::Restarting(_) => "restarting",
            Self::Exited(_) => "exited",
        }
    }
}

/// What the shim leaves when the container's first process has ended.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct ExitRecord {
    pub(crate) code: i32,
    pub(crate) at_nanos: i64,
    pub(crate) oom_killed: bool,
}
