//! A manager of a swarm: keeps what users declare true.
//!
//! Every manager replicates the state, answers reads and takes commands; the leader alone decides:
//! it plans tasks and places them, holds the workers' sessions, and keeps membership in step with
//! roles. Which calls a peer may make is decided from its certificate in [`authority`].
//!
//! It never sees a container: it speaks of tasks, and workers of containers.

pub mod authority;
pub mod control;

mod allocator;
mod ca_server;
mod dispatcher;
mod leader;
mod orchestrator;
mod roles;
mod rpc;
pub mod transport;
mod trust;
mod volumes;
mod wires;

mod manager;

pub use manager::{Manager, ManagerConfig, ManagerError, ReadError};
pub use wires::{BulkReply, BulkTransport, Envelope};
