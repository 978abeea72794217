//! A worker of a swarm: runs what it is assigned and says how that goes.
//!
//! The agent holds one session with the leader. Each task is driven by a runner of its own, one
//! step at a time; what a step is, a pure function says ([`step`]). A lost session stops nothing.

mod agent;
mod assignments;
mod attachments;
mod conversion;
mod images;
mod listening;
mod networks;
mod reporter;
mod runner;
pub mod step;
mod volumes;

pub use agent::{Agent, AgentConfig, AgentEvent, Connect, Connecting};
pub use attachments::Attachments;
pub use conversion::{TASK_ID_LABEL, container_mount, health_check};
pub use networks::SwarmNetworks;
pub use volumes::Volumes;
